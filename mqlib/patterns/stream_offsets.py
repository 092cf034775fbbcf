"""Where the readers of RabbitMQ's streams are: a table of their last offsets, to be stored in the effect's transaction.

A stream does not know its readers over AMQP 0-9-1. See https://www.rabbitmq.com/docs/streams#consuming.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Literal

import sqlalchemy as sa
from aio_pika.abc import AbstractIncomingMessage
from sqlalchemy.dialects import postgresql, sqlite

from ..brokers.base import Connectable
from ..queues import channel
from .link import OPEN_SECONDS, uncancelled

OFFSET = "x-stream-offset"
PATIENCE_SECONDS = 10.0
"""How long a stream may take to show a message that it has."""
Start = Literal["first", "last", "next"] | int | datetime
"""Where to read from: "last" is the last *chunk*, of one message or of many; a time is the chunk of that second."""

METADATA = sa.MetaData()
OFFSETS = sa.Table(
    "stream_offsets", METADATA,
    sa.Column("stream", sa.String, primary_key=True),
    sa.Column("reader", sa.String, primary_key=True),
    sa.Column("offset", sa.BigInteger),
)  # fmt: skip
_OF_READER = (OFFSETS.c.stream == sa.bindparam("of")) & (OFFSETS.c.reader == sa.bindparam("by"))


def create_tables(engine: sa.Engine) -> None:
    """Makes the table `stream_offsets` unless it is there."""
    METADATA.create_all(engine)


def offset_of(message: AbstractIncomingMessage) -> int:
    """The offset of a message in its stream. Raises `ValueError` for one that comes from another kind of queue."""
    offset = message.headers.get(OFFSET)
    if not isinstance(offset, int):
        raise ValueError(f"a message without {OFFSET}: what delivered it is no stream (x-queue-type: stream)")
    return offset


def stored_offset(connection: sa.Connection, stream: str, reader: str) -> int | None:
    """The last offset that the reader is done with; None when it has none. Nobody changes it during the transaction."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = {"stream": stream, "reader": reader, "offset": None}
    connection.execute(dialect.insert(OFFSETS).on_conflict_do_nothing(), row)  # so that there is a row to lock
    query = sa.select(OFFSETS.c.offset).where(_OF_READER).with_for_update()
    found: int | None = connection.scalar(query, {"of": stream, "by": reader})
    return found


def store_offset(connection: sa.Connection, stream: str, reader: str, offset: int | None) -> None:
    """The reader is done with everything up to `offset`; a lower one than before makes it read again, and None start
    anew. End a running reader of that name before you do that."""
    stored_offset(connection, stream, reader)
    change = sa.update(OFFSETS).where(_OF_READER).values(offset=sa.bindparam("to"))
    connection.execute(change, {"of": stream, "by": reader, "to": offset})


async def first_offset(
    rabbit: Connectable, stream: str, start: Start = "first", within: float = PATIENCE_SECONDS
) -> int | None:
    """The offset of the first message that the stream has from `start` on; None when it delivers none in `within`
    seconds. Raises what the broker says when there is no such stream, one of `GONE` when it does not answer.
    """
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def deliver(message: AbstractIncomingMessage) -> None:
        if not found.done():
            found.set_result(offset_of(message))

    async with asyncio.timeout(OPEN_SECONDS), channel(rabbit, prefetch=1) as asking:
        asking.close_callbacks.add(lambda *_: found.cancel())
        with uncancelled():
            await (await asking.get_queue(stream)).consume(deliver, arguments={OFFSET: start})
            await asyncio.wait([found], timeout=within)
            if found.done():
                return await found
        await asking.get_queue(stream)  # the broker does answer
    return None
