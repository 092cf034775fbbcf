"""The exercises of notebook 09: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

import mqlib as mq
from mqlib.checks import Task, Wrong

Samples = Sequence[tuple[float, float]]


async def _commit(kafka: mq.Kafka, group: str, offsets: dict[TopicPartition, int]) -> None:
    async with mq.consumer(kafka, group_id=group, enable_auto_commit=False) as consumer:
        consumer.assign(list(offsets))
        await consumer.commit(offsets)


async def _what_the_monitor_says() -> list[int | None]:
    kafka = mq.kafka()
    topic, group = await mq.topic(kafka, "exercise", partitions=4), kafka.name("exercise")
    async with mq.producer(kafka) as producer:
        for partition in range(4):
            await mq.pump(producer, topic, [b"event"] * 10, partition=partition)
    places = [TopicPartition(topic, partition) for partition in range(4)]
    await _commit(kafka, group, {places[0]: 10, places[1]: 2, places[2]: 2})
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        await admin.delete_records({places[2]: RecordsToDelete(5)})
    finally:
        await admin.close()
    return [part.lag for part in (await mq.group_lag(kafka, group, topic)).partitions]


async def judge_1(answer: Any) -> None:
    observed = await _what_the_monitor_says()
    try:
        given = list(answer)
    except TypeError:
        raise Wrong(f"give a list of four values; this is {answer!r}") from None
    if len(given) != 4:
        raise Wrong(f"give four values, one a partition; these are {len(given)}")
    for partition, (yours, right) in enumerate(zip(given, observed, strict=True)):
        if yours == right and type(yours) is type(right):
            continue
        if right is None:
            raise Wrong(f"partition {partition}: whether it is {yours} depends on a setting that nobody told you")
        reason = "Can it read what was deleted?" if partition == 2 else "Where is the end, and where is the commit?"
        raise Wrong(f"partition {partition}: the lag is not {yours!r}. {reason}")


async def _work_off(tasks: int, seconds: float) -> tuple[list[tuple[float, int]], float]:
    """What a monitor saw of a queue that is worked off, and when it was empty."""
    rabbit = mq.rabbitmq()

    async def work(message: Any) -> None:
        await asyncio.sleep(seconds)
        await message.ack()

    async with mq.channel(rabbit, prefetch=1) as channel:
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True)
        await mq.pump_messages(channel.default_exchange, queue.name, [b"task"] * tasks)
        async with mq.monitor_depth(rabbit, queue.name, every=0.05, by="amqp") as monitor:
            await queue.consume(work)
            await mq.until(lambda: monitor.samples[-1][1].ready == 0, within=30)
    begin = monitor.samples[0][0]
    samples = [(at - begin, found.ready) for at, found in monitor.samples]
    return samples, next(at for at, ready in samples if ready == 0)


def _time(drain_time: Any, samples: Samples, about: str) -> float | None:
    found: float | None = drain_time(list(samples))
    if found is not None and not isinstance(found, int | float):
        raise Wrong(f"{about}: it should return seconds or None; it returned {found!r}")
    return found


async def judge_2(drain_time: Any) -> None:
    for about, samples in {
        "no sample": [],
        "one sample": [(0.0, 50.0)],
        "a depth that stays": [(second, 80.0) for second in range(10)],
        "a depth that grows": [(second, 10.0 + 5 * second) for second in range(10)],
    }.items():
        if (found := _time(drain_time, samples, about)) is not None:
            raise Wrong(f"{about}: there is no end to be seen, and it says {found}")
    if _time(drain_time, [(0, 20), (1, 10), (2, 0)], "a queue that is empty now") != 0:
        raise Wrong("the last sample of a queue was 0, and it does not say 0")
    wobbling = [(second, 200 - 10 * second + (8 if second % 2 else -8)) for second in range(11)]
    if abs((_time(drain_time, wobbling, "") or math.inf) - 10) > 3:
        raise Wrong("10 fewer each second, 92 left, and each sample is off by 8: it should say about 10 s, "
                    f"and says {drain_time(wobbling)}")  # fmt: skip
    samples, empty = await _work_off(tasks=120, seconds=0.01)
    seen = [sample for sample in samples if sample[0] <= 0.6]
    real = empty - seen[-1][0]
    found = _time(drain_time, seen, "a real queue")
    if found is None or not real / 2 < found < real * 2:
        raise Wrong(f"a real queue, of {seen[-1][1]} tasks, was empty after {real:.2f} s; it says {found}")


def drain_time(samples):
    import numpy

    if samples and samples[-1][1] == 0:
        return 0
    if len(samples) < 2:
        return None
    seconds, depths = zip(*samples, strict=True)
    slope, start = numpy.polyfit(seconds, depths, 1)
    if slope >= -1e-9:
        return None
    return max(-start / slope - seconds[-1], 0)


def from_the_start(samples: Samples) -> float | None:
    """From the first sample instead of the last."""
    answer = drain_time(samples)
    return answer and answer + samples[-1][0]


def trusts_two_samples(samples: Samples) -> float | None:
    """The slope of the last two samples, which may be off."""
    return drain_time(samples[-2:])


def never_says_never(samples: Samples) -> float | None:
    """Takes a backlog that grows for one that shrinks."""
    if not samples or samples[-1][1] == 0:
        return 0
    (first, high), (last, low) = samples[0], samples[-1]
    return abs(low * (last - first) / ((high - low) or 1))


async def _watch(behaviour: str) -> list[tuple[int, int]]:
    """Committed and end offset of one partition, as a monitor saw them while a group behaved like that."""
    kafka = mq.kafka()
    topic, group = await mq.topic(kafka, "exercise"), kafka.name("exercise")
    place = TopicPartition(topic, 0)
    backlog, arrivals, read = {
        "keeps up": (0, 5, 5), "is dead": (3, 0, 0), "is dead while much arrives": (50, 20, 0), "is slow": (20, 10, 2),
        "works off a burst": (400, 5, 40), "has nothing to do": (0, 0, 0), "was slow to start": (60, 3, 12),
    }[behaviour]  # fmt: skip
    samples: list[tuple[int, int]] = []
    async with (
        mq.producer(kafka) as producer,
        mq.consumer(kafka, group_id=group, enable_auto_commit=False) as consumer,
        mq.LagMonitor(kafka, group, topic) as monitor,
    ):
        consumer.assign([place])
        await mq.pump(producer, topic, [b"event"] * (10 + backlog))
        await consumer.commit({place: 10})
        committed, end = 10, 10 + backlog
        for step in range(8):
            await mq.pump(producer, topic, [b"event"] * arrivals)
            end += arrivals
            if not (behaviour == "was slow to start" and step < 3):
                committed = min(committed + read, end)
                await consumer.commit({place: committed})
            [part] = (await monitor.sample()).partitions
            assert part.committed is not None
            assert part.end is not None
            samples.append((part.committed, part.end))
    return samples


VERDICTS = {
    "keeps up": "ok", "has nothing to do": "ok", "works off a burst": "ok", "was slow to start": "ok",
    "is slow": "falling behind", "is dead": "stuck", "is dead while much arrives": "stuck",
}  # fmt: skip


async def judge_3(verdict: Any) -> None:
    for behaviour, right in VERDICTS.items():
        samples = await _watch(behaviour)
        said = verdict(list(samples))
        if said != right:
            raise Wrong(f"a group that {behaviour} is {right!r}; your verdict was {said!r}. Samples: {samples}")


def verdict(samples):
    lags = [end - committed for committed, end in samples]
    if samples[0][0] == samples[-1][0]:
        return "stuck" if min(lags) > 0 else "ok"
    return "falling behind" if lags[-1] > 2 * lags[0] else "ok"


def fixed_limit(samples: Sequence[tuple[int, int]]) -> str:
    return "stuck" if samples[-1][1] - samples[-1][0] > 100 else "ok"


def looks_at_the_lag_only(samples: Sequence[tuple[int, int]]) -> str:
    lags = [end - committed for committed, end in samples]
    if lags[-1] and lags[-1] >= lags[0]:
        return "stuck" if len(set(lags)) == 1 else "falling behind"
    return "ok"


def looks_at_the_end_only(samples: Sequence[tuple[int, int]]) -> str:
    last = samples[-1]
    return "stuck" if last[1] > last[0] and samples[-2][0] == last[0] else "ok"


TASKS = {
    "09.1": Task(
        question="What does the monitor say?",
        start='answer = ...\n\nawait mq.exercise("09.1").check(answer)',
        hints=[
            "Lag is what the group has still to read. What was deleted, it can no longer read.",
            "Without a commit, `earliest` would mean 10 and `latest` 0. Which of them it is, nobody told you.",
        ],
        solution=None,
        code="answer = [0, 8, 5, None]",
        judge=judge_1,
        wrong=[[0, 8, 8, None], [0, 8, 5, 10], [0, 8, 5, 0], [0, 8, 5, 11], [10, 2, 2, 0], [0, 8, 5], 8],
    ),
    "09.2": Task(
        question="When is it over?",
        start='drain_time = ...\n\nawait mq.exercise("09.2").check(drain_time)',
        hints=[
            "`slope, start = numpy.polyfit(seconds, depths, 1)` puts a line through all samples. Where does it meet 0?",
            "That is at `-start / slope` seconds from the zero of the clock. Subtract the last sample's time. A slope "
            "that is not below 0 has no such moment.",
        ],
        solution=drain_time,
        judge=judge_2,
        wrong=[from_the_start, trusts_two_samples, never_says_never, lambda samples: None, 3],
    ),
    "09.3": Task(
        question="An alarm that does not cry wolf",
        start='verdict = ...\n\nawait mq.exercise("09.3").check(verdict)',
        hints=[
            "Two questions: did the committed offset move from the first sample to the last? And was there something "
            "to read in every sample?",
            "Only if it moved, compare the lags, `end - committed`, of the first and the last sample.",
        ],
        solution=verdict,
        judge=judge_3,
        wrong=[fixed_limit, looks_at_the_lag_only, looks_at_the_end_only, lambda samples: "ok", 3],
    ),
}
