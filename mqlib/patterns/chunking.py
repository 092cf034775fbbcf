"""Message chunking: what is too large for one record goes as several, and is put together again, whole or not at all.

The parts of a message lie in one partition, in order, but others' parts may lie between them, some may be there twice,
and those of a sender that crashed are not all there. After https://developer.confluent.io/patterns/event-processing/
event-chunking/. Not for compacted topics, which keep only the last record of a key. Where the payload can be stored
elsewhere, see `claim_check`. To show all parts or none, send them in a transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from ..brokers.base import BrokerError

ID, INDEX, TOTAL, SIZE, SHA256 = "chunk-id", "chunk-index", "chunk-total", "chunk-size", "chunk-sha256"
"""The headers of a part: which message, which of how many parts; and of the whole message its bytes and its hash."""
NAMES = {ID, INDEX, TOTAL, SIZE, SHA256}
OVERHEAD = 300
"""Bytes that a waiting part takes beside its body, roughly."""
Headers = Iterable[tuple[str, bytes]]
Kind = Literal["whole", "incomplete", "remnant", "rejected"]


class Part(NamedTuple):
    """A record to send: with the same key, or to the same partition, as the others."""

    body: bytes
    headers: list[tuple[str, bytes]]


def split(data: bytes, size: int = 500_000, id: str | None = None, headers: Headers = ()) -> list[Part]:
    """The parts of a message, of `size` bytes at most, and at least one. `headers` go with each of them.

    `id` is that of a message that is sent again. `size` and the headers must fit into the topic's `max.message.bytes`
    and the producer's `max_request_size`. Raises `ValueError` for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is how many bytes a part may have, at least 1, not {size}")
    bodies = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    common = [*headers, (ID, (id or uuid.uuid4().hex).encode()), (TOTAL, b"%d" % len(bodies))]
    common += [(SIZE, b"%d" % len(data)), (SHA256, hashlib.sha256(data).hexdigest().encode())]
    return [Part(body, [*common, (INDEX, b"%d" % index)]) for index, body in enumerate(bodies)]


class ChunksUnconfirmed(BrokerError):
    """A message of which not every part is confirmed. The others may be stored: send it again with the same `id`."""

    def __init__(self, id: str, confirmed: int, total: int, error: BaseException | None) -> None:
        why = str(error) or type(error).__name__ if error else "no answer in time"
        super().__init__(f"message {id}: {confirmed} of {total} parts are confirmed ({why}). The others may be stored; "
                         "readers get nothing until all are. Send it again with this id.")  # fmt: skip
        self.id, self.confirmed, self.total = id, confirmed, total


async def send_chunks(
    producer: AIOKafkaProducer, topic: str, data: bytes, key: bytes | None = None, size: int = 500_000,
    id: str | None = None, headers: Headers = (), within: float = 30.0,
) -> str:  # fmt: skip
    """Sends a message in parts, all to the partition of the first, and returns its id when all are confirmed.

    The producer should be idempotent, so that its own retries keep order. Raises `ChunksUnconfirmed` after `within`
    seconds, or when a part is refused, such as one that is too large; `ValueError` as `split` does, and for `acks=0`.
    """
    if not producer._sender._acks:
        raise ValueError("the producer has acks=0, so nobody can know what was stored")
    id = id or uuid.uuid4().hex
    first, *others = split(data, size, id, headers)
    answers: list[asyncio.Future[Any]] = []

    async def hand_over(part: Part, partition: int | None = None) -> None:
        answers.append(await producer.send(topic, part.body, key, partition, headers=part.headers))
        answers[-1].add_done_callback(_failure)  # an error that nobody fetches goes to stderr

    try:
        async with asyncio.timeout(within):
            await hand_over(first)
            await asyncio.wait(answers)  # which, unlike a plain await, does not cancel them when the time is over
            partition = answers[0].result().partition
            for part in others:
                await hand_over(part, partition)
            await asyncio.wait(answers)
        error = next(filter(None, map(_failure, answers)), None)
    except (KafkaError, TimeoutError) as raised:
        error = raised
    if error is None:
        return id
    confirmed = sum(answer.done() and not _failure(answer) for answer in answers)
    raise ChunksUnconfirmed(id, confirmed, 1 + len(others), error) from error


def _failure(answer: asyncio.Future[Any]) -> BaseException | None:
    return asyncio.CancelledError() if answer.cancelled() else answer.exception()


@dataclass(frozen=True, eq=False)
class Assembled:
    """What came of a message, or of a record. Deal with it, then call `Assembler.done`."""

    kind: Kind
    """`whole`: here it is. `incomplete`: some parts did not come in time, or there was no room to wait for them.
    `remnant`: only its end was read, since reading began in its middle: it was done before a restart, or its beginning
    is deleted. `rejected`: it contradicts itself. Only a whole one has `data`."""
    id: str
    """Empty for a record that was no part: it passes as it is."""
    partition: TopicPartition
    offset: int
    """Of its first part, or of the record."""
    key: bytes | None
    headers: list[tuple[str, bytes]]
    """Those that came with it; not those of this module."""
    data: bytes | None = None
    missing: tuple[int, ...] = ()
    """Of one that is not whole, the parts that did not come: the first hundred."""
    reason: str = ""


class _About(NamedTuple):
    total: int
    size: int
    sha256: str


class _Group:
    """A message that is not whole yet."""

    def __init__(self, record: ConsumerRecord, about: _About, opened: float) -> None:
        self.record, self.about, self.opened = record, about, opened
        self.parts: dict[int, bytes] = {}
        self.bytes = 0


class Assembler:
    """Puts messages together from the records of any number of partitions, which must come in the order of offsets.

    A message has `patience` seconds of `clock` from its first part on. At most `max_bytes` wait: beyond that the oldest
    message is given up, and a message that is larger by itself is rejected. A part that comes twice is ignored, also
    one of the last `remember` whole messages. All that is held is in memory: commit `committable`, not the position.
    At least once: after a crash a message may come again, with the same id (see `inbox`).
    """

    def __init__(
        self, patience: float = 60.0, max_bytes: int = 64_000_000, remember: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not patience > 0 or max_bytes < 1 or remember < 0:
            raise ValueError(f"patience is above 0, max_bytes at least 1, remember at least 0; "
                             f"not {patience}, {max_bytes}, {remember}")  # fmt: skip
        self.counts: Counter[str] = Counter()
        """`part` and `duplicate` in records; and each kind of `Assembled`."""
        self.held = 0
        """Bytes that wait, with what holds them."""
        self._patience, self._max_bytes, self._remember, self._clock = patience, max_bytes, remember, clock
        self._groups: dict[tuple[TopicPartition, str], _Group] = {}  # in the order in which they were opened
        self._whole: dict[tuple[TopicPartition, str], None] = {}
        self._open: dict[Assembled, None] = {}  # handed out, and not done yet
        self._start: dict[TopicPartition, int] = {}
        self._next: dict[TopicPartition, int] = {}

    def add(self, record: ConsumerRecord) -> list[Assembled]:
        """Takes a record; returns what it completes, and what had to go to make room. A bad one is `rejected`."""
        where = TopicPartition(record.topic, record.partition)
        self._start.setdefault(where, record.offset)
        self._next[where] = record.offset + 1
        headers = dict(record.headers)
        if ID not in headers:
            return [self._hand_out("whole", "", record, data=record.value)]
        id = (headers[ID] or b"").decode(errors="backslashreplace")
        try:
            index, about = self._read(headers, record.value)
            group = self._groups.get((where, id))
            if group and group.about != about:
                raise ValueError(f"it says {about}, and the parts before it {group.about}")
        except ValueError as error:
            return [self._hand_out("rejected", id, record, reason=str(error))]
        self.counts["part"] += 1
        if (where, id) in self._whole or (group and index in group.parts):
            self.counts["duplicate"] += 1
            return []
        if group is None:
            group = self._groups[where, id] = _Group(record, about, self._clock())
        group.parts[index] = record.value
        group.bytes += len(record.value) + OVERHEAD
        self.held += len(record.value) + OVERHEAD
        found = [self._finish(where, id)] if len(group.parts) == about.total else []
        while self.held > self._max_bytes:
            found.append(self._give_up(*next(iter(self._groups)), f"more than {self._max_bytes} bytes were waiting"))
        return found

    def _read(self, headers: dict[str, bytes], body: bytes | None) -> tuple[int, _About]:
        if lacking := [name for name in sorted(NAMES) if not headers.get(name)]:
            raise ValueError(f"a part without the header {lacking[0]!r}")
        if body is None:
            raise ValueError("a part without a body")
        index, total, size = (int(headers[name]) for name in (INDEX, TOTAL, SIZE))
        about = _About(total, size, headers[SHA256].decode())
        if not 0 <= index < total <= max(size, 1) or len(body) > size:
            raise ValueError(f"part {index} of {total}, {len(body)} bytes of {size}, cannot be")
        if size + total * OVERHEAD > self._max_bytes:
            raise ValueError(f"a message of {size} bytes in {total} parts; max_bytes is {self._max_bytes}")
        return index, about

    def _finish(self, where: TopicPartition, id: str) -> Assembled:
        group = self._close(where, id)
        data = b"".join(group.parts[index] for index in range(group.about.total))
        if len(data) != group.about.size or hashlib.sha256(data).hexdigest() != group.about.sha256:
            return self._hand_out("rejected", id, group.record, reason="its parts do not make up what they say it is")
        self._whole[where, id] = None
        if len(self._whole) > self._remember:
            del self._whole[next(iter(self._whole))]
        return self._hand_out("whole", id, group.record, data=data)

    def _give_up(self, where: TopicPartition, id: str, reason: str) -> Assembled:
        group = self._close(where, id)
        missing = [index for index in range(group.about.total) if index not in group.parts]
        tail = missing == list(range(len(missing)))
        kind: Kind = "remnant" if tail and self._start[where] > 0 else "incomplete"
        return self._hand_out(kind, id, group.record, missing=tuple(missing[:100]), reason=reason)

    def _close(self, where: TopicPartition, id: str) -> _Group:
        group = self._groups.pop((where, id))
        self.held -= group.bytes
        return group

    def _hand_out(
        self, kind: Kind, id: str, record: ConsumerRecord, data: bytes | None = None, missing: tuple[int, ...] = (),
        reason: str = "",
    ) -> Assembled:  # fmt: skip
        where = TopicPartition(record.topic, record.partition)
        headers = [(name, value) for name, value in record.headers if name not in NAMES]
        made = Assembled(kind, id, where, record.offset, record.key, headers, data, missing, reason)
        self.counts[kind] += 1
        self._open[made] = None
        return made

    def expired(self) -> list[Assembled]:
        """Messages whose time is over. Ask after each poll, when what it brought is added."""
        limit, found = self._clock() - self._patience, []
        while self._groups and next(iter(self._groups.values())).opened <= limit:
            found.append(self._give_up(*next(iter(self._groups)), f"not whole after {self._patience:g} s"))
        return found

    def done(self, outcome: Assembled) -> None:
        """It is handled, or set aside, safely: it need not be read again."""
        self._open.pop(outcome, None)

    def committable(self) -> dict[TopicPartition, int]:
        """What may be committed: for each partition the first offset of what waits or is not done, else the next one.

        Whatever crashes after such a commit, its successor reads all parts of every message that was not done.
        """
        offsets = dict(self._next)
        waiting = [(where, group.record.offset) for (where, _), group in self._groups.items()]
        for where, offset in [*waiting, *((each.partition, each.offset) for each in self._open)]:
            if where in offsets:
                offsets[where] = min(offsets[where], offset)
        return offsets

    def forget(self, *partitions: TopicPartition) -> None:
        """Drops what is held of partitions that were revoked: whoever has them now reads it again."""
        for where, id in [place for place in self._groups if place[0] in partitions]:
            self._close(where, id)
        for place in [place for place in self._whole if place[0] in partitions]:
            del self._whole[place]
        for outcome in [each for each in self._open if each.partition in partitions]:
            del self._open[outcome]
        for where in partitions:
            self._start.pop(where, None)
            self._next.pop(where, None)
