"""Many messages at once: each one's outcome has the right word, and no message hurts another."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel
from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import IllegalOperation, MessageSizeTooLargeError

import mqlib as mq
from mqlib.queues import blocked


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka of these tests' own, to freeze and to kill."""
    with mq.kafka(private=True) as broker:
        yield broker


@pytest.fixture(scope="module")
def own_rabbit() -> Iterator[mq.RabbitMQ]:
    """A RabbitMQ of these tests' own, to kill and to starve."""
    with mq.rabbitmq(private=True) as broker:
        yield broker


@pytest.fixture
def leftovers(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Leftovers:
    return Leftovers(caplog, capfd)


class Leftovers:
    """After its block no task is pending and nothing is on stderr, nor will be when what it made is collected."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        self._caplog, self._capfd = caplog, capfd

    async def __aenter__(self) -> None:
        self._tasks = asyncio.all_tasks()

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is None:
            await mq.until(lambda: asyncio.all_tasks() == self._tasks, within=20)
            gc.collect()
            # What a logger without a handler says goes to stderr, only not while pytest catches it.
            logged = [record.getMessage() for record in self._caplog.records if record.name == "asyncio"]
            assert (logged, self._capfd.readouterr().err) == ([], "")


def numbered(count: int, size: int = 0) -> list[bytes]:
    """Values that begin with their number."""
    return [b"%d " % number + b"x" * size for number in range(count)]


def number_of(value: bytes) -> int:
    return int(value.split()[0])


def acknowledged(outcome: mq.Outcome, count: int) -> set[int]:
    """The places of what was acknowledged, by subtraction; all three words together are the whole input."""
    rest = {*outcome.failed} | {*outcome.unknown}
    assert outcome.acknowledged + len(outcome.failed) + len(outcome.unknown) == count
    assert rest <= {*range(count)}
    assert outcome.acknowledged == count - len(rest), "each message has one word"
    return {*range(count)} - rest


def account(ledger: mq.Ledger, records: list[ConsumerRecord]) -> Counter[int]:
    """How often each number is in a full read, counted without the ledger, which gets them, too."""
    for record in records:
        ledger.received(number_of(record.value), key=record.key, partition=record.partition)
    return Counter(number_of(record.value) for record in records)


def agree(ledger: mq.Ledger, outcome: mq.Outcome, stored: Counter[int], count: int) -> None:
    """Outcome, ledger and a full read tell one story, in which nothing acknowledged is lost and nothing failed is
    there."""
    sure = acknowledged(outcome, count)
    row = ledger.table().loc[""]
    assert (row["acknowledged"], row["failed"], row["unknown"]) == (
        len(sure), len(outcome.failed), len(outcome.unknown)
    )  # fmt: skip
    assert sure <= stored.keys()
    assert not {*outcome.failed} & stored.keys(), "failed means: not stored"
    assert (ledger.lost_although_acknowledged, ledger.unexpected) == (0, 0)
    assert (row["received"], ledger.duplicated) == (len(stored), stored.total() - len(stored))
    assert ledger.missing() == sorted({*outcome.unknown} - stored.keys())
    assert ledger.delivered_although_unacknowledged == len(stored.keys() - sure)


def test_the_words_of_an_outcome() -> None:
    """How many of each kind, and each kind's first error by place, whenever it came."""
    outcome = mq.Outcome(3, {7: ValueError("later"), 5: ValueError("first")}, {9: TimeoutError("no answer")})
    assert str(outcome) == "acknowledged 3, failed 2, unknown 1"
    told = mq.Undelivered(outcome)
    assert str(told) == (
        "acknowledged 3; 2 failed: number 5: ValueError: first; "
        "1 outcome unknown, they may be stored: number 9: TimeoutError: no answer"
    )
    assert told.outcome is outcome
    assert "unknown" not in str(mq.Undelivered(mq.Outcome(0, {0: ValueError("x")})))
    assert "failed" not in str(mq.Undelivered(mq.Outcome(0, {}, {0: ValueError("x")})))


def to_the_last(key: bytes | None, every: list[int], available: list[int]) -> int:
    """A partitioner of somebody's own."""
    return every[-1]


@pytest.mark.parametrize(
    ("partitions", "keyed", "options"),
    [(1, False, {}), (3, False, {}), (3, True, {}), (3, True, {"partitioner": to_the_last})],
    ids=["one partition", "three", "keys", "a partitioner"],
)
async def test_all_are_stored_in_order(kafka: mq.Kafka, partitions: int, keyed: bool, options: dict[str, Any]) -> None:
    """In each partition, and so for each key, which is where `send` puts it; a generator will do."""
    topic, ledger = await mq.topic(kafka, "bulk", partitions=partitions), mq.Ledger()
    twin, keys = await mq.topic(kafka, "twin", partitions=partitions), [b"k%d" % number for number in range(20)]
    async with mq.producer(kafka, **options) as producer:
        home = {key: (await producer.send_and_wait(twin, b"", key=key)).partition for key in keys}
        outcome = await mq.pump(
            producer, topic, iter(numbered(5000, 50)), ledger=ledger,
            keys=(keys[number % 20] for number in range(5000)) if keyed else None,
        )  # fmt: skip
    assert (outcome.acknowledged, outcome.failed, outcome.unknown) == (5000, {}, {})
    records = await mq.read(kafka, topic)
    agree(ledger, outcome, account(ledger, records), 5000)
    assert ledger.exact
    assert (ledger.reordered_in_partition, ledger.reordered_in_key) == (0, 0)
    used = {record.partition for record in records}
    assert used == ({*home.values()} if keyed else {*range(partitions)})
    if keyed:
        assert all((record.key, record.partition) in home.items() for record in records)


async def test_a_given_partition_takes_everything(kafka: mq.Kafka) -> None:
    """With keys, too, which are kept."""
    topic = await mq.topic(kafka, "given", partitions=3)
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, numbered(1000, 50), partition=1)
        await mq.pump(producer, topic, numbered(2), keys=[b"a", None], partition=1)
    records = await mq.read(kafka, topic)
    assert [number_of(record.value) for record in records] == [*range(1000), 0, 1]
    assert {record.partition for record in records} == {1}
    assert [record.key for record in records[-3:]] == [None, b"a", None]


async def test_nothing_to_send_is_nothing(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "nothing")
    async with mq.producer(kafka) as producer:
        assert str(await mq.pump(producer, topic, [])) == "acknowledged 0, failed 0, unknown 0"
        assert str(await mq.pump(producer, topic, [], keys=[])) == "acknowledged 0, failed 0, unknown 0"
    assert await mq.read(kafka, topic) == []


async def test_in_a_transaction(kafka: mq.Kafka) -> None:
    """What was aborted was acknowledged, and nobody who reads what is committed sees it. Without one nothing goes."""
    topic = await mq.topic(kafka, "transaction", partitions=2)
    async with mq.producer(kafka, transactional_id=kafka.name("t"), compression_type="zstd") as producer:
        with pytest.raises(IllegalOperation, match="not in transaction"):
            await mq.pump(producer, topic, numbered(1))
        async with producer.transaction():
            assert (await mq.pump(producer, topic, numbered(3000, 20))).acknowledged == 3000
        await producer.begin_transaction()
        assert (await mq.pump(producer, topic, numbered(500))).acknowledged == 500
        await producer.abort_transaction()
    committed = await mq.read(kafka, topic, isolation_level="read_committed")
    assert sorted(number_of(record.value) for record in committed) == [*range(3000)]
    assert len(await mq.read(kafka, topic)) == 3500


async def test_a_journal_tells_the_same_as_the_ledger(kafka: mq.Kafka, tmp_path: Path) -> None:
    topic, ledger, replayed = await mq.topic(kafka, "journal", max_message_bytes=500), mq.Ledger(), mq.Ledger()
    journal = mq.Journal(tmp_path / "journal")
    values = [*numbered(20), b"x" * 900, *numbered(20)]
    async with mq.producer(kafka) as producer:
        for book in (ledger, journal):
            outcome = await mq.pump(producer, topic, values, ledger=book, strict=False)
            assert str(outcome) == "acknowledged 40, failed 1, unknown 0"
    journal.close()
    replayed.replay(tmp_path / "journal")
    assert str(replayed) == str(ledger)
    assert ledger.table().loc[""]["failed"] == 1


async def test_what_cannot_be_meant_is_refused(kafka: mq.Kafka) -> None:
    """Before anything is sent, wherever that can be seen."""
    topic = await mq.topic(kafka, "refused")
    async with mq.producer(kafka) as producer:
        with pytest.raises(ValueError, match=r"has the partitions \[0\], and not 3"):
            await mq.pump(producer, topic, [b"x"], partition=3)
        for keys in (0, 4999, 5001):
            with pytest.raises(ValueError, match=f"5000 values and {keys} keys"):
                await mq.pump(producer, topic, numbered(5000), keys=[b"k"] * keys)
        assert await mq.read(kafka, topic) == []
        for keys in (1, 3):
            with pytest.raises(ValueError, match=r"shorter|longer"):
                await mq.pump(producer, topic, iter(numbered(2)), keys=iter([b"k"] * keys))
        async with asyncio.timeout(10):
            with pytest.raises(mq.BrokerError, match="Kafka has no topic 'no-such-topic'"):
                await mq.pump(producer, "no-such-topic", [b"x"])
    with pytest.raises(ValueError, match="the producer is closed"):
        await mq.pump(producer, topic, [b"x"])
    async with mq.producer(kafka, acks=0) as producer:
        with pytest.raises(ValueError, match="acks=0, so nobody can know"):
            await mq.pump(producer, topic, [b"x"])


@pytest.mark.parametrize("keyed", [False, True])
async def test_an_input_that_breaks_is_told_and_what_went_before_is_sent(
    kafka: mq.Kafka, keyed: bool, leftovers: Leftovers
) -> None:
    """A text among the bytes, with its number; an error of the generator's own, as it is, a time-out among them."""
    topic, ledger = await mq.topic(kafka, "broken"), mq.Ledger()

    def breaking(error: Exception) -> Iterator[bytes]:
        yield from numbered(3000, 20)
        raise error

    async with leftovers:
        async with mq.producer(kafka) as producer:
            keys = [b"k"] * 3 if keyed else None
            with pytest.raises(TypeError, match="the last that was read is number 1"):
                await mq.pump(producer, topic, [b"0", "text", b"2"], keys=keys)  # type: ignore[list-item]
            for error in (KeyError("mine"), TimeoutError("mine")):
                many: Any = (b"k" for _ in range(4000)) if keyed else None
                with pytest.raises(type(error), match="mine"):
                    await mq.pump(producer, topic, breaking(error), keys=many, ledger=ledger)
        stored = account(ledger, await mq.read(kafka, topic))
    assert 0 < len(stored) < 3000
    assert (ledger.lost, ledger.unknown, ledger.unexpected) == (0, 0, 0), "closing the producer waited for the answers"


async def test_whoever_cancels_it_finds_the_truth_in_the_ledger(kafka: mq.Kafka, leftovers: Leftovers) -> None:
    topic, ledger = await mq.topic(kafka, "cancelled"), mq.Ledger()

    def until_it_is_cancelled() -> Iterator[bytes]:
        for number, value in enumerate(numbered(5000, 50)):
            if number == 2000:
                job.cancel()
            yield value

    async with leftovers:
        async with mq.producer(kafka) as producer:
            job = asyncio.create_task(mq.pump(producer, topic, until_it_is_cancelled(), ledger=ledger))
            await asyncio.wait([job])
            assert job.cancelled()
        stored = account(ledger, await mq.read(kafka, topic))
    assert 0 < len(stored) < 5000
    assert (ledger.lost, ledger.unknown, ledger.unexpected, ledger.duplicated) == (0, 0, 0, 0)


@pytest.mark.parametrize("batch", [16_384, 65_536])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_batch_is_never_larger_than_the_topic_allows(kafka: mq.Kafka, batch: int, keyed: bool) -> None:
    """Records of 500 B and a limit of 2,000: all are stored, although the client would make one batch of them."""
    topic = await mq.topic(kafka, "narrow", max_message_bytes=2000)
    async with mq.producer(kafka, max_batch_size=batch) as producer:
        for count in (10, 1000):
            keys = [b"k%d" % (number % 3) for number in range(count)] if keyed else None
            assert (await mq.pump(producer, topic, numbered(count, 500), keys=keys)).acknowledged == count
    stored = Counter(number_of(record.value) for record in await mq.read(kafka, topic))
    assert stored == Counter(range(10)) + Counter(range(1000))


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_compression_makes_larger_still_fits(kafka: mq.Kafka, codec: str) -> None:
    """There is nothing to compress in random bytes: two records that just fill a batch grow beyond the limit."""
    dice = random.Random(1)
    topic = await mq.topic(kafka, "random", max_message_bytes=100_000)
    values = [dice.randbytes(size) for second in range(39_860, 39_930, 4) for size in (60_000, second)]
    async with mq.producer(kafka, max_batch_size=100_000, compression_type=codec) as producer:
        for first in range(0, len(values), 2):
            await mq.pump(producer, topic, values[first : first + 2])
    assert [record.value for record in await mq.read(kafka, topic)] == values


@pytest.mark.parametrize("batch", [1000, 16_384])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_record_that_is_alone_too_large_fails_alone(kafka: mq.Kafka, batch: int, keyed: bool) -> None:
    """With its size and the limit; the twenty around it are stored."""
    topic, ledger = await mq.topic(kafka, "narrow", max_message_bytes=2000), mq.Ledger()
    values = numbered(21, 50)
    values[10] = b"10 " + b"x" * 3000
    async with mq.producer(kafka, max_batch_size=batch) as producer:
        keys = [b"k"] * 21 if keyed else None
        words = r"1 failed: number 10: .* 3\d\d\d bytes .* max.message.bytes is 2000"
        with pytest.raises(mq.Undelivered, match=words) as failed:
            await mq.pump(producer, topic, values, keys=keys, ledger=ledger)
    outcome = failed.value.outcome
    assert (outcome.acknowledged, [*outcome.failed], [*outcome.unknown]) == (20, [10], [])
    assert isinstance(outcome.failed[10], MessageSizeTooLargeError)
    records = await mq.read(kafka, topic)
    agree(ledger, outcome, account(ledger, records), 21)
    assert [number_of(record.value) for record in records] == [*range(10), *range(11, 21)]


async def test_at_the_edge_it_is_the_brokers_own(kafka: mq.Kafka) -> None:
    """A record fails at the very size at which the broker refuses it when it is sent by itself; its neighbours never
    do."""
    topic = await mq.topic(kafka, "edge", max_message_bytes=1000)
    fits = {}
    async with mq.producer(kafka) as producer:
        for size in (*range(880, 920, 10), *range(920, 940)):
            try:
                fits[size] = bool(await producer.send_and_wait(topic, b"x" * size))
            except MessageSizeTooLargeError:
                fits[size] = False
            outcome = await mq.pump(producer, topic, [b"small", b"x" * size, b"small"], strict=False)
            assert ([*outcome.failed], outcome.unknown) == ([] if fits[size] else [1], {}), f"{size} bytes"
    assert [*fits.values()] == sorted(fits.values(), reverse=True), "up to some size, and none beyond it"
    assert {*fits.values()} == {True, False}
    assert len(await mq.read(kafka, topic)) == 2 * len(fits) + 2 * sum(fits.values())


async def test_a_record_larger_than_a_batch_and_allowed_is_stored(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "wide")
    async with mq.producer(kafka, max_batch_size=1000) as producer:
        assert (await mq.pump(producer, topic, [b"a", b"x" * 5000, b"b"])).acknowledged == 3
        assert (await mq.pump(producer, topic, [b"a", b"x" * 5000, b"b"], keys=[b"k"] * 3)).acknowledged == 3
    assert [len(record.value) for record in await mq.read(kafka, topic)] == [1, 5000, 1] * 2


async def test_a_broker_that_never_answered_was_handed_nothing(own: mq.Kafka, leftovers: Leftovers) -> None:
    """Without an answer nobody knows who leads: everything failed, in time, and nothing is stored later."""
    topic, ledger = await mq.topic(own, "silent"), mq.Ledger()
    async with leftovers, mq.producer(own, request_timeout_ms=1500) as producer:
        async with asyncio.timeout(20), mq.paused(own.nodes[0]):
            with pytest.raises(mq.Undelivered, match=r"^acknowledged 0; 3 failed: number 0: .* not handed over within"):
                await mq.pump(producer, topic, numbered(3), within=1, ledger=ledger)
        assert ledger.unknown == 0
        await mq.pump(producer, topic, numbered(3), ledger=ledger)
        agree(ledger, mq.Outcome(3), account(ledger, await mq.read(own, topic)), 3)


@pytest.mark.parametrize(
    ("idempotent", "request_ms"), [(False, 1000), (False, 2500), (True, 2500)],
    ids=["the client gives up first", "the deadline is first", "idempotent"],
)  # fmt: skip
async def test_a_frozen_broker_makes_outcomes_unknown_in_time(
    own: mq.Kafka, idempotent: bool, request_ms: int, leftovers: Leftovers
) -> None:
    """The deadline is one for the whole, also for an idempotent producer, which itself would wait for ever. When the
    application then sends them again, they may be there twice, and the ledger tells how many are."""
    topic, ledger, values = await mq.topic(own, "frozen"), mq.Ledger(), numbered(3000, 100)
    [node] = own.nodes

    def until_it_freezes() -> Iterator[bytes]:
        for number, value in enumerate(values):
            if number == 1000:
                node.pause()
            yield value

    options: dict[str, Any] = {"enable_idempotence": idempotent, "request_timeout_ms": request_ms}
    async with leftovers:
        async with mq.producer(own, **options) as producer:
            try:
                async with asyncio.timeout(20):
                    outcome = await mq.pump(producer, topic, until_it_freezes(), within=2, ledger=ledger, strict=False)
                    if not idempotent:
                        await producer.flush()  # now the client, too, has given up
            finally:
                node.resume()
                await asyncio.to_thread(node.wait_until_ready)
            words = str(mq.Undelivered(outcome))
            again = sorted({*range(3000)} - acknowledged(outcome, 3000))
            assert min(outcome.acknowledged, len(outcome.failed), len(outcome.unknown)) > 0
            assert (
                f"{len(outcome.unknown)} outcome unknown, they may be stored: number {min(outcome.unknown)}: " in words
            )
            assert f"{len(outcome.failed)} failed: number {min(outcome.failed)}: " in words
            assert ("no answer within 2 s" in words) == (request_ms == 2500)
            retried = await mq.pump(producer, topic, [values[number] for number in again])
            assert retried.acknowledged == len(again)
        stored = account(ledger, await mq.read(own, topic))
        assert not ledger.lost_although_acknowledged
        for number in again:
            ledger.sent(number)
            ledger.acknowledged(number)
    assert stored.keys() == {*range(3000)}
    twice = {number for number, times in stored.items() if times > 1}
    assert twice <= {*outcome.unknown}, "only what was unknown can be there twice"
    assert (ledger.lost, ledger.unexpected, ledger.duplicated) == (0, 0, stored.total() - 3000)
    if idempotent:  # it knows nothing of the application's retry, and its own went on
        assert twice == {*outcome.unknown}


async def test_a_refusal_after_a_lost_answer_is_unknown(own: mq.Kafka) -> None:
    """The broker stored the batch, its answer was lost, and it refuses what the client then sends by itself once more:
    the error is one that means "not stored", and stored it is."""
    topic, ledger, losing = await mq.topic(own, "refused-late"), mq.Ledger(), list[asyncio.Task[None]]()
    admin = AIOKafkaAdminClient(**own.client)
    await admin.start()

    async def lose_the_answer(proxy: mq.Proxy) -> None:
        async def stored() -> bool:
            return await mq.end_offsets(own, topic) == [5]

        with proxy.swallow("down"):
            await mq.until(stored, within=20)
            limit = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": "70"})
            await admin.alter_configs([limit])

    def values(proxy: mq.Proxy) -> Iterator[bytes]:
        for number, value in enumerate(numbered(5)):
            if number == 4:
                losing.append(asyncio.create_task(lose_the_answer(proxy)))
            yield value

    try:
        async with mq.proxy(own) as proxy, mq.producer(proxy) as producer:
            outcome = await mq.pump(producer, topic, values(proxy), ledger=ledger, strict=False)
            await losing[0]
    finally:
        await admin.close()
    assert isinstance(outcome.unknown[0], MessageSizeTooLargeError)
    stored = account(ledger, await mq.read(own, topic))
    agree(ledger, outcome, stored, 5)
    assert (str(outcome), stored) == ("acknowledged 0, failed 0, unknown 5", Counter(range(5)))


async def test_kafka_is_killed_in_the_middle_of_a_hundred_thousand(own: mq.Kafka, leftovers: Leftovers) -> None:
    """What was acknowledged is there; what the ledger says is what a full read, counted with a plain counter, says."""
    topic, ledger = await mq.topic(own, "killed"), mq.Ledger()

    def until_the_broker_dies() -> Iterator[bytes]:
        for number, value in enumerate(numbered(100_000, 100)):
            if number == 50_000:
                own.nodes[0].kill()
            yield value

    async with leftovers:
        async with mq.producer(own, enable_idempotence=True, max_batch_size=100_000) as producer:
            try:
                outcome = await mq.pump(producer, topic, until_the_broker_dies(), within=5, ledger=ledger, strict=False)
            finally:
                await asyncio.to_thread(own.nodes[0].restart, graceful=False)
        stored = account(ledger, await mq.read(own, topic, within=60))
    assert min(outcome.acknowledged, len(outcome.failed), len(outcome.unknown)) > 0, "it was in the middle"
    agree(ledger, outcome, stored, 100_000)


async def received(channel: AbstractChannel, name: str, ledger: mq.Ledger) -> Counter[int]:
    """How often each number is in the queue, counted without the ledger, which gets them, too."""
    stored: Counter[int] = Counter()
    queue = await channel.declare_queue(name, passive=True)
    left = queue.declaration_result.message_count
    async with asyncio.timeout(60), queue.iterator(no_ack=True) as messages:
        while stored.total() < (left or 0):
            number = number_of((await anext(messages)).body)
            stored[number] += 1
            ledger.received(number)
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
            ledger.received(number_of(message.body))
        assert await mq.take_messages(queue, 1, within=0) == []
        assert (ledger.exact, ledger.reordered) == (True, 0)
        assert (await mq.pump_messages(channel.default_exchange, queue.name, [])).acknowledged == 0
        await mq.pump_messages(channel.default_exchange, queue.name, [Message(b"own", delivery_mode=1, priority=3)])
        [message] = await mq.take_messages(queue, 1)
        assert (message.body, message.delivery_mode, message.priority) == (b"own", 1, 3), "a message is left as it is"


@pytest.mark.parametrize("raises", [False, True])
async def test_what_no_queue_takes_has_failed(rabbit: mq.RabbitMQ, raises: bool) -> None:
    """aio-pika tells it in two ways, one of which looks like success. The others are stored."""
    ledger = mq.Ledger()
    async with mq.channel(rabbit, on_return_raises=raises) as channel:
        exchange = await channel.declare_exchange(rabbit.name("headers"), "headers", auto_delete=True)
        queue = await channel.declare_queue(rabbit.name("even"), exclusive=True)
        await queue.bind(exchange, arguments={"x-match": "all", "even": True})
        messages = [Message(b"%d" % number, headers={"even": number % 2 == 0}) for number in range(9)]
        with pytest.raises(mq.Undelivered, match=r"acknowledged 5; 4 failed: number 1: .*some-key") as failed:
            await mq.pump_messages(exchange, "some-key", messages, ledger=ledger)
        agree(ledger, failed.value.outcome, await received(channel, queue.name, ledger), 9)
        assert sorted(failed.value.outcome.failed) == [1, 3, 5, 7]
        assert all("some-key" in str(error) for error in failed.value.outcome.failed.values())


@pytest.mark.parametrize("window", [1, 256])
async def test_what_a_full_queue_refuses_has_failed(rabbit: mq.RabbitMQ, window: int) -> None:
    ledger = mq.Ledger()
    async with mq.channel(rabbit) as channel:
        limits: dict[str, Any] = {"x-max-length": 5, "x-overflow": "reject-publish"}
        queue = await channel.declare_queue(rabbit.name("full"), arguments=limits)
        outcome = await mq.pump_messages(
            channel.default_exchange, queue.name, numbered(9), window=window, ledger=ledger, strict=False
        )
        agree(ledger, outcome, await received(channel, queue.name, ledger), 9)
    assert (outcome.acknowledged, sorted(outcome.failed), outcome.unknown) == (5, [5, 6, 7, 8], {})
    assert "the broker refuses it" in str(outcome.failed[5])


async def test_what_cannot_be_meant_is_refused_before_it_is_published(
    rabbit: mq.RabbitMQ, leftovers: Leftovers
) -> None:
    async with leftovers:
        async with mq.channel(rabbit, publisher_confirms=False) as channel:
            with pytest.raises(ValueError, match="no publisher confirms"):
                await mq.pump_messages(channel.default_exchange, "x", [b"x"])
        async with mq.channel(rabbit) as channel:
            queue = await channel.declare_queue(rabbit.name("refused"), exclusive=True)
            with pytest.raises(ValueError, match="a window of 0"):
                await mq.pump_messages(channel.default_exchange, queue.name, [b"x"], window=0)
            texts: Iterable[Any] = ["text"] * 10
            with pytest.raises(TypeError, match="number 0 is neither bytes nor a message, but str"):
                await mq.pump_messages(channel.default_exchange, queue.name, texts)
            assert await mq.take_messages(queue, 1, within=0) == []


async def test_a_channel_that_is_closed_was_handed_nothing(rabbit: mq.RabbitMQ) -> None:
    """And it is not blocked."""
    async with mq.channel(rabbit) as channel:
        assert await blocked(channel) is None
    with pytest.raises(mq.Undelivered, match=r"3 failed: number 0: .*the channel is closed"):
        await mq.pump_messages(channel.default_exchange, "x", numbered(3))
    assert await blocked(channel) is None


@pytest.mark.parametrize("window", [1, 50])
async def test_a_connection_that_is_cut_leaves_every_outcome_known_or_unknown(
    rabbit: mq.RabbitMQ, window: int, leftovers: Leftovers
) -> None:
    ledger = mq.Ledger()
    async with leftovers, mq.channel(rabbit) as direct:
        queue = await direct.declare_queue(rabbit.name("cut"), durable=True)
        async with mq.proxy(rabbit) as proxy:

            def until_it_is_cut() -> Iterator[bytes]:
                for number, value in enumerate(numbered(2000)):
                    if number == 1000:
                        proxy.cut()
                    yield value

            async with mq.channel(proxy) as channel, asyncio.timeout(20):
                outcome = await mq.pump_messages(
                    channel.default_exchange, queue.name, until_it_is_cut(), window=window, ledger=ledger, strict=False
                )
        agree(ledger, outcome, await received(direct, queue.name, ledger), 2000)
    assert 1000 - window <= outcome.acknowledged <= 1000
    assert 0 < len(outcome.unknown) <= 2 * window
    assert ledger.duplicated == 0


async def test_rabbitmq_is_killed_in_the_middle_of_a_hundred_thousand(
    own_rabbit: mq.RabbitMQ, leftovers: Leftovers
) -> None:
    """What was confirmed is there, in a durable queue and in a quorum queue; what the ledger says is what a full read,
    counted with a plain counter, says."""
    names = {kind: own_rabbit.name(kind) for kind in ("classic", "quorum")}
    for kind, name in names.items():
        await mq.declare(own_rabbit, name, durable=True, arguments={"x-queue-type": kind})
    # A new quorum queue is on disk a while after its answer, and there `sync` does not help.
    await asyncio.to_thread(own_rabbit.nodes[0].restart)
    ledgers, outcomes, read = {kind: mq.Ledger() for kind in names}, dict[str, mq.Outcome](), Counter[str]()

    def until_the_broker_dies(kind: str) -> Iterator[bytes]:
        for value in numbered(100_000):
            read[kind] += 1
            if min(read[each] for each in names) == 2000 and own_rabbit.nodes[0].running:
                own_rabbit.nodes[0].kill()
            yield value

    async def publish(kind: str) -> None:
        async with mq.channel(own_rabbit) as channel:
            outcomes[kind] = await mq.pump_messages(
                channel.default_exchange, names[kind], until_the_broker_dies(kind), within=60, ledger=ledgers[kind],
                strict=False,
            )  # fmt: skip

    async with leftovers:
        try:
            async with asyncio.TaskGroup() as group:
                for kind in names:
                    group.create_task(publish(kind))
        finally:
            await asyncio.to_thread(own_rabbit.nodes[0].restart, graceful=False)
        for kind, name in names.items():
            outcome = outcomes[kind]
            assert min(outcome.acknowledged, len(outcome.failed), len(outcome.unknown)) > 0, "it was in the middle"

            async def has_a_leader(name: str = name, count: int = outcome.acknowledged) -> bool:
                return (await mq.depth(own_rabbit, name, by="amqp")).ready >= count

            await mq.until(has_a_leader, within=30)
            async with mq.channel(own_rabbit) as channel:
                stored = await received(channel, name, ledgers[kind])
                assert await mq.take_messages(await channel.get_queue(name), 1, within=0) == []
            agree(ledgers[kind], outcome, stored, 100_000)


async def test_a_memory_alarm_makes_outcomes_unknown_and_says_why(
    own_rabbit: mq.RabbitMQ, leftovers: Leftovers
) -> None:
    """Blocked, not failed: the message is delivered when the alarm is over; consumers go on meanwhile."""
    [node], ledger = own_rabbit.nodes, mq.Ledger()
    async with leftovers, mq.channel(own_rabbit) as publishing, mq.channel(own_rabbit) as consuming:
        queue = await consuming.declare_queue(own_rabbit.name("blocked"), exclusive=True)
        await mq.pump_messages(publishing.default_exchange, queue.name, [b"before"] * 3)
        assert await blocked(publishing) is None
        await asyncio.to_thread(node.control, "set_vm_memory_high_watermark", "0")
        try:
            async with asyncio.timeout(20):
                words = r"^acknowledged 0; 1 outcome unknown, .*: blocked by broker \(low on memory\)$"
                with pytest.raises(mq.Undelivered, match=words) as late:
                    await mq.pump_messages(publishing.default_exchange, queue.name, [b"0"], within=2, ledger=ledger)
            assert (await blocked(publishing), await blocked(consuming)) == ("low on memory", None)
            assert [message.body for message in await mq.take_messages(queue, 4, within=0)] == [b"before"] * 3
        finally:
            await asyncio.to_thread(node.control, "set_vm_memory_high_watermark", "0.6")
        [message] = await mq.take_messages(queue, 1, within=30)
        ledger.received(number_of(message.body))
        agree(ledger, late.value.outcome, Counter([0]), 1)
        assert (ledger.delivered_although_unacknowledged, await blocked(publishing)) == (1, None)
