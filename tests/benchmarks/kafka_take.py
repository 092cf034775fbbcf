"""Records of 200 B out of one partition, from the start of the topic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter

from aiokafka import AIOKafkaConsumer, ConsumerRecord

import mqlib as mq
from tests.benchmarks.core import Contender, Promise
from tests.kafka_tools import consumer_performance

SIZE = 200


async def getmany(consumer: AIOKafkaConsumer, count: int) -> int:
    records: list[ConsumerRecord] = []
    while len(records) < count:
        for several in (await consumer.getmany(timeout_ms=1000)).values():
            records += several
    return len(records)


async def getmany_dropped(consumer: AIOKafkaConsumer, count: int) -> int:
    """The records are not kept, as in Kafka's own tool."""
    taken = 0
    while taken < count:
        for several in (await consumer.getmany(timeout_ms=1000)).values():
            taken += len(several)
    return taken


async def take(consumer: AIOKafkaConsumer, count: int) -> int:
    return len(await mq.take(consumer, count, within=60))


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 2_000 if quick else 500_000
    topic = await mq.topic(kafka, "bench")
    async with mq.producer(kafka, max_batch_size=512 * 1024) as producer:
        await mq.pump(producer, topic, (b"%0*d" % (SIZE, number) for number in range(count)))

    def client(
        way: Callable[[AIOKafkaConsumer, int], Awaitable[int]],
    ) -> Callable[[], Awaitable[float]]:
        async def measure() -> float:
            start = perf_counter()  # a consumer fetches as soon as it is there
            async with mq.consumer(kafka, topic) as consumer:
                assert await way(consumer, count) == count
                seconds = perf_counter() - start
            return count / seconds

        return measure

    async def tool() -> float:
        return await asyncio.to_thread(consumer_performance, kafka, topic, count)

    yield [
        Contender("getmany", client(getmany), "records/s"),
        Contender("mq.take", client(take), "records/s", (Promise("getmany", 0.95),)),
        Contender("getmany, not kept", client(getmany_dropped), "records/s"),
        Contender("ConsumerPerformance", tool, "records/s"),
    ]
