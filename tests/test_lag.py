"""The lag is what Kafka's own tool says where that is right, and right where it is not; unknown is never 0."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewPartitions, RecordsToDelete
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib import lag, topics
from mqlib.lag import GroupLag, LagMonitor, PartitionLag, judge
from mqlib.topics import _admin as admin
from tests.kafka_tools import consumer_group_lag


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka of these tests' own, which makes topics for whoever names one."""
    with mq.kafka(private=True, settings={"auto.create.topics.enable": "true"}) as broker:
        yield broker


async def filled(kafka: mq.Kafka, *counts: int) -> str:
    """A topic with so many records in each of its partitions."""
    topic = await mq.topic(kafka, "lag", partitions=len(counts))
    await fill(kafka, topic, *counts)
    return topic


async def fill(kafka: mq.Kafka, topic: str, *counts: int) -> None:
    # An end is what all replicas have: with less than acks=all it comes later, and a commit could be beyond it.
    async with mq.producer(kafka, acks="all") as producer:
        for partition, count in enumerate(counts):
            await mq.pump(producer, topic, [b"x"] * count, partition=partition)


async def commit(kafka: mq.Kafka, group: str, topic: str, **offsets: int) -> None:
    """`commit(kafka, group, topic, p0=3)`, as an empty group that was there before."""
    parts = {TopicPartition(topic, int(name[1:])): offset for name, offset in offsets.items()}
    async with mq.consumer(kafka, group_id=group, enable_auto_commit=False) as consumer:
        consumer.assign(list(parts))
        await consumer.commit(parts)


def lags(found: GroupLag) -> dict[int, int | None]:
    return {part.partition: part.lag for part in found.partitions}


def notes(found: GroupLag) -> dict[int, str]:
    return {part.partition: part.note for part in found.partitions}


async def same_as_kafkas_tool(kafka: mq.Kafka, group: str, *topics: str) -> GroupLag:
    """The lag, after comparing each partition's commit, end and lag with `kafka-consumer-groups --describe`."""
    ours = await mq.group_lag(kafka, group, *topics)
    theirs = await asyncio.to_thread(consumer_group_lag, kafka, group)
    assert {(part.topic, part.partition): (part.committed, part.end, part.lag) for part in ours.partitions} == theirs
    return ours


async def test_the_lag_of_each_partition_is_what_kafkas_tool_says(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 10, 4, 7), kafka.name("plain")
    await commit(kafka, group, topic, p0=10, p1=1, p2=0)
    found = await same_as_kafkas_tool(kafka, group)
    assert lags(found) == {0: 0, 1: 3, 2: 7}
    assert (found.total, found.known, found.unknown) == (10, 10, [])
    assert str(found) == "lag 10 in 3 partitions"


async def test_a_partition_without_a_commit_is_unknown(kafka: mq.Kafka) -> None:
    """Never 0, never all of it in silence; the total says so. The reset policy, if it is told, decides."""
    topic, group = await filled(kafka, 10, 4), kafka.name("partly")
    await commit(kafka, group, topic, p0=10)
    found = await mq.group_lag(kafka, group, topic)
    assert (lags(found), notes(found)) == ({0: 0, 1: None}, {0: "", 1: "no commit"})
    assert (found.total, found.known, [part.partition for part in found.unknown]) == (None, 0, [1])
    assert str(found) == f"lag 0 in 1 partitions; unknown for {topic}-1 (no commit)"
    assert lags(await mq.group_lag(kafka, group, topic, reset="earliest")) == {0: 0, 1: 4}
    assert lags(await mq.group_lag(kafka, group, topic, reset="latest")) == {0: 0, 1: 0}
    theirs = await asyncio.to_thread(consumer_group_lag, kafka, group)
    assert theirs == {(topic, 0): (10, 10, 0)}, "without members Kafka's tool is silent about the other"
    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as member:
        assert len(await mq.take(member, 4, within=20)) == 4
        await same_as_kafkas_tool(kafka, group, topic)  # with one it prints "-" for commit and lag, not 0


async def test_a_group_that_never_was_has_an_unknown_lag(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 3), kafka.name("nobody")
    assert (await mq.group_lag(kafka, group)).total is None
    assert lags(await mq.group_lag(kafka, group, topic)) == {0: None}


async def test_a_broker_to_which_no_group_ever_came_and_that_then_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no coordinator until somebody asks for one: the lag is unknown, and that is no error."""
    with mq.kafka(private=True) as fresh:
        topic = await filled(fresh, 3)
        assert lags(await mq.group_lag(fresh, fresh.name("first"), topic)) == {0: None}
        await ends_without_an_answer(fresh, fresh.nodes[0].kill, monkeypatch)


async def test_after_retention_it_counts_from_the_start_of_the_log(kafka: mq.Kafka) -> None:
    """What was deleted unread cannot be read any more: Kafka's tool goes on counting it."""
    topic, group = await filled(kafka, 20), kafka.name("expired")
    await commit(kafka, group, topic, p0=5)
    async with admin(kafka) as client:
        await client.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=12)})
    found = await mq.group_lag(kafka, group)
    assert (lags(found), notes(found), found.partitions[0].start) == ({0: 8}, {0: "expired"}, 12)
    assert lags(await mq.group_lag(kafka, group, reset="earliest")) == {0: 8}
    assert lags(await mq.group_lag(kafka, group, reset="latest")) == {0: 0}
    theirs = await asyncio.to_thread(consumer_group_lag, kafka, group)
    assert theirs[topic, 0].lag == 15, "where this becomes 8, the comparison can be used here, too"


async def test_a_commit_beyond_the_end_is_not_a_negative_lag(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 10), kafka.name("beyond")
    await commit(kafka, group, topic, p0=100)
    found = await mq.group_lag(kafka, group)
    assert (lags(found), notes(found), found.total) == ({0: None}, {0: "beyond the end"}, None)
    assert lags(await mq.group_lag(kafka, group, reset="earliest")) == {0: 10}
    assert lags(await mq.group_lag(kafka, group, reset="latest")) == {0: 0}
    theirs = await asyncio.to_thread(consumer_group_lag, kafka, group)
    assert theirs[topic, 0].lag == -90, "Kafka's tool is negative here"


async def test_transactions(kafka: mq.Kafka) -> None:
    """One of 3 records committed, one of 2 aborted, one of 1 open: markers are offsets and no records."""
    topic, group = await mq.topic(kafka, "transactions"), kafka.name("transactions")
    place = TopicPartition(topic, 0)
    async with mq.producer(kafka, transactional_id=kafka.name("t")) as producer:
        async with producer.transaction():
            for _ in range(3):
                await producer.send(topic, b"kept")
        await producer.begin_transaction()
        for _ in range(2):
            await producer.send(topic, b"aborted")
        await producer.abort_transaction()
        await commit(kafka, group, topic, p0=3)  # as whoever commits the last record's offset + 1
        assert lags(await same_as_kafkas_tool(kafka, group)) == {0: 4}
        for isolation, left in (("read_committed", 0), ("read_uncommitted", 2)):
            async with LagMonitor(kafka, group, isolation=isolation) as monitor:  # type: ignore[arg-type]
                assert await monitor.records() == {place: left}, f"what is left to read with {isolation}"
        options: dict[str, Any] = {"enable_auto_commit": False, "isolation_level": "read_committed"}
        async with mq.consumer(kafka, topic, group_id=group, **options) as consumer:

            async def at_the_end() -> bool:
                handled.extend(await mq.take(consumer, 1, within=0.1))
                return bool(consumer.assignment()) and await consumer.position(place) == 7

            handled: list[Any] = []
            await mq.until(at_the_end, within=20)
            await consumer.commit()
        assert handled == [], "it began at 3: nothing was left"
        assert lags(await same_as_kafkas_tool(kafka, group)) == {0: 0}
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"open")
        assert lags(await same_as_kafkas_tool(kafka, group)) == {0: 1}
        found = await mq.group_lag(kafka, group, isolation="read_committed")
        assert (found.partitions[0].end, found.partitions[0].lag) == (7, 0), "the last stable offset"
        await commit(kafka, group, topic, p0=8)  # as a reader of what is not committed
        found = await mq.group_lag(kafka, group, isolation="read_committed")
        assert (lags(found), notes(found)) == ({0: 0}, {0: ""})
        await producer.commit_transaction()


async def test_compaction_leaves_fewer_records_than_offsets(kafka: mq.Kafka) -> None:
    """The lag in offsets is what Kafka's tool says; `records` counts what is still there."""
    quickly = {"segment_ms": 200, "min_cleanable_dirty_ratio": "0.01", "min_compaction_lag_ms": 0}
    topic = await mq.topic(kafka, "compacted", cleanup_policy="compact", **quickly)  # type: ignore[arg-type]
    group, place = kafka.name("compacted"), TopicPartition(topic, 0)
    await commit(kafka, group, topic, p0=0)
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, [b"%d" % n for n in range(50)], keys=[b"same"] * 50)

        async def compacted() -> bool:
            # The segment that is written to is never compacted: each record may roll a new one.
            await producer.send_and_wait(topic, b"last", key=b"other")
            return len(await mq.read(kafka, topic)) < 40

        await mq.until(compacted, within=30, every=0.25)
    found = await same_as_kafkas_tool(kafka, group)
    async with LagMonitor(kafka, group) as monitor:
        counted = (await monitor.records())[place]
        with pytest.raises(TimeoutError):
            await monitor.records(within=0)
    assert counted == len(await mq.read(kafka, topic))
    assert counted < (found.total or 0) == (await mq.end_offsets(kafka, topic))[0]


async def topics_of(kafka: mq.Kafka) -> set[str]:
    async with admin(kafka) as client:
        return {*await client.list_topics()}


async def test_a_topic_that_is_deleted_stays_deleted(own: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a broker that makes every topic that is asked for: asking for a lag is no reason."""
    topic, group, kept = await filled(own, 5), own.name("deleted"), await filled(own, 3)
    await commit(own, group, topic, p0=1)
    await commit(own, group, kept, p0=1)
    async with LagMonitor(own, group, topic) as monitor:
        assert (await monitor.sample()).total == 6
        async with admin(own) as client:
            await client.delete_topics([topic])

        async def gone() -> bool:
            found = {part.topic: (part.lag, part.note) for part in (await monitor.sample()).partitions}
            return found == {kept: (2, "")} or found == {kept: (2, ""), topic: (None, "no such partition")}

        await mq.until(gone, within=20)
        before = await topics_of(own)
        monkeypatch.setattr(topics, "SPREAD_SECONDS", 0.2)
        await monitor.sample()
        with pytest.raises(mq.BrokerError, match="no topic"):
            await mq.end_offsets(own, topic)
        with pytest.raises(mq.BrokerError, match="no topic"):
            await mq.read(own, topic)
        assert await topics_of(own) == before
    assert topic not in before


async def test_a_topic_that_is_made_again_has_no_history(own: mq.Kafka) -> None:
    """Its ends are not those of the old one; what was committed went with it."""
    clock = iter(range(1000))
    topic, group = await filled(own, 5), own.name("again")
    await commit(own, group, topic, p0=5)
    async with LagMonitor(own, group, topic, clock=lambda: float(next(clock))) as monitor:
        await monitor.sample()
        await fill(own, topic, 45)
        assert (await monitor.sample()).total == 45
        async with admin(own) as client:
            await client.delete_topics([topic])
            await mq.until(lambda: absent(own, topic), within=20)
        async with mq.producer(own) as producer:
            await producer.send_and_wait(topic, b"new")  # this broker makes it again
        await fill(own, topic, 7)
        async with LagMonitor(own, group, topic) as fresh:

            async def forgotten() -> bool:
                return notes(await fresh.sample()) == {0: "no commit"}

            await mq.until(forgotten, within=20)
        await commit(own, group, topic, p0=6)  # between the two ends that the old one had

        async def seen() -> bool:
            return lags(await monitor.sample()) == {0: 2}

        await mq.until(seen, within=20)
        assert monitor.samples[-1].partitions[0].seconds is None, "nobody saw it being written"


async def test_a_topic_that_is_made_again_and_grows_has_no_history_either(own: mq.Kafka) -> None:
    """Although its end is beyond that of the old one: in between it was seen to be gone."""
    now = 0.0
    topic, group = await filled(own, 50), own.name("grown")
    async with LagMonitor(own, group, topic, clock=lambda: now) as monitor:
        assert notes(await monitor.sample()) == {0: "no commit"}
        async with admin(own) as client:
            await client.delete_topics([topic])

        async def gone() -> bool:
            nonlocal now
            now += 10
            return (await monitor.sample()).partitions == ()

        await mq.until(gone, within=20)
        async with mq.producer(own) as producer:
            await producer.send_and_wait(topic, b"new")  # this broker makes it again
        await fill(own, topic, 59)
        await commit(own, group, topic, p0=55)
        now += 10
        found = await monitor.sample()
        assert (lags(found), found.seconds) == ({0: 5}, None), "nobody saw it being written"


async def absent(kafka: mq.Kafka, topic: str) -> bool:
    return topic not in await topics_of(kafka)


async def test_partitions_that_are_added_appear(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 5), kafka.name("more")
    await commit(kafka, group, topic, p0=2)
    async with LagMonitor(kafka, group, reset="earliest") as monitor:
        assert (await monitor.sample()).total == 3
        async with admin(kafka) as client:
            await client.create_partitions({topic: NewPartitions(3)})

        async def three() -> bool:
            return lags(await monitor.sample()).keys() == {0, 1, 2}

        await mq.until(three, within=20)
        await fill(kafka, topic, 0, 0, 4)
        assert lags(await monitor.sample()) == {0: 3, 1: 0, 2: 4}


async def test_a_commit_to_a_partition_that_is_new_is_no_riddle(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old the knowledge of partitions is."""
    monkeypatch.setattr(lag, "METADATA_SECONDS", float("inf"))
    topic, group = await filled(kafka, 5), kafka.name("new")
    await commit(kafka, group, topic, p0=2)
    async with LagMonitor(kafka, group) as monitor:
        assert lags(await monitor.sample()) == {0: 3}
        async with admin(kafka) as client:
            await client.create_partitions({topic: NewPartitions(2)})
        await fill(kafka, topic, 0, 4)
        await commit(kafka, group, topic, p1=1)
        assert lags(await monitor.sample()) == {0: 3, 1: 3}


async def test_it_joins_no_group(kafka: mq.Kafka) -> None:
    """A running member keeps its partitions; an empty group keeps its lag, and stays empty."""
    topic, group = await filled(kafka, 6), kafka.name("members")

    async def members() -> list[Any]:
        async with admin(kafka) as client:
            [answer] = await client.describe_consumer_groups([group])
            return list(answer.groups[0][5])

    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
        assert len(await mq.take(consumer, 6, within=20)) == 6
        await consumer.commit({TopicPartition(topic, 0): 4})
        before = await members()
        assert (len(before), (await same_as_kafkas_tool(kafka, group)).total) == (1, 2)
        assert await members() == before
    assert ((await same_as_kafkas_tool(kafka, group)).total, await members()) == (2, [])


async def test_it_is_never_negative_while_the_consumer_keeps_up(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 1), kafka.name("busy")
    await commit(kafka, group, topic, p0=0)
    done, commits = asyncio.Event(), list[int]()

    async def produce() -> None:
        async with mq.producer(kafka) as producer:
            while not done.is_set():
                await mq.pump(producer, topic, [b"x"] * 100)

    async def consume() -> None:
        async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
            while not done.is_set():
                if await mq.take(consumer, 50, within=0.1):
                    await consumer.commit()
                    commits.append(len(monitor.samples))

    async with asyncio.TaskGroup() as both, LagMonitor(kafka, group) as monitor:
        both.create_task(produce())
        both.create_task(consume())

        async def both_have_done_200() -> bool:
            await monitor.sample()
            return min(len(monitor.samples), len(commits)) >= 200

        await mq.until(both_have_done_200, within=60, every=0)
        done.set()
    found = [each.total for each in monitor.samples]
    assert all(total is not None and total >= 0 for total in found)
    seen = [(part.end, part.committed, part.lag) for each in monitor.samples for part in each.partitions]
    assert all(end - at == behind for end, at, behind in seen if end is not None and at is not None), "no end is older"
    committed = [at or 0 for _, at, _ in seen]
    assert committed[-1] > committed[0], "the consumer worked all the while"


async def test_lag_in_seconds_is_the_age_of_the_first_unread_offset(kafka: mq.Kafka) -> None:
    """By the ends that were sampled: 10 offsets by second 0, 10 more evenly until second 10, none after."""
    now = 0.0
    topic, group = await filled(kafka, 10), kafka.name("seconds")
    await commit(kafka, group, topic, p0=10)
    async with LagMonitor(kafka, group, clock=lambda: now) as monitor:

        async def at(second: float, committed: int) -> float | None:
            nonlocal now
            now = second
            await commit(kafka, group, topic, p0=committed)
            return (await monitor.sample()).seconds

        assert await at(0, 10) == 0.0
        await fill(kafka, topic, 10)
        assert await at(10, 10) == 10.0
        assert await at(20, 10) == 20.0
        assert await at(20, 15) == 15.0
        assert await at(30, 19) == 21.0
        assert await at(30, 20) == 0.0
        assert await at(30, 5) is None, "written before the first sample"


OFFSETS = strategies.integers(0, 60)


@settings(max_examples=500, deadline=None)
@given(strategies.none() | OFFSETS, OFFSETS, OFFSETS, OFFSETS, strategies.sampled_from([None, "earliest", "latest"]))
def test_the_judgement(committed: int | None, start: int, more: int, above: int, reset: lag.Reset | None) -> None:
    """Never negative, never more than the log holds, and plain arithmetic where the group has a position."""
    end, high = start + more, start + more + above
    found, note = judge(committed, start, end, high, reset)
    assert found is None or 0 <= found <= end - start
    if committed is not None and start <= committed <= high:
        assert (found, note) == (max(end - committed, 0), "")
    else:
        assert note == ("no commit" if committed is None else "expired" if committed < start else "beyond the end")
        if reset:
            assert found == (end - start if reset == "earliest" else 0)
        else:
            assert found == (end - start if note == "expired" else None)


async def grows(count: Callable[[], int]) -> None:
    before = count()
    await mq.until(lambda: count() > before, within=30)


async def test_sampling_outlives_a_broker_that_freezes_and_one_that_dies(
    own: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, group = await filled(own, 5), own.name("outage")
    await commit(own, group, topic, p0=2)
    async with asyncio.timeout(90), mq.monitor_lag(own, group, every=0.05) as monitor:
        for fault in (mq.paused, mq.killed):
            with monkeypatch.context() as impatient:
                impatient.setattr(lag, "PATIENCE_SECONDS", 0.5)
                async with fault(own.nodes[0]):
                    await grows(lambda: monitor.missed)
            await grows(lambda: len(monitor.samples))
    assert {each.total for each in monitor.samples} == {3}


async def ends_without_an_answer(kafka: mq.Kafka, stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The block ends within a bounded time, and no other can begin; the error says whose lag is unknown."""
    topic, group = await filled(kafka, 5), kafka.name("orders")
    await commit(kafka, group, topic, p0=2)
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(60):
        async with mq.monitor_lag(kafka, group, every=60) as monitor:
            monkeypatch.setattr(lag, "PATIENCE_SECONDS", 0.5)
            stop()
        assert ([each.total for each in monitor.samples], monitor.missed) == ([3], 1)
        with pytest.raises(mq.BrokerError, match=f"the lag of group '{group}' is unknown: .*bootstrap"):
            await mq.group_lag(kafka, group)
        with pytest.raises(mq.BrokerError, match=f"the lag of group '{group}' is unknown: .*bootstrap"):
            async with mq.monitor_lag(kafka, group):
                pytest.fail("there was no first sample")
        await mq.until(lambda: asyncio.all_tasks() <= tasks)  # nothing stays behind in the kernel


async def test_the_block_ends_although_the_broker_is_frozen(own: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        await ends_without_an_answer(own, own.nodes[0].pause, monkeypatch)
    finally:
        async with mq.paused(own.nodes[0]):
            pass  # it resumes, and waits until it is ready


async def test_an_answer_that_comes_too_late_is_none(own: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    async with LagMonitor(own, "orders") as monitor, mq.paused(own.nodes[0]):
        monkeypatch.setattr(lag, "PATIENCE_SECONDS", 0.5)
        with pytest.raises(mq.BrokerError, match="the lag of group 'orders' is unknown: no answer in time"):
            await monitor.sample()


async def test_it_follows_the_leader_and_the_coordinator_to_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells no wrong number meanwhile, and soon no question of its goes to the node that is frozen or dead."""
    monkeypatch.setattr(lag, "METADATA_SECONDS", 0)  # so that each sample asks a node that aiokafka chooses by chance
    with mq.kafka(nodes=3, private=True) as cluster:
        topic, group = await filled(cluster, 4, 4, 4), cluster.name("moving")
        await commit(cluster, group, topic, p0=1, p1=1, p2=1)
        async with LagMonitor(cluster, group) as monitor:
            assert (await monitor.sample()).total == 9
            monkeypatch.setattr(lag, "PATIENCE_SECONDS", 1.0)
            for fault in (mq.paused, mq.killed):
                gone, in_a_row = monitor._coordinator, 0

                async def settled(gone: int | None = gone) -> bool:
                    nonlocal in_a_row
                    try:
                        in_a_row = in_a_row + 1 if (await monitor.sample()).total == 9 else 0
                    except mq.BrokerError:
                        in_a_row = 0
                    return in_a_row == 25

                async with fault(next(node for node in cluster.nodes if node.name.endswith(f"-{gone}"))):
                    await mq.until(settled, within=90)
                    assert gone not in {monitor._coordinator, *monitor._leaders[topic].values()}
        assert {each.total for each in monitor.samples} <= {9, None}


@pytest.mark.parametrize("wrong", [{"isolation": "dirty"}, {"reset": "none"}, {"group": "''"}])
def test_wrong_options_are_named(kafka: mq.Kafka, wrong: dict[str, str]) -> None:
    options = {"group": "orders"} | wrong | ({"group": ""} if "group" in wrong else {})
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        LagMonitor(kafka, **options)  # type: ignore[arg-type]


async def test_the_blocks_error_passes_and_nothing_goes_on(kafka: mq.Kafka) -> None:
    tasks = asyncio.all_tasks()

    async def failing_block() -> None:
        async with mq.monitor_lag(kafka, kafka.name("failing"), every=0.01) as monitor:
            await mq.until(lambda: len(monitor.samples) > 2, within=20)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_block()
    await mq.until(lambda: asyncio.all_tasks() <= tasks)


async def test_over_time_it_is_a_frame_and_a_curve(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, 3, 0), kafka.name("frame")
    async with mq.monitor_lag(kafka, group, topic, every=0.02) as monitor:
        assert len(monitor.samples) == 1
        await commit(kafka, group, topic, p0=1, p1=0)
        await mq.until(lambda: monitor.samples[-1].total == 2, within=10)
    frame = monitor.frame()
    assert list(frame.columns) == ["time", *(field.name for field in dataclasses.fields(PartitionLag))]
    assert frame["partition"].to_list() == [0, 1] * len(monitor.samples)
    assert frame["lag"].isna().iloc[0]
    assert frame["lag"].iloc[-2:].to_list() == [2, 0]
    seconds, totals = monitor.curve()
    assert (seconds[0], totals[-1], str(totals[0])) == (0.0, 2.0, "nan")
    assert seconds == sorted(seconds) == frame["time"].to_list()[::2]


async def test_a_frame_has_the_same_types_whatever_is_known(kafka: mq.Kafka) -> None:
    """Of no sample, of one of which nothing is known, of one with everything."""
    topic, group = await filled(kafka, 3), kafka.name("types")
    offsets = dict.fromkeys(["committed", "start", "end", "lag"], "Int64")
    expected = {"time": "float64", "partition": "int64", **offsets, "seconds": "float64"}
    async with LagMonitor(kafka, group, topic) as monitor:
        for rows in range(3):
            frame = monitor.frame()
            assert len(frame) == rows
            assert {name: str(frame[name].dtype) for name in expected} == expected
            await monitor.sample()
            await commit(kafka, group, topic, p0=3)
