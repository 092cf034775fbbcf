"""What the patterns add: the consumer to a bare loop that awaits its handler, the breaker to a call.

And what the consumer gains by key, in one partition, when its handlers wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Literal

from aiokafka import ConsumerRecord

import mqlib as mq
from mqlib.patterns.circuit_breaker import QueueCircuitBreaker
from mqlib.patterns.consumer import Policy, consume
from tests.benchmarks.core import Contender, Promise

KEYS = 16


async def handle(_: object) -> None:
    pass


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 5_000 if quick else 300_000
    waits = 200 if quick else 2000
    topic, keyed, breaker = await mq.topic(kafka, "bench"), await mq.topic(kafka, "keyed"), QueueCircuitBreaker()
    async with mq.producer(kafka, max_batch_size=512 * 1024) as producer:
        await mq.pump(producer, topic, [b"x" * 200] * count)
        await mq.pump(producer, keyed, [b"x"] * waits, keys=[b"%d" % (number % KEYS) for number in range(waits)])

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

    async def waiting(by: Literal["partition", "key"]) -> float:
        """A handler that waits a millisecond; each key's records come in order all the same."""
        begun, ended = dict[bytes | None, int](), dict[bytes | None, int]()
        violations = 0

        async def handle(record: ConsumerRecord) -> None:
            nonlocal violations
            before = ended.get(record.key, -1)
            violations += begun.get(record.key, -1) != before or record.offset <= before
            begun[record.key] = record.offset
            await asyncio.sleep(0.001)
            ended[record.key] = record.offset

        start = perf_counter()
        async with consume(kafka, [keyed], kafka.name("waiting"), handle, Policy(by=by)) as work:
            await mq.until(lambda: work.report.handled >= waits, within=60)
        seconds = perf_counter() - start
        assert (violations, work.report.handled, len(ended)) == (0, waits, KEYS), "out of order, or twice"
        return waits / seconds

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
        Contender("patterns.consumer", pattern, "records/s", (Promise("getmany, await handle", 0.8),)),
        Contender("… by partition, 1 ms", partial(waiting, "partition"), "records/s", alone=True),
        Contender("… by key, 1 ms", partial(waiting, "key"), "records/s", (Promise("… by partition, 1 ms", 4),)),
        Contender("circuit breaker, a call", guarded, "µs", (Promise(5.0, 1, "≤"),)),
    ]
