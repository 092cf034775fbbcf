"""Retries: when to stop and how long to wait; and messages that wait in the broker, through its death and their own."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tenacity
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage
from aiokafka import ConsumerRecord
from tenacity import stop_after_attempt, stop_after_delay, stop_all, stop_before_delay, wait_fixed

import mqlib as mq
from mqlib.patterns import retry
from mqlib.patterns.consumer import HandlerFailed
from mqlib.patterns.dead_letter import Letters, check_topology, process_dead_letters, redrive
from mqlib.patterns.delays import Delays
from mqlib.patterns.link import consuming
from mqlib.patterns.retry import (
    Budget,
    FullJitter,
    Permanent,
    RetryPolicy,
    ladder,
    retry_queue,
    retry_topics,
    setup_retries,
)
from mqlib.patterns.scheduler import now_ms

QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
DOWN = ConnectionError("the service is down")
AT_ONCE = RetryPolicy(stop_after_attempt(3), ladder(0))


# When to stop, how long to wait


def test_policies_combine_and_say_which_of_them_stopped() -> None:
    policy = RetryPolicy(stop_after_attempt(3) | stop_after_delay(10), ladder(1, 2) + wait_fixed(0.5))
    assert [policy.verdict(DOWN, attempt, 0) for attempt in (1, 2, 3)] == [1.5, 2.5, "after_attempt"]
    assert policy.verdict(DOWN, 1, age=9.9) == 1.5
    assert policy.verdict(DOWN, 1, age=10) == "after_delay"
    both = RetryPolicy(stop_all(stop_after_attempt(2), stop_after_delay(5)), ladder(1))
    assert [both.verdict(DOWN, 3, age) for age in (4, 6)] == [1, "all"]
    # The wait that is to come counts, too, where the deadline must hold.
    assert RetryPolicy(stop_before_delay(10), ladder(3)).verdict(DOWN, 1, age=8) == "before_delay"


@pytest.mark.parametrize("error", [Permanent("no such customer"), ValueError("not JSON"), TypeError("a bug")])
def test_what_cannot_pass_is_permanent_at_once(error: Exception) -> None:
    assert RetryPolicy().verdict(error, 1, 0) == "permanent"
    assert isinstance(RetryPolicy().verdict(DOWN, 1, 0), float)
    only = RetryPolicy(retry=tenacity.retry_if_exception_type(ValueError), wait=ladder(1))
    assert (only.verdict(ValueError(), 1, 0), only.verdict(DOWN, 1, 0)) == (1, "permanent")


def test_full_jitter_takes_the_whole_step_and_repeats_with_its_seed() -> None:
    def waits(seed: int) -> list[list[float]]:
        policy = RetryPolicy(stop_after_attempt(9999), FullJitter(0.4, cap=3, rng=random.Random(seed)))
        return [[float(policy.verdict(DOWN, attempt, 0)) for _ in range(2000)] for attempt in (1, 2, 3, 4, 5000)]

    drawn = waits(14)
    assert drawn == waits(14) != waits(15)
    for step, values in zip((0.4, 0.8, 1.6, 3, 3), drawn, strict=True):
        assert 0 <= min(values) < 0.01 * step
        assert 0.99 * step < max(values) <= step
        assert max(Counter(int(20 * value / step) for value in values).values()) < 150, "100 in each twentieth"


def test_a_budget_bounds_the_retries_of_all_calls_together() -> None:
    policy = RetryPolicy(stop_after_attempt(4), ladder(0), budget=(budget := Budget(ratio=0.1, reserve=10)))

    def extra(calls: int) -> int:
        made = 0
        for _ in range(calls):
            for attempt in range(1, 5):
                budget.begin(attempt)
                if policy.verdict(DOWN, attempt, 0) in ("budget", "after_attempt"):
                    break
                made += 1
        return made

    assert extra(200) == 10 + 20 - 1, "the first call earns nothing beyond the reserve, but a tenth for nine others"
    assert extra(200) == 20
    for _ in range(1000):
        budget.begin(1)
    assert extra(1) == 3, "after calls that went well there is a reserve again, and no more"
    assert budget.left <= 10
    paid = budget.left
    assert policy.verdict(DOWN, 4, 0) == "after_attempt"
    assert policy.verdict(ValueError(), 1, 0) == "permanent"
    assert budget.left == paid, "who stops anyway pays nothing"


@pytest.mark.parametrize(("ratio", "reserve"), [(-0.1, 10), (1.1, 10), (0.1, 0)])
def test_a_budget_that_makes_no_sense_is_refused(ratio: float, reserve: float) -> None:
    with pytest.raises(ValueError, match="a ratio is from 0 to 1, and a reserve at least 1: not"):
        Budget(ratio, reserve)


async def test_calls_follow_the_same_policy() -> None:
    calls = Counter[str]()

    async def call(name: str, failures: int, error: Exception = DOWN) -> str:
        calls[name] += 1
        if calls[name] <= failures:
            raise error
        return name

    policy = RetryPolicy(stop_after_attempt(3), ladder(0), budget=Budget(ratio=0, reserve=3))
    assert await policy.calls()(call, "twice", 2) == "twice"
    with pytest.raises(ValueError, match="not JSON"):
        await policy.calls()(call, "permanent", 9, ValueError("not JSON"))
    for name in ("last of the budget", "nothing left"):
        with pytest.raises(ConnectionError, match="the service is down"):
            await policy.calls()(call, name, 9)
    assert calls == {"twice": 3, "permanent": 1, "last of the budget": 2, "nothing left": 1}


# Kafka: retry topics


class Handler:
    """Fails as often as `failures` says, by value; notes in which topic it saw what, and what it handled."""

    def __init__(self, failures: dict[bytes | None, int] | None = None, error: Exception = DOWN) -> None:
        self.failures, self.error = failures or {}, error
        self.seen: dict[bytes | None, list[str]] = defaultdict(list)
        self.handled: list[bytes | None] = []
        self.early = 0

    async def __call__(self, record: ConsumerRecord) -> None:
        self.seen[record.value].append(record.topic)
        self.early += now_ms() < int(dict(record.headers).get("retry-due", 0))
        if len(self.seen[record.value]) <= self.failures.get(record.value, 0):
            raise self.error
        self.handled.append(record.value)


async def filled(kafka: mq.Kafka, *values: bytes, partitions: int = 1, keys: int = 1) -> str:
    topic = await mq.topic(kafka, "orders", partitions=partitions)
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, values, keys=[b"k%d" % (number % keys) for number in range(len(values))])
    return topic


async def letters_of(kafka: mq.Kafka, topic: str) -> dict[bytes | None, dict[str, str]]:
    records = await mq.read(kafka, f"{topic}.dlt")
    letters = {each.value: {name: value.decode() for name, value in each.headers} for each in records}
    assert len(letters) == len(records), "one letter each"
    return letters


async def test_what_fails_goes_from_level_to_level_and_holds_nobody_up(kafka: mq.Kafka) -> None:
    topic, group = await filled(kafka, b"poison", b"once", b"1", b"2", b"3"), kafka.name("levels")
    handler = Handler({b"poison": 99, b"once": 1})
    async with retry_topics(kafka, topic, group, handler, levels=(0.2, 0.3)) as work:
        await mq.until(lambda: work.handled == 4 and work.dead_lettered == 1, within=20)
    assert handler.handled == [b"1", b"2", b"3", b"once"], "in the order of the log, but for what waited"
    assert handler.seen[b"poison"] == [topic, f"{topic}.retry.1", f"{topic}.retry.2"]
    assert (handler.early, work.retried, work.unconfirmed) == (0, 3, 0)
    [letter] = (await letters_of(kafka, topic)).values()
    [record, *_] = await mq.read(kafka, topic)
    assert int(letter.pop("dead-letter-first-seen")) > record.timestamp - 1000
    assert letter == {
        "dead-letter-topic": topic, "dead-letter-partition": "0", "dead-letter-offset": "0",
        "dead-letter-timestamp": str(record.timestamp), "dead-letter-group": group, "dead-letter-attempts": "3",
        "dead-letter-error": "ConnectionError: the service is down", "dead-letter-reason": "after_attempt",
    }  # fmt: skip
    assert (await mq.group_lag(kafka, group, topic)).total == 0
    lag = await mq.group_lag(kafka, f"{group}.retry", f"{topic}.retry.1", f"{topic}.retry.2")
    assert lag.total == 0


async def test_a_wait_takes_the_first_level_that_is_long_enough(kafka: mq.Kafka) -> None:
    """And no early start, although the level in which the third wait lies could be over before."""
    topic, handler = await filled(kafka, b"order"), Handler({b"order": 3})
    policy = RetryPolicy(stop_after_attempt(9), ladder(0.05, 0.2, 0.5))
    async with retry_topics(kafka, topic, kafka.name("fit"), handler, policy, levels=(0.1, 0.3)) as work:
        await mq.until(lambda: work.handled == 1, within=20)
    assert [seen.removeprefix(topic) for seen in handler.seen[b"order"]] == ["", ".retry.1", ".retry.2", ".retry.2"]
    assert handler.early == 0


async def test_permanent_errors_are_dead_at_once_and_keep_all_they_had(kafka: mq.Kafka) -> None:
    topic, handler = await mq.topic(kafka, "orders"), Handler({None: 1, b"\xff": 1}, ValueError("x" * 100_000))
    own = [("trace", b"1"), ("trace", b"2"), ("retry-attempts", b"no number")]
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, b"\xff", key=b"customer", headers=own)
        await producer.send_and_wait(topic, None, key=b"tombstone")
    async with retry_topics(kafka, topic, kafka.name("permanent"), handler) as work:
        await mq.until(lambda: work.dead_lettered == 2, within=20)
    first, tombstone = await mq.read(kafka, f"{topic}.dlt")
    assert (first.key, first.value, first.headers[:2]) == (b"customer", b"\xff", tuple(own[:2]))
    assert dict(first.headers)["dead-letter-reason"] == b"permanent"
    assert dict(first.headers)["dead-letter-attempts"] == b"1"
    assert not [name for name, _ in first.headers if name.startswith("retry-")]
    assert (tombstone.key, tombstone.value) == (b"tombstone", None)
    assert work.retried == 0


async def test_a_dead_letter_that_is_sent_back_begins_anew(kafka: mq.Kafka) -> None:
    topic, handler = await filled(kafka, b"order"), Handler({b"order": 4})
    async with retry_topics(kafka, topic, kafka.name("again"), handler, levels=(0.01, 0.01)) as work:
        await mq.until(lambda: work.dead_lettered == 1, within=20)
        [letter] = await mq.read(kafka, f"{topic}.dlt")
        async with mq.producer(kafka) as producer:
            old = [*letter.headers, ("retry-attempts", b"99"), ("retry-due", b"9999999999999")]
            await producer.send_and_wait(topic, letter.value, key=letter.key, headers=old)
        await mq.until(lambda: work.handled == 1, within=20)
    assert len(handler.seen[b"order"]) == 3 + 2


async def test_who_leaves_while_a_record_waits_leaves_it_to_the_next(kafka: mq.Kafka) -> None:
    """It waits for an hour: nobody waits for that at the end, and the next one handles it when its clock says so."""
    topic, group, handler = await filled(kafka, b"order"), kafka.name("leaving"), Handler({b"order": 1})
    async with asyncio.timeout(20), retry_topics(kafka, topic, group, handler, levels=(3600,), drain=60) as work:
        await mq.until(lambda: work.retried == 1, within=10)
        await mq.until(lambda: _waits(kafka, group, topic), within=10)
    assert (work.handled, work.dead_lettered) == (0, 0)
    later = partial(retry_topics, kafka, topic, group, handler, levels=(3600,), **QUICK)
    async with later(clock=lambda: now_ms() + 3_600_000) as work:
        await mq.until(lambda: work.handled == 1, within=20)
    assert handler.seen[b"order"] == [topic, f"{topic}.retry.1"]


async def _waits(kafka: mq.Kafka, group: str, topic: str) -> bool:
    return (await mq.group_lag(kafka, group, topic)).total == 0


async def test_waiting_does_not_cost_a_consumer_its_place(kafka: mq.Kafka) -> None:
    """A wait of three times `max.poll.interval.ms`: a member that was dropped would get its record again."""
    topic, group, handler = await filled(kafka, b"order"), kafka.name("place"), Handler({b"order": 1})
    options: dict[str, Any] = {**QUICK, "max_poll_interval_ms": 600}
    async with retry_topics(kafka, topic, group, handler, levels=(2,), **options) as work:
        await mq.until(lambda: work.handled == 1, within=20)
    assert handler.seen[b"order"] == [topic, f"{topic}.retry.1"]
    assert (await mq.group_lag(kafka, f"{group}.retry", f"{topic}.retry.1")).total == 0


async def test_what_kafka_refuses_is_said_and_not_committed(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    topic, group, handler = await mq.topic(kafka, "orders"), kafka.name("refused"), Handler({b"": 0})
    large = b"x" * 1_048_450  # with the headers of a retry it is above the limit
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, large)
    handler.failures[large] = 1
    with pytest.raises(HandlerFailed, match="MessageSizeTooLarge"):
        async with retry_topics(kafka, topic, group, handler):
            await asyncio.sleep(20)
    async with retry_topics(kafka, topic, group, handler) as work:
        await mq.until(lambda: work.handled == 1, within=20)
    monkeypatch.setattr(retry, "SPREAD_SECONDS", 0.5)
    with pytest.raises(mq.BrokerError, match="Kafka has no topic 'missing'"):
        async with retry_topics(kafka, "missing", group, handler):
            pass


async def handle_some(kafka: Any, topic: str, group: str, path: str, crash_after: int) -> None:
    import mqlib
    from mqlib.patterns.retry import retry_topics

    journal, handled = mqlib.Journal(path), 0

    async def handle(record: Any) -> None:
        nonlocal handled
        if int(record.value) % 3 == 0 and not record.topic.endswith(".retry.1"):
            raise ConnectionError("not yet")
        journal.received(int(record.value))
        handled += 1
        if handled == crash_after:
            mqlib.crash()

    options: Any = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with retry_topics(kafka, topic, group, handle, levels=(0.3,), **options):
        print("started", flush=True)
        await mqlib.until(lambda: False, within=60)


async def test_a_consumer_that_is_killed_in_the_middle_loses_nothing(kafka: mq.Kafka, tmp_path: Path) -> None:
    """Once while the topic itself is handled, once in the retry topic; a third process does the rest."""
    topic, group = await filled(kafka, *(b"%d" % number for number in range(90))), kafka.name("killed")
    for life, crash_after in enumerate((20, 70, 0)):
        ledger, journal = mq.Ledger(), str(tmp_path / f"{life}")
        async with mq.worker(handle_some, kafka, topic, group, journal, crash_after) as process:
            for number in range(90):
                ledger.sent(number)

            def done() -> bool:
                for each in range(life + 1):  # noqa: B023
                    with suppress(FileNotFoundError):
                        ledger.replay(tmp_path / f"{each}")  # noqa: B023
                return ledger.lost == 0  # noqa: B023

            if crash_after:
                await process.ended(within=30)
                assert process.crashed
                assert not done()
            else:
                await mq.until(done, within=30)
    assert ledger.unexpected == 0


async def test_ten_thousand_records_through_a_sigkill_of_kafka() -> None:
    """A tenth fails once, every hundredth always. Some wait in a retry topic, and some are on the way, when it dies."""
    ledger, tries = mq.Ledger(), Counter[int]()
    with mq.kafka(private=True) as kafka:
        topic = await filled(kafka, *(b"%d" % number for number in range(10_000)), partitions=3, keys=50)

        async def handle(record: ConsumerRecord) -> None:
            number = int(record.value)
            tries[number] += 1
            if number % 100 == 0 or (number % 10 == 0 and record.topic == topic):
                raise DOWN
            ledger.received(number)

        async def set_aside() -> set[int]:
            return {int(each.value) for each in await mq.read(kafka, f"{topic}.dlt", within=20)}

        async def all_done() -> bool:  # what was under way as it died is set aside twice: the count alone says nothing
            return ledger.lost == 0 and work.dead_lettered >= 100 and len(await set_aside()) >= 100

        for number in range(10_000):
            if number % 100:
                ledger.sent(number)
        async with retry_topics(kafka, topic, kafka.name("killed"), handle, levels=(0.5, 0.5), **QUICK) as work:
            await mq.until(lambda: work.handled > 3000 and work.retried > 300, within=30)
            await asyncio.to_thread(kafka.nodes[0].restart, graceful=False)
            await mq.until(all_done, within=60, every=0.2)
        letters = await set_aside()
    assert letters == set(range(0, 10_000, 100)), "what was set aside is what always fails, all of it"
    assert ledger.unexpected == 0
    assert min(tries[number] for number in letters) >= 3


# RabbitMQ: waiting queues


class Worker:
    """Fails as often as `failures` says, by body; notes the attempts that its message's header says were before."""

    def __init__(self, failures: dict[bytes, int] | None = None, error: Exception = DOWN) -> None:
        self.failures, self.error = failures or {}, error
        self.seen: dict[bytes, list[Any]] = defaultdict(list)
        self.handled: list[bytes] = []

    async def __call__(self, message: AbstractIncomingMessage) -> None:
        self.seen[message.body].append(message.headers.get("retry-attempts"))
        if len(self.seen[message.body]) <= self.failures.get(message.body, 0):
            raise self.error
        self.handled.append(message.body)


async def queue_of(rabbit: mq.RabbitMQ, *bodies: bytes, deliveries: int = 5, **properties: Any) -> tuple[str, Delays]:
    queue, delays = rabbit.name("orders"), Delays(rabbit.name("delays"), unit=10, levels=6)
    assert await setup_retries(rabbit, queue, delays, deliveries) == f"{queue}.dl"
    await publish(rabbit, queue, *bodies, **properties)
    return queue, delays


async def publish(rabbit: mq.RabbitMQ, queue: str, *bodies: bytes, **properties: Any) -> None:
    async with mq.channel(rabbit) as channel:
        for body in bodies:
            await channel.default_exchange.publish(Message(body, delivery_mode=2, **properties), queue)


async def dead(rabbit: mq.RabbitMQ, queue: str, count: int = 1) -> dict[bytes, dict[str, Any]]:
    """The dead letters and their headers, once there are `count`: one letter each."""
    async with mq.channel(rabbit) as channel:
        letters = await channel.get_queue(f"{queue}.dl")
        found = await mq.take_messages(letters, count, within=15) + await mq.take_messages(letters, 100, within=0)
    assert len(found) == len({each.body for each in found}) == count
    return {each.body: dict(each.headers) for each in found}


async def test_what_fails_comes_back_and_ends_among_the_dead_letters(rabbit: mq.RabbitMQ) -> None:
    queue, delays = await queue_of(rabbit, b"poison", b"once", b"1", b"2", headers={"trace": "t"}, expiration=60)
    worker = Worker({b"poison": 99, b"once": 1})
    policy = RetryPolicy(stop_after_attempt(3), ladder(0.1, 0.2))
    async with retry_queue(rabbit, queue, worker, delays, policy, prefetch=1) as work:
        await mq.until(lambda: work.handled == 3 and work.dead_lettered == 1, within=20)
    assert worker.handled == [b"1", b"2", b"once"]
    assert worker.seen == {b"poison": [None, 1, 2], b"once": [None, 1], b"1": [None], b"2": [None]}
    assert (work.retried, work.unconfirmed) == (3, 0)
    letter = (await dead(rabbit, queue))[b"poison"]
    about = ("reason", "attempts", "error", "queue")
    assert [letter[f"dead-letter-{name}"] for name in about] == [
        "after_attempt", 3, "ConnectionError: the service is down", queue,
    ]  # fmt: skip
    assert letter["trace"] == "t"
    assert 0 <= now_ms() - letter["dead-letter-first-seen"] < 60_000
    assert not [name for name in letter if name.startswith("retry-")]
    assert await check_topology(rabbit, queue) == [], "no cycle that loses"


async def test_a_deadline_counts_from_the_first_time_it_was_seen(rabbit: mq.RabbitMQ) -> None:
    """The clock is ours: a minute for each attempt. And an error that cannot pass does not wait for it."""
    queue, delays = await queue_of(rabbit, b"late", b"not JSON")
    policy = RetryPolicy(stop_after_attempt(50) | stop_after_delay(240), ladder(0.01))
    tries = Counter[bytes]()

    async def handle(message: AbstractIncomingMessage) -> None:
        tries[message.body] += 1
        raise DOWN if message.body == b"late" else ValueError("not JSON")

    def clock() -> int:
        return 60_000 * tries[b"late"]

    async with retry_queue(rabbit, queue, handle, delays, policy, prefetch=1, clock=clock) as work:
        await mq.until(lambda: work.dead_lettered == 2, within=20)
    letters = await dead(rabbit, queue, 2)
    assert letters[b"late"]["dead-letter-reason"] == "after_delay"
    assert letters[b"late"]["dead-letter-first-seen"] == 0
    assert letters[b"late"]["dead-letter-attempts"] == tries[b"late"] == 4
    assert letters[b"not JSON"]["dead-letter-reason"] == "permanent"
    assert letters[b"not JSON"]["dead-letter-attempts"] == 1


async def test_strange_headers_are_no_attempts(rabbit: mq.RabbitMQ) -> None:
    strange: Any = {"retry-attempts": "many", "retry-first-seen": "yesterday", "x-delivery-count": "x"}
    queue, delays = await queue_of(rabbit, b"order", headers=strange)
    async with retry_queue(rabbit, queue, Worker({b"order": 99}), delays, AT_ONCE) as work:
        await mq.until(lambda: work.dead_lettered == 1, within=20)
    assert (await dead(rabbit, queue))[b"order"]["dead-letter-attempts"] == 3


async def test_a_letter_that_is_redriven_begins_anew(rabbit: mq.RabbitMQ, tmp_path: Path) -> None:
    queue, delays = await queue_of(rabbit, b"order")
    worker, letters = Worker({b"order": 4}), Letters(str(tmp_path / "letters"))
    async with (
        retry_queue(rabbit, queue, worker, delays, AT_ONCE) as work,
        process_dead_letters(rabbit, f"{queue}.dl", letters),
    ):
        await mq.until(lambda: letters.find("new"), within=20)
        letters.move(letters.find("new"), "approved")
        assert (await redrive(rabbit, letters, queue))["redriven"] == 1
        await mq.until(lambda: work.handled == 1, within=20)
    assert worker.seen[b"order"] == [None, 1, 2, None, 1]


async def die(rabbit: mq.RabbitMQ, queue: str, delays: Any) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.retry import retry_queue

    async def handle(message: Any) -> None:
        print(message.body.decode(), message.headers.get("retry-attempts"), flush=True)
        if message.body == b"deadly" and message.headers.get("retry-attempts"):
            mqlib.crash()
        raise ConnectionError("the service is down")

    async with retry_queue(rabbit, queue, handle, delays, prefetch=1):
        await asyncio.Event().wait()


async def test_a_message_that_kills_its_process_is_set_aside_by_the_broker(rabbit: mq.RabbitMQ) -> None:
    queue, delays = await queue_of(rabbit, b"deadly", deliveries=2)
    lines: list[str] = []
    for _ in range(2):
        async with mq.worker(die, rabbit, queue, delays) as process:
            await process.ended(within=30)
            assert process.crashed
            lines += process.lines
    assert lines == ["deadly None", "deadly 1", "deadly 1"], "a retry, and two deliveries of it"
    assert (await dead(rabbit, queue))[b"deadly"]["x-first-death-reason"] in ("expired", "delivery_limit")


async def test_a_copy_that_is_not_confirmed_is_sent_again(rabbit: mq.RabbitMQ) -> None:
    """The connection is cut while the handler fails: the message comes again, which counts as an attempt."""
    queue, delays = await queue_of(rabbit, b"order")
    tries = list[Any]()
    async with mq.proxy(rabbit) as proxy:

        async def handle(message: AbstractIncomingMessage) -> None:
            tries.append((message.headers.get("retry-attempts"), message.redelivered))
            if len(tries) == 1:
                proxy.cut()
            if len(tries) < 3:
                raise DOWN

        async with retry_queue(proxy, queue, handle, delays, RetryPolicy(stop_after_attempt(9), ladder(0.05))) as work:
            await mq.until(lambda: work.handled == 1, within=30)
            assert work.consumer.link.reconnects >= 1
    assert tries[:2] == [(None, False), (None, True)]
    assert work.dead_lettered == 0


async def test_ten_thousand_messages_through_a_sigkill_of_rabbitmq() -> None:
    """One in fifty fails once, one in 500 always. Some wait in a level when it dies; nothing is lost."""
    ledger, poison = mq.Ledger(), {b"%d" % number for number in range(0, 10_000, 500)}
    waiting = set[bytes]()
    with mq.rabbitmq(private=True) as rabbit:
        queue, delays = rabbit.name("killed"), Delays(rabbit.name("delays"), unit=50, levels=6)
        await setup_retries(rabbit, queue, delays, deliveries=10)
        await asyncio.sleep(2)  # RabbitMQ 3.10 writes a new quorum queue down only then: see CONTRIBUTING
        async with mq.channel(rabbit) as channel:
            bodies = [b"%d" % number for number in range(10_000)]
            await mq.pump_messages(channel.default_exchange, queue, [Message(body, delivery_mode=2) for body in bodies])
        for number in range(10_000):
            if number % 500:
                ledger.sent(number)

        async def handle(message: AbstractIncomingMessage) -> None:
            number = int(message.body)
            if message.body in poison or (number % 50 == 1 and "retry-attempts" not in message.headers):
                waiting.add(message.body)
                raise DOWN
            waiting.discard(message.body)
            ledger.received(number)

        policy = RetryPolicy(stop_after_attempt(3), ladder(1))
        async with retry_queue(rabbit, queue, handle, delays, policy, prefetch=100) as work:
            await mq.until(lambda: work.handled > 3000 and work.retried > 50, within=30)
            assert waiting - poison, "some wait in the level"
            await asyncio.to_thread(rabbit.nodes[0].restart, graceful=False)
            letters = dict[bytes, Any]()
            async with consuming(rabbit, f"{queue}.dl", set_aside(letters), prefetch=100):
                await mq.until(lambda: ledger.lost == 0 and letters.keys() >= poison, within=60)
    assert letters.keys() == poison, "what was set aside is what always fails"
    assert ledger.unexpected == 0
    assert all(letter["dead-letter-attempts"] >= 3 for letter in letters.values())


def set_aside(letters: dict[bytes, Any]) -> Callable[[AbstractIncomingMessage], Awaitable[None]]:
    async def keep(letter: AbstractIncomingMessage) -> None:
        letters[letter.body] = letter.headers

    return keep
