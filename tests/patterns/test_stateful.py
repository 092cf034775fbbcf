"""The state is what the committed records made of it, whoever dies, and whenever; nothing of the others is left."""

from __future__ import annotations

import asyncio
import operator
from collections import Counter
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns.stateful import Handler, Json, Processor, State, Stateful, _Store, restored, stateful
from mqlib.patterns.transactional import Output, TransformFailed
from mqlib.patterns.windows import Aggregator, Result, Tumbling, Watermark
from mqlib.topics import poll

QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}


class Place:
    """A source of numbers, of three keys, and where its counts go."""

    def __init__(self, kafka: mq.Kafka, partitions: int, source: str, target: str, changelog: str) -> None:
        self.kafka, self.group = kafka, kafka.name("group")
        self.topics, self.partitions = (source, target, changelog), partitions

    def run(self, processor: Processor, batch: int = 500) -> AbstractAsyncContextManager[Stateful]:
        return stateful(self.kafka, *self.topics, self.group, processor, batch, **QUICK)

    async def drained(self) -> bool:
        return (await mq.group_lag(self.kafka, self.group, self.topics[0])).total == 0

    async def done(self) -> None:
        await mq.until(self.drained, within=60, every=0.1)

    async def outputs(self) -> list[ConsumerRecord]:
        return await mq.read(self.kafka, self.topics[1], within=30, isolation_level="read_committed")


async def place(kafka: mq.Kafka, count: int = 90, partitions: int = 2, **changelog: Any) -> Place:
    source = await mq.topic(kafka, "source", partitions)
    log = await mq.topic(kafka, "changelog", partitions, **{"cleanup_policy": "compact", **changelog})
    made = Place(kafka, partitions, source, await mq.topic(kafka, "target"), log)
    await fill(made, count)
    return made


async def fill(made: Place, count: int) -> None:
    async with mq.producer(made.kafka, linger_ms=5) as producer:
        for number in range(count):
            key = number % 3
            await producer.send(made.topics[0], b"%d" % number, b"k%d" % key, partition=key % made.partitions)
        await producer.flush()


def counting(state: State) -> Handler:
    async def count(record: ConsumerRecord) -> list[Output]:
        value = b"%d" % (int(state.get(record.key, 0)) + 1)
        state[record.key] = value
        return [Output(value, record.key)]

    return count


async def dies(kafka: Any, topics: Any, group: str, point: str, nth: int) -> None:
    """Counts until the nth time of a point in its work, and ends by SIGKILL there."""
    import asyncio

    from aiokafka import AIOKafkaProducer

    import mqlib as mq
    from mqlib.patterns.stateful import stateful
    from mqlib.patterns.transactional import Output

    count = 0

    def reached(name: str) -> None:
        nonlocal count
        count += name == point
        if count == nth and name == point:
            mq.crash()

    def watch(method: str, after: str = "") -> None:
        original = getattr(AIOKafkaProducer, method)

        async def watched(*arguments: Any, **options: Any) -> Any:
            reached(method)
            result = await original(*arguments, **options)
            reached(after)
            return result

        setattr(AIOKafkaProducer, method, watched)

    def counting(state: Any) -> Any:
        reached("restored")

        async def handle(record: Any) -> list[Any]:
            value = b"%d" % (int(state.get(record.key, 0)) + 1)
            state[record.key] = value
            reached("handle")
            return [Output(value, record.key)]

        return handle

    watch("send")
    watch("send_offsets_to_transaction", after="offsets")
    watch("commit_transaction", after="committed")
    quick: Any = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    source, target, changelog = topics
    async with stateful(kafka, source, target, changelog, group, counting, batch=7, **quick):
        await asyncio.sleep(60)


DEATHS = [("handle", 20), ("send", 31), ("send_offsets_to_transaction", 3), ("offsets", 4), ("commit_transaction", 5),
          ("committed", 3), ("restored", 2)]  # fmt: skip


async def test_whenever_it_dies_each_record_counts_once(kafka: mq.Kafka) -> None:
    """Each in its own place: one crash of a process, at the worst moments, then a life that ends well."""
    places = [await place(kafka) for _ in DEATHS]

    async def lives(made: Place, point: str, nth: int) -> None:
        async with mq.worker(dies, kafka, made.topics, made.group, point, nth) as worker:
            await worker.ended(within=60)
        assert worker.crashed, point
        async with made.run(counting, batch=7):
            await made.done()
        assert await restored(kafka, made.topics[2]) == {0: {b"k0": b"30", b"k2": b"30"}, 1: {b"k1": b"30"}}, point
        outputs = Counter((record.key, int(record.value)) for record in await made.outputs())
        assert outputs == {(b"k%d" % key, number): 1 for key in range(3) for number in range(1, 31)}, point

    gate = asyncio.Semaphore(3)

    async def in_turn(made: Place, point: str, nth: int) -> None:
        async with gate:
            await lives(made, point, nth)

    async with asyncio.TaskGroup() as group:
        for made, (point, nth) in zip(places, DEATHS, strict=True):
            group.create_task(in_turn(made, point, nth))


async def test_the_next_life_restores_and_goes_on_and_reports_both(kafka: mq.Kafka) -> None:
    made = await place(kafka)
    async with made.run(counting) as first:
        await made.done()
        await mq.until(lambda: first.report.records == 90, within=20)
        assert first.state == {0: {b"k0": b"30", b"k2": b"30"}, 1: {b"k1": b"30"}}
    assert (first.report.changes, first.report.outputs, first.report.restored) == (90, 90, 0)
    assert first.state == {}
    await fill(made, 9)
    async with made.run(counting) as second:
        await mq.until(lambda: second.report.records == 9, within=20)
        assert second.state == {0: {b"k0": b"33", b"k2": b"33"}, 1: {b"k1": b"33"}}
    assert (second.report.changes, second.report.restored) == (9, 90)


async def test_what_is_deleted_is_a_tombstone_and_what_is_the_same_is_no_change(kafka: mq.Kafka) -> None:
    made = await place(kafka, 6, partitions=1)

    def processor(state: State) -> Handler:
        async def handle(record: ConsumerRecord) -> list[Output]:
            state[b"same"] = b"x"
            if int(record.value) == 4:
                del state[b"k0"]
            elif int(record.value) < 4:
                state[record.key] = record.value
            return []

        return handle

    async with made.run(processor) as work:
        await mq.until(lambda: work.report.records == 6, within=20)
        assert dict(work.state[0]) == {b"same": b"x", b"k1": b"1", b"k2": b"2"}
    log = await mq.read(kafka, made.topics[2], isolation_level="read_committed")
    assert [(record.key, record.value) for record in log] == [
        (b"same", b"x"), (b"k0", b"0"), (b"k1", b"1"), (b"k2", b"2"), (b"k0", b"3"), (b"k0", None),
    ]  # fmt: skip
    assert (await restored(kafka, made.topics[2]))[0] == {b"same": b"x", b"k1": b"1", b"k2": b"2"}


async def test_a_handler_that_fails_leaves_nothing_of_its_batch(kafka: mq.Kafka) -> None:
    made = await place(kafka, 30, partitions=1)
    broken = True

    def processor(state: State) -> Handler:
        counts = counting(state)

        async def handle(record: ConsumerRecord) -> Any:
            result = await counts(record)
            if broken and int(record.value) == 17:
                raise ValueError("cannot do 17")
            return result

        return handle

    with pytest.raises(TransformFailed, match=r"offset 17: .* cannot do 17"):
        async with made.run(processor, batch=10):
            await asyncio.sleep(30)
    before = (await restored(kafka, made.topics[2]))[0]
    committed = sum(map(int, before.values()))
    assert committed < 18
    assert committed == len(await made.outputs())
    broken = False
    async with made.run(processor, batch=10):
        await made.done()
    assert (await restored(kafka, made.topics[2]))[0] == {b"k0": b"10", b"k1": b"10", b"k2": b"10"}


async def test_a_second_member_gets_the_state_with_the_partition_and_the_first_forgets_it(kafka: mq.Kafka) -> None:
    made = await place(kafka)
    async with made.run(counting) as first:
        await mq.until(lambda: first.report.records == 90, within=20)
        gone = first._stores.setdefault(TopicPartition(made.topics[0], 7), _Store())  # it was never restored to its end
        async with made.run(counting) as second:
            await mq.until(lambda: len(first.state) == len(second.state) == 1, within=30)
            assert {**first.state, **second.state} == {0: {b"k0": b"30", b"k2": b"30"}, 1: {b"k1": b"30"}}
            assert not first.state.keys() & second.state.keys()
            await fill(made, 9)
            await made.done()
        await mq.until(lambda: len(first.state) == 2, within=30)
        assert first.state == {0: {b"k0": b"33", b"k2": b"33"}, 1: {b"k1": b"33"}}
        assert gone not in first._stores.values()


async def test_the_last_owner_is_fenced_before_its_changelog_is_read(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up, and tries to commit, when its successor has read the changelog."""
    made = await place(kafka, 30, partitions=1)
    source, _, log = made.topics
    async with mq.producer(kafka, transactional_id=f"{made.group}-{source}-0") as sleeper:
        await sleeper.begin_transaction()
        await sleeper.send_and_wait(log, b"1", b"k0", partition=0)
        await sleeper.send_offsets_to_transaction({TopicPartition(source, 0): 1}, made.group)
        restore, woken = _Store.restore, list[str]()

        async def restored_and_then(self: _Store, *arguments: Any) -> None:
            await restore(self, *arguments)
            try:
                await sleeper.commit_transaction()
                woken.append("committed")
            except KafkaError as error:
                woken.append(type(error).__name__)

        monkeypatch.setattr(_Store, "restore", restored_and_then)
        async with made.run(counting):
            await made.done()
        monkeypatch.undo()
    assert woken == ["ProducerFenced"]
    assert (await restored(kafka, log))[0] == {b"k0": b"10", b"k1": b"10", b"k2": b"10"}


async def test_an_aborted_change_is_not_restored_and_the_restore_ends_behind_the_markers(kafka: mq.Kafka) -> None:
    made = await place(kafka, 0, partitions=1)
    log = made.topics[2]
    async with mq.producer(kafka, transactional_id=kafka.name("somebody")) as producer:
        for value, good in ((b"1", True), (b"2", True), (b"3", False)):
            await producer.begin_transaction()
            await producer.send_and_wait(log, value, b"k0", partition=0)
            await (producer.commit_transaction() if good else producer.abort_transaction())
    assert await restored(kafka, log) == {0: {b"k0": b"2"}}
    assert (await mq.end_offsets(kafka, log)) == [6], "three records, three markers"


async def test_a_restore_that_takes_longer_than_a_life_goes_on_in_the_next(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every life but the last gets one piece of the changelog, and none from its beginning."""
    made = await place(kafka, 0, partitions=1)
    async with mq.producer(kafka, linger_ms=5) as producer:
        for number in range(300):
            await producer.send(made.topics[2], b"%d" % number, b"k%d" % number, partition=0)
        await producer.flush()
    calls = list[float]()
    real = poll

    async def slow(consumer: Any, within: float) -> Any:
        if calls and len(calls) < 6 and len(calls) % 2:
            calls.append(0)
            raise TimeoutError("as if it had taken too long")
        calls.append(within)
        return await real(consumer, within, 50)

    monkeypatch.setattr("mqlib.patterns.stateful.poll", slow)
    async with made.run(counting) as work:
        await mq.until(lambda: 0 in work.state, within=60)
        assert len(work.state[0]) == 300
    assert work.report.restarts == 3
    assert work.report.restored == 300, "no record was read twice"


async def test_windows_and_their_watermark_outlive_a_life(kafka: mq.Kafka) -> None:
    """Times are the records' numbers; the second life neither closes a window twice nor reopens one."""
    made = await place(kafka, 0, partitions=1)

    def processor(state: State) -> Handler:
        mark, watermark = Json(state, "mark/"), Watermark(["source"], lateness=5)
        windows = Aggregator[int, int](
            Tumbling(10), int, operator.add, state=Json(state, "open/"), watermark=mark.get("at", 0)
        )

        async def handle(record: ConsumerRecord) -> list[Output]:
            time = int(record.value)
            out = [*windows.add("all", time, 1), *windows.advance(watermark.observe("source", time))]
            mark["at"] = windows.watermark
            return [Output(f"{each.window.start}: {each.value}".encode(), b"final") if isinstance(each, Result)
                    else Output(record.value, b"late") for each in out]  # fmt: skip

        return handle

    async def send(*times: int) -> None:
        async with mq.producer(kafka) as producer:
            for time in times:
                await producer.send_and_wait(made.topics[0], b"%d" % time)

    for times in ((1, 3, 12, 5, 16), (4, 18, 11, 31)):
        await send(*times)
        async with made.run(processor):
            await made.done()
    assert [(record.key, record.value) for record in await made.outputs()] == [
        (b"final", b"0: 3"), (b"late", b"4"), (b"final", b"10: 4"),
    ]  # fmt: skip


def test_bytes_only() -> None:
    state = State()
    for key, value in (("k", b"v"), (b"k", "v"), (b"k", None), (b"k", 3)):
        with pytest.raises(TypeError, match="keys and values of a state are bytes"):
            state[key] = value  # type: ignore[index, assignment]
    assert (len(state), state._changes) == (0, {})
    with pytest.raises(KeyError):
        del state[b"k"]
    assert state._changes == {}


async def test_what_does_not_fit_is_refused_at_the_start(kafka: mq.Kafka) -> None:
    source, target = await mq.topic(kafka, "source", 2), await mq.topic(kafka, "target")
    narrow = await mq.topic(kafka, "changelog", 1, cleanup_policy="compact")
    forgets = await mq.topic(kafka, "changelog", 2)

    async def refused(topics: tuple[str, str, str], why: str) -> None:
        with pytest.raises(BrokerError, match=why):
            async with stateful(kafka, *topics, "group", counting):
                pass

    await asyncio.gather(
        refused((source, target, narrow), "has 1 partitions and cleanup.policy=compact; it needs 2"),
        refused((source, target, forgets), "has 2 partitions and cleanup.policy=delete"),
        refused((source, target, "missing"), "no topic 'missing'"),
        refused((source, "missing", narrow), "no topic 'missing'"),
        refused(("missing", target, narrow), "no topic 'missing'"),
    )


async def test_nothing_is_left_running(kafka: mq.Kafka) -> None:
    tasks = asyncio.all_tasks()
    made = await place(kafka, 3, partitions=1)
    async with made.run(counting):
        await made.done()
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
