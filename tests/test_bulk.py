"""Many messages at once: each one's outcome has the right word, and no message hurts another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError

import mqlib as mq
from mqlib.bulk import OVERHEAD
from mqlib.queues import blocked


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka of these tests' own, to freeze and to kill."""
    with mq.kafka(private=True) as broker:
        yield broker


def numbered(count: int, size: int = 0) -> list[bytes]:
    """Values that begin with their number."""
    return [b"%d " % number + b"x" * size for number in range(count)]


async def ledger_of(kafka: mq.Kafka, topic: str, ledger: mq.Ledger) -> mq.Ledger:
    """The ledger, with everything received that a full read of the topic finds."""
    for record in await mq.read(kafka, topic, within=60):
        ledger.received(int(record.value.split()[0]), key=record.key, partition=record.partition)
    return ledger


@pytest.mark.parametrize(("partitions", "keys"), [(1, False), (3, False), (3, True)])
async def test_all_are_stored_in_order(kafka: mq.Kafka, partitions: int, keys: bool) -> None:
    """In each partition, and so for each key; a generator will do."""
    topic, ledger = await mq.topic(kafka, "bulk", partitions=partitions), mq.Ledger()
    async with mq.producer(kafka) as producer:
        outcome = await mq.pump(
            producer, topic, iter(numbered(5000, 50)), ledger=ledger,
            keys=(b"k%d" % (number % 20) for number in range(5000)) if keys else None,
        )  # fmt: skip
        if keys:
            for number in range(20):
                place = await producer.send_and_wait(topic, b"%d" % number, key=b"k%d" % number)
                assert (await mq.read(kafka, topic))[-1].key is not None
                where = {record.partition for record in await mq.read(kafka, topic) if record.key == b"k%d" % number}
                assert where == {place.partition}, "a key's records go where `send` puts them"
                break
    assert (outcome.acknowledged, outcome.failed, outcome.unknown) == (5000, {}, {})
    assert str(outcome) == "acknowledged 5000, failed 0, unknown 0"
    await ledger_of(kafka, topic, ledger)
    assert (ledger.lost, ledger.unexpected, ledger.duplicated) == (0, 0, 1 if keys else 0)
    assert (ledger.reordered_in_partition, ledger.reordered_in_key) == (0, 0)
    assert len(ledger.table("partition")) == partitions


async def test_nothing_to_send_is_nothing(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "nothing")
    async with mq.producer(kafka) as producer:
        assert str(await mq.pump(producer, topic, [])) == "acknowledged 0, failed 0, unknown 0"
        assert str(await mq.pump(producer, topic, [], keys=[])) == "acknowledged 0, failed 0, unknown 0"


async def test_compressed_and_in_a_transaction(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "transaction", partitions=2)
    async with mq.producer(kafka, transactional_id=kafka.name("t"), compression_type="zstd") as producer:
        async with producer.transaction():
            await mq.pump(producer, topic, numbered(3000))
        await producer.begin_transaction()
        await mq.pump(producer, topic, numbered(500))
        await producer.abort_transaction()
    assert len(await mq.read(kafka, topic, isolation_level="read_committed")) == 3000


async def test_what_cannot_be_meant_is_refused(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "refused")
    async with mq.producer(kafka) as producer:
        with pytest.raises(ValueError, match=r"has the partitions \[0\], and not 3"):
            await mq.pump(producer, topic, [b"x"], partition=3)
        for keys in ([], [b"a", b"b"]):
            with pytest.raises(ValueError, match=r"shorter|longer"):
                await mq.pump(producer, topic, [b"x"], keys=keys)
        async with asyncio.timeout(10):
            with pytest.raises(mq.BrokerError, match="Kafka has no topic 'no-such-topic'"):
                await mq.pump(producer, "no-such-topic", [b"x"])


@pytest.mark.parametrize("batch", [16_384, 65_536])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_batch_is_never_larger_than_the_topic_allows(kafka: mq.Kafka, batch: int, keyed: bool) -> None:
    """Records of 500 B and a limit of 2,000: all are stored, although the client would make one batch of them."""
    topic = await mq.topic(kafka, "narrow", max_message_bytes=2000)
    async with mq.producer(kafka, max_batch_size=batch) as producer:
        for count in (10, 1000):
            keys = [b"k%d" % (number % 3) for number in range(count)] if keyed else None
            assert (await mq.pump(producer, topic, numbered(count, 500), keys=keys)).acknowledged == count
    assert len(await mq.read(kafka, topic)) == 1010


@pytest.mark.parametrize("batch", [1000, 16_384])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_record_that_is_alone_too_large_fails_alone(kafka: mq.Kafka, batch: int, keyed: bool) -> None:
    """With its size and the limit; the twenty around it are stored."""
    topic = await mq.topic(kafka, "narrow", max_message_bytes=2000)
    values = numbered(21, 50)
    values[10] = b"10 " + b"x" * 3000
    async with mq.producer(kafka, max_batch_size=batch) as producer:
        keys = [b"k"] * 21 if keyed else None
        words = r"1 failed: number 10: .* 3\d\d\d bytes .* max.message.bytes is 2000"
        with pytest.raises(mq.Undelivered, match=words) as failed:
            await mq.pump(producer, topic, values, keys=keys)
    outcome = failed.value.outcome
    assert (outcome.acknowledged, [*outcome.failed], [*outcome.unknown]) == (20, [10], [])
    assert isinstance(outcome.failed[10], MessageSizeTooLargeError)
    assert [int(record.value.split()[0]) for record in await mq.read(kafka, topic)] == [*range(10), *range(11, 21)]


async def test_around_the_limit_no_small_record_is_hurt(kafka: mq.Kafka) -> None:
    """Whatever the size of one record is, it is stored or fails by itself, and the edge is the broker's own."""
    topic = await mq.topic(kafka, "edge", max_message_bytes=1000)
    async with mq.producer(kafka) as producer:
        stored = {}
        for size in range(1000 - OVERHEAD - 5, 1003, 3):
            outcome = await mq.pump(producer, topic, [b"small", b"x" * size, b"small"], strict=False)
            assert {*outcome.failed} <= {1}
            assert outcome.unknown == {}
            stored[size] = not outcome.failed
    assert [*stored.values()] == sorted(stored.values(), reverse=True), "up to some size, and none beyond it"
    assert stored[1000 - OVERHEAD - 5]
    assert not stored[max(stored)]


async def test_a_record_larger_than_a_batch_and_allowed_is_stored(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "wide")
    async with mq.producer(kafka, max_batch_size=1000) as producer:
        assert (await mq.pump(producer, topic, [b"a", b"x" * 5000, b"b"])).acknowledged == 3
    assert [len(record.value) for record in await mq.read(kafka, topic)] == [1, 5000, 1]


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_frozen_broker_makes_outcomes_unknown_in_time(
    own: mq.Kafka, idempotent: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The deadline is one for the whole, also for an idempotent producer; a retry then may double them, and the ledger
    tells how many it did."""
    topic, ledger, tasks = await mq.topic(own, "frozen"), mq.Ledger(), asyncio.all_tasks()
    options: dict[str, Any] = {"enable_idempotence": idempotent, "request_timeout_ms": 1500}
    async with mq.producer(own, **options) as producer:
        async with asyncio.timeout(20), mq.paused(own.nodes[0]):
            outcome = await mq.pump(producer, topic, numbered(3), within=1, strict=False)
            assert str(outcome) == "acknowledged 0, failed 3, unknown 0", "it did not even learn who leads"
        await producer.partitions_for(topic)
        async with asyncio.timeout(20), mq.paused(own.nodes[0]):
            with pytest.raises(mq.Undelivered, match=r"outcome unknown, they may be stored") as failed:
                await mq.pump(producer, topic, numbered(10), within=2, ledger=ledger)
        outcome = failed.value.outcome
        assert len(outcome.unknown) + len(outcome.failed) == 10
        assert (ledger.unknown, ledger.lost, ledger.lost_although_acknowledged) == (
            len(outcome.unknown), len(outcome.unknown), 0
        )  # fmt: skip
        await mq.pump(producer, topic, numbered(10), ledger=ledger, within=20)
    await ledger_of(own, topic, ledger)
    assert (ledger.lost, ledger.unexpected) == (0, 0)
    assert ledger.duplicated in (0, 10), "a batch is stored whole or not at all"
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
    assert capfd.readouterr().err == ""


async def test_kafka_is_killed_in_the_middle_of_a_hundred_thousand(own: mq.Kafka) -> None:
    """What was acknowledged is there; what the ledger says is what a full read, counted with plain sets, says."""
    topic, ledger = await mq.topic(own, "killed"), mq.Ledger()
    values = numbered(100_000, 100)

    def until_the_broker_dies() -> Iterator[bytes]:
        for number, value in enumerate(values):
            if number == 50_000:
                own.nodes[0].kill()
            yield value

    async with mq.producer(own, enable_idempotence=True, max_batch_size=100_000, request_timeout_ms=2000) as producer:
        outcome = await mq.pump(producer, topic, until_the_broker_dies(), within=6, ledger=ledger, strict=False)
    await asyncio.to_thread(own.nodes[0].restart, graceful=False)
    assert outcome.acknowledged + len(outcome.failed) + len(outcome.unknown) == 100_000
    assert min(outcome.acknowledged, len(outcome.failed) + len(outcome.unknown)) > 0, "it was in the middle"
    stored = Counter(int(record.value.split()[0]) for record in await mq.read(own, topic, within=60))
    await ledger_of(own, topic, ledger)
    acknowledged = {*range(100_000)} - {*outcome.failed} - {*outcome.unknown}
    assert acknowledged <= stored.keys()
    assert (ledger.lost_although_acknowledged, ledger.duplicated) == (0, sum(stored.values()) - len(stored))
    assert ledger.lost == len({*outcome.unknown} - stored.keys())
    assert ledger.delivered_although_unacknowledged == len(stored.keys() - acknowledged)
    assert not {*outcome.failed} & stored.keys(), "failed means: not stored"


async def received(queue: Any, ledger: mq.Ledger, count: int = 200_000) -> Counter[int]:
    """Everything that is in the queue, counted; also in the ledger."""
    stored: Counter[int] = Counter()
    await queue.channel.set_qos(prefetch_count=500)
    async with queue.iterator(no_ack=True, timeout=2) as messages:
        try:
            async for message in messages:
                number = int(message.body.split()[0])
                stored[number] += 1
                ledger.received(number)
        except TimeoutError:
            pass
    return stored


@pytest.mark.parametrize("window", [1, 500])
async def test_messages_are_confirmed_persistent_and_in_order(rabbit: mq.RabbitMQ, window: int) -> None:
    ledger = mq.Ledger()
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("bulk"), durable=True)
        outcome = await mq.pump_messages(
            channel.default_exchange, queue.name, iter(numbered(300)), window=window, ledger=ledger
        )
        assert str(outcome) == "acknowledged 300, failed 0, unknown 0"
        for message in await mq.take_messages(queue, 300):
            assert message.delivery_mode == 2
            ledger.received(int(message.body.split()[0]))
    assert ledger.exact
    assert ledger.reordered == 0


@pytest.mark.parametrize("raises", [False, True])
async def test_what_no_queue_takes_has_failed(rabbit: mq.RabbitMQ, raises: bool) -> None:
    """aio-pika tells it in two ways, one of which looks like success."""
    async with mq.channel(rabbit, on_return_raises=raises) as channel:
        with pytest.raises(mq.Undelivered, match=r"3 failed: number 0: .*no-such-queue"):
            await mq.pump_messages(channel.default_exchange, "no-such-queue", numbered(3))


async def test_what_a_full_queue_refuses_has_failed(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel:
        limits: dict[str, Any] = {"x-max-length": 5, "x-overflow": "reject-publish"}
        queue = await channel.declare_queue(rabbit.name("full"), arguments=limits)
        outcome = await mq.pump_messages(channel.default_exchange, queue.name, numbered(9), window=1, strict=False)
        assert (outcome.acknowledged, [*outcome.failed], outcome.unknown) == (5, [5, 6, 7, 8], {})
        assert "refuses" in str(outcome.failed[5])


async def test_without_confirms_nobody_can_know(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit, publisher_confirms=False) as channel:
        with pytest.raises(ValueError, match="no publisher confirms"):
            await mq.pump_messages(channel.default_exchange, "x", [b"x"])


async def test_a_connection_that_is_cut_leaves_every_outcome_known_or_unknown(
    rabbit: mq.RabbitMQ, capfd: pytest.CaptureFixture[str]
) -> None:
    ledger, tasks = mq.Ledger(), asyncio.all_tasks()
    async with mq.channel(rabbit) as direct:
        queue = await direct.declare_queue(rabbit.name("cut"), durable=True)
        async with mq.proxy(rabbit) as proxy:

            def until_it_is_cut() -> Iterator[bytes]:
                for number, value in enumerate(numbered(2000)):
                    if number == 1000:
                        proxy.cut()
                    yield value

            async with mq.channel(proxy) as channel, asyncio.timeout(20):
                outcome = await mq.pump_messages(
                    channel.default_exchange, queue.name, until_it_is_cut(), window=50, ledger=ledger, strict=False
                )
        assert outcome.acknowledged + len(outcome.failed) + len(outcome.unknown) == 2000
        assert 0 < outcome.acknowledged <= 1000
        assert len(outcome.failed) > 900, "after the cut nothing was handed over"
        stored = await received(queue, ledger)
    assert {*range(2000)} - {*outcome.failed} - {*outcome.unknown} <= stored.keys()
    assert not {*outcome.failed} & stored.keys(), "failed means: not stored"
    assert (ledger.lost_although_acknowledged, ledger.duplicated) == (0, 0)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
    assert capfd.readouterr().err == ""


async def test_rabbitmq_is_killed_in_the_middle_of_a_hundred_thousand() -> None:
    """What was confirmed is there; what the ledger says is what a full read, counted with plain sets, says."""
    ledger = mq.Ledger()
    with mq.rabbitmq(private=True) as own:
        name = own.name("killed")
        await mq.declare(own, name, durable=True)
        await asyncio.to_thread(own.nodes[0].restart)  # now the queue is on disk

        def until_the_broker_dies() -> Iterator[bytes]:
            for number, value in enumerate(numbered(100_000)):
                if number == 5000:
                    own.nodes[0].kill()
                yield value

        async with mq.channel(own) as channel, asyncio.timeout(60):
            outcome = await mq.pump_messages(
                channel.default_exchange, name, until_the_broker_dies(), within=40, ledger=ledger, strict=False
            )
        await asyncio.to_thread(own.nodes[0].restart, graceful=False)
        assert outcome.acknowledged + len(outcome.failed) + len(outcome.unknown) == 100_000
        assert outcome.acknowledged > 1000
        async with mq.channel(own) as channel:
            stored = await received(await channel.get_queue(name), ledger)
    acknowledged = {*range(100_000)} - {*outcome.failed} - {*outcome.unknown}
    assert acknowledged <= stored.keys()
    assert (ledger.lost_although_acknowledged, ledger.duplicated) == (0, sum(stored.values()) - len(stored))
    assert ledger.lost == len({*outcome.unknown} - stored.keys())
    assert ledger.delivered_although_unacknowledged == len(stored.keys() - acknowledged)


async def test_a_memory_alarm_makes_outcomes_unknown_and_says_why() -> None:
    """Blocked, not failed: the message is delivered when the alarm is over; consumers go on meanwhile."""
    with mq.rabbitmq(private=True) as own:
        [node] = own.nodes
        async with mq.channel(own) as publishing, mq.channel(own) as consuming:
            queue = await consuming.declare_queue(own.name("blocked"), durable=True)
            await asyncio.to_thread(node.control, "set_vm_memory_high_watermark", "0")
            async with asyncio.timeout(20):
                with pytest.raises(mq.Undelivered, match=r"1 outcome unknown.*blocked by broker \(low on memory\)"):
                    await mq.pump_messages(publishing.default_exchange, queue.name, [b"later"], within=2)
            assert await blocked(publishing) == "low on memory"
            assert await mq.take_messages(queue, 1, within=0) == [], "the other connection still answers"
            assert await blocked(consuming) is None
            await asyncio.to_thread(node.control, "set_vm_memory_high_watermark", "0.6")
            assert [message.body for message in await mq.take_messages(queue, 1, within=30)] == [b"later"]
            assert await blocked(publishing) is None
