"""Exactly-once consume-transform-produce on Kafka: outputs and the input's offset are committed in one transaction.

Whoever reads the target with `isolation_level="read_committed"` sees the outputs of each input record exactly once,
through crashes of this process, of the broker, and of the network. That covers what is written to Kafka, nothing else:
`function` runs again for a record whose transaction was aborted. See KIP-98, KIP-129, and Kafka's documentation,
*Message Delivery Semantics*.

There is one transactional id for each source partition, since aiokafka 0.14 does not send the group's generation along
with the offsets (KIP-447). The next owner of a partition first fences the last one, then asks where it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from aiokafka import AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced

from ..brokers import Kafka
from ..brokers.base import BrokerError, Connectable
from ..bulk import REFUSED
from ..topics import consumer, partitions_of, poll, producer
from ..waiting import beside

POLL_SECONDS = 0.1
PAUSE_SECONDS = 0.2
ABORT_SECONDS = 2.0


class Output(NamedTuple):
    """A record for the target. Without a partition its key decides."""

    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int | None = None


Function = Callable[[ConsumerRecord], Awaitable[Iterable[Output]]]


class TransformFailed(BrokerError):
    """The function raised, or Kafka refused one of its outputs. Nothing of that transaction is visible."""


@dataclass
class Report:
    """What happened, in counts."""

    records: int = 0
    """Input records whose transaction is committed."""
    outputs: int = 0
    transactions: int = 0
    unknown: int = 0
    """Transactions whose commit got no answer. The next owner of the partition goes on where they ended, either way."""
    fenced: int = 0
    """Transactions that were refused, since another one had begun in their place, or they had lasted too long."""
    restarts: int = 0
    """How often consumer and producers were made anew after an error."""
    error: Exception | None = None
    """The last such error."""


class _Lane:
    """One source partition that is ours: its producer, and the first offset that is not in a committed transaction."""

    def __init__(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.producer: AIOKafkaProducer
        self.next = 0


class Transform(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of a group that transforms; made by `transform`."""

    def __init__(
        self, kafka: Connectable, source: str, target: str, group: str, function: Function, batch: int, within: float,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report = Report()
        self._kafka, self._source, self._target, self._group = kafka, source, target, group
        self._function, self._batch, self._within, self._options = function, batch, within, options
        self._lanes: dict[TopicPartition, _Lane] = {}
        self._lock = asyncio.Lock()  # a rebalance waits for the transactions that are open
        self._stopping = asyncio.Event()
        self._rebalancing = True

    def stop(self) -> None:
        """Asks it to finish: transactions that are open are completed."""
        self._stopping.set()

    async def run(self) -> None:
        """Works until `stop`; after an error of the broker or the network it begins anew, as a fresh process would."""
        while not self._stopping.is_set():
            try:
                await self._live()
            except REFUSED as error:
                if not isinstance(error, ProducerFenced):
                    raise TransformFailed(f"{self._target}: {type(error).__name__}: {error}") from error
                self.report.fenced += 1
                await self._pause(error)
            except (KafkaError, OSError) as error:  # `TimeoutError` is an `OSError`
                await self._pause(error)

    async def _pause(self, error: Exception) -> None:
        self.report.restarts, self.report.error = self.report.restarts + 1, error
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), PAUSE_SECONDS)

    async def _live(self) -> None:
        patience = int(1000 * self._within) + 5000
        defaults = {"isolation_level": "read_committed", "rebalance_timeout_ms": patience}
        fixed = {"group_id": self._group, "enable_auto_commit": False}
        async with consumer(self._kafka, **{**defaults, **self._options, **fixed}) as self._consumer:
            self._consumer.subscribe([self._source], listener=self)
            try:
                while not self._stopping.is_set():
                    await self._turn()
            finally:
                async with self._lock:
                    await self._close(list(self._lanes))

    async def _turn(self) -> None:
        async with self._lock, asyncio.timeout(self._within):
            for part in set() if self._rebalancing else self._consumer.assignment() - self._lanes.keys():
                self._lanes[part] = _Lane()
                await self._open(part, self._lanes[part])
        batch = await poll(self._consumer, POLL_SECONDS, self._batch)
        async with self._lock:
            assigned = self._consumer.assignment()
            for part in assigned & (batch.keys() - self._lanes.keys()):  # assigned while it polled: put them back
                self._consumer.seek(part, batch[part][0].offset)
            mine = [(part, lane) for part, lane in self._lanes.items() if part in assigned]
            work = [self._advance(part, lane, batch.get(part, [])) for part, lane in mine]
            for result in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    async def _open(self, part: TopicPartition, lane: _Lane) -> None:
        """Fences whoever had the partition before; its open transaction is aborted, one that is ending is awaited."""
        sending = producer(
            self._kafka, transactional_id=f"{self._group}-{part.topic}-{part.partition}",
            transaction_timeout_ms=int(1000 * self._within), acks="all",
        )  # fmt: skip
        lane.producer = await lane.stack.enter_async_context(sending)
        # Only now does nobody else move it. What the consumer was told before may be old.
        committed = await self._consumer.committed(part)
        lane.next = await self._consumer.position(part) if committed is None else committed

    async def _advance(self, part: TopicPartition, lane: _Lane, records: list[ConsumerRecord]) -> None:
        """One transaction for these records. The position is also beyond the source's own transaction markers."""
        async with asyncio.timeout(self._within):
            position = await self._consumer.position(part)
            if position <= lane.next:
                return
            committing = False
            await lane.producer.begin_transaction()
            try:
                new = [record for record in records if record.offset >= lane.next]
                sent = [await self._send(lane, output) for record in new for output in await self._outputs(record)]
                await asyncio.gather(*sent)  # aiokafka commits also when one of them was refused
                await lane.producer.send_offsets_to_transaction({part: position}, self._group)
                committing = True
                await lane.producer.commit_transaction()
            except BaseException as error:
                self.report.unknown += committing
                ended = lane.producer._txn_manager.wait_for_transaction_end()
                if ended.done() and (cause := ended.exception()):  # aiokafka had given the transaction up before
                    raise cause from error
                if not committing:
                    await self._abort(lane)
                raise
        lane.next = position
        self.report.transactions += 1
        self.report.records += len(new)
        self.report.outputs += len(sent)

    async def _outputs(self, record: ConsumerRecord) -> Iterable[Output]:
        try:
            return await self._function(record)
        except Exception as error:
            where = f"{record.topic}-{record.partition}, offset {record.offset}"
            raise TransformFailed(f"{where}: {type(error).__name__}: {error}") from error

    async def _send(self, lane: _Lane, output: Output) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = await lane.producer.send(
            self._target, output.value, key=output.key, headers=output.headers, partition=output.partition
        )
        return future

    async def _abort(self, lane: _Lane) -> None:
        """So that readers need not wait for the transaction to time out. Whoever comes next does it, too."""
        with contextlib.suppress(KafkaError, TimeoutError, AssertionError):
            async with asyncio.timeout(ABORT_SECONDS):
                await lane.producer.abort_transaction()

    async def _close(self, parts: Collection[TopicPartition]) -> None:
        lanes = [lane for part in parts if (lane := self._lanes.pop(part, None))]
        # A client that cannot end in order, since the broker is gone, has no more to say.
        await asyncio.gather(*(lane.stack.aclose() for lane in lanes), return_exceptions=True)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before these partitions may go to another member."""
        self._rebalancing = True
        async with self._lock:
            await self._close(revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance; the next turn opens what is new."""
        self._rebalancing = False


@contextlib.asynccontextmanager
async def transform(
    kafka: Connectable, source: str, target: str, group: str, function: Function, batch: int = 500,
    within: float = 10.0, **options: Any,
) -> AsyncIterator[Transform]:  # fmt: skip
    """Runs `function(record)` for each record of `source`, as a member of `group`, for the length of the block.

    What it returns goes to `target`, in one transaction with the offset, for up to `batch` records at a time. A
    transaction lasts `within` seconds at most, the function's time included. `options` go to `AIOKafkaConsumer`.
    Raises `BrokerError` for a missing topic, and at the end of the block `TransformFailed`.
    """
    for name in (source, target):
        await partitions_of(cast(Kafka, kafka), name)
    work = Transform(kafka, source, target, group, function, batch, within, options)
    async with beside(work.run(), work.stop):
        yield work
