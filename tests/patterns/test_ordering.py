"""Gaps, late ones, duplicates, restarts are told apart; what a resequencer takes comes out; no old update passes."""

from __future__ import annotations

import math
import random
import sqlite3
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from aio_pika import Message

import mqlib as mq
from mqlib.patterns.ordering import GapDetector, Missing, Released, Resequencer, VersionGuard


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_number_gets_its_word() -> None:
    found = GapDetector()
    words = [found.see(number) for number in (0, 1, 2, 4, 5, 5, 7, 3, 3, 8, 6, 9)]
    assert words == ["next", "next", "next", "ahead", "ahead", "duplicate", "ahead", "reordered", "duplicate", "ahead",
                     "reordered", "next"]  # fmt: skip
    assert (found.gaps(), found.expired(), found.horizon()) == ([], [], (0, 10))
    assert str(found.counts[""]) == "received 12, reordered 2, duplicate 2, missing 0, late 0, fenced 0, restarts 0"


def test_what_is_waited_for_in_vain_is_missing_and_then_late() -> None:
    """Not before its time, not twice, and never called a duplicate."""
    clock = Clock()
    found = GapDetector(patience=5, clock=clock)
    found.see(3, "a")
    clock.now += 3
    found.see(6, "a")
    assert found.see(1, "a") == "reordered"
    clock.now += 1.9
    assert found.expired() == []
    clock.now += 0.1
    assert found.expired() == [Missing("a", 0, range(1)), Missing("a", 0, range(2, 3))]
    assert found.gaps("a") == [range(4, 6)]
    assert [found.see(number, "a") for number in (2, 2, 1, 4)] == ["late", "duplicate", "duplicate", "reordered"]
    clock.now += 100
    assert found.expired() == [Missing("a", 0, range(5, 6))]
    assert found.expired() == []
    assert (found.counts["a"].missing, found.counts["a"].late) == (3, 1)
    assert found.horizon("a") == (0, 7)


def test_streams_do_not_mix() -> None:
    found = GapDetector()
    assert [found.see(number, stream) for number, stream in ((0, "a"), (0, "b"), (2, "a"), (1, "b"))] == [
        "next", "next", "ahead", "next",
    ]  # fmt: skip
    assert (found.gaps("a"), found.gaps("b"), found.gaps("c")) == ([range(1, 2)], [], [])


def test_a_new_epoch_is_a_restart_and_the_old_one_is_fenced() -> None:
    found = GapDetector()
    for number in (0, 1, 3):
        found.see(number, "p", epoch=1)
    assert found.see(0, "p", epoch=2) == "next"
    assert found.expired() == [Missing("p", 1, range(2, 3))]
    assert [found.see(number, "p", epoch=1) for number in (2, 4)] == ["fenced", "fenced"]
    assert found.see(1, "p", epoch=2) == "next"
    assert (found.counts["p"].restarts, found.counts["p"].fenced, found.counts["p"].duplicate) == (1, 2, 0)
    assert found.see(2, "p", epoch=3) == "ahead", "its beginning is lacking, too"
    assert found.gaps("p") == [range(2)]


def test_a_gap_of_the_old_epoch_does_not_expire_one_of_the_new() -> None:
    clock = Clock()
    found = GapDetector(patience=10, clock=clock)
    found.see(5, epoch=1)
    clock.now += 6
    found.see(4, epoch=2)
    assert found.expired() == [Missing("", 1, range(5))]
    clock.now += 6
    assert found.expired() == []
    clock.now += 4
    assert found.expired() == [Missing("", 2, range(4))]


def test_where_a_stream_begins() -> None:
    """At 0, at another number, at the first that comes, or at what was stored."""
    assert GapDetector(first=1).see(1) == "next"
    anywhere = GapDetector(first=None)
    assert [anywhere.see(number) for number in (7, 8, 5, 5)] == ["next", "next", "late", "duplicate"]
    stored = {"a": (2, 40), "b": (0, 7)}
    again = GapDetector(first=lambda stream: stored.get(stream, (0, 0)))
    assert [again.see(39, "a", 2), again.see(40, "a", 2), again.see(50, "a", 1)] == ["duplicate", "next", "fenced"]
    assert [again.see(0, "b", 1), again.see(0, "c")] == ["next", "next"]
    assert (again.counts["b"].restarts, again.counts["c"].restarts) == (1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_detector_agrees_with_a_set(seed: int) -> None:
    """Against a model that keeps every number: shuffled, with losses and duplicates, and gaps given up now and then."""
    chance, clock = random.Random(seed), Clock()
    found, seen, gone, highest = GapDetector(patience=10, clock=clock), set[int](), set[int](), -1
    opened: dict[int, float] = {}
    numbers = sorted((number for number in range(300) if chance.random() > 0.1), key=lambda n: n + chance.random() * 20)
    for number in chain.from_iterable([each] * (1 + (chance.random() < 0.1)) for each in numbers):
        clock.now += chance.random() * 2
        news = set(chain.from_iterable(missing.numbers for missing in found.expired()))
        expected = {gap for gap, since in opened.items() if since + 10 <= clock.now}
        assert news == expected
        gone |= expected
        opened = {gap: since for gap, since in opened.items() if gap not in expected}
        word = found.see(number)
        if number in seen:
            assert word == "duplicate"
        elif number in gone:
            assert word == "late"
        elif number < highest:
            assert word == "reordered"
        else:
            opened |= dict.fromkeys(range(highest + 1, number), clock.now)
            assert word == ("ahead" if opened else "next")
        seen.add(number)
        highest = max(highest, number)
        opened.pop(number, None)
        gone.discard(number)
        assert sorted(chain.from_iterable(found.gaps())) == sorted(opened)
        assert found.horizon()[1] == min(opened, default=highest + 1)
    assert found.counts[""].missing - found.counts[""].late == len(gone)


def words(released: list[Released[str]]) -> list[str]:
    return [each.item or f"{each.number}..{each.number + each.count - 1} {each.kind}" for each in released]


def test_a_resequencer_releases_when_the_gap_closes() -> None:
    line = Resequencer[str](patience=10, clock=Clock())
    assert words(line.add(1, "b")) == []
    assert words(line.add(2, "c")) == []
    assert (line.held, line.peak) == (2, 2)
    assert words(line.add(0, "x", "other")) == ["x"], "another stream does not wait"
    assert words(line.add(0, "a")) == ["a", "b", "c"]
    assert line.held == 0
    [again] = line.add(1, "b")
    assert (again.kind, again.number, again.item) == ("duplicate", 1, "b")


def test_time_or_a_full_buffer_gives_a_gap_up_and_the_late_one_is_still_handed_on() -> None:
    clock = Clock()
    line = Resequencer[str](patience=10, limit=3, clock=clock)
    for number in (2, 3, 5):
        assert line.add(number, str(number)) == []
    clock.now += 9.9
    assert line.expired() == []
    clock.now += 0.1
    assert words(line.expired()) == ["0..1 missing", "2", "3", "4..4 missing", "5"]
    [late] = line.add(1, "1")
    assert (late.kind, late.item) == ("late", "1")
    for number in (7, 8, 9):
        assert line.add(number, str(number)) == []
    assert words(line.add(11, "11")) == ["6..6 missing", "7", "8", "9"], "a fourth does not fit"
    assert (line.held, line.gaps.counts[""].missing, line.gaps.counts[""].late) == (1, 4, 1)


def test_a_duplicate_brings_what_time_has_released() -> None:
    clock = Clock()
    line = Resequencer[str](patience=10, clock=clock)
    line.add(0, "0", "a")
    line.add(1, "1", "b")
    clock.now += 10
    assert words(line.add(0, "again", "a")) == ["again", "0..0 missing", "1"]


def test_a_huge_jump_is_one_gap() -> None:
    """A producer that has lost its count does not fill the memory."""
    line = Resequencer[str](patience=1, limit=1, clock=Clock())
    line.add(10**15, "far")
    assert words(line.add(10**15 + 1, "further")) == [f"0..{10**15 - 1} missing", "far", "further"]


def test_a_restart_releases_what_the_old_epoch_held() -> None:
    line = Resequencer[str](patience=10, clock=Clock())
    line.add(0, "a0", epoch=1)
    line.add(2, "a2", epoch=1)
    assert words(line.add(1, "b1", epoch=2)) == ["1..1 missing", "a2"]
    assert words(line.add(0, "b0", epoch=2)) == ["b0", "b1"]
    [old] = line.add(1, "a1", epoch=1)
    assert (old.kind, old.epoch, old.item) == ("fenced", 1, "a1")


@pytest.mark.parametrize("seed", range(20))
def test_everything_that_goes_in_comes_out_once_and_in_order(seed: int) -> None:
    """Ten streams, losses, duplicates, disorder beyond the buffer: each item comes out, and "in order" means it."""
    chance, clock = random.Random(seed), Clock()
    line = Resequencer[int](patience=20, limit=8, clock=clock)
    arrivals = [
        (f"s{n % 10}", n // 10) for n in range(2000) if chance.random() > 0.05 for _ in range(1 + (n % 37 == 0))
    ]
    arrivals = [arrivals[at] for at in sorted(range(len(arrivals)), key=lambda at: at + chance.random() * 150)]
    out: list[Released[int]] = []
    for place, (stream, number) in enumerate(arrivals):
        clock.now += chance.random()
        out += line.add(number, place, stream)
        assert line.peak <= 8
    clock.now += 1000
    out += line.expired()
    assert Counter(each.item for each in out if each.kind != "missing") == Counter(range(len(arrivals)))
    assert line.held == 0
    for stream in {stream for stream, _ in arrivals}:
        mine = [each for each in out if each.stream == stream]
        steps = [(each.number, each.count) for each in mine if each.kind in ("in order", "missing")]
        assert [number for number, _ in steps] == [0, *(number + count for number, count in steps)][:-1], (
            "no step skipped"
        )
        missing = set(chain.from_iterable(range(m.number, m.number + m.count) for m in mine if m.kind == "missing"))
        late = [each.number for each in mine if each.kind == "late"]
        assert set(late) <= missing
        assert len(set(late)) == len(late)
        assert missing - set(late) == set(range(steps[-1][0] + 1)) - {number for at, number in arrivals if at == stream}


def test_a_version_passes_once_and_none_that_is_older() -> None:
    guard = VersionGuard()
    assert [guard.admit("k", version) for version in (1, 3, 2, 3, 4)] == ["new", "new", "stale", "duplicate", "new"]
    assert guard.admit("other", 1) == "new"
    assert guard.counts == {"new": 4, "duplicate": 1, "stale": 1, "fenced": 0}


def test_a_writer_with_an_older_epoch_is_fenced_whatever_its_version() -> None:
    store: dict[Any, tuple[int, int]] = {}
    guard = VersionGuard(store)
    assert [guard.admit("k", *each) for each in ((5, 1), (6, 2), (9, 1), (6, 2), (7, 2))] == [
        "new", "new", "fenced", "duplicate", "new",
    ]  # fmt: skip
    assert VersionGuard(store).admit("k", 7, 2) == "duplicate", "the store is all that it knows"


def test_the_statement_that_is_advised_for_a_database_does_the_same() -> None:
    base, guard, chance = sqlite3.connect(":memory:"), VersionGuard(), random.Random(1)
    base.execute("CREATE TABLE state (key PRIMARY KEY, epoch INT, version INT)")
    base.execute("INSERT INTO state VALUES ('k', -1, -1)")
    for _ in range(300):
        epoch, version = chance.randrange(3), chance.randrange(20)
        changed = base.execute(
            "UPDATE state SET epoch = ?1, version = ?2 WHERE key = 'k' AND (epoch, version) < (?1, ?2)",
            (epoch, version),
        )
        assert (guard.admit("k", version, epoch) == "new") == (changed.rowcount == 1)


@pytest.mark.parametrize("wrong", [0, -1, math.nan])
def test_bad_settings_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        GapDetector(patience=wrong)
    with pytest.raises(ValueError, match="at least 1"):
        Resequencer(patience=1, limit=0)
    with pytest.raises(ValueError, match="start at 0, and this is -3 of stream 's'"):
        GapDetector().see(-3, "s")


async def numbered(kafka: Any, topic: str, epoch: int, count: int, crash: bool) -> None:
    """A producer that numbers from 0 in its epoch, and may die with messages under way."""
    import mqlib

    async with mqlib.producer(kafka, linger_ms=20) as producer:
        for number in range(count):
            headers = [("number", b"%d" % number), ("epoch", b"%d" % epoch)]
            answer = await producer.send(topic, b"", key=b"p", headers=headers)
            if number % 10 == 0:
                await answer
        if crash:
            mqlib.crash()


async def test_a_producer_that_was_killed_and_counts_anew_is_no_duplicate(kafka: mq.Kafka) -> None:
    topic, found = await mq.topic(kafka, "numbered"), GapDetector()
    for epoch in range(2):
        async with mq.worker(numbered, kafka, topic, epoch, 100, epoch == 0) as worker:
            await worker.ended(within=20)
    stored = await mq.read(kafka, topic)
    kinds = Counter[str]()
    for record in stored:
        headers = dict(record.headers)
        kinds[found.see(int(headers["number"]), record.key.decode(), int(headers["epoch"]))] += 1
    assert kinds == {"next": len(stored)}
    assert (found.counts["p"].restarts, found.horizon("p")) == (1, (1, 100))
    naive = GapDetector()
    for record in stored:
        naive.see(int(dict(record.headers)["number"]), "p")
    assert naive.counts["p"].duplicate >= 91, "without the epoch the second life looks like duplicates of the first"


STREAMS = 50


async def resequence(rabbit: Any, queue: str, path: str, stored: dict[str, int], crash_at: int) -> None:
    """Acknowledges a message when it is released and handled; returns after a second without one."""
    import asyncio

    import mqlib
    from mqlib.patterns.ordering import Resequencer

    journal, done = mqlib.Journal(path), 0
    line: Any = Resequencer(patience=30, limit=200, first=lambda stream: (0, stored.get(stream, 0)))
    async with mqlib.channel(rabbit, prefetch=500) as channel:
        deliveries: asyncio.Queue[Any] = asyncio.Queue()
        await (await channel.get_queue(queue)).consume(deliveries.put)
        while True:
            try:
                message = await asyncio.wait_for(deliveries.get(), 1)
            except TimeoutError:
                break
            stream, _, number = message.body.decode().partition(":")
            for each in line.add(int(number), message, stream):
                if each.kind == "in order":
                    journal.received(each.number * 50 + int(stream), key=stream)
                    done += 1
                if done == crash_at:
                    mqlib.crash()
                await each.item.ack()
    print(line.held, line.gaps.counts["7"])


async def test_ten_thousand_shuffled_messages_and_a_consumer_that_is_killed(
    rabbit: mq.RabbitMQ, tmp_path: Path
) -> None:
    """What was held was not acknowledged, so the next life gets it again, and goes on where the effects end."""
    chance, path, queue, ledger = random.Random(3), tmp_path / "journal", rabbit.name("shuffled"), mq.Ledger()
    numbers = sorted(range(10_000), key=lambda number: number + chance.random() * 300)
    await mq.declare(rabbit, queue, durable=True)
    async with mq.channel(rabbit) as channel:
        bodies = [b"%d:%d" % (number % STREAMS, number // STREAMS) for number in numbers]
        await mq.pump_messages(channel.default_exchange, queue, [Message(body) for body in bodies + bodies[5000:5100]])
    for number in range(10_000):
        ledger.sent(number)
    async with mq.worker(resequence, rabbit, queue, str(path), {}, 4000) as worker:
        await worker.ended(within=30)
    assert worker.crashed
    first = mq.Ledger()
    first.replay(path)
    per_key = first.table("key")
    stored = {stream: int(row.received) for stream, row in per_key.iterrows()}
    async with mq.worker(resequence, rabbit, queue, str(path), stored, -1) as worker:
        await worker.ended(within=30)
    ledger.replay(path)
    assert (ledger.lost, ledger.duplicated, ledger.reordered_in_key) == (0, 0, 0)
    assert worker.lines[0].startswith("0 received ")
    assert " missing 0" in worker.lines[0]
    async with mq.channel(rabbit) as channel:
        assert await mq.take_messages(await channel.get_queue(queue), 1, within=0) == []
