"""The exercises of notebook 01: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mqlib as mq
from mqlib.checks import Task, Wrong


async def _how_many_are_stored() -> tuple[int, int]:
    kafka = mq.kafka()
    first, second = [await mq.topic(kafka, "exercise", max_message_bytes=1000) for _ in range(2)]
    async with mq.producer(kafka) as producer:
        for _ in range(3):
            await producer.send_and_wait(first, b"x" * 400)
    async with mq.producer(kafka, linger_ms=50) as producer:
        futures = [await producer.send(second, b"x" * 400) for _ in range(3)]
        await asyncio.gather(*futures, return_exceptions=True)
    [one], [other] = await mq.end_offsets(kafka, first), await mq.end_offsets(kafka, second)
    return one, other


async def judge_1(answer: Any) -> None:
    observed = await _how_many_are_stored()
    try:
        given = tuple(int(number) for number in answer)
        first, second = given
    except (TypeError, ValueError):
        raise Wrong(f"give two numbers, as (1, 2); this is {answer!r}") from None
    if first != observed[0]:
        raise Wrong(f"the first topic, with send_and_wait, holds {observed[0]}, not {first}")
    if second != observed[1]:
        word = "fewer" if observed[1] < second else "more"
        raise Wrong(f"the second topic holds {word} than {second}. What is it that the broker measures?")


VIPS = (b"acme", b"globex")
PARTITIONS = 6


async def judge_2(place: Any) -> None:
    kafka = mq.kafka()
    topic = await mq.topic(kafka, "exercise", partitions=PARTITIONS)
    keys = [[VIPS[0], VIPS[1], None, b"customer-%d" % (number % 60)][number % 4] for number in range(1200)]
    async with asyncio.timeout(20):
        shares = await place(topic, list(keys))
    records = await mq.read(kafka, topic)
    stored, sent = Counter(record.key for record in records), Counter(keys)
    if stored != sent:
        raise Wrong(f"when it returned, {len(records)} of {len(keys)} records were stored, or their keys were changed")
    homes = {key: {record.partition for record in records if record.key == key} for key in stored}
    split = [key for key, partitions in homes.items() if key is not None and len(partitions) > 1]
    if split:
        raise Wrong(f"{len(split)} keys are on several partitions: {split[0]!r} is on {sorted(homes[split[0]])}")
    for vip in VIPS:
        there = Counter(record.key for record in records if record.partition in homes[vip])
        if set(there) != {vip}:
            others = there.total() - there[vip]
            raise Wrong(f"{vip.decode()} is not alone: {others} records of others are on partition {min(homes[vip])}")
    sizes = Counter(record.partition for record in records)
    if len(sizes) < PARTITIONS:
        empty = sorted(set(range(PARTITIONS)) - set(sizes))
        raise Wrong(f"partitions {empty} got no record")
    truth = {partition: sizes[partition] / len(records) for partition in range(PARTITIONS)}
    if not isinstance(shares, dict) or set(shares) != set(truth):
        raise Wrong(f"the proof should be a dict with the partitions 0 to {PARTITIONS - 1}; it is {shares!r}")
    for partition, share in truth.items():
        if abs(shares[partition] - share) > 0.001:
            raise Wrong(f"partition {partition} holds a share of {share:.3f}; the proof says {shares[partition]}")


async def place(topic, keys):
    from aiokafka.partitioner import DefaultPartitioner

    vips = [b"acme", b"globex"]
    default = DefaultPartitioner()

    def partitioner(key, all_partitions, available):
        if key in vips:
            return all_partitions[vips.index(key)]
        rest = all_partitions[len(vips) :]
        return default(key, rest, rest)

    kafka = mq.kafka()
    async with mq.producer(kafka, partitioner=partitioner) as producer:
        futures = [await producer.send(topic, b"event", key=key) for key in keys]
        await asyncio.gather(*futures)
    ends = await mq.end_offsets(kafka, topic)
    return {partition: end / sum(ends) for partition, end in enumerate(ends)}


def _places_with(choose: Callable[[bytes | None], int] | None) -> Callable[..., Any]:
    """A wrong `place`, right in all but the partition that `choose` gives (None: aiokafka's own choice)."""

    async def place(topic: str, keys: Sequence[bytes | None]) -> dict[int, float]:
        kafka = mq.kafka()
        async with mq.producer(kafka) as producer:
            for key in keys:
                await producer.send(topic, b"event", key=key, partition=choose(key) if choose else None)
        ends = await mq.end_offsets(kafka, topic)
        return {partition: end / sum(ends) for partition, end in enumerate(ends)}

    return place


trusts_the_default = _places_with(None)
puts_vips_together = _places_with(lambda key: 0 if key in VIPS else 1 + hash(key) % 5)
splits_the_others = _places_with(lambda key: VIPS.index(key) if key in VIPS else random.randint(2, 5))
leaves_some_empty = _places_with(lambda key: VIPS.index(key) if key in VIPS else 2)


async def proves_nothing(topic: str, keys: Sequence[bytes | None]) -> dict[int, float]:
    await place(topic, keys)
    return dict.fromkeys(range(PARTITIONS), 1 / PARTITIONS)


async def sends_half(topic: str, keys: Sequence[bytes | None]) -> dict[int, float]:
    return await place(topic, keys[::2])


async def judge_3(deliver: Any) -> None:
    kafka = mq.kafka()
    wide, small = await mq.topic(kafka, "exercise"), await mq.topic(kafka, "exercise-small", max_message_bytes=1000)
    records = [(wide, b"event %d" % number) for number in range(300)]
    records[50] = (wide, b"x" * 2_000_000)  # the client refuses it: `send` itself raises
    records[120] = (small, b"x" * 5_000)  # the broker refuses it: the future raises
    requests = 0
    async with mq.producer(kafka) as producer:
        send = producer.client.send

        async def watched(node: Any, request: Any, **options: Any) -> Any:
            nonlocal requests
            requests += type(request).__name__.startswith("Produce")
            return await send(node, request, **options)

        producer.client.send = watched
        async with asyncio.timeout(20):
            answer = await deliver(producer, list(records))
        there = sum(await mq.end_offsets(kafka, wide))
    try:
        stored, refused = (sorted(each) for each in answer)
    except (TypeError, ValueError):
        raise Wrong(f"it should return two lists; it returned {answer!r}") from None
    if requests > 100:
        raise Wrong(f"{len(records)} records took {requests} requests: each was awaited before the next was sent")
    if refused != [50, 120]:
        raise Wrong(f"numbers 50 and 120 were refused; your list of refused ones is {refused[:10]}")
    if there != 298:
        raise Wrong(f"298 records can be stored; when it returned, {there} were")
    if stored != [number for number in range(300) if number not in (50, 120)]:
        raise Wrong(f"298 records were stored; your list has {len(stored)}, and its first are {stored[:3]}")


async def deliver(producer, records):
    stored, refused, futures = [], [], {}
    for position, (topic, value) in enumerate(records):
        try:
            futures[position] = await producer.send(topic, value)
        except Exception:
            refused.append(position)
    results = await asyncio.gather(*futures.values(), return_exceptions=True)
    for position, result in zip(futures, results, strict=True):
        (refused if isinstance(result, Exception) else stored).append(position)
    return stored, refused


async def awaits_each(producer: Any, records: Sequence[tuple[str, bytes]]) -> tuple[list[int], list[int]]:
    stored: list[int] = []
    refused: list[int] = []
    for position, (topic, value) in enumerate(records):
        try:
            await producer.send_and_wait(topic, value)
            stored.append(position)
        except Exception:
            refused.append(position)
    return stored, refused


async def trusts_send(producer: Any, records: Sequence[tuple[str, bytes]]) -> tuple[list[int], list[int]]:
    stored: list[int] = []
    refused: list[int] = []
    for position, (topic, value) in enumerate(records):
        try:
            (await producer.send(topic, value)).add_done_callback(lambda future: future.exception())
            stored.append(position)
        except Exception:
            refused.append(position)
    return stored, refused


async def stops_at_the_first_error(producer: Any, records: Sequence[tuple[str, bytes]]) -> tuple[list[int], list[int]]:
    futures = [await producer.send(topic, value) for topic, value in records]
    await asyncio.gather(*futures)
    return list(range(len(records))), []


TASKS = {
    "01.1": Task(
        question="How many are stored?",
        start='answer = ...\n\nawait mq.exercise("01.1").check(answer)',
        hints=[
            "`send_and_wait` makes a batch of one. What do three calls of `send` in a row make?",
            "The limit is for a batch, and a batch is stored whole or not at all. Three times 400 is 1200.",
        ],
        solution=None,
        code="answer = (3, 0)",
        judge=judge_1,
        wrong=[(3, 3), (3, 2), (0, 0), (3,), "all"],
    ),
    "01.2": Task(
        question="VIPs alone, proved",
        start='place = ...\n\nawait mq.exercise("01.2").check(place)',
        hints=[
            "`mq.producer(kafka, partitioner=yours)`. Give the first two of `all_partitions` to the VIPs, and hash the "
            "other keys over the rest with `murmur2`; a key can be None.",
            "Await every future. Then `await mq.end_offsets(kafka, topic)` has the number of records per partition.",
        ],
        solution=place,
        judge=judge_2,
        wrong=[
            trusts_the_default,
            puts_vips_together,
            splits_the_others,
            leaves_some_empty,
            proves_nothing,
            sends_half,
            3,
        ],
    ),
    "01.3": Task(
        question="Nothing unknown",
        start='deliver = ...\n\nawait mq.exercise("01.3").check(deliver)',
        hints=[
            "The client's limit makes `send` raise, the broker's makes the future raise. Catch both.",
            "Keep each future with its position, and use `asyncio.gather(*futures, return_exceptions=True)`.",
        ],
        solution=deliver,
        judge=judge_3,
        wrong=[awaits_each, trusts_send, stops_at_the_first_error],
    ),
}
