"""A proxy in front of a real broker counts, delays and cuts, and is gone when its block ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from urllib.parse import urlsplit

import aio_pika
import aio_pika.abc
import pytest
from aio_pika import Message
from aiokafka import AIOKafkaProducer

import mqlib as mq
from mqlib import faults
from mqlib.brokers.machine import is_free

PAYLOAD = b"x" * 20_000


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka of these tests' own: a shared one advertises no proxy."""
    with mq.kafka(private=True) as broker:
        yield broker


def lost(connection: aio_pika.abc.AbstractConnection) -> asyncio.Event:
    """Set when the client notices that its connection has gone."""
    event = asyncio.Event()
    connection.close_callbacks.add(lambda *_: event.set())
    return event


def port_of(proxy: mq.Proxy) -> int:
    address = proxy.client.get("bootstrap_servers") or urlsplit(proxy.client["url"]).netloc
    return int(address.rpartition(":")[2])


async def test_rabbitmq_is_reached_through_it_and_the_bytes_are_counted(rabbit: mq.RabbitMQ) -> None:
    """What is published goes up, what is delivered comes down, each counted on its way."""
    async with faults.proxy(rabbit) as proxy, await aio_pika.connect(**proxy.client) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(rabbit.name("proxied"), exclusive=True)
        up, down = proxy.up, proxy.down
        assert min(up, down) > 0, "the handshake passed"
        await channel.default_exchange.publish(Message(PAYLOAD), queue.name)
        assert len(PAYLOAD) < proxy.up - up < len(PAYLOAD) + 500
        assert proxy.down - down < 500
        down = proxy.down
        message = await queue.get()
        assert message.body == PAYLOAD
        assert len(PAYLOAD) < proxy.down - down < len(PAYLOAD) + 500


async def test_kafka_is_reached_through_it_and_the_bytes_are_counted(own: mq.Kafka) -> None:
    """The client follows what the broker advertises, and that is the proxy: nothing passes beside it."""
    topic = await mq.topic(own, "proxied")
    async with faults.proxy(own) as proxy:
        producer = AIOKafkaProducer(**proxy.client, max_batch_size=100_000)
        await producer.start()
        await producer.partitions_for(topic)
        up = proxy.up
        await producer.send_and_wait(topic, PAYLOAD)
        assert len(PAYLOAD) < proxy.up - up < len(PAYLOAD) + 1000
        assert proxy.down > 0
        await producer.stop()
    assert [record.value for record in await mq.read(own, topic)] == [PAYLOAD]


async def test_cut_resets_every_connection_and_new_ones_work(rabbit: mq.RabbitMQ) -> None:
    async with faults.proxy(rabbit) as proxy:
        gone = [lost(await aio_pika.connect(**proxy.client)) for _ in range(2)]
        proxy.cut()
        async with asyncio.timeout(20):
            for event in gone:
                await event.wait()
            connection = await aio_pika.connect(**proxy.client)
            await connection.channel()
            again = lost(connection)
            proxy.cut()  # may be done again
            await again.wait()


async def test_a_kafka_client_survives_a_cut(own: mq.Kafka) -> None:
    """The lesson of a cut connection is that the client makes another: the proxy lets it."""
    topic = await mq.topic(own, "cut")
    async with faults.proxy(own) as proxy:
        producer = AIOKafkaProducer(**proxy.client)
        await producer.start()
        for number in range(3):
            await producer.send_and_wait(topic, b"%d" % number)
            proxy.cut()
        await producer.stop()
    assert [int(record.value) for record in await mq.read(own, topic)] == [0, 1, 2]


async def test_a_cut_connection_is_a_reset_not_an_orderly_end(rabbit: mq.RabbitMQ) -> None:
    """As when a network fails: the client's side sees no end of file."""
    async with faults.proxy(rabbit) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        writer.write(b"AMQP\x00\x00\x09\x01")
        assert await reader.read(1), "the broker's first frame came through"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()


async def test_delay_makes_each_direction_wait(rabbit: mq.RabbitMQ) -> None:
    """A round trip takes at least twice the delay; without it the proxy adds none again."""
    clock = asyncio.get_running_loop()
    async with faults.proxy(rabbit) as proxy, await aio_pika.connect(**proxy.client) as connection:
        channel = await connection.channel()
        proxy.delay, start = 0.25, clock.time()
        queue = await channel.declare_queue(rabbit.name("slow"), exclusive=True)
        assert clock.time() - start >= 0.5
        proxy.delay = 0
        await channel.default_exchange.publish(Message(b"x"), queue.name)


async def test_it_is_undone_when_the_block_ends(rabbit: mq.RabbitMQ) -> None:
    """Also when the block raises: connections are reset, nobody listens any more, no task is left."""
    before = asyncio.all_tasks()
    gone: list[asyncio.Event] = []
    ports: list[int] = []

    async def failing_block() -> None:
        async with faults.proxy(rabbit) as proxy:
            gone.append(lost(await aio_pika.connect(**proxy.client)))
            ports.append(port_of(proxy))
            assert not is_free(ports[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_block()
    async with asyncio.timeout(20):
        await gone[0].wait()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", ports[0])
    await mq.until(lambda: asyncio.all_tasks() <= before, within=20)


async def test_it_can_be_put_in_front_of_the_same_kafka_again(own: mq.Kafka) -> None:
    """A cell that is run again finds the advertised port free, right after a block with open connections."""
    for _ in range(3):
        async with faults.proxy(own) as proxy:
            producer = AIOKafkaProducer(**proxy.client)
            await producer.start()
            proxy.cut()
        await producer.stop()


async def test_a_broker_that_does_not_answer_resets_the_client(rabbit: mq.RabbitMQ) -> None:
    """As the closed port itself would refuse it."""
    from mqlib.brokers.machine import free_ports

    gone = dataclasses.replace(rabbit, url=f"amqp://guest:guest@127.0.0.1:{free_ports(1)[0]}/")
    async with asyncio.timeout(20), faults.proxy(gone) as proxy:
        with pytest.raises(OSError, match=r"(?i)reset|closed|connection"):
            await aio_pika.connect(**proxy.client)


async def test_what_the_address_says_beside_the_port_is_kept(rabbit: mq.RabbitMQ) -> None:
    """Credentials, virtual host and options of the URL; aio-pika reads them all from there."""
    told = dataclasses.replace(rabbit, url=rabbit.url.partition("?")[0] + "?heartbeat=7&name=lesson")
    async with faults.proxy(told) as proxy:
        before, after = urlsplit(told.url), urlsplit(proxy.client["url"])
        assert (after.username, after.password) == (before.username, before.password)
        assert (after.hostname, after.path, after.query) == ("127.0.0.1", before.path, before.query)


async def test_a_shared_kafka_is_refused_and_told_what_to_do(kafka: mq.Kafka) -> None:
    """Its clients follow the address that it advertises for everybody, past any proxy."""
    shared = dataclasses.replace(kafka, proxy_ports=None)
    with pytest.raises(mq.BrokerError, match=r"mq\.kafka\(private=True\)"):
        async with faults.proxy(shared):
            pytest.fail("there can be no proxy")


async def test_a_lost_answer_leaves_a_message_that_nobody_was_told_of(rabbit: mq.RabbitMQ) -> None:
    """The publisher has no confirm, the queue has the message: unknown is the right word, and a retry doubles it."""
    async with mq.channel(rabbit) as direct:
        queue = await direct.declare_queue(rabbit.name("lost-answer"))
        async with faults.proxy(rabbit) as proxy:
            async with mq.channel(proxy) as publishing:
                with proxy.swallow("down"):
                    outcome = await mq.pump_messages(
                        publishing.default_exchange, queue.name, [b"once"], within=1, strict=False
                    )
                assert (outcome.acknowledged, list(outcome.failed), list(outcome.unknown)) == (0, [], [0])
                assert proxy.swallowed > 0
            async with mq.channel(proxy) as again:
                await mq.pump_messages(again.default_exchange, queue.name, [b"once"])
        assert [message.body for message in await mq.take_messages(queue, 5, within=0)] == [b"once"] * 2


async def test_a_lost_request_leaves_nothing(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as direct:
        queue = await direct.declare_queue(rabbit.name("lost-request"))
        async with faults.proxy(rabbit) as proxy, mq.channel(proxy) as publishing:
            with proxy.swallow("up"):
                outcome = await mq.pump_messages(
                    publishing.default_exchange, queue.name, [b"never"], within=1, strict=False
                )
            assert list(outcome.unknown) == [0], "the publisher cannot tell it from a lost answer"
        assert await mq.take_messages(queue, 1, within=0) == []


async def test_an_idempotent_producer_stores_once_what_it_had_to_send_twice(own: mq.Kafka) -> None:
    """Kafka's answer is lost, the producer tries again by itself, and the broker knows the batch (KIP-98)."""
    topic = await mq.topic(own, "lost-answer")
    options = {"enable_idempotence": True, "request_timeout_ms": 2000}
    async with faults.proxy(own) as proxy, mq.producer(proxy, **options) as producer:
        await producer.send_and_wait(topic, b"first")
        with proxy.swallow("down"):
            sending = await producer.send(topic, b"second")
            await mq.until(lambda: proxy.swallowed)
        await asyncio.wait_for(sending, 20)
    assert [record.value for record in await mq.read(own, topic)] == [b"first", b"second"]


async def test_a_black_hole_answers_nobody_and_ends_in_a_reset(rabbit: mq.RabbitMQ) -> None:
    """Connections that lost nothing live on; those that did are reset when the block ends, also by an error."""
    async with faults.proxy(rabbit) as proxy, mq.channel(proxy) as idle:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))

        async def failing_block() -> None:
            with proxy.swallow("up", "down"):
                writer.write(b"AMQP\x00\x00\x09\x01")
                await mq.until(lambda: proxy.swallowed == 8)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await failing_block()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        await idle.declare_queue(rabbit.name("still-there"), exclusive=True)


async def test_a_direction_that_is_none_is_refused(rabbit: mq.RabbitMQ) -> None:
    async with faults.proxy(rabbit) as proxy:
        for wrong in ((), ("left",), ("up", "sideways")):
            with pytest.raises(ValueError, match="directions are 'up'"), proxy.swallow(*wrong):
                pytest.fail("there is no such direction")


async def test_a_paused_and_a_killed_node_are_back_after_the_block() -> None:
    """Also after an error in it, and when the cell has restarted the node itself."""
    with mq.kafka(private=True) as broker:
        [node] = broker.nodes
        topic = await mq.topic(broker, "kept")
        async with mq.producer(broker) as producer:
            await mq.pump(producer, topic, [b"before"])
            with contextlib.suppress(ZeroDivisionError):
                async with faults.paused(node):
                    outcome = await mq.pump(producer, topic, [b"frozen"], within=1, strict=False)
                    assert len(outcome.unknown) + len(outcome.failed) == 1
                    raise ZeroDivisionError
        assert len(await mq.read(broker, topic)) in (1, 2), "unknown was the right word"
        for restarted in (False, True):
            with contextlib.suppress(ZeroDivisionError):
                async with faults.killed(node):
                    assert not node.running
                    if restarted:
                        node.restart()
                    raise ZeroDivisionError
            assert node.running
            assert (await mq.read(broker, topic))[0].value == b"before"


async def test_a_new_queue_is_there_after_a_kill() -> None:
    """Mnesia's second record of the declaration is held up until RabbitMQ has answered: that happens by itself, too."""
    with mq.rabbitmq(private=True) as rabbit:
        [node] = rabbit.nodes
        queue = rabbit.name("new")
        node.control("eval", "sys:suspend(mnesia_recover).")
        await mq.declare(rabbit, queue, durable=True)
        node.control("eval", "sys:resume(mnesia_recover).")
        async with mq.killed(node):
            pass
        assert (await mq.depth(rabbit, queue, by="amqp")).ready == 0
        async with mq.paused(node):
            node.sync()  # what does not answer is let be


async def test_the_nodes_of_a_cluster_come_back_together() -> None:
    """None of them can be ready before most are there: whoever waited for the first would wait in vain."""
    with mq.kafka(nodes=3) as cluster:
        topic = await mq.topic(cluster, "together")
        async with mq.producer(cluster, acks="all") as producer:
            await mq.pump(producer, topic, [b"before"])
        for fault in (faults.paused, faults.killed):
            async with asyncio.timeout(90), fault(*cluster.nodes):
                pass
            assert all(node.running for node in cluster.nodes)
            assert [record.value for record in await mq.read(cluster, topic, within=30)] == [b"before"]
