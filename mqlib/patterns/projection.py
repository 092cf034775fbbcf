"""A read model: tables that a projector makes of the events in a topic, and that queries use instead of the log (CQRS).

The position in the log is a row beside the rows that were made of it, in one transaction, so each event has its effect
once, however often the projector dies. A query that must see a write waits for its position. A new version of a model
is built beside the old one, and takes its place when it has caught up.
See Fowler, "CQRS", https://martinfowler.com/bliki/CQRS.html.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import cast

import sqlalchemy as sa
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from sqlalchemy.dialects import postgresql, sqlite

from ..brokers import Kafka
from ..brokers.base import BrokerError, Connectable
from ..topics import consumer, partitions_of, poll
from ..waiting import beside, until

POLL_SECONDS = 0.05
Apply = Callable[[sa.Connection, ConsumerRecord], object]

METADATA = sa.MetaData()
POSITIONS = sa.Table(
    "projection_positions", METADATA,
    sa.Column("projection", sa.String, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),
)  # fmt: skip
VIEWS = sa.Table(
    "projection_views", METADATA,
    sa.Column("view", sa.String, primary_key=True),
    sa.Column("projection", sa.String, nullable=False),
)  # fmt: skip


class ProjectionFailed(BrokerError):
    """An event could not be applied, or is not in the log any more. Nothing behind it is applied."""


class NotYet(BrokerError):
    """The read model has not come so far in time. The write is in the log all the same: it is late, not lost."""


class Behind(BrokerError):
    """The new read model has seen less than the one it should replace."""


def create_tables(engine: sa.Engine) -> None:
    """Makes the tables `projection_positions` and `projection_views` unless they are there."""
    METADATA.create_all(engine)


def positions(connection: sa.Connection, name: str) -> dict[int, int]:
    """The next offset of each partition, for a projection, or for the one behind a view; empty before the first."""
    behind = sa.select(VIEWS.c.projection).where(VIEWS.c.view == name).scalar_subquery()
    mine = POSITIONS.c.projection == sa.func.coalesce(behind, name)
    rows = connection.execute(sa.select(POSITIONS.c.partition, POSITIONS.c.next).where(mine))
    return {row.partition: row.next for row in rows}


async def reached(engine: sa.Engine, name: str, token: tuple[int, int], within: float = 5.0) -> None:
    """Waits until the projection, or the one behind a view, has applied everything before a position in the log:
    `token` is (partition, next offset), as an `event_store.Token`. What is read afterwards shows that write.

    Raises `NotYet` after `within` seconds.
    """
    partition, wanted = token
    found = 0

    def look() -> bool:
        nonlocal found
        with engine.connect().execution_options(sqlite_begin="DEFERRED") as connection, connection.begin():
            found = positions(connection, name).get(partition, 0)
        return found >= wanted

    try:
        await until(lambda: asyncio.to_thread(look), within)
    except TimeoutError:
        words = f"{name!r} is at {found} of partition {partition}, and not at {wanted} after {within:g} s"
        raise NotYet(f"{words}: what was written is in the log, and not in the read model yet") from None


def switch(connection: sa.Connection, view: str, projection: str, table: str) -> None:
    """Makes `view` show `table`, the one of `projection`, from the commit of this transaction on; no query sees less.

    The first time it makes the view. Raises `Behind`, and changes nothing, when `projection` has not seen all that the
    one behind the view has: wait for it and try again.
    """
    connection.execute(sa.select(POSITIONS.c.next).with_for_update())  # none moves between the look and the commit
    old, new = positions(connection, view), positions(connection, projection)
    if late := {part: (new.get(part, 0), at) for part, at in old.items() if new.get(part, 0) < at}:
        part, (here, there) = next(iter(late.items()))
        raise Behind(f"{projection!r} is at {here} of partition {part}, and {view!r} shows {there}: not switched")
    quoted = connection.dialect.identifier_preparer.quote
    connection.execute(sa.text(f"DROP VIEW IF EXISTS {quoted(view)}"))
    connection.execute(sa.text(f"CREATE VIEW {quoted(view)} AS SELECT * FROM {quoted(table)}"))
    connection.execute(sa.delete(VIEWS).where(VIEWS.c.view == view))
    connection.execute(sa.insert(VIEWS).values(view=view, projection=projection))


def forget(connection: sa.Connection, projection: str) -> None:
    """Deletes its positions, so that it starts from the beginning: empty its table in the same transaction."""
    connection.execute(sa.delete(POSITIONS).where(POSITIONS.c.projection == projection))


class Projector:
    """Applies events to tables; made by `project`."""

    def __init__(self, kafka: Connectable, engine: sa.Engine, topic: str, name: str, apply: Apply, batch: int) -> None:
        self.applied = 0
        """Events, in transactions that are committed."""
        self.yielded = 0
        """How often another projector of this name was further, and this one went on from there."""
        self._kafka, self._engine, self._topic, self._name = kafka, engine, topic, name
        self._apply, self._batch, self._stopping = apply, batch, False

    def stop(self) -> None:
        """Asks it to finish what is under way."""
        self._stopping = True

    async def run(self) -> None:
        """Works until `stop`. Raises `ProjectionFailed`."""
        options = {"isolation_level": "read_committed", "auto_offset_reset": "none"}
        parts = await partitions_of(cast(Kafka, self._kafka), self._topic)
        async with consumer(self._kafka, **options) as reader:
            reader.assign(parts)
            at = await self._start(reader, parts)
            while not self._stopping:
                try:
                    batch = await poll(reader, POLL_SECONDS, self._batch)
                except OffsetOutOfRangeError as error:
                    raise ProjectionFailed(f"{self._name}: {self._topic} has no longer, or never had, what comes "
                                           f"next: {error}") from error  # fmt: skip
                except KafkaError as error:
                    raise ProjectionFailed(f"{self._name}: {type(error).__name__}: {error}") from error
                for part in parts:
                    # Also past what holds no events, such as the marks of transactions.
                    next = await reader.position(part)
                    records = batch.get(part, [])
                    if next > at[part.partition] and not await self._advance(part, at, records, next):
                        self.yielded += 1
                        at = await self._start(reader, parts)
                        break

    async def _start(self, reader: AIOKafkaConsumer, parts: Iterable[TopicPartition]) -> dict[int, int]:
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        rows = [{"projection": self._name, "partition": part.partition, "next": 0} for part in parts]

        def read() -> dict[int, int]:
            with self._engine.begin() as connection:
                connection.execute(dialect.insert(POSITIONS).on_conflict_do_nothing(), rows)
                mine = sa.select(POSITIONS.c.partition, POSITIONS.c.next).where(POSITIONS.c.projection == self._name)
                return {row.partition: row.next for row in connection.execute(mine)}

        at = await asyncio.to_thread(read)
        for part in parts:
            reader.seek(part, at[part.partition])
        return at

    async def _advance(
        self, part: TopicPartition, at: dict[int, int], records: list[ConsumerRecord], next: int
    ) -> bool:
        """Applies the records and moves the position, or neither; False when somebody else has moved it."""

        def work() -> bool:
            with self._engine.begin() as connection:
                mine = sa.and_(POSITIONS.c.projection == self._name, POSITIONS.c.partition == part.partition)
                here = sa.and_(mine, POSITIONS.c.next == at[part.partition])
                if not connection.execute(sa.update(POSITIONS).where(here).values(next=next)).rowcount:
                    return False
                for record in records:
                    try:
                        self._apply(connection, record)
                    except Exception as error:
                        where = f"{record.topic}-{record.partition}, offset {record.offset}"
                        why = f"{self._name}: {where}: {type(error).__name__}: {error}"
                        raise ProjectionFailed(why) from error
            return True

        if not await asyncio.to_thread(work):
            return False
        at[part.partition] = next
        self.applied += len(records)
        return True


@contextlib.asynccontextmanager
async def project(
    kafka: Connectable, engine: sa.Engine, topic: str, name: str, apply: Apply, batch: int = 500
) -> AsyncIterator[Projector]:
    """Keeps a read model up to date for the length of the block: `apply(connection, record)`, in a thread, for each
    committed record of the topic from the first on, up to `batch` of a partition in one transaction.

    `engine` is one of `inbox.database`; `name` is that of the projection, one for each version of the read model.
    Several projectors of one name take turns, and apply each event once. Partitions that are added later are read by
    the next start. Raises `BrokerError` for a missing topic; when an event cannot be applied or is deleted the block is
    interrupted by `ProjectionFailed`, and when the database fails by what that raises.
    """
    create_tables(engine)
    await partitions_of(cast(Kafka, kafka), topic)
    work = Projector(kafka, engine, topic, name, apply, batch)
    async with beside(work.run(), work.stop):
        yield work
