"""Event sourcing on Kafka: what happened to an aggregate is the records with its key, and its state is their fold.

A partition has one writer. Its transactional id is the partition's, so a writer that starts fences the one before it,
and then reads everything that was ever committed: whoever can append has seen all. Snapshots spare most of that.
See Fowler, "Event Sourcing", https://martinfowler.com/eaaDev/EventSourcing.html, and KIP-98.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced
from aiokafka.partitioner import DefaultPartitioner

from ..brokers import Kafka
from ..brokers.base import BrokerError
from ..topics import consumer, partitions_of, poll, producer
from .snapshots import Snapshots

FOREVER: dict[str, Any] = {"cleanup_policy": "delete", "retention_ms": -1, "retention_bytes": -1}
"""Settings for such a topic, as for `mq.topic(kafka, "accounts", **FOREVER)`. The default deletes after seven days."""
ABORT_SECONDS = 2.0
TYPE, VERSION = "event-type", "aggregate-version"
"""The headers of an event's record. Its key is the aggregate, its value is JSON."""


class StoreError(BrokerError):
    """The log is not what it should be, or does not answer."""


class Conflict(StoreError):
    """The aggregate is not at the version that the caller had seen. Decide again; nothing was appended."""


class Fenced(StoreError):
    """Another writer of the partition has started. Nothing was appended, and this writer cannot append any more."""


class NotAppended(StoreError):
    """It failed before the commit: nothing was appended. Open a new writer."""


class Unknown(StoreError):
    """The commit got no answer: the events are stored, all or none. A new writer reads the log, and knows."""


class Token(NamedTuple):
    """A position in the log: that of the first record behind an event. A projection that is there has seen it."""

    partition: int
    next: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an aggregate. `version` counts its events from 1; `at` is in ms since 1970."""

    aggregate: str
    version: int
    type: str
    data: Any
    at: int
    token: Token


class Aggregate(NamedTuple):
    """What is known of an aggregate: its state, and the number of its events."""

    state: Any
    version: int


@dataclass(frozen=True)
class Model:
    """How events become a state: `apply(state, event)` returns the next one, from `initial`.

    It must return the same for the same, and must not change the state it is given. With snapshots a state is what JSON
    gives back unchanged. Raise `version` when `apply` or `initial` changes: older snapshots are then not used.
    """

    initial: Any
    apply: Callable[[Any, Event], Any]
    version: int = 1


def parse(record: ConsumerRecord) -> Event:
    """The event in a record. Raises `StoreError`, which says where the record is and what is wrong with it."""
    try:
        headers = dict(record.headers)
        return Event(
            record.key.decode(), int(headers[VERSION]), headers[TYPE].decode(), json.loads(record.value),
            record.timestamp, Token(record.partition, record.offset + 1),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = f"{record.topic}-{record.partition}, offset {record.offset}"
        raise StoreError(f"{where}: that is no event of this store ({type(error).__name__}: {error})") from None


class _Fold:
    """The aggregates of one partition."""

    def __init__(self, model: Model) -> None:
        self.model, self.known, self.replayed = model, dict[str, Aggregate](), 0

    def get(self, aggregate: str) -> Aggregate:
        return self.known.get(aggregate) or Aggregate(copy.deepcopy(self.model.initial), 0)

    def after(self, known: Aggregate, event: Event) -> Aggregate:
        if event.version != known.version + 1:
            raise StoreError(
                f"partition {event.token.partition}, offset {event.token.next - 1}: version {event.version} of "
                f"{event.aggregate!r} follows version {known.version}; was it written without a writer of this store?"
            )
        return Aggregate(self.model.apply(known.state, event), event.version)

    def add(self, event: Event) -> None:
        self.known[event.aggregate] = self.after(self.get(event.aggregate), event)

    async def replay(self, kafka: Kafka, part: TopicPartition, first: int, until: int | None = None) -> None:
        """Adds what is committed from the offset `first` on, up to the end or the first event after `until` (in ms)."""
        where = f"{part.topic}-{part.partition}"
        async with consumer(kafka, isolation_level="read_committed", auto_offset_reset="none") as reader:
            reader.assign([part])
            begins, ends = (await reader.beginning_offsets([part]))[part], (await reader.end_offsets([part]))[part]
            if begins > first:
                raise StoreError(f"{where}: the events from offset {first} to {begins} are deleted; see FOREVER")
            if ends < first:
                raise StoreError(f"{where} ends at {ends}, and its snapshot is of offset {first}: the log has lost "
                                 "events, or the topic was made anew; then delete the snapshot")  # fmt: skip
            if until is not None and (found := (await reader.offsets_for_times({part: until + 1}))[part]):
                ends = found.offset
            reader.seek(part, first)
            while await reader.position(part) < ends:
                for records in (await poll(reader, 0.1)).values():
                    for record in records:
                        if record.offset < ends:
                            self.add(parse(record))
                            self.replayed += 1


async def as_of(kafka: Kafka, topic: str, model: Model, at: int, within: float = 30.0) -> dict[str, Aggregate]:
    """Every aggregate as it was at a time in ms since 1970: the fold of each partition up to its first later event.

    The time is the records' own: that of the writers' clocks, or the broker's with `message_timestamp_type=
    "LogAppendTime"`. Raises `BrokerError` for a missing topic, `StoreError` when events are missing or the broker does
    not answer within `within` seconds.
    """
    fold = _Fold(model)
    async with _answers(topic, within):
        for part in await partitions_of(kafka, topic):
            await fold.replay(kafka, part, 0, until=at)
    return fold.known


class Writer:
    """The writer of one partition; made by `writer`."""

    def __init__(self, part: TopicPartition, fold: _Fold, snapshots: Snapshots | None, within: float) -> None:
        self.error: Exception | None = None
        """Why the last snapshot was not saved. The events are stored all the same."""
        self.replayed = 0
        """Events that were read at the start: those behind the snapshot."""
        self._part, self._fold, self._snapshots, self._within = part, fold, snapshots, within
        self._where = f"{part.topic}-{part.partition}"
        self._lock, self._ended, self._since = asyncio.Lock(), "", 0
        self._parts: list[int]
        self._producer: AIOKafkaProducer

    def get(self, aggregate: str) -> Aggregate:
        """State and version now. Raises `ValueError` for an aggregate of another partition."""
        partition = DefaultPartitioner()(aggregate.encode(), self._parts, self._parts)
        if partition != self._part.partition:
            raise ValueError(f"{aggregate!r} belongs to partition {partition}, and this is the writer of {self._where}")
        return self._fold.get(aggregate)

    async def append(self, aggregate: str, events: Sequence[tuple[str, Any]], expected: int | None = None) -> Token:
        """Appends events (type, data that JSON can hold), all or none; returns the position behind them.

        `expected` is the version on which the caller decided; without one it is appended whatever came in between.
        Raises `Conflict`, `Fenced`, `NotAppended`, `Unknown`; after the last three this writer is of no more use. And
        `ValueError` or `TypeError` for what cannot be an event, and what the model raises.
        """
        bodies = [(kind, json.dumps(data, allow_nan=False).encode()) for kind, data in events]
        if not bodies or not aggregate:
            raise ValueError("an append needs an aggregate and events")
        async with self._lock:
            version = self.get(aggregate).version
            if self._ended:
                raise NotAppended(f"{self._where}: this writer has ended ({self._ended}); open a new one")
            if expected not in (None, version):
                raise Conflict(f"{aggregate!r} is at version {version}, not {expected}: read it and decide again")
            numbered = [(version + count, *each) for count, each in enumerate(bodies, start=1)]
            trial, now = self._fold.get(aggregate), int(time.time() * 1000)
            for number, kind, body in numbered:  # what the model cannot take would stop every writer after this one
                event = Event(aggregate, number, kind, json.loads(body), now, Token(self._part.partition, 0))
                trial = self._fold.after(trial, event)
            stored = await self._commit(aggregate, numbered)
            for (number, kind, body), (offset, at) in zip(numbered, stored, strict=True):
                token = Token(self._part.partition, offset + 1)
                self._fold.add(Event(aggregate, number, kind, json.loads(body), at, token))
            await self._snapshot(len(stored), token.next)
        return token

    async def _commit(self, aggregate: str, numbered: list[tuple[int, str, bytes]]) -> list[tuple[int, int]]:
        """One transaction; the offsets and timestamps of its records."""
        committing, sending, sent = False, self._producer, list[asyncio.Future[Any]]()
        self._ended = "an append was interrupted"
        try:
            async with asyncio.timeout(self._within):
                await sending.begin_transaction()
                for number, kind, body in numbered:
                    headers = [(TYPE, kind.encode()), (VERSION, b"%d" % number)]
                    to = {"key": aggregate.encode(), "partition": self._part.partition, "headers": headers}
                    sent.append(await sending.send(self._part.topic, body, **to))
                stored = await asyncio.gather(*sent)
                committing = True
                await sending.commit_transaction()
        except Exception as error:
            ended = sending._txn_manager.wait_for_transaction_end()
            # aiokafka may have given the transaction up before, and then tells the reason only here.
            _heard(sending)
            cause = (ended.done() and ended.exception()) or error
            self._ended = f"{type(cause).__name__}: {cause}"
            if committing:
                raise Unknown(f"{self._where}: no answer to the commit ({self._ended}); open a new writer") from error
            if isinstance(cause, ProducerFenced):
                raise Fenced(f"{self._where}: another writer has started; nothing was appended") from error
            with contextlib.suppress(KafkaError, TimeoutError, AssertionError):  # or readers wait until it times out
                async with asyncio.timeout(ABORT_SECONDS):
                    await sending.abort_transaction()
            raise NotAppended(f"{self._where}: {self._ended}; nothing was appended; open a new writer") from error
        self._ended = ""
        return [(record.offset, record.timestamp) for record in stored]

    async def _snapshot(self, appended: int, next: int) -> None:
        self._since += appended
        if self._snapshots and self._since >= self._snapshots.every:
            try:
                known, model = self._fold.known, self._fold.model.version
                await asyncio.to_thread(self._snapshots.save, self._part, model, next, known)
                self._since, self.error = 0, None
            except (sa.exc.SQLAlchemyError, TypeError, ValueError) as error:
                self.error = error


@contextlib.asynccontextmanager
async def writer(
    kafka: Kafka, topic: str, partition: int, model: Model, snapshots: Snapshots | None = None, within: float = 10.0
) -> AsyncIterator[Writer]:
    """The writer of a partition for the length of the block. It ends the one before it, wherever that runs.

    An append may take `within` seconds. Raises `BrokerError` for a missing topic, `StoreError` when events are missing
    or cannot be read, or when the broker does not answer.
    """
    part, fold = TopicPartition(topic, partition), _Fold(model)
    made = Writer(part, fold, snapshots, within)
    options = {"transactional_id": made._where, "transaction_timeout_ms": int(1000 * within), "acks": "all"}
    async with contextlib.AsyncExitStack() as stack:
        async with _answers(made._where, 3 * within):
            made._parts = [part.partition for part in await partitions_of(kafka, topic)]
            if partition not in made._parts:
                raise ValueError(f"{topic} has the partitions {made._parts}, and not {partition}")
            # First fence, then read: from now on nobody else appends, and what was open is aborted.
            made._producer = await stack.enter_async_context(producer(kafka, **options))
            first = 0
            if snapshots:
                first, states = await asyncio.to_thread(snapshots.load, part, model.version)
                fold.known = {name: Aggregate(*each) for name, each in states.items()}
            await fold.replay(kafka, part, first)
        made._since = made.replayed = fold.replayed
        yield made


@contextlib.asynccontextmanager
async def _answers(where: str, within: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(within):
            yield
    except TimeoutError:
        raise StoreError(f"{where}: Kafka did not answer within {within:g} s") from None
    except KafkaError as error:
        raise StoreError(f"{where}: {type(error).__name__}: {error}") from error


def _heard(sending: AIOKafkaProducer) -> None:
    """aiokafka 0.14 gives a batch that fails two errors, of which nobody asks for one; asyncio would complain."""
    for batch in itertools.chain.from_iterable(sending._message_accumulator._batches.values()):
        if batch._drain_waiter.done():
            batch._drain_waiter.exception()
