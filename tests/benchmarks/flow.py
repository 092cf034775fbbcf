"""Memory while a producer outruns its consumer ten to one, with and without a water mark; the cost of a slot.

Each reader is a process of its own, whose growth is the difference of its resident memory, as psutil tells it. What may
grow with marks: 2 MB in the buffer and a poll, 1 MB that the client has fetched ahead, each perhaps twice (as bytes of
the network and as a record), and what any process takes at first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

import mqlib as mq
from mqlib.metrics import paced
from mqlib.patterns.flow import Limiter, TokenBucket
from tests.benchmarks.core import Contender, Promise

SIZE, RATE = 20_000, 500
"""Bytes of a record, and records a second: 10 MB. The worker manages a tenth."""
BOUND_MB = 16.0


async def read(kafka: Any, topic: str, seconds: float, rate: float, high_bytes: float) -> None:
    """The other process: prints by how much it grew, in MB."""
    import time

    import psutil

    import mqlib as mq
    from mqlib.metrics import paced
    from mqlib.patterns.flow import Buffer, reading

    buffer: Any = Buffer(10**9, high_bytes=high_bytes, size=lambda record: len(record.value))
    async with mq.consumer(kafka, topic) as consumer, reading(consumer, buffer, max_records=50):
        await buffer.get()
        before, end = psutil.Process().memory_info().rss, time.monotonic() + seconds
        print("reads", flush=True)
        async for _ in paced(rate, 10**9):
            if time.monotonic() > end:
                break
            await buffer.get()
        print((psutil.Process().memory_info().rss - before) / 1e6)


async def grown(kafka: mq.Kafka, seconds: float, high_bytes: float) -> float:
    """By how many MB a reader grows while ten times as much comes as its worker takes."""
    topic, body = await mq.topic(kafka, "bench"), b"x" * SIZE
    async with mq.producer(kafka) as producer, mq.worker(read, kafka, topic, seconds, RATE / 10, high_bytes) as reader:
        await producer.send_and_wait(topic, body)
        await reader.printed("reads", within=30)
        async for _ in paced(RATE, int(RATE * seconds)):
            await producer.send(topic, body)
        await reader.ended(within=60)
    return float(reader.lines[-1])


async def cost(count: int, take: Callable[[], Awaitable[object]]) -> float:
    """µs for one of `count`."""
    start = perf_counter()
    for _ in range(count):
        await take()
    return (perf_counter() - start) / count * 1e6


async def in_slot(limiter: Limiter) -> None:
    async with limiter.slot():
        pass


async def in_semaphore(semaphore: asyncio.Semaphore) -> None:
    async with semaphore:
        pass


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    seconds, count = (1.0, 1_000) if quick else (30.0, 100_000)
    semaphore, limiter = asyncio.Semaphore(10), Limiter(10)
    bucket = TokenBucket(1e9, 1e9)
    yield [
        Contender("without a mark", partial(grown, kafka, seconds, 1e12), "MB", rounds=1),
        Contender("a mark at 2 MB", partial(grown, kafka, seconds, 2e6), "MB",
                  (Promise(BOUND_MB, 1, "≤"), Promise("without a mark", 0.2, "≤")), rounds=1),
        Contender("asyncio.Semaphore", partial(cost, count, partial(in_semaphore, semaphore)), "µs", alone=True),
        Contender("Limiter.slot", partial(cost, count, partial(in_slot, limiter)), "µs", (Promise(50.0, 1, "≤"),)),
        Contender("TokenBucket.acquire", partial(cost, count, bucket.acquire), "µs", (Promise(50.0, 1, "≤"),)),
    ]  # fmt: skip
