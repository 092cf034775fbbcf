"""What a broker of our own must do, whoever provides it; `test_process` and `test_container` both hold it to this."""

from __future__ import annotations

import asyncio
import time

import aio_pika
import httpx
import pytest
from aio_pika.abc import AbstractQueue
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

import mqlib as mq
from mqlib import queues

QUORUM = {"x-queue-type": "quorum"}
ASKED = {"Kafka": "due to signal SIGTERM", "RabbitMQ": "SIGTERM received - shutting down"}
"""What a server writes when it hears that it is to end; one that is killed, or that is deaf, writes nothing."""


def polite_ends(broker: mq.Kafka | mq.RabbitMQ) -> int:
    """How often the first server was asked to end so far, and heard it, by its own log."""
    return broker.nodes[0].log(100_000).count(ASKED[broker.kind])


async def send(kafka: mq.Kafka, topic: str, value: bytes) -> None:
    """One record, acknowledged by every replica that is in sync."""
    async with mq.producer(kafka, acks="all") as producer:
        await producer.send_and_wait(topic, value)


async def values(kafka: mq.Kafka, topic: str) -> list[bytes]:
    return [record.value for record in await mq.read(kafka, topic, within=20)]


async def first_record(kafka: mq.Kafka) -> None:
    """Ready means ready: the first record goes through, and comes back."""
    topic = await mq.topic(kafka, "first")
    await send(kafka, topic, b"at once")
    assert await values(kafka, topic) == [b"at once"]


async def declare(channel: aio_pika.abc.AbstractChannel, name: str, **arguments: str) -> AbstractQueue:
    return await channel.declare_queue(name, durable=True, arguments=dict(arguments))


async def publish(rabbit: mq.RabbitMQ, queue: str, body: bytes) -> None:
    """One persistent message, confirmed by the broker, to a queue that is there."""
    async with mq.channel(rabbit, on_return_raises=True) as channel:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key=queue)


async def bodies(rabbit: mq.RabbitMQ, queue: str) -> list[bytes]:
    """What is in the queue, and stays there."""
    async with mq.channel(rabbit) as channel:
        messages = await mq.take_messages(await channel.get_queue(queue), 100, within=0.5, ack=False)
        return [message.body for message in messages]


async def first_message(rabbit: mq.RabbitMQ) -> None:
    """Ready means ready: the first message goes through and comes back, and the management API answers."""
    name = rabbit.name("first")
    async with mq.channel(rabbit) as channel:
        await declare(channel, name)
    await publish(rabbit, name, b"at once")
    assert await bodies(rabbit, name) == [b"at once"]
    overview = await queues.management(rabbit, "/overview")
    assert mq.brokers.Version.parse(overview["rabbitmq_version"]) == rabbit.version


async def metrics_are_told(rabbit: mq.RabbitMQ) -> None:
    """Prometheus finds them at once."""
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(rabbit.metrics_url)).raise_for_status().text
    assert f'rabbitmq_version="{rabbit.version}"' in metrics


async def topic_survives_faults(kafka: mq.Kafka) -> None:
    """SIGKILL, both restarts and a pause of the only server: what was acknowledged is still there."""
    [node] = kafka.nodes
    topic = await mq.topic(kafka, "kept")
    await send(kafka, topic, b"before")
    with pytest.raises(mq.BrokerError, match="has no rabbitmqctl"):
        node.control("status")

    node.kill()
    assert (node.running, kafka.running) == (False, False)
    for fault in (node.kill, node.pause, node.resume):  # doing it to what has ended is no error
        fault()
    assert node.running is False
    node.restart()
    assert (node.running, kafka.running) == (True, True)
    assert await values(kafka, topic) == [b"before"]
    node.restart(graceful=True)
    assert polite_ends(kafka) == 1, "it heard that it is to end"
    await send(kafka, topic, b"between")
    node.restart(graceful=False)
    assert polite_ends(kafka) == 1
    assert await values(kafka, topic) == [b"before", b"between"]

    async with mq.producer(kafka, acks="all") as producer:
        node.pause()
        assert node.running, "a paused server exists"
        sending = asyncio.ensure_future(producer.send_and_wait(topic, b"after"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(sending), 1)
        node.pause()  # twice is once
        node.resume()
        node.resume()
        await asyncio.wait_for(sending, 30)
    assert await values(kafka, topic) == [b"before", b"between", b"after"]
    node.pause()
    node.restart(graceful=True)  # also of a server that cannot hear
    assert await values(kafka, topic) == [b"before", b"between", b"after"]


async def queue_survives_faults(rabbit: mq.RabbitMQ) -> None:
    """SIGKILL, both restarts and a pause of the only server: what was confirmed is still there."""
    [node] = rabbit.nodes
    name = rabbit.name("kept")
    async with mq.channel(rabbit) as channel:
        await declare(channel, name)
    await publish(rabbit, name, b"before")
    assert name in node.control("list_queues", "name").splitlines()
    with pytest.raises(mq.BrokerError, match=r"rabbitmqctl list_nothing: .*list_nothing"):
        node.control("list_nothing")

    node.kill()
    assert (node.running, rabbit.running) == (False, False)
    for fault in (node.kill, node.pause, node.resume):  # doing it to what has ended is no error
        fault()
    assert node.running is False
    node.restart()
    assert (node.running, rabbit.running) == (True, True)
    assert await bodies(rabbit, name) == [b"before"]
    await publish(rabbit, name, b"between")
    node.restart(graceful=False)
    assert polite_ends(rabbit) == 0
    assert await bodies(rabbit, name) == [b"before", b"between"]

    async with mq.channel(rabbit) as channel:
        node.pause()
        assert node.running, "a paused server exists"
        message = aio_pika.Message(b"after", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        publishing = asyncio.ensure_future(channel.default_exchange.publish(message, routing_key=name))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(publishing), 1)
        node.pause()  # twice is once
        node.resume()
        node.resume()
        await asyncio.wait_for(publishing, 30)
    assert await bodies(rabbit, name) == [b"before", b"between", b"after"]
    node.pause()
    node.restart(graceful=True)  # also of a server that cannot hear
    assert polite_ends(rabbit) == 1, "it heard that it is to end"
    assert await bodies(rabbit, name) == [b"before", b"between", b"after"]


async def kafka_settings(kafka: mq.Kafka) -> dict[str, str]:
    """What the server itself says its settings are."""
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, "1")])
    finally:
        await admin.close()
    [(_, _, _, _, entries)] = answer.resources
    return {entry[0]: entry[1] for entry in entries}


async def settings_are_what_is_said(kafka: mq.Kafka, **wanted: str) -> None:
    """Each of `broker.settings` is one that the server has; `wanted` (underscores for dots) are among them."""
    asked = {key.replace("_", "."): value for key, value in wanted.items()}
    assert asked.items() <= kafka.settings.items()
    actual = await kafka_settings(kafka)
    assert {key: actual.get(key) for key in kafka.settings} == kafka.settings


async def in_sync(kafka: mq.Kafka, topic: str) -> int:
    """How many replicas of the topic's first partition are in sync."""
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        [found] = await admin.describe_topics([topic])
    finally:
        await admin.close()
    return len(found["partitions"][0]["isr"])


async def members(kafka: mq.Kafka) -> int:
    """How many servers the cluster has."""
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        return len((await admin.describe_cluster())["brokers"])
    finally:
        await admin.close()


async def cluster_survives_a_server(kafka: mq.Kafka, victim: int) -> None:
    """Three servers, and each is one of the cluster; with one killed a replicated topic accepts; it comes back."""
    assert len(kafka.nodes) == 3
    assert await members(kafka) == 3
    topic = await mq.topic(kafka, "replicated", partitions=3, min_insync_replicas=2)
    async with mq.producer(kafka, acks="all") as producer:
        for partition in range(3):
            await producer.send_and_wait(topic, b"before", partition=partition)
        kafka.nodes[victim].kill()
        for partition in range(3):  # each has another leader, and one of them led by the one that is gone
            await asyncio.wait_for(producer.send_and_wait(topic, b"without", partition=partition), 30)
    assert sorted(await values(kafka, topic)) == [b"before"] * 3 + [b"without"] * 3
    assert kafka.running is False
    kafka.nodes[victim].restart()
    assert kafka.running
    await mq.until(lambda: members_are(kafka, 3), within=30, every=0.2)
    await mq.until(lambda: in_sync_is(kafka, topic, 3), within=30, every=0.2)


async def members_are(kafka: mq.Kafka, count: int) -> bool:
    return await members(kafka) == count


async def in_sync_is(kafka: mq.Kafka, topic: str, count: int) -> bool:
    return await in_sync(kafka, topic) == count


async def running_servers(rabbit: mq.RabbitMQ) -> int:
    return sum(node["running"] for node in await queues.management(rabbit, "/nodes"))


async def online(rabbit: mq.RabbitMQ, queue: str) -> int:
    """How many members of a quorum queue are online."""
    found = await queues.management(rabbit, f"/queues/%2F/{queue}")
    return len(found.get("online", []))


async def quorum_survives_a_server(rabbit: mq.RabbitMQ, victim: int) -> None:
    """Three servers in one cluster; with one killed a quorum queue accepts; it comes back."""
    assert len(rabbit.nodes) == 3
    assert await running_servers(rabbit) == 3
    name = rabbit.name("quorum")
    async with mq.channel(rabbit) as channel:
        await declare(channel, name, **QUORUM)
    await publish(rabbit, name, b"before")
    await mq.until(lambda: online_is(rabbit, name, 3), within=30, every=0.2)
    rabbit.nodes[victim].kill()
    await publish(rabbit, name, b"without")
    assert await bodies(rabbit, name) == [b"before", b"without"]
    assert rabbit.running is False
    rabbit.nodes[victim].restart()
    assert rabbit.running
    await mq.until(lambda: running_is(rabbit, 3), within=30, every=0.2)
    await mq.until(lambda: online_is(rabbit, name, 3), within=30, every=0.2)


async def running_is(rabbit: mq.RabbitMQ, count: int) -> bool:
    return await running_servers(rabbit) == count


async def online_is(rabbit: mq.RabbitMQ, queue: str, count: int) -> bool:
    return await online(rabbit, queue) == count


async def keep_silent(message: aio_pika.abc.AbstractIncomingMessage) -> None:
    """Takes a message and never acknowledges it."""


async def acknowledgement_times_out(rabbit: mq.RabbitMQ) -> None:
    """`consumer_timeout` of 1.5 s and a tick of half a second: seen by what the server does."""
    assert rabbit.settings["consumer_timeout"] == "1500"
    name = rabbit.name("slow")
    closed = asyncio.Event()
    async with mq.channel(rabbit) as channel:
        queue = await declare(channel, name)
        await publish(rabbit, name, b"never acknowledged")
        channel.close_callbacks.add(lambda *_: closed.set())
        start = time.monotonic()
        await queue.consume(keep_silent)
        await asyncio.wait_for(closed.wait(), 15)
        assert time.monotonic() - start > 1.4, "it waited for as long as it was told"
