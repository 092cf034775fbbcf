"""Records of 200 B into one partition, acknowledged (`acks=all`, the default of Kafka's own producer)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaProducer

import mqlib as mq
from tests.benchmarks.core import Contender, Promise, rate
from tests.kafka_tools import producer_performance

SIZE = 200
BATCH = 512 * 1024
"""The best of 16 KiB … 1 MB: a smaller one costs round trips, and aiokafka has one request under way to each broker."""


async def send_batch(producer: AIOKafkaProducer, topic: str, values: list[bytes]) -> None:
    """The fastest way that aiokafka has: a batch is filled while the one before it is under way."""
    answers = []
    batch = producer.create_batch()
    for value in values:
        if batch.append(timestamp=None, key=None, value=value) is None:
            answers.append(await producer.send_batch(batch, topic, partition=0))
            batch = producer.create_batch()
            batch.append(timestamp=None, key=None, value=value)
    answers.append(await producer.send_batch(batch, topic, partition=0))
    await asyncio.gather(*answers)


async def send(producer: AIOKafkaProducer, topic: str, values: list[bytes]) -> None:
    await asyncio.gather(*[await producer.send(topic, value) for value in values])


async def send_and_wait(producer: AIOKafkaProducer, topic: str, values: list[bytes]) -> None:
    for value in values:
        await producer.send_and_wait(topic, value)


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count, single, java = (2_000, 200, 2_000) if quick else (200_000, 2_000, 1_000_000)
    values = [b"%0*d" % (SIZE, number) for number in range(count)]
    topic = await mq.topic(kafka, "bench", retention_bytes=200_000_000, segment_bytes=100_000_000)

    async def tool(**props: int) -> float:  # as many records again before those that count
        return await asyncio.to_thread(producer_performance, kafka, topic, java, SIZE, warmup=java, **props)

    async with mq.producer(kafka, acks="all", max_batch_size=BATCH) as producer:
        yield [
            Contender("send_batch", rate(count, lambda: send_batch(producer, topic, values)), "records/s"),
            Contender("mq.pump", rate(count, lambda: mq.pump(producer, topic, values)), "records/s",
                      (Promise("send_batch", 0.95), Promise("ProducerPerformance", 3))),
            Contender("send, gathered", rate(count, lambda: send(producer, topic, values)), "records/s"),
            Contender("send_and_wait", rate(single, lambda: send_and_wait(producer, topic, values[:single])),
                      "records/s"),
            Contender("ProducerPerformance", tool, "records/s"),
            Contender("… batch.size=512 KiB", lambda: tool(batch_size=BATCH), "records/s"),
        ]  # fmt: skip
