"""Streams put together by event time: with a table, with each other, several events into one, several inputs into one.

Times and watermarks are those of `windows`, and so is the way to use it: hand over each event, then `advance` to the
watermark of all inputs (one `Watermark` for both sides), which hands over what is settled and forgets what no event
needs any more. So memory holds what the watermark has not passed. Inputs that are joined by key must have the same
number of partitions and the same partitioner. Nothing here talks to a broker.

After Kafka Streams' documentation: Joining; Confluent patterns: Event Joiner, Wait for N Events, Event Stream Merger.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from .windows import Late, checked

T = TypeVar("T")
Side = Literal["left", "right"]


class TooOld(LookupError):
    """A question about a time before the table's watermark: what held then may be forgotten."""


class Table(Generic[T]):
    """The values of a changelog by key, each from its time on: a stream's event is joined with what held *then*.

    Versions may come in any order down to the watermark; of two with one key and time the later call counts. None is a
    tombstone. The topic must still have the versions: compaction leaves the last one only.
    """

    def __init__(self) -> None:
        self.watermark = 0
        self._versions: dict[Hashable, list[tuple[int, T | None]]] = {}
        self._changes: list[tuple[int, int, Any]] = []
        self._numbers = count()

    def __len__(self) -> int:
        """Versions that are kept, tombstones among them."""
        return sum(map(len, self._versions.values()))

    def put(self, key: Hashable, time: int, value: T | None) -> Late | None:
        """From `time` on, until its next version, the key has this value. One from before the watermark is `Late`, and
        not taken: a newer one may be forgotten. Raises `ValueError` for what is no time."""
        if checked(time) < self.watermark:
            return Late(key, time, value)
        versions = self._versions.setdefault(key, [])
        at = bisect_left(versions, time, key=lambda version: version[0])
        replaced = versions[at : at + 1] if at < len(versions) and versions[at][0] == time else []
        versions[at : at + len(replaced)] = [(time, value)]
        heapq.heappush(self._changes, (time, next(self._numbers), key))
        return None

    def get(self, key: Hashable, time: int) -> T | None:
        """What the key had at that time; None if there was nothing, or a tombstone. Raises `TooOld`, and `ValueError`
        for what is no time."""
        if checked(time) < self.watermark:
            raise TooOld(f"{key!r} at {time}: versions are kept from {self.watermark} on; the event is late")
        versions = self._versions.get(key, [])
        at = bisect_right(versions, time, key=lambda version: version[0])
        return versions[at - 1][1] if at else None

    def advance(self, watermark: int) -> None:
        """Forgets the versions that were replaced at the watermark or before."""
        self.watermark = max(self.watermark, watermark)
        while self._changes and self._changes[0][0] <= self.watermark:
            key = heapq.heappop(self._changes)[-1]
            versions = self._versions.get(key, [])
            first = max(bisect_right(versions, self.watermark, key=lambda version: version[0]) - 1, 0)
            del versions[:first]
            if len(versions) == 1 and versions[0][0] <= self.watermark and versions[0][1] is None:
                self._versions.pop(key)


class Pair(NamedTuple):
    """Two events of one key, close enough to each other; its time is the later one's."""

    key: Any
    time: int
    left: Any
    right: Any


class Unmatched(NamedTuple):
    """An event that no longer finds a partner; it had none."""

    side: Side
    key: Any
    time: int
    value: Any


@dataclass
class _Held:
    time: int
    value: Any
    matched: bool = False


class Join:
    """Two streams: every two events of one key, at most `within` apart, are a `Pair`, in whichever order they come.

    Those behind the watermark by more than `grace` are `Late`, and joined with nothing. Raises `ValueError` when one of
    both is negative.
    """

    def __init__(self, within: int, grace: int = 0) -> None:
        if within < 0 or grace < 0:
            raise ValueError(f"within and grace are 0 or more; these are {within} and {grace}")
        self.watermark = 0
        self._within, self._grace = within, grace
        self._held: dict[tuple[Side, Hashable], list[_Held]] = {}
        self._due: list[tuple[int, int, Side, Any]] = []
        self._numbers = count()

    @property
    def held(self) -> int:
        """Events that still wait for others."""
        return len(self._due)

    def left(self, key: Hashable, time: int, value: Any) -> list[Pair | Late]:
        """Takes an event of the left stream: the pairs it makes, or `Late`. Raises `ValueError` for what is no time."""
        return self._add("left", "right", key, _Held(checked(time), value))

    def right(self, key: Hashable, time: int, value: Any) -> list[Pair | Late]:
        """The same for the right stream."""
        return self._add("right", "left", key, _Held(checked(time), value))

    def _add(self, side: Side, other: Side, key: Hashable, event: _Held) -> list[Pair | Late]:
        if event.time + self._grace < self.watermark:
            return [Late(key, event.time, event.value)]
        insort(self._held.setdefault((side, key), []), event, key=lambda held: held.time)
        heapq.heappush(self._due, (event.time, next(self._numbers), side, key))
        others = self._held.get((other, key), [])
        first = bisect_left(others, event.time - self._within, key=lambda held: held.time)
        last = bisect_right(others, event.time + self._within, key=lambda held: held.time)
        pairs = list[Pair | Late]()
        for held in others[first:last]:
            event.matched = held.matched = True
            values = (event.value, held.value) if side == "left" else (held.value, event.value)
            pairs.append(Pair(key, max(event.time, held.time), *values))
        return pairs

    def advance(self, watermark: int) -> list[Unmatched]:
        """Forgets the events that nothing can be paired with any more, and gives those that never were, by time."""
        self.watermark, out = max(self.watermark, watermark), []
        while self._due and self._due[0][0] + self._within + self._grace < self.watermark:
            _, _, side, key = heapq.heappop(self._due)
            held = self._held[side, key].pop(0)
            if not held.matched:
                out.append(Unmatched(side, key, held.time, held.value))
            if not self._held[side, key]:
                del self._held[side, key]
        return out


class Complete(NamedTuple):
    """All the events of a key, by name."""

    key: Any
    events: dict[str, Any]


class Incomplete(NamedTuple):
    """Events whose others did not come in time."""

    key: Any
    events: dict[str, Any]
    missing: set[str]


@dataclass
class _Group:
    outcome: Literal["open", "complete", "given up"] = "open"
    events: dict[str, Any] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)


class AllOf:
    """Waits until each of the `names` has come for a key, in whichever order, and says so once.

    A group is given up when the watermark has passed its first event by `within`. A group that is out is remembered
    until copies of its events would be late themselves, so none of them fires again; a key cannot begin anew before.
    Raises `ValueError` without a name, or for a negative `within`.
    """

    def __init__(self, names: Iterable[str], within: int) -> None:
        self.names, self._within = frozenset(names), within
        if not self.names or within < 0:
            raise ValueError(f"wait for at least one name, 0 or longer; these are {set(self.names)} and {within}")
        self.watermark = self.duplicates = 0
        self._groups: dict[Hashable, _Group] = {}
        self._due: list[tuple[int, int, Any]] = []
        self._numbers = count()

    @property
    def held(self) -> int:
        """Groups that are remembered, open ones and others."""
        return len(self._groups)

    def add(self, key: Hashable, name: str, time: int, value: Any = None) -> Complete | Late | None:
        """Takes an event: `Complete` for the last one of its group, `Late` for one of a group that was given up, or
        would be at once. Copies are counted. Raises `ValueError` for another name, and for what is no time."""
        if name not in self.names:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(self.names))}")
        if checked(time) + self._within < self.watermark:
            return Late(key, time, value)
        group = self._groups.setdefault(key, _Group())
        group.times.append(time)
        heapq.heappush(self._due, (time + self._within, next(self._numbers), key))
        if name in group.events:
            self.duplicates += 1
            return None
        if group.outcome == "given up":
            return Late(key, time, value)
        group.events[name] = value
        if group.events.keys() < self.names:
            return None
        group.outcome = "complete"
        return Complete(key, dict(group.events))

    def advance(self, watermark: int) -> list[Incomplete]:
        """Gives the groups that are given up, by the time of their first event; forgets what it may."""
        self.watermark, out = max(self.watermark, watermark), []
        while self._due and self._due[0][0] < self.watermark:
            key = heapq.heappop(self._due)[-1]
            group = self._groups[key]
            if group.outcome == "open":
                group.outcome = "given up"
                out.append(Incomplete(key, dict(group.events), set(self.names - group.events.keys())))
            group.times.remove(min(group.times))
            if not group.times:
                del self._groups[key]
        return out


class Merge(Generic[T]):
    """Several inputs become one, in the order of time; those of one time come as they were added.

    What is older than something that is out already is `Late`: it would be out of order.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._numbers, self._last = count(), 0

    def __len__(self) -> int:
        """Those that wait."""
        return len(self._heap)

    def add(self, time: int, item: T) -> Late | None:
        """Takes what an input has next. Raises `ValueError` for what is no time."""
        if checked(time) < self._last:
            return Late(None, time, item)
        heapq.heappush(self._heap, (time, next(self._numbers), item))
        return None

    def advance(self, watermark: int) -> list[tuple[int, T]]:
        """What is not after the watermark, with its times, in order."""
        out = []
        while self._heap and self._heap[0][0] <= watermark:
            self._last, _, item = heapq.heappop(self._heap)
            out.append((self._last, item))
        return out
