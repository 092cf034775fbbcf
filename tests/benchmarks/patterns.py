"""What the patterns add: the consumer to a bare loop that awaits its handler, the breaker to a call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

import mqlib as mq
from mqlib.patterns.circuit_breaker import QueueCircuitBreaker
from mqlib.patterns.consumer import consume
from tests.benchmarks.core import Contender, Promise


async def handle(_: object) -> None:
    pass


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 5_000 if quick else 300_000
    topic, breaker = await mq.topic(kafka, "bench"), QueueCircuitBreaker()
    async with mq.producer(kafka, max_batch_size=512 * 1024) as producer:
        await mq.pump(producer, topic, [b"x" * 200] * count)

    async def bare() -> float:
        start, got = perf_counter(), 0
        async with mq.consumer(kafka, topic, group_id=kafka.name("bare"), enable_auto_commit=False) as consumer:
            while got < count:
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    for record in records:
                        await handle(record)
                    got += len(records)
            await consumer.commit()
        return count / (perf_counter() - start)

    async def pattern() -> float:
        start = perf_counter()
        async with consume(kafka, [topic], kafka.name("pattern"), handle) as work:
            await mq.until(lambda: work.report.handled >= count, within=60)
        return count / (perf_counter() - start)

    async def guarded() -> float:
        start = perf_counter()
        for _ in range(count):
            await handle(None)
        middle = perf_counter()
        for _ in range(count):
            await breaker.execute(lambda: handle(None))
        return ((perf_counter() - middle) - (middle - start)) / count * 1e6

    yield [
        Contender("getmany, await handle", bare, "records/s"),
        Contender("patterns.consumer", pattern, "records/s"),
        Contender("circuit breaker, a call", guarded, "µs", (Promise(5.0, 1, "≤"),)),
    ]
