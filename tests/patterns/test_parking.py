"""Retry without overtaking: the order of a key holds whatever fails, crashes or moves; other keys flow on."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError

import mqlib as mq
from mqlib.patterns.consumer import HandlerFailed, Policy, consume
from mqlib.patterns.parking import PARKING_TOPIC, ParkingConsumer, consume_parking

QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}


class Bench:
    """A topic with its parking topic and dead letters, and a handler that notes what it did."""

    def __init__(self, kafka: mq.Kafka, topic: str, lot: str, dead: str) -> None:
        self.kafka, self.topic, self.lot, self.dead, self.group = kafka, topic, lot, dead, kafka.name("parking")
        self.done: list[str] = []
        self.failing: dict[str, int] = {}
        """How often which value still fails."""
        self.gates: dict[str, asyncio.Event] = {}
        """Which value then waits for what."""

    @classmethod
    async def made(cls, kafka: mq.Kafka, values: list[str], partitions: int = 1) -> Bench:
        """The values are "key:number"; one that begins with ":" has no key."""
        topic, lot = (
            await mq.topic(kafka, "work", partitions),
            await mq.topic(kafka, "lot", partitions, **PARKING_TOPIC),
        )
        bench = cls(kafka, topic, lot, await mq.topic(kafka, "dead"))
        await bench.send(values)
        return bench

    async def send(self, values: list[str]) -> None:
        async with mq.producer(self.kafka, linger_ms=2) as producer:
            for answer in [
                await producer.send(self.topic, value.encode(), value.partition(":")[0].encode() or None)
                for value in values
            ]:
                await answer

    async def handle(self, record: ConsumerRecord) -> None:
        value = record.value.decode()
        if self.failing.get(value, 0) > 0:
            self.failing[value] -= 1
            raise RuntimeError(f"cannot {value}")
        if value in self.gates:
            await self.gates[value].wait()
        self.done.append(value)

    def start(self, attempts: int = 3, handle: Any = None, options: Any = None, **policy: Any) -> Any:
        rules = {"backoff": 0.01, "commit_every": 0.05, "dead_letters": self.dead, "attempts": attempts, **policy}
        return consume_parking(
            self.kafka, self.topic, self.group, handle or self.handle, self.lot, Policy(**rules),
            **{**QUICK, **(options or {})},
        )  # fmt: skip

    def has(self, count: int) -> Callable[[], bool]:
        return lambda: len(set(self.done)) >= count

    @property
    def by_key(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for value in self.done:
            found[value.partition(":")[0]].append(int(value.partition(":")[2]))
        return found

    async def still_parked(self) -> dict[bytes, bytes]:
        """What a new owner would find in the parking topic."""
        live = {record.key: record.value for record in await mq.read(self.kafka, self.lot)}
        return {key: value for key, value in live.items() if value is not None}

    async def lag(self) -> int | None:
        return (await mq.group_lag(self.kafka, self.group, self.topic)).total


async def test_a_retry_is_not_overtaken_by_its_key(kafka: mq.Kafka) -> None:
    """v1 fails once, v2 and v3 follow. With a plain retry topic the order is v2, v3, v1; here it is v1, v2, v3."""
    bench = await Bench.made(kafka, ["v:1", "v:2", "v:3"])
    bench.failing = {"v:1": 1}
    overtaken: list[bytes] = []

    async def resend(record: ConsumerRecord) -> None:
        """The naive retry topic, which nobody blocks for."""
        if record.topic == bench.topic and record.value == b"v:1":
            await producer.send_and_wait(retry, record.value, key=record.key)
            return
        if record.topic == retry:  # a retry comes some time later
            await mq.until(lambda: len(overtaken) == 2)
        overtaken.append(record.value)

    retry = await mq.topic(kafka, "retry")
    async with mq.producer(kafka) as producer, consume(kafka, [bench.topic, retry], kafka.name("naive"), resend):
        await mq.until(lambda: len(overtaken) == 3, within=20)
    assert overtaken == [b"v:2", b"v:3", b"v:1"]
    async with bench.start() as work:
        await mq.until(lambda: work.parking.freed == 1, within=20)
    assert bench.done == ["v:1", "v:2", "v:3"]
    assert str(work.parking) == "handled 3, failed 1, parked 3, found 0, skipped 0, dead-lettered 0, freed 1"
    assert await bench.still_parked() == {}
    assert await bench.lag() == 0


async def test_other_keys_flow_on_and_all_is_committed(kafka: mq.Kafka) -> None:
    """While a retry of k1 hangs, k0 is done and the commit is at the end: what waits is in the parking topic."""
    bench = await Bench.made(kafka, [f"k{key}:{number}" for number in range(20) for key in range(4)])
    bench.failing, bench.gates = {"k1:0": 1}, {"k1:0": asyncio.Event()}
    async with bench.start() as work:
        await mq.until(bench.has(60), within=20)
        await mq.until(lambda: work.parked == {b"k1": 20}, within=20)
        await mq.until(lambda: work.report.committed.get(TopicPartition(bench.topic, 0)) == 80, within=20)
        assert "k1" not in bench.by_key
        assert len(await bench.still_parked()) == 20
        bench.gates["k1:0"].set()
        await mq.until(lambda: not work.parked, within=20)
    assert bench.by_key == {f"k{key}": list(range(20)) for key in range(4)}
    assert await bench.still_parked() == {}


async def test_poison_is_dead_lettered_and_its_key_flows_on(kafka: mq.Kafka) -> None:
    """After so many attempts in all, once, with its history; also one that was only parked since another had failed."""
    bench = await Bench.made(kafka, [f"k:{number}" for number in range(6)])
    bench.failing = {"k:1": 99, "k:2": 99, "k:4": 2}
    async with bench.start(attempts=3) as work:
        await mq.until(bench.has(4), within=20)
        await mq.until(lambda: not work.parked, within=20)
    assert bench.done == ["k:0", "k:3", "k:4", "k:5"]
    assert bench.failing == {"k:1": 96, "k:2": 96, "k:4": 0}
    first, second = await mq.read(kafka, bench.dead)
    assert (first.key, first.value, second.value) == (b"k", b"k:1", b"k:2")
    headers = dict(first.headers)
    assert headers.pop("dead-letter-timestamp").isdigit()
    assert headers == {
        "dead-letter-topic": bench.topic.encode(), "dead-letter-partition": b"0", "dead-letter-offset": b"1",
        "dead-letter-group": bench.group.encode(), "dead-letter-attempts": b"3",
        "dead-letter-error": b"RuntimeError: cannot k:1",
    }  # fmt: skip
    assert await bench.still_parked() == {}


async def test_the_next_owner_finds_what_is_parked_as_it_was(kafka: mq.Kafka) -> None:
    """Stopped in the middle: the next one goes on with the parked records first, and with their attempts. Value, key,
    headers and time are those of the record, also where there is none."""
    bench, seen = await Bench.made(kafka, []), list[ConsumerRecord]()
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(bench.topic, b"first", b"k", headers=[("a", b"1"), ("parked", b"mine")])
        await producer.send_and_wait(bench.topic, None, b"k")
        await producer.send_and_wait(bench.topic, b"alone", None)
        await producer.send_and_wait(bench.topic, b"", b"k")
    written = await mq.read(kafka, bench.topic)

    async def refuse(record: ConsumerRecord) -> None:
        raise RuntimeError("not today")

    async def accept(record: ConsumerRecord) -> None:
        seen.append(record)

    async with bench.start(attempts=2, backoff=60, handle=refuse) as work:
        await mq.until(lambda: work.parked == {b"k": 3, 2: 1} and work.parking.failed == 2, within=20)
        await mq.until(lambda: work.report.committed, within=20)
    assert await bench.lag() == 0
    await bench.send(["k:4"])
    async with bench.start(attempts=2, handle=accept) as work:
        await mq.until(lambda: len(seen) == 5, within=20)
        await mq.until(lambda: not work.parked, within=20)
    fields = ("topic", "partition", "offset", "timestamp", "key", "value", "headers")
    facts = [{name: getattr(record, name) for name in fields} for record in seen]
    assert sorted(facts, key=lambda fact: fact["offset"])[:4] == [
        {name: getattr(record, name) for name in fields} for record in written
    ]
    assert [record.offset for record in seen if record.key] == [0, 1, 3, 4]
    assert work.parking.found == 4
    async with bench.start(attempts=2, handle=accept) as work:
        await bench.send(["k:5"])
        await mq.until(lambda: len(seen) == 6, within=20)
    assert work.parking.found == 0, "what is settled is not found again"


async def test_what_is_delivered_again_keeps_its_place(kafka: mq.Kafka) -> None:
    """The commit is lost, as in a crash: records that are parked are not parked again behind others, nor handled."""
    bench = await Bench.made(kafka, [f"k:{number}" for number in range(4)])
    bench.failing, bench.gates = {"k:0": 1}, {"k:1": asyncio.Event()}
    async with bench.start(drain=0.2) as work:
        await mq.until(lambda: bench.done == ["k:0"] and work.parking.parked == 4, within=20)
    part = TopicPartition(bench.topic, 0)
    async with mq.consumer(kafka, group_id=bench.group, enable_auto_commit=False) as consumer:
        consumer.assign([part])
        await consumer.commit({part: 0})
    bench.gates["k:1"].set()
    gate = bench.gates["k:2"] = asyncio.Event()
    async with bench.start() as work:
        await mq.until(lambda: work.parking.skipped == 4, within=20)
        assert (work.parking.found, work.parking.parked) == (3, 0)
        gate.set()
        await mq.until(lambda: not work.parked, within=20)
    assert bench.done == ["k:0", "k:1", "k:2", "k:3"]


async def test_a_consumer_that_is_killed_keeps_the_order(kafka: mq.Kafka, tmp_path: Path) -> None:
    """SIGKILL in the middle of the retries of a key: nothing is lost, and each key goes on where it was."""
    values = [f"k{number % 5}:{number}" for number in range(500)]
    bench, ledger, path = await Bench.made(kafka, values, partitions=2), mq.Ledger(), tmp_path / "journal"
    for number in range(500):
        ledger.sent(number)
    arguments = kafka, bench.topic, bench.group, bench.lot, bench.dead, str(path)
    for crash_at in (203, 403):
        async with mq.worker(die_at, *arguments, crash_at) as worker:
            await worker.ended(within=30)
        assert worker.crashed
    journal, here = mq.Journal(path), list[int]()

    async def handle(record: ConsumerRecord) -> None:
        number = int(record.value.decode().partition(":")[2])
        journal.received(number, key=record.key.decode())
        here.append(number)

    async with bench.start(handle=handle) as work:
        await mq.until(lambda: not work.parked and work.parking.found, within=30)
        await mq.until(lambda: read(path).lost == 0, within=30)
    ledger.replay(path)
    assert (ledger.lost, ledger.unexpected, ledger.reordered_in_key) == (0, 0, 0)
    assert ledger.duplicated >= 2, "the two that were handled and not settled come again"
    assert [number for number in here if number % 5 == 3] == list(range(403, 500, 5)), "its key goes on where it was"
    assert await bench.still_parked() == {}


def read(path: Path) -> mq.Ledger:
    ledger = mq.Ledger()
    for number in range(500):
        ledger.sent(number)
    ledger.replay(path)
    return ledger


async def die_at(kafka: Any, topic: str, group: str, lot: str, dead: str, path: str, number: int) -> None:
    """Its key fails once, and is retried up to this number; then the process ends, behind the effect."""
    import asyncio

    import mqlib
    from mqlib.patterns.consumer import Policy
    from mqlib.patterns.parking import consume_parking

    journal, failed = mqlib.Journal(path), list[str]()

    async def handle(record: Any) -> None:
        key, _, text = record.value.decode().partition(":")
        if not failed and int(text) > number - 150 and int(text) % 5 == number % 5:
            failed.append(key)
            raise RuntimeError("once")
        await asyncio.sleep(0.001)
        journal.received(int(text), key=key)
        if int(text) == number:
            mqlib.crash()

    policy = Policy(attempts=3, backoff=0.01, dead_letters=dead, commit_every=0.05)
    async with consume_parking(kafka, topic, group, handle, lot, policy, session_timeout_ms=1000,
                               heartbeat_interval_ms=200):  # fmt: skip
        await asyncio.sleep(60)


async def test_an_attempt_that_kills_the_process_counts(kafka: mq.Kafka) -> None:
    """A parked record that ends its process each time is a dead letter after as many attempts, not a loop for ever."""
    bench = await Bench.made(kafka, ["k:0", "k:1", "k:2"])
    for _ in range(2):
        async with mq.worker(die_of, kafka, bench.topic, bench.group, bench.lot, bench.dead) as worker:
            await worker.ended(within=30)
        assert worker.crashed
    async with bench.start(attempts=3) as work:
        await mq.until(lambda: bench.done == ["k:1", "k:2"], within=20)
        await mq.until(lambda: not work.parked, within=20)
    [letter] = await mq.read(kafka, bench.dead)
    headers = dict(letter.headers)
    assert (letter.value, headers["dead-letter-attempts"]) == (b"k:0", b"3")
    assert headers["dead-letter-error"] == b"RuntimeError: the first time it only fails"


async def die_of(kafka: Any, topic: str, group: str, lot: str, dead: str) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.consumer import Policy
    from mqlib.patterns.parking import consume_parking

    async def handle(record: Any) -> None:
        if work.parked:
            mqlib.crash()
        raise RuntimeError("the first time it only fails")

    policy = Policy(attempts=3, backoff=0.01, dead_letters=dead, commit_every=0.05)
    async with consume_parking(kafka, topic, group, handle, lot, policy, session_timeout_ms=1000,
                               heartbeat_interval_ms=200) as work:  # fmt: skip
        await asyncio.sleep(60)


async def test_ten_thousand_records_two_members_and_keys_that_fail(kafka: mq.Kafka) -> None:
    """50 keys, of which some fail now and then and one has poison; a member joins in the middle and leaves."""
    values = [f"k{number % 50}:{number}" for number in range(10_000)]
    bench, ledger = await Bench.made(kafka, values, partitions=4), mq.Ledger()
    bench.failing = {values[number]: 1 + number % 2 for number in range(7, 10_000, 1001)} | {"k3:4003": 99}
    handled = 0

    async def handle(record: ConsumerRecord) -> None:
        nonlocal handled
        await asyncio.sleep(0)
        await bench.handle(record)
        ledger.received(int(record.value.decode().partition(":")[2]), key=record.key)
        handled += 1

    for number in range(10_000):
        ledger.sent(number)
    rules: dict[str, Any] = {"handle": handle, "max_buffered": 200, "options": {"max_poll_records": 100}}
    async with bench.start(**rules) as one:
        await mq.until(lambda: handled > 1000 and one.parking.parked, within=30)
        async with bench.start(**rules) as two:
            await mq.until(lambda: two.parking.handled > 1000, within=30)
        await mq.until(bench.has(9999), within=60)
        await mq.until(lambda: not one.parked, within=30)
    assert (ledger.missing(), ledger.reordered_in_key, ledger.unexpected) == ([4003], 0, 0)
    assert {letter.value for letter in await mq.read(kafka, bench.dead)} == {b"k3:4003"}
    assert one.report.revoked >= 4
    # What was handled behind the first that was not is handled again: as much as may be buffered, for each partition.
    moved = one.report.revoked + two.report.revoked + 4
    assert ledger.duplicated <= moved * (200 + 100)
    assert await bench.still_parked() == {}
    assert await bench.lag() == 0


async def test_the_broker_dies_while_a_key_is_parked() -> None:
    """SIGKILL in the middle: nothing is skipped, and the order of each key holds."""
    with mq.kafka(private=True) as broker:
        values = [f"k{number % 5}:{number}" for number in range(1000)]
        bench = await Bench.made(broker, values, partitions=2)
        bench.failing = {"k1:1": 2, "k2:302": 1}

        async def handle(record: ConsumerRecord) -> None:
            await asyncio.sleep(0.001)
            await bench.handle(record)

        async with bench.start(handle=handle) as work:
            await mq.until(lambda: len(bench.done) > 100 and work.parked, within=20)
            async with mq.killed(broker.nodes[0]):
                pass
            await mq.until(bench.has(1000), within=60)
            await mq.until(lambda: not work.parked, within=20)
        first = {key: list(dict.fromkeys(numbers)) for key, numbers in bench.by_key.items()}
        assert first == {f"k{key}": list(range(key, 1000, 5)) for key in range(5)}
        assert await bench.still_parked() == {}


async def test_what_is_parked_is_bounded(kafka: mq.Kafka) -> None:
    """A key that hangs with a long backlog: 10 of its records are parked, the others stay in the topic."""
    bench = await Bench.made(kafka, [f"k:{number}" for number in range(100)])
    bench.failing, bench.gates = {"k:0": 1}, {"k:0": asyncio.Event()}
    async with bench.start(max_buffered=10) as work:
        await mq.until(lambda: work.parked == {b"k": 10}, within=20)
        await mq.until(lambda: work.report.committed.get(TopicPartition(bench.topic, 0)) == 10, within=20)
        assert work.parked == {b"k": 10}
        bench.gates["k:0"].set()
        await mq.until(bench.has(100), within=20)
    assert bench.done == [f"k:{number}" for number in range(100)]


async def test_a_record_that_cannot_be_parked_ends_the_run(kafka: mq.Kafka) -> None:
    """Neither committed nor jumped over: the run ends and says why."""
    bench = await Bench.made(kafka, ["k:0", "k:" + "1" * 3000, "k:2"])
    bench.lot = await mq.topic(kafka, "narrow", max_message_bytes=2000, **PARKING_TOPIC)
    bench.failing = {"k:0": 1}
    bench.gates = {"k:" + "1" * 3000: asyncio.Event()}
    with pytest.raises(HandlerFailed, match="offset 1, attempt 1: MessageSizeTooLarge"):
        async with bench.start(attempts=2, backoff=60):
            await mq.until(bench.has(3), within=20)
    assert (await mq.group_lag(kafka, bench.group, bench.topic)).partitions[0].committed == 1


async def test_a_dead_letter_that_cannot_be_stored_stays_parked(kafka: mq.Kafka) -> None:
    """The run ends with the error, and the next owner finds the record, and those behind it."""
    bench = await Bench.made(kafka, ["k:" + "1" * 3000, "k:2"])
    bench.dead = await mq.topic(kafka, "narrow", max_message_bytes=2000)
    bench.failing = {"k:" + "1" * 3000: 99}
    with pytest.raises(MessageSizeTooLargeError):
        async with bench.start(attempts=2):
            await mq.until(lambda: len(bench.done) == 2, within=20)
    assert bench.done == []
    assert b"0" in await bench.still_parked()


async def test_a_key_that_hangs_before_it_failed_stops_no_other(kafka: mq.Kafka) -> None:
    bench = await Bench.made(kafka, ["a:0", "b:0", "b:1", "a:1"])
    bench.gates = {"a:0": asyncio.Event()}
    async with bench.start() as work:
        await mq.until(lambda: bench.done == ["b:0", "b:1"], within=20)
        bench.gates["a:0"].set()
        await mq.until(bench.has(4), within=20)
    assert work.parking.parked == 0


async def test_a_parking_topic_that_would_lose_records_is_refused(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "work", partitions=2)
    dead, narrow = await mq.topic(kafka, "dead"), await mq.topic(kafka, "narrow", **PARKING_TOPIC)
    plain = await mq.topic(kafka, "plain", partitions=2)
    policy, group = Policy(dead_letters=dead), kafka.name("refused")

    async def handle(_: ConsumerRecord) -> None: ...

    for lot, words in {
        plain: r"has 2 partitions and cleanup.policy=delete; it needs 2, as .* has, and compact",
        narrow: r"has 1 partitions and cleanup.policy=compact; it needs 2",
        f"{plain}.not-there": "Kafka has no topic '.*not-there'",
    }.items():
        with pytest.raises(mq.BrokerError, match=words):
            async with consume_parking(kafka, topic, group, handle, lot, policy):
                pytest.fail("it is not fit")
    for wrong in (Policy(), Policy(dead_letters=dead, attempts=0)):
        with pytest.raises(ValueError, match="dead_letters and at least 1 of attempts"):
            ParkingConsumer(kafka, topic, group, handle, plain, wrong, {})


async def test_nothing_is_left_behind(kafka: mq.Kafka) -> None:
    bench, tasks = await Bench.made(kafka, ["k:0", "k:1"]), asyncio.all_tasks()
    bench.failing = {"k:0": 99}
    async with bench.start(attempts=9, backoff=60) as work:
        await mq.until(lambda: work.parked == {b"k": 2}, within=20)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
