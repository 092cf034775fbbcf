"""Aggregates over windows of event time: when something happened, and not when it was heard of.

Times are whole numbers from 0 on, in one unit of your choice, such as the milliseconds of Kafka's timestamps. A
watermark of w says: nothing with a time below w is expected any more. What comes behind it is late, unless it is within
the grace; late events are counted and handed back, never dropped. Nothing here talks to a broker.

After Akidau et al., "The Dataflow Model", 2015, and Kafka Streams' documentation: Windowing. A session here ends one
gap after its last event, and another one may begin at that very moment; in Kafka Streams it is a unit later.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable, Iterable, MutableMapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, Literal, NamedTuple, TypeVar

V = TypeVar("V")
A = TypeVar("A")
Clock = Callable[[], float]
Emit = Literal["close", "update"]


class Window(NamedTuple):
    """From `start` up to, and without, `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Hopping:
    """Windows of one `size`, which begin every `advance`, from 0 on; with a shorter `advance` they overlap.

    Raises `ValueError` unless 0 < advance <= size: events between two windows would count nowhere.
    """

    size: int
    advance: int

    def __post_init__(self) -> None:
        if not 0 < self.advance <= self.size:
            raise ValueError(f"windows of {self.size} every {self.advance}: it must be 0 < advance <= size")

    def assign(self, time: int) -> list[Window]:
        """The windows that the time lies in, the earliest first. Raises `ValueError` as `checked` does."""
        first = (checked(time) - self.size) // self.advance * self.advance + self.advance
        starts = range(max(first, 0), time + 1, self.advance)
        return [Window(start, start + self.size) for start in starts]


class Tumbling(Hopping):
    """Windows of one `size`, one after the other: each time lies in exactly one."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


@dataclass(frozen=True)
class Session:
    """Windows of activity: events less than `gap` apart are in the same one. Raises `ValueError` unless `gap` > 0."""

    gap: int

    def __post_init__(self) -> None:
        if self.gap <= 0:
            raise ValueError(f"the gap that ends a session is longer than 0; this is {self.gap}")

    def assign(self, time: int) -> list[Window]:
        """The session of an event alone; it is merged with those that it overlaps. Raises as `checked` does."""
        return [Window(checked(time), time + self.gap)]


def checked(time: int) -> int:
    """The time, if it is one. Raises `ValueError` for what is not a whole number from 0 on."""
    if not isinstance(time, int) or time < 0:
        why = "; -1 is Kafka's word for a record without a timestamp" if time == -1 else ""
        raise ValueError(f"an event time is a whole number from 0 on, such as milliseconds; this is {time!r}{why}")
    return time


class Watermark:
    """Up to which time the events have probably come: `lateness` behind the highest time, of the slowest input.

    `inputs` are those that are read together, such as the partitions of one task; before an input's first event the
    watermark is 0. It never goes back. An input that has nothing to say would hold it up for ever: once `at_end` was
    told of it, and nothing came for `idle` seconds of `clock`, it is left out, until its next event. While that is so
    for all of them, the one that is furthest counts. An input that is merely read slowly is never idle, for nobody says
    that it is at its end; what an idle one says later may be late.
    """

    def __init__(
        self, inputs: Iterable[Hashable], lateness: int, idle: float = 60.0, clock: Clock = time.monotonic
    ) -> None:
        self._highest: dict[Hashable, int | None] = dict.fromkeys(inputs)
        if not self._highest or lateness < 0:
            raise ValueError(f"{len(self._highest)} inputs and a lateness of {lateness}: an input, and 0 or more")
        self._lateness, self._idle, self._clock, self._time = lateness, idle, clock, 0
        self._ended: dict[Hashable, float] = {}

    def observe(self, input: Hashable, time: int) -> int:
        """Notes the time of an event, and returns the watermark. Raises `ValueError` for an unknown input."""
        highest = self._highest[self._known(input)]
        self._highest[input] = max(checked(time), highest or 0)
        self._ended.pop(input, None)
        return self.time

    def at_end(self, input: Hashable) -> int:
        """Notes that there is nothing more to read from that input now, and returns the watermark. Say it again and
        again: the first time counts, until the input's next event. Raises `ValueError` for an unknown input."""
        self._ended.setdefault(self._known(input), self._clock())
        return self.time

    @property
    def idle(self) -> set[Hashable]:
        """The inputs that are left out now."""
        now = self._clock()
        return {input for input, since in self._ended.items() if now - since >= self._idle}

    @property
    def time(self) -> int:
        """The watermark."""
        idle = self.idle
        waiting = [highest for input, highest in self._highest.items() if input not in idle]
        if not waiting:
            furthest = max((highest for highest in self._highest.values() if highest is not None), default=0)
        else:
            furthest = min(0 if highest is None else highest for highest in waiting)
        self._time = max(self._time, furthest - self._lateness)
        return self._time

    def _known(self, input: Hashable) -> Hashable:
        if input not in self._highest:
            names = ", ".join(map(str, self._highest))
            raise ValueError(f"{input!r} is none of the inputs {names}; after a rebalance make a new watermark")
        return input


class Result(NamedTuple):
    """What a window of a key holds. `final` is the only one; an `update` is replaced by the next; what was `withdrawn`
    has become part of another session, and its value is None."""

    key: Any
    window: Window
    value: Any
    kind: Literal["final", "update", "withdrawn"]


class Late(NamedTuple):
    """An event that was not counted, or not in all its windows: for a topic of its own, or a correction by hand."""

    key: Any
    time: int
    value: Any
    missed: tuple[Window, ...] = ()
    """The windows that were closed already."""


class Aggregator(Generic[V, A]):
    """An aggregate for each key and window: `add(aggregate, value)` from `zero()` on; sessions need `merge`, too.

    A window is closed when the watermark has passed its end by `grace`; for a session, an event is late when it is
    itself that far behind. With `emit="close"` a window has one `Result`, when it is closed; with "update" one for each
    event in it, and none then. What is right must not depend on the order of arrival: neither may `add` and `merge`.

    `state` keeps the open windows, `state[key] = [[start, end, aggregate], …]`: give one that outlives a crash, such as
    `stateful.Json`, with the `watermark` that was reached, and the next life goes on there. Each list is a new one, so
    the state sees every change; an `add` that changes its aggregate in place defeats that.
    """

    def __init__(
        self, windows: Hopping | Session, zero: Callable[[], A], add: Callable[[A, V], A],
        merge: Callable[[A, A], A] | None = None, grace: int = 0, emit: Emit = "close",
        state: MutableMapping[Any, Any] | None = None, watermark: int = 0,
    ) -> None:  # fmt: skip
        if isinstance(windows, Session) and merge is None:
            raise ValueError("an event may join two sessions: say how, for example merge=operator.add")
        if grace < 0 or emit not in ("close", "update"):
            raise ValueError(f"grace is 0 or more, and emit 'close' or 'update'; this is {grace}, {emit!r}")
        self.watermark = watermark
        """The highest one that `advance` was told."""
        self.on_time = self.late = 0
        """Events that counted in all their windows, and the others."""
        self.state: MutableMapping[Any, Any] = {} if state is None else state
        self._windows, self._zero, self._add, self._merge = windows, zero, add, merge
        self._grace, self._emit, self._numbers = grace, emit, count()
        self._ends: list[tuple[int, int, int, Any]] = []  # a heap; what was merged stays in it until its turn
        for key, open in self.state.items():
            for start, end, _ in open:
                self._note(key, Window(start, end))

    @property
    def open(self) -> int:
        """Windows that are kept."""
        return sum(map(len, self.state.values()))

    def add(self, key: Any, time: int, value: V) -> list[Result | Late]:
        """Takes an event: gives `Late`, if it is, and the updates. The watermark is as it was before this event.

        Raises `ValueError` as `checked` does, and whatever `add` raises; then nothing has changed.
        """
        wanted, open = self._windows.assign(time), [(Window(a, b), held) for a, b, held in self.state.get(key, ())]
        missed = tuple(window for window in wanted if self._is_closed(window, time))
        out: list[Result | Late] = [Late(key, time, value, missed)] if missed else []
        new = []
        for window in wanted:
            if window not in missed:
                window, open, gone = self._put(window, value, open)
                new.append(window)
                out += [Result(key, each, None, "withdrawn") for each in gone if self._emit == "update"]
                out += [Result(key, window, open[-1][1], "update")] * (self._emit == "update")
        if new:
            known = {(start, end) for start, end, _ in self.state.get(key, ())}
            self.state[key] = [[*window, held] for window, held in open]
            for window in new:
                if window not in known:
                    self._note(key, window)
        self.late, self.on_time = self.late + bool(missed), self.on_time + (not missed)
        return out

    def _is_closed(self, window: Window, time: int) -> bool:
        if isinstance(self._windows, Session):  # else it could join a session that has been closed
            return time + self._grace < self.watermark
        return window.end + self._grace <= self.watermark

    def _put(
        self, window: Window, value: V, open: list[tuple[Window, A]]
    ) -> tuple[Window, list[tuple[Window, A]], list[Window]]:
        """The window as it is then, all open ones with this one last, and those that are part of it now."""
        if isinstance(self._windows, Session):
            touched = [each for each in open if each[0].start < window.end and window.start < each[0].end]
        else:
            touched = [each for each in open if each[0] == window]
        window = Window(min([window.start, *(at.start for at, _ in touched)]),
                        max([window.end, *(at.end for at, _ in touched)]))  # fmt: skip
        touched.sort(key=lambda each: each[0])
        held = [aggregate for _, aggregate in touched] or [self._zero()]
        whole = held[0]
        for aggregate in held[1:]:
            assert self._merge is not None
            whole = self._merge(whole, aggregate)
        gone = [at for at, _ in touched]
        rest = [each for each in open if each[0] not in gone]
        return window, [*rest, (window, self._add(whole, value))], [at for at in gone if at != window]

    def _note(self, key: Any, window: Window) -> None:
        heapq.heappush(self._ends, (window.end, window.start, next(self._numbers), key))

    def advance(self, watermark: int) -> list[Result]:
        """Closes what the watermark has passed, the earliest end first, and gives it if it is to be given at the close.

        A watermark below an earlier one changes nothing.
        """
        self.watermark, out = max(self.watermark, watermark), []
        while self._ends and self._ends[0][0] + self._grace <= self.watermark:
            end, start, _, key = heapq.heappop(self._ends)
            open = self.state.get(key, ())
            rest = [each for each in open if (each[0], each[1]) != (start, end)]
            if len(rest) == len(open):  # it has become part of another session
                continue
            out += [Result(key, Window(a, b), held, "final") for a, b, held in open if (a, b) == (start, end)]
            if rest:
                self.state[key] = rest
            else:
                del self.state[key]
        return out if self._emit == "close" else []
