"""The exercises of notebook 11: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import mqlib as mq
from mqlib.checks import Task, Wrong

GIVEN_BACK = [
    (12, "an eager member gives back all it has, so the three give back 12"),
    (12, "sticky is eager, too: all 12 are given back first, and then most of them are given again"),
    (3, "12 among four are 3 each, and only the 3 that the newcomer gets have to move"),
    (12, "static membership is about restarts; a name that the group does not know yet is a join like any other"),
    (0, "it is back inside its session timeout, with its name: the others are told nothing"),
]


def judge_1(answer: Any) -> None:
    try:
        given = [int(number) for number in answer]
    except (TypeError, ValueError):
        raise Wrong(f"give a list of five numbers; this is {answer!r}") from None
    if len(given) != len(GIVEN_BACK):
        raise Wrong(f"give a list of five numbers; these are {len(given)}")
    for place, (number, (right, why)) in enumerate(zip(given, GIVEN_BACK, strict=True), start=1):
        if number != right:
            raise Wrong(f"number {place} is not {number}: {why}")


CASES: list[tuple[str, dict[str, set[int]], list[str], int]] = [
    ("a third member joins", {"A": {0, 1, 2}, "B": {3, 4, 5}}, ["A", "B", "C"], 6),
    ("nothing changes", {"A": {0, 3}, "B": {1, 2}}, ["B", "A"], 4),
    ("one of three leaves", {"A": {0, 1}, "B": {2, 3}, "C": {4, 5}}, ["C", "A"], 6),
    ("the first start", {}, ["A", "B", "C"], 7),
    ("more members than partitions", {"A": {0, 1}}, ["A", "B", "C"], 2),
    ("7 partitions, and B has the larger share", {"A": {0, 1, 2}, "B": {3, 4, 5, 6}}, ["A", "B"], 7),
    ("8 partitions, and the last member has most", {"A": {0}, "B": {1, 2}, "C": {3, 4, 5, 6, 7}}, ["A", "B", "C"], 8),
    ("two were added to the topic", {"A": {0, 1}, "B": {2, 3}}, ["A", "B"], 6),
    ("all old members are gone", {"A": {0, 1}, "B": {2}}, ["X", "Y"], 3),
    ("partition 3 is no more", {"A": {0, 3}, "B": {1, 2}}, ["A", "B"], 3),
]


def _kept(owned: Mapping[str, set[int]], shares: Mapping[str, set[int]]) -> int:
    return sum(len(owned.get(name, set()) & share) for name, share in shares.items())


def _at_best(owned: Mapping[str, set[int]], members: list[str], count: int) -> int:
    small, larger = divmod(count, len(members))
    have = sorted((len({part for part in owned.get(name, set()) if part < count}) for name in members), reverse=True)
    return sum(min(number, small + (place < larger)) for place, number in enumerate(have))


def judge_2(assign: Any) -> None:
    for name, owned, members, count in CASES:
        answer = assign({member: set(share) for member, share in owned.items()}, list(members), count)
        shares = {member: {int(part) for part in answer[member]} for member in answer}
        if sorted(shares) != sorted(members):
            raise Wrong(f"{name}: the members are {sorted(members)}, and shares were given to {sorted(shares)}")
        given = sorted(part for share in shares.values() for part in share)
        if given != list(range(count)):
            raise Wrong(f"{name}: 0 to {count - 1} must be given once each; given were {given}")
        sizes = sorted(map(len, shares.values()))
        if sizes[-1] - sizes[0] > 1:
            raise Wrong(f"{name}: the shares have {sizes} partitions")
        kept, best = _kept(owned, shares), _at_best(owned, members, count)
        if kept < best:
            raise Wrong(f"{name}: {best} partitions can stay where they are, and {kept} do")


def assign(owned, members, count):
    small, larger = divmod(count, len(members))
    had = {name: sorted(part for part in owned.get(name, ()) if part < count) for name in members}
    most_first = sorted(members, key=lambda name: -len(had[name]))
    sizes = {name: small + (place < larger) for place, name in enumerate(most_first)}
    shares = {name: set(had[name][: sizes[name]]) for name in members}
    free = [part for part in range(count) if not any(part in share for share in shares.values())]
    for name in members:
        while len(shares[name]) < sizes[name]:
            shares[name].add(free.pop())
    return shares


def in_turns(owned: Any, members: Any, count: int) -> Any:
    return {name: set(range(place, count, len(members))) for place, name in enumerate(members)}


def keeps_everything(owned: Any, members: Any, count: int) -> Any:
    shares = {name: {part for part in owned.get(name, ()) if part < count} for name in members}
    for part in set(range(count)).difference(*shares.values()):
        shares[min(members, key=lambda name: len(shares[name]))].add(part)
    return shares


def larger_shares_by_name(owned: Any, members: Any, count: int) -> Any:
    small, larger = divmod(count, len(members))
    sizes = {name: small + (place < larger) for place, name in enumerate(sorted(members))}
    had = {name: sorted(part for part in owned.get(name, ()) if part < count) for name in members}
    shares = {name: set(had[name][: sizes[name]]) for name in members}
    free = sorted(set(range(count)).difference(*shares.values()))
    for name in members:
        while len(shares[name]) < sizes[name]:
            shares[name].add(free.pop())
    return shares


async def judge_3(run: Any) -> None:
    kafka, ledger, stop, started = mq.kafka(), mq.Ledger(), asyncio.Event(), asyncio.Event()
    topic, group = await mq.topic(kafka, "exercise", partitions=2), kafka.name("exercise")
    options = {"group_id": group, "enable_auto_commit": False, "heartbeat_interval_ms": 200}
    done = set[int]()
    async with mq.producer(kafka) as producer:
        for number in range(60):
            ledger.sent(number)
            await producer.send(topic, b"%d" % number, partition=number % 2)

    async def work(record: Any) -> None:
        await asyncio.sleep(0.02)
        ledger.received(int(record.value))
        done.add(int(record.value))
        started.set()

    async with mq.consumer(kafka, **options) as first, mq.consumer(kafka, **options) as second:
        tasks = [asyncio.ensure_future(run(first, topic, work, stop))]
        try:
            waiting = asyncio.ensure_future(started.wait())
            await asyncio.wait([*tasks, waiting], timeout=5, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            tasks.append(asyncio.ensure_future(run(second, topic, work, stop)))
            every = asyncio.ensure_future(mq.until(lambda: len(done) == 60, within=5))
            await asyncio.wait([*tasks, every], return_when=asyncio.FIRST_COMPLETED)
            stopped_early = not every.done()
            every.cancel()
            await asyncio.wait([every])
            stop.set()
            _, late = await asyncio.wait(tasks, timeout=3)
        finally:
            for task in tasks:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    if late:
        raise Wrong("it had not returned 3 s after the order to stop")
    if ledger.lost:
        early = ", and it returned before the order to stop" if stopped_early else ""
        raise Wrong(f"{ledger.lost} of 60 records were never worked on{early}")
    if ledger.duplicated:
        raise Wrong(f"{ledger.duplicated} records were worked on twice: by both members, or again by the first")


async def run(consumer, topic, work, stop):
    from aiokafka import ConsumerRebalanceListener, TopicPartition

    done, idle = {}, asyncio.Lock()

    class Listener(ConsumerRebalanceListener):
        async def on_partitions_revoked(self, revoked):
            async with idle:  # let the record in hand end
                if mine := {part: done[part] for part in revoked if part in done}:
                    await consumer.commit(mine)
                done.clear()

        async def on_partitions_assigned(self, assigned):
            pass

    consumer.subscribe([topic], listener=Listener())
    while not stop.is_set():
        for part, records in (await consumer.getmany(timeout_ms=100, max_records=1)).items():
            for record in records:
                async with idle:
                    if part in consumer.assignment():
                        await work(record)
                        done[TopicPartition(topic, record.partition)] = record.offset + 1


async def without_a_listener(consumer: Any, topic: str, work: Any, stop: asyncio.Event) -> None:
    consumer.subscribe([topic])
    while not stop.is_set():
        for records in (await consumer.getmany(timeout_ms=100)).values():
            for record in records:
                await work(record)
        await consumer.commit()


async def commits_the_position(consumer: Any, topic: str, work: Any, stop: asyncio.Event) -> None:
    from aiokafka import ConsumerRebalanceListener

    gone = set[Any]()

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
        async def on_partitions_revoked(self, revoked: Any) -> None:
            gone.update(revoked)
            if revoked:
                await consumer.commit()

        async def on_partitions_assigned(self, assigned: Any) -> None:
            gone.clear()

    consumer.subscribe([topic], listener=Listener())
    while not stop.is_set():
        for part, records in (await consumer.getmany(timeout_ms=100)).items():
            for record in records:
                if part in gone or part not in consumer.assignment():
                    break
                await work(record)


TASKS = {
    "11.1": Task(
        question="What is given back?",
        start='answer = ...\n\nawait mq.exercise("11.1").check(answer)',
        hints=[
            "Eager: everything is revoked first, whatever the assignor then decides.",
            "Cooperative: 12 among 4 are 3 each. Static: the group recognizes who was there before.",
        ],
        solution=None,
        code="answer = [12, 12, 3, 12, 0]",
        judge=judge_1,
        wrong=[[12, 3, 3, 12, 0], [12, 12, 3, 0, 0], [12, 12, 12, 12, 0], [12, 12], "none"],
    ),
    "11.2": Task(
        question="A sticky assignor",
        start='assign = ...\n\nawait mq.exercise("11.2").check(assign)',
        hints=[
            "`small, larger = divmod(count, len(members))`: `larger` of the shares have `small + 1`.",
            "Give the larger shares to those who have most. Then cut each to its size, and fill up from the rest.",
        ],
        solution=assign,
        judge=judge_2,
        wrong=[in_turns, keeps_everything, larger_shares_by_name],
    ),
    "11.3": Task(
        question="Give back what is done",
        start='run = ...\n\nawait mq.exercise("11.3").check(run)',
        hints=[
            "`consumer.subscribe([topic], listener=…)`: commit in `on_partitions_revoked`, with `record.offset + 1` of "
            "what is worked on. A bare `commit()` commits what was handed over.",
            "The order may come while a record is in hand: a lock lets it end first. What came from `getmany` and is "
            "not begun must not be begun when its partition is gone.",
        ],
        solution=run,
        judge=judge_3,
        wrong=[without_a_listener, commits_the_position],
    ),
}
