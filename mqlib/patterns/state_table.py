"""A table in memory that is what a compacted Kafka topic says: the last value of each key, and kept up to date.

A record puts its value for its key, a tombstone (a null value) deletes the key. What the table cannot know it does not
make up: it raises before it has read to the end, for a key whose last record cannot be decoded, and when records were
deleted before it read them.

After https://developer.confluent.io/patterns/table/state-table/, and Kafka Streams: KTable, GlobalKTable. What
compaction promises: https://kafka.apache.org/documentation/#compaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import OffsetOutOfRangeError

from ..brokers import BrokerError, Kafka
from ..brokers.base import Connectable
from ..topics import consumer, partitions_of, poll
from ..waiting import beside, until

K = TypeVar("K")
V = TypeVar("V")
POLL_SECONDS = 0.1


class TableError(BrokerError):
    """The table cannot say what it was asked for, or cannot be made."""


class NotCompacted(TableError):
    """The topic forgets keys by age: its cleanup.policy is not `compact`."""


class Truncated(TableError):
    """Records were deleted before they were read, or the topic was made anew: nobody can say what was in them."""


class Stale(TableError):
    """The table was behind for longer than tombstones are kept. It may hold keys that were deleted."""


class NotReady(TableError):
    """The table has not yet read to where the topic ended when it began."""


class Unreadable(TableError):
    """What the topic says last of this key cannot be decoded, or it says so in two partitions."""


class Aside(NamedTuple):
    """A record that was set aside, and why."""

    record: ConsumerRecord
    why: str


class StateTable(Mapping[K, V]):
    """The table of one topic, made by `state_table`: a mapping, without those keys that are `aside`.

    Between two `await`s it does not change, so `dict(table)` is the state as of one moment. Every reading raises
    `NotReady` before it is ready, and what ended the table when it can no longer follow.
    """

    def __init__(
        self, topic: str, reading: AIOKafkaConsumer, key: Callable[[bytes], K], value: Callable[[bytes], V],
        begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], tombstone_ms: float,
    ) -> None:  # fmt: skip
        self.topic = topic
        self.as_of = {part.partition: offset for part, offset in begins.items()}
        """By partition: every record below this offset is in the table."""
        self.aside: dict[bytes | None, Aside] = {}
        """By key, as bytes, its last record, where that could not be taken. A record without a key is at None."""
        self._reading, self._key, self._value = reading, key, value
        self._ends, self._tombstone_ms = ends, tombstone_ms
        self._values: dict[K, V] = {}
        self._raw: dict[K, bytes] = {}  # the bytes of the keys that are aside
        self._homes: dict[K, int] = {}  # the partition of each key
        self._end: BaseException | None = None

    def __getitem__(self, key: K) -> V:
        """Raises `KeyError` for a key that the topic does not have, `Unreadable` for one that is aside."""
        self._look()
        if key in self._raw:
            raise Unreadable(f"{key!r} in {self.topic}: {self.aside[self._raw[key]].why}")
        return self._values[key]

    def __iter__(self) -> Iterator[K]:
        self._look()
        return iter(self._values)

    def __len__(self) -> int:
        self._look()
        return len(self._values)

    def _look(self) -> None:
        self._alive()
        if not self._reached(self._ends):
            raise NotReady(f"the table of {self.topic} is being read: await its ready() first")

    def _alive(self) -> None:
        if self._end is not None:
            raise TableError(f"the table of {self.topic} has ended at {self.as_of}: {self._end}") from self._end

    def _reached(self, ends: Mapping[TopicPartition, int]) -> bool:
        return all(self.as_of[part.partition] >= end for part, end in ends.items())

    async def ready(self, within: float = 60.0) -> None:
        """Returns when the table has read to where the topic ended when it began. `TimeoutError` after `within` s."""
        await self._until(self._ends, within)

    async def refresh(self, within: float = 10.0) -> None:
        """Returns when the table has read to where the topic ends now. Raises `TimeoutError` after `within` seconds.

        An open transaction is not waited for. To read your own write, `reached` is cheaper.
        """
        self._alive()
        async with asyncio.timeout(within):
            ends = await self._reading.end_offsets([*self._ends])
        await self._until(ends, within)

    async def reached(self, partition: int, offset: int, within: float = 10.0) -> None:
        """Returns when the record there is in the table: what `send_and_wait` returned says where it is.

        Raises `TimeoutError` after `within` seconds, `KeyError` for a partition that the table does not read.
        """
        await self._until({TopicPartition(self.topic, partition): offset + 1}, within)

    async def _until(self, ends: Mapping[TopicPartition, int], within: float) -> None:
        def there() -> bool:
            self._alive()
            return self._reached(ends)

        try:
            await until(there, within)
        except TimeoutError:
            raise TimeoutError(f"the table of {self.topic} is at {self.as_of}, not at {[*ends.values()]}, after "
                               f"{within:g} s") from None  # fmt: skip

    def _apply(self, record: ConsumerRecord) -> None:
        """One record, in the order of its partition."""
        raw, key = record.key, None
        try:
            if raw is None:
                raise ValueError("it has no key")
            decoded = self._key(raw)
            home = self._homes.setdefault(decoded, record.partition)
            key = decoded
            if home != record.partition:
                self._homes[key] = -1  # from now on, for good: nobody knows which is the later one
                raise ValueError(f"it is in partition {record.partition}, and in another one before: two partitioners?")
            value = None if record.value is None else self._value(record.value)
        except Exception as error:  # a decoder raises whatever it stumbles over
            self._take_out(raw, key)
            if record.value is not None or self._homes.get(key) == -1:  # type: ignore[arg-type]
                self.aside[raw] = Aside(record, f"offset {record.offset}: {type(error).__name__}: {error}")
                if key is not None and raw is not None:
                    self._raw[key] = raw
            return
        self._take_out(raw, key)
        if record.value is not None:
            self._values[key] = cast(V, value)

    def _take_out(self, raw: bytes | None, key: K | None) -> None:
        self.aside.pop(raw, None)
        if key is not None:
            if (old := self._raw.pop(key, None)) is not None:
                self.aside.pop(old, None)
            self._values.pop(key, None)

    async def _follow(self) -> None:
        try:
            # Compaction promises all tombstones to a reader who is at the end again before they may be deleted.
            at_end = dict.fromkeys(self._ends, 1000 * time.time())
            while True:
                for records in (await poll(self._reading, POLL_SECONDS)).values():
                    for record in records:
                        self._apply(record)
                for part in self._ends:
                    asked = self._reading.last_poll_timestamp(part) or at_end[part]
                    if asked - at_end[part] > self._tombstone_ms:
                        raise Stale(
                            f"partition {part.partition} of {self.topic} was behind for more than delete.retention.ms, "
                            f"{self._tombstone_ms:g} ms: tombstones may be gone; make the table anew"
                        )
                    # Not the last record's: transaction markers, aborted records and compaction leave holes.
                    position = await self._reading.position(part)
                    if position >= (self._reading.last_stable_offset(part) or 0):
                        at_end[part] = asked
                    self.as_of[part.partition] = position
                if len(self._reading.partitions_for_topic(self.topic) or ()) > len(self._ends):
                    raise TableError(f"{self.topic} has got more partitions: its keys have moved; copy it to a new one")
        except OffsetOutOfRangeError as error:
            raise await self._truncated(error) from None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._end = None if task.cancelled() else task.exception()

    async def _truncated(self, error: OffsetOutOfRangeError) -> Truncated:
        [(part, at), *_] = error.args[0].items()
        begin = (await self._reading.beginning_offsets([part]))[part]
        what = f"offsets {at} to {begin - 1} were deleted unread" if begin > at else f"it ends before {at}: made anew?"
        return Truncated(f"{self.topic}, partition {part.partition}: {what}; make the table anew")


async def _settings(kafka: Connectable, topic: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        answer = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return {entry[0]: entry[1] for entry in answer[0].resources[0][4]}
    finally:
        await admin.close()


@contextlib.asynccontextmanager
async def state_table(
    kafka: Connectable, topic: str, key: Callable[[bytes], K], value: Callable[[bytes], V], may_expire: bool = False
) -> AsyncIterator[StateTable[K, V]]:
    """A `StateTable` that follows the topic during the block; `await table.ready()` before you read.

    `key` and `value` decode; what they raise sets the record aside, and the table goes on. Transactions that were
    aborted are not seen. `may_expire` is for `cleanup.policy=compact,delete`, where keys go when they are old.

    Raises `BrokerError` for a missing topic, `NotCompacted` for one that forgets, `Truncated` for one that has
    forgotten. During the block `Truncated`, `Stale` and other `TableError`s interrupt it.
    """
    parts = await partitions_of(cast(Kafka, kafka), topic)
    settings = await _settings(kafka, topic)
    policy = {word.strip() for word in settings["cleanup.policy"].split(",")}
    if "compact" not in policy or (policy != {"compact"} and not may_expire):
        advice = "" if "compact" not in policy else ", or say may_expire=True if keys may go when they are old"
        raise NotCompacted(
            f"{topic} has cleanup.policy={settings['cleanup.policy']}: a key that does not change for retention.ms "
            f"({settings['retention.ms']}) is deleted; set it to compact with incremental_alter_configs{advice}"
        )
    options: dict[str, Any] = {"auto_offset_reset": "none", "isolation_level": "read_committed"}
    async with consumer(kafka, fetch_max_wait_ms=100, **options) as reading:
        reading.assign(parts)
        begins = await reading.beginning_offsets(parts)
        gone = {part.partition: offset for part, offset in begins.items() if offset > 0}
        if gone and not may_expire:
            raise Truncated(
                f"{topic} begins at {gone} (partition: offset) and not at 0: what was before was deleted, also keys "
                "that have not changed since. Publish the whole state to a new topic, from where it comes from"
            )
        ends = await reading.end_offsets(parts)
        for part, offset in begins.items():
            reading.seek(part, offset)
        table = StateTable(topic, reading, key, value, begins, ends, float(settings["delete.retention.ms"]))
        async with beside(table._follow()) as task:
            # After the block was interrupted, so that its error is the task's, and not one that comes of it.
            task.add_done_callback(table._ended)
            yield table


__all__ = [
    "Aside", "NotCompacted", "NotReady", "Stale", "StateTable", "TableError", "Truncated", "Unreadable", "state_table",
]  # fmt: skip
