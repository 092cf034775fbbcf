"""The exercises of notebook 06: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from aio_pika import Message
from aiokafka import ConsumerRecord

import mqlib as mq
from mqlib.checks import Task, Wrong


def _to(dead: Any, **more: int) -> dict[str, Any]:
    route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    return route | {f"x-{name.replace('_', '-')}": value for name, value in more.items()}


async def _what_is_dead() -> list[tuple[int, str]]:
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel:
        dead = await channel.declare_queue(rabbit.name("exercise-dead"), durable=True)
        name = rabbit.name("exercise")
        await channel.declare_queue(name, durable=True, arguments=_to(dead, max_length=4))
        for number in range(6):
            await channel.default_exchange.publish(Message(b"%d" % number), name)
        async with mq.channel(rabbit) as worker:
            messages = await mq.take_messages(await worker.get_queue(name), 4, ack=False)
            await messages[0].ack()
            await messages[1].reject(requeue=False)
            await messages[2].reject(requeue=True)
        letters = await mq.take_messages(dead, 6, within=0.5)
    return sorted((int(letter.body), str(letter.headers["x-first-death-reason"])) for letter in letters)


async def judge_1(answer: Any) -> None:
    observed = await _what_is_dead()
    try:
        given = sorted((int(number), str(reason)) for number, reason in answer)
    except (TypeError, ValueError):
        raise Wrong(f"give a list of pairs, as [(0, 'reason'), …]; this is {answer!r}") from None
    numbers, dead = [number for number, _ in given], [number for number, _ in observed]
    if extra := sorted(set(numbers) - set(dead)):
        raise Wrong(f"{extra} are not in the dead-letter queue")
    if missing := sorted(set(dead) - set(numbers)):
        raise Wrong(f"{missing} are there, too")
    if given != observed:
        wrong = next(
            number for (number, reason), right in zip(given, observed, strict=False) if (number, reason) != right
        )
        raise Wrong(f"the numbers are right, but the reason of {wrong} is another one")


class Refused(RuntimeError):
    """What `send` raises for one of the letters."""


async def judge_2(triage: Any) -> None:
    rabbit = mq.rabbitmq()
    sent: dict[bytes, list[str]] = {}

    async def send(target: str, body: bytes) -> None:
        if body == b"refused":
            raise Refused("the target does not confirm")
        sent.setdefault(body, []).append(target)

    async with mq.channel(rabbit) as channel:
        dead = await channel.declare_queue(rabbit.name("exercise-dead"), durable=True)
        full, brief, work = (rabbit.name("exercise") for _ in range(3))
        await channel.declare_queue(full, durable=True, arguments=_to(dead, max_length=1))
        await channel.declare_queue(brief, durable=True, arguments=_to(dead, message_ttl=1))
        queue = await channel.declare_queue(work, durable=True, arguments=_to(dead))
        strange = {"x-first-death-reason": "from Mars"}
        for target, body, headers in (
            (full, b"overflowed", {}), (full, b"stays", {}), (brief, b"expired", {}), (work, b"rejected", {}),
            (work, b"refused", {}), (dead.name, b"no history", {}), (dead.name, b"strange", strange),
        ):  # fmt: skip
            await channel.default_exchange.publish(Message(body, headers=headers, delivery_mode=2), target)
        for message in await mq.take_messages(queue, 2, ack=False):
            await message.reject(requeue=False)
        async with mq.channel(rabbit) as reviewing:
            letters = await mq.take_messages(await reviewing.get_queue(dead.name), 6, ack=False)
            for letter in letters:
                try:
                    await triage(letter, send)
                except Refused:
                    raise Wrong("send raised, and triage let that out: the letters behind it are not seen") from None
        left = [message.body for message in await mq.take_messages(dead, 6, within=0.5)]
    right = {
        b"expired": ["work"], b"rejected": ["review"], b"overflowed": ["parked"], b"no history": ["parked"],
        b"strange": ["parked"],
    }  # fmt: skip
    for body, targets in right.items():
        if sent.get(body, []) != targets:
            raise Wrong(f"the letter {body.decode()!r} was sent to {sent.get(body, [])} instead of {targets}")
    if b"refused" not in left:
        raise Wrong("the letter that could not be sent is not in the dead-letter queue any more: it is lost")
    if len(left) > 1:
        raise Wrong(f"{left} are still in the dead-letter queue; all but b'refused' were sent, and will be sent again")


async def triage(message, send):
    reason = message.headers.get("x-first-death-reason")
    try:
        await send({"expired": "work", "rejected": "review"}.get(reason, "parked"), message.body)
    except Exception:
        await message.reject(requeue=True)
    else:
        await message.ack()


async def acknowledges_first(message: Any, send: Any) -> None:
    await message.ack()
    reason = message.headers.get("x-first-death-reason")
    with contextlib.suppress(Refused):
        await send({"expired": "work", "rejected": "review"}.get(reason, "parked"), message.body)


async def needs_a_history(message: Any, send: Any) -> None:
    deaths = message.headers.get("x-death", [])
    if deaths:
        await triage(message, send)
    else:
        await message.ack()


async def parks_what_expired(message: Any, send: Any) -> None:
    async def other(target: str, body: bytes) -> None:
        await send("parked" if target == "work" else target, body)

    await triage(message, other)


async def never_acknowledges(message: Any, send: Any) -> None:
    class Held:
        headers, body = message.headers, message.body

        async def ack(self) -> None:
            """Left out."""

        async def reject(self, requeue: bool) -> None:
            """Left out."""

    await triage(Held(), send)


async def lets_it_out(message: Any, send: Any) -> None:
    reason = message.headers.get("x-first-death-reason")
    await send({"expired": "work", "rejected": "review"}.get(reason, "parked"), message.body)
    await message.ack()


class _Slow:
    """A producer whose records take a while, so that it shows who does not wait for them."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.under_way: set[asyncio.Future[Any]] = set()

    async def send(self, *what: Any, **options: Any) -> asyncio.Future[Any]:
        async def later() -> Any:
            await asyncio.sleep(0.1)
            return await self._producer.send_and_wait(*what, **options)

        task = asyncio.ensure_future(later())
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task

    async def send_and_wait(self, *what: Any, **options: Any) -> Any:
        return await (await self.send(*what, **options))

    async def flush(self) -> None:
        await asyncio.wait(set(self.under_way))


async def judge_3(bury: Any) -> None:
    kafka = mq.kafka()
    source, dead = await mq.topic(kafka, "exercise", partitions=3), await mq.topic(kafka, "exercise-dead")
    headers = [("trace", b"1"), ("via", b"north"), ("via", b"south")]
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(source, b"before", partition=1)
        await producer.send_and_wait(source, b"\xff order", key=b"customer", partition=1, headers=headers)
        await producer.send_and_wait(source, None, key=b"customer", partition=2)
        slow = _Slow(producer)
        for record in [record for record in await mq.read(kafka, source) if record.value != b"before"]:
            error = ValueError(f"no such café: {record.partition}")
            await bury(slow, dead, record, error)
            if slow.under_way:
                await slow.flush()
                raise Wrong("when bury returned, the letter was not stored yet: a crash now would lose it")
            letters = await mq.read(kafka, dead)
            if not letters:
                raise Wrong("there is no letter in the dead-letter topic")
            _compare(letters[-1], record, str(error))


def _compare(letter: ConsumerRecord, record: ConsumerRecord, error: str) -> None:
    if letter.value != record.value:
        raise Wrong(f"the value is {letter.value!r} instead of {record.value!r}")
    if letter.key != record.key:
        raise Wrong(f"the key is {letter.key!r} instead of {record.key!r}")
    own = [header for header in letter.headers if not header[0].startswith("dead-letter-")]
    if own != list(record.headers):
        raise Wrong(f"the record's own headers are {own} instead of {list(record.headers)}")
    about = {"topic": record.topic, "partition": record.partition, "offset": record.offset, "error": error}
    found = dict(letter.headers)
    for name, value in about.items():
        if found.get(f"dead-letter-{name}") != str(value).encode():
            raise Wrong(
                f"dead-letter-{name} is {found.get(f'dead-letter-{name}')!r} instead of {str(value).encode()!r}"
            )


async def bury(producer, dead, record, error):
    about = {"topic": record.topic, "partition": record.partition, "offset": record.offset, "error": error}
    headers = [(f"dead-letter-{name}", str(value).encode()) for name, value in about.items()]
    await producer.send_and_wait(dead, record.value, key=record.key, headers=[*record.headers, *headers])


async def does_not_wait(producer: Any, dead: str, record: Any, error: Exception) -> None:
    class Hasty:
        send_and_wait = producer.send

    await bury(Hasty, dead, record, error)


async def loses_the_key(producer: Any, dead: str, record: Any, error: Exception) -> None:
    await bury(producer, dead, dataclasses.replace(record, key=None), error)


async def loses_a_header(producer: Any, dead: str, record: Any, error: Exception) -> None:
    await bury(producer, dead, dataclasses.replace(record, headers=tuple(dict(record.headers).items())), error)


async def trips_over_a_tombstone(producer: Any, dead: str, record: Any, error: Exception) -> None:
    await bury(producer, dead, dataclasses.replace(record, value=record.value or b""), error)


TASKS = {
    "06.1": Task(
        question="What is dead, and why?",
        start='answer = ...\n\nawait mq.exercise("06.1").check(answer)',
        hints=[
            "Two orders do not fit. Which ones leave: those at the head, or those that came last?",
            "What goes back into the queue is not dead, whether it was rejected with requeue or its worker crashed.",
            "The reasons are `maxlen` and `rejected`.",
        ],
        solution=None,
        code='answer = [(0, "maxlen"), (1, "maxlen"), (3, "rejected")]',
        judge=judge_1,
        wrong=[
            [(4, "maxlen"), (5, "maxlen"), (1, "rejected")],
            [(0, "maxlen"), (1, "maxlen"), (3, "rejected"), (5, "rejected")],
            [(0, "rejected"), (1, "maxlen"), (3, "rejected")],
            [(0, "maxlen"), (1, "maxlen")],
            [],
            "0, 1 and 3",
        ],
    ),
    "06.2": Task(
        question="Triage",
        start='triage = ...\n\nawait mq.exercise("06.2").check(triage)',
        hints=[
            "`message.headers.get('x-first-death-reason')` is `expired`, `rejected`, something else, or not there.",
            "First send, then acknowledge. `await message.reject(requeue=True)` puts a message back into its queue.",
        ],
        solution=triage,
        judge=judge_2,
        wrong=[acknowledges_first, needs_a_history, parks_what_expired, never_acknowledges, lets_it_out],
    ),
    "06.3": Task(
        question="A letter that knows where it came from",
        start='bury = ...\n\nawait mq.exercise("06.3").check(bury)',
        hints=[
            "`record.headers` is a sequence of pairs. A dict of it keeps one of two headers with the same name.",
            "`send` returns when the record is in the producer's buffer, `send_and_wait` when the broker has it.",
        ],
        solution=bury,
        judge=judge_3,
        wrong=[does_not_wait, loses_the_key, loses_a_header, trips_over_a_tombstone],
    ),
}
