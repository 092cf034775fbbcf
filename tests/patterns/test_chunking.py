"""A message in parts comes out whole or not at all: duplicates, losses, crashes, limits; on a real Kafka."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError

import mqlib as mq
from mqlib.patterns.chunking import (
    INDEX,
    SHA256,
    SIZE,
    TOTAL,
    Assembled,
    Assembler,
    ChunksUnconfirmed,
    Part,
    send_chunks,
    split,
)

CHANCE = random.Random(17)
HERE = TopicPartition("t", 0)


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """One that can be put behind a proxy."""
    with mq.kafka(private=True) as broker:
        yield broker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(offset: int, part: Part | bytes | None, partition: int = 0) -> ConsumerRecord:
    value, headers = part if isinstance(part, Part) else (part, [("other", b"1")])
    return ConsumerRecord("t", partition, offset, 0, 0, b"key", value, None, 3, len(value or b""), headers)


def feed(assembler: Assembler, parts: Sequence[Part | bytes | None], start: int = 0) -> list[Assembled]:
    found = []
    for offset, part in enumerate(parts, start):
        found += assembler.add(record(offset, part))
    return found


def kinds(outcomes: list[Assembled]) -> list[tuple[str, str]]:
    return [(each.kind, each.id) for each in outcomes]


def three(id: str) -> list[Part]:
    return split(id.encode() * 25, size=10, id=id)


def without(part: Part, *names: str, **other: bytes) -> Part:
    headers = [(name, value) for name, value in part.headers if name not in names]
    return Part(part.body, [*headers, *((name.replace("_", "-"), value) for name, value in other.items())])


@pytest.mark.parametrize(("length", "sizes"), [(0, [0]), (1, [1]), (10, [10]), (11, [10, 1]), (30, [10, 10, 10])])
def test_the_parts_of_a_message(length: int, sizes: list[int]) -> None:
    data = CHANCE.randbytes(length)
    parts = split(data, size=10, id="a", headers=[("mine", b"1")])
    assert [len(part.body) for part in parts] == sizes
    assert [dict(part.headers)[INDEX] for part in parts] == [b"%d" % n for n in range(len(sizes))]
    about = {"mine": b"1", "chunk-id": b"a", TOTAL: b"%d" % len(sizes), SIZE: b"%d" % length,
             SHA256: hashlib.sha256(data).hexdigest().encode()}  # fmt: skip
    assert all(dict(part.headers).items() >= about.items() for part in parts)
    [whole] = feed(Assembler(), parts)
    assert (whole.data, whole.headers, whole.key, whole.offset) == (data, [("mine", b"1")], b"key", 0)
    assert dict(split(data)[0].headers)["chunk-id"] != dict(split(data)[0].headers)["chunk-id"]


def test_a_part_has_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        split(b"x", size=0)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_with_duplicates_and_losses(seed: int) -> None:
    """Ten messages, shuffled together: each comes out once, whole, exactly if no part of it is lost."""
    chance = random.Random(seed)
    data = {f"m{n}": chance.randbytes(chance.randrange(1, 60)) for n in range(10)}
    parts = [part for id, each in data.items() for part in split(each, size=10, id=id)]
    lost = chance.sample(parts, 3)
    sent = [part for part in parts if part not in lost for _ in range(1 + (chance.random() < 0.3))]
    chance.shuffle(sent)
    clock = Clock()
    assembler = Assembler(patience=10, clock=clock)
    found = feed(assembler, sent)
    assert all(each.kind == "whole" and each.data == data[each.id] for each in found)
    ids = [each.id for each in found]
    assert sorted(ids) == sorted(data.keys() - {dict(part.headers)["chunk-id"].decode() for part in lost})
    clock.now += 10
    seen = {dict(part.headers)["chunk-id"].decode() for part in sent}
    assert {each.id for each in assembler.expired()} == seen - set(ids)
    assert assembler.held == 0


def test_an_incomplete_message_is_reported_once_and_never_handed_on() -> None:
    clock = Clock()
    assembler = Assembler(patience=10, clock=clock)
    a, b = three("a"), three("b")
    assert feed(assembler, [a[0], a[0], a[2]]) == []
    clock.now += 5
    assert feed(assembler, b[:2], start=3) == []
    clock.now += 4.9
    assert assembler.expired() == []
    clock.now += 0.1
    [report] = assembler.expired()
    assert (report.kind, report.id, report.data, report.missing) == ("incomplete", "a", None, (1,))
    assert (report.offset, report.key, report.reason) == (0, b"key", "not whole after 10 s")
    assert assembler.expired() == []
    assert kinds(feed(assembler, [b[2]], start=5)) == [("whole", "b")]
    assert dict(assembler.counts) == {"part": 6, "duplicate": 1, "incomplete": 1, "whole": 1}


def test_sent_again_after_it_was_given_up_it_is_whole() -> None:
    clock = Clock()
    assembler = Assembler(patience=10, clock=clock)
    feed(assembler, three("a")[:2])
    clock.now += 10
    assert kinds(assembler.expired()) == [("incomplete", "a")]
    assert kinds(feed(assembler, three("a"), start=2)) == [("whole", "a")]


def test_sent_again_it_is_a_duplicate_as_long_as_that_is_remembered() -> None:
    assembler = Assembler(remember=2)
    assert kinds(feed(assembler, [*three("a"), *three("a")])) == [("whole", "a")]
    assert kinds(feed(assembler, [*three("b"), *three("c"), *three("a")], start=6)) == [
        ("whole", "b"), ("whole", "c"), ("whole", "a"),
    ]  # fmt: skip


def test_what_may_be_committed() -> None:
    """Never past the first part of what is not whole, nor of what is not done; then all."""
    clock = Clock()
    assembler = Assembler(patience=10, clock=clock)
    a, b = three("a"), three("b")
    assert assembler.committable() == {}
    [plain] = feed(assembler, [b"small"])
    assert assembler.committable() == {HERE: 0}
    assembler.done(plain)
    assert assembler.committable() == {HERE: 1}
    [whole] = feed(assembler, [b[0], a[0], a[1], a[2], b[1]], start=1)
    assert assembler.committable() == {HERE: 1}
    clock.now += 10
    [report] = assembler.expired()
    assert assembler.committable() == {HERE: 1}, "the report is not dealt with"
    assembler.done(report)
    assert assembler.committable() == {HERE: 2}, "a is not"
    assembler.done(whole)
    assembler.done(whole)
    assert assembler.committable() == {HERE: 6}
    assembler.add(record(40, a[0], partition=1))
    assert assembler.committable() == {HERE: 6, TopicPartition("t", 1): 40}


def test_partitions_do_not_mix_and_a_revoked_one_is_forgotten() -> None:
    assembler = Assembler()
    a = three("a")
    for offset, (part, partition) in enumerate([(a[0], 0), (a[1], 0), (a[2], 1), (a[0], 1)]):
        assert assembler.add(record(offset, part, partition)) == []
    [plain] = assembler.add(record(4, b"small", 0))
    assembler.forget(HERE)
    assert assembler.committable() == {TopicPartition("t", 1): 2}
    [again] = assembler.add(record(10, b"small", 0))  # another one had it in between, and it has come back
    assembler.done(again)
    assert assembler.committable() == {HERE: 11, TopicPartition("t", 1): 2}
    assembler.done(plain)  # late, and of no concern any more
    [whole] = assembler.add(record(5, a[1], 1))
    assert (whole.data, assembler.held) == (b"a" * 25, 0)
    assembler.forget(whole.partition)
    assert kinds([each for n in range(3) for each in assembler.add(record(n, a[n], 1))]) == [("whole", "a")]


def test_of_a_message_that_was_done_before_a_restart_only_the_end_is_read_again() -> None:
    """It is a remnant, and not called incomplete; one that lacks its end is, since its sender may have crashed."""
    clock = Clock()
    a, b, c = three("a"), three("b"), three("c")
    log = [a[0], b[0], a[1], a[2], c[0], c[1]]
    before = Assembler(patience=10, clock=clock)
    [whole] = feed(before, log)
    before.done(whole)
    assert before.committable() == {HERE: 1}
    after = Assembler(patience=10, clock=clock)
    assert feed(after, log[1:], start=1) == []
    clock.now += 10
    assert kinds(after.expired()) == [("incomplete", "b"), ("remnant", "a"), ("incomplete", "c")]
    first = Assembler(patience=10, clock=clock)
    feed(first, a[1:], start=0)
    clock.now += 10
    assert kinds(first.expired()) == [("incomplete", "a")], "at the beginning of the log nothing lies before it"


def test_the_oldest_goes_when_there_is_no_room() -> None:
    assembler = Assembler(max_bytes=2000)
    parts = [split(b"%d" % n * 25, size=10, id=f"m{n}")[:2] for n in range(4)]
    found = feed(assembler, [part for several in parts for part in several])
    assert kinds(found) == [("incomplete", "m0")]
    assert found[0].reason == "more than 2000 bytes were waiting"
    assert assembler.held <= 2000
    assert kinds(feed(assembler, split(b"3" * 25, size=10, id="m3")[2:], start=8)) == [("whole", "m3")]


def test_a_message_larger_than_the_limit_is_refused_at_its_first_part() -> None:
    [part, *_] = split(b"x" * 5000, size=1000, id="large")
    assembler = Assembler(max_bytes=5000)
    [outcome] = feed(assembler, [part])
    assert (outcome.kind, outcome.reason) == ("rejected", "a message of 5000 bytes in 5 parts; max_bytes is 5000")
    assert (assembler.held, assembler.expired()) == (0, [])


A = three("a")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (without(A[0], TOTAL), "a part without the header 'chunk-total'"),
        (without(A[0], INDEX, chunk_index=b"3"), "part 3 of 3, 10 bytes of 25, cannot be"),
        (without(A[0], INDEX, chunk_index=b"-1"), "cannot be"),
        (without(A[0], INDEX, chunk_index=b"one"), "invalid literal"),
        (without(A[0], TOTAL, chunk_total=b"26"), "part 0 of 26"),
        (without(A[0], SIZE, chunk_size=b"9"), "10 bytes of 9, cannot be"),
        (without(A[0], SHA256, chunk_sha256=b"\xff"), "decode"),
        (without(A[0], SIZE, chunk_size=b"24"), "and the parts before it"),
        (Part(None, A[0].headers), "a part without a body"),  # type: ignore[arg-type]
        (without(A[0], "chunk-id", chunk_id=None), "a part without the header 'chunk-id'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_part_that_contradicts_itself_is_set_aside_and_stops_nobody(part: Part, words: str) -> None:
    assembler = Assembler()
    assert feed(assembler, [A[1]]) == []
    [outcome] = feed(assembler, [part], start=1)
    assert (outcome.kind, outcome.offset, outcome.data) == ("rejected", 1, None)
    assert words in outcome.reason
    [whole] = feed(assembler, [A[0], A[2]], start=2)
    assert whole.data == b"a" * 25


def test_an_altered_part_makes_no_message_and_a_second_sending_does() -> None:
    assembler = Assembler()
    [outcome] = feed(assembler, [A[0], Part(b"b" * 10, A[1].headers), A[2]])
    assert (outcome.kind, outcome.reason) == ("rejected", "its parts do not make up what they say it is")
    assert kinds(feed(assembler, A, start=3)) == [("whole", "a")]


@pytest.mark.parametrize("value", [b"small", b"", None])
def test_what_is_no_part_passes_as_it_is(value: bytes | None) -> None:
    [whole] = feed(Assembler(), [value])
    assert (whole.kind, whole.id, whole.data, whole.headers) == ("whole", "", value, [("other", b"1")])


@pytest.mark.parametrize("options", [{"patience": 0}, {"max_bytes": 0}, {"remember": -1}, {"patience": float("nan")}])
def test_limits_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="patience is above 0, max_bytes at least 1"):
        Assembler(**options)


async def test_on_kafka_all_parts_go_to_one_partition_with_a_key_or_without(kafka: mq.Kafka) -> None:
    topic, data = await mq.topic(kafka, "parts", partitions=5), [CHANCE.randbytes(2_500_000) for _ in range(4)]
    async with mq.producer(kafka, enable_idempotence=True) as producer:
        with pytest.raises(MessageSizeTooLargeError):
            await producer.send(topic, data[0])
        keys = [b"a", b"b", None, None]
        ids = [await send_chunks(producer, topic, each, key) for each, key in zip(data, keys, strict=True)]
        await producer.send_and_wait(topic, b"small", partition=0)
    assembler, found = Assembler(), []
    for each in await mq.read(kafka, topic):
        found += assembler.add(each)
    assert {each.id: each.data for each in found} == dict(zip([*ids, ""], [*data, b"small"], strict=True))
    assert sum(assembler.committable().values()) == 0
    for outcome in found:
        assembler.done(outcome)
    assert sum(assembler.committable().values()) == 21


async def test_a_part_that_is_too_large_is_told_and_read_as_nothing(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "parts", max_message_bytes=20_000)
    async with mq.producer(kafka) as producer:
        with pytest.raises(ChunksUnconfirmed, match=r"message m: 0 of 2 parts are confirmed"):
            await send_chunks(producer, topic, b"x" * 50_000, size=30_000, id="m")
        # The last part is small enough, but is not sent, since the first was refused.
        assert await mq.end_offsets(kafka, topic) == [0]
        assert await send_chunks(producer, topic, b"x" * 50_000, size=10_000, id="m") == "m"
        with pytest.raises(ValueError, match="at least 1"):
            await send_chunks(producer, topic, b"", size=0)
    async with mq.producer(kafka, acks=0) as producer:
        with pytest.raises(ValueError, match="acks=0"):
            await send_chunks(producer, topic, b"")


async def test_a_lost_answer_is_unknown_and_a_second_sending_makes_one_message(own: mq.Kafka) -> None:
    """The broker's answers to the parts are swallowed: it may have them. The same id again, and readers get one."""
    topic = await mq.topic(own, "parts")
    async with mq.proxy(own) as network, mq.producer(network, enable_idempotence=True) as producer:
        await producer.send_and_wait(topic, b"warm")
        with network.swallow("down"):
            with pytest.raises(ChunksUnconfirmed, match=r"0 of 3 .*no answer in time|0 of 3 .*TimeoutError") as raised:
                await send_chunks(producer, topic, b"x" * 25, size=10, within=0.5)
            assert (raised.value.confirmed, raised.value.total) == (0, 3)
        id = await send_chunks(producer, topic, b"x" * 25, size=10, id=raised.value.id)
    assembler, found = Assembler(), []
    for each in await mq.read(own, topic):
        found += assembler.add(each)
    assert kinds(found) == [("whole", ""), ("whole", id)]
    assert assembler.counts["duplicate"] > 0, "the first sending was stored, too"


async def test_a_consumer_that_crashes_in_the_middle_reads_the_beginning_again(kafka: mq.Kafka) -> None:
    """It is killed with parts in memory; its successor goes on at what was committed, and misses no message."""
    topic, group = await mq.topic(kafka, "parts"), kafka.name("readers")
    a, b = three("a"), three("b")
    async with mq.producer(kafka) as producer:
        for part in (a[0], b[0], a[1], a[2], b[1]):
            await producer.send_and_wait(topic, part.body, headers=part.headers)
    async with mq.worker(reads_and_crashes, kafka, topic, group) as process:
        assert "a" in await process.printed("whole", within=30)
        await process.ended(within=30)
        assert process.crashed
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, b[2].body, headers=b[2].headers)
    options: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False, **options) as consumer:
        records = await mq.take(consumer, 5, within=20)
    assert records[0].offset == 1
    assembler, found = Assembler(), []
    for each in records:
        found += assembler.add(each)
    assert [(each.id, each.data) for each in found] == [("b", b"b" * 25)]


async def reads_and_crashes(kafka: Any, topic: str, group: str) -> None:
    import mqlib
    from mqlib.patterns.chunking import Assembler

    assembler = Assembler()
    options = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with mqlib.consumer(kafka, topic, group_id=group, enable_auto_commit=False, **options) as consumer:
        for record in await mqlib.take(consumer, 5, within=20):
            for outcome in assembler.add(record):
                print(outcome.kind, outcome.id)
                assembler.done(outcome)
        await consumer.commit(assembler.committable())
        mqlib.crash()
