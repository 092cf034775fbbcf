"""The exercises of notebook 02: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from aiokafka import TopicPartition

import mqlib as mq
from mqlib.checks import Task, Wrong


async def _ten(topic: str, count: int = 10) -> None:
    async with mq.producer(mq.kafka()) as producer:
        for number in range(count):
            await producer.send(topic, b"%d" % number, partition=0)


async def _cost(program: int) -> tuple[int, int]:
    """Lost and handled twice, when one of the four programs ends at record 4 and another one takes over."""
    kafka, effects = mq.kafka(), Counter[int]()
    topic, group = await mq.topic(kafka, "exercise"), kafka.name("exercise")
    await _ten(topic)
    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
        for record in (await mq.take(consumer, 10))[:5]:
            part = TopicPartition(topic, 0)
            if program == 2:
                await consumer.commit({part: record.offset + 1})
                if record.offset == 4:
                    break
            effects[record.offset] += 1
            if program == 3:
                await consumer.commit()
            if program == 4:
                await consumer.commit({part: record.offset})
    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
        begin = await consumer.committed(part) or 0
        for record in await mq.take(consumer, 10 - begin):
            effects[record.offset] += 1
    return 10 - len(effects), sum(count == 2 for count in effects.values())


async def judge_1(answer: Any) -> None:
    try:
        given = [(int(lost), int(twice)) for lost, twice in answer]
    except (TypeError, ValueError):
        raise Wrong(f"give a list of pairs, as [(0, 0), …]; this is {answer!r}") from None
    if len(given) != 4:
        raise Wrong(f"there are four programs; these are {len(given)} pairs")
    for program, (lost, twice) in enumerate(given, start=1):
        observed = await _cost(program)
        if lost != observed[0]:
            raise Wrong(f"program {program} lost {'more' if observed[0] > lost else 'fewer'} than {lost}")
        if twice != observed[1]:
            word = "more" if observed[1] > twice else "fewer"
            raise Wrong(f"program {program} and its successor handled {word} than {twice} twice")


HISTORY = 3000
BEGIN, END = 1_700_000_000_000, 1_700_000_060_000
AFTER_THE_HISTORY = {
    0: [BEGIN - 1, BEGIN, BEGIN + 20_000, END - 1, END, END + 5],
    1: [BEGIN + 10, END + 10_000, BEGIN + 30_000, END + 20_000],  # one that came late
    2: [],  # nothing is in the window, nor behind it
}


async def judge_2(replay: Any) -> None:
    kafka, wanted = mq.kafka(), Counter[bytes]()
    topic = await mq.topic(kafka, "exercise", partitions=4, retention_ms=-1)
    async with mq.producer(kafka, linger_ms=5) as producer:
        for partition, times in AFTER_THE_HISTORY.items():
            for place, moment in enumerate([BEGIN - HISTORY - 1 + each for each in range(HISTORY)] + times):
                value = b"%d-%d" % (partition, place)
                await producer.send(topic, value, partition=partition, timestamp_ms=moment)
                wanted[value] += BEGIN <= moment < END
    wanted = +wanted
    handed_over = 0
    async with mq.consumer(kafka) as consumer:
        one, many = consumer.getone, consumer.getmany

        async def getone(*parts: Any) -> Any:
            nonlocal handed_over
            record = await one(*parts)
            handed_over += 1
            return record

        async def getmany(*parts: Any, **options: Any) -> Any:
            nonlocal handed_over
            batch = await many(*parts, **options)
            handed_over += sum(map(len, batch.values()))
            return batch

        consumer.getone, consumer.getmany = getone, getmany
        try:
            async with asyncio.timeout(10):
                values = Counter(await replay(consumer, [TopicPartition(topic, each) for each in range(4)], BEGIN, END))
        except TimeoutError:
            raise Wrong("it had not returned after 10 s; is it waiting for a record that does not come?") from None
    if more := sorted(values - wanted):
        raise Wrong(f"{more[0]!r} is not in the window, or there twice; so are {len(more) - 1} others")
    if missing := sorted(wanted - values):
        raise Wrong(f"of {wanted.total()} records in the window {len(missing)} are missing: {missing[0]!r} is one")
    if handed_over > 100:
        raise Wrong(f"the values are right, but {handed_over} records were read to find them")


async def replay(consumer, parts, begin, end):
    found = await consumer.offsets_for_times(dict.fromkeys(parts, begin))
    starts = {part: first.offset for part, first in found.items() if first}
    ends = await consumer.end_offsets(list(starts))
    consumer.assign(list(starts))
    for part, offset in starts.items():
        consumer.seek(part, offset)
    values = []
    while any([await consumer.position(part) < ends[part] for part in starts]):
        for records in (await consumer.getmany(timeout_ms=100)).values():
            values += [record.value for record in records if begin <= record.timestamp < end]
    return values


async def _read(consumer: Any, starts: dict[TopicPartition, int]) -> list[Any]:
    """Everything from these offsets to the ends."""
    consumer.assign(list(starts))
    for part, offset in starts.items():
        consumer.seek(part, offset)
    ends, records = await consumer.end_offsets(list(starts)), []
    while any([await consumer.position(part) < ends[part] for part in starts]):
        for several in (await consumer.getmany(timeout_ms=100)).values():
            records += several
    return records


async def _starts(consumer: Any, parts: list[TopicPartition], begin: int) -> dict[TopicPartition, int]:
    found = await consumer.offsets_for_times(dict.fromkeys(parts, begin))
    return {part: first.offset for part, first in found.items() if first}


async def reads_the_history(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    records = await _read(consumer, dict.fromkeys(parts, 0))
    return [record.value for record in records if begin <= record.timestamp < end]


async def trusts_the_order_of_time(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    starts, last = await _starts(consumer, parts, begin), await _starts(consumer, parts, end)
    return [
        record.value for record in await _read(consumer, starts) if record.offset < last[TopicPartition(*record[:2])]
    ]


async def forgets_the_end(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    return [record.value for record in await _read(consumer, await _starts(consumer, parts, begin))]


async def one_partition(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    return await replay(consumer, parts[:1], begin, end)


async def trips_over_none(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    found = await consumer.offsets_for_times(dict.fromkeys(parts, begin))
    return [record.value for record in await _read(consumer, {part: first.offset for part, first in found.items()})]


async def includes_the_end(consumer: Any, parts: list[TopicPartition], begin: int, end: int) -> list[bytes]:
    return await replay(consumer, parts, begin, end + 1)


async def judge_3(run: Any) -> None:
    kafka, gate = mq.kafka(), asyncio.Event()
    topic, group = await mq.topic(kafka, "exercise"), kafka.name("exercise")
    part, worked = TopicPartition(topic, 0), Counter[int]()
    await _ten(topic, 20)

    async def work(record: Any) -> None:
        if record.offset == 5:
            await gate.wait()
        if record.offset == 12:
            raise RuntimeError("record 12 cannot be done")
        worked[record.offset] += 1

    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
        commit, highest = consumer.commit, 0

        async def watched(offsets: Any = None) -> None:
            nonlocal highest
            await commit(offsets)
            highest = max(highest, await consumer.committed(part) or 0)

        consumer.commit = watched
        task = asyncio.ensure_future(run(consumer, work, 20))
        try:
            others = set(range(20)) - {5, 12}
            with contextlib.suppress(TimeoutError):
                await mq.until(lambda: task.done() or (others <= set(worked) and highest >= 5), within=5)
            if task.done():
                task.result()
                raise Wrong("it returned while record 5 was still being worked on")
            if missing := others - set(worked):
                raise Wrong(f"record 5 takes long, and {len(missing)} others, which could go on, were not done in 5 s")
            if highest < 5:
                raise Wrong(f"records 0 to 4 are done, 5 is not, and for 5 s what is committed is {highest}")
            _refuse(highest, 5, "record 5 is still being worked on")
            gate.set()
            await asyncio.wait({task}, timeout=5)
            if not task.done():
                raise Wrong("all records have ended, and 5 s later it has not returned")
            task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
        _refuse(highest, 12, "record 12 failed")
        if highest < 12:
            raise Wrong(f"records 0 to 11 are done; when it returned, {highest} was committed")
        if again := [number for number, count in worked.items() if count > 1]:
            raise Wrong(f"records {again} were worked on more than once")


def _refuse(highest: int, limit: int, because: str) -> None:
    if highest > limit:
        raise Wrong(f"it committed {highest}, which covers record {limit}; {because}")


async def run(consumer, work, count):
    from aiokafka import TopicPartition

    records = await mq.take(consumer, count)
    part = TopicPartition(records[0].topic, records[0].partition)
    first = committed = records[0].offset  # the first that is not done
    done, lock = set(), asyncio.Lock()

    async def one(record):
        nonlocal first, committed
        try:
            await work(record)
        except Exception:
            return
        done.add(record.offset)
        while first in done:
            first += 1
        async with lock:  # one commit at a time, so that none moves back
            if first > committed:
                committed = first
                await consumer.commit({part: committed})

    async with asyncio.TaskGroup() as group:
        for record in records:
            group.create_task(one(record))


async def _all_at_once(consumer: Any, work: Any, count: int, after: Any) -> None:
    """Works on all records together, and calls `after(record, done)` behind each that is done."""
    done: list[int] = []

    async def one(record: Any) -> None:
        try:
            await work(record)
        except Exception:
            return
        done.append(record.offset)
        await after(record, done)

    await asyncio.gather(*(one(record) for record in await mq.take(consumer, count)))


async def commits_each_record(consumer: Any, work: Any, count: int) -> None:
    async def after(record: Any, done: list[int]) -> None:
        await consumer.commit({TopicPartition(record.topic, 0): record.offset + 1})

    await _all_at_once(consumer, work, count, after)


async def commits_the_position(consumer: Any, work: Any, count: int) -> None:
    await _all_at_once(consumer, work, count, lambda record, done: consumer.commit())


async def commits_how_many(consumer: Any, work: Any, count: int) -> None:
    async def after(record: Any, done: list[int]) -> None:
        await consumer.commit({TopicPartition(record.topic, 0): len(done)})

    await _all_at_once(consumer, work, count, after)


async def commits_at_the_end(consumer: Any, work: Any, count: int) -> None:
    done: list[int] = []
    topics = []

    async def after(record: Any, so_far: list[int]) -> None:
        done.append(record.offset)
        topics.append(record.topic)

    await _all_at_once(consumer, work, count, after)
    first = next(number for number in range(count + 1) if number not in done)
    await consumer.commit({TopicPartition(topics[0], 0): first})


async def one_by_one(consumer: Any, work: Any, count: int) -> None:
    for record in await mq.take(consumer, count):
        await work(record)
        await consumer.commit({TopicPartition(record.topic, 0): record.offset + 1})


async def ends_with_the_first_error(consumer: Any, work: Any, count: int) -> None:
    async with asyncio.TaskGroup() as group:
        for record in await mq.take(consumer, count):
            group.create_task(work(record))


async def does_it_twice(consumer: Any, work: Any, count: int) -> None:
    async def twice(record: Any) -> None:
        await work(record)
        await work(record)

    await run(consumer, twice, count)


TASKS = {
    "02.1": Task(
        question="What does the crash cost?",
        start='answer = ...\n\nawait mq.exercise("02.1").check(answer)',
        hints=[
            "For each program ask two things: which effects are there, and what offset is committed?",
            "The successor begins at the committed offset, which is the next record to read. A bare `commit()` commits "
            "the position: 10, from the moment when `getmany` returned.",
        ],
        solution=None,
        code="answer = [(0, 5), (1, 0), (5, 0), (0, 1)]",
        judge=judge_1,
        wrong=[
            [(0, 0), (1, 0), (5, 0), (0, 1)],
            [(0, 5), (0, 1), (5, 0), (0, 1)],
            [(0, 5), (1, 0), (0, 0), (0, 1)],
            [(0, 5), (1, 0), (5, 0), (0, 0)],
            [(0, 5)],
            "none",
        ],
    ),
    "02.2": Task(
        question="Replay a window",
        start='replay = ...\n\nawait mq.exercise("02.2").check(replay)',
        hints=[
            "`offsets_for_times` says where to begin in each partition, and `None` where nothing is that late. Assign "
            "the others and seek.",
            "A record of the window may lie behind one that is too late, so read to `end_offsets` and look at each "
            "timestamp. `position` says how far you are.",
        ],
        solution=replay,
        judge=judge_2,
        wrong=[
            reads_the_history,
            trusts_the_order_of_time,
            forgets_the_end,
            one_partition,
            trips_over_none,
            includes_the_end,
        ],
    ),
    "02.3": Task(
        question="Never jump over one",
        start='run = ...\n\nawait mq.exercise("02.3").check(run)',
        hints=[
            "Keep a set of the offsets that are done, and the first offset that is not. When a record is done, move "
            "that first one on while it is in the set.",
            "Commit when it moved: `await consumer.commit({TopicPartition(record.topic, record.partition): first})`. "
            "Catch what `work` raises inside each task, or it cancels the others.",
        ],
        solution=run,
        judge=judge_3,
        wrong=[
            commits_each_record,
            commits_the_position,
            commits_how_many,
            commits_at_the_end,
            one_by_one,
            ends_with_the_first_error,
            does_it_twice,
        ],
    ),
}
