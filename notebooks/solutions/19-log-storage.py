"""The exercises of notebook 19: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.provisioning import Refused, Topic, apply

HOUR = 3_600_000
DAY = 24 * HOUR
Update = tuple[str, "int | bytes | None"]


@functools.cache
def _own() -> mq.Kafka:
    """A Kafka that looks twice a second for what it may delete or compact; it ends with this process."""
    return mq.kafka(private=True)


async def _write(kafka: mq.Kafka, topic: str, updates: Sequence[Update], hours_ago: float) -> None:
    stamp = int(1000 * time.time() - hours_ago * HOUR)
    async with mq.producer(kafka, linger_ms=5) as producer:
        for key, value in updates:
            value = b"%d" % value if isinstance(value, int) else value
            await producer.send(topic, value, key.encode(), partition=0, timestamp_ms=stamp)
        await producer.flush()


async def _left(kafka: mq.Kafka, topic: str, fact: Callable[[list[Any]], bool], within: float) -> list[Any]:
    """The records when the fact holds, or after `within` seconds as they are then."""
    records: list[Any] = []

    async def found() -> bool:
        records[:] = await mq.read(kafka, topic)
        return fact(records)

    with contextlib.suppress(TimeoutError):
        await mq.until(found, within=within, every=0.1)
    return records


WRITTEN = {30: "a b a c b†", 20: "a c d a", 0: "c a d"}
POLICIES = {"compact": ("compact", 7), "delete": ("delete", 25), "both": ("compact,delete", 25)}
RIGHT = {"compact": [4, 6, 7, 8, 9, 10, 11], "delete": [5, 6, 7, 8, 9, 10, 11],
         "both": [6, 7, 8, 9, 10, 11], "resumed": 5}  # fmt: skip
WHY = {
    "compact": "of each key the last record in the closed segments stays, a tombstone too, and all of the active one",
    "delete": "a segment goes when its newest record is older than the retention",
    "both": "what is old goes, and of the rest in closed segments what has a later record there",
    "resumed": "`earliest` means where the log begins now",
}


def _as_many(count: int, records: list[Any]) -> bool:
    return len(records) == count


_found: dict[str, Any] = {}


async def _measure() -> dict[str, Any]:
    """What a broker leaves of the twelve records. It is asked once."""
    if _found:
        return _found
    kafka, found = _own(), dict[str, Any]()
    for name, (policy, days) in POLICIES.items():
        settings = {"cleanup_policy": policy, "retention_ms": days * DAY, "min_cleanable_dirty_ratio": "0.001"}
        topic = await mq.topic(kafka, "exercise", **settings)  # type: ignore[arg-type]
        for age, keys in WRITTEN.items():
            updates = [(key[0], None if key[1:] else 1) for key in keys.split()]
            await _write(kafka, topic, updates, hours_ago=24 * age)
            if age == 20 and "delete" in policy:  # the oldest segment went before this one was closed
                await _left(kafka, topic, functools.partial(_as_many, 4), 30)
        records = await _left(kafka, topic, functools.partial(_as_many, len(RIGHT[name])), 30)
        found[name] = [record.offset for record in records]
        if name == "delete":
            part, options = TopicPartition(topic, 0), {"group_id": kafka.name("late"), "enable_auto_commit": False}
            async with mq.consumer(kafka, **options) as consumer:
                consumer.assign([part])
                await consumer.commit({part: 3})
            async with mq.consumer(kafka, **options) as consumer:
                consumer.assign([part])
                found["resumed"] = (await mq.take(consumer, 1, within=30))[0].offset
    _found.update(found)
    return found


async def judge_1(answer: Any) -> None:
    if not isinstance(answer, dict) or {*answer} != {*RIGHT}:
        raise Wrong(f"give a dict with {', '.join(RIGHT)}; this is {answer!r:.200}")
    for name, right in (await _measure()).items():
        given = answer[name] if name == "resumed" else sorted(answer[name])
        if given == right:
            continue
        if name == "resumed":
            raise Wrong(f"'resumed' is not {given!r}: {WHY[name]}")
        wrong = [f"{offset} is gone" for offset in given if offset not in right]
        wrong += [f"{offset} is left" for offset in right if offset not in given]
        raise Wrong(f"{name!r}: on the broker {wrong[0]}; {WHY[name]}")


async def _case(name: str) -> tuple[str, dict[bytes, bytes]]:
    """A topic, and its table."""
    kafka = _own()
    parts = 3 if name == "several partitions" else 1
    topic = await mq.topic(kafka, "exercise", parts, cleanup_policy="compact")
    if name == "several partitions":
        async with mq.producer(kafka) as producer:
            for number in range(30):
                value = None if number in (24, 25) else b"%d" % number
                await producer.send(topic, value, b"k%d" % (number % 6), partition=number % 3)
        return topic, {b"k%d" % n: b"%d" % (24 + n) for n in range(2, 6)}
    if name == "an empty topic":
        return topic, {}
    await _write(kafka, topic, [(f"k{n % 3}", n) for n in range(30)] + [("k0", None)], hours_ago=30 * 24)
    await _write(kafka, topic, [("k3", 0), ("k4", b"")], hours_ago=0)
    expected = {b"k1": b"28", b"k2": b"29", b"k3": b"0", b"k4": b""}
    if name == "holes from compaction":
        await _left(kafka, topic, lambda records: len(records) == 5, 30)
    if name == "transactions at the end":
        async with mq.producer(kafka, transactional_id=kafka.name("writer")) as producer:
            async with producer.transaction():
                await producer.send(topic, b"committed", b"k3")
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"aborted", b"k1")
            await producer.abort_transaction()
        expected[b"k3"] = b"committed"
    return topic, expected


CASES = ("several partitions", "an empty topic", "holes from compaction", "transactions at the end")


async def judge_2(build: Any) -> None:
    if not inspect.iscoroutinefunction(build):
        raise Wrong(f"write `async def build(kafka, topic)`; this is {build!r:.200}")
    for name in CASES:
        topic, expected = await _case(name)
        try:
            async with asyncio.timeout(10):
                found = await build(_own(), topic)
        except TimeoutError:
            raise Wrong(f"{name}: it did not return within 10 s; what does it wait for?") from None
        if not isinstance(found, dict):
            raise Wrong(f"{name}: it returned {found!r:.200}, and not a dict")
        for key in expected.keys() | found.keys():
            if found.get(key, "missing") != expected.get(key, "missing"):
                there, right = found.get(key, "missing"), expected.get(key, "missing")
                raise Wrong(f"{name}: {key!r} is {there!r}, and should be {right!r}")


async def build(kafka, topic):
    table = {}
    options = {"isolation_level": "read_committed"}
    async with mq.consumer(kafka, topic, **options) as consumer:
        await mq.until(consumer.assignment)
        parts = consumer.assignment()
        ends = await consumer.end_offsets(parts)
        await consumer.seek_to_beginning(*parts)
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for records in (await consumer.getmany(timeout_ms=100)).values():
                for record in records:
                    if record.value is None:
                        table.pop(record.key, None)
                    else:
                        table[record.key] = record.value
    return table


async def _build(kafka: Any, topic: str, tombstones: str = "None", **options: Any) -> dict[Any, Any]:
    table: dict[Any, Any] = {}
    for record in await mq.read(kafka, topic, **{"isolation_level": "read_committed", **options}):
        if (record.value is None and tombstones == "None") or (not record.value and tombstones == "false"):
            table.pop(record.key, None)
        else:
            table[record.key] = record.value
    return table


async def knows_no_tombstone(kafka: Any, topic: str) -> Any:
    return await _build(kafka, topic, "ignored")


async def takes_the_empty_for_deleted(kafka: Any, topic: str) -> Any:
    return await _build(kafka, topic, "false")


async def sees_what_was_aborted(kafka: Any, topic: str) -> Any:
    return await _build(kafka, topic, isolation_level="read_uncommitted")


async def reads_one_partition(kafka: Any, topic: str) -> Any:
    records = [record for record in await mq.read(kafka, topic) if record.partition == 0]
    return {record.key: record.value for record in records if record.value is not None}


async def counts_records(kafka: Any, topic: str) -> Any:
    ends, table = await mq.end_offsets(kafka, topic), dict[Any, Any]()
    async with mq.consumer(kafka, topic, isolation_level="read_committed") as consumer:
        for _ in range(sum(ends)):
            record = await consumer.getone()
            table[record.key] = record.value
            if record.value is None:
                del table[record.key]
    return table


GOOD = {
    "cleanup.policy": "compact",
    "delete.retention.ms": 48 * HOUR,
    "min.compaction.lag.ms": 6 * HOUR,
    "max.compaction.lag.ms": 7 * DAY,
}


async def _addresses(kafka: mq.Kafka, topic: str) -> None:
    """Writes addresses of various ages."""
    quiet: list[Update] = [(f"quiet{n}", b"x" * 900) for n in range(50)]
    bulk: list[Update] = [(f"bulk{n}", b"x" * 250_000) for n in range(5)]
    # Much that stays, and is compacted once: so what comes later is a small part of the log.
    await _write(kafka, topic, [("gone", 1), ("gone", None), *quiet], hours_ago=100 * 24)
    await _write(kafka, topic, [("week", 1), ("week", 2)], hours_ago=7.5 * 24)
    await _left(kafka, topic, lambda records: b"1" not in _values(records)["gone"], 30)
    # More than a segment, so that these are in a closed one: only the lag protects them.
    await _write(kafka, topic, [("hours", 1), ("hours", 2), *bulk, ("hours", 3)], hours_ago=5.5)
    await _write(kafka, topic, [("now", 1)], hours_ago=0)


def _values(records: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {key: [] for key in ("gone", "week", "hours", "quiet0")}
    for record in records:
        found.setdefault(record.key.decode(), []).append(record.value)
    return found


def _compacted(records: list[Any]) -> bool:
    values = _values(records)
    return values["week"] == [b"2"] and b"1" not in values["gone"]


def _missed(records: list[Any]) -> bool:
    return len(_values(records)["hours"]) < 3


async def _settings(kafka: mq.Kafka, topic: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    answer = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    await admin.close()
    return {entry[0]: entry[1] for entry in answer[0].resources[0][4]}


async def judge_3(answer: Any) -> None:
    if not isinstance(answer, dict):
        raise Wrong(f"give the settings as a dict; this is {answer!r:.200}")
    kafka = _own()
    topic, control = kafka.name("addresses"), kafka.name("control")
    try:
        await apply(kafka, [Topic(topic, 1, configs={"segment.bytes": 1_048_576, **answer})])
    except (Refused, ValueError) as error:
        raise Wrong(str(error)) from None
    settings = await _settings(kafka, topic)
    policy, retention = settings["cleanup.policy"], int(settings["retention.ms"])
    if "delete" in policy and (retention != -1 or int(settings["retention.bytes"]) != -1):
        raise Wrong(f"1: with {policy} an address that does not change is deleted after {retention / DAY:g} days")
    if "compact" not in policy:
        raise Wrong(f"1 and 4: with {policy} and no limit nothing ever goes")
    if (tombstones := int(settings["delete.retention.ms"])) < 48 * HOUR:
        raise Wrong(f"2: a tombstone may be gone after {tombstones / HOUR:g} hours")
    await _addresses(kafka, topic)
    # The same in a topic without a lag, written later: when that is compacted, this one has had its turn.
    eager = {"segment.bytes": 1_048_576, **GOOD, "min.compaction.lag.ms": 0}
    await apply(kafka, [Topic(control, 1, configs=eager)])
    await _addresses(kafka, control)
    done = await _left(kafka, control, lambda records: _compacted(records) and _missed(records), 30)
    if not _missed(done):
        raise TimeoutError("the broker does not compact at all; try again")
    if _missed(await _left(kafka, topic, _missed, 1)):
        raise Wrong("3: of three addresses of 5.5 hours ago a reader does not see the first")
    values = _values(await _left(kafka, topic, _compacted, 5))
    if values["week"] != [b"2"] or b"1" in values["gone"]:
        raise Wrong("4: an address that was replaced 7.5 days ago is there; another topic was compacted meanwhile")
    if not values["quiet0"]:
        raise Wrong("1: an address of 100 days ago is gone")


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


TASKS = {
    "19.1": Task(
        question="What is left?",
        start=_start("answer", "19.1"),
        hints=[
            "A new segment begins when a record is more than 7 days younger than the first one of the segment.",
            "Compaction looks only at closed segments: the active one stays, and does not replace anything yet.",
            "A tombstone is the last record of its key, and stays for a day.",
        ],
        solution=None,
        code=f"answer = {RIGHT}",
        judge=judge_1,
        wrong=[
            RIGHT | {"compact": [4, 9, 10, 11]},
            RIGHT | {"compact": [6, 7, 8, 9, 10, 11]},
            RIGHT | {"delete": [*range(12)]},
            RIGHT | {"both": RIGHT["delete"]},
            RIGHT | {"resumed": 3},
            {"compact": []},
            "everything",
        ],
    ),
    "19.2": Task(
        question="A table from a log",
        start=_start("build", "19.2"),
        hints=[
            '`isolation_level="read_committed"` leaves out what was aborted.',
            "Ask for `end_offsets` once, and read until `await consumer.position(part)` is there, for every partition.",
            "A tombstone's value is None. An empty value is a value.",
        ],
        solution=build,
        judge=judge_2,
        wrong=[knows_no_tombstone, takes_the_empty_for_deleted, sees_what_was_aborted, reads_one_partition,
               counts_records, 3],
    ),
    "19.3": Task(
        question="A policy for a topic",
        start=_start("answer", "19.3"),
        hints=[
            "Four settings: the policy, how long tombstones stay, and the least and the greatest lag of compaction.",
            "All times are in milliseconds; an hour is 3_600_000.",
            "By default the cleaner waits until half of the log is new to it: `max.compaction.lag.ms` ends that.",
        ],
        solution=None,
        code=f"answer = {GOOD}",
        judge=judge_3,
        wrong=[
            GOOD | {"cleanup.policy": "compact,delete"},
            {"cleanup.policy": "delete", "retention.ms": -1, "delete.retention.ms": 48 * HOUR},
            _without("delete.retention.ms"),
            _without("min.compaction.lag.ms"),
            GOOD | {"min.compaction.lag.ms": 5 * HOUR},
            _without("max.compaction.lag.ms"),
            GOOD | {"max.compaction.lag.ms": 8 * DAY},
            {"cleanup": "compact"},
            {"cleanup_policy": "compact"},
            "compact",
        ],
    ),
}  # fmt: skip
