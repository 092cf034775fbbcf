"""Snapshots of what an event store's writer knows, so that its start replays what came after one, and not everything.

They are a cache in a database: deleting them costs a longer start, and nothing else. See `event_store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from aiokafka import TopicPartition
from sqlalchemy.dialects import postgresql, sqlite

METADATA = sa.MetaData()
TABLE = sa.Table(
    "snapshots", METADATA,
    sa.Column("topic", sa.String, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("model", sa.Integer, primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),
    sa.Column("states", sa.JSON, nullable=False),
)  # fmt: skip


class Snapshots:
    """Snapshots of whole partitions, one taken after every `every` events that a writer appends or had to replay.

    `engine` is one of `inbox.database`. Makes the table `snapshots` unless it is there.
    """

    def __init__(self, engine: sa.Engine, every: int = 1000) -> None:
        if every < 1:
            raise ValueError(f"every is a number of events, at least 1, and not {every}")
        self.engine, self.every = engine, every
        METADATA.create_all(engine)

    def load(self, part: TopicPartition, model: int) -> tuple[int, dict[str, Any]]:
        """The first offset that is not in it, and the states by aggregate; (0, {}) when there is none of this version
        of the model: then everything is replayed."""
        column = TABLE.c
        mine = sa.and_(column.topic == part.topic, column.partition == part.partition, column.model == model)
        with self.engine.connect().execution_options(sqlite_begin="DEFERRED") as connection, connection.begin():
            row = connection.execute(sa.select(column.next, column.states).where(mine)).one_or_none()
        return (row.next, row.states) if row else (0, {})

    def save(self, part: TopicPartition, model: int, next: int, states: Mapping[str, Any]) -> None:
        """Replaces the one of this version of the model, unless that is newer: a writer that is fenced may come late.

        Raises what the database raises, and `TypeError` for states that JSON cannot hold.
        """
        dialect = postgresql if self.engine.dialect.name == "postgresql" else sqlite
        values = {"topic": part.topic, "partition": part.partition, "model": model, "next": next, "states": states}
        insert = dialect.insert(TABLE).values(values)
        new = insert.on_conflict_do_update(
            index_elements=["topic", "partition", "model"],
            set_={"next": insert.excluded.next, "states": insert.excluded.states},
            where=TABLE.c.next < insert.excluded.next,
        )
        with self.engine.begin() as connection:
            connection.execute(new)
