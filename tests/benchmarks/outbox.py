"""Events through the outbox on SQLite: a transaction for each order and its event, and all of them relayed to Kafka.

Without a sync of the disk in each commit, which would measure the disk; what that costs is a contender of its own.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import sqlalchemy as sa

import mqlib as mq
from mqlib.patterns import outbox
from tests.benchmarks.core import Contender, Promise, rate

ORDERS = sa.Table("orders", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("item", sa.String))


def shop(path: Path, synchronous: str) -> sa.Engine:
    engine = outbox.database(f"sqlite:///{path}")
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA synchronous = {synchronous}"))
    ORDERS.metadata.create_all(engine)
    outbox.create_tables(engine)
    return engine


def place(engine: sa.Engine, topic: str, count: int, together: int) -> None:
    for first in range(0, count, together):
        with engine.begin() as connection:
            connection.execute(sa.insert(ORDERS), [{"item": "tea"}] * together)
            events = [
                outbox.Event(topic, b'{"item": "tea"}', b"%d" % number) for number in range(first, first + together)
            ]
            outbox.add_events(connection, events)


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 200 if quick else 4_000
    topic = await mq.topic(kafka, "bench", partitions=3)
    with tempfile.TemporaryDirectory() as folder:

        def contender(name: str, number: int, together: int, synchronous: str, *promises: Promise) -> Contender:
            engine = shop(Path(folder) / f"{synchronous}-{together}.db", synchronous)

            async def orders() -> None:
                async with outbox.relay(kafka, engine, poll=0.01) as work:
                    await asyncio.to_thread(place, engine, topic, number, together)
                    await mq.until(lambda: work.sent == number, within=60, every=0.001)

            return Contender(name, rate(number, orders), "events/s", promises)

        yield [
            contender("a transaction each", count, 1, "NORMAL", Promise(2_000, 1)),
            contender("100 in a transaction", count, 100, "NORMAL"),
            contender("a transaction and a disk sync each", count // 4, 1, "FULL"),
        ]
