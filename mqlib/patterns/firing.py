"""One partition of a timer topic at work: it sends what is due, and retires what it has sent.

At least once, message first and tombstone afterwards; or exactly once, both in a transaction (KIP-98).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition, errors
from aiokafka.errors import KafkaError

from ..brokers import BrokerError
from ..brokers.base import Connectable
from ..topics import producer
from .timers import PREFIX, Headers, Job, Pending, Table, plan

RETRY_SECONDS, LONGEST_SLEEP = 1.0, 0.25
BATCH = 500
REFUSED = (
    errors.MessageSizeTooLargeError, errors.TopicAuthorizationFailedError, errors.InvalidTopicError,
    errors.InvalidTimestampError, errors.PolicyViolationError,
    errors.UnknownError,  # so aiokafka 0.14 calls an invalid record, such as one without a key in a compacted topic
)  # fmt: skip
"""The broker's answers to a record that it will never take."""


@dataclass
class Report:
    """What happened, in counts."""

    fired: int = 0
    """Messages that the broker has acknowledged."""
    missed: int = 0
    """Ticks that were too late and, by their policy, not sent."""
    cancelled: int = 0
    """Jobs that a tombstone took out before they were due."""
    rejected: int = 0
    """Schedules that cannot be read or sent: in the dead-letter topic, or without one only counted, at every start."""
    repeated: int = 0
    """Jobs with an unknown outcome, hence tried again: without `exactly_once` each may be a duplicate."""
    error: str = ""
    """Why the last of these."""


class Owner(Protocol):
    """What a partition needs of its scheduler."""

    kafka: Connectable
    group: str
    exactly_once: bool
    dead_letters: str | None
    grace: int
    clock: Callable[[], int]
    report: Report
    topics: Collection[str]
    """Those that are known to be there."""

    def look_up(self, topic: str) -> asyncio.Task[bool]: ...
    async def end_of(self, part: TopicPartition) -> int: ...


class Shard:
    """The jobs of one partition, and the loop that sends them."""

    def __init__(self, owner: Owner, part: TopicPartition) -> None:
        self.table = Table()
        self.end: int | None = None
        """The offset up to which the log must have been read before anything is sent."""
        self.loaded, self.stopping = asyncio.Event(), False
        self._owner, self._part, self._report = owner, part, owner.report
        self._wake = asyncio.Event()
        self._pause: float | None = None  # seconds, when a new producer is needed
        self._producer: AIOKafkaProducer

    def stop(self) -> None:
        """Asks `run` to end when what is under way has ended."""
        self.stopping = True
        self._wake.set()
        self.loaded.set()

    def apply(self, record: ConsumerRecord) -> None:
        """Takes over what a record of the log says."""
        cancelled = self.table.cancelled
        self.table.apply(record)
        self._report.cancelled += self.table.cancelled - cancelled
        if (job := self.table.jobs.get(record.key)) and job.topic not in self._owner.topics:
            self._owner.look_up(job.topic)
        self._wake.set()

    def _failed(self, job: Job, error: KafkaError) -> None:
        """What was refused is tried alone, and then given up. Anything else has an unknown outcome."""
        refused = isinstance(error, REFUSED)
        if not refused or self._owner.exactly_once:  # aiokafka 0.14 leaves a gap in the numbers of what was refused
            self._pause = max(self._pause or 0.0, 0.0 if refused else RETRY_SECONDS)
        if refused and job.suspect:
            self._refuse(job, error)
        else:
            self._report.error = _words(error)
            self._report.repeated += not refused and not job.sent
            self.table.put_back(replace(job, suspect=refused))

    def _refuse(self, job: Job, error: Exception) -> None:
        self.table.pending[job.id] = Pending(*job.record(), job.version, error)
        self._wake.set()

    async def run(self) -> None:
        """Until `stop`. When a producer has failed, with a new one, once the log has told what became of all."""
        options: dict[str, Any] = {"acks": "all"}
        if self._owner.exactly_once:
            options["transactional_id"] = f"{self._owner.group}-{self._part.partition}"
        while not self.stopping:
            self.end, self._pause = None, None
            self.loaded.clear()
            try:
                async with producer(self._owner.kafka, **options) as self._producer:
                    self.end = await self._owner.end_of(self._part)
                    await self.loaded.wait()
                    async with asyncio.TaskGroup() as tasks:
                        await self._work(tasks)
            except KafkaError as error:
                self._pause, self._report.error = RETRY_SECONDS, _words(error)
            await asyncio.sleep(self._pause or 0)

    async def _work(self, tasks: asyncio.TaskGroup) -> None:
        while not self.stopping and self._pause is None:
            for job_id in [job_id for job_id, held in self.table.pending.items() if not held.written]:
                await self._settle(job_id, self.table.pending.get(job_id))
            now = self._owner.clock()
            if batch := self._due(now):
                if self._owner.exactly_once:
                    await self._together(batch, now)
                else:
                    for job in batch:  # in the order in which they are due
                        tasks.create_task(self._finish(job, now, await self._send(job, self._plan(job, now)[0])))
                continue
            self._wake.clear()
            due = self.table.next_due
            left = LONGEST_SLEEP if due is None else (due - now) / 1000
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, LONGEST_SLEEP)):
                    await self._wake.wait()

    async def _settle(self, job_id: bytes, held: Pending | None) -> None:
        """Writes what is pending for an id."""
        if held is None or self._pause is not None:
            return
        error, dead_letters = held.error, self._owner.dead_letters
        written: Pending | None = replace(held, written=True)
        try:
            async with self._producer.transaction() if self._owner.exactly_once else contextlib.nullcontext():
                if error is None:
                    await (await self._write(job_id, held.value, held.headers, held.version))
                elif dead_letters:
                    headers = [*held.headers, (PREFIX + "error", _words(error).encode())]
                    await (await self._hand_over(dead_letters, held.value, job_id, headers))
                    await (await self._write(job_id, None, [], held.version))
                else:
                    written = None
        except REFUSED as refused:  # by the dead-letter topic: it stays where it is, and is counted
            error, written, self._pause = refused, None, 0.0
        except KafkaError as failed:
            self._report.error, self._pause = _words(failed), RETRY_SECONDS
            return
        if error is not None:
            self._report.rejected, self._report.error = self._report.rejected + 1, _words(error)
        if self.table.pending.get(job_id) is held:
            self.table.pending.pop(job_id)
            if written:
                self.table.pending[job_id] = written

    def _due(self, now: int) -> list[Job]:
        """What is due, in order. A send would wait for a topic that is not there, and all behind it."""
        batch = self.table.due(now, BATCH)
        for job in batch:
            if job.topic not in self._owner.topics:
                self._owner.look_up(job.topic).add_done_callback(partial(self._looked_up, job))
        return [job for job in batch if job.topic in self._owner.topics]

    def _looked_up(self, job: Job, found: asyncio.Task[bool]) -> None:
        if found.cancelled() or found.result():
            self.table.put_back(job)
            self._wake.set()
        else:
            self._refuse(job, BrokerError(f"Kafka has no topic {job.topic!r}"))

    def _plan(self, job: Job, now: int) -> tuple[bool, int | None, int]:
        go, following, missed = plan(job.due, job.every, job.misfire, self._owner.grace, job.due if job.sent else now)
        return go and not job.sent, following, missed

    async def _hand_over(
        self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int | None = None,
        alone: bool = False,
    ) -> Awaitable[Any]:  # fmt: skip
        """As `producer.send`, but every error is raised by what is awaited then; `alone` in a batch of its own."""
        sending: Any = self._producer
        sent: Awaitable[Any]
        try:
            if not alone:
                sent = await sending.send(topic, value, key=key, partition=partition, headers=headers)
                return sent
            await sending.partitions_for(topic)
            batch = sending.create_batch()
            batch.append(key=key, value=value, timestamp=None, headers=headers)
            place = sending._partition(topic, None, key, value, key, value)
            sent = await sending.send_batch(batch, topic, partition=place)
            return sent
        except KafkaError as error:
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    async def _send(self, job: Job, go: bool) -> Awaitable[Any]:
        if not go:
            return asyncio.sleep(0)
        headers = [*job.headers, (PREFIX + "job", job.id), (PREFIX + "due", b"%d" % job.due)]
        alone = job.suspect and not self._owner.exactly_once  # there it is alone in its transaction
        return await self._hand_over(job.topic, job.value, job.key, headers, alone=alone)

    async def _write(self, job_id: bytes, value: bytes | None, headers: Headers, version: int) -> Awaitable[Any]:
        of = (PREFIX + "of", b"%d" % version)
        part = self._part
        return await self._hand_over(part.topic, value, job_id, [*headers, of], part.partition)

    async def _retire(self, job: Job, following: int | None) -> Awaitable[Any]:
        value, headers = (None, ()) if following is None else replace(job, due=following).record()
        return await self._write(job.id, value, headers, job.version)

    async def _finish(self, job: Job, now: int, sent: Awaitable[Any]) -> None:
        """At least once: it is retired when its message has been acknowledged, and not before."""
        go, following, missed = self._plan(job, now)
        try:
            await sent
            self._report.fired += go
            job = replace(job, sent=True)
            await (await self._retire(job, following))
        except KafkaError as error:
            self._failed(job, error)
        else:
            self._report.missed += missed

    async def _together(self, batch: list[Job], now: int) -> None:
        """Exactly once: the messages and what retires them, in one transaction."""
        plans = [self._plan(job, now) for job in batch]
        try:
            async with self._producer.transaction():
                answers = []
                for job, (go, following, _) in zip(batch, plans, strict=True):
                    answers += [await self._send(job, go), await self._retire(job, following)]
                for outcome in await asyncio.gather(*answers, return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
        except KafkaError as error:
            for job in batch:
                self._failed(job, error)
        else:
            self._report.fired += sum(go for go, _, _ in plans)
            self._report.missed += sum(missed for _, _, missed in plans)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
