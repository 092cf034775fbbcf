"""How a schedule stands in a timer topic, what is due when, and the table that the records of a topic make.

For misfires see Quartz's tutorial, lesson 4. What sends is in `firing`, who sends in `scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaProducer, ConsumerRecord

TIMER_TOPIC: dict[str, Any] = {"cleanup_policy": "compact", "message_timestamp_type": "LogAppendTime"}
"""What a timer topic needs: `await mq.topic(kafka, "timers", **TIMER_TOPIC)`. Delays count by the broker's clock."""
MISFIRES = ("all", "once", "skip")
PREFIX = "schedule-"
LOG_APPEND_TIME = 1
REMEMBERED = 10_000
"""Tombstones that a table knows of."""

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Job:
    """A message and when it is due; times in milliseconds."""

    id: bytes
    due: int
    topic: str
    value: bytes | None
    key: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    every: int | None
    misfire: str
    offset: int
    version: int
    """The offset of the user's record that it goes back to."""
    sent: bool = False
    """Acknowledged, and still to be retired."""
    suspect: bool = False
    """Refused, perhaps for a neighbour's fault: it is tried alone."""

    def record(self) -> tuple[bytes, Headers]:
        """Its value and headers in the timer topic."""
        own = {"due": self.due, "topic": self.topic, "key": self.key, "every": self.every, "misfire": self.misfire,
               "null": b"" if self.value is None else None}  # fmt: skip
        fields = [(PREFIX + name, each if isinstance(each, bytes) else str(each).encode())
                  for name, each in own.items() if each is not None]  # fmt: skip
        return self.value or b"", [*self.headers, *fields]


def parse(record: ConsumerRecord, version: int) -> Job:
    """The job of a record. Raises `ValueError`, which says where the record is and what is wrong with it."""
    own = {name[len(PREFIX) :]: value for name, value in record.headers if name.startswith(PREFIX)}
    try:
        number = {name: int(own[name]) for name in ("due", "delay", "every") if name in own}
        if ("due" in number) is ("delay" in number):
            raise ValueError("it needs either a due time or a delay, in milliseconds")
        if "delay" in number and record.timestamp_type != LOG_APPEND_TIME:
            raise ValueError("a delay counts by the broker's clock: set message.timestamp.type=LogAppendTime")
        job = Job(
            record.key, number["due"] if "due" in number else record.timestamp + number["delay"],
            own["topic"].decode(), None if "null" in own else record.value, own.get("key"),
            tuple(header for header in record.headers if not header[0].startswith(PREFIX)), number.get("every"),
            own.get("misfire", b"once").decode(), record.offset, version,
        )  # fmt: skip
        if job.value is None and job.key is None:
            raise ValueError("a message has a value, a key, or both")
        if not job.topic or (job.every is not None and job.every < 1) or job.misfire not in MISFIRES:
            raise ValueError(f"topic {job.topic!r}, every {job.every} ms, misfire {job.misfire!r}")
    except (KeyError, TypeError, ValueError) as error:
        what = f"no header schedule-{error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{record.topic}-{record.partition}, offset {record.offset}: {what}") from None
    return job


def version_of(record: ConsumerRecord) -> int:
    """The offset of the user's record that this one goes back to: its own, unless a scheduler wrote it."""
    of = dict(record.headers).get(PREFIX + "of")
    return int(of) if of and of.isdigit() else int(record.offset)


def plan(due: int, every: int | None, misfire: str, grace: int, now: int) -> tuple[bool, int | None, int]:
    """For a tick that is handled `now`: whether it is sent, when the next is due (None: never), how many are missed.

    All times in milliseconds. A tick later than `grace` is a misfire: `all` sends each, `once` one for all that have
    passed, `skip` none. The next one is on the grid of the first, so a recurring job does not drift.
    """
    late = now - due > grace
    if every is None:
        dropped = late and misfire == "skip"
        return not dropped, None, int(dropped)
    if not late or misfire == "all":
        return True, due + every, 0
    if misfire == "once":
        passed = (now - due) // every
        return True, due + (passed + 1) * every, passed
    missed = -((due - now + grace) // every)  # rounded up: the next is the first that is not late
    return False, due + missed * every, missed


async def schedule_message(
    producer: AIOKafkaProducer, timers: str, topic: str, value: bytes | None, due: int | None = None,
    delay: int | None = None, job: str | None = None, key: bytes | None = None, headers: Headers = (),
    every: int | None = None, misfire: str = "once",
) -> str:  # fmt: skip
    """Stores a schedule: `value` goes to `topic`, with its key and headers, when it is due. Returns the id of the job.

    `due` is in milliseconds since 1970, or `delay` in milliseconds from now, by the broker's clock. With `every` it
    recurs, in milliseconds; `misfire` is as in `plan`. A `job` that is there already is replaced: after an error, whose
    outcome is unknown, try again with the same id. Raises `ValueError` for what makes no sense, and `KafkaError`.
    """
    if any(name.startswith(PREFIX) for name, _ in headers):
        raise ValueError(f"headers that begin with {PREFIX!r} are the scheduler's own: {[name for name, _ in headers]}")
    if not all(each is None or type(each) is int for each in (due, delay, every)):
        raise ValueError(f"times are integer milliseconds: due {due!r}, delay {delay!r}, every {every!r}")
    made = Job(str(job or uuid4()).encode(), due or 0, topic, value, key, tuple(headers), every, misfire, 0, 0)
    body, fields = made.record()
    fields = [field for field in fields if due is not None or field[0] != PREFIX + "due"]
    fields += [] if delay is None else [(PREFIX + "delay", b"%d" % delay)]
    parse(ConsumerRecord(timers, 0, 0, 0, LOG_APPEND_TIME, made.id, body, None, 0, 0, tuple(fields)), 0)
    await producer.send_and_wait(timers, body, key=made.id, headers=fields)
    return made.id.decode()


async def cancel_message(producer: AIOKafkaProducer, timers: str, job: str) -> None:
    """Cancels a job by a tombstone; a message that is being sent at this moment still arrives."""
    await producer.send_and_wait(timers, None, key=job.encode())


@dataclass(frozen=True, slots=True)
class Pending:
    """What is to be written for an id: what holds, once more; or, with an `error`, that this is no schedule."""

    value: bytes | None
    headers: Headers
    version: int
    error: Exception | None = None
    written: bool = False
    """And not read yet."""


class Table:
    """What the records of one partition say: the jobs that wait, in the order in which they are due.

    A scheduler's record names the user's record that it follows. A later one of the user may have overtaken it: then it
    is stale, the user's holds, and must be written again, or compaction would keep the stale one. Until that has been
    read the job is not in the table, but `pending`.
    """

    def __init__(self) -> None:
        self.jobs: dict[bytes, Job] = {}
        self.pending: dict[bytes, Pending] = {}
        self.cancelled = 0
        """Jobs that a tombstone took out before they were due."""
        self._tombstones: dict[bytes, int] = {}  # users' own, lately, by their offsets
        self._heap: list[tuple[int, int, bytes]] = []  # due, offset, id; a job that was replaced leaves an old entry

    def apply(self, record: ConsumerRecord) -> None:
        """Takes over a record."""
        key, version = record.key, version_of(record)
        known, held = self.jobs.get(key), self.pending.get(key)
        newest = max(each.version if each else -1 for each in (known, held))
        newest = max(newest, self._tombstones.get(key, -1))
        self.jobs.pop(key, None)
        if version < newest:
            value, headers = known.record() if known else (None, [])
            self.pending[key] = held or Pending(value, headers, newest)
            return
        self.pending.pop(key, None)
        if record.value is not None:
            try:
                self.add(parse(record, version))
            except ValueError as error:
                self.pending[key] = Pending(record.value, record.headers, version, error)
        elif version == record.offset:
            self.cancelled += known is not None
            self._tombstones[key] = version
            if len(self._tombstones) > REMEMBERED:
                del self._tombstones[next(iter(self._tombstones))]

    def add(self, job: Job) -> None:
        """Puts it in, in place of one with the same id."""
        self.jobs[job.id] = job
        heappush(self._heap, (job.due, job.offset, job.id))
        if len(self._heap) > 2 * len(self.jobs) + 1000:
            self._heap = [(each.due, each.offset, each.id) for each in self.jobs.values()]
            heapify(self._heap)

    def put_back(self, job: Job) -> None:
        """Puts in what was taken out, unless it was replaced or cancelled meanwhile."""
        if not (job.id in self.jobs or job.id in self.pending) and self._tombstones.get(job.id, -1) < job.version:
            self.add(job)

    def due(self, now: int, limit: int) -> list[Job]:
        """Takes out, in order, up to `limit` jobs that are due; a suspect one by itself."""
        taken: list[Job] = []
        while self._heap and self._heap[0][0] <= now and len(taken) < limit:
            _, offset, job_id = self._heap[0]
            job = self.jobs.get(job_id)
            current = job is not None and job.offset == offset
            if job is not None and current and job.suspect and taken:
                break
            heappop(self._heap)
            if job is not None and current:
                taken.append(self.jobs.pop(job_id))
                if job.suspect:
                    break
        return taken

    @property
    def next_due(self) -> int | None:
        """When to look again, at the latest."""
        return self._heap[0][0] if self._heap else None
