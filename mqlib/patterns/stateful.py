"""A state for each key that outlives a crash, exactly once: kept in memory, and written to a changelog topic.

Changes of the state, outputs and the source's offsets are one transaction (see `transactional`), so after a crash the
changelog holds what the committed records made of it, and nothing of the others. A partition of the source has a state
of its own, in the changelog's partition of the same number: who gets the partition fences its last owner, reads the
changelog to its end, and goes on. So equal keys must be in one partition, and partitions must not be added later.

After Kafka Streams' documentation: Fault-tolerant State Stores, and KIP-129. The whole state is in memory, and there
are no standby copies: a large one takes its time to be read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from ..brokers import Kafka
from ..brokers.base import BrokerError, Connectable
from ..topics import consumer, partitions_of, poll
from ..waiting import beside
from .transactional import Output, Report, Transform, _Lane

POLL_SECONDS = 0.1


class State(MutableMapping[bytes, bytes]):
    """The state of one partition: keys and values are bytes. What is set or deleted goes into the changelog."""

    def __init__(self) -> None:
        self._data: dict[bytes, bytes] = {}
        self._changes: dict[bytes, bytes | None] = {}

    def __getitem__(self, key: bytes) -> bytes:
        return self._data[key]

    def __setitem__(self, key: bytes, value: bytes) -> None:
        if not (isinstance(key, bytes) and isinstance(value, bytes)):
            raise TypeError(f"keys and values of a state are bytes; these are {key!r:.100}: {value!r:.100}")
        if self._data.get(key) != value:
            self._data[key] = self._changes[key] = value

    def __delitem__(self, key: bytes) -> None:
        del self._data[key]
        self._changes[key] = None

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Json(MutableMapping[str, Any]):
    """A state whose keys are texts and whose values are what JSON can say, under a `prefix` of their own.

    It hands out copies: to change a value, set it.
    """

    def __init__(self, state: MutableMapping[bytes, bytes], prefix: str = "") -> None:
        self._state, self._prefix = state, prefix.encode()

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._state[self._prefix + key.encode()])

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[self._prefix + key.encode()] = json.dumps(value).encode()

    def __delitem__(self, key: str) -> None:
        del self._state[self._prefix + key.encode()]

    def __iter__(self) -> Iterator[str]:
        size = len(self._prefix)
        return iter([key[size:].decode() for key in self._state if key.startswith(self._prefix)])

    def __len__(self) -> int:
        return sum(key.startswith(self._prefix) for key in self._state)


Handler = Callable[[ConsumerRecord], Awaitable[Iterable[Output]]]
Processor = Callable[[State], Handler]
"""Called when a partition was assigned and its state restored: gives what handles its records, in order. What the
handler keeps elsewhere than in the state is gone with the partition."""


@dataclass
class StateReport(Report):
    """What happened, in counts."""

    changes: int = 0
    """Records of the changelog that are committed."""
    restored: int = 0
    """Records of the changelog that were read to restore a state."""


class _Store:
    """The state of a partition that is ours, while it is restored and after."""

    def __init__(self) -> None:
        self.state, self.position, self.pending = State(), 0, 0
        self.handler: Handler | None = None

    async def restore(self, kafka: Connectable, part: TopicPartition, report: StateReport) -> None:
        """Reads the changelog to its end, which is a position: offsets count transaction markers, too. Interrupted, it
        goes on where it was."""
        async with consumer(kafka, isolation_level="read_committed") as reader:
            reader.assign([part])
            end = (await reader.end_offsets([part]))[part]
            reader.seek(part, self.position)
            while self.position < end:
                for record in (await poll(reader, POLL_SECONDS)).get(part, []):
                    report.restored += 1
                    if record.value is None:
                        self.state._data.pop(record.key, None)
                    else:
                        self.state._data[record.key] = record.value
                self.position = await reader.position(part)


class Stateful(Transform):
    """A member of a group that keeps a state; made by `stateful`."""

    report: StateReport

    def __init__(
        self, kafka: Connectable, source: str, target: str, changelog: str, group: str, processor: Processor,
        batch: int, within: float, options: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(kafka, source, target, group, self._handle, batch, within, options)
        self.report = StateReport()
        self._changelog, self._processor = changelog, processor
        self._stores: dict[TopicPartition, _Store] = {}

    @property
    def state(self) -> dict[int, Mapping[bytes, bytes]]:
        """The states of the partitions that are ours, to look at. They may be ahead of what is committed."""
        ready = {part.partition: store for part, store in self._stores.items() if store.handler}
        return {number: MappingProxyType(store.state._data) for number, store in sorted(ready.items())}

    async def _open(self, part: TopicPartition, lane: _Lane) -> None:
        await super()._open(part, lane)  # from here on nobody else adds to the changelog's partition
        store = self._stores.setdefault(part, _Store())
        await store.restore(self._kafka, TopicPartition(self._changelog, part.partition), self.report)
        store.handler = self._processor(store.state)

    async def _handle(self, record: ConsumerRecord) -> list[Output]:
        store = self._stores[TopicPartition(record.topic, record.partition)]
        assert store.handler is not None
        outputs = list(await store.handler(record))
        changes, store.state._changes = store.state._changes, {}
        store.pending += len(changes)
        return [*(_Change(value, key, partition=record.partition) for key, value in changes.items()), *outputs]

    async def _send(self, lane: _Lane, output: Output) -> Any:
        if not isinstance(output, _Change):
            return await super()._send(lane, output)
        return await lane.producer.send(self._changelog, output.value, key=output.key, partition=output.partition)

    async def _advance(self, part: TopicPartition, lane: _Lane, records: list[ConsumerRecord]) -> None:
        await super()._advance(part, lane, records)
        changes, self._stores[part].pending = self._stores[part].pending, 0
        self.report.changes, self.report.outputs = self.report.changes + changes, self.report.outputs - changes

    async def _close(self, parts: Collection[TopicPartition]) -> None:
        """A state in use goes with its lane, for it may hold what was not committed. One that is being restored holds
        what is: a life that ends too early leaves it to the next one."""
        parts = list(parts)
        await super()._close(parts)
        for part in parts:
            if part in self._stores and self._stores[part].handler:
                del self._stores[part]

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance, with all that are ours now; the next turn opens what is new."""
        for part in self._stores.keys() - set(assigned):
            del self._stores[part]
        await super().on_partitions_assigned(assigned)


class _Change(Output):
    """An output for the changelog."""

    __slots__ = ()


@contextlib.asynccontextmanager
async def stateful(
    kafka: Connectable, source: str, target: str, changelog: str, group: str, processor: Processor, batch: int = 500,
    within: float = 10.0, **options: Any,
) -> AsyncIterator[Stateful]:  # fmt: skip
    """Runs `processor(state)`'s handler for each record of `source`, as a member of `group`, for the block's length.

    What it returns goes to `target`, and what it changes in its state to `changelog`, in one transaction with the
    offset, for up to `batch` records at a time; see `transactional.transform` for `within` and `options`. Read both
    with `isolation_level="read_committed"`. Raises `BrokerError` for a missing topic, and for a changelog that is not
    compacted or has another number of partitions; at the end of the block `TransformFailed`.
    """
    own = {name: len(await partitions_of(cast(Kafka, kafka), name)) for name in (source, target, changelog)}
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        config = ConfigResource(ConfigResourceType.TOPIC, changelog, {"cleanup.policy": None})
        policy = (await admin.describe_configs([config]))[0].resources[0][4][0][1]
    finally:
        await admin.close()
    if own[changelog] != own[source] or policy != "compact":
        raise BrokerError(
            f"the changelog {changelog!r} has {own[changelog]} partitions and cleanup.policy={policy}; it needs "
            f"{own[source]}, as {source!r} has, and compact, or old parts of the state are deleted"
        )
    work = Stateful(kafka, source, target, changelog, group, processor, batch, within, options)
    async with beside(work.run(), work.stop):
        yield work


async def restored(kafka: Connectable, changelog: str) -> dict[int, dict[bytes, bytes]]:
    """The committed state of each partition, for somebody who only looks: it may be behind at once."""
    states = {}
    for part in await partitions_of(cast(Kafka, kafka), changelog):
        store = _Store()
        await store.restore(kafka, part, StateReport())
        states[part.partition] = store.state._data
    return states
