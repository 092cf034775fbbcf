"""How far a consumer group of Kafka is behind: now, or over time.

The end offset minus the committed one, as `kafka-consumer-groups --describe` says it, and right where that
tool is not. Asks the brokers only: joins no group, commits nothing, creates no topic.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.offset import OffsetRequest

from .brokers import BrokerError, Kafka
from .sampling import age, curve, sampling
from .topics import consumer, described

if TYPE_CHECKING:
    import pandas

Isolation = Literal["read_uncommitted", "read_committed"]
Reset = Literal["earliest", "latest"]

LATEST, EARLIEST = -1, -2  # ListOffsets' timestamps for the end and the start of the log
METADATA_SECONDS = 1.0  # how old the knowledge of partitions and leaders may be while sampling
HISTORY = 10_000  # end offsets kept for each partition, to tell lag in seconds
MOVED = {3, 5, 6, 9, 13, 74, 75, 76}  # errors that fresh metadata may heal: leader or topic moved, or not yet there
COORDINATOR_MOVED = tuple(map(for_code, (14, 15, 16)))  # it is loading, not there yet, or elsewhere
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class PartitionLag:
    """One partition of a group. What cannot be known is None, never 0; `note` says why."""

    topic: str
    partition: int
    committed: int | None
    """The next offset that the group would read; None without a commit."""
    start: int | None
    """The first offset of the log."""
    end: int | None
    """The next offset to be written; with `read_committed` the last stable offset."""
    lag: int | None
    """Offsets from the commit to the end, never negative. Compaction and transactions leave gaps, so there may be fewer
    records: `LagMonitor.records` counts those."""
    seconds: float | None
    """How long ago the first unread offset was written, 0 when nothing is unread; None when sampling began later."""
    note: str = ""
    """"", "no commit", "expired" (retention deleted what was unread), "beyond the end", "no such partition", "no
    leader"."""

    @property
    def place(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)


@dataclass(frozen=True)
class GroupLag:
    """All partitions of a group at one moment."""

    time: float
    """`time.monotonic()` when the end offsets were asked for."""
    partitions: tuple[PartitionLag, ...]

    @property
    def unknown(self) -> list[PartitionLag]:
        """The partitions whose lag nobody can tell."""
        return [part for part in self.partitions if part.lag is None]

    @property
    def known(self) -> int:
        """The sum over the partitions whose lag is known."""
        return sum(part.lag or 0 for part in self.partitions)

    @property
    def total(self) -> int | None:
        """The sum over all partitions; None when that of one is unknown, or when there is no partition."""
        return self.known if self.partitions and not self.unknown else None

    @property
    def seconds(self) -> float | None:
        """The longest of the partitions' lags in seconds; None when one is unknown."""
        known = [part.seconds for part in self.partitions if part.seconds is not None]
        return max(known) if known and len(known) == len(self.partitions) else None

    def __str__(self) -> str:
        text = f"lag {self.known} in {len(self.partitions) - len(self.unknown)} partitions"
        without = ", ".join(f"{part.topic}-{part.partition} ({part.note})" for part in self.unknown)
        return text + (f"; unknown for {without}" if without else "")


def judge(committed: int | None, start: int, end: int, high: int, reset: Reset | None) -> tuple[int | None, str]:
    """Lag and note of a partition whose log reaches from `start` to `end`; `high` is the end without transactions.

    Where the group has no valid position, its `auto_offset_reset` decides where it would begin; without that the lag is
    unknown, except after retention: there the log's start is the least that it must read.
    """
    if committed is not None and start <= committed <= high:
        return max(end - committed, 0), ""
    note = "no commit" if committed is None else "expired" if committed < start else "beyond the end"
    if reset == "latest":
        return 0, note
    if reset == "earliest" or note == "expired":
        return end - start, note
    return None, note


class LagMonitor:
    """The lag of one consumer group. `async with LagMonitor(...) as monitor: snapshot = await monitor.sample()`.

    It covers the partitions that the group has committed, and all partitions of `topics`. `isolation` says which end
    counts: with `read_committed` the last stable offset. `reset` is the group's `auto_offset_reset`, if it is known.
    """

    def __init__(
        self, kafka: Kafka, group: str, *topics: str, isolation: Isolation = "read_uncommitted",
        reset: Reset | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not group:
            raise ValueError(f"group is the name of a consumer group, not {group!r}")
        if isolation not in ("read_uncommitted", "read_committed"):
            raise ValueError(f"isolation is read_uncommitted or read_committed, not {isolation!r}")
        if reset not in (None, "earliest", "latest"):
            raise ValueError(f"reset is earliest, latest or None, not {reset!r}")
        self.group, self.samples = group, list[GroupLag]()
        self.missed = 0
        """Samples that the broker did not answer."""
        self._kafka, self._topics, self._isolation, self._reset, self._clock = kafka, topics, isolation, reset, clock
        self._admin = AIOKafkaAdminClient(**kafka.client, request_timeout_ms=int(PATIENCE_SECONDS * 1000))
        self._coordinator: int | None = None
        self._leaders: dict[str, dict[int, int]] = {}
        self._fresh_until = 0.0
        self._ends: dict[TopicPartition, deque[tuple[float, int]]] = defaultdict(lambda: deque(maxlen=HISTORY))

    async def __aenter__(self) -> Self:
        try:
            await self._admin.start()  # bounded for each address by the client's request timeout
        except KafkaError as error:
            await self._admin.close()
            raise self._unknown(error) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._admin.close()

    async def sample(self) -> GroupLag:
        """The lag now; also kept in `samples`. Raises `BrokerError` when the brokers do not answer."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                snapshot = await self._sample()
        except (KafkaError, TimeoutError) as error:
            self._coordinator, self._fresh_until = None, float("-inf")
            self._admin._client.force_metadata_update()  # else a node that is frozen stays among those to be asked
            raise self._unknown(error) from error
        self.samples.append(snapshot)
        return snapshot

    def _unknown(self, error: Exception) -> BrokerError:
        return BrokerError(f"the lag of group {self.group!r} is unknown: {str(error) or 'no answer in time'}")

    async def _sample(self) -> GroupLag:
        # Commits first: what is written or committed in between can then only make the lag larger, never negative.
        committed = await self._committed()
        topics = {*self._topics, *(part.topic for part in committed)}
        now = self._clock()
        if now > self._fresh_until or not topics <= self._leaders.keys():
            await self._learn(topics)
        starts, ends = await self._offsets(topics, EARLIEST), await self._offsets(topics, LATEST)
        if any(code in MOVED for code, _ in [*starts.values(), *ends.values()]) or committed.keys() - ends.keys():
            await self._learn(topics)
            starts, ends = await self._offsets(topics, EARLIEST), await self._offsets(topics, LATEST)
        high = ends
        if any(at > ends.get(part, (0, at))[1] for part, at in committed.items()):  # beyond the last stable offset?
            high = await self._offsets(topics, LATEST, "read_uncommitted")
        for gone in self._ends.keys() - ends.keys():
            del self._ends[gone]
        return GroupLag(now, tuple(
            self._judge(part, committed.get(part), [starts.get(part), ends.get(part), high.get(part)], now)
            for part in sorted({*ends, *committed})
        ))  # fmt: skip

    def _judge(self, part: TopicPartition, at: int | None, log: list[Any], now: float) -> PartitionLag:
        """One partition, from its commit, and from error code and offset of its start, its end, its high watermark."""
        if None in log or any(code for code, _ in log):
            note = "no such partition" if None in log else "no leader"
            return PartitionLag(part.topic, part.partition, at, None, None, None, None, note)
        start, end, high = (offset for _, offset in log)
        history = self._ends[part]
        if history and end < history[-1][1]:
            history.clear()  # another topic of the same name
        if len(history) > 1 and history[-1][1] == history[-2][1] == end:
            history.pop()
        history.append((now, end))
        lag, note = judge(at, start, end, high, self._reset)
        seconds = None if lag is None else 0.0 if lag == 0 else age(history, end - lag, now)
        return PartitionLag(part.topic, part.partition, at, start, end, lag, seconds, note)

    async def _committed(self) -> dict[TopicPartition, int]:
        while True:
            try:
                if self._coordinator is None:
                    self._coordinator = await self._admin.find_coordinator(self.group)
                answer = await self._admin._send_request(OffsetFetchRequest(self.group, None), self._coordinator)
                for code in {answer.error_code, *(code for _, parts in answer.topics for *_, code in parts)} - {0}:
                    raise for_code(code)
                return {TopicPartition(topic, part): offset for topic, parts in answer.topics
                        for part, offset, *_ in parts if offset >= 0}  # fmt: skip
            except COORDINATOR_MOVED:  # also on a broker to which no group ever came
                self._coordinator = None
                await asyncio.sleep(0.05)

    async def _learn(self, topics: set[str]) -> None:
        """Which partitions there are, and who leads them (-1: nobody)."""
        known = await described(self._admin, sorted(topics)) if topics else []
        self._leaders = {each["topic"]: {p["partition"]: p["leader"] for p in each["partitions"]} for each in known}
        self._fresh_until = self._clock() + METADATA_SECONDS

    async def _offsets(
        self, topics: set[str], which: int, isolation: Isolation | None = None
    ) -> dict[TopicPartition, tuple[int, int]]:
        """Error code and offset of each partition of the topics."""
        level = int((isolation or self._isolation) == "read_committed")
        asked: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        found = {TopicPartition(topic, part): (5, -1) for topic in topics for part in self._leaders[topic]}
        for topic in topics:
            for part, leader in self._leaders[topic].items():
                if leader >= 0:
                    asked[leader][topic].append((part, which))
        send = self._admin._send_request  # aiokafka 0.14 has no public ListOffsets
        requests = [send(OffsetRequest(-1, level, list(parts.items())), leader) for leader, parts in asked.items()]
        for answer in await asyncio.gather(*requests):
            for topic, parts in answer.topics:
                for part, code, _, offset in parts:
                    found[TopicPartition(topic, part)] = (code, offset)
        return found

    async def records(self, within: float = 10.0) -> dict[TopicPartition, int]:
        """How many records each partition with a known lag holds between the position and the end, by reading them.

        The lag counts offsets; transactions' markers, aborted records (with `read_committed`) and what compaction
        removed are offsets without a record. Raises `TimeoutError` when reading takes longer than `within` seconds.
        """
        known = [part for part in (await self.sample()).partitions if part.lag is not None and part.end is not None]
        counts = {part.place: 0 for part in known}
        behind = {part.place: (part.end - part.lag, part.end) for part in known if part.lag}  # type: ignore[operator]
        if not behind:
            return counts
        async with consumer(self._kafka, isolation_level=self._isolation) as reader, asyncio.timeout(within):
            reader.assign(list(behind))
            for part, (begin, _) in behind.items():
                reader.seek(part, begin)
            while any([await reader.position(part) < end for part, (_, end) in behind.items()]):
                for part, several in (await reader.getmany(timeout_ms=100)).items():
                    counts[part] += sum(record.offset < behind[part][1] for record in several)
        return counts

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds since the first sample, and the total lag (NaN where it is unknown), for a figure."""
        return curve([(each.time, each.total) for each in self.samples])

    def frame(self) -> pandas.DataFrame:
        """One row a sample and partition: `time` in seconds since the first sample, then what `PartitionLag` has."""
        import pandas

        first = self.samples[0].time if self.samples else 0.0
        columns = ["time", *PartitionLag.__dataclass_fields__]
        rows = ((each.time - first, *vars(part).values()) for each in self.samples for part in each.partitions)
        types = {"time": "float64", "partition": "int64", "seconds": "float64"}
        types |= dict.fromkeys(("committed", "start", "end", "lag"), "Int64")
        return pandas.DataFrame(rows, columns=columns).astype(types)


async def group_lag(kafka: Kafka, group: str, *topics: str, **options: Any) -> GroupLag:
    """The lag of a group now, once. Arguments and errors as of `LagMonitor`."""
    async with LagMonitor(kafka, group, *topics, **options) as monitor:
        return await monitor.sample()


@contextlib.asynccontextmanager
async def monitor_lag(
    kafka: Kafka, group: str, *topics: str, every: float = 0.2, **options: Any
) -> AsyncIterator[LagMonitor]:
    """A `LagMonitor` that samples every `every` seconds during the block, first when it begins, last when it ends.

    A moment at which the brokers do not answer makes no sample: `missed` counts those. Raises `BrokerError` when there
    is no answer to the first.
    """
    async with LagMonitor(kafka, group, *topics, **options) as monitor, sampling(monitor, every):
        yield monitor
