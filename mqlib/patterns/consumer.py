"""A consumer that handles first and commits afterwards: at least once, in order, through rebalances and failures.

Only the contiguous prefix of handled records is committed, so a record that failed is never jumped over. While handlers
are busy it goes on polling, so a slow handler does not cost it its place in the group (KIP-62).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from ..brokers.base import Connectable
from ..topics import consumer, poll, producer
from ..waiting import beside

Handler = Callable[[ConsumerRecord], Awaitable[None]]
POLL_SECONDS = 0.05
TURN_SECONDS = 0.01  # of all workers together, before they let other lanes, and whatever else is in this loop, go on
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


def letter_headers(record: ConsumerRecord, group: str, attempts: int, error: str) -> list[tuple[str, bytes]]:
    """The headers of a dead letter: the record's own, and where it comes from, who gave it up, and why."""
    about = {name: getattr(record, name) for name in ("topic", "partition", "offset", "timestamp")}
    about |= {"group": group, "attempts": attempts, "error": error}
    return [*record.headers, *((f"dead-letter-{name}", str(value).encode()) for name, value in about.items())]


class HandlerFailed(Exception):
    """A record failed for the last time, and there is no dead-letter topic. It is not committed."""


class _Partition:
    """Records of one partition between fetch and commit."""

    def __init__(self) -> None:
        # By key, or all in one. A record leaves when it is done with, and its lane when that is empty.
        self.lanes: dict[Any, deque[ConsumerRecord]] = {}
        self.position = self.committed = -1  # beyond what was fetched or handled, and the transaction markers behind it
        self.closed = self.lost = False
        self.tasks: set[asyncio.Task[None]] = set()  # that have one of the lanes in hand

    @property
    def committable(self) -> int:
        """The first offset that is not handled."""
        return min((lane[0].offset for lane in self.lanes.values()), default=self.position)


@dataclass(frozen=True)
class Policy:
    """How a consumer treats its records; times in seconds."""

    by: Literal["partition", "key"] = "partition"
    """What stays in order: all records of a partition, or those with the same key or without one (more run at once)."""
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
    """Offsets of a partition from the first that is not handled to the last that is fetched; then it is paused."""


class GroupConsumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of a consumer group that is at work; made by `consume`."""

    def __init__(
        self, kafka: Connectable, topics: Collection[str], group: str, handle: Handler, policy: Policy,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report, self.started = Report(), asyncio.Event()
        self._kafka, self._topics, self._group, self._handle, self._policy = kafka, topics, group, handle, policy
        self._options = options
        self._parts: dict[TopicPartition, _Partition] = {}
        self._ready: deque[tuple[_Partition, Any]] = deque()  # lanes that wait for a worker, as partition and key
        self._workers: set[asyncio.Task[None]] = set()
        self._committing, self._stopping = asyncio.Lock(), False
        self._error: Exception | None = None

    def stop(self) -> None:
        """Asks it to finish: running handlers get `drain` seconds, and what is handled is committed."""
        self._stopping = True

    async def run(self) -> Report:
        """Works until `stop`. Raises `HandlerFailed` for a record that failed for good and has nowhere to go."""
        async with contextlib.AsyncExitStack() as stack:
            if self._policy.dead_letters:
                letters = producer(self._kafka, acks="all", enable_idempotence=True)
                self._producer = await stack.enter_async_context(letters)
            # A rebalance waits that long for this member, which first lets its handlers finish.
            patience = int((self._policy.drain + 5) * 1000)
            options = {"enable_auto_commit": False, "group_id": self._group, "rebalance_timeout_ms": patience}
            self._consumer = await stack.enter_async_context(consumer(self._kafka, **{**options, **self._options}))
            self._consumer.subscribe(topics=list(self._topics), listener=self)
            self.started.set()
            due = time.monotonic()
            try:
                while not self._stopping:
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
        full = self._policy.max_buffered
        held = {part for part, state in self._parts.items() if state.position - state.committable >= full}
        self._consumer.pause(*(held & self._consumer.assignment()))
        self._consumer.resume(*(self._consumer.paused() - held))
        # Also when all is paused: whoever does not ask for max.poll.interval.ms is taken for dead.
        for part, records in (await poll(self._consumer, 0.01 if held else POLL_SECONDS)).items():
            self._accept(self._parts.setdefault(part, _Partition()), records)
        self._workers = {task for task in self._workers if not task.done()}
        for _ in range(min(len(self._ready), self._policy.concurrency - len(self._workers))):
            self._workers.add(asyncio.create_task(self._work()))
        await asyncio.sleep(0)  # what is handled at once need not be held

    def _accept(self, state: _Partition, records: list[ConsumerRecord]) -> None:
        state.position = records[-1].offset + 1
        lanes: dict[Any, list[ConsumerRecord]] = {None: records}
        if self._policy.by == "key":
            lanes = defaultdict(list)
            for record in records:
                lanes[record.key].append(record)
        for key, more in lanes.items():
            lane = state.lanes.setdefault(key, deque())
            if not lane:
                self._ready.append((state, key))
            lane.extend(more)

    async def _work(self) -> None:
        """Works on lane after lane, a turn each, until none is ready."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        end = time.monotonic() + TURN_SECONDS / len(self._workers)
        while self._ready:
            state, key = self._ready.popleft()
            state.tasks.add(task)
            if not await self._turn(state, key, end, task):
                return
            state.tasks.discard(task)
            if state.lanes[key]:
                self._ready.append((state, key))
            else:
                del state.lanes[key]
            if time.monotonic() >= end:
                await asyncio.sleep(0)
                end = time.monotonic() + TURN_SECONDS / len(self._workers)

    async def _turn(self, state: _Partition, key: Any, end: float, task: asyncio.Task[None]) -> bool:
        """Handles records of a lane in order, one at least; returns whether the lane may go on."""
        lane, failures = state.lanes[key], 0
        while not (state.closed or self._stopping):
            try:
                await self._handle(lane[0])
            except (Exception, asyncio.CancelledError) as error:
                if task.cancelling():  # else it was not this task that was cancelled, but what the handler waited for
                    raise
                failures += 1
                self.report.failed += 1
                if failures < self._policy.attempts:
                    await asyncio.sleep(self._policy.backoff * 2 ** (failures - 1))
                    continue
                if not await self._bury(lane[0], error, failures):
                    break
            else:
                self.report.handled += 1
            failures = 0
            lane.popleft()
            if not lane or time.monotonic() >= end:
                return True
        return False

    async def _bury(self, record: ConsumerRecord, error: BaseException, attempt: int) -> bool:
        """Stores the record in the dead-letter topic, or ends the run; returns whether it may be committed."""
        if topic := self._policy.dead_letters:
            headers = letter_headers(record, self._group, attempt, f"{type(error).__name__}: {error}")
            try:
                await self._producer.send_and_wait(topic, record.value, record.key, headers=headers)
            except Exception as refused:
                error = refused
            else:
                self.report.dead_lettered += 1
                return True
        if self._error is None:
            where = f"{record.topic}-{record.partition}, offset {record.offset}, attempt {attempt}"
            self._error = HandlerFailed(f"{where}: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        self.stop()
        return False

    async def _commit(self, parts: Collection[TopicPartition]) -> None:
        """Commits what is handled, never backwards. An assignment that is lost is a count, not an error."""
        async with self._committing:  # also so that none goes on trying when the partitions have moved on
            states = {part: state for part in parts if (state := self._parts.get(part)) and not state.lost}
            for part, state in states.items():
                # It may be revoked in this moment, or have no position yet: then that is not waited for.
                with contextlib.suppress(IllegalStateError, TimeoutError):
                    async with asyncio.timeout(0):
                        state.position = max(state.position, await self._consumer.position(part))
            news = {part: at for part, state in states.items() if (at := state.committable) > state.committed}
            if not news:
                return
            try:
                # A member that was dropped has no generation. What it commits in that state aiokafka 0.14 sends as if
                # it came from outside, and an empty group takes that, backwards, too.
                if self._consumer._coordinator.generation < 0:
                    raise CommitFailedError("dropped from the group")
                async with asyncio.timeout(COMMIT_SECONDS):  # aiokafka 0.14 tries for ever while the broker is gone
                    await self._consumer.commit(news)
            except TimeoutError:
                return  # unknown: at the worst these are delivered again
            except (CommitFailedError, IllegalStateError):
                self.report.lost += len(news)
                for part in news:
                    states[part].lost = True  # another member may have it already
            else:
                self.report.committed |= news
                for part, offset in news.items():
                    states[part].committed = offset

    async def _close(self, parts: Collection[TopicPartition]) -> list[_Partition]:
        """Lets running handlers of these partitions finish, commits, and forgets the rest."""
        states = [state for part in parts if (state := self._parts.get(part))]
        for state in states:
            state.closed = True
        self._ready = deque(lane for lane in self._ready if not lane[0].closed)
        if tasks := {task for state in states for task in state.tasks}:
            _, slow = await asyncio.wait(tasks, timeout=self._policy.drain)
            for task in slow:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)
        await self._commit(parts)
        for part in parts:
            self._parts.pop(part, None)
        self.report.dropped += sum(len(lane) for state in states for lane in state.lanes.values())
        return states

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before these partitions may go to another member."""
        self.report.revoked += sum(not state.lost for state in await self._close(revoked))

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance; fetching begins at the committed offsets."""
        self._parts = {part: _Partition() for part in assigned} | self._parts


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
