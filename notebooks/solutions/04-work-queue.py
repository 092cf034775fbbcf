"""The exercises of notebook 04: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from aio_pika import Message

import mqlib as mq
from mqlib.checks import Task, Wrong


async def _what_comes_back() -> list[int]:
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True)
        for number in range(10):
            await channel.default_exchange.publish(Message(b"%d" % number), queue.name)
        messages = await mq.take_messages(queue, 10, ack=False)
        await messages[3].ack(multiple=True)
        await messages[8].reject(requeue=False)
    async with mq.channel(rabbit) as channel:
        left = await mq.take_messages(await channel.get_queue(queue.name), 10, within=0.5)
        return [int(message.body) for message in left]


async def judge_1(answer: Any) -> None:
    observed = await _what_comes_back()
    try:
        given = sorted(int(number) for number in answer)
    except (TypeError, ValueError):
        raise Wrong(f"give a list of numbers; this is {answer!r}") from None
    if given != observed:
        missing, extra = sorted(set(observed) - set(given)), sorted(set(given) - set(observed))
        raise Wrong(f"of your {given}, {extra} do not come back" if extra else f"{missing} come back, too")


async def judge_2(handle: Any) -> None:
    rabbit = mq.rabbitmq()
    calls: Counter[bytes] = Counter()

    async def work(body: bytes) -> None:
        calls[body] += 1
        if body == b"poison" or (body == b"shaky" and calls[body] < 3):
            raise RuntimeError(f"{body.decode()} failed")

    async with mq.channel(rabbit, prefetch=1) as channel:
        dead = await channel.declare_queue(rabbit.name("exercise-dead"), durable=True)
        arguments = {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": dead.name,
        }
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True, arguments=arguments)
        for body in (b"good", b"poison", b"shaky"):
            await channel.default_exchange.publish(Message(body, delivery_mode=2), queue.name)
        for _ in range(20):  # a handler that never gives up must not hold the judge
            found = await mq.take_messages(queue, 1, within=0.5, ack=False)
            if not found:
                break
            await handle(found[0], work)
        else:
            raise Wrong(f"after 20 deliveries there was still a task in the queue; tries so far: {dict(calls)}")
        letters = [letter.body for letter in await mq.take_messages(dead, 5, within=0.5)]
    if calls[b"good"] != 1:
        raise Wrong(f"the good task was worked on {calls[b'good']} times instead of once")
    if calls[b"shaky"] != 3 or b"shaky" in letters:
        raise Wrong(f"a task that succeeds at its third try got {calls[b'shaky']} tries")
    if calls[b"poison"] != 3:
        raise Wrong(f"the poison task got {calls[b'poison']} tries instead of 3")
    if letters != [b"poison"]:
        raise Wrong(f"the dead-letter queue holds {letters} instead of the poison task alone")


async def handle(message, work):
    try:
        await work(message.body)
    except Exception:
        earlier = message.headers.get("x-delivery-count", 0)
        await message.reject(requeue=earlier < 2)
    else:
        await message.ack()


async def forgets_to_count(message: Any, work: Any) -> None:
    try:
        await work(message.body)
        await message.ack()
    except Exception:
        await message.reject(requeue=True)


async def gives_up_at_once(message: Any, work: Any) -> None:
    try:
        await work(message.body)
        await message.ack()
    except Exception:
        await message.reject(requeue=False)


async def judge_3(run: Any) -> None:
    rabbit = mq.rabbitmq()
    done: list[int] = []
    stop, third = asyncio.Event(), asyncio.Event()

    async def work(body: bytes) -> None:
        if int(body) == 2:
            third.set()  # the order to stop comes in the middle of the third task
            await asyncio.sleep(0.05)
        done.append(int(body))

    async with mq.channel(rabbit, prefetch=5) as channel:
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True)
        for number in range(10):
            await channel.default_exchange.publish(Message(b"%d" % number), queue.name)
        task = asyncio.ensure_future(run(queue, work, stop))
        waiting = asyncio.ensure_future(third.wait())
        await asyncio.wait({task, waiting}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        stop.set()
        finished, _ = await asyncio.wait({task}, timeout=5)
        if not finished:
            task.cancel()
            raise Wrong("it had not returned 5 s after the order to stop")
        task.result()
    async with mq.channel(rabbit) as channel:
        left = await mq.take_messages(await channel.get_queue(queue.name), 10, within=0.5)
    if done != [0, 1, 2]:
        raise Wrong(f"it was told to stop during task 2, and did {done}")
    remaining = [int(message.body) for message in left]
    if remaining != list(range(3, 10)):
        raise Wrong(f"3 to 9 should be left in the queue; there are {remaining}")


async def run(queue, work, stop):
    while not stop.is_set():
        message = await queue.get(fail=False)
        if message is None:
            await asyncio.sleep(0.01)
            continue
        await work(message.body)
        await message.ack()


async def ignores_the_order(queue: Any, work: Any, stop: asyncio.Event) -> None:
    while message := await queue.get(fail=False):
        await work(message.body)
        await message.ack()


async def acknowledges_first(queue: Any, work: Any, stop: asyncio.Event) -> None:
    messages = await mq.take_messages(queue, 10)
    for message in messages:
        if stop.is_set():
            break
        await work(message.body)


TASKS = {
    "04.1": Task(
        question="What comes back?",
        start='answer = ...\n\nawait mq.exercise("04.1").check(answer)',
        hints=[
            "`multiple=True` covers the message itself and all earlier ones that are still open.",
            "A message that was rejected without requeue has left the queue, dead-letter queue or not.",
        ],
        solution=None,
        code="answer = [4, 5, 6, 7, 9]",
        judge=judge_1,
        wrong=[[4, 5, 6, 7, 8, 9], [0, 1, 2, 4, 5, 6, 7, 9], [], "nothing"],
    ),
    "04.2": Task(
        question="Three tries, then out",
        start='handle = ...\n\nawait mq.exercise("04.2").check(handle)',
        hints=[
            "`message.headers.get('x-delivery-count', 0)` is the number of earlier tries: 0, 1, 2.",
            "`await message.reject(requeue=True)` sends it back; `requeue=False` sends it to the dead-letter queue.",
        ],
        solution=handle,
        judge=judge_2,
        wrong=[forgets_to_count, gives_up_at_once, 3],
    ),
    "04.3": Task(
        question="A worker that stops well",
        start='run = ...\n\nawait mq.exercise("04.3").check(run)',
        hints=[
            "Look at `stop.is_set()` between two tasks, not inside one.",
            "What you have not acknowledged goes back when the channel closes. Acknowledge after the work, one by one.",
        ],
        solution=run,
        judge=judge_3,
        wrong=[ignores_the_order, acknowledges_first],
    ),
}
