"""Retry without overtaking: a record that fails is parked, and so are those of its key that follow, until all are done.

Other keys flow on. Parked records are in a compacted topic beside the topic, by their offset; a tombstone settles one.
So what is parked is read from there whenever a partition gets a new owner, and a crash forgets nothing. After
"pattern 4: maintain order of redirected events" of Confluent's "Error Handling Patterns for Apache Kafka Applications".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from ..brokers import BrokerError
from ..brokers.base import Connectable
from ..topics import consumer, described, poll, producer
from ..waiting import beside
from .consumer import GroupConsumer, Handler, Policy, Report, letter_headers

PARKING_TOPIC: dict[str, Any] = {"cleanup_policy": "compact"}
"""Settings of a parking topic, for `mq.topic(kafka, name, partitions, **PARKING_TOPIC)`."""
RETRY_SECONDS = 0.5


@dataclass
class Parking:
    """What became of the records, in counts of records unless it says otherwise."""

    handled: int = 0
    """Handlers that finished, parked or not; a record that is delivered again counts again."""
    failed: int = 0
    """Attempts that raised."""
    parked: int = 0
    """Stored in the parking topic: those that failed, and those that had to wait for them."""
    found: int = 0
    """Parked by an owner before this one."""
    skipped: int = 0
    """Delivered again, after a crash, although they are parked, or done with before one that is parked."""
    dead_lettered: int = 0
    freed: int = 0
    """Keys of which nothing is parked any more."""

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', '-')} {count}" for name, count in asdict(self).items())


@dataclass
class _Parked:
    record: ConsumerRecord
    begun: int = 0  # attempts, also those of which nobody knows how they ended
    error: str = "each attempt ended with its process"


class _Lot:  # the parked records of one partition, while it is ours
    def __init__(self) -> None:
        self.keys: dict[bytes | int, deque[_Parked]] = {}
        self.loaded, self.closed, self.room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()


def _name(record: ConsumerRecord) -> Any:  # a record without a key is in order with no other
    return record.offset if record.key is None else record.key


class ParkingConsumer(GroupConsumer):
    """A member of a consumer group that parks what fails; made by `consume_parking`."""

    def __init__(
        self, kafka: Connectable, topic: str, group: str, handle: Handler, lot: str, policy: Policy,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        if not policy.dead_letters or policy.attempts < 1:
            raise ValueError("the policy needs a topic for dead_letters and at least 1 of attempts: else a record that "
                             "fails for ever keeps its key parked for ever")  # fmt: skip
        inner = replace(policy, by="key", attempts=1, dead_letters=None)
        super().__init__(kafka, [topic], group, self._divert, inner, options)
        self.parking = Parking()  # what became of the records; in `report` a parked one counts as handled
        self._to, self._of, self._work_on, self._rules, self._as = kafka, topic, handle, policy, group
        self._lot, self._lots = lot, dict[TopicPartition, _Lot]()
        self._retrying = asyncio.Semaphore(policy.concurrency)
        self._leaving: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None

    @property
    def parked(self) -> dict[bytes | int, int]:
        """How many records of which key are parked here now; those without a key stand by their offset."""
        return {name: len(queue) for lot in self._lots.values() for name, queue in lot.keys.items()}

    def stop(self) -> None:
        """Asks it to finish: running handlers get `drain` seconds; what is parked stays so."""
        if self._leaving is None:  # first the retries: when the group is left, another member may begin with them
            self._leaving = asyncio.create_task(self._leave(list(self._lots.values())))
            self._leaving.add_done_callback(lambda _: GroupConsumer.stop(self))

    async def run(self) -> Report:
        """Works until `stop`. Raises as `consume_parking` says."""
        await self._check()
        async with producer(self._to, acks="all", enable_idempotence=True) as self._sender:
            try:
                report = await super().run()
            finally:
                await self._leave(list(self._lots.values()))
        if self._broken:
            raise self._broken
        return report

    async def _check(self) -> None:
        admin = AIOKafkaAdminClient(**self._to.client)
        await admin.start()
        try:
            topics = {answer["topic"]: answer for answer in await described(admin, [self._of, self._lot])}
            for name, answer in topics.items():
                if answer["error_code"]:
                    raise BrokerError(f"Kafka has no topic {name!r}")
            here, there = (len(topics[name]["partitions"]) for name in (self._of, self._lot))
            config = ConfigResource(ConfigResourceType.TOPIC, self._lot, {"cleanup.policy": None})
            policy = (await admin.describe_configs([config]))[0].resources[0][4][0][1]
        finally:
            await admin.close()
        if policy != "compact" or there < here:
            raise BrokerError(
                f"the parking topic {self._lot!r} has {there} partitions and cleanup.policy={policy}; it needs {here}, "
                f"as {self._of!r} has, and compact, or what is parked gets lost"
            )

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance: what is parked is read first."""
        await super().on_partitions_assigned(assigned)
        for part in assigned:
            lot = self._lots[part] = _Lot()
            self._start(lot, self._load(part, lot))

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before these partitions may go to another member."""
        lots = [self._lots[part] for part in revoked if part in self._lots]
        await asyncio.gather(super().on_partitions_revoked(revoked), self._leave(lots))
        self._lots = {part: lot for part, lot in self._lots.items() if part not in revoked}

    def _start(self, lot: _Lot, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            lot.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                self._broken = self._broken or error
                self.stop()

        task = asyncio.create_task(work)
        lot.tasks.add(task)
        task.add_done_callback(ended)

    async def _leave(self, lots: Collection[_Lot]) -> None:
        for lot in lots:
            lot.closed.set()
            lot.room.set()
        if tasks := {task for lot in lots for task in lot.tasks}:
            _, slow = await asyncio.wait(tasks, timeout=self._rules.drain)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

    async def _load(self, part: TopicPartition, lot: _Lot) -> None:
        live: dict[int, ConsumerRecord] | None = None
        while live is None and not lot.closed.is_set():
            try:
                live = await self._read(TopicPartition(self._lot, part.partition))
            except (KafkaError, TimeoutError):
                await asyncio.sleep(RETRY_SECONDS)
        if live is None:
            return
        for offset in sorted(offset for offset, stored in live.items() if stored.value is not None):
            *headers, (_, about) = live[offset].headers
            known = json.loads(about)
            record = replace(
                live[offset], topic=part.topic, offset=offset, timestamp=known["timestamp"], headers=tuple(headers),
                key=None if known["key"] is None else bytes.fromhex(known["key"]),
                value=None if known["empty"] else live[offset].value,
            )  # fmt: skip
            self._add(lot, _Parked(record, known["begun"], known["error"]))
            self.parking.found += 1
        lot.loaded.set()

    async def _read(self, part: TopicPartition) -> dict[int, ConsumerRecord]:
        async with consumer(self._to) as reader:
            reader.assign([part])
            end, live = (await reader.end_offsets([part]))[part], dict[int, ConsumerRecord]()
            await reader.seek_to_beginning(part)
            while await reader.position(part) < end:
                live |= {int(stored.key): stored for stored in (await poll(reader, 0.1)).get(part, [])}
        return live

    async def _store(self, parked: _Parked, settled: bool = False) -> None:
        record, key = parked.record, parked.record.key
        about = {"begun": parked.begun, "error": parked.error, "key": None if key is None else key.hex(),
                 "empty": record.value is None, "timestamp": record.timestamp}  # fmt: skip
        await self._sender.send_and_wait(
            self._lot, None if settled else record.value or b"", b"%d" % record.offset, record.partition,
            headers=[*record.headers, ("parked", json.dumps(about).encode())],
        )  # fmt: skip

    async def _divert(self, record: ConsumerRecord) -> None:
        """Handles a record, or parks it. When this returns, the record may be committed."""
        lot, parked = self._lots[TopicPartition(record.topic, record.partition)], _Parked(record)
        await lot.loaded.wait()  # nothing is handled before it is known what is parked
        waiting = lot.keys.get(_name(record))
        if waiting and record.offset <= waiting[-1].record.offset:
            self.parking.skipped += 1
            return
        if waiting is None and await self._tried(parked):
            return
        while sum(map(len, lot.keys.values())) >= self._rules.max_buffered and not lot.closed.is_set():
            lot.room.clear()
            await lot.room.wait()
        await self._store(parked)
        self.parking.parked += 1
        self._add(lot, parked)  # perhaps its key was freed meanwhile: then it begins anew, with this one

    async def _tried(self, parked: _Parked) -> bool:
        parked.begun += 1
        try:
            await self._work_on(parked.record)
        except (Exception, asyncio.CancelledError) as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            self.parking.failed += 1
            parked.error = f"{type(error).__name__}: {error}"[:1000]
            return False
        self.parking.handled += 1
        return True

    def _add(self, lot: _Lot, parked: _Parked) -> None:
        name = _name(parked.record)
        if name not in lot.keys:
            self._start(lot, self._empty(lot, name))
        lot.keys.setdefault(name, deque()).append(parked)

    async def _empty(self, lot: _Lot, name: bytes | int) -> None:
        """Retries what is parked of one key, in order."""
        queue = lot.keys[name]
        while queue:
            if not await self._done_with(lot, queue[0]):
                return
            await self._store(queue[0], settled=True)
            queue.popleft()
            lot.room.set()
        del lot.keys[name]
        self.parking.freed += 1

    async def _done_with(self, lot: _Lot, parked: _Parked) -> bool:
        """Tries until it is handled or dead-lettered; returns False when the partition is given up before that."""
        while parked.begun < self._rules.attempts:
            if parked.begun:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._rules.backoff * 2 ** (parked.begun - 1)):
                        await lot.closed.wait()
            async with self._retrying:
                if lot.closed.is_set():
                    return False
                await self._store(replace(parked, begun=parked.begun + 1))  # so that one that kills us counts, too
                if await self._tried(parked):
                    return True
        record, to = parked.record, self._rules.dead_letters
        headers = letter_headers(record, self._as, parked.begun, parked.error)
        await self._sender.send_and_wait(to, record.value, record.key, headers=headers)
        self.parking.dead_lettered += 1
        return True


@contextlib.asynccontextmanager
async def consume_parking(
    kafka: Connectable, topic: str, group: str, handle: Handler, parking: str, policy: Policy, **options: Any
) -> AsyncIterator[ParkingConsumer]:
    """Runs `handle(record)` for each record of the topic, as a member of `group`, for the length of the block.

    Records of one key are handled in order, also when one fails: it is parked and tried again, `policy.attempts` times
    in all, `policy.backoff` seconds apart, doubled each time; then it goes to the topic `policy.dead_letters` and the
    next one of its key is tried. Keys run side by side, `policy.concurrency` from the topic and as many of those that
    are parked. `parking` is a topic of this topic and group alone, made with `PARKING_TOPIC` and as many partitions; at
    most `policy.max_buffered` records of a partition are parked, then it waits. At least once, as `consume`; one that
    comes again keeps its place. (One that ends the process at its first attempt is not parked yet, and comes again.)
    `options` go to the consumer. Raises `BrokerError` for a parking topic that is not fit, at the end of the block what
    kept it from parking, settling or burying a record, `ValueError` without `policy.dead_letters`.
    """
    made = ParkingConsumer(kafka, topic, group, handle, parking, policy, options)
    async with beside(made.run(), made.stop):
        await made.started.wait()
        yield made
