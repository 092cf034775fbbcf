"""Inbox: a message has its effect once, however often it is delivered. Its id and the effect are one transaction.

It works where the effect is in the same database. See https://microservices.io/patterns/communication-style/
idempotent-consumer.html and EIP: Idempotent Receiver.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from aiokafka import ConsumerRecord
from sqlalchemy.dialects import postgresql, sqlite

MESSAGE_ID = "message-id"
"""The header with a message's id, the same in every copy of it."""
Effect = Callable[[sa.Connection, ConsumerRecord], object]


def database(url: str, **options: Any) -> sa.Engine:
    """An engine for a SQLite file or PostgreSQL; `options` go to `create_engine`.

    SQLite gets a write-ahead log (readers and the writer do not wait for each other), 30 s of patience for its one
    writer's lock, and BEGIN IMMEDIATE: a transaction that reads before it writes would otherwise fail at once, without
    any patience, if another one wrote in between. `execution_options(sqlite_begin="DEFERRED")` is for mere readers.
    `synchronous` stays FULL: otherwise a power failure could undo an order whose event is sent.
    """
    engine = sa.create_engine(url, **options)

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # the module's own BEGIN comes late, and is deferred
        connection.executescript("PRAGMA busy_timeout = 30000; PRAGMA journal_mode = WAL")

    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'IMMEDIATE')}")

    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", connected)
        sa.event.listen(engine, "begin", begun)
    return engine


def table(metadata: sa.MetaData, name: str = "inbox") -> sa.Table:
    """The inbox, among tables of your own."""
    return sa.Table(
        name, metadata,
        sa.Column("consumer", sa.String, primary_key=True),
        sa.Column("message_id", sa.String, primary_key=True),
        sa.Column("seen", sa.Float, nullable=False, index=True),
    )  # fmt: skip


METADATA = sa.MetaData()
IDS = table(METADATA)


def create_tables(engine: sa.Engine) -> None:
    """Makes the table `inbox` unless it is there."""
    METADATA.create_all(engine)


def once(connection: sa.Connection, message_id: str, consumer: str = "", box: sa.Table = IDS) -> bool:
    """Whether this `consumer` sees the id for the first time; the id is then part of the transaction, as the effect
    must be. If another transaction has just put it in, this waits for how that one ends (PostgreSQL; SQLite has one
    writer at a time)."""
    return bool(once_each(connection, [message_id], consumer, box))


def once_each(
    connection: sa.Connection, message_ids: Iterable[str], consumer: str = "", box: sa.Table = IDS
) -> set[str]:
    """The same for many: those of the ids that are new."""
    now = time.time()
    # In one order, or two transactions could wait for each other's.
    rows = [{"consumer": consumer, "message_id": id, "seen": now} for id in sorted(set(message_ids))]
    if not rows:
        return set()
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    new = dialect.insert(box).on_conflict_do_nothing().returning(box.c.message_id)
    return set(connection.scalars(new, rows))


def message_id(record: ConsumerRecord) -> str:
    """The id in a record's header `message-id`. Raises `ValueError` when it has none: then nothing can tell a copy."""
    for name, value in record.headers:
        if name == MESSAGE_ID:
            return str(value.decode())
    where = f"{record.topic}-{record.partition}, offset {record.offset}"
    raise ValueError(f"the record at {where} has no header {MESSAGE_ID!r}; whoever sends it must put one in")


async def apply(
    engine: sa.Engine, effect: Effect, records: Sequence[ConsumerRecord], consumer: str = "", box: sa.Table = IDS
) -> int:
    """Calls `effect(connection, record)` for each record that is new, in their order, and commits it all at once with
    their ids, in a thread. Returns how many were new. Commit the offsets to Kafka afterwards.

    If an effect raises, nothing of it has happened.
    """

    def work() -> int:
        with engine.begin() as connection:
            new = once_each(connection, map(message_id, records), consumer, box)
            count = len(new)
            for record in records:
                if message_id(record) in new:
                    new.remove(message_id(record))  # a copy may be among the records
                    effect(connection, record)
        return count

    return await asyncio.to_thread(work)


def forget(connection: sa.Connection, older_than: float, box: sa.Table = IDS) -> int:
    """Deletes ids first seen more than `older_than` seconds ago, and returns their number.

    A copy that comes later than that has its effect again. Keep ids for longer than a copy may take: the retention of
    the topic (a group may start over from its beginning; 7 days by default), and the longest outage of the relay and
    of the consumer, and the time until somebody sends dead letters again.
    """
    return connection.execute(sa.delete(box).where(box.c.seen < time.time() - older_than)).rowcount
