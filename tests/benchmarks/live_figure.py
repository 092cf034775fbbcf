"""What a figure that is redrawn ten times a second costs a consumer in the same process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from aiokafka import TopicPartition

import mqlib as mq
from mqlib import plots
from mqlib.live import live
from tests.benchmarks.core import Contender, Promise


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 20_000 if quick else 3_000_000  # seconds, since the noise of a shorter round is larger than the cost
    topic = await mq.topic(kafka, "bench")
    async with mq.producer(kafka, max_batch_size=512 * 1024) as producer:
        await mq.pump(producer, topic, [b"x" * 100] * count)

    async def read(times: list[float], counts: list[float]) -> float:
        async with mq.consumer(kafka) as consumer:
            consumer.assign([TopicPartition(topic, 0)])
            await consumer.seek_to_beginning()
            start, got = perf_counter(), 0
            while got < count:
                got += sum(map(len, (await consumer.getmany(timeout_ms=1000)).values()))
                times.append(perf_counter() - start)
                counts.append(got)
            return count / (perf_counter() - start)

    async def alone() -> float:
        return await read([], [])

    async def watched() -> float:
        times, counts = list[float](), list[float]()

        def curve() -> dict[str, tuple[list[float], list[float]]]:
            return {"consumed": (times[::20], counts[::20])}

        async with live(plots.lines, curve, title="Consumed", x="seconds", y="records") as chart:
            await mq.until(lambda: chart.frames > 1, within=20)  # its start is not the consumer's
            return await read(times, counts)

    yield [
        Contender("consumer alone", alone, "records/s"),
        Contender("consumer with a live figure", watched, "records/s", (Promise("consumer alone", 0.98),)),
    ]
