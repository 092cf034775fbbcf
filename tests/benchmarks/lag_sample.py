"""One sample of a group's lag, by the number of its partitions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter

from aiokafka import TopicPartition

import mqlib as mq
from tests.benchmarks.core import Contender, Promise

SAMPLES = 10


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()

    def sampled(monitor: mq.LagMonitor, partitions: int) -> Callable[[], Awaitable[float]]:
        async def measure() -> float:
            start = perf_counter()
            for _ in range(SAMPLES):
                assert len((await monitor.sample()).partitions) == partitions
            return 1000 * (perf_counter() - start) / SAMPLES

        return measure

    async with AsyncExitStack() as stack:
        found = []
        for partitions in (1, 10) if quick else (1, 10, 100, 1000):
            topic, group = await mq.topic(kafka, "bench", partitions=partitions), kafka.name("bench")
            offsets = {TopicPartition(topic, number): 0 for number in range(partitions)}
            async with mq.consumer(kafka, group_id=group, enable_auto_commit=False) as consumer:
                consumer.assign(list(offsets))
                await consumer.commit(offsets)
            monitor = await stack.enter_async_context(mq.LagMonitor(kafka, group))
            promise = (Promise(50.0, 1, "≤"),) if partitions == 1000 else ()
            found.append(Contender(f"{partitions} partitions", sampled(monitor, partitions), "ms", promise))
        yield found
