"""The exercises of notebook 07: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

import mqlib as mq
from mqlib.checks import Task, Wrong

EXPIRATIONS = [200, 100, 300, 1000, None]
COMES_OUT = [200, 200, 300, 400, 400]


async def _measured() -> list[int]:
    """When each of the five comes out, in ms."""
    rabbit, came = mq.rabbitmq(), dict[int, int]()
    async with mq.channel(rabbit) as channel:
        target = await channel.declare_queue(rabbit.name("exercise"), durable=True)
        route = {"x-message-ttl": 400, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": target.name}
        queue = await channel.declare_queue(rabbit.name("exercise-wait"), durable=True, arguments=route)
        start = time.perf_counter()

        async def arrive(message: AbstractIncomingMessage) -> None:
            came[int(message.body)] = int(1000 * (time.perf_counter() - start))
            await message.ack()

        await target.consume(arrive)
        for number, expiration in enumerate(EXPIRATIONS):
            message = Message(b"%d" % number, expiration=None if expiration is None else expiration / 1000)
            await channel.default_exchange.publish(message, queue.name)
        await mq.until(lambda: len(came) == len(EXPIRATIONS), within=5)
    return [came[number] for number in range(len(EXPIRATIONS))]


async def judge_1(answer: Any) -> None:
    try:
        given = [int(number) for number in answer]
    except (TypeError, ValueError):
        raise Wrong(f"give a list of five numbers; this is {answer!r}") from None
    if len(given) != len(EXPIRATIONS):
        raise Wrong(f"there are five messages, and {len(given)} numbers")
    measured = await _measured()
    for place, (mine, right) in enumerate(zip(given, COMES_OUT, strict=True), start=1):
        if mine != right:
            raise Wrong(f"message {place} does not come out after {mine} ms; just now it took {measured[place - 1]} ms")


def judge_2(catch_up: Any) -> None:
    numbers = random.Random(7)
    cases = [(100, 10, 95), (100, 10, 100), (100, 10, 109), (100, 10, 110), (100, 10, 135), (0, 60_000, 150_000)]
    cases += [(numbers.randrange(1000), numbers.randrange(1, 50), numbers.randrange(2000)) for _ in range(200)]
    for due, every, now in cases:
        ticks = list(range(due, now + 1, every))
        following = ticks[-1] + every if ticks else due
        for policy, sent in {"all": ticks, "once": ticks[-1:], "skip": [tick for tick in ticks if tick == now]}.items():
            call = f"catch_up({due}, {every}, {now}, {policy!r})"
            answer = catch_up(due, every, now, policy)
            try:
                given = (list(answer[0]), answer[1])
            except (TypeError, IndexError):
                raise Wrong(f"{call} gave {answer!r}, which is no pair of a list and a number") from None
            if given != (sent, following):
                raise Wrong(f"{call} gave {given}; it should be {(sent, following)}")


def catch_up(due, every, now, policy):
    ticks = list(range(due, now + 1, every))
    following = due + every * len(ticks)
    if policy == "once":
        ticks = ticks[-1:]
    if policy == "skip":
        ticks = [tick for tick in ticks if tick == now]
    return ticks, following


def drifts(due: int, every: int, now: int, policy: str) -> Any:
    ticks, following = catch_up(due, every, now, policy)
    return ticks, now + every if ticks else following


def forgets_the_outage(due: int, every: int, now: int, policy: str) -> Any:
    return ([due], due + every) if due <= now else ([], due)


def leaves_out_now(due: int, every: int, now: int, policy: str) -> Any:
    return catch_up(due, every, now - 1, policy)


def sends_the_first(due: int, every: int, now: int, policy: str) -> Any:
    ticks, following = catch_up(due, every, now, "all")
    return (ticks[:1] if policy == "once" else catch_up(due, every, now, policy)[0]), following


def skip_sends_one(due: int, every: int, now: int, policy: str) -> Any:
    return catch_up(due, every, now, "once" if policy == "skip" else policy)


LOG: list[tuple[bytes, bytes | None]] = [  # id, due; b"" stands for a record without the header
    (b"a", b"1300"), (b"b", b"900"), (b"c", b"1200"), (b"d", b"5000"), (b"c", None), (b"e", b""), (b"f", b"soon"),
    (b"g", b"1500"), (b"g", b"later"), (b"h", b"700"), (b"h", None), (b"h", b"1100"), (b"i", None), (b"d", b"1000"),
]  # fmt: skip
WAITING = [b"b", b"d", b"h", b"a", b"g"]


async def judge_3(waiting: Any) -> None:
    kafka = mq.kafka()
    timers = await mq.topic(kafka, "exercise", partitions=3, cleanup_policy="compact")
    async with mq.producer(kafka) as producer:
        for job, due in LOG:
            headers = [("due", due)] if due else []
            await producer.send(timers, None if due is None else b"job", key=job, headers=headers)
    try:
        async with asyncio.timeout(10):
            answer = await waiting(kafka, timers)
    except TimeoutError:
        raise Wrong("it had not returned after 10 s; is it waiting for a record that does not come?") from None
    try:
        given = list(answer)
    except TypeError:
        raise Wrong(f"give a list of ids; this is {answer!r}") from None
    if extra := [job for job in given if job not in WAITING]:
        why = {b"c": "a tombstone cancelled it", b"i": "there is only a tombstone", b"e": "its record has no due time"}
        raise Wrong(f"{extra[0]!r} does not wait: {why.get(extra[0], 'its due time is no number')}")
    if missing := [job for job in WAITING if job not in given]:
        why = {b"g": "what follows its schedule is none", b"h": "it was scheduled again behind the tombstone"}
        raise Wrong(f"{missing[0]!r} waits, too" + (f": {why[missing[0]]}" if missing[0] in why else ""))
    if given != WAITING:
        raise Wrong(f"these are the jobs that wait, but they are due in the order {WAITING}, not {given}")


async def waiting(kafka, timers):
    due = {}
    for record in await mq.read(kafka, timers):
        if record.value is None:
            due.pop(record.key, None)
            continue
        try:
            due[record.key] = int(dict(record.headers)["due"])
        except (KeyError, ValueError):
            continue
    return sorted(due, key=due.get)


async def _table(
    kafka: mq.Kafka, timers: str, tombstones: bool = True, first: bool = False, forget: bool = False
) -> dict[bytes, bytes]:
    due: dict[bytes, bytes] = {}
    for record in await mq.read(kafka, timers):
        found = dict(record.headers).get("due", b"")
        if record.value is None:
            if tombstones:
                due.pop(record.key, None)
        elif not found.isdigit():
            if forget:
                due.pop(record.key, None)
        elif not first or record.key not in due:
            due[record.key] = found
    return due


async def keeps_the_cancelled(kafka: mq.Kafka, timers: str) -> list[bytes]:
    due = await _table(kafka, timers, tombstones=False)
    return sorted(due, key=lambda job: int(due[job]))


async def keeps_the_first(kafka: mq.Kafka, timers: str) -> list[bytes]:
    due = await _table(kafka, timers, first=True)
    return sorted(due, key=lambda job: int(due[job]))


async def sorts_as_text(kafka: mq.Kafka, timers: str) -> list[bytes]:
    due = await _table(kafka, timers)
    return sorted(due, key=lambda job: due[job])


async def forgets_what_was(kafka: mq.Kafka, timers: str) -> list[bytes]:
    due = await _table(kafka, timers, forget=True)
    return sorted(due, key=lambda job: int(due[job]))


async def does_not_sort(kafka: mq.Kafka, timers: str) -> list[bytes]:
    return list(await _table(kafka, timers))


async def trips(kafka: mq.Kafka, timers: str) -> list[bytes]:
    last = {record.key: record for record in await mq.read(kafka, timers)}
    left = [record for record in last.values() if record.value is not None]
    return [record.key for record in sorted(left, key=lambda record: int(dict(record.headers)["due"]))]


TASKS = {
    "07.1": Task(
        question="When does each come out?",
        start='answer = ...\n\nawait mq.exercise("07.1").check(answer)',
        hints=[
            "For each message alone: the lower of its own expiration and the queue's TTL.",
            "A queue expires from its head: none comes out before the one in front of it.",
        ],
        solution=None,
        code="answer = [200, 200, 300, 400, 400]",
        judge=judge_1,
        wrong=[
            [200, 100, 300, 400, 400],
            [200, 200, 300, 1000, 1000],
            [200, 300, 600, 1000, 1400],
            [400, 400, 400, 400, 400],
            [200, 200],
            "soon",
        ],
    ),
    "07.2": Task(
        question="The next tick",
        start='catch_up = ...\n\nawait mq.exercise("07.2").check(catch_up)',
        hints=[
            "`range(due, now + 1, every)` is all that is due, in order.",
            "What is sent depends on the policy; the next due time does not: it is on the grid of `due`.",
        ],
        solution=catch_up,
        judge=judge_2,
        wrong=[drifts, forgets_the_outage, leaves_out_now, sends_the_first, skip_sends_one, 7],
    ),
    "07.3": Task(
        question="What waits?",
        start='waiting = ...\n\nawait mq.exercise("07.3").check(waiting)',
        hints=[
            "`await mq.read(kafka, timers)` gives all records; those of one id are in one partition, hence in order.",
            "Keep a dict of due times by id. A tombstone (`record.value is None`) takes its id out, a header that is "
            "no number is passed over, and `sorted(due, key=due.get)` is the answer.",
        ],
        solution=waiting,
        judge=judge_3,
        wrong=[keeps_the_cancelled, keeps_the_first, sorts_as_text, forgets_what_was, does_not_sort, trips],
    ),
}
