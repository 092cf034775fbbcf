"""The exercises of notebook 20: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, DeliveryError
from aiormq.exceptions import ChannelLockedResource

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.checks import Task, Wrong
from mqlib.queues import management


async def _publish(channel: AbstractChannel, queue: str, count: int) -> int:
    """Publishes 0, 1, 2, …; how many of them the broker refused."""
    refused = 0
    for number in range(count):
        try:
            await channel.default_exchange.publish(Message(b"%d" % number), queue)
        except DeliveryError:
            refused += 1
    return refused


async def _made(rabbit: mq.RabbitMQ, kind: str, **arguments: Any) -> str:
    queue = rabbit.name("exercise")
    await mq.declare(rabbit, queue, durable=True, arguments={"x-queue-type": kind, **arguments})
    async with mq.channel(rabbit) as channel:
        await _publish(channel, queue, 8)
    return queue


async def _read(rabbit: mq.RabbitMQ, queue: str, **arguments: Any) -> list[int]:
    """What a reader gets that acknowledges everything, up to number 7."""
    got = list[int]()
    async with mq.channel(rabbit, prefetch=5) as channel:
        with contextlib.suppress(TimeoutError):
            source = await channel.get_queue(queue)
            async with asyncio.timeout(1.5), source.iterator(arguments=arguments) as messages:
                async for message in messages:
                    await message.ack()
                    got.append(int(message.body))
                    if got[-1] == 7:
                        break
    return got


async def _again(kind: str) -> str:
    rabbit = mq.rabbitmq()
    queue = await _made(rabbit, kind)
    arguments = {"x-stream-offset": "first"} if kind == "stream" else {}
    for reader in ("first", "second", "later"):
        if (got := await _read(rabbit, queue, **arguments)) != [*range(8)]:
            return f"the {reader} reader got {len(got)} of 8 messages"
    return ""


async def _gives_up(kind: str) -> str:
    rabbit = mq.rabbitmq()
    queue, tries = await _made(rabbit, kind, **{"x-delivery-limit": 2}), Counter[bytes]()
    async with mq.channel(rabbit) as channel:
        source = await channel.get_queue(queue)
        for _ in range(60):
            message = await source.get(fail=False)
            if message is None:
                return "" if set(tries.values()) == {3} else f"tries of the messages: {sorted(tries.values())}"
            tries[message.body] += 1
            await message.reject(requeue=True)
    return f"after 60 deliveries there was still one to deliver; most had {max(tries.values())} tries"


async def _private(kind: str) -> str:
    rabbit, queue = mq.rabbitmq(), mq.rabbitmq().name("replies")
    async with mq.channel(rabbit) as channel, mq.channel(rabbit) as stranger:
        await channel.declare_queue(queue, exclusive=True, durable=False, arguments={"x-queue-type": kind})
        with contextlib.suppress(ChannelLockedResource):
            await stranger.get_queue(queue)
            return "another connection may use it"

    async def gone() -> bool:
        async with mq.channel(rabbit) as asking:
            with contextlib.suppress(ChannelNotFoundEntity):
                await asking.get_queue(queue)
                return False
        return True

    await mq.until(gone, within=15)
    return ""


async def _newest(kind: str) -> str:
    rabbit = mq.rabbitmq()
    got = await _read(rabbit, await _made(rabbit, kind, **{"x-max-length": 3}))
    return "" if got == [5, 6, 7] else f"it kept {got}"


async def _from_the_fifth(kind: str) -> str:
    rabbit = mq.rabbitmq()
    got = await _read(rabbit, await _made(rabbit, kind), **{"x-stream-offset": 4})
    return "" if got == [4, 5, 6, 7] else f"it began with message {got[0] + 1}" if got else "it read nothing"


TRIALS: list[Callable[[str], Awaitable[str]]] = [_again, _gives_up, _private, _newest, _from_the_fifth]


async def judge_1(answer: Any) -> None:
    kinds = list(answer) if isinstance(answer, list | tuple) else []
    if len(kinds) != 5 or not {*map(str, kinds)} <= {"classic", "quorum", "stream"}:
        raise Wrong(f'answer with a list of five of "classic", "quorum", "stream"; this is {answer!r}')
    for number, (kind, trial) in enumerate(zip(kinds, TRIALS, strict=True), start=1):
        try:
            problem = await trial(kind)
        except (BrokerError, AMQPError) as error:
            problem = str(error)
        if problem:
            raise Wrong(f"requirement {number} with a {kind} queue: {problem}")


async def judge_2(read: Any) -> None:
    if not callable(read):
        raise Wrong(f"write a function `read(queue, load, store, work, last)`; this is {read!r}")
    rabbit = mq.rabbitmq()
    stream, done, kept, last = rabbit.name("exercise"), list[int](), list[int](), 39
    await mq.declare(rabbit, stream, durable=True, arguments={"x-queue-type": "stream"})
    async with mq.channel(rabbit) as channel:
        await _publish(channel, stream, 45)
    fails = {12, 13, 39}

    async def work(body: bytes) -> None:
        number = int(body)
        if number in fails:
            fails.remove(number)
            raise ConnectionError(f"the work on {number} failed")
        done.append(number)

    def load() -> int | None:
        return kept[-1] if kept else None

    async def attempt(expected: int | None) -> None:
        async with mq.channel(rabbit, prefetch=5) as channel:
            try:
                async with asyncio.timeout(5):
                    await read(await channel.get_queue(stream), load, kept.append, work, last)
            except TimeoutError:
                far = f"it was at {done[-1]}" if done else "it had done nothing"
                raise Wrong(f"it did not return within 5 s; {far}, and {load()} was stored") from None
            except ConnectionError as error:
                if expected is None or str(expected) not in str(error):
                    raise
            else:
                if expected is not None:
                    raise Wrong(f"the work on {expected} raised, and `read` did not")

    for expected in (12, 13, 39, None, None):
        await attempt(expected)
        until = last + 1 if expected is None else expected
        if missing := sorted({*range(until)} - {*done}):
            raise Wrong(f"the messages {missing} were left out; stored was {load()}")
        if doubled := [number for number, times in Counter(done).items() if times > 1]:
            raise Wrong(f"the messages {doubled} were done twice; stored was {load()}")
    if done != [*range(last + 1)]:
        raise Wrong(f"done, in this order: {done}; the messages are 0 to {last}")


async def read(queue, load, store, work, last):
    stored = load()
    offset = -1 if stored is None else stored
    if offset >= last:
        return
    arrived = asyncio.Queue()
    tag = await queue.consume(arrived.put, arguments={"x-stream-offset": offset + 1})
    try:
        while offset < last:
            message = await arrived.get()
            offset = message.headers["x-stream-offset"]
            await work(message.body)
            store(offset)
            await message.ack()
    finally:
        await queue.cancel(tag)


async def _variant(
    queue: AbstractQueue, load: Any, store: Any, work: Any, last: int,
    again: int = 1, early: bool = False, every: int = 1, ack: bool = True, start: Any = "first", look: bool = True,
) -> None:  # fmt: skip
    """The solution with one mistake."""
    stored = load()
    if look and stored is not None and stored >= last:
        return
    first = start if stored is None else stored + again
    arrived = asyncio.Queue[Any]()
    tag = await queue.consume(arrived.put, arguments={"x-stream-offset": first})
    offset = -1
    try:
        while offset != last:
            message = await arrived.get()
            offset = message.headers["x-stream-offset"]
            if early:
                store(offset)
            await work(message.body)
            if not early and offset % every == 0:
                store(offset)
            if ack:
                await message.ack()
    finally:
        await queue.cancel(tag)


async def begins_with_what_is_done(*arguments: Any) -> None:
    await _variant(*arguments, again=0)


async def leaves_one_out(*arguments: Any) -> None:
    await _variant(*arguments, again=2)


async def stores_before_the_work(*arguments: Any) -> None:
    await _variant(*arguments, early=True)


async def stores_every_tenth(*arguments: Any) -> None:
    await _variant(*arguments, every=10)


async def never_acknowledges(*arguments: Any) -> None:
    await _variant(*arguments, ack=False)


async def begins_with_the_next(*arguments: Any) -> None:
    await _variant(*arguments, start="next")


async def always_from_the_first(queue: Any, load: Any, store: Any, work: Any, last: int) -> None:
    await _variant(queue, lambda: None, store, work, last)


async def hides_the_error(*arguments: Any) -> None:
    with contextlib.suppress(ConnectionError):
        await _variant(*arguments)


async def does_not_see_that_it_is_at_the_end(*arguments: Any) -> None:
    await _variant(*arguments, look=False)


SHOP = ("orders.eu", "orders.us", "orders-archive", "reorders.eu")


@contextlib.asynccontextmanager
async def _shop() -> AsyncIterator[tuple[mq.RabbitMQ, str]]:
    """A virtual host of its own, with the four queues, and its name."""
    rabbit = mq.rabbitmq()
    name = rabbit.name("shop")
    async with httpx.AsyncClient(base_url=f"{rabbit.management_url}/api", timeout=20) as client:
        (await client.put(f"/vhosts/{name}")).raise_for_status()
        try:
            address = f"{rabbit.url.rpartition('/')[0]}/{name}"
            shop = dataclasses.replace(rabbit, url=address, addresses=(), nodes=())
            for queue in SHOP:
                await mq.declare(shop, queue, durable=True)
            yield shop, name
        finally:
            await client.delete(f"/vhosts/{name}")


async def judge_3(answer: Any) -> None:
    if not isinstance(answer, dict) or answer.keys() < {"pattern", "definition"}:
        raise Wrong(f"answer with a dict that has pattern, apply-to and definition; this is {answer!r}")
    async with _shop() as (shop, name):
        url = f"{shop.management_url}/api/policies/{name}/limit"
        async with httpx.AsyncClient(timeout=20) as client:
            said = await client.put(url, json=answer)
        if said.is_error:
            raise Wrong(f"the broker refuses this policy: {said.json().get('reason', said.text)}")

        async def applied() -> bool:
            return (await management(shop, f"/queues/{name}/orders.eu")).get("policy") == "limit"

        with contextlib.suppress(TimeoutError):
            await mq.until(applied, within=3)
        held: dict[str, tuple[int, int]] = {}
        async with mq.channel(shop) as channel:
            for queue in SHOP:
                refused = await _publish(channel, queue, 8)
                got = await mq.take_messages(await channel.get_queue(queue), 8, within=0)
                held[queue] = len(got), refused
    for queue, (count, refused) in held.items():
        if queue.startswith("orders."):
            if count != 5:
                raise Wrong(f"of 8 messages {queue} held {count}, and not 5")
            if refused != 3:
                raise Wrong(f"{queue} held 5 of 8, and told the publisher of {refused} that it did not take")
        elif (count, refused) != (8, 0):
            raise Wrong(f"{queue} is not to be touched, and held {count} of 8")


LIMIT = {"max-length": 5, "overflow": "reject-publish"}
RIGHT = {"pattern": "^orders[.]", "apply-to": "queues", "definition": LIMIT}


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "20.1": Task(
        question="Which queue for what?",
        start=_start("answer", "20.1"),
        hints=[
            "Only a stream is read without being emptied, and from anywhere.",
            "Only a quorum queue counts deliveries by itself.",
            "Only a classic queue can be exclusive; and a stream has no limit by number of messages.",
        ],
        solution=None,
        code='answer = ["stream", "quorum", "classic", "classic", "stream"]',
        judge=judge_1,
        wrong=[
            ["quorum", "quorum", "classic", "classic", "stream"],
            ["stream", "classic", "classic", "classic", "stream"],
            ["stream", "quorum", "quorum", "classic", "stream"],
            ["stream", "quorum", "classic", "stream", "stream"],
            ["stream", "quorum", "classic", "quorum", "classic"],
            ["stream"],
            "stream",
        ],
    ),
    "20.2": Task(
        question="Go on where you were",
        start=_start("read", "20.2"),
        hints=[
            "The next offset is the stored one plus 1; without one, begin with `first`.",
            "First the work, then `store`, then the acknowledgement, which lets the broker send more.",
            "If the stored offset is `last` already, there is nothing to wait for.",
            "`queue.consume(arrived.put, arguments=…)` with an `asyncio.Queue`, and `queue.cancel(tag)` in the end.",
        ],
        solution=read,
        judge=judge_2,
        wrong=[begins_with_what_is_done, leaves_one_out, stores_before_the_work, stores_every_tenth,
               never_acknowledges, begins_with_the_next, always_from_the_first, hides_the_error,
               does_not_see_that_it_is_at_the_end, 3],
    ),
    "20.3": Task(
        question="A limit from outside",
        start=_start("answer", "20.3"),
        hints=[
            "The pattern is a regular expression that is searched *in* the name, unless it begins with ^.",
            "A dot in a regular expression is any character.",
            "When a queue is full, the oldest goes, and nobody learns of it. `overflow` changes that.",
        ],
        solution=None,
        code=f"answer = {RIGHT!r}",
        judge=judge_3,
        wrong=[
            RIGHT | {"pattern": "orders"},
            RIGHT | {"pattern": "orders[.]"},
            RIGHT | {"pattern": "^orders."},
            RIGHT | {"pattern": "^orders[.]eu"},
            RIGHT | {"apply-to": "exchanges"},
            RIGHT | {"definition": {"max-length": 5}},
            RIGHT | {"definition": {"x-max-length": 5}},
            RIGHT | {"definition": {"max-length": 6, "overflow": "reject-publish"}},
            "max-length 5",
        ],
    ),
}  # fmt: skip
