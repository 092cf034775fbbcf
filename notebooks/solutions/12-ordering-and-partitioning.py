"""The exercises of notebook 12: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import defaultdict
from typing import Any

import mqlib as mq
from mqlib.checks import Task, Wrong

NAMES = [b"k%d" % number for number in range(40)] + [b"", b"\xff\xfe", "Köln".encode()]


async def _places(partitions: int) -> dict[bytes, int]:
    """Where a producer puts each of the names."""
    kafka = mq.kafka()
    topic = await mq.topic(kafka, "exercise", partitions)
    async with mq.producer(kafka, linger_ms=1) as producer:
        answers = {name: await producer.send(topic, b"", key=name) for name in NAMES}
        return {name: (await answer).partition for name, answer in answers.items()}


async def judge_1(moved: Any) -> None:
    for before, after in ((2, 5), (3, 4), (4, 8), (6, 6)):
        old, new = await _places(before), await _places(after)
        wanted = {name for name in NAMES if old[name] != new[name]}
        given = set(moved(list(NAMES), before, after))
        words = f"from {before} to {after} partitions"
        if more := sorted(given - wanted):
            raise Wrong(f"{words}, {more[0]!r} stays in partition {old.get(more[0])}, and so do {len(more) - 1} others")
        if missing := sorted(wanted - given):
            raise Wrong(f"{words}, {len(missing)} more keys moved: {missing[0]!r} is one")


def moved(keys, before, after):
    from aiokafka.partitioner import murmur2

    def place(key, partitions):
        return (murmur2(key) & 0x7FFFFFFF) % partitions

    return {key for key in keys if place(key, before) != place(key, after)}


def with_crc32(keys: Any, before: int, after: int) -> Any:
    return {key for key in keys if zlib.crc32(key) % before != zlib.crc32(key) % after}


def keeps_the_sign(keys: Any, before: int, after: int) -> Any:
    from aiokafka.partitioner import murmur2

    return {key for key in keys if abs(murmur2(key)) % before != abs(murmur2(key)) % after}


def all_of_them(keys: Any, before: int, after: int) -> Any:
    return set(keys) if after != before else set()


def _model(numbers: list[int], limit: int) -> list[tuple[str, int]]:
    expected, held, missing, found = 0, set[int](), set[int](), list[tuple[str, int]]()

    def advance() -> None:
        nonlocal expected
        while expected in held:
            held.discard(expected)
            found.append(("in order", expected))
            expected += 1

    for number in numbers:
        if number in missing:
            missing.discard(number)
            found.append(("late", number))
        elif number < expected or number in held:
            found.append(("duplicate", number))
        else:
            held.add(number)
            advance()
            while len(held) > limit:
                missing.add(expected)
                found.append(("missing", expected))
                expected += 1
                advance()
    return found


CASES: list[tuple[str, list[int], int]] = [
    ("in order", [0, 1, 2], 3),
    ("one pair is swapped", [1, 0, 2], 3),
    ("everything waits for 0", [3, 2, 1, 0], 3),
    ("a number comes twice", [0, 1, 1, 2], 3),
    ("a number that is held comes twice", [1, 1, 0], 3),
    ("0 does not come, and 2 are held", [1, 2], 2),
    ("a third one does not fit", [1, 2, 3, 4], 2),
    ("0 comes late, and then once more", [1, 2, 3, 0, 0], 2),
    ("two numbers are missing in a row", [0, 3, 4, 5, 6], 2),
    ("two gaps, and room for one message", [0, 2, 4, 5, 3, 1], 1),
]


async def judge_2(resequence: Any) -> None:
    for name, numbers, limit in CASES:
        given = [(str(word), int(number)) for word, number in resequence(list(numbers), limit)]
        wanted = _model(numbers, limit)
        if given != wanted:
            raise Wrong(f"{name}: for {numbers} and a limit of {limit} it should hand on {wanted}, and gave {given}")


def resequence(numbers, limit):
    expected, held, missing, handed_on = 0, set(), set(), []
    for number in numbers:
        if number in missing:
            missing.remove(number)
            handed_on.append(("late", number))
            continue
        if number < expected or number in held:
            handed_on.append(("duplicate", number))
            continue
        held.add(number)
        while expected in held or len(held) > limit:
            if expected in held:
                held.remove(expected)
                handed_on.append(("in order", expected))
            else:
                missing.add(expected)
                handed_on.append(("missing", expected))
            expected += 1
    return handed_on


def has_no_limit(numbers: Any, limit: int) -> Any:
    return resequence(numbers, 10**9)


def drops_late_ones(numbers: Any, limit: int) -> Any:
    return [pair for pair in resequence(numbers, limit) if pair[0] != "late"]


def takes_late_ones_for_duplicates(numbers: Any, limit: int) -> Any:
    return [("duplicate" if word == "late" else word, number) for word, number in resequence(numbers, limit)]


def sorts_them(numbers: Any, limit: int) -> Any:
    return [("in order", number) for number in sorted(set(numbers))]


def one_too_few(numbers: Any, limit: int) -> Any:
    return resequence(numbers, limit - 1)


async def judge_3(side_by_side: Any) -> None:
    kafka = mq.kafka()
    topic = await mq.topic(kafka, "exercise")
    async with mq.producer(kafka, linger_ms=1) as producer:
        for number in range(40):
            await producer.send(topic, b"%d" % number, key=b"k%d" % (number % 4))
        await producer.flush()
    records = await mq.read(kafka, topic)
    for failing in (None, 13, 2):
        await _judge_lanes(side_by_side, records, failing)


async def _judge_lanes(side_by_side: Any, records: list[Any], failing: int | None) -> None:
    done: dict[bytes, list[int]] = defaultdict(list)
    running: set[bytes] = set()
    together = 0

    async def work(record: Any) -> None:
        nonlocal together
        if record.key in running:
            raise Wrong(f"record {record.offset} began while another one of key {record.key!r} was being worked on")
        running.add(record.key)
        together = max(together, len(running))
        await asyncio.sleep(0.001 * (record.offset % 3))
        running.discard(record.key)
        if record.offset == failing:
            raise RuntimeError(f"record {record.offset} cannot be done")
        done[record.key].append(record.offset)

    case = "when all works" if failing is None else f"when record {failing} fails"
    try:
        async with asyncio.timeout(5):
            answer = await side_by_side(list(records), work)
    except TimeoutError:
        raise Wrong(f"{case}, it had not returned after 5 s") from None
    except ExceptionGroup as group:
        if wrong := group.subgroup(Wrong):
            raise wrong.exceptions[0] from None
        raise Wrong(f"{case}, it raised {group.exceptions[0]!r}") from None
    except RuntimeError as error:
        raise Wrong(f"{case}, it raised {error!r}: the other keys should go on, and it should return") from None
    for key in sorted({record.key for record in records}):
        own = [record.offset for record in records if record.key == key]
        wanted = own[: own.index(failing)] if failing in own else own
        if done[key] != wanted:
            raise Wrong(f"{case}, the records {wanted} of key {key!r} should be done; those were {done[key]}")
    if together < 4:
        raise Wrong(f"there are four keys, and at most {together} of them were worked on at the same time")
    wanted_offset = len(records) if failing is None else failing
    if answer != wanted_offset:
        raise Wrong(f"{case}, {wanted_offset} may be committed; it returned {answer!r}")


async def side_by_side(records, work):
    lanes, waiting = {}, {record.offset for record in records}
    for record in records:
        lanes.setdefault(record.key, []).append(record)

    async def lane(own):
        for record in own:
            try:
                await work(record)
            except Exception:
                return
            waiting.remove(record.offset)

    async with asyncio.TaskGroup() as group:
        for own in lanes.values():
            group.create_task(lane(own))
    return min(waiting, default=records[-1].offset + 1)


async def a_task_for_each(records: Any, work: Any) -> int:
    await asyncio.gather(*(work(record) for record in records), return_exceptions=False)
    return int(records[-1].offset) + 1


async def one_by_one(records: Any, work: Any) -> int:
    failed: dict[bytes, int] = {}
    for record in records:
        if record.key not in failed:
            try:
                await work(record)
            except RuntimeError:
                failed[record.key] = record.offset
    return min(failed.values(), default=int(records[-1].offset) + 1)


async def goes_on_behind_a_failure(records: Any, work: Any) -> int:
    failed: list[int] = []

    async def forgiving(record: Any) -> None:
        try:
            await work(record)
        except RuntimeError:
            failed.append(record.offset)

    offset = await side_by_side(records, forgiving)
    return min(failed, default=offset)


async def commits_the_last(records: Any, work: Any) -> int:
    done: list[int] = []

    async def noted(record: Any) -> None:
        await work(record)
        done.append(record.offset)

    await side_by_side(records, noted)
    return max(done) + 1


async def commits_how_many(records: Any, work: Any) -> int:
    done: list[int] = []

    async def noted(record: Any) -> None:
        await work(record)
        done.append(record.offset)

    await side_by_side(records, noted)
    return len(done)


TASKS = {
    "12.1": Task(
        question="Which keys move?",
        start='moved = ...\n\nawait mq.exercise("12.1").check(moved)',
        hints=[
            "A key moves when its hash leaves another rest: `hash % before != hash % after`.",
            "The hash is `murmur2(key) & 0x7FFFFFFF`. That is not `abs`: it clears the sign bit.",
        ],
        solution=moved,
        judge=judge_1,
        wrong=[with_crc32, keeps_the_sign, all_of_them, 15],
    ),
    "12.2": Task(
        question="A buffer with a limit",
        start='resequence = ...\n\nawait mq.exercise("12.2").check(resequence)',
        hints=[
            "Keep four things: the number that is expected, the set of those that are held, the set of those that were "
            "given up, and the list that is returned.",
            "After each arrival: while the expected number is held, or more than `limit` are held, hand the expected "
            "one on, as in order or as missing, and expect the next.",
        ],
        solution=resequence,
        judge=judge_2,
        wrong=[has_no_limit, drops_late_ones, takes_late_ones_for_duplicates, sorts_them, one_too_few],
    ),
    "12.3": Task(
        question="Lanes, and what may be committed",
        start='side_by_side = ...\n\nawait mq.exercise("12.3").check(side_by_side)',
        hints=[
            "Sort the records into a list for each key, and start one task for each list, in an `asyncio.TaskGroup`. "
            "Catch what `work` raises inside the task, and end only this lane.",
            "Keep the set of offsets that are not done. What may be committed is the lowest of them, or, if there is "
            "none, the offset behind the last record.",
        ],
        solution=side_by_side,
        judge=judge_3,
        wrong=[a_task_for_each, one_by_one, goes_on_behind_a_failure, commits_the_last, commits_how_many],
    ),
}
