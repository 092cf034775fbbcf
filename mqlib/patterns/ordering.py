"""Order, where the broker gives none: gaps found by sequence number, messages put back in order, old updates refused.

A producer numbers the messages of each stream (a key, a partition, itself) from 0 on, and takes a higher epoch when it
starts numbering anew. Nothing here talks to a broker. To retry without overtaking see `parking`; to handle keys side by
side see `consumer`. After Hohpe and Woolf, "Enterprise Integration Patterns": Resequencer, and Kleppmann, "Designing
Data-Intensive Applications", chapter 8: fencing tokens.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

T = TypeVar("T")
First = int | Callable[[Any], tuple[int, int]] | None
Kind = Literal["next", "ahead", "reordered", "late", "duplicate", "fenced"]


@dataclass
class Counts:
    """What came in one stream, in messages; `missing` and `restarts` did not come."""

    received: int = 0
    reordered: int = 0
    """Came after a higher number, while they were still waited for."""
    duplicate: int = 0
    missing: int = 0
    """Waited for in vain. Those that came after all are `late`: the others are lost, or still on their way."""
    late: int = 0
    fenced: int = 0
    """From an older epoch than one that was seen."""
    restarts: int = 0
    """New epochs."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in asdict(self).items())


class Missing(NamedTuple):
    """Numbers of a stream that are no longer waited for."""

    stream: Hashable
    epoch: int
    numbers: range


class _Gaps:
    """Ranges of numbers in order, none of which touch."""

    def __init__(self) -> None:
        self.ranges: list[range] = []

    def take(self, number: int) -> bool:
        """Takes the number out; says whether it was in."""
        at = bisect_right(self.ranges, number, key=lambda gap: gap.start) - 1
        if at < 0 or number not in self.ranges[at]:
            return False
        gap = self.ranges[at]
        self.ranges[at : at + 1] = [part for part in (range(gap.start, number), range(number + 1, gap.stop)) if part]
        return True

    def cut(self, whole: range) -> list[range]:
        """Takes out, and returns, all that lies within `whole`."""
        low, high = (bisect_right(self.ranges, at - 1, key=lambda gap: gap.start) for at in (whole.start, whole.stop))
        found, self.ranges[low:high] = self.ranges[low:high], []
        return found

    def add(self, gap: range) -> None:
        """Puts numbers in, of which none is in yet."""
        insort(self.ranges, gap, key=lambda gap: gap.start)


class _Stream:
    def __init__(self, epoch: int, first: int) -> None:
        self.epoch, self.next = epoch, first
        self.open, self.missing = _Gaps(), _Gaps()

    @property
    def horizon(self) -> tuple[int, int]:
        """Epoch and number of the first that may still come in time."""
        return self.epoch, self.open.ranges[0].start if self.open.ranges else self.next


class GapDetector:
    """Tells of each number whether it is the next of its stream, or what is wrong with it.

    A number that is skipped is waited for `patience` seconds of `clock`; then it is missing, and late if it comes after
    all. `first` is the first number of a stream; None takes the first that comes, and calls lower ones late. For a
    consumer that starts again it is a function that gives the stored `horizon` of a stream, or (0, 0). A higher epoch
    begins the stream anew: what the old one lacks is missing, and what still comes from it is fenced. It keeps a few
    numbers for each stream, and two for each gap that never closed.
    """

    def __init__(
        self, patience: float = math.inf, first: First = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not patience > 0:
            raise ValueError(f"patience is a time in seconds above 0, not {patience}")
        self.counts: dict[Hashable, Counts] = {}
        self._patience, self._first, self._clock = patience, first, clock
        self._streams: dict[Hashable, _Stream] = {}
        self._opened: deque[tuple[float, Missing]] = deque()  # gaps as they were when they opened, in order of time
        self._news: list[Missing] = []

    def see(self, number: int, stream: Hashable = "", epoch: int = 0) -> Kind:
        """Takes note of a message. `next`: it is the one that was expected; `ahead`: some before it have not come yet.

        `reordered`: it closes (a part of) a gap in time; `late`: after that was called missing; `duplicate`: it has
        come before; `fenced`: a newer epoch has begun. Raises `ValueError` for a number below 0.
        """
        if number < 0:
            raise ValueError(f"sequence numbers start at 0, and this is {number} of stream {stream!r}")
        counts = self.counts.setdefault(stream, Counts())
        counts.received += 1
        state = self._streams.get(stream)
        if state is None:
            state = _Stream(*self._first(stream)) if callable(self._first) else self._begin(epoch, number)
        elif epoch > state.epoch:
            self.give_up(stream, range(state.next))
        if epoch > state.epoch:
            counts.restarts += 1
            state = self._begin(epoch, number)
        self._streams[stream] = state
        if epoch < state.epoch:
            counts.fenced += 1
            return "fenced"
        if number >= state.next:
            kind: Kind = "next" if number == state.horizon[1] else "ahead"
            if gap := range(state.next, number):
                state.open.add(gap)
                if self._patience < math.inf:
                    self._opened.append((self._clock(), Missing(stream, epoch, gap)))
            state.next = number + 1
            return kind
        if state.open.take(number):
            counts.reordered += 1
            return "reordered"
        if state.missing.take(number):
            counts.late += 1
            return "late"
        counts.duplicate += 1
        return "duplicate"

    def _begin(self, epoch: int, number: int) -> _Stream:
        if self._first is not None:
            return _Stream(epoch, 0 if callable(self._first) else self._first)
        state = _Stream(epoch, number)
        state.missing.add(range(number))
        return state

    def gaps(self, stream: Hashable = "") -> list[range]:
        """The numbers that are still waited for."""
        return list(self._streams[stream].open.ranges) if stream in self._streams else []

    def horizon(self, stream: Hashable = "") -> tuple[int, int]:
        """Epoch and number of the first that is waited for: all before it has come, or is missing."""
        return self._streams[stream].horizon if stream in self._streams else (0, 0)

    def give_up(self, stream: Hashable, numbers: range | None = None) -> None:
        """Stops waiting for the first gap of the stream, or for all gaps within `numbers`; `expired` tells of it."""
        state = self._streams[stream]
        gone = state.open.cut(state.open.ranges[0] if numbers is None and state.open.ranges else numbers or range(0))
        for gap in gone:
            state.missing.add(gap)
            self.counts[stream].missing += len(gap)
            self._news.append(Missing(stream, state.epoch, gap))

    def expired(self) -> list[Missing]:
        """What became missing since the last call."""
        limit = self._clock() - self._patience
        while self._opened and self._opened[0][0] <= limit:
            _, (stream, epoch, gap) = self._opened.popleft()
            if self._streams[stream].epoch == epoch:
                self.give_up(stream, gap)
        news, self._news = self._news, []
        return news


@dataclass(frozen=True)
class Released(Generic[T]):
    """What a resequencer hands on."""

    kind: Literal["in order", "missing", "late", "duplicate", "fenced"]
    stream: Hashable
    epoch: int
    number: int
    count: int = 1
    """How many numbers from `number` on; more than one only where they are missing."""
    item: T | None = None
    """None where it is missing."""


class Resequencer(Generic[T]):
    """Holds back what comes too early, until all before it has come, stream by stream.

    It holds at most `limit` messages of a stream: when there are more, it gives up the first gap at once, as it does
    `patience` seconds after a gap has opened. Everything that goes in comes out, with a word for what it is.

    What it holds is in memory: acknowledge a message when it was released and handled, not when it came, and let enough
    be under way for the buffer to fill (a prefetch above `limit`). A new connection or process needs a new one, with
    `first` as what was stored: to the old one all that is delivered again is a duplicate. `patience`, `first` and
    `clock` are `GapDetector`'s.
    """

    def __init__(
        self, patience: float, limit: int = 1000, first: First = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if limit < 1:
            raise ValueError(f"limit is how many messages of a stream may wait, at least 1, not {limit}")
        self.gaps = GapDetector(patience, first, clock)
        """What it finds wrong: `gaps.counts`."""
        self.peak = 0
        """The most messages of one stream that it has held."""
        self._limit = limit
        self._held: dict[Hashable, list[tuple[int, int, T]]] = {}

    @property
    def held(self) -> int:
        """Messages that wait, of all streams."""
        return sum(map(len, self._held.values()))

    def add(self, number: int, item: T, stream: Hashable = "", epoch: int = 0) -> list[Released[T]]:
        """Takes a message; returns what may go on now, in order, as `expired` does. Raises as `GapDetector.see`."""
        kind = self.gaps.see(number, stream, epoch)
        if kind in ("late", "duplicate", "fenced"):
            return [Released(kind, stream, epoch, number, item=item), *self.expired()]
        held = self._held.setdefault(stream, [])
        heapq.heappush(held, (epoch, number, item))
        found = self.expired(stream)
        if len(held) > self._limit:
            self.gaps.give_up(stream)
            found += self.expired(stream)
        self.peak = max(self.peak, len(held))
        return found

    def expired(self, *streams: Hashable) -> list[Released[T]]:
        """What may go on since time has passed: the gaps that are given up, and what they held back. Call it often."""
        found: list[Released[T]] = []
        for stream, epoch, gap in self.gaps.expired():
            found.append(Released("missing", stream, epoch, gap.start, len(gap)))
            streams += (stream,)
        for stream in dict.fromkeys(streams):
            held, horizon = self._held.get(stream, []), self.gaps.horizon(stream)
            while held and held[0][:2] < horizon:
                epoch, number, item = heapq.heappop(held)
                found.append(Released("in order", stream, epoch, number, item=item))
            if not held:
                self._held.pop(stream, None)
        return sorted(found, key=lambda each: (each.epoch, each.number))


class VersionGuard:
    """Lets an update of a key pass only if it is newer than the last one that passed.

    `store` has (epoch, version) by key. What it guards must change together with it: in a database both belong into one
    statement, such as `UPDATE … SET … WHERE key = ? AND (epoch, version) < (?, ?)`; see https://www.sqlite.org/rowvalue.html.
    Keep the version of what is deleted, too. An epoch is that of the writer (of a lease or a lock): with a higher one
    seen, the older writer is fenced, whatever its versions.
    """

    def __init__(self, store: MutableMapping[Any, tuple[int, int]] | None = None) -> None:
        self.store: MutableMapping[Any, tuple[int, int]] = {} if store is None else store
        self.counts = dict.fromkeys(("new", "duplicate", "stale", "fenced"), 0)

    def admit(self, key: Hashable, version: int, epoch: int = 0) -> Literal["new", "duplicate", "stale", "fenced"]:
        """`new`: apply it, it is the last one now. Else do not: the same version was there before (`duplicate`), a
        higher one was (`stale`), or its writer has been replaced (`fenced`)."""
        seen, kind = self.store.get(key), "new"
        if seen is not None:
            kind = "fenced" if epoch < seen[0] else "new" if (epoch, version) > seen else "stale"
            kind = "duplicate" if (epoch, version) == seen else kind
        if kind == "new":
            self.store[key] = epoch, version
        self.counts[kind] += 1
        return kind  # type: ignore[return-value]
