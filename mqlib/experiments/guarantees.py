"""Six ways to send and to receive, each through six faults, counted. Notebook 10 runs it, and draws the table.

The faults are real: SIGKILL of the process, SIGKILL of the broker, a proxy that swallows the answers or resets the
connections. Each strikes at the worst moment of the middle batch. Each cell of the table has its own topic or queue,
and its own database for the producer's note of how far it is, for outbox, inbox and effects.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from aiormq import spec
from aiormq.abc import ChannelFrame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from ..patterns import inbox, outbox
from ..patterns.link import GONE, uncancelled
from ..queues import channel
from ..topics import consumer, producer, take
from ..waiting import until
from ..workers import crash

CRASHES = ("consumer crash before the effect", "consumer crash after the effect", "producer crash")
OUTAGES = ("broker SIGKILL", "lost response", "connection reset")
FAULTS = CRASHES + OUTAGES


@dataclass
class Cell:
    """One mode under one fault: where it happens, and at the end its counts of messages."""

    mode: str
    fault: str
    broker: str
    """kafka, rabbit, own_kafka or own_rabbit."""
    messages: int
    batch: int
    path: str
    place: str
    """The topic; or the exchange, and a queue of that name, unless `queue` says otherwise."""
    queue: str
    group: str
    source: str
    """The topic that the transactional service reads."""
    stored: int = 0
    effects: int = 0
    lost: int = 0
    """Orders without an effect."""
    duplicated: int = 0
    """Effects beyond the first of their order."""
    armed: bool = False
    barrier: asyncio.Barrier | None = field(default=None, repr=False)
    over: asyncio.Event | None = field(default=None, repr=False)

    def is_hit(self, fault: str, numbers: Iterable[int]) -> bool:
        """Whether this is the moment: the batch with the middle order, and the fault of this cell."""
        return self.armed and self.fault == fault and self.messages // 2 in numbers


Work = Callable[[Any, Cell], Any]


@functools.cache
def database(path: str) -> sa.Engine:
    """The database of a cell."""
    engine = outbox.database(f"sqlite:///{path}")
    # Only processes die here: what the operating system has is safe, and need not be on the disk.
    sa.event.listen(engine, "connect", lambda file, _: file.execute("PRAGMA synchronous = OFF"))
    outbox.create_tables(engine)
    inbox.create_tables(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS noted (next INTEGER)")
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")
    return engine


def left(cell: Cell) -> list[range]:
    """The batches that the producer has not noted as done."""
    with database(cell.path).connect() as connection:
        done = connection.exec_driver_sql("SELECT coalesce(max(next), 0) FROM noted").scalar_one()
    return [range(start, start + cell.batch) for start in range(done, cell.messages, cell.batch)]


def note(cell: Cell, batch: range, connection: sa.Connection | None = None) -> None:
    """Notes a batch as done, in a transaction of its own or in that of `connection`."""
    with contextlib.ExitStack() as stack:
        at = connection or stack.enter_context(database(cell.path).begin())
        at.exec_driver_sql("INSERT INTO noted VALUES (?)", (batch[-1] + 1,))


async def crash_here(cell: Cell, fault: str, numbers: Iterable[int]) -> None:
    """All modes of a process come to their worst moment; then it is killed."""
    if cell.is_hit(fault, numbers) and cell.barrier:
        await cell.barrier.wait()
        crash()


@contextlib.asynccontextmanager
async def outage_here(cell: Cell, numbers: Iterable[int]) -> AsyncIterator[None]:
    """All modes send their middle batch into the outage at once."""
    hit = cell.fault in OUTAGES and cell.is_hit(cell.fault, numbers)
    if hit and cell.barrier:
        cell.armed = False
        await cell.barrier.wait()
    try:
        yield
    finally:
        if hit and cell.over:
            await cell.over.wait()


# On RabbitMQ, with the layer below aio-pika: there a batch is one write, which takes a quarter of the time of as many
# calls of `basic_publish`. After a lost connection a producer begins again at its note.


async def write_batch(wire: Any, exchange: str, numbers: Sequence[int], **properties: Any) -> None:
    """Writes a message for each number, all in one piece; on a channel with confirms, waits for all of these."""
    publish = spec.Basic.Publish(exchange=exchange)
    frames: list[Any] = []
    for number in numbers:
        body = b"%d" % number
        header = ContentHeader(body_size=len(body), properties=spec.Basic.Properties(**properties))
        frames += [publish, header, ContentBody(body)]
    async with wire.lock:
        written, confirms = wire.create_future(), []
        for _ in numbers if wire.publisher_confirms else ():
            wire.delivery_tag += 1
            confirms.append(wire.create_future())
            wire.confirmations[wire.delivery_tag] = confirms[-1]
        await wire.write_queue.put(ChannelFrame.marshall(wire.number, frames, written))
        await written
    await asyncio.gather(*confirms)


async def fire_and_forget(rabbit: Any, cell: Cell) -> None:
    """Transient messages without confirms; a batch is noted as done, and then written to the socket."""
    while left(cell):
        with contextlib.suppress(*GONE), uncancelled():
            async with channel(rabbit, publisher_confirms=False) as opened:
                wire = await opened.get_underlay_channel()
                for batch in left(cell):
                    note(cell, batch)
                    await crash_here(cell, "producer crash", batch)
                    async with outage_here(cell, batch):
                        await write_batch(wire, cell.place, batch)
        await asyncio.sleep(0.1)  # before it connects again


async def confirms(rabbit: Any, cell: Cell) -> None:
    """Persistent messages; a batch that is not confirmed whole is sent again; then it is noted."""
    while left(cell):
        with contextlib.suppress(*GONE), uncancelled():
            async with channel(rabbit) as opened:
                wire = await opened.get_underlay_channel()
                for batch in left(cell):
                    async with outage_here(cell, batch):
                        await write_batch(wire, cell.place, batch, delivery_mode=2)
                    await crash_here(cell, "producer crash", batch)
                    note(cell, batch)
        await asyncio.sleep(0.1)


async def acknowledge_after(rabbit: Any, cell: Cell, no_ack: bool = False) -> None:
    """What the queue holds, in batches: the effect, then the acknowledgement. With `no_ack` the broker forgets a
    message as it writes it to the socket."""
    async with channel(rabbit, prefetch=0 if no_ack else 2 * cell.batch) as opened:
        wire = await opened.get_underlay_channel()
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        size = (await wire.queue_declare(cell.queue, passive=True)).message_count or 0
        await wire.basic_consume(cell.queue, arrived.put, no_ack=no_ack)
        while size:
            batch = [await arrived.get() for _ in range(min(cell.batch, size))]
            size -= len(batch)
            await effect(cell, [int(message.body) for message in batch])
            if not no_ack:
                await wire.basic_ack(batch[-1].delivery_tag, multiple=True)


async def effect(cell: Cell, numbers: Sequence[int], ids: Sequence[str] | None = None) -> None:
    """One transaction; with message ids only for those that the inbox has not seen."""
    await crash_here(cell, "consumer crash before the effect", numbers)
    with database(cell.path).begin() as connection:
        new = numbers if ids is None else [int(id) for id in inbox.once_each(connection, ids)]
        if new:
            connection.exec_driver_sql("INSERT INTO effect VALUES (?)", [(number,) for number in new])
    await crash_here(cell, "consumer crash after the effect", numbers)


# On Kafka.


async def send_batch(sending: AIOKafkaProducer, to: str, numbers: Sequence[int]) -> None:
    """Sends them as one batch, and waits for its acknowledgement."""
    batch = sending.create_batch()
    for number in numbers:
        batch.append(key=None, value=b"%d" % number, timestamp=None)
    await (await sending.send_batch(batch, to, partition=0))


async def acks_all(kafka: Any, cell: Cell, **options: Any) -> None:
    """`acks="all"`, and the client tries again; a batch that is acknowledged is noted."""
    while left(cell):
        with contextlib.suppress(KafkaError):
            async with producer(kafka, acks="all", **options) as sending:
                for batch in left(cell):
                    async with outage_here(cell, batch):
                        await send_batch(sending, cell.place, batch)
                    await crash_here(cell, "producer crash", batch)
                    note(cell, batch)


async def order_and_event(kafka: Any, cell: Cell) -> None:
    """Note and event are one transaction of the database; a relay sends what is committed."""
    engine = database(cell.path)
    async with outbox.relay(kafka, engine) as relay:
        for batch in left(cell):
            async with outage_here(cell, batch):
                with engine.begin() as connection:
                    note(cell, batch, connection)
                    events = [outbox.Event(cell.place, b"%d" % number, id=str(number)) for number in batch]
                    outbox.add_events(connection, events)
                relay.wake()
                await crash_here(cell, "producer crash", batch)

        async def all_sent() -> bool:
            return (await relay.lag()).waiting == 0

        await until(all_sent, within=60)


async def commit_after(kafka: Any, cell: Cell, with_inbox: bool = False) -> None:
    """The effect, with an inbox in one transaction with the message id; then the commit of the offset."""
    part = TopicPartition(cell.place, 0)
    async with consumer(kafka, group_id=cell.group, enable_auto_commit=False) as reading:
        reading.assign([part])
        end = (await reading.end_offsets([part]))[part]
        while (more := end - await reading.position(part)) > 0:
            records = await take(reading, min(cell.batch, more))
            ids = [inbox.message_id(record) for record in records] if with_inbox else None
            await effect(cell, [int(record.value) for record in records], ids)
            await reading.commit({part: records[-1].offset + 1})


async def transactional(kafka: Any, cell: Cell) -> None:
    """Reads orders, writes results and its offset in one transaction. After an error it begins anew, as another process
    would: the new producer has the same transactional id, which ends what the last one left open."""
    part, done = TopicPartition(cell.source, 0), False
    while not done:
        with contextlib.suppress(KafkaError):
            async with (
                producer(kafka, transactional_id=cell.group) as sending,
                consumer(kafka, group_id=cell.group, enable_auto_commit=False) as reading,
            ):
                reading.assign([part])
                while await reading.position(part) < cell.messages:
                    records = await take(reading, cell.batch)
                    async with outage_here(cell, [int(record.value) for record in records]):
                        await one_transaction(sending, part, records, cell)
                done = True


async def one_transaction(
    sending: AIOKafkaProducer, part: TopicPartition, records: Sequence[ConsumerRecord], cell: Cell
) -> None:
    """The results of some orders, and the offset behind them."""
    numbers = [int(record.value) for record in records]
    await crash_here(cell, "consumer crash before the effect", numbers)
    async with sending.transaction():
        await send_batch(sending, cell.place, numbers)
        await crash_here(cell, "producer crash", numbers)
        await sending.send_offsets_to_transaction({part: records[-1].offset + 1}, cell.group)
    await crash_here(cell, "consumer crash after the effect", numbers)


class Mode(NamedTuple):
    """How orders get from a program to their effects."""

    kind: str
    produce: Work
    consume: Work


MODES = {
    "fire and forget": Mode("rabbit", fire_and_forget, functools.partial(acknowledge_after, no_ack=True)),
    "confirms": Mode("rabbit", confirms, acknowledge_after),
    "acks=all": Mode("kafka", acks_all, commit_after),
    "idempotent": Mode("kafka", functools.partial(acks_all, enable_idempotence=True), commit_after),
    "transactional": Mode("kafka", transactional, transactional),
    "outbox + inbox": Mode("kafka", order_and_event, functools.partial(commit_after, with_inbox=True)),
}
