"""Many messages at once, as fast as the client can, with the outcome of each: acknowledged, failed, or unknown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractMessage
from aio_pika.exceptions import AMQPError, DeliveryError
from aiokafka import AIOKafkaProducer, TopicPartition, errors
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import PublishError

from .brokers import BrokerError
from .ledger import Journal, Ledger
from .queues import blocked

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588
REFUSED = (
    errors.MessageSizeTooLargeError, errors.TopicAuthorizationFailedError, errors.InvalidTopicError,
    errors.InvalidRequiredAcksError, errors.CorruptRecordException, errors.PolicyViolationError,
    errors.UnsupportedForMessageFormatError, errors.InvalidTimestampError, errors.ProducerFenced,
)  # fmt: skip
"""Kafka's answers that mean: not stored, if they answer the first attempt. After any other error it may be."""
CLOSING_SECONDS = 1.0


@dataclass
class Outcome:
    """What became of the messages, by their place in the input, from 0 on."""

    acknowledged: int = 0
    """How many the broker has said that it has."""
    failed: dict[int, BaseException] = field(default_factory=dict)
    """Known not to be stored: refused, or never handed over."""
    unknown: dict[int, BaseException] = field(default_factory=dict)
    """Handed over, and no answer. They may be stored now, or later: sending them again may duplicate them."""

    def __str__(self) -> str:
        return f"acknowledged {self.acknowledged}, failed {len(self.failed)}, unknown {len(self.unknown)}"


class Undelivered(BrokerError):
    """Not everything was acknowledged; `outcome` has each message's state."""

    def __init__(self, outcome: Outcome) -> None:
        parts = []
        for word, which in (("failed", outcome.failed), ("outcome unknown, they may be stored", outcome.unknown)):
            if which:
                error = which[place := min(which)]
                parts.append(f"{len(which)} {word}: number {place}: {type(error).__name__}: {error}")
        super().__init__(f"acknowledged {outcome.acknowledged}; " + "; ".join(parts))
        self.outcome = outcome


class _Books:  # the outcome, and the ledger besides if there is one
    def __init__(self, ledger: Ledger | Journal | None) -> None:
        self.outcome = Outcome()
        self._ledger: Any = ledger

    def sent(self, places: Iterable[int]) -> None:
        for place in places if self._ledger else ():
            self._ledger.sent(place)

    def acknowledged(self, places: Sequence[int]) -> None:
        self.outcome.acknowledged += len(places)
        for place in places if self._ledger else ():
            self._ledger.acknowledged(place)

    def failed(self, places: Iterable[int], error: BaseException) -> None:
        for place in places:
            self.outcome.failed[place] = error
            if self._ledger:
                self._ledger.failed(place)

    def unknown(self, places: Iterable[int], error: BaseException) -> None:
        self.outcome.unknown.update(dict.fromkeys(places, error))

    def close(self, strict: bool) -> Outcome:
        if strict and (self.outcome.failed or self.outcome.unknown):
            raise Undelivered(self.outcome)
        return self.outcome


class _Pump:
    """Puts records into batches, and hands full ones to the producer."""

    def __init__(self, producer: AIOKafkaProducer, topic: str, books: _Books, limit: int) -> None:
        self._producer, self._topic, self._books, self._limit = producer, topic, books, limit
        # As `producer.create_batch`, but no larger than the topic allows, less what compression may add where there is
        # nothing to compress: a thousandth and some 30 bytes. A record that is alone in its batch may be larger.
        stock, transactions = producer._message_accumulator, producer._txn_manager
        self._batch = partial(
            BatchBuilder, min(stock._batch_size, limit - limit // 1000 - 100), stock._compression_type,
            is_transactional=bool(transactions and transactions.transactional_id),
            key_serializer=producer._key_serializer, value_serializer=producer._value_serializer,
        )  # fmt: skip
        self.waiting: dict[asyncio.Future[Any], Sequence[int]] = {}
        self.unsent: Sequence[int] = ()

    async def _ship(self, builder: BatchBuilder, places: Sequence[int], partition: int) -> None:
        try:
            answer = await self._producer.send_batch(builder, self._topic, partition=partition)
        except errors.KafkaError as error:
            self._books.failed(places, error)  # it was not handed over
        else:
            sending = self._producer._message_accumulator._batches[TopicPartition(self._topic, partition)][-1]
            self.waiting[answer] = places
            self._books.sent(places)
            answer.add_done_callback(partial(self._settle, sending))

    def _settle(self, sending: MessageBatch, answer: asyncio.Future[Any]) -> None:
        # Also after the deadline, when nobody is interested: an error that nobody fetches goes to stderr.
        error, places = answer.exception(), self.waiting.pop(answer, ())
        if error is None:
            self._books.acknowledged(places)
        elif not isinstance(error, REFUSED) or sending.retry_count > 1:  # an attempt before may have been stored
            self._books.unknown(places, error)
        else:
            if isinstance(error, errors.MessageSizeTooLargeError):
                size = f"{len(sending.get_data_buffer())} bytes with the batch's own 61"
                error = errors.MessageSizeTooLargeError(f"{size}; the topic's max.message.bytes is {self._limit}")
            self._books.failed(places, error)

    async def keyless(self, left: Iterator[tuple[int, bytes]], partitions: list[int]) -> None:
        """Each batch to the next of the partitions. The loop is tight: see the benchmark `kafka_send`."""
        builder, first, place, turns = self._batch(), 0, -1, cycle(partitions)
        try:
            for place, value in left:
                if builder.append(timestamp=None, key=None, value=value) is None:
                    await self._ship(builder, range(first, place), next(turns))
                    first, builder = place, self._batch()
                    builder.append(timestamp=None, key=None, value=value)
            if place >= first:
                await self._ship(builder, range(first, place + 1), next(turns))
        except BaseException:
            self.unsent = range(first, place + 1)
            raise

    async def keyed(
        self, left: Iterator[tuple[int, tuple[bytes, bytes | None]]], partitions: list[int], fixed: bool
    ) -> None:
        """Each record to its key's partition, or to the only one that is given."""
        choose, place = self._producer._partitioner, -1
        filling: dict[int, tuple[BatchBuilder, list[int]]] = {}
        try:
            for place, (value, key) in left:
                number = partitions[0] if fixed else choose(key, partitions, partitions)
                builder, places = filling.get(number) or (self._batch(), [])
                if builder.append(timestamp=None, key=key, value=value) is None:
                    await self._ship(builder, places, number)
                    builder, places = self._batch(), []
                    builder.append(timestamp=None, key=key, value=value)
                places.append(place)
                filling[number] = builder, places
            place = -1
            for number in list(filling):
                await self._ship(*filling[number], number)
                del filling[number]
        except BaseException:
            self.unsent = sorted({other for _, places in filling.values() for other in places} | ({place} - {-1}))
            raise


async def pump(
    producer: AIOKafkaProducer, topic: str, values: Iterable[bytes], keys: Iterable[bytes | None] | None = None,
    partition: int | None = None, within: float = 30.0, ledger: Ledger | Journal | None = None, strict: bool = True,
) -> Outcome:  # fmt: skip
    """Sends `values`, which end, in batches of the producer's `max_batch_size`, in order within each partition.

    The partition is the one given, or the key's; without keys each batch goes to the next one. A batch is never larger
    than the topic's `max.message.bytes`: only a record that is alone too large fails, and the error says its size and
    the limit. After `within` seconds what has no answer is unknown, also with an idempotent producer, and what was not
    handed over has failed. With a ledger a message's number is its place in the input.

    Raises `Undelivered` unless all is acknowledged; with `strict=False` it returns the outcome instead. Raises
    `BrokerError` for a missing topic, `ValueError` for a missing partition, for more keys than values or fewer, and for
    a producer that is closed or has `acks=0`.
    """
    if producer._closed:
        raise ValueError("the producer is closed")
    if not producer._sender._acks:
        raise ValueError("the producer has acks=0, so nobody can know what was stored")
    if isinstance(values, Sized) and isinstance(keys, Sized) and len(values) != len(keys):
        raise ValueError(f"{len(values)} values and {len(keys)} keys")
    books, work, deadline = _Books(ledger), None, asyncio.timeout(within)
    left: Iterator[tuple[int, Any]] = enumerate(values if keys is None else zip(values, keys, strict=True))
    try:
        async with deadline:
            limit = await _max_message_bytes(producer, topic)
            partitions = sorted(await producer.partitions_for(topic))
            if partition is not None and partition not in partitions:
                raise ValueError(f"the topic {topic!r} has the partitions {partitions}, and not {partition}")
            work = _Pump(producer, topic, books, limit)
            chosen = partitions if partition is None else [partition]
            await (work.keyless(left, chosen) if keys is None else work.keyed(left, chosen, partition is not None))
            if work.waiting:
                await asyncio.wait(work.waiting)
    except (TimeoutError, errors.UnknownTopicOrPartitionError) as error:
        # aiokafka 0.14 also calls a topic unknown when no broker answers what it asks about it.
        if isinstance(error, TimeoutError) and not deadline.expired():
            raise  # it comes from the input
        unsent = chain(work.unsent if work else (), (place for place, _ in left))
        books.failed(unsent, TimeoutError(f"not handed over within {within:g} s"))
    except TypeError as error:
        if work and work.unsent:
            error.add_note(f"Keys and values are bytes; the last that was read is number {work.unsent[-1]}.")
        raise
    while work and work.waiting:
        books.unknown(work.waiting.popitem()[1], TimeoutError(f"no answer within {within:g} s"))
    return books.close(strict)


async def _max_message_bytes(producer: AIOKafkaProducer, topic: str) -> int:
    """The topic's limit for a batch; Kafka's default where there is no answer."""
    client = producer.client
    request = DescribeConfigsRequest([(2, topic, ["max.message.bytes"])], False)
    try:
        answer = await client.send(client.get_random_node(), request)
    except errors.KafkaError:
        return DEFAULT_MAX_MESSAGE_BYTES
    [(code, _, _, _, entries)] = answer.resources
    if code == errors.UnknownTopicOrPartitionError.errno:
        raise BrokerError(f"Kafka has no topic {topic!r}")
    return int(entries[0][1]) if entries else DEFAULT_MAX_MESSAGE_BYTES


async def pump_messages(
    exchange: AbstractExchange, routing_key: str, bodies: Iterable[bytes | AbstractMessage],
    window: int = 256, within: float = 30.0, ledger: Ledger | Journal | None = None, strict: bool = True,
) -> Outcome:  # fmt: skip
    """Publishes with confirms, up to `window` of them under way; plain bytes become persistent messages.

    A message that no queue takes has failed, and so has one that the broker refuses (a full queue with
    `reject-publish`). One without an answer within `within` seconds in all is unknown: a broker that is blocked by an
    alarm takes it later. With a ledger a message's number is its place in the input.

    Raises `Undelivered` unless all is acknowledged; with `strict=False` it returns the outcome instead. Raises
    `ValueError` for a channel without confirms and a window below 1, `TypeError` for a body that is neither.
    """
    if window < 1:
        raise ValueError(f"a window of {window} lets nothing through")
    books, left, under_way = _Books(ledger), enumerate(bodies), set[int]()
    outer: AbstractChannel = exchange.channel  # type: ignore[attr-defined]
    channel: Any = await outer.get_underlay_channel()
    if not channel.publisher_confirms:
        raise ValueError("the channel has no publisher confirms, so nobody can know what was stored")

    async def publish() -> None:
        for place, body in left:
            message = aio_pika.Message(body, delivery_mode=2) if isinstance(body, bytes) else body
            if not isinstance(message, AbstractMessage):
                raise TypeError(f"number {place} is neither bytes nor a message, but {type(body).__name__}")
            if channel.is_closed:
                books.failed([place], ConnectionError("the channel is closed"))
                continue
            under_way.add(place)
            books.sent([place])
            try:
                answer = await exchange.publish(message, routing_key)
            except PublishError as error:
                books.failed([place], error)
            except DeliveryError as error:
                books.failed([place], BrokerError(f"the broker refuses it ({error.frame})"))
            except (AMQPError, OSError, RuntimeError) as error:
                books.unknown([place], error)
            else:
                if isinstance(answer, DeliveredMessage):
                    books.failed([place], BrokerError(f"no queue takes the routing key {routing_key!r}"))
                else:
                    books.acknowledged([place])
            under_way.discard(place)

    tasks = [asyncio.create_task(publish()) for _ in range(window)]
    try:
        _, pending = await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            reason = await blocked(outer)
            why = f": blocked by broker ({reason})" if reason else ""
            books.unknown(list(under_way), TimeoutError(f"no confirm within {within:g} s{why}"))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
    for error in [task.exception() for task in tasks if task.done() and not task.cancelled()]:
        if error:
            raise error
    books.failed((place for place, _ in left), TimeoutError(f"not handed over within {within:g} s"))
    return books.close(strict)
