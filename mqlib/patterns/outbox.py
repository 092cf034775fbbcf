"""Transactional outbox: an event is a row of the business transaction, and a relay sends it to Kafka afterwards.

At least once, and never without its transaction: a row is deleted once Kafka has acknowledged it, so a crash in between
sends it again with the same message id, by which `inbox` drops it. Tables are in SQLite or PostgreSQL.
See https://microservices.io/patterns/data/transactional-outbox.html and .../polling-publisher.html.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.protocol.metadata import MetadataRequest

from ..brokers import BrokerError
from ..brokers.base import Connectable
from ..bulk import REFUSED
from ..topics import producer
from ..waiting import beside
from .inbox import MESSAGE_ID as MESSAGE_ID
from .inbox import database as database

DRAIN_SECONDS, BACKOFF_SECONDS = 5.0, 0.5
Headers = Iterable[tuple[str, bytes]]


def table(metadata: sa.MetaData, name: str = "outbox") -> sa.Table:
    """The outbox, among tables of your own. Events are sent in the order of `id`."""
    box = sa.Table(
        name, metadata,
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("message_id", sa.String, nullable=False),
        sa.Column("topic", sa.String, nullable=False),
        sa.Column("key", sa.LargeBinary),
        sa.Column("value", sa.LargeBinary),
        sa.Column("headers", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("error", sa.Text),
        # Never the id of a row that is gone: a relay that was frozen would delete the new row for the old one.
        sqlite_autoincrement=True,
    )  # fmt: skip
    parked = box.c.error.is_not(None)
    sa.Index(f"{name}_parked", box.c.topic, box.c.key, sqlite_where=parked, postgresql_where=parked)
    return box


METADATA = sa.MetaData()
EVENTS = table(METADATA)


def create_tables(engine: sa.Engine) -> None:
    """Makes the table `outbox` unless it is there."""
    METADATA.create_all(engine)


@dataclass(frozen=True, slots=True)
class Event:
    """What becomes a record; `value` is None for a tombstone. Without an `id` it gets a new one."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    id: str | None = None

    def _row(self) -> dict[str, Any]:
        headers = list(self.headers)
        parts = [part for part in (self.key, self.value) if part is not None]
        if not self.topic or not parts:
            raise ValueError(f"an event needs a topic, and a key or a value: {self}")
        if not all(isinstance(part, bytes) for part in (*parts, *(value for _, value in headers))):
            raise TypeError(f"the key, the value and the headers' values of an event are bytes: {self}")
        return {
            "message_id": self.id or uuid.uuid4().hex, "topic": self.topic, "key": self.key, "value": self.value,
            "headers": [[name, value.hex()] for name, value in headers], "created": time.time(),
        }  # fmt: skip


def add_event(
    connection: sa.Connection, topic: str, value: bytes | None, key: bytes | None = None, headers: Headers = (),
    id: str | None = None, box: sa.Table = EVENTS,
) -> str:  # fmt: skip
    """Adds an event to the transaction of `connection`, and returns its message id. It is sent if that commits.

    Events of one key keep the order of transactions that take turns, as those do that lock the key's own row first.
    Raises `TypeError` or `ValueError` for what cannot become a record."""
    return add_events(connection, [Event(topic, value, key, headers, id)], box)[0]


def add_events(connection: sa.Connection, events: Iterable[Event], box: sa.Table = EVENTS) -> list[str]:
    """The same for many at once, in their order."""
    if rows := [each._row() for each in events]:
        connection.execute(sa.insert(box), rows)
    return [row["message_id"] for row in rows]


def release(connection: sa.Connection, box: sa.Table = EVENTS) -> int:
    """Lets the relay try parked events again; returns their number."""
    return connection.execute(sa.update(box).where(box.c.error.is_not(None)).values(error=None)).rowcount


class Lag(NamedTuple):
    """What has not been sent: how many events, parked ones too, and the age of the oldest in seconds."""

    waiting: int
    seconds: float


class Relay:
    """Sends what the outbox holds; made by `relay`."""

    def __init__(
        self, kafka: Connectable, engine: sa.Engine, batch: int, poll: float, box: sa.Table, options: dict[str, Any]
    ) -> None:
        self.sent = 0
        """Events that Kafka acknowledged and that are deleted; one that is sent again counts again."""
        self.parked = 0
        """Events that Kafka refused. They stay, with the reason in `error`, and later ones of their key wait behind."""
        self.active = False
        """Whether this is the relay at work; others stand by."""
        self.error: Exception | None = None
        """The last trouble with Kafka or the database; it goes on trying."""
        self._kafka, self._engine, self._batch, self._poll, self._box = kafka, engine, batch, poll, box
        self._options, self._limit, self._awake, self._stopping = options, asyncio.timeout(None), asyncio.Event(), False
        # Less than after which aiokafka 0.14 drops a batch, and sends what comes after it.
        self._patience = options.get("request_timeout_ms", 40_000) * 0.75 / 1000
        self._careful = 0  # so many rows are sent one by one, to see which of them is refused
        self._absent: dict[str, float] = {}  # topics that Kafka does not have, and when to ask again

    def wake(self) -> None:
        """Makes it look now instead of after `poll` seconds: call it after a commit."""
        self._awake.set()

    def stop(self) -> None:
        """Asks it to finish: what is under way gets `DRAIN_SECONDS`."""
        self._stopping = True
        self._awake.set()
        with contextlib.suppress(RuntimeError, AssertionError):  # nothing is under way (Python 3.11.2 asserts it)
            self._limit.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)

    async def lag(self) -> Lag:
        """What waits in the table, whoever sends it."""
        [(waiting, since)] = await self._execute(sa.select(sa.func.count(), sa.func.min(self._box.c.created)))
        return Lag(waiting, max(0.0, time.time() - since) if waiting else 0.0)

    async def _execute(self, statement: sa.Executable) -> Any:
        def work() -> Any:
            begin = "DEFERRED" if isinstance(statement, sa.Select) else "IMMEDIATE"
            with self._engine.connect().execution_options(sqlite_begin=begin) as connection, connection.begin():
                result = connection.execute(statement)
                return result.all() if result.returns_rows else None

        return await asyncio.to_thread(work)

    async def run(self) -> None:
        """Works until `stop`, whatever Kafka and the database do meanwhile."""
        while not self._stopping:
            try:
                if not (unlock := await asyncio.to_thread(_lock, self._engine, self._box.name)):
                    await self._pause(self._poll)
                    continue
                try:
                    self.active = True
                    await self._work()
                finally:
                    self.active = False
                    await asyncio.to_thread(unlock)
            except (KafkaError, sa.exc.DBAPIError, OSError) as error:
                self.error = error
                await self._pause(BACKOFF_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._awake.wait()
        if not self._stopping:
            self._awake.clear()

    async def _work(self) -> None:
        """Sends with one producer, until the first error. What follows an event that is not stored must not overtake
        it: an idempotent producer sees to that as long as it lives, and a new one begins with the first row again."""
        known: set[str] = set()
        async with producer(self._kafka, acks="all", enable_idempotence=True, **self._options) as sending:
            while not self._stopping:
                rows = await self._execute(self._first(1 if self._careful else self._batch))
                if not rows:
                    await self._pause(self._poll)
                elif not (new := {row.topic for row in rows} - known) or await self._exist(sending, new):
                    known |= new
                    await self._send(sending, rows)

    def _first(self, limit: int) -> sa.Select[Any]:
        """The first rows that may be sent. There is no last id to go on from: on PostgreSQL a lower id can become
        visible later, since ids are given out in one order and transactions commit in another."""
        self._absent = {topic: again for topic, again in self._absent.items() if again > time.monotonic()}
        row, before = self._box.c, self._box.alias().c
        held = sa.exists().where(
            before.error.is_not(None), before.topic == row.topic, before.key == row.key, before.id < row.id
        )
        free = sa.and_(row.error.is_(None), ~held, row.topic.not_in(list(self._absent)))
        return sa.select(self._box).where(free).order_by(row.id).limit(limit)

    async def _exist(self, sending: AIOKafkaProducer, topics: set[str]) -> bool:
        """Whether Kafka has all the topics. Events for those that it does not have wait, and the others go on."""
        request = MetadataRequest(sorted(topics), allow_auto_topic_creation=False)
        answer = await sending.client.send(sending.client.get_random_node(), request)
        if absent := [each["topic"] for each in answer.to_object()["topics"] if each["error_code"]]:
            self.error = BrokerError(f"Kafka has no topic {', '.join(map(repr, absent))}")
            self._absent |= dict.fromkeys(absent, time.monotonic() + BACKOFF_SECONDS)
        return not absent

    async def _send(self, sending: AIOKafkaProducer, rows: Sequence[sa.Row[Any]]) -> None:
        """Sends the rows, and deletes those that Kafka acknowledged. Raises the first error."""
        answers: dict[int, asyncio.Future[Any]] = {}
        problem: BaseException | None = None
        try:
            async with asyncio.timeout(self._patience) as self._limit:
                try:
                    for row in rows:
                        headers = [(name, bytes.fromhex(value)) for name, value in row.headers]
                        headers.append((MESSAGE_ID, row.message_id.encode()))
                        answers[row.id] = await sending.send(row.topic, row.value, row.key, headers=headers)
                        answers[row.id].add_done_callback(_error)
                except KafkaError as error:
                    problem = error
                if answers:
                    await asyncio.wait(answers.values())
        except TimeoutError as error:
            problem = error  # what has no answer is unknown: it stays, and is sent again
        errors = {id: _error(answer) for id, answer in answers.items() if answer.done()}
        if sent := [id for id, error in errors.items() if error is None]:
            await self._execute(sa.delete(self._box).where(self._box.c.id.in_(sent)))
            self.sent += len(sent)
        problem = next(filter(None, errors.values()), problem)
        self._careful = max(0, self._careful - 1)
        if isinstance(problem, REFUSED) and len(rows) == 1:
            parked, reason = sa.update(self._box), f"{type(problem).__name__}: {problem}"
            await self._execute(parked.where(self._box.c.id == rows[0].id).values(error=reason))
            self.parked += 1
        elif isinstance(problem, REFUSED):  # Kafka refuses a batch of records as a whole
            self._careful = len(rows) - len(sent)
        if problem:
            raise problem


def _error(answer: asyncio.Future[Any]) -> BaseException | None:
    return asyncio.CancelledError() if answer.cancelled() else answer.exception()


def _lock(engine: sa.Engine, name: str) -> Callable[[], None] | None:
    """The right to be the relay at work, until what it returns is called or the process ends; None: another has it.
    It only spares duplicates: whoever begins with the first row sends no event before an earlier one of its key.
    (Relays that share rows, by SKIP LOCKED, do.) With SQLite an empty file, `…-relay`, stays beside the database."""
    if engine.dialect.name == "sqlite":
        file = sqlite3.connect(f"{engine.url.database}-{name}-relay", timeout=0, check_same_thread=False)
        with contextlib.suppress(sqlite3.OperationalError):
            file.execute("BEGIN EXCLUSIVE")
            return file.close
        file.close()
        return None
    session = engine.connect()
    session.detach()  # the lock ends with the session, so the pool must not keep it
    got = session.scalar(sa.select(sa.func.pg_try_advisory_lock(zlib.crc32(name.encode()))))
    session.commit()  # an open transaction would keep vacuum from its work
    if not got:
        session.close()
    return session.close if got else None


@contextlib.asynccontextmanager
async def relay(
    kafka: Connectable, engine: sa.Engine, batch: int = 500, poll: float = 0.2, box: sa.Table = EVENTS, **options: Any
) -> AsyncIterator[Relay]:
    """Sends the events of committed transactions to Kafka, for the length of the block, through outages of both sides.

    At least once, with the message id in the header `MESSAGE_ID`; for each topic and key the first copies of the events
    come in the order of `id`, and later copies repeat a stretch of what came before. It reads `batch` rows at a time,
    and looks for new ones every `poll` seconds. Of several relays, in whatever processes, one is at work and the others
    stand by until it ends. The block may last `request_timeout_ms` longer, 40 s, if Kafka hangs as the producer starts.
    `options` go to `AIOKafkaProducer`. Raises `LookupError` when the table is not there.
    """
    if batch < 1:
        raise ValueError(f"a batch has at least one row, not {batch}")
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raise ValueError("an outbox in memory ends with its process: use a file, as in sqlite:///shop.db")
    if not await asyncio.to_thread(lambda: sa.inspect(engine).has_table(box.name)):
        raise LookupError(f"the database has no table {box.name!r}: make it with create_tables(engine)")
    work = Relay(kafka, engine, batch, poll, box, options)
    async with beside(work.run(), work.stop):
        yield work
