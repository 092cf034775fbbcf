"""Handle, then commit: nothing is skipped, nothing is lost, whatever the handler, the group or the broker does."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition

import mqlib as mq
from mqlib.patterns.consumer import GroupConsumer, HandlerFailed, Policy, consume
from mqlib.waiting import beside

QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
"""A member that dies is missed within a second; our own brokers allow that."""


async def filled(kafka: mq.Kafka, count: int, partitions: int = 1, keys: int = 0) -> str:
    """A topic with `count` records, whose values are their numbers, spread over `keys` keys."""
    topic = await mq.topic(kafka, "work", partitions=partitions)
    async with mq.producer(kafka) as producer:
        await mq.pump(
            producer, topic, [b"%d" % number for number in range(count)],
            keys=[b"k%d" % (number % keys) for number in range(count)] if keys else None,
        )  # fmt: skip
    return topic


async def committed(kafka: mq.Kafka, group: str) -> dict[int, int | None]:
    return {part.partition: part.committed for part in (await mq.group_lag(kafka, group)).partitions}


class Handler:
    """Collects what it is given; `fails` says which records raise."""

    def __init__(self, fails: Callable[[ConsumerRecord], bool] = lambda _: False) -> None:
        self.seen: list[ConsumerRecord] = []
        self.handled: list[int] = []
        self.fails = fails

    async def __call__(self, record: ConsumerRecord) -> None:
        self.seen.append(record)
        if self.fails(record):
            raise RuntimeError(f"cannot {record.value.decode()}")
        self.handled.append(int(record.value))

    def has(self, count: int) -> Callable[[], bool]:
        return lambda: len(set(self.handled)) >= count


async def test_everything_is_handled_once_and_committed(kafka: mq.Kafka) -> None:
    topic, group, handler = await filled(kafka, 1000, partitions=3, keys=30), kafka.name("plain"), Handler()
    async with consume(kafka, [topic], group, handler) as work:
        await mq.until(handler.has(1000), within=20)
    assert sorted(handler.handled) == list(range(1000))
    assert (await mq.group_lag(kafka, group, topic)).total == 0
    assert str(work.report) == "handled 1000, failed 0, dead-lettered 0, dropped 0, revoked 0, lost 0"


async def test_a_record_that_failed_is_not_jumped_over(kafka: mq.Kafka) -> None:
    """Offset 1 fails for ever: the commit stays at 1, the run ends with its error, and the next one gets it again."""
    topic, group, handler = await filled(kafka, 5), kafka.name("stuck"), Handler(lambda record: record.offset == 1)
    for _ in range(2):
        with pytest.raises(HandlerFailed, match=rf"{topic}-0, offset 1, attempt 1: RuntimeError: cannot 1"):
            async with consume(kafka, [topic], group, handler):
                await mq.until(handler.has(5), within=20)
        assert await committed(kafka, group) == {0: 1}
    assert [record.offset for record in handler.seen] == [0, 1, 1], "nothing after it, since order matters"
    handler.fails = lambda _: False
    async with consume(kafka, [topic], group, handler):
        await mq.until(handler.has(5), within=20)
    assert handler.handled == [0, 1, 2, 3, 4]
    assert await committed(kafka, group) == {0: 5}


async def test_by_key_others_go_on_but_the_commit_waits_for_the_prefix(kafka: mq.Kafka) -> None:
    """While one key's record is being handled the others finish, and a crash would repeat them: never skip one."""
    topic, group, gate = await filled(kafka, 40, keys=4), kafka.name("prefix"), asyncio.Event()
    handler = Handler()

    async def handle(record: ConsumerRecord) -> None:
        if record.offset == 2:
            await gate.wait()
        await handler(record)

    async with consume(kafka, [topic], group, handle, Policy(by="key", commit_every=0.1)) as work:
        await mq.until(handler.has(30), within=20)  # all but the ten of offset 2's key
        await mq.until(lambda: work.report.committed.get(TopicPartition(topic, 0)) == 2, within=20)
        assert {number % 4 for number in handler.handled} == {0, 1, 3}
        assert await committed(kafka, group) == {0: 2}
        gate.set()
        await mq.until(handler.has(40), within=20)
    assert await committed(kafka, group) == {0: 40}


async def test_the_commit_follows_the_first_unfinished_record_whatever_the_order(kafka: mq.Kafka) -> None:
    """Six keys are at work at once and finish in a random order. The broker is asked after each: the commit is where
    the first unfinished record is, never beyond it."""
    topic, group, chance = await filled(kafka, 48, keys=6), kafka.name("watermark"), random.Random(13)
    part, running, unfinished, gaps = TopicPartition(topic, 0), dict[int, asyncio.Event](), set(range(48)), 0

    async def handle(record: ConsumerRecord) -> None:
        event = running[record.offset] = asyncio.Event()
        await event.wait()
        unfinished.remove(record.offset)

    async with consume(kafka, [topic], group, handle, Policy(by="key", commit_every=0)) as work:
        for left in range(47, -1, -1):
            await mq.until(
                lambda: {offset % 6 for offset in running} == {offset % 6 for offset in unfinished}, within=20
            )
            running.pop(chance.choice(sorted(running))).set()
            await mq.until(lambda left=left: len(unfinished) == left, within=20)  # type: ignore[misc]
            first = min(unfinished, default=48)
            gaps += any(offset > first for offset in set(range(48)) - unfinished)
            assert ((await committed(kafka, group)).get(0) or 0) <= first
            await mq.until(lambda at=first: work.report.committed.get(part) == at, within=20)  # type: ignore[misc]
            assert await committed(kafka, group) == {0: first}
    assert gaps > 24, "most of the time something beyond the commit was finished"


async def test_a_retry_in_place_keeps_the_order_of_its_key_and_a_retry_topic_does_not(kafka: mq.Kafka) -> None:
    """Key k has v1, which fails the first time, v2 and v3. In place v1 holds up its key and no other; sent to a topic
    for retries, v2 and v3 overtake it."""
    topic, retries = await mq.topic(kafka, "changes"), await mq.topic(kafka, "retries")
    async with mq.producer(kafka) as producer:
        for key, value in [("k", "v1"), ("k", "v2"), ("other", "w1"), ("k", "v3"), ("other", "w2")]:
            await producer.send(topic, value.encode(), key=key.encode())

    tried, done, others = list[str](), list[str](), asyncio.Event()

    async def apply(record: ConsumerRecord) -> None:
        value = record.value.decode()
        tried.append(value)
        if value == "v1":
            if tried.count(value) == 1:
                raise RuntimeError("the first time")
            await others.wait()
        done.append(value)
        if value == "w2":
            others.set()

    async with consume(kafka, [topic], kafka.name("place"), apply, Policy(by="key", attempts=2, backoff=0.01)) as work:
        await mq.until(lambda: len(done) == 5, within=20)
    assert done == ["w1", "w2", "v1", "v2", "v3"], "the other key went on; k kept its order"
    assert (work.report.handled, work.report.failed, tried.count("v1")) == (5, 1, 2)

    tried, done = [], []
    async with mq.producer(kafka) as producer:

        async def apply_or_send_on(record: ConsumerRecord) -> None:
            try:
                await apply(record)
            except RuntimeError:
                await producer.send_and_wait(retries, record.value, key=record.key)

        async with consume(kafka, [topic], kafka.name("topic"), apply_or_send_on, Policy(by="key")) as work:
            await mq.until(lambda: work.report.handled == 5, within=20)
        async with consume(kafka, [retries], kafka.name("retries"), apply):
            await mq.until(lambda: len(done) == 5, within=20)
    assert [value for value in done if value[0] == "v"] == ["v2", "v3", "v1"]


@pytest.mark.parametrize("by", ["partition", "key"])
async def test_order_is_kept_where_it_is_promised(kafka: mq.Kafka, by: Any) -> None:
    topic, group = await filled(kafka, 600, partitions=2, keys=12), kafka.name("order")
    order: dict[object, list[int]] = defaultdict(list)
    running = at_once = 0

    async def handle(record: ConsumerRecord) -> None:
        nonlocal running, at_once
        running += 1
        at_once = max(at_once, running)
        await asyncio.sleep(0)  # lets others overtake, if they may
        order[record.key if by == "key" else record.partition].append(record.offset)
        running -= 1

    async with consume(kafka, [topic], group, handle, Policy(by=by, concurrency=8)):
        await mq.until(lambda: sum(map(len, order.values())) == 600, within=20)
    assert all(offsets == sorted(offsets) for offsets in order.values())
    assert at_once == (8 if by == "key" else 2)


async def test_no_lane_waits_until_another_is_empty(kafka: mq.Kafka) -> None:
    """One handler at a time, and partitions of 300 records and of 1: they take turns."""
    topic, group, order = await mq.topic(kafka, "turns", partitions=2), kafka.name("turns"), list[int]()
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, [b""] * 300, partition=0)
        await producer.send_and_wait(topic, b"", partition=1)

    async def handle(record: ConsumerRecord) -> None:
        await asyncio.sleep(0.001)
        order.append(record.partition)

    async with consume(kafka, [topic], group, handle, Policy(concurrency=1)):
        await mq.until(lambda: len(order) == 301, within=20)
    assert order[-1] == 0


@pytest.mark.parametrize("by", ["partition", "key"])
async def test_handlers_that_never_wait_leave_time_for_others(kafka: mq.Kafka, by: Any) -> None:
    """Polling, heartbeats and whatever else runs in this loop get a turn between records."""
    topic, group, handler = await filled(kafka, 200, keys=200), kafka.name("busy"), Handler()
    between = list[int]()

    async def handle(record: ConsumerRecord) -> None:
        time.sleep(0.001)  # noqa: ASYNC251  work without an await
        await handler(record)

    async def others() -> None:
        while True:
            between.append(len(handler.handled))
            await asyncio.sleep(0)

    async with consume(kafka, [topic], group, handle, Policy(by=by)), beside(others()):
        await mq.until(handler.has(200), within=20)
    assert len({count for count in between if 0 < count < 200}) >= 5


async def test_what_fails_for_good_is_dead_lettered_with_its_history(kafka: mq.Kafka) -> None:
    """Once, after as many attempts as allowed; the others keep flowing, and all is committed."""
    dead, group = await mq.topic(kafka, "dead"), kafka.name("dead")
    topic = await mq.topic(kafka, "work")
    async with mq.producer(kafka) as producer:
        for number in range(5):
            await producer.send(topic, b"%d" % number, key=b"k", headers=[("trace", b"t%d" % number)])
    handler = Handler(lambda record: record.offset == 1)
    policy = Policy(attempts=3, backoff=0.01, dead_letters=dead)
    async with consume(kafka, [topic], group, handler, policy) as work:
        await mq.until(handler.has(4), within=20)
    assert Counter(record.offset for record in handler.seen) == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1}
    assert await committed(kafka, group) == {0: 5}
    assert (work.report.handled, work.report.failed, work.report.dead_lettered) == (4, 3, 1)
    [letter] = await mq.read(kafka, dead)
    assert (letter.key, letter.value) == (b"k", b"1")
    headers = dict(letter.headers)
    assert headers.pop("dead-letter-timestamp").isdigit()
    assert headers == {
        "trace": b"t1", "dead-letter-topic": topic.encode(), "dead-letter-partition": b"0", "dead-letter-offset": b"1",
        "dead-letter-group": group.encode(), "dead-letter-attempts": b"3",
        "dead-letter-error": b"RuntimeError: cannot 1",
    }  # fmt: skip


async def test_each_record_has_all_its_attempts(kafka: mq.Kafka) -> None:
    """Every record fails the first time: that one failed before it takes nothing from the next."""
    topic, group, handler = await filled(kafka, 5), kafka.name("attempts"), Handler()
    handler.fails = lambda record: sum(each.offset == record.offset for each in handler.seen) == 1
    async with consume(kafka, [topic], group, handler, Policy(attempts=2, backoff=0)) as work:
        await mq.until(handler.has(5), within=20)
    assert (handler.handled, work.report.failed) == ([0, 1, 2, 3, 4], 5)


async def test_a_dead_letter_that_cannot_be_stored_is_not_committed(kafka: mq.Kafka) -> None:
    """The dead-letter topic refuses it: the run ends with that error, and the record stays where it is."""
    dead, group = await mq.topic(kafka, "narrow", max_message_bytes=10), kafka.name("narrow")
    topic, handler = await filled(kafka, 3), Handler(lambda record: record.offset == 1)
    with pytest.raises(HandlerFailed, match=r"offset 1, attempt 1: MessageSizeTooLarge"):
        async with consume(kafka, [topic], group, handler, Policy(dead_letters=dead)):
            await mq.until(handler.has(3), within=20)
    assert await committed(kafka, group) == {0: 1}


async def test_a_dead_letter_that_is_not_bytes_ends_the_run_too(kafka: mq.Kafka) -> None:
    """A deserializer made it something that cannot be sent: an error, not a lane that stands still."""
    dead, topic, group = await mq.topic(kafka, "dead"), await filled(kafka, 3), kafka.name("typed")

    async def handle(record: ConsumerRecord) -> None:
        raise RuntimeError("never")

    with pytest.raises(HandlerFailed, match=r"offset 0, attempt 1: "):
        async with consume(kafka, [topic], group, handle, Policy(dead_letters=dead), value_deserializer=json.loads):
            await mq.until(lambda: False, within=20)
    assert await committed(kafka, group) == {0: 0}


async def test_a_cancellation_that_nobody_asked_for_is_a_failed_attempt(kafka: mq.Kafka) -> None:
    """What the handler waited for was cancelled by its library, not the handler: the record is tried again."""
    topic, group, handler = await filled(kafka, 3), kafka.name("cancelled"), Handler()

    async def handle(record: ConsumerRecord) -> None:
        if record.offset == 1 and not handler.fails(record):
            handler.fails = lambda _: True
            gone = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone
        handler.fails = lambda _: False
        await handler(record)

    async with consume(kafka, [topic], group, handle, Policy(attempts=2, backoff=0.01)) as work:
        await mq.until(handler.has(3), within=20)
    assert (handler.handled, work.report.failed) == ([0, 1, 2], 1)
    assert await committed(kafka, group) == {0: 3}


@pytest.mark.parametrize("by", ["partition", "key"])
async def test_after_stop_no_handler_begins(kafka: mq.Kafka, by: Any) -> None:
    """What has begun is finished and committed; the rest is counted as dropped, and stays in the topic."""
    topic, group, handler, stopped = await filled(kafka, 40, keys=4), kafka.name("stop"), Handler(), asyncio.Event()

    async def handle(record: ConsumerRecord) -> None:
        await handler(record)
        if record.offset == 10:
            work.stop()
            stopped.set()

    async with consume(kafka, [topic], group, handle, Policy(by=by, concurrency=1)) as work:
        await stopped.wait()
    assert handler.seen[-1].offset == 10
    unhandled = set(range(40)) - set(handler.handled)
    assert (work.report.handled, work.report.dropped) == (len(handler.handled), len(unhandled))
    assert await committed(kafka, group) == {0: min(unhandled)}


async def test_a_handler_that_does_not_end_is_cancelled_and_not_committed(kafka: mq.Kafka) -> None:
    topic, group, begun = await filled(kafka, 3), kafka.name("hangs"), asyncio.Event()
    cancelled = list[int]()

    async def handle(record: ConsumerRecord) -> None:
        if record.offset == 1:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(record.offset)
                raise

    async with asyncio.timeout(20):
        async with consume(kafka, [topic], group, handle, Policy(attempts=3, drain=0.2)) as work:
            await begun.wait()
    assert (cancelled, work.report.dropped, work.report.failed) == ([1], 2, 0)
    assert await committed(kafka, group) == {0: 1}


async def test_a_slow_handler_keeps_its_place_in_the_group(kafka: mq.Kafka) -> None:
    """Longer than max.poll.interval.ms, with a second member waiting: no rebalance, no second handling."""
    topic, group, gate = await filled(kafka, 3), kafka.name("slow"), asyncio.Event()
    first, second = Handler(), Handler()

    async def slow(record: ConsumerRecord) -> None:
        if record.offset == 0:
            await gate.wait()
        await first(record)

    options = {**QUICK, "max_poll_interval_ms": 500}
    async with consume(kafka, [topic], group, slow, **options) as one:
        await mq.until(lambda: bool(one._parts), within=20)
        async with consume(kafka, [topic], group, second, **options):
            polled = time.monotonic()
            await mq.until(lambda: time.monotonic() > polled + 2, within=20)  # four intervals of the fact itself
            gate.set()
            await mq.until(lambda: len(first.handled) + len(second.handled) >= 3, within=20)
    assert (one.report.lost, sorted(first.handled + second.handled)) == (0, [0, 1, 2])
    assert await committed(kafka, group) == {0: 3}


async def test_a_lost_assignment_is_reported_and_its_records_come_again(kafka: mq.Kafka, tmp_path: Path) -> None:
    """A handler blocks the loop for longer than the session: the member is out, and another one, which has left by now,
    handled all. The commit of the first would be backwards: it is not made. A duplicate, not a loss, no traceback."""
    topic, group, journal, go = await filled(kafka, 0), kafka.name("lost"), tmp_path / "journal", tmp_path / "go"
    ledger, part = mq.Ledger(), TopicPartition(topic, 0)

    async def blocking(record: ConsumerRecord) -> None:
        if record.offset > 0:
            await asyncio.Event().wait()  # until it is cancelled
        ledger.received(int(record.value))
        go.touch()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") == 4):
            time.sleep(0.05)  # noqa: ASYNC251  it blocks this loop on purpose: no heartbeat goes out

    async with (
        mq.worker(take_over, kafka, topic, group, str(journal), str(go)),
        mq.producer(kafka) as producer,
        consume(kafka, [topic], group, blocking, Policy(commit_every=60, drain=0.1), **QUICK) as work,
    ):
        await mq.until(lambda: work.report.committed == {part: 0}, within=20)
        await mq.pump(producer, topic, [b"0", b"1", b"2"])
        await mq.until(lambda: work.report.lost, within=30)
    ledger.replay(journal)
    assert (work.report.lost, work.report.revoked) == (1, 0)
    assert ledger.table().loc["", "received"] == 3, "each came"
    assert ledger.duplicated == 1, "record 0 came twice"
    assert await committed(kafka, group) == {0: 3}


async def take_over(kafka: Any, topic: str, group: str, path: str, go: str) -> None:
    from pathlib import Path

    from aiokafka import TopicPartition

    import mqlib

    await mqlib.until(Path(go).exists, within=30)
    journal = mqlib.Journal(path)
    options = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200, "enable_auto_commit": False}
    async with mqlib.consumer(kafka, topic, group_id=group, **options) as consumer:
        for record in await mqlib.take(consumer, 3, within=20):
            journal.received(int(record.value))
        await consumer.commit({TopicPartition(topic, 0): 3})
    journal.handled(2)


async def test_two_members_share_and_a_rebalance_loses_nothing(kafka: mq.Kafka) -> None:
    """A member joins and leaves in the middle: what it buffered is dropped, what it handled was committed."""
    topic, group, handler = await filled(kafka, 3000, partitions=4, keys=40), kafka.name("share"), Handler()

    async def handle(record: ConsumerRecord) -> None:
        await asyncio.sleep(0.001)
        await handler(record)

    async with consume(kafka, [topic], group, handle, **QUICK) as one:
        await mq.until(handler.has(200), within=20)
        async with consume(kafka, [topic], group, handle, **QUICK) as two:
            await mq.until(lambda: two.report.handled > 200, within=20)
        await mq.until(handler.has(3000), within=60)
    assert set(handler.handled) == set(range(3000))
    assert len(handler.handled) == one.report.handled + two.report.handled
    assert one.report.revoked >= 4
    assert one.report.lost + two.report.lost == 0
    assert len(handler.handled) == 3000, "polite rebalances make no duplicates"
    assert (await mq.group_lag(kafka, group, topic)).total == 0


async def test_a_rebalance_waits_for_the_commit_under_way(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else that commit, late, would be sent for a partition that another member has by then, perhaps backwards."""
    topic, group, handler = await filled(kafka, 40, partitions=2, keys=8), kafka.name("late"), Handler()
    late, gate = asyncio.Event(), asyncio.Event()
    async with consume(kafka, [topic], group, handler, Policy(commit_every=0), **QUICK) as one:
        await mq.until(lambda: sum(one.report.committed.values()) == 40, within=20)
        commit = one._consumer.commit

        async def slow(offsets: dict[TopicPartition, int]) -> None:
            if not late.is_set():
                late.set()
                await gate.wait()
            await commit(offsets)

        monkeypatch.setattr(one._consumer, "commit", slow)
        async with mq.producer(kafka) as producer:
            for partition in range(2):
                await producer.send_and_wait(topic, b"%d" % (40 + partition), partition=partition)
        await late.wait()
        async with consume(kafka, [topic], group, handler, **QUICK) as two:
            await mq.until(lambda: all(state.closed for state in one._parts.values()), within=20)
            with pytest.raises(TimeoutError):
                await mq.until(lambda: two._parts, within=1)
            gate.set()
            await mq.until(lambda: one._parts and two._parts, within=20)
            await mq.until(handler.has(42), within=20)
            assert (one.report.lost, one.report.revoked) == (0, 2), "once; it may be again when the other leaves"
    assert (one.report.lost, len(handler.handled)) == (0, 42)
    assert sum(offset or 0 for offset in (await committed(kafka, group)).values()) == 42


async def test_a_member_that_is_killed_loses_nothing(kafka: mq.Kafka) -> None:
    """SIGKILL between effect and commit: the next member repeats a few, skips none."""
    topic, group, handler = await filled(kafka, 300), kafka.name("killed"), Handler()
    async with mq.worker(die_at, kafka, topic, group, 120) as worker:
        await worker.ended(within=30)
        before = [int(line) for line in worker.lines]
    assert worker.crashed
    async with consume(kafka, [topic], group, handler, **QUICK):
        await mq.until(lambda: set(before) | set(handler.handled) == set(range(300)), within=30)
    assert before == list(range(121))
    assert handler.handled == list(range(handler.handled[0], 300))
    assert handler.handled[0] <= 121


async def die_at(kafka: Any, topic: str, group: str, number: int) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.consumer import Policy, consume

    async def handle(record: Any) -> None:
        print(int(record.value))
        if int(record.value) == number:
            mqlib.crash()

    async with consume(kafka, [topic], group, handle, Policy(commit_every=0), session_timeout_ms=1000,
                       heartbeat_interval_ms=200):  # fmt: skip
        await asyncio.sleep(60)


async def test_the_commit_is_the_position_behind_transaction_markers(kafka: mq.Kafka) -> None:
    """One committed transaction of 3 records, one aborted of 2: the lag returns to 0, not to the markers' number."""
    topic, group, handler = await mq.topic(kafka, "transactions"), kafka.name("transactions"), Handler()
    async with mq.producer(kafka, transactional_id=kafka.name("t")) as producer:
        async with producer.transaction():
            for number in range(3):
                await producer.send(topic, b"%d" % number)
        await producer.begin_transaction()
        for _ in range(2):
            await producer.send(topic, b"9")
        await producer.abort_transaction()
    async with consume(kafka, [topic], group, handler, isolation_level="read_committed") as work:
        await mq.until(lambda: work.report.committed == {TopicPartition(topic, 0): 7}, within=20)
    assert handler.handled == [0, 1, 2]
    assert (await mq.group_lag(kafka, group)).total == 0


async def test_a_partition_of_markers_only_is_committed_too(kafka: mq.Kafka) -> None:
    """All that is there was aborted: no record ever comes, and the lag returns to 0 all the same."""
    topic, group = await mq.topic(kafka, "aborted"), kafka.name("aborted")
    async with mq.producer(kafka, transactional_id=kafka.name("t")) as producer:
        await producer.begin_transaction()
        await producer.send(topic, b"9")
        await producer.abort_transaction()
    async with consume(kafka, [topic], group, Handler(), isolation_level="read_committed") as work:
        await mq.until(lambda: work.report.committed == {TopicPartition(topic, 0): 2}, within=20)
    assert (await mq.group_lag(kafka, group, topic)).total == 0


async def test_what_comes_while_nobody_is_there_is_not_jumped_over(kafka: mq.Kafka) -> None:
    """A group that reads from the end, and ends before it has had a record: its place is kept for the next member."""
    topic, group, handler = await filled(kafka, 3), kafka.name("latest"), Handler()
    async with consume(kafka, [topic], group, handler, auto_offset_reset="latest") as work:
        await mq.until(lambda: work.report.committed == {TopicPartition(topic, 0): 3}, within=20)
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, b"3")
    async with consume(kafka, [topic], group, handler, auto_offset_reset="latest"):
        await mq.until(handler.has(1), within=20)
    assert handler.handled == [3]


async def test_a_full_buffer_pauses_the_partition(kafka: mq.Kafka) -> None:
    """Memory stays bounded while handlers are slow."""
    topic, group, gate = await filled(kafka, 2000), kafka.name("full"), asyncio.Event()
    handler = Handler()

    async def handle(record: ConsumerRecord) -> None:
        await gate.wait()
        await handler(record)

    async with consume(kafka, [topic], group, handle, Policy(max_buffered=100), max_poll_records=50) as work:
        await mq.until(lambda: buffered(work) >= 100, within=20)
        await mq.until(lambda: bool(work._consumer.paused()), within=20)
        assert buffered(work) <= 150
        gate.set()
        await mq.until(handler.has(2000), within=30)


def buffered(work: GroupConsumer) -> int:
    return sum(len(lane) for state in work._parts.values() for lane in state.lanes.values())


async def test_the_broker_dies_and_comes_back() -> None:
    """SIGKILL in the middle: nothing is skipped; the end of the block is bounded also while it is down."""
    with mq.kafka(private=True) as broker:
        topic, group, handler = await filled(broker, 2000), broker.name("broker"), Handler()

        async def handle(record: ConsumerRecord) -> None:
            await asyncio.sleep(0.0005)
            await handler(record)

        async with consume(broker, [topic], group, handle, Policy(commit_every=0.05)):
            await mq.until(handler.has(300), within=20)
            async with mq.killed(broker.nodes[0]):
                pass
            await mq.until(handler.has(2000), within=60)
        assert set(handler.handled) == set(range(2000))
        assert await committed(broker, group) == {0: 2000}
        async with asyncio.timeout(40):
            async with consume(broker, [topic], broker.name("again"), handle, Policy(commit_every=60)) as work:
                await mq.until(lambda: work.report.handled, within=20)  # so there is something to commit
                broker.nodes[0].kill()


async def test_a_topic_that_is_not_there_and_a_wrong_option_are_errors(kafka: mq.Kafka) -> None:
    with pytest.raises(TypeError, match="colour"):
        async with consume(kafka, ["x"], kafka.name("g"), Handler(), colour="red"):
            pytest.fail("there is no such option")


async def test_nothing_is_left_behind(kafka: mq.Kafka) -> None:
    topic, tasks = await filled(kafka, 50), asyncio.all_tasks()
    handler = Handler()
    for _ in range(2):
        async with consume(kafka, [topic], kafka.name("left"), handler):
            await mq.until(handler.has(50), within=20)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
