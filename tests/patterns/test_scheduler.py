"""What is scheduled is sent when it is due: never early, never behind others, once, whatever dies in between."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib.patterns.scheduler import (
    TIMER_TOPIC,
    Scheduler,
    cancel_message,
    now_ms,
    schedule_message,
    start_scheduler,
)
from mqlib.patterns.timers import Table, plan

STAMPED: dict[str, Any] = {"message_timestamp_type": "LogAppendTime"}
QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
"""A scheduler that dies is missed within a second; our own brokers allow that."""


class Clock:
    """Time that tests set, in milliseconds."""

    def __init__(self, now: int = 1000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


async def topics(kafka: mq.Kafka, partitions: int = 1) -> tuple[str, str]:
    return await mq.topic(kafka, "timers", partitions, **TIMER_TOPIC), await mq.topic(kafka, "target", **STAMPED)


async def schedule_all(kafka: mq.Kafka, timers: str, target: str, dues: list[int], ledger: mq.Ledger) -> None:
    """Job and value are the number."""
    async with mq.producer(kafka) as producer:

        async def one(number: int) -> None:
            ledger.sent(number)
            value = b"%d" % number
            await schedule_message(producer, timers, target, value, dues[number], job=str(number), key=value)
            ledger.acknowledged(number)

        for first in range(0, len(dues), 1000):
            await asyncio.gather(*map(one, range(first, min(first + 1000, len(dues)))))


async def fired(kafka: mq.Kafka, target: str) -> list[ConsumerRecord]:
    return await mq.read(kafka, target, isolation_level="read_committed")


def early(records: list[ConsumerRecord]) -> list[ConsumerRecord]:
    """Those that the broker had before they were due."""
    return [record for record in records if record.timestamp < int(dict(record.headers)["schedule-due"])]


async def ready(*schedulers: Scheduler) -> None:
    await mq.until(lambda: all(scheduler.ready for scheduler in schedulers), within=20)


@settings(max_examples=300, deadline=None)
@given(strategies.integers(0, 100), strategies.integers(1, 30), strategies.integers(0, 20), strategies.integers(0, 300),
       strategies.sampled_from(["all", "once", "skip"]))  # fmt: skip
def test_ticks_keep_to_their_grid_and_misfires_to_their_policy(
    due: int, every: int, grace: int, now: int, misfire: str
) -> None:
    """Against a walk along the grid, one tick after the other, until the next one is to come."""
    now = max(now, due)
    sent, missed, tick, ticks = 0, 0, due, 0
    while tick <= now:
        go, following, skipped = plan(tick, every, misfire, grace, now)
        assert following is not None
        assert following > tick
        assert (following - due) % every == 0
        sent, missed, ticks, tick = sent + go, missed + skipped, ticks + 1, following
    grid = range(due, now + 1, every)
    late = [tick for tick in grid if now - tick > grace]
    assert sent + missed == len(grid), "each is sent or counted"
    assert tick == grid[-1] + every
    if misfire == "all":
        assert missed == 0
    if misfire == "skip":
        assert missed == len(late)
    if misfire == "once" and late:
        assert (sent, ticks) == (1, 1)
    one_shot = plan(due, None, misfire, grace, now)
    assert one_shot == (not (late and due in late and misfire == "skip"), None, int(due in late and misfire == "skip"))


def record(offset: int, job: bytes, due: int | None, of: int | None = None) -> ConsumerRecord:
    headers = [] if due is None else [("schedule-due", b"%d" % due), ("schedule-topic", b"t")]
    headers += [] if of is None else [("schedule-of", b"%d" % of)]
    value = None if due is None else b"v"
    return ConsumerRecord("timers", 0, offset, 0, 1, job, value, None, 0, 0, tuple(headers))


@settings(max_examples=300, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.sampled_from([b"a", b"b"]), strategies.booleans(),
                                          strategies.booleans(), strategies.booleans()), max_size=12))  # fmt: skip
def test_what_a_scheduler_writes_late_never_undoes_what_a_user_wrote(
    steps: list[tuple[bytes, bool, bool, bool]],
) -> None:
    """Users schedule and cancel. A scheduler retires each schedule, or writes its next tick, perhaps some records later
    and behind a newer one."""
    log: list[ConsumerRecord] = []
    sent: list[tuple[bytes, int]] = []
    for job, cancels, writes, recurs in steps:
        log.append(record(len(log), job, None if cancels else 7))
        sent += [] if cancels else [(job, log[-1].offset)]
        if sent and writes:
            other, of = sent.pop(0)
            log.append(record(len(log), other, 9 if recurs else None, of))
    table, rewritten = Table(), list[ConsumerRecord]()
    for each in log:
        table.apply(each)
    for key, held in list(table.pending.items()):
        fields = (*held.headers, ("schedule-of", b"%d" % held.version))
        rewritten.append(ConsumerRecord("timers", 0, 99, 0, 1, key, held.value, None, 0, 0, fields))
        table.apply(rewritten[-1])
    assert table.pending == {}
    users = {each.key: each for each in log if "schedule-of" not in dict(each.headers)}
    written = [each for each in log if "schedule-of" in dict(each.headers)]
    retired = {int(dict(each.headers)["schedule-of"]) for each in written if each.value is None}
    waiting = {key for key, last in users.items() if last.value is not None and last.offset not in retired}
    assert set(table.jobs) == waiting
    compacted, anew = {each.key: each for each in [*log, *rewritten]}, Table()
    for each in compacted.values():
        anew.apply(each)
    assert set(anew.jobs) == waiting, "and so says what compaction keeps"


async def test_in_the_order_in_which_they_are_due_with_key_and_headers(kafka: mq.Kafka) -> None:
    """Not before, and nothing is written while they wait: the timer topic has a schedule and a tombstone for each."""
    timers, target = await topics(kafka)
    async with mq.producer(kafka) as producer, start_scheduler(kafka, timers) as scheduler:
        await ready(scheduler)
        start = now_ms() + 3000  # on the slowest machine all of them are there before the first is due
        for delay in (400, 0, 300, 100, 200):
            headers = [("trace", b"t%d" % delay), ("trace", b"again")]
            await schedule_message(
                producer, timers, target, None if delay == 100 else b"%d" % delay, start + delay, key=b"k%d" % delay,
                headers=headers,
            )  # fmt: skip
        await mq.until(lambda: scheduler.waiting == 5, within=20)
        assert await mq.end_offsets(kafka, timers) == [5]
        await mq.until(lambda: scheduler.report.fired == 5, within=20)
    records = await fired(kafka, target)
    assert [each.key for each in records] == [b"k0", b"k100", b"k200", b"k300", b"k400"]
    assert [each.value for each in records] == [b"0", None, b"200", b"300", b"400"]
    assert [each.headers[:2] for each in records[:2]] == [
        (("trace", b"t0"), ("trace", b"again")), (("trace", b"t100"), ("trace", b"again")),
    ]  # fmt: skip
    assert early(records) == []
    assert await mq.end_offsets(kafka, timers) == [10]
    assert scheduler.waiting == 0


async def test_cancelled_and_replaced_while_it_waits(kafka: mq.Kafka) -> None:
    """The clock is the test's: what is not due by it is not sent, and time going on sends it."""
    timers, target = await topics(kafka)
    clock = Clock()
    async with mq.producer(kafka) as producer, start_scheduler(kafka, timers, clock=clock) as scheduler:
        for job in ("stays", "goes", "moves", "returns"):
            await schedule_message(producer, timers, target, job.encode(), 2000, job=job)
        await mq.until(lambda: scheduler.waiting == 4, within=20)
        await cancel_message(producer, timers, "goes")
        await cancel_message(producer, timers, "returns")
        await schedule_message(producer, timers, target, b"moved", 3000, job="moves")
        await schedule_message(producer, timers, target, b"returned", 2000, job="returns")
        await mq.until(lambda: (scheduler.report.cancelled, scheduler.waiting) == (2, 3), within=20)
        clock.now = 1999
        await mq.until(lambda: scheduler.ready)
        assert scheduler.report.fired == 0
        clock.now = 2000
        await mq.until(lambda: scheduler.report.fired == 2)
        assert {each.value for each in await fired(kafka, target)} == {b"stays", b"returned"}
        clock.now = 3000
        await mq.until(lambda: scheduler.report.fired == 3)
    assert [each.value for each in await fired(kafka, target)][-1] == b"moved"


async def test_a_later_schedule_survives_the_tombstone_of_the_earlier(kafka: mq.Kafka) -> None:
    """A user replaces a job in the moment in which it is sent, and the tombstone for the old one comes behind."""
    timers, target = await topics(kafka)
    clock = Clock()
    async with mq.producer(kafka) as producer:
        for due in (1, 5000):
            await schedule_message(producer, timers, target, b"%d" % due, due, job="j")
        await producer.send_and_wait(timers, None, key=b"j", headers=[("schedule-of", b"0")])
        async with start_scheduler(kafka, timers, clock=clock) as scheduler:
            await mq.until(lambda: scheduler.ready and scheduler.waiting == 1, within=20)

            async def healed() -> bool:
                return await mq.end_offsets(kafka, timers) == [4]

            await mq.until(healed, within=20)
        last = (await mq.read(kafka, timers))[-1]
        assert (last.key, last.value) == (b"j", b"5000"), "what compaction would keep"
        clock.now = 5000
        async with start_scheduler(kafka, timers, clock=clock) as scheduler:
            await mq.until(lambda: scheduler.report.fired == 1, within=20)
    assert [each.value for each in await fired(kafka, target)] == [b"5000"]


async def test_nothing_is_sent_before_all_has_been_read(kafka: mq.Kafka) -> None:
    """Two hundred overdue jobs that are cancelled further on in the log, which comes in small pieces."""
    timers, target = await topics(kafka)
    ledger = mq.Ledger()
    await schedule_all(kafka, timers, target, [1] * 201, ledger)
    async with mq.producer(kafka) as producer:
        for number in range(200):
            await cancel_message(producer, timers, str(number))
    async with start_scheduler(kafka, timers, max_partition_fetch_bytes=1) as scheduler:
        await mq.until(lambda: scheduler.ready and scheduler.report.fired, within=20)
    assert [each.value for each in await fired(kafka, target)] == [b"200"]
    assert scheduler.report.cancelled == 200


async def test_a_schedule_whose_transaction_is_aborted_is_none(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka)
    async with mq.producer(kafka, transactional_id=kafka.name("user")) as producer:
        await producer.begin_transaction()
        await schedule_message(producer, timers, target, b"aborted", 1, job="a")
        await producer.abort_transaction()
        async with producer.transaction():
            await schedule_message(producer, timers, target, b"committed", 1, job="b")
        await producer.begin_transaction()
        await cancel_message(producer, timers, "b")
        await producer.abort_transaction()
    async with start_scheduler(kafka, timers) as scheduler:
        await mq.until(lambda: scheduler.ready and scheduler.report.fired, within=20)
    assert [each.value for each in await fired(kafka, target)] == [b"committed"]


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_what_cannot_be_sent_goes_to_the_dead_letters_and_the_others_go_on(
    kafka: mq.Kafka, exactly_once: bool
) -> None:
    """Unreadable schedules, a missing topic, a record that is too large, one without a key for a compacted topic: all
    due at the same moment as good ones that go to the same topics, in the same batches."""
    timers, target = await topics(kafka)
    narrow = await mq.topic(kafka, "narrow", max_message_bytes=500)
    compacted, dead = await mq.topic(kafka, "compacted", cleanup_policy="compact"), await mq.topic(kafka, "dead")
    bad = [
        ("none", []), ("both", [("schedule-due", b"1"), ("schedule-delay", b"1"), ("schedule-topic", b"t")]),
        ("word", [("schedule-due", b"soon"), ("schedule-topic", b"t")]), ("nowhere", [("schedule-due", b"1")]),
        ("every", [("schedule-due", b"1"), ("schedule-topic", b"t"), ("schedule-every", b"0")]),
        ("policy", [("schedule-due", b"1"), ("schedule-topic", b"t"), ("schedule-misfire", b"perhaps")]),
    ]  # fmt: skip
    async with mq.producer(kafka) as producer:
        for job, headers in bad:
            await producer.send_and_wait(timers, b"v", key=job.encode(), headers=headers)
        await schedule_message(producer, timers, "missing", b"v", 1, job="missing")
        for number in range(20):
            await schedule_message(producer, timers, narrow, b"%d" % number, 1, key=b"k")
            await schedule_message(producer, timers, compacted, b"%d" % number, 1, key=b"k%d" % number)
            await schedule_message(producer, timers, target, b"%d" % number, 1)
        await schedule_message(producer, timers, narrow, b"x" * 600, 1, job="large")
        await schedule_message(producer, timers, compacted, b"v", 1, job="keyless")
    options: dict[str, Any] = {"exactly_once": exactly_once, "dead_letters": dead}
    async with start_scheduler(kafka, timers, **options) as scheduler:
        await mq.until(lambda: (scheduler.report.fired, scheduler.report.rejected) == (60, 9), within=30)

        async def buried() -> bool:
            return len(await fired(kafka, dead)) == 9

        await mq.until(buried, within=20)
    for topic in (narrow, compacted, target):
        assert sorted(int(each.value or b"") for each in await fired(kafka, topic)) == list(range(20))
    letters = {each.key.decode(): dict(each.headers)["schedule-error"].decode() for each in await fired(kafka, dead)}
    assert letters.keys() == {*dict(bad), "missing", "large", "keyless"}
    assert (
        letters["none"] == f"ValueError: {timers}-0, offset 0: it needs either a due time or a delay, in milliseconds"
    )
    assert letters["nowhere"].endswith("offset 3: no header schedule-topic")
    assert letters["missing"] == "BrokerError: Kafka has no topic 'missing'"
    assert letters["large"].startswith("MessageSizeTooLarge")
    async with start_scheduler(kafka, timers, **options) as scheduler:
        await ready(scheduler)
        assert (scheduler.waiting, scheduler.report.fired, scheduler.report.rejected) == (0, 0, 0), "all is retired"


async def test_without_a_dead_letter_topic_the_unreadable_is_counted(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka)
    async with mq.producer(kafka) as producer, start_scheduler(kafka, timers) as scheduler:
        await producer.send_and_wait(timers, b"v", key=b"bad")
        await schedule_message(producer, timers, target, b"good", 1)
        await mq.until(lambda: (scheduler.report.fired, scheduler.report.rejected) == (1, 1), within=20)
        assert "it needs either a due time" in scheduler.report.error


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_a_scheduler_that_is_killed_between_message_and_tombstone(kafka: mq.Kafka, exactly_once: bool) -> None:
    """At least once: one comes twice, none is lost. Exactly once: neither. Another one of the group takes over."""
    timers, target = await topics(kafka)
    ledger, soon = mq.Ledger(), now_ms()
    await schedule_all(kafka, timers, target, [soon + number for number in range(10)], ledger)
    async with mq.worker(die_between, kafka, timers, exactly_once) as killed:
        await killed.ended(within=30)
    assert killed.crashed
    async with start_scheduler(kafka, timers, exactly_once=exactly_once, **QUICK) as scheduler:
        await mq.until(lambda: scheduler.ready and scheduler.waiting == 0, within=30)
        await mq.until(lambda: scheduler.report.fired >= 7, within=20)
    for each in await fired(kafka, target):
        ledger.received(int(each.value))
    assert (ledger.lost, ledger.duplicated) == (0, 0 if exactly_once else 1), ledger


async def die_between(kafka: Any, timers: str, exactly_once: bool) -> None:
    """SIGKILL when the message of job 3 is acknowledged, and its tombstone not handed over."""
    import asyncio

    from aiokafka import AIOKafkaProducer

    from mqlib.patterns import firing
    from mqlib.patterns.scheduler import start_scheduler

    send = AIOKafkaProducer.send
    acknowledged: list[Any] = []
    firing.BATCH = 1

    async def deadly(self: Any, topic: str, value: Any = None, **options: Any) -> Any:
        if topic != timers and int(options["key"]) > 3:
            await asyncio.Event().wait()  # nothing behind it
        if topic == timers and options["key"] == b"3":
            await asyncio.wait(acknowledged)
            mq.crash()
        answer = await send(self, topic, value, **options)
        acknowledged.append(answer)
        if topic != timers and not exactly_once:
            await asyncio.wait([answer])
        return answer

    AIOKafkaProducer.send = deadly
    quick: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with start_scheduler(kafka, timers, exactly_once=exactly_once, **quick):
        await asyncio.sleep(60)


async def test_a_restart_sends_what_is_overdue_at_once_and_the_rest_when_due(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka)
    ledger, start = mq.Ledger(), now_ms() + 1500
    await schedule_all(kafka, timers, target, [start - 1000, start - 500, start + 300, start], ledger)
    async with start_scheduler(kafka, timers, clock=Clock(start - 1200)) as scheduler:
        await mq.until(lambda: scheduler.ready and scheduler.waiting == 4, within=20)
    assert scheduler.report.fired == 0
    async with start_scheduler(kafka, timers) as scheduler:
        await mq.until(lambda: scheduler.report.fired == 4, within=20)
    records = await fired(kafka, target)
    assert [int(each.value) for each in records] == [0, 1, 3, 2]
    assert early(records) == []


def has_fired(scheduler: Scheduler, count: int) -> bool:
    return scheduler.report.fired == count


async def test_recurring_jobs_keep_to_their_grid_and_survive_a_restart(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka)
    clock = Clock()
    async with mq.producer(kafka) as producer:
        async with start_scheduler(kafka, timers, clock=clock) as scheduler:
            await schedule_message(producer, timers, target, b"tick", 1000, job="j", every=100)
            for now in (1007, 1190, 1230):  # each late by another bit, and one tick after the other
                clock.now = now
                await mq.until(partial(has_fired, scheduler, (now - 900) // 100), within=20)
        clock.now = 1310
        async with start_scheduler(kafka, timers, clock=clock) as scheduler:
            await mq.until(lambda: (scheduler.report.fired, scheduler.waiting) == (1, 1), within=20)  # for the next
            await cancel_message(producer, timers, "j")
            await mq.until(lambda: scheduler.waiting == 0 and scheduler.report.cancelled == 1, within=20)
            clock.now = 5000
        assert [dict(each.headers)["schedule-due"] for each in await fired(kafka, target)] == [
            b"1000", b"1100", b"1200", b"1300",
        ]  # fmt: skip


async def test_ten_thousand_jobs_each_once_and_none_early(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka, partitions=3)
    ledger, numbers = mq.Ledger(), random.Random(7)
    async with start_scheduler(kafka, timers) as scheduler, mq.producer(kafka) as producer:
        start = now_ms() + 2500
        dues = [start + numbers.randrange(2000) for _ in range(10_000)]
        dues[::100] = [start + 3_600_000] * 100  # so none of them is sent before it is replaced, on the slowest machine
        await schedule_all(kafka, timers, target, dues, ledger)
        for number in range(0, 10_000, 100):
            await schedule_message(producer, timers, target, b"%d" % number, start + 2100, job=str(number))
        await mq.until(lambda: scheduler.report.fired >= 10_000, within=60)
    records = await fired(kafka, target)
    for each in records:
        ledger.received(int(each.value))
    assert ledger.exact, ledger
    assert early(records) == []
    late = {int(each.value) for each in records if int(dict(each.headers)["schedule-due"]) == start + 2100}
    assert late == set(range(0, 10_000, 100)), "replaced ones have their new time"


async def test_two_share_the_partitions_and_one_that_leaves_loses_nothing(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka, partitions=4)
    ledger, start = mq.Ledger(), now_ms() - 4000
    await schedule_all(kafka, timers, target, [start + 10 * number for number in range(400)], ledger)
    clock = Clock(start + 999)
    async with start_scheduler(kafka, timers, clock=clock, **QUICK) as one:
        await mq.until(lambda: (one.report.fired, one.waiting) == (100, 300), within=20)
        async with start_scheduler(kafka, timers, clock=clock, **QUICK) as other:
            await mq.until(lambda: other.waiting and one.waiting + other.waiting == 300, within=20)
            clock.now = start + 1999
            await mq.until(lambda: one.report.fired + other.report.fired == 200, within=20)
        assert min(one.report.fired - 100, other.report.fired) > 0
        clock.now = start + 4000
        await mq.until(lambda: one.report.fired + other.report.fired >= 400, within=20)
    records = await fired(kafka, target)
    for each in records:
        ledger.received(int(each.value))
    assert ledger.exact, ledger


async def test_the_broker_dies_and_comes_back_and_the_connection_is_cut() -> None:
    """SIGKILL in the middle, and cuts: none is lost or early; what is unknown may come twice, in transactions not."""
    with mq.kafka(private=True) as kafka:
        async with mq.proxy(kafka) as proxy:
            runs = [(*await topics(kafka), mq.Ledger(), exactly_once) for exactly_once in (False, True)]
            start = now_ms() + 1500
            for timers, target, ledger, _ in runs:
                await schedule_all(kafka, timers, target, [start + 15 * number for number in range(300)], ledger)
            async with (
                start_scheduler(proxy, runs[0][0], **QUICK) as least,
                start_scheduler(proxy, runs[1][0], exactly_once=True, **QUICK) as exact,
            ):
                await mq.until(lambda: min(least.report.fired, exact.report.fired) > 20, within=30)
                proxy.cut()
                await mq.until(lambda: min(least.report.fired, exact.report.fired) > 40, within=30)
                async with mq.killed(kafka.nodes[0]):
                    pass
                await mq.until(lambda: min(least.report.fired, exact.report.fired) > 100, within=30)
                proxy.cut()
                for _, target, _, _ in runs:

                    async def all_fired(target: str = target) -> bool:
                        return len({each.value for each in await fired(kafka, target)}) == 300

                    await mq.until(all_fired, within=40)
        for _, target, ledger, exactly_once in runs:
            records = await fired(kafka, target)
            for each in records:
                ledger.received(int(each.value))
            assert ledger.lost == 0, ledger
            assert early(records) == []
            if exactly_once:
                assert ledger.duplicated == 0, ledger


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "either a due time or a delay"), ({"due": 1, "delay": 1}, "either a due time or a delay"),
     ({"due": 1.5}, "integer milliseconds"), ({"due": True}, "integer milliseconds"),
     ({"due": 1, "every": 0}, "every 0 ms"), ({"due": 1, "misfire": "never"}, "misfire 'never'"),
     ({"due": 1, "headers": [("schedule-due", b"2")]}, "the scheduler's own"),
     ({"due": 1, "value": None}, "a value, a key, or both"), ({"due": 1, "topic": ""}, "topic ''")],
)  # fmt: skip
async def test_schedules_that_make_no_sense_are_refused(kafka: mq.Kafka, options: dict[str, Any], message: str) -> None:
    async with mq.producer(kafka) as producer:
        with pytest.raises(ValueError, match=message):
            await schedule_message(producer, "timers", **{"topic": "target", "value": b"v", **options})


async def test_a_topic_that_is_not_fit_for_timers_is_refused(kafka: mq.Kafka) -> None:
    deleting = await mq.topic(kafka, "deleting")
    with pytest.raises(mq.BrokerError, match=r"cleanup\.policy=delete, which deletes schedules"):
        async with start_scheduler(kafka, deleting) as scheduler:
            await ready(scheduler)
    with pytest.raises(mq.BrokerError, match="no topic 'nowhere'"):
        async with start_scheduler(kafka, "nowhere") as scheduler:
            await ready(scheduler)


async def test_a_delay_counts_by_the_brokers_clock(kafka: mq.Kafka) -> None:
    """And where the topic keeps the producer's, it is refused, not guessed."""
    timers, target = await topics(kafka)
    plain = await mq.topic(kafka, "timers", cleanup_policy="compact")
    async with mq.producer(kafka) as producer:
        await schedule_message(producer, timers, target, b"v", delay=100, job="j")
        await schedule_message(producer, plain, target, b"v", delay=100, job="j")
        async with start_scheduler(kafka, timers) as scheduler, start_scheduler(kafka, plain) as other:
            await mq.until(lambda: scheduler.report.fired and other.report.rejected, within=20)
    [schedule, _] = await mq.read(kafka, timers)
    [message] = await fired(kafka, target)
    assert int(dict(message.headers)["schedule-due"]) == schedule.timestamp + 100
    assert "LogAppendTime" in other.report.error


async def test_nothing_is_left_behind(kafka: mq.Kafka) -> None:
    timers, target = await topics(kafka)
    tasks = asyncio.all_tasks()
    for exactly_once in (False, True):
        async with (
            mq.producer(kafka) as producer,
            start_scheduler(kafka, timers, exactly_once=exactly_once) as scheduler,
        ):
            await schedule_message(producer, timers, target, b"v", 1)
            await schedule_message(producer, timers, target, b"v", now_ms() + 60_000, job=f"later {exactly_once}")
            await mq.until(lambda: scheduler.report.fired == 1, within=20)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
    assert Counter(each.value for each in await fired(kafka, target)) == {b"v": 2}
