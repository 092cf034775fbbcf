"""The exercises of notebook 10: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import Any

from aio_pika import Message
from aio_pika.exceptions import DeliveryError
from aiokafka import TopicPartition

import mqlib as mq
from mqlib.checks import Task, Wrong


async def _visible(topic: str) -> list[int]:
    return [int(record.value) for record in await mq.read(mq.kafka(), topic, isolation_level="read_committed")]


async def _what_may_be_read() -> tuple[list[int], list[int]]:
    kafka = mq.kafka()
    topic = await mq.topic(kafka, "exercise")
    async with (
        mq.producer(kafka, transactional_id=kafka.name("a")) as a,
        mq.producer(kafka, transactional_id=kafka.name("b")) as b,
        mq.producer(kafka) as c,
    ):
        async with a.transaction():
            await a.send_and_wait(topic, b"1")
        await b.begin_transaction()
        await b.send_and_wait(topic, b"2")
        await c.send_and_wait(topic, b"3")
        async with a.transaction():
            await a.send_and_wait(topic, b"4")
        first = await _visible(topic)
        await b.abort_transaction()
        return first, await _visible(topic)


async def judge_1(answer: Any) -> None:
    try:
        given = [[int(number) for number in numbers] for numbers in answer]
    except (TypeError, ValueError):
        raise Wrong(f"give two lists of numbers, as [[1, 2], [1, 2, 3]]; this is {answer!r}") from None
    if len(given) != 2:
        raise Wrong(f"the reader comes twice; these are {len(given)} lists")
    for when, numbers, observed in zip(
        ("before B aborts", "after B aborts"), given, await _what_may_be_read(), strict=True
    ):
        if extra := [number for number in numbers if number not in observed]:
            raise Wrong(f"{when} the reader does not see {extra[0]}")
        if len(numbers) < len(observed):
            raise Wrong(f"{when} it sees more than {numbers}")
        if numbers != observed:
            raise Wrong(f"{when} it sees these, but not in the order, or not as often, as {numbers}")


SLOW_NETWORK = 0.04
WORDS = {"stored", "refused", "unknown"}


async def _publish(publish: Any, channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    start = time.monotonic()
    try:
        async with asyncio.timeout(4):
            outcome = await publish(channel, name, bodies)
    except TimeoutError:
        raise Wrong("it had not returned after 4 s") from None
    except DeliveryError as error:
        raise Wrong(f"it raised {type(error).__name__}, which is the broker's refusal of one message") from None
    if (took := time.monotonic() - start) > 2:
        raise Wrong(f"{len(bodies)} messages took {took:.1f} s; does it wait for one before it publishes the next?")
    if not isinstance(outcome, dict) or sorted(outcome) != list(range(len(bodies))):
        raise Wrong(f"give a dict with the positions 0 to {len(bodies) - 1}; this is {str(outcome)[:80]}")
    if odd := [word for word in outcome.values() if word not in WORDS]:
        raise Wrong(f"{odd[0]!r} is none of the three words")
    return outcome


async def judge_2(publish: Any) -> None:
    rabbit = mq.rabbitmq()
    bodies = [b"%d" % number for number in range(30)]
    arguments = {"x-max-length": 10, "x-overflow": "reject-publish"}
    async with mq.proxy(rabbit) as network, mq.channel(rabbit) as near:
        narrow = await near.declare_queue(rabbit.name("exercise"), durable=True, arguments=arguments)
        wide = await near.declare_queue(rabbit.name("exercise"), durable=True)
        async with mq.channel(network) as channel:
            network.delay = SLOW_NETWORK
            outcome = await _publish(publish, channel, narrow.name, bodies)
            await near.declare_queue(narrow.name, passive=True)  # whatever was written before is there now
        network.delay = 0
        held = {int(message.body) for message in await mq.take_messages(narrow, 30, within=0)}
        for place, word in outcome.items():
            if word == "stored" and place not in held:
                raise Wrong(f"it says that message {place} is stored; the queue was full and does not have it")
            if word != "stored" and place in held:
                raise Wrong(f"it says that message {place} is {word}; it is in the queue, and was confirmed")
            if word == "unknown":
                raise Wrong(f"it says that message {place} is unknown; the broker did answer: it refused it")
        async with mq.channel(network) as channel:
            with network.swallow("down"):
                outcome = await _publish(publish, channel, wide.name, bodies[:6])
    words = Counter(outcome.values())
    if words["unknown"] != 6:
        raise Wrong(f"six messages got no answer, and may be stored; it says {dict(words)}")


async def publish(channel, name, bodies):
    import asyncio

    from aio_pika import Message
    from aio_pika.exceptions import DeliveryError

    async def one(body):
        try:
            async with asyncio.timeout(0.5):
                await channel.default_exchange.publish(Message(body), name)
        except DeliveryError:
            return "refused"
        except OSError:  # no answer in time, or the connection was lost
            return "unknown"
        return "stored"

    return dict(enumerate(await asyncio.gather(*map(one, bodies))))


async def _one(channel: Any, name: str, body: bytes, within: float = 0.5) -> str:
    try:
        async with asyncio.timeout(within):
            await channel.default_exchange.publish(Message(body), name)
    except DeliveryError:
        return "refused"
    except OSError:
        return "unknown"
    return "stored"


async def one_by_one(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    return {place: await _one(channel, name, body) for place, body in enumerate(bodies)}


async def all_or_error(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    await asyncio.gather(*(channel.default_exchange.publish(Message(body), name) for body in bodies))
    return dict.fromkeys(range(len(bodies)), "stored")


async def looks_away(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    await asyncio.gather(*(_one(channel, name, body) for body in bodies))
    return dict.fromkeys(range(len(bodies)), "stored")


async def silence_is_refusal(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    words = await asyncio.gather(*(_one(channel, name, body) for body in bodies))
    return dict(enumerate("stored" if word == "stored" else "refused" for word in words))


async def refusal_is_unknown(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    words = await asyncio.gather(*(_one(channel, name, body) for body in bodies))
    return dict(enumerate("stored" if word == "stored" else "unknown" for word in words))


async def waits_for_ever(channel: Any, name: str, bodies: list[bytes]) -> dict[int, str]:
    return dict(enumerate(await asyncio.gather(*(_one(channel, name, body, within=60) for body in bodies))))


RECORDS = 12


async def judge_3(move: Any) -> None:
    kafka = mq.kafka()
    source, target = await mq.topic(kafka, "exercise"), await mq.topic(kafka, "exercise")
    part, group, tries = TopicPartition(source, 0), kafka.name("exercise"), Counter[bytes]()
    async with mq.producer(kafka) as filling:
        for number in range(RECORDS):
            await filling.send(source, b"%d" % number)

    async def work(value: bytes) -> bytes:
        tries[value] += 1
        if (value == b"3" and tries[value] < 3) or (value == b"11" and tries[value] < 2):
            raise RuntimeError(f"{value.decode()} fails now and then")
        return b"done " + value

    wanted = Counter(b"done %d" % number for number in range(RECORDS))
    options = {"group_id": group, "enable_auto_commit": False}
    async with (
        mq.consumer(kafka, **options) as consumer,
        mq.producer(kafka, transactional_id=kafka.name("exercise")) as producer,
    ):
        consumer.assign([part])
        sizes = _watch(consumer, producer)
        try:
            async with asyncio.timeout(5):
                await move(consumer, producer, part, target, group, work)
        except TimeoutError:
            raise Wrong("it had not returned after 5 s") from None
        except RuntimeError as error:
            raise Wrong(f"it ended with the error of `work`: {error}") from None
        values, committed = await _settled(kafka, target, consumer, part, wanted)
    if missing := sorted(wanted - Counter(values)):
        raise Wrong(f"{missing[0]!r} is not in what is committed; {len(missing)} of {RECORDS} are missing")
    if extra := sorted(Counter(values) - wanted):
        raise Wrong(f"{extra[0]!r} is committed more than once, or was never there")
    if committed != RECORDS:
        raise Wrong(f"all {RECORDS} records are done, and the group's offset is {committed}")
    if max(sizes) > 5:
        raise Wrong(f"a transaction of {max(sizes)} records; five are allowed")


async def _settled(
    kafka: mq.Kafka, target: str, consumer: Any, part: TopicPartition, wanted: Counter[bytes]
) -> tuple[list[bytes], int]:
    """What is committed, values and offset. Kafka writes the markers of a transaction after it has answered."""

    async def found() -> tuple[list[bytes], int]:
        records = await mq.read(kafka, target, isolation_level="read_committed")
        return [record.value for record in records], await consumer.committed(part) or 0

    async def right() -> bool:
        values, committed = await found()
        return Counter(values) == wanted and committed == RECORDS

    with contextlib.suppress(TimeoutError):
        await mq.until(right, within=1)
    return await found()


def _watch(consumer: Any, producer: Any) -> list[int]:
    """The number of records that were sent in each transaction that was committed; the last is of the open one."""
    sizes, send, commit, abort = [0], producer.send, producer.commit_transaction, producer.abort_transaction

    async def counted(*arguments: Any, **options: Any) -> Any:
        sizes[-1] += 1
        return await send(*arguments, **options)

    async def committing() -> None:
        await commit()
        sizes.append(0)

    async def aborting() -> None:
        await abort()
        sizes[-1] = 0

    async def commit_of_the_consumer(*_: Any) -> None:
        raise Wrong("it commits the offset by itself, and not in the transaction: a crash in between repeats records")

    producer.send, producer.commit_transaction, producer.abort_transaction = counted, committing, aborting
    consumer.commit = commit_of_the_consumer
    return sizes


async def move(consumer, producer, part, target, group, work):
    end = (await consumer.end_offsets([part]))[part]
    done = await consumer.position(part)
    while done < end:
        records = await mq.take(consumer, min(5, end - done))
        try:
            async with producer.transaction():
                for record in records:
                    await producer.send_and_wait(target, await work(record.value))
                then = records[-1].offset + 1
                await producer.send_offsets_to_transaction({part: then}, group)
            done = then
        except Exception:  # it was aborted; the consumer is already behind these records
            consumer.seek(part, done)


async def _moved(
    consumer: Any, producer: Any, part: Any, target: str, group: str, work: Any,
    size: int = 5, again: bool = True, whole: bool = True, beyond: int = 1, offsets: str = "inside",
) -> None:  # fmt: skip
    """The solution, or what is wrong with it."""
    end, done = (await consumer.end_offsets([part]))[part], await consumer.position(part)
    deadline = time.monotonic() + 4
    while done < end and time.monotonic() < deadline:
        records = (await mq.take(consumer, min(size, end - done), within=1)) or [None]
        then = records[-1].offset + 1 if records[-1] else end
        try:
            async with producer.transaction():
                for record in records:
                    try:
                        await producer.send_and_wait(target, await work(record.value))
                    except RuntimeError:
                        if whole:
                            raise
                if offsets == "inside":
                    await producer.send_offsets_to_transaction({part: then - 1 + beyond}, group)
            if offsets == "outside":
                await consumer.commit({part: then})
            done = then
        except RuntimeError:
            if again:
                consumer.seek(part, done)
            else:
                done = then


async def all_in_one(*arguments: Any) -> None:
    await _moved(*arguments, size=100)


async def forgets_to_go_back(*arguments: Any) -> None:
    await _moved(*arguments, again=False)


async def skips_what_fails(*arguments: Any) -> None:
    await _moved(*arguments, whole=False)


async def commits_the_last_one(*arguments: Any) -> None:
    await _moved(*arguments, beyond=0)


async def commits_outside(*arguments: Any) -> None:
    await _moved(*arguments, offsets="outside")


async def commits_nothing(*arguments: Any) -> None:
    await _moved(*arguments, offsets="nowhere")


async def commits_what_it_has(
    consumer: Any, producer: Any, part: Any, target: str, group: str, work: Any
) -> None:  # fmt: skip
    """It catches the error inside the transaction, which is then committed, and begins again."""
    end, done = (await consumer.end_offsets([part]))[part], 0
    while done < end:
        records = await mq.take(consumer, min(5, end - done))
        async with producer.transaction():
            try:
                for record in records:
                    await producer.send_and_wait(target, await work(record.value))
                done = records[-1].offset + 1
                await producer.send_offsets_to_transaction({part: done}, group)
            except RuntimeError:
                consumer.seek(part, done)


async def gives_up(consumer: Any, producer: Any, part: Any, target: str, group: str, work: Any) -> None:
    records = await mq.take(consumer, 5, within=1)
    async with producer.transaction():
        for record in records:
            await producer.send_and_wait(target, await work(record.value))


TASKS = {
    "10.1": Task(
        question="What may be read?",
        start='answer = ...\n\nawait mq.exercise("10.1").check(answer)',
        hints=[
            "Where does the oldest open transaction begin? That is the last stable offset.",
            "A reader with `read_committed` stops there, also before records of others. When B has aborted, nothing is "
            "open; 2 is skipped.",
        ],
        solution=None,
        code="answer = [[1], [1, 3, 4]]",
        judge=judge_1,
        wrong=[[[1, 3, 4], [1, 3, 4]], [[1], [1, 4]], [[1], [1, 2, 3, 4]], [[], [1, 3, 4]], [[1]], "nothing"],
    ),
    "10.2": Task(
        question="Say what you know",
        start='publish = ...\n\nawait mq.exercise("10.2").check(publish)',
        hints=[
            "Write `async def one(body)` that publishes one message and returns its word, and gather all of them.",
            "A refusal raises `aio_pika.exceptions.DeliveryError`. `async with asyncio.timeout(0.5)` raises "
            "`TimeoutError` when no answer came: the message may be stored all the same.",
        ],
        solution=publish,
        judge=judge_2,
        wrong=[one_by_one, all_or_error, looks_away, silence_is_refusal, refusal_is_unknown, waits_for_ever],
    ),
    "10.3": Task(
        question="Try again, exactly once",
        start='move = ...\n\nawait mq.exercise("10.3").check(move)',
        hints=[
            "`async with producer.transaction()` aborts when its block raises. Catch the error around it, not in it.",
            "After an abort the consumer stands behind the records all the same: `consumer.seek(part, …)` back to the "
            "first of them. The offset to commit is that of the next record.",
        ],
        solution=move,
        judge=judge_3,
        wrong=[
            all_in_one,
            forgets_to_go_back,
            skips_what_fails,
            commits_the_last_one,
            commits_outside,
            commits_nothing,
            commits_what_it_has,
            gives_up,
        ],
    ),
}
