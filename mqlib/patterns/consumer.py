"""A consumer that handles first and commits afterwards: at least once, in order, through rebalances and failures.

Only the contiguous prefix of handled records is committed, so a record that failed is never jumped over. While handlers
are busy it goes on polling, so a slow handler does not cost it its place in the group (KIP-62).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from ..brokers.base import Connectable
from ..topics import consumer, poll, producer
from ..waiting import beside

Handler = Callable[[ConsumerRecord], Awaitable[None]]
POLL_SECONDS = 0.1
COMMIT_SECONDS = 5.0


@dataclass
class Report:
    """What happened, in counts of records unless it says otherwise."""

    handled: int = 0
    """Handlers that finished; a record that is delivered again counts again."""
    failed: int = 0
    """Attempts that raised."""
    dead_lettered: int = 0
    dropped: int = 0
    """Fetched, and given up unhandled because their partition was revoked; whoever has it now gets them."""
    revoked: int = 0
    """Partitions that were taken away, politely: what was handled had been committed."""
    lost: int = 0
    """Partitions that were taken away without notice: what was handled and not yet committed is delivered again."""
    committed: dict[TopicPartition, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ("handled", "failed", "dead_lettered", "dropped", "revoked", "lost")
        return ", ".join(f"{name.replace('_', '-')} {getattr(self, name)}" for name in counts)


class HandlerFailed(Exception):
    """A record failed for the last time, and there is no dead-letter topic. It is not committed."""


class _Partition:
    """Records of one partition between fetch and commit."""

    def __init__(self, position: int) -> None:
        self.open: deque[list[int]] = deque()  # [offset, 1 when done], in the order of the log
        self.position = position  # the fetch position: beyond the last record and the transaction markers behind it
        self.committed = position  # where this assignment began
        self.closed = self.lost = False
        self.lanes: dict[Any, deque[tuple[ConsumerRecord, list[int]]]] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def committable(self) -> int:
        """The first offset that is not handled."""
        while self.open and self.open[0][1]:
            self.open.popleft()
        return self.open[0][0] if self.open else self.position


@dataclass(frozen=True)
class Policy:
    """How a consumer treats its records; times in seconds."""

    by: Literal["partition", "key"] = "partition"
    """What stays in order: all records of a partition, or those with the same key (more run at once)."""
    concurrency: int = 16
    """Handlers that run at once."""
    attempts: int = 1
    """How often a record is tried, the first time included."""
    backoff: float = 0.1
    """Before the second attempt; doubled before each further one. The rest of its lane waits."""
    dead_letters: str | None = None
    """The topic for records that failed at every attempt. Without one, such a record ends the run."""
    commit_every: float = 1.0
    drain: float = 5.0
    """How long running handlers may take to finish when a partition is revoked, or at the end."""
    max_buffered: int = 2000
    """Offsets of one partition between the first that is not handled and the last that is fetched; beyond it the
    partition is paused."""


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of a consumer group that is at work; made by `consume`."""

    def __init__(
        self, kafka: Connectable, topics: Collection[str], group: str, handle: Handler, policy: Policy,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report = Report()
        self.started = asyncio.Event()
        self._kafka, self._topics, self._group, self._handle, self._policy = kafka, topics, group, handle, policy
        self._options = options
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._parts: dict[TopicPartition, _Partition] = {}
        self._stopping = asyncio.Event()
        self._error: Exception | None = None
        self._rebalancing = True

    def stop(self) -> None:
        """Asks it to finish: running handlers get `drain` seconds, and what is handled is committed."""
        self._stopping.set()

    async def run(self) -> Report:
        """Works until `stop`. Raises `HandlerFailed` for a record that failed for good and has nowhere to go."""
        async with contextlib.AsyncExitStack() as stack:
            if self._policy.dead_letters:
                self._producer = await stack.enter_async_context(
                    producer(self._kafka, acks="all", enable_idempotence=True)
                )
            # A rebalance waits that long for this member, which first lets its handlers finish.
            patience = int((self._policy.drain + 5) * 1000)
            options = {"enable_auto_commit": False, "group_id": self._group, "rebalance_timeout_ms": patience}
            self._consumer = await stack.enter_async_context(consumer(self._kafka, **{**options, **self._options}))
            self._consumer.subscribe(topics=list(self._topics), listener=self)
            self.started.set()
            due = time.monotonic()
            try:
                while not self._stopping.is_set():
                    await self._poll()
                    if time.monotonic() >= due:
                        await self._commit(self._parts)
                        due = time.monotonic() + self._policy.commit_every
            finally:
                await self._close(list(self._parts))
        if self._error:
            raise self._error
        return self.report

    async def _poll(self) -> None:
        assigned = self._consumer.assignment()
        limit = self._policy.max_buffered
        held = {part for part, state in self._parts.items() if state.committable + limit <= state.position}
        self._consumer.pause(*(held & assigned))
        self._consumer.resume(*((self._consumer.paused() - held) & assigned))
        # Also when all is paused: whoever does not ask for max.poll.interval.ms is taken for dead.
        for part, records in (await poll(self._consumer, 0.01 if held else POLL_SECONDS)).items():
            for record in records:
                self._accept(part, record)
        for part in self._consumer.assignment():
            # It may be revoked in this moment, or have no position yet while the broker is gone.
            with contextlib.suppress(IllegalStateError, TimeoutError):
                async with asyncio.timeout(COMMIT_SECONDS):
                    position = await self._consumer.position(part)
                if not self._rebalancing:
                    state = self._parts.setdefault(part, _Partition(position))
                    state.position = max(state.position, position)

    def _accept(self, part: TopicPartition, record: ConsumerRecord) -> None:
        state = self._parts.setdefault(part, _Partition(record.offset))
        entry = [record.offset, 0]
        state.open.append(entry)
        key = (part, record.key) if self._policy.by == "key" and record.key is not None else (part,)
        lane = state.lanes.get(key)
        if lane is None:
            lane = state.lanes[key] = deque()
            task = asyncio.create_task(self._work(state, key, lane))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)
        lane.append((record, entry))

    async def _work(self, state: _Partition, key: Any, lane: deque[tuple[ConsumerRecord, list[int]]]) -> None:
        """Handles one lane's records in order, until there is none."""
        while lane:
            async with self._slots:
                if state.closed or self._stopping.is_set():  # perhaps only since it waits for a slot
                    return
                record, entry = lane.popleft()
                entry[1] = int(await self._handled(record, state))
                if not entry[1]:
                    return  # nothing after it in this lane
        state.lanes.pop(key, None)

    async def _handled(self, record: ConsumerRecord, state: _Partition) -> bool:
        """Whether the record is done with: handled, or dead-lettered."""
        for attempt in range(1, self._policy.attempts + 1):
            try:
                await self._handle(record)
            except Exception as error:
                self.report.failed += 1
                if attempt == self._policy.attempts:
                    return await self._bury(record, error, attempt)
                await asyncio.sleep(self._policy.backoff * 2 ** (attempt - 1))
                if state.closed or self._stopping.is_set():
                    break
            else:
                self.report.handled += 1
                return True
        return False

    async def _bury(self, record: ConsumerRecord, error: Exception, attempt: int) -> bool:
        """Stores the record in the dead-letter topic, or ends the run; returns whether it may be committed."""
        if self._policy.dead_letters:
            about = {
                "topic": record.topic, "partition": record.partition, "offset": record.offset,
                "timestamp": record.timestamp, "group": self._group, "attempts": attempt,
                "error": f"{type(error).__name__}: {error}",
            }  # fmt: skip
            headers = [(f"dead-letter-{name}", str(value).encode()) for name, value in about.items()]
            try:
                await self._producer.send_and_wait(
                    self._policy.dead_letters, key=record.key, value=record.value, headers=[*record.headers, *headers]
                )
            except KafkaError as refused:
                error = refused
            else:
                self.report.dead_lettered += 1
                return True
        if self._error is None:
            self._error = HandlerFailed(
                f"{record.topic}-{record.partition}, offset {record.offset}, attempt {attempt}: "
                f"{type(error).__name__}: {error}"
            )
            self._error.__cause__ = error
        self.stop()
        return False

    async def _commit(self, parts: Collection[TopicPartition]) -> None:
        """Commits what is handled, never backwards. An assignment that is lost is a count, not an error."""
        states = {part: state for part in parts if (state := self._parts.get(part)) and not state.lost}
        news = {part: state.committable for part, state in states.items() if state.committable > state.committed}
        if not news:
            return
        try:
            # A member that was dropped has no generation. What it commits in that state aiokafka 0.14 sends as if it
            # came from outside, and an empty group takes that, backwards, too.
            if self._consumer._coordinator.generation < 0:
                raise CommitFailedError("dropped from the group")
            async with asyncio.timeout(COMMIT_SECONDS):  # aiokafka 0.14 tries for ever while the broker is gone
                await self._consumer.commit(news)
        except TimeoutError:
            return  # unknown: at the worst these are delivered again
        except (CommitFailedError, IllegalStateError):
            for part in news:
                states[part].lost = True  # another member may have it already
            self.report.lost += len(news)
        else:
            self.report.committed |= news
            for part, offset in news.items():
                states[part].committed = offset

    async def _close(self, parts: Collection[TopicPartition]) -> None:
        """Lets running handlers of these partitions finish, commits, and forgets the rest."""
        states = [state for part in parts if (state := self._parts.get(part))]
        for state in states:
            state.closed = True
        tasks = {task for state in states for task in state.tasks}
        if tasks:
            _, slow = await asyncio.wait(tasks, timeout=self._policy.drain)
            for task in slow:
                task.cancel()
            if slow:
                await asyncio.wait(slow, timeout=1)
        await self._commit(parts)
        for part in parts:
            if state := self._parts.pop(part, None):
                self.report.dropped += sum(not done for _, done in state.open)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before these partitions may go to another member."""
        self._rebalancing = True
        lost = self.report.lost
        await self._close(revoked)
        self.report.revoked += len(revoked) - (self.report.lost - lost)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance; fetching begins at the committed offsets."""
        self._rebalancing = False


@contextlib.asynccontextmanager
async def consume(
    kafka: Connectable, topics: Collection[str], group: str, handle: Handler, policy: Policy | None = None,
    **options: Any,
) -> AsyncIterator[GroupConsumer]:  # fmt: skip
    """Runs `handle(record)` for each record of the topics, as a member of `group`, for the length of the block.

    At least once: a record is committed after its handler has finished, and after all before it. `options` go to
    `AIOKafkaConsumer`. Raises `HandlerFailed` at the end of the block when a record failed for good.
    """
    work = GroupConsumer(kafka, topics, group, handle, policy or Policy(), options)
    async with beside(work.run(), work.stop):
        await work.started.wait()
        yield work
