"""Alerts hold before they ring and never take silence for good news; a watch outlives its broker; live is not ready."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from aio_pika import Message
from aiokafka.admin import AIOKafkaAdminClient
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib.lag import GroupLag, PartitionLag
from mqlib.patterns.backlog import stalled
from mqlib.patterns.canary import answer, failures, kafka_canary, rabbit_canary
from mqlib.patterns.consumer import Policy, consume
from mqlib.patterns.link import consuming, link
from mqlib.patterns.monitoring import Alert, Health, State, Watch, health, serve_health, watching
from mqlib.patterns.sending import Unconfirmed, send
from mqlib.queues import Depth

OK, FIRING, UNKNOWN = State.OK, State.FIRING, State.UNKNOWN


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def heard_by(alert: Alert) -> list[tuple[State | None, State]]:
    """What the alert tells a listener: each change."""
    changes = list[tuple[State | None, State]]()
    alert.listeners.append(lambda changed, before: changes.append((before, changed.state)))
    return changes


class Driven:
    """An alert with time that passes from value to value: fires at 10 for 3 s, clears at 5 for 2 s, unknown after 4."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.alert = Alert("lag", 10, 5, fires_after=3, clears_after=2, unknown_after=4, clock=self.clock)
        self.heard = heard_by(self.alert)

    def see(self, *values: float | None) -> list[State]:
        """The states after each value, one a second."""
        states = []
        for value in values:
            states.append(self.alert.observe(value))
            self.clock.now += 1
        return states


def test_it_fires_when_it_held_and_clears_when_it_held() -> None:
    driven = Driven()
    assert driven.see(12, 10, 10) == [OK, OK, OK], "two seconds are not three"
    assert driven.see(10) == [FIRING]
    assert driven.see(6, 6, 9, 6, 6) == [FIRING] * 5, "in between it stays what it is"
    assert driven.see(5, 0, 5) == [FIRING, FIRING, OK]
    assert driven.see(6, 9, 6, 9) == [OK] * 4
    assert driven.heard == [(None, OK), (OK, FIRING), (FIRING, OK)]


def test_a_moment_of_relief_or_of_relapse_begins_the_time_anew() -> None:
    driven = Driven()
    assert driven.see(20, 20, 20, 9, 20, 20, 20) == [OK] * 7
    assert driven.see(20) == [FIRING]
    assert driven.see(0, 0, 6, 0, 0) == [FIRING] * 5
    assert driven.see(0) == [OK]


def test_unknown_neither_fires_nor_clears_and_is_a_state_after_a_time() -> None:
    driven = Driven()
    assert driven.see(20, None, None, 20) == [OK, OK, OK, FIRING], "a short gap is bridged"
    assert driven.see(None, None, None) == [FIRING] * 3
    assert driven.see(None, float("nan")) == [UNKNOWN, UNKNOWN]
    assert driven.see(0) == [FIRING], "silence did not clear it, and one value is not two seconds"
    assert driven.see(0, 0) == [FIRING, OK]
    assert driven.heard == [(None, OK), (OK, FIRING), (FIRING, UNKNOWN), (UNKNOWN, FIRING), (FIRING, OK)]
    assert driven.alert.value == 0


def test_what_had_to_hold_begins_anew_after_it_was_unknown() -> None:
    driven = Driven()
    assert driven.see(20, 20, 20, None, None, None, None) == [OK] * 6 + [UNKNOWN]
    assert driven.see(20, 20, 20, 20) == [OK, OK, OK, FIRING]


def test_what_was_never_known_is_told_too_and_is_never_called_well() -> None:
    driven = Driven()
    assert driven.alert.state is UNKNOWN
    assert driven.see(None, None, None, None) == [UNKNOWN] * 4
    assert driven.heard == [], "it has just begun"
    driven.see(None, None, 1)
    assert driven.heard == [(None, UNKNOWN), (UNKNOWN, OK)]


def test_an_alert_that_nobody_tells_anything_becomes_unknown() -> None:
    driven = Driven()
    driven.see(1)
    driven.clock.now = 4.1
    assert driven.alert.state is UNKNOWN
    assert str(driven.alert) == "lag: unknown (last value 1)"


def test_a_condition_is_a_value_too() -> None:
    alert = Alert("no consumers", fires_at=1, clears_at=0, fires_after=0, clears_after=0, clock=Clock())
    assert [alert.observe(value) for value in (False, True, True, False)] == [OK, FIRING, FIRING, OK]


def test_a_listener_that_raises_keeps_nobody_else_from_hearing() -> None:
    alert = Alert("lag", 10, 5, clock=Clock())

    def broken(*_: Any) -> None:
        raise ConnectionError("no pager")

    alert.listeners.append(broken)
    heard = heard_by(alert)
    assert alert.observe(1) is OK
    assert heard == [(None, OK)]
    assert str(alert.error) == "no pager"


@settings(max_examples=300, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(0, 3), strategies.sampled_from([0, 5, 7, 10, 99, None])),
                        max_size=40))  # fmt: skip
def test_it_is_what_its_description_says(steps: list[tuple[int, int | None]]) -> None:
    """Against the sentences, read anew over the whole past at each step."""
    clock, past, firing, changed = Clock(), list[tuple[float, int]](), False, 0
    alert = Alert("lag", 10, 5, fires_after=3, clears_after=2, unknown_after=4, clock=clock)
    for passed, value in steps:
        clock.now += passed
        alert.observe(value)
        if value is not None:
            if past and clock.now - past[-1][0] >= 4:
                changed = len(past)  # what held before the silence does not count
            past.append((clock.now, value))
            asks = [each <= 5 if firing else each >= 10 for _, each in past[changed:]]
            run = next((n for n, yes in enumerate(reversed(asks)) if not yes), len(asks))
            if run and clock.now - past[-run][0] >= (2 if firing else 3):
                firing, changed = not firing, len(past)
        known = past and clock.now - past[-1][0] < 4
        assert alert.state is ((FIRING if firing else OK) if known else UNKNOWN)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clears_at": 10}, r"'lag': clears_at \(10\) is below fires_at \(10\)"), ({"fires_after": -1}, "seconds from 0"),
     ({"unknown_after": 0}, "unknown_after above 0"), ({"fires_at": float("nan")}, "below")],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alert("lag", **{"fires_at": 10, "clears_at": 5, **options})


class Scripted:
    """A monitor whose samples a test lists; an exception is no answer."""

    def __init__(self, *script: Any) -> None:
        self.samples, self._script = list[Any](), iter(script)

    async def sample(self) -> Any:
        found = next(self._script)
        if isinstance(found, Exception):
            raise found
        self.samples.append(found)


async def test_a_watch_goes_on_without_an_answer_and_keeps_the_last_samples() -> None:
    clock, monitor = Clock(), Scripted(1, 20, mq.BrokerError("gone"), RuntimeError("a fault"), 3, "no number")
    alert = Alert("lag", 10, 5, fires_after=0, clears_after=0, unknown_after=35, clock=clock)
    watch, states = Watch(monitor, {alert: lambda samples: samples[-1] / 1}, 1.0, 2, clock), []
    for _ in range(6):
        await watch.step()
        states.append((alert.state, type(watch.error).__name__))
        clock.now += 20
    assert states == [
        (OK, "NoneType"), (FIRING, "NoneType"), (FIRING, "BrokerError"), (UNKNOWN, "RuntimeError"), (OK, "NoneType"),
        (OK, "TypeError"),
    ]  # fmt: skip
    assert (watch.missed, monitor.samples) == (2, [3, "no number"])


async def test_a_watch_samples_during_its_block_only() -> None:
    monitor = Scripted(*range(1000))
    async with watching(monitor, every=0.001):
        await mq.until(lambda: len(monitor.samples) > 3)
    count = len(monitor.samples)
    await asyncio.sleep(0.02)
    assert len(monitor.samples) == count


async def test_a_watch_that_makes_no_sense_is_refused() -> None:
    hasty = Alert("lag", 10, 5, unknown_after=5)
    with pytest.raises(ValueError, match=r"longer than every \(5 s\); it is not for: lag"):
        await watching(Scripted(), {hasty: len}).__aenter__()
    with pytest.raises(ValueError, match="above 0"):
        await watching(Scripted(), every=0).__aenter__()


# On real brokers


def lag_of(samples: Any) -> float | None:
    return samples[-1].total  # type: ignore[no-any-return]


def quick(name: str, fires_at: float, clears_at: float, unknown_after: float = 30.0) -> Alert:
    return Alert(name, fires_at, clears_at, fires_after=0.1, clears_after=0.1, unknown_after=unknown_after)


async def test_a_consumer_that_stalls_fires_and_clears_after_it_has_caught_up(kafka: mq.Kafka) -> None:
    topic, group, works = await mq.topic(kafka, "watched", partitions=2), kafka.name("watched"), asyncio.Event()
    late, stuck = quick("late", 50, 0), quick("stuck", 0.3, 0)
    heard, heard_stuck = heard_by(late), heard_by(stuck)
    ledger = mq.Ledger()

    async def handle(record: Any) -> None:
        await works.wait()
        ledger.received(int(record.value))

    works.set()
    async with (
        watching(mq.LagMonitor(kafka, group, topic), {late: lag_of, stuck: stalled}, every=0.05) as watch,
        consume(kafka, [topic], group, handle, Policy(commit_every=0.05)),
        mq.producer(kafka) as producer,
    ):
        for number in range(201):
            ledger.sent(number)
            ledger.acknowledged(number)
        await mq.pump(producer, topic, [b"%d" % n for n in range(100)], partition=0)
        await mq.pump(producer, topic, [b"200"], partition=1)
        await mq.until(lambda: late.state is OK and stuck.state is OK)
        assert health(watch) == Health(True, True, ())
        works.clear()
        await mq.pump(producer, topic, [b"%d" % n for n in range(100, 200)], partition=0)
        await mq.until(lambda: late.state is FIRING and stuck.state is FIRING)
        found = health(watch, stalled_after=0.2)
        assert (found.live, found.ready, len(found.reasons)) == (False, False, 3)
        assert health(watch).live, "60 s are the limit"
        works.set()
        await mq.until(lambda: late.state is OK and stuck.state is OK, within=10)
        assert health(watch).ready
    assert heard == heard_stuck == [(None, OK), (OK, FIRING), (FIRING, OK)]
    assert (ledger.lost, watch.missed) == (0, 0)


async def test_a_group_that_committed_nothing_is_unknown_and_not_well(kafka: mq.Kafka) -> None:
    topic, group = await mq.topic(kafka, "watched"), kafka.name("nobody")
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, [b"event"] * 10)
    late, known = quick("late", 50, 0, unknown_after=0.2), quick("late", 5, 0, unknown_after=0.2)
    heard = heard_by(late)
    async with (
        watching(mq.LagMonitor(kafka, group, topic), {late: lag_of}, every=0.05) as watch,
        watching(mq.LagMonitor(kafka, group, topic, reset="earliest"), {known: lag_of}, every=0.05),
    ):
        await mq.until(lambda: heard)
        await mq.until(lambda: known.state is FIRING)
        found = health(watch)
    assert heard == [(None, UNKNOWN)]
    assert (found.live, found.ready) == (True, False)
    assert found.reasons[0].startswith("progress is unknown: lag 0 in 0 partitions; unknown for ")


async def test_a_topic_or_a_queue_that_is_deleted_becomes_unknown(kafka: mq.Kafka, rabbit: mq.RabbitMQ) -> None:
    topic, queue = await mq.topic(kafka, "doomed"), rabbit.name("doomed")
    await mq.declare(rabbit, queue, durable=True)
    lag, depth = quick("lag", 50, 0, unknown_after=0.3), quick("depth", 50, 0, unknown_after=0.3)
    monitor = mq.LagMonitor(kafka, kafka.name("group"), topic, reset="earliest")
    async with (
        watching(monitor, {lag: lag_of}, every=0.05) as of_topic,
        watching(mq.DepthMonitor(rabbit, queue), {depth: lambda found: found[-1][1].ready}, every=0.05) as of_queue,
    ):
        await mq.until(lambda: lag.state is OK and depth.state is OK, within=15)  # the management API may be late
        admin = AIOKafkaAdminClient(**kafka.client)
        await admin.start()
        await admin.delete_topics([topic])
        await admin.close()
        async with mq.channel(rabbit) as channel:
            await channel.queue_delete(queue)
        await mq.until(lambda: lag.state is UNKNOWN and depth.state is UNKNOWN, within=15)
        found = health(of_topic, of_queue)
    assert (found.live, found.ready) == (True, False)
    assert any("404" in reason for reason in found.reasons), "of a queue the management API says why"


async def test_a_kafka_that_is_killed_makes_it_unknown_and_then_it_goes_on() -> None:
    """Of the lag and of a canary alike: what is not confirmed says nothing of the path."""
    with mq.kafka(private=True) as kafka:
        topic, group = await mq.topic(kafka, "watched"), kafka.name("watched")
        late, silent = quick("late", 5, 0, unknown_after=0.5), quick("silent", 1, 0, unknown_after=1)
        monitor = mq.LagMonitor(kafka, group, topic, reset="earliest")
        async with (
            watching(monitor, {late: lag_of}, every=0.05) as watch,
            kafka_canary(kafka, topic, within=0.5) as canary,
            watching(canary, {silent: failures}, every=0.05) as probing,
        ):
            await mq.until(lambda: late.state is FIRING and silent.state is OK, within=15)
            heard, heard_silent = heard_by(late), heard_by(silent)
            async with mq.killed(kafka.nodes[0]):
                await mq.until(lambda: heard and heard_silent, within=15)
                found = health(watch, probing, stalled_after=1e-9)
                assert (found.live, found.ready) == (True, False), "a restart of the consumer brings no broker back"
            await mq.until(lambda: late.state is FIRING and silent.state is OK, within=30)
            await mq.until(lambda: watch.error is probing.error is None)
    assert set(heard) == {(FIRING, UNKNOWN), (UNKNOWN, FIRING)}, "never all right; on a slow machine more than once"
    assert (heard_silent[0], heard_silent[-1][1]) == ((OK, UNKNOWN), OK)
    assert probing.missed > 0, "what was not confirmed is no sample of the path"
    assert canary.fates["lost"] == 0, "nobody can know that"
    assert canary.fates["on time"] > 0


async def test_a_rabbitmq_that_is_killed_makes_it_unknown_and_then_it_goes_on() -> None:
    """As above; no task is lost, and no probe passes for one."""
    ledger = mq.Ledger()
    with mq.rabbitmq(private=True) as rabbit:
        queue = rabbit.name("watched")
        await mq.declare(rabbit, queue, durable=True)
        full, silent = quick("full", 50, 0, unknown_after=0.5), quick("silent", 1, 0, unknown_after=1)

        async def handle(message: Any) -> None:
            if not await answer(worker.link, message):
                ledger.received(int(message.body))

        async with (
            consuming(rabbit, queue, handle, prefetch=10) as worker,
            watching(mq.DepthMonitor(rabbit, queue, "amqp"), {full: lambda found: found[-1][1].ready}, 0.05) as watch,
            rabbit_canary(rabbit, queue, within=0.5) as canary,
            watching(canary, {silent: failures}, every=0.05) as probing,
            link(rabbit) as connection,
        ):
            await mq.until(lambda: full.state is silent.state is OK)
            heard, heard_silent = heard_by(full), heard_by(silent)

            async def send_all() -> None:
                for number in range(300):
                    ledger.sent(number)
                    message = Message(b"%d" % number, delivery_mode=2)
                    while True:
                        try:
                            await send(connection, message, queue)
                            break
                        except Unconfirmed:
                            pass  # again: perhaps twice
                    ledger.acknowledged(number)

            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(send_all())
                await mq.until(lambda: worker.delivered > 50)
                async with mq.killed(rabbit.nodes[0]):
                    await mq.until(lambda: heard and heard_silent, within=15)
                    found = health(watch, probing)
                    assert (found.live, found.ready) == (True, False)
            assert sending.done()
            await mq.until(lambda: full.state is silent.state is OK, within=30)
            await mq.until(lambda: ledger.lost == 0)
    assert heard[0] == heard_silent[0] == (OK, UNKNOWN), "it may fire in between: the worker is back after the canary"
    assert heard[-1][1] is heard_silent[-1][1] is OK
    assert worker.errors == 0
    assert probing.missed > 0
    assert canary.fates["lost"] == 0


# Health


def of(*samples: Any, clock: Clock | None = None) -> Watch:
    watch = Watch(Scripted(), {}, 1.0, 100, clock or Clock())
    watch.monitor.samples += samples
    return watch


def group_lag(second: float, committed: int | None, end: int) -> GroupLag:
    lag = None if committed is None else end - committed
    return GroupLag(second, (PartitionLag("orders", 0, committed, 0, end, lag, None),))


def test_live_and_ready_are_two_questions() -> None:
    assert health(of()) == Health(True, False, ("the last sample is unknown: there is none yet",))
    assert health(of(group_lag(0, 5, 5), group_lag(99, 5, 5))) == Health(True, True, ())
    stuck = of(group_lag(0, 5, 9), group_lag(60, 5, 9))
    assert health(stuck) == Health(False, False, ("no sign of progress for 60 s",))
    assert health(stuck, stalled_after=61).ready
    stuck.error = mq.BrokerError("gone")
    assert health(stuck) == Health(True, False, ("the last sample is unknown: gone",))
    assert health(of(group_lag(0, 5, 5)), stuck).ready is False, "one of two is enough"


def test_a_depth_that_does_not_fall_kills_nobody_unless_nobody_consumes() -> None:
    """Arrivals may hide the progress of consumers that are there."""
    busy, alone = [((0.0, Depth(9, 0, n)), (99.0, Depth(9, 0, n))) for n in (1, 0)]
    assert health(of(*busy)) == Health(True, False, ("no sign of progress for 99 s",))
    assert health(of(*alone)).live is False


def test_an_alert_that_fires_or_is_unknown_is_not_ready() -> None:
    clock, watch = Clock(), of(group_lag(0, 5, 5))
    alert = Alert("late", 10, 5, fires_after=0, clock=clock)
    watch.alerts = {alert: lag_of}
    assert health(watch) == Health(True, False, ("late: unknown",))
    alert.observe(1)
    assert health(watch).ready
    alert.observe(10)
    assert health(watch) == Health(True, False, ("late: firing (last value 10)",))


@pytest.fixture
def served() -> Iterator[tuple[str, list[Health]]]:
    found = [Health(True, True, ())]
    with serve_health(lambda: found[-1]) as url:
        yield url, found


def test_over_http(served: tuple[str, list[Health]]) -> None:
    url, found = served

    def ask(*paths: str) -> list[tuple[int, str]]:
        answers = [httpx.get(url + path) for path in paths]
        return [(answer.status_code, answer.text) for answer in answers]

    assert ask("/live", "/ready?verbose") == [(200, "ok")] * 2
    found.append(Health(True, False, ("late: firing", "no answer")))
    assert ask("/live", "/ready") == [(200, "late: firing\nno answer"), (503, "late: firing\nno answer")]
    assert ask("/")[0][0] == 404
    port = int(url.rpartition(":")[2])
    with (
        pytest.raises(OSError, match=f"127.0.0.1, port {port} .0 takes a free one"),
        serve_health(lambda: found[-1], port),
    ):
        pass


async def test_an_event_loop_that_is_blocked_is_not_live() -> None:
    """Asked from the thread that serves, while a handler sleeps without awaiting."""
    answers = list[tuple[int, str]]()
    async with watching(Scripted(*[group_lag(0, 5, 5)] * 1000), every=0.01) as watch:
        await mq.until(lambda: watch.monitor.samples)
        with serve_health(lambda: health(watch, stalled_after=0.2)) as url:
            asked = threading.Event()

            def ask() -> None:
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline and (not answers or answers[-1][0] == 200):
                    answer = httpx.get(url + "/live")
                    answers.append((answer.status_code, answer.text))
                asked.set()

            threading.Thread(target=ask).start()
            blocked = asked.wait(10)
            assert blocked
            await mq.until(lambda: health(watch, stalled_after=0.2).live)
    assert answers[-1][0] == 503
    assert "is the event loop blocked?" in answers[-1][1]
