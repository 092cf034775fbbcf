"""Consume, transform, produce: what is committed is there exactly once, whatever dies, and whenever it dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns.transactional import Output, TransformFailed, transform

QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
"""A member that dies is missed within a second; our own brokers allow that."""
RECORDS = 300
SIDE_BY_SIDE = 6


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka that may be killed and cut off."""
    with mq.kafka(private=True) as broker:
        yield broker


async def filled(kafka: mq.Kafka, count: int = RECORDS, partitions: int = 2) -> str:
    """A topic with `count` records, whose values are their numbers."""
    topic = await mq.topic(kafka, "source", partitions)
    async with mq.producer(kafka) as producer:
        for number in range(count):
            await producer.send(topic, b"%d" % number, partition=number % partitions)
    return topic


async def doubled(record: ConsumerRecord) -> list[Output]:
    return [Output(b"%d" % (2 * int(record.value)), key=record.key)]


async def judged(kafka: mq.Kafka, source: str, target: str) -> mq.Ledger:
    """The source's records as what was sent, the target's committed ones as what was received."""
    ledger = mq.Ledger()
    for record in await mq.read(kafka, source, within=30):
        ledger.sent(int(record.value))
        ledger.acknowledged(int(record.value))
    for record in await mq.read(kafka, target, within=30, isolation_level="read_committed"):
        ledger.received(int(record.value) // 2)
    return ledger


async def work(kafka: Any, source: str, target: str, group: str, crash: tuple[str, int, float], safe: bool) -> None:
    """A member that ends by SIGKILL at the n-th time of a point: in the function, before the offsets are added, before
    the commit, some time into it, after it. Without `safe` it sends, and then commits the offsets, as most programs do.
    """
    import asyncio

    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    import mqlib as mq
    from mqlib.patterns.transactional import Output, transform

    point, count, delay = crash
    options: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}

    def reached(name: str) -> None:
        nonlocal count
        count -= name == point
        if count == 0 and name == point:
            mq.crash()

    def watch(kind: Any, method: str, before: str, after: str = "") -> None:
        original = getattr(kind, method)

        async def watched(*arguments: Any) -> None:
            nonlocal count
            reached(before)
            if point == "during" and before == "commit":
                count -= 1
                if count == 0:
                    asyncio.get_running_loop().call_later(delay, mq.crash)
            await original(*arguments)
            reached(after)

        setattr(kind, method, watched)

    async def function(record: Any) -> list[Any]:
        print("begun")
        reached("function")
        return [Output(b"%d" % (2 * int(record.value)))]

    if safe:
        watch(AIOKafkaProducer, "send_offsets_to_transaction", "offsets")
        watch(AIOKafkaProducer, "commit_transaction", "commit", "after")
        async with transform(kafka, source, target, group, function, batch=20, **options):
            await asyncio.sleep(60)
    watch(AIOKafkaConsumer, "commit", "commit", "after")
    options |= {"group_id": group, "enable_auto_commit": False}
    async with mq.consumer(kafka, source, **options) as consumer, mq.producer(kafka, acks="all") as producer:
        while records := await mq.take(consumer, 20):
            for record in records:
                for output in await function(record):
                    await producer.send_and_wait(target, output.value)
            await consumer.commit()


class PowerCut:
    """The broker's SIGKILL, once, in the middle of the work of several schedules."""

    def __init__(self, kafka: mq.Kafka, schedules: int, after: float) -> None:
        self._kafka, self._after = kafka, after
        self._begun, self._over = asyncio.Barrier(schedules), asyncio.Event()

    async def wait(self) -> None:
        """Until all have begun, and it has come and gone."""
        if await self._begun.wait() == 0:
            await asyncio.sleep(self._after)  # any moment will do; the seed says which
            async with mq.killed(self._kafka.nodes[0]):
                pass
            self._over.set()
        await self._over.wait()


async def lived(kafka: mq.Kafka, seed: int, safe: bool = True, cut: PowerCut | None = None) -> tuple[int, mq.Ledger]:
    """One schedule of faults: one to three crashes, in some the broker's, too; then a life that ends well."""
    chance, crashes = random.Random(seed), 0
    source, target, group = await filled(kafka), await mq.topic(kafka, "target", 2), kafka.name("group")
    for life in range(chance.randint(1, 3)):
        point = chance.choice(["function", "offsets", "commit", "during", "after"]) if safe else "commit"
        count = chance.randint(1, 60 if point == "function" else 4)
        crash = point, count, chance.uniform(0, 0.02)
        async with mq.worker(work, kafka, source, target, group, crash, safe) as worker:
            if cut and life == 0:
                await worker.printed("begun", within=30)
                await cut.wait()
            await worker.ended(within=60)
        crashes += worker.crashed
    async with transform(kafka, source, target, group, doubled, batch=20, **QUICK):
        await mq.until(lambda: drained(kafka, group, source), within=60, every=0.2)
    return crashes, await judged(kafka, source, target)


async def drained(kafka: mq.Kafka, group: str, source: str) -> bool:
    return (await mq.group_lag(kafka, group, source)).total == 0


async def test_twenty_schedules_of_crashes_leave_every_output_exactly_once(own: mq.Kafka) -> None:
    """And the same crashes without transactions leave duplicates, or this test could not fail."""
    gate, outcomes = asyncio.Semaphore(SIDE_BY_SIDE), dict[int, tuple[int, mq.Ledger]]()

    async def run(seed: int, safe: bool = True, cut: PowerCut | None = None) -> None:
        async with gate:
            outcomes[seed] = await lived(own, seed, safe, cut)

    async with asyncio.TaskGroup() as group:
        for seed in range(-1, 20 - SIDE_BY_SIDE):
            group.create_task(run(seed, safe=seed >= 0))
    cut = PowerCut(own, SIDE_BY_SIDE, after=random.Random(20).uniform(0, 0.5))
    async with asyncio.TaskGroup() as group:
        for seed in range(20 - SIDE_BY_SIDE, 20):
            group.create_task(run(seed, cut=cut))
    naive = outcomes.pop(-1)[1]
    assert (naive.lost, naive.duplicated > 0) == (0, True)
    assert {seed: str(ledger) for seed, (_, ledger) in outcomes.items() if not ledger.exact} == {}
    assert len(outcomes) == 20
    assert sum(crashes for crashes, _ in outcomes.values()) >= 20


async def test_ten_thousand_records_and_a_chain_of_two(kafka: mq.Kafka) -> None:
    """The second one's source has transaction markers: the group's lag goes to 0 behind them, too."""
    source, middle, target = await filled(kafka, 10_000), await mq.topic(kafka, "middle"), await mq.topic(kafka, "end")
    groups, tasks = [kafka.name("group"), kafka.name("group")], asyncio.all_tasks()
    async with (
        transform(kafka, source, middle, groups[0], doubled) as first,
        transform(kafka, middle, target, groups[1], as_it_is) as second,
    ):
        await mq.until(lambda: second.report.records == 10_000, within=60)
        await mq.until(lambda: drained(kafka, groups[1], middle), within=20, every=0.2)
    ledger = await judged(kafka, source, target)
    assert ledger.exact, str(ledger)
    for report in (first.report, second.report):
        assert (report.records, report.outputs, report.restarts) == (10_000, 10_000, 0)
        assert report.transactions < 1000, "many records share one"
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)


async def as_it_is(record: ConsumerRecord) -> list[Output]:
    return [Output(record.value, record.key, record.headers)]


async def test_keys_headers_partitions_and_no_output_at_all(kafka: mq.Kafka) -> None:
    source, target = await filled(kafka, 3, partitions=1), await mq.topic(kafka, "target", 2)

    async def function(record: ConsumerRecord) -> list[Output]:
        if record.value == b"1":
            return []
        return [Output(record.value, b"key", [("a", b"b")], partition=1), Output(None, b"key", partition=0)]

    async with transform(kafka, source, target, kafka.name("group"), function) as work:
        await mq.until(lambda: work.report.records == 3, within=20)
    found = [(r.partition, r.key, r.value, list(r.headers)) for r in await mq.read(kafka, target)]
    both: list[Any] = [(0, b"key", None, [])] * 2
    assert found == [*both, (1, b"key", b"0", [("a", b"b")]), (1, b"key", b"2", [("a", b"b")])]


async def test_a_function_that_raises_leaves_nothing_and_is_asked_again(kafka: mq.Kafka) -> None:
    source, target, group = await filled(kafka, 30, 1), await mq.topic(kafka, "target"), kafka.name("group")

    async def fails(record: ConsumerRecord) -> list[Output]:
        if record.offset == 25:
            raise ValueError("twenty-five")
        return await doubled(record)

    with pytest.raises(TransformFailed, match=rf"{source}-0, offset 25: ValueError: twenty-five"):
        async with transform(kafka, source, target, group, fails, batch=10):
            await asyncio.sleep(30)
    assert len(await mq.read(kafka, target, isolation_level="read_committed")) == 20
    assert (await mq.group_lag(kafka, group, source)).total == 10
    async with transform(kafka, source, target, group, doubled) as work:
        await mq.until(lambda: work.report.records == 10, within=20)
    assert (await judged(kafka, source, target)).exact


async def test_an_output_that_is_refused_ends_it_and_nothing_of_its_transaction_is_visible(kafka: mq.Kafka) -> None:
    """aiokafka itself would commit the others."""
    source, target = await filled(kafka, 20, 1), await mq.topic(kafka, "target", max_message_bytes=1000)

    async def large(record: ConsumerRecord) -> list[Output]:
        return [Output(b"x" * 5000 if record.offset == 12 else b"%d" % (2 * int(record.value)))]

    with pytest.raises(TransformFailed, match=rf"{target}: MessageSizeTooLargeError"):
        async with transform(kafka, source, target, kafka.name("group"), large, batch=10):
            await asyncio.sleep(30)
    visible = await mq.read(kafka, target, isolation_level="read_committed")
    assert [int(record.value) for record in visible] == [2 * number for number in range(10)]


async def test_a_transaction_that_lasts_too_long_is_given_up_and_done_again(kafka: mq.Kafka) -> None:
    source, target = await filled(kafka, 10, 1), await mq.topic(kafka, "target")
    slow = [3]

    async def function(record: ConsumerRecord) -> list[Output]:
        if record.offset in slow:
            slow.remove(record.offset)
            await asyncio.sleep(60)
        return await doubled(record)

    async with transform(kafka, source, target, kafka.name("group"), function, within=1.0, **QUICK) as work:
        await mq.until(lambda: work.report.records == 10, within=30)
    assert (await judged(kafka, source, target)).exact
    assert work.report.restarts >= 1
    assert isinstance(work.report.error, TimeoutError)


async def test_a_member_that_slept_is_fenced(kafka: mq.Kafka, tmp_path: Path) -> None:
    """It blocks in the middle of a transaction until another member has done all, and then goes on."""
    source, target, group = await filled(kafka, 20, 1), await mq.topic(kafka, "target"), kafka.name("group")
    async with mq.worker(sleep_in, kafka, source, target, group, str(tmp_path / "wake")) as sleeper:
        await sleeper.printed("asleep", within=30)
        async with transform(kafka, source, target, group, doubled, **QUICK) as work:
            await mq.until(lambda: work.report.records == 20, within=30)
            (tmp_path / "wake").touch()
            await sleeper.printed("fenced", within=30)
    ledger = await judged(kafka, source, target)
    assert ledger.exact, str(ledger)


async def sleep_in(kafka: Any, source: str, target: str, group: str, wake: str) -> None:
    import time
    from pathlib import Path

    import mqlib as mq
    from mqlib.patterns.transactional import Output, transform

    async def function(record: Any) -> list[Any]:
        if record.offset == 5:
            print("asleep")
            while not Path(wake).exists():
                time.sleep(0.02)  # noqa: ASYNC251  no heartbeat goes out
        return [Output(b"%d" % (2 * int(record.value)))]

    options: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with transform(kafka, source, target, group, function, **options) as work:
        await mq.until(lambda: work.report.fenced, within=60)
        print("fenced")


async def test_members_come_and_go(kafka: mq.Kafka) -> None:
    source, target, group = await filled(kafka, 3000, 4), await mq.topic(kafka, "target", 2), kafka.name("group")

    async def slow(record: ConsumerRecord) -> list[Output]:
        await asyncio.sleep(0.001)
        return await doubled(record)

    async with transform(kafka, source, target, group, slow, batch=20, **QUICK) as one:
        await mq.until(lambda: one.report.records > 200, within=20)
        async with transform(kafka, source, target, group, slow, batch=20, **QUICK) as two:
            await mq.until(lambda: two.report.records > 200, within=20)
        await mq.until(lambda: one.report.records + two.report.records == 3000, within=60)
    ledger = await judged(kafka, source, target)
    assert ledger.exact, str(ledger)


async def test_a_network_that_fails_again_and_again(own: mq.Kafka) -> None:
    source, target, group = await filled(own, 2000), await mq.topic(own, "target", 2), own.name("group")
    async with (
        mq.proxy(own) as network,
        transform(network, source, target, group, doubled, batch=50, **QUICK) as work,
    ):

        def done(records: int) -> bool:
            return work.report.records >= records

        for cut in range(1, 6):
            await mq.until(partial(done, 300 * cut), within=60)
            network.cut()
        await mq.until(lambda: drained(own, group, source), within=60, every=0.2)
    ledger = await judged(own, source, target)
    assert ledger.exact, str(ledger)


async def test_a_missing_topic_is_an_error(kafka: mq.Kafka) -> None:
    source = await mq.topic(kafka, "source")
    with pytest.raises(BrokerError, match="no topic 'nowhere'"):
        async with transform(kafka, source, "nowhere", kafka.name("group"), doubled):
            pytest.fail("there is no such topic")
