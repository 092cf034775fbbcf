"""Kafka, around the calls that a reader came to see: topics, quiet clients, bounded receive, offsets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError
from aiokafka.protocol.metadata import MetadataRequest

from .brokers import BrokerError, Kafka
from .brokers.base import Connectable
from .waiting import until

# Without a handler Python writes a library's warnings to stderr, where they look like output of the cell. Whoever
# configures logging still gets them.
logging.getLogger("aiokafka").addHandler(logging.NullHandler())

STOP_SECONDS = 10.0
SPREAD_SECONDS = 5.0  # until every server has heard of a topic that was just made


@contextlib.asynccontextmanager
async def _admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def topic(kafka: Kafka, name: str, partitions: int = 1, replicas: int | None = None, **config: str | int) -> str:
    """Makes a fresh topic in the namespace and returns its full name; a second call makes another.

    `config` are topic settings with underscores for dots: `max_message_bytes=1000`. `replicas` defaults to one for each
    server, at most three. It is deleted when the broker is left. Raises `BrokerError` when the broker refuses.
    """
    full = kafka.name(name)
    settings = {key.replace("_", "."): str(value) for key, value in config.items()}
    replicas = replicas or min(3, max(1, len(kafka.nodes)))
    async with _admin(kafka) as admin:
        answer = await admin.create_topics([NewTopic(full, partitions, replicas, topic_configs=settings)])
        code, text = answer.topic_errors[0][1:3]
        if code:
            raise BrokerError(f"Kafka refuses the topic {name!r}: {text or f'error {code}'}")

    # Created is not yet led, and a leader that the metadata name may still refuse: a send in between would be retried.
    # Whoever answers for the offsets of a partition leads it.
    await end_offsets(kafka, full)
    return full


async def _stop(client: AIOKafkaProducer | AIOKafkaConsumer, linger: float = 0.0) -> None:
    """Stops a client within a bounded time, also when the broker is gone. Records may linger for `linger` seconds.

    aiokafka 0.14: `stop` of a consumer without a group right after `start` raises `CancelledError` although nobody
    cancelled; with auto-commit and a dead broker it never returns (aio-libs/aiokafka#659).
    """
    task = asyncio.ensure_future(client.stop())
    done, _ = await asyncio.wait([task], timeout=linger + STOP_SECONDS)
    if not done:
        await _abandon(client, task)
    elif not task.cancelled() and (error := task.exception()) is not None:
        raise error


async def _abandon(client: AIOKafkaProducer | AIOKafkaConsumer, stopping: asyncio.Future[None]) -> None:
    """Ends what `stop` would have ended, had the broker answered, without asking the broker anything."""
    stopping.cancel()
    await asyncio.wait([stopping], timeout=1)
    if isinstance(client, AIOKafkaConsumer):
        coordinator = client._coordinator
        for name in ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task"):
            await _cancel(getattr(coordinator, name, None))
        await client._fetcher.close()
        await client._client.close()
        return
    sender, accumulator = client._sender, client._message_accumulator
    for task in asyncio.all_tasks():
        # Requests under way: the sender knows them only in its own frame, and would wait for their retries.
        if (code := getattr(task.get_coro(), "cr_frame", None)) and code.f_locals.get("self") is sender:
            await _cancel(task)
    # aiokafka 0.14 forgets that a batch which it tries again is pending, and an error of `_drain_waiter` is nobody's.
    accumulator._pending_batches.update(batch for queue in accumulator._batches.values() for batch in queue)
    accumulator.fail_all(KafkaConnectionError("the broker did not answer while the producer was being closed"))
    for batch in accumulator._pending_batches:
        batch._drain_waiter.exception()
    await client.client.close()


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    if task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1)


@contextlib.asynccontextmanager
async def producer(kafka: Connectable, **options: Any) -> AsyncIterator[AIOKafkaProducer]:
    """`AIOKafkaProducer(**kafka.client, **options)`, started, and stopped at the end of the block.

    What was sent and lingers still (`linger_ms`) is sent before the block ends. If the broker does not answer then for
    10 s, the records without an answer are unknown: what `send` returned for them raises `KafkaConnectionError`.
    """
    client = AIOKafkaProducer(**kafka.client, **options)
    try:
        await client.start()
        yield client
    finally:
        await _stop(client, options.get("linger_ms", 0) / 1000)


@contextlib.asynccontextmanager
async def consumer(kafka: Connectable, *topics: str, **options: Any) -> AsyncIterator[AIOKafkaConsumer]:
    """`AIOKafkaConsumer(*topics, **kafka.client, **options)`, started, and stopped at the end of the block.

    It reads from the earliest offset unless told otherwise, since here the records mostly come first.
    """
    client = AIOKafkaConsumer(*topics, **kafka.client, **{"auto_offset_reset": "earliest", **options})
    try:
        await client.start()
        yield client
    finally:
        await _stop(client)


async def poll(
    consumer: AIOKafkaConsumer, within: float, max_records: int | None = None
) -> dict[TopicPartition, list[ConsumerRecord]]:
    """`getmany`, back after `within` seconds at the latest.

    aiokafka 0.14 forgets its own time limit while a rebalance is under way, hence for ever while the broker is gone.
    """
    try:
        async with asyncio.timeout(within + 0.05):  # nothing is lost by it: records are only taken when it returns
            return dict(await consumer.getmany(timeout_ms=int(within * 1000), max_records=max_records))
    except TimeoutError:
        return {}


async def take(consumer: AIOKafkaConsumer, count: int, within: float = 5.0) -> list[ConsumerRecord]:
    """Up to `count` records, in the order in which they came; fewer when `within` seconds pass first."""
    records: list[ConsumerRecord] = []
    deadline = time.monotonic() + within
    while len(records) < count and (left := deadline - time.monotonic()) > 0:
        for several in (await poll(consumer, left, count - len(records))).values():
            records += several
    return records


async def read(kafka: Kafka, *topics: str, within: float = 10.0, **options: Any) -> list[ConsumerRecord]:
    """Everything that the topics hold now, partition by partition, without a group and without committing.

    Ends at the end offsets that it finds at the start (with `isolation_level="read_committed"`, at the last stable
    ones). Raises `TimeoutError` when that takes longer than `within` seconds, `BrokerError` for a missing topic.
    """
    records: list[ConsumerRecord] = []
    parts = [part for name in topics for part in await partitions_of(kafka, name)]
    if not parts:
        return []
    async with consumer(kafka, **options) as reader:
        reader.assign(parts)
        ends = await reader.end_offsets(parts)
        await reader.seek_to_beginning(*parts)
        async with asyncio.timeout(within):
            while any([await reader.position(part) < ends[part] for part in parts]):
                for several in (await poll(reader, 0.1)).values():
                    records += several
    return sorted(records, key=lambda record: (topics.index(record.topic), record.partition, record.offset))


async def described(admin: AIOKafkaAdminClient, names: list[str]) -> list[dict[str, Any]]:
    """What the brokers know of the topics. (`describe_topics` of aiokafka 0.14 makes missing ones where it may.)"""
    answer = await admin._send_request(MetadataRequest(names, allow_auto_topic_creation=False))
    return list(answer.to_object()["topics"])


async def partitions_of(kafka: Kafka, name: str) -> list[TopicPartition]:
    """The partitions of a topic. Raises `BrokerError` when there is no such topic."""
    async with _admin(kafka) as admin:

        async def found() -> list[int]:
            try:
                [answer] = await described(admin, [name])
            except NodeNotReadyError:  # the broker has just come back, and does not name itself yet
                return []
            return [] if answer["error_code"] else sorted(part["partition"] for part in answer["partitions"])

        try:
            return [TopicPartition(name, part) for part in await until(found, within=SPREAD_SECONDS)]
        except TimeoutError:
            raise BrokerError(f"Kafka has no topic {name!r}") from None


async def end_offsets(kafka: Kafka, name: str) -> list[int]:
    """The end offset of each partition: what the next record's offset will be. Raises `BrokerError` as `read` does."""
    parts = await partitions_of(kafka, name)
    async with consumer(kafka) as reader:
        reader.assign(parts)
        ends = await reader.end_offsets(parts)
        return [ends[part] for part in parts]
