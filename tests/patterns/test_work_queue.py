from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

import mqlib as mq
from mqlib.patterns.sending import NotSent, Refused, Unknown, Unrouted
from mqlib.patterns.work_queue import Task, add_task, dead_letters_of, start_worker, task_queue


async def dead_letters(rabbit: mq.RabbitMQ, queue: str, count: int = 1) -> list[AbstractIncomingMessage]:
    """All that are there, once there are `count`."""
    async with mq.channel(rabbit) as channel:
        letters = await channel.get_queue(dead_letters_of(queue))
        found = await mq.take_messages(letters, count, within=15)
        return found + await mq.take_messages(letters, 100, within=0)


async def test_every_task_is_done_once_by_one_of_the_workers(rabbit: mq.RabbitMQ) -> None:
    """Their first tasks wait for each other: one worker alone, that started earlier, could do all of them."""
    queue, ledger, both, begun = rabbit.name("shared"), mq.Ledger(), asyncio.Barrier(2), list[int]()

    async def do(task: Task) -> None:
        assert task.attempt == 1
        begun.append(task.data["n"])
        if len(begun) <= 2:
            await both.wait()
        ledger.received(task.data["n"])

    async with task_queue(rabbit, queue) as tasks:
        for number in range(100):
            ledger.sent(number)
            ids = [await add_task(tasks, {"n": number})]
            ledger.acknowledged(number)
        async with start_worker(rabbit, queue, do) as one, start_worker(rabbit, queue, do) as other:
            await mq.until(lambda: one.done + other.done == 100)
    assert ids[0]
    assert ledger.exact
    assert min(one.done, other.done) > 0
    assert await dead_letters(rabbit, queue, 0) == []


async def test_a_task_that_always_fails_is_tried_so_often_and_set_aside_once_with_the_reason(
    rabbit: mq.RabbitMQ,
) -> None:
    """Three attempts mean three; the others go on meanwhile."""
    queue, tries, done = rabbit.name("poison"), list[int](), list[int]()

    async def do(task: Task) -> None:
        if task.data == "poison":
            tries.append(task.attempt)
            raise ValueError("never today")
        done.append(task.data)

    async with task_queue(rabbit, queue, attempts=3) as tasks:
        poison = await add_task(tasks, "poison")
        for number in range(5):
            await add_task(tasks, number)
        async with start_worker(rabbit, queue, do, attempts=3, backoff=0.01) as worker:
            await mq.until(lambda: worker.done == 5 and worker.dead_lettered == 1)
    assert tries == [1, 2, 3]
    assert sorted(done) == [0, 1, 2, 3, 4]
    [letter] = await dead_letters(rabbit, queue)
    assert (letter.message_id, json.loads(letter.body)) == (poison, "poison")
    assert letter.headers["dead-letter-error"] == "ValueError: never today"
    assert letter.headers["dead-letter-attempts"] == 3
    assert (worker.failed, worker.consumer.delivered) == (3, 8)
    assert str(worker) == "done 5, failed 3, unparsable 0, dead-lettered 1"


async def test_a_task_that_went_to_others_too_is_set_aside_without_going_to_them_again(rabbit: mq.RabbitMQ) -> None:
    """RabbitMQ sends what is published with a header CC to the queues in it."""
    queue, other = rabbit.name("copied"), rabbit.name("other")

    async def do(task: Task) -> None:
        raise ValueError("never today")

    async with task_queue(rabbit, queue, attempts=1), mq.channel(rabbit) as channel:
        copies = await channel.declare_queue(other, durable=True)
        task = aio_pika.Message(b'"poison"', headers={"CC": [other], "mine": 1}, correlation_id="c")
        await channel.default_exchange.publish(task, queue)
        async with start_worker(rabbit, queue, do, attempts=1) as worker:
            await mq.until(lambda: worker.dead_lettered == 1)
        assert len(await mq.take_messages(copies, 2, within=0)) == 1
    [letter] = await dead_letters(rabbit, queue)
    assert (letter.headers["mine"], letter.correlation_id, "CC" in letter.headers) == (1, "c", False)


async def test_a_task_that_fails_and_then_does_not(rabbit: mq.RabbitMQ) -> None:
    queue, tries = rabbit.name("transient"), list[int]()

    async def do(task: Task) -> None:
        tries.append(task.attempt)
        if task.attempt < 3:
            raise ConnectionError("not yet")

    async with task_queue(rabbit, queue) as tasks, start_worker(rabbit, queue, do, backoff=0.01) as worker:
        await add_task(tasks, 1)
        await mq.until(lambda: worker.done == 1)
    assert tries == [1, 2, 3]
    assert await dead_letters(rabbit, queue, 0) == []


@pytest.mark.parametrize(
    "error",
    [ValueError("x" * 200_000), asyncio.CancelledError()],
    ids=["an error that fits no frame", "its own cancel"],
)
async def test_whatever_a_handler_raises_is_counted_and_holds_nothing_up(
    rabbit: mq.RabbitMQ, error: BaseException
) -> None:
    queue, tries = rabbit.name("raises"), list[int]()

    async def do(task: Task) -> None:
        if task.data == "bad":
            tries.append(task.attempt)
            raise error

    async with (
        task_queue(rabbit, queue, attempts=2) as tasks,
        start_worker(rabbit, queue, do, attempts=2, backoff=0.01) as worker,
    ):
        await add_task(tasks, "bad")
        await add_task(tasks, "good")
        await mq.until(lambda: worker.done == 1 and worker.dead_lettered == 1)
        assert worker.consumer.link.reconnects == 0
    [letter] = await dead_letters(rabbit, queue)
    assert (tries, letter.headers["dead-letter-attempts"]) == ([1, 2], 2)


@pytest.mark.parametrize("body", [b"\xff", b"{", b"[" * 100_000], ids=["no text", "no JSON", "too deep"])
async def test_what_cannot_be_read_is_set_aside_at_once_and_stops_nobody(rabbit: mq.RabbitMQ, body: bytes) -> None:
    queue = rabbit.name("unreadable")
    done: list[Any] = []

    async def do(task: Task) -> None:
        done.append(task.data)

    async with task_queue(rabbit, queue) as tasks, start_worker(rabbit, queue, do) as worker:
        channel = await tasks.link.channel()
        await channel.default_exchange.publish(aio_pika.Message(body), routing_key=queue)
        await add_task(tasks, "next")
        await mq.until(lambda: done == ["next"])
    [letter] = await dead_letters(rabbit, queue)
    assert letter.body == body
    assert letter.headers["dead-letter-attempts"] == 1
    assert (worker.unparsable, worker.failed) == (1, 0)


async def die_at_poison(rabbit: mq.RabbitMQ, queue: str) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.work_queue import start_worker

    async def do(task: Any) -> None:
        print(f"{task.data} {task.attempt}", flush=True)
        if task.data == "poison":
            mqlib.crash()

    async with start_worker(rabbit, queue, do):
        await asyncio.Event().wait()


async def test_a_task_that_kills_its_process_each_time_is_set_aside_by_the_broker(rabbit: mq.RabbitMQ) -> None:
    queue = rabbit.name("deadly")
    lines: list[str] = []
    async with task_queue(rabbit, queue, attempts=3) as tasks:
        await add_task(tasks, "poison")
        for _ in range(3):
            async with mq.worker(die_at_poison, rabbit, queue) as worker:
                await worker.ended(within=30)
                assert worker.crashed
                lines += worker.lines
        [letter] = await dead_letters(rabbit, queue)
    assert lines == ["poison 1", "poison 2", "poison 3"]
    assert letter.headers["x-first-death-reason"] == "delivery_limit"


async def test_a_job_that_outlasts_the_brokers_limit_says_which_and_is_not_run_for_ever() -> None:
    """The broker closes the channel of a delivery that is not acknowledged in time, and counts it as an attempt."""
    with mq.rabbitmq(private=True, settings={"consumer_timeout": "1000"}) as rabbit:
        queue, tries = rabbit.name("slow"), list[int]()
        errors = set[str]()

        async def do(task: Task) -> None:
            tries.append(task.attempt)
            before = worker.consumer.link.reconnects
            await mq.until(lambda: worker.consumer.link.reconnects > before, within=20)
            errors.add(str(worker.consumer.link.error))

        async with (
            task_queue(rabbit, queue, attempts=2) as tasks,
            start_worker(rabbit, queue, do, attempts=2) as worker,
        ):
            await add_task(tasks, 1)
            [letter] = await dead_letters(rabbit, queue)
    assert tries == [1, 2]
    assert all("acknowledgement" in error and "1000 ms" in error for error in errors)
    assert letter.headers["x-first-death-reason"] == "delivery_limit"


async def test_ten_thousand_tasks_through_a_sigkill_of_the_broker() -> None:
    """What was confirmed is done; what is unknown may be; nothing else is."""
    ledger = mq.Ledger()
    with mq.rabbitmq(private=True) as rabbit:
        queue = rabbit.name("killed")

        async def do(task: Task) -> None:
            ledger.received(task.data)

        async def add(numbers: range) -> None:
            for number in numbers:
                ledger.sent(number)
                try:
                    await add_task(tasks, number, within=30)
                except Unknown:
                    pass
                except (NotSent, Unrouted):
                    ledger.failed(number)
                else:
                    ledger.acknowledged(number)

        async with task_queue(rabbit, queue) as tasks, start_worker(rabbit, queue, do, prefetch=50) as worker:
            async with asyncio.TaskGroup() as group:
                for start in range(0, 10_000, 200):
                    group.create_task(add(range(start, start + 200)))
                await mq.until(lambda: worker.done > 2000, within=30)
                await asyncio.sleep(2)  # RabbitMQ 3.10 writes a new quorum queue down only then: see CONTRIBUTING
                await asyncio.to_thread(rabbit.nodes[0].restart, graceful=False)
            await mq.until(lambda: worker.consumer.link.reconnects >= 1, within=30)

            async def empty() -> bool:
                return (await mq.depth(rabbit, queue, by="amqp")).ready == 0

            await mq.until(empty, within=60)
        assert await dead_letters(rabbit, queue, 0) == []
    assert ledger.lost_although_acknowledged == 0
    assert 0 < ledger.unknown <= 50, "the kill met sends in flight, one of each of the fifty"
    assert len(ledger.missing()) <= ledger.unknown


@asynccontextmanager
async def full(rabbit: mq.RabbitMQ, queue: str) -> AsyncIterator[None]:
    async with mq.channel(rabbit) as channel:
        await channel.declare_queue(queue, durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        await channel.default_exchange.publish(aio_pika.Message(b"0"), routing_key=queue)
        yield


async def test_adding_never_lies(rabbit: mq.RabbitMQ) -> None:
    """Confirmed, refused, unrouted, not sent, unknown: five words for five things."""
    queue = rabbit.name("outcomes")
    async with mq.proxy(rabbit) as proxy, task_queue(proxy, queue) as tasks:
        assert await add_task(tasks, 1, id="mine") == "mine"
        with proxy.swallow("down"), pytest.raises(Unknown, match=r"no answer within 0\.5 s; it may be stored") as error:
            await add_task(tasks, 2, id="other", within=0.5)
        assert error.value.id == "other"
        async with mq.channel(rabbit) as channel:
            stored = await mq.take_messages(await channel.get_queue(queue), 2, within=5)
            assert [message.message_id for message in stored] == ["mine", "other"], "unknown was not: lost"
            await channel.queue_delete(queue)
        with pytest.raises(Unrouted, match="no queue is bound for it; it is stored nowhere"):
            await add_task(tasks, 3, within=10)
        async with full(rabbit, queue):
            with pytest.raises(Refused, match="a queue refused it"):
                await add_task(tasks, 4)
    async with mq.proxy(rabbit) as gone:
        tasks_link = task_queue(gone, rabbit.name("away"))
        tasks = await tasks_link.__aenter__()
    with pytest.raises(NotSent, match=r"no connection within 0\.3 s"):
        await mq.until(lambda: not_sent(tasks))
    await tasks_link.__aexit__(None, None, None)


async def not_sent(tasks: Any) -> None:
    """The proxy is gone, and sooner or later the link has noticed."""
    with suppress(Unknown):
        await add_task(tasks, 1, within=0.3)


async def test_what_makes_no_sense_is_refused(rabbit: mq.RabbitMQ) -> None:
    queue = rabbit.name("refused")
    async with task_queue(rabbit, queue, attempts=3) as tasks:
        with pytest.raises(TypeError, match="that is not JSON"):
            await add_task(tasks, object())
        with pytest.raises(mq.BrokerError, match="x-delivery-limit"):
            async with task_queue(rabbit, queue, attempts=4):
                pass
        await add_task(tasks, "the first is not disturbed")
    with pytest.raises(ValueError, match="attempts counts the first one, too, and is not 0"):
        async with task_queue(rabbit, queue, attempts=0):
            pass
