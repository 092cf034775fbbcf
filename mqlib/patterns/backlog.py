"""What the samples of a monitor say of a backlog: when it will be gone, and whether anybody works on it.

The samples are those of a `LagMonitor` or a `DepthMonitor`, the newest last. After Google's Site Reliability Workbook,
"Managing Load", and Burrow, https://github.com/linkedin/Burrow/wiki/Consumer-Lag-Evaluation-Rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..lag import GroupLag, PartitionLag

SOUND = ("", "no commit")  # notes of a partition whose position is where its consumers are
POINTS = 60  # of a fit


@dataclass(frozen=True)
class Drain:
    """What becomes of a backlog if nothing changes. What is not known is None."""

    waiting: int | None
    """Messages at the last sample: of a group its lag in offsets; of a queue ready and unacknowledged ones."""
    arrivals: float | None
    """Messages a second that come; None for a queue, whose depth does not tell."""
    service: float | None
    """Messages a second that are done; None for a queue."""
    seconds: float | None
    """From the last sample until nothing waits; 0 when nothing does now, inf when the backlog does not shrink."""


def drain(samples: Sequence[Any], within: float = 60.0) -> Drain:
    """The drain time from the samples of the last `within` seconds of a `LagMonitor` or a `DepthMonitor`.

    The rates are the medians of the slopes between samples at least half of the time apart, so a few that are off do
    not count (after Theil and Sen). Consumers that commit every n seconds move in steps: look at several n. Unknown
    with fewer than three samples, or when a partition's lag is unknown or shrinks by retention, which serves nobody.
    """
    points = [_backlog(sample) for sample in samples]
    last, waiting, _, whole = points[-1] if points else (0.0, None, 0, None)
    if waiting is None:
        return Drain(None, None, None, None)
    recent = [(at, n, end) for at, n, end, parts in points if at >= last - within and n is not None and parts == whole]
    recent = recent[:: -max(1, math.ceil(len(recent) / POINTS))][::-1]  # with the last one
    shrinks = _slope([(at, -n) for at, n, _ in recent])
    arrivals = service = None
    if isinstance(samples[-1], GroupLag):
        arrivals, service = (_slope([(at, end - n * less) for at, n, end in recent]) for less in (0, 1))
        shrinks = None if arrivals is None or service is None else service - arrivals
    if waiting == 0:
        return Drain(0, arrivals, service, 0.0)
    seconds = None if shrinks is None else math.inf if shrinks <= 0 else waiting / shrinks
    return Drain(waiting, arrivals, service, seconds)


def _backlog(sample: Any) -> tuple[float, int | None, int, Any]:
    """Time, what waits, the sum of the ends, and the partitions."""
    if not isinstance(sample, GroupLag):
        at, depth = sample
        return at, depth.ready + (depth.unacknowledged or 0), 0, None
    sound = all(part.note in SOUND for part in sample.partitions)
    ends = sum(part.end or 0 for part in sample.partitions)
    return sample.time, sample.total if sound else None, ends, [part.place for part in sample.partitions]


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The median slope between points that are at least half of the time apart; None for fewer than three points."""
    if len(points) < 3:
        return None
    half = (points[-1][0] - points[0][0]) / 2
    slopes = [(y - x) / (t - s) for s, x in points for t, y in points if t - s >= half and t > s]
    return median(slopes) if slopes else None


def stalled(samples: Sequence[Any], slack: int = 0) -> float | None:
    """Seconds, up to the last sample, without a sign that consumers get on; 0 when nothing waits; None when unknown.

    Of a group it is the longest over the partitions: something to read, and a position that did not move. Up to `slack`
    offsets are nothing to read: 1 where each write is a transaction, whose marker nobody reads. A queue has no
    position: its sign is a depth that falls, which arrivals can hide.
    """
    if not samples:
        return None
    if not isinstance(samples[-1], GroupLag):
        return _not_falling([_backlog(sample)[:2] for sample in samples], slack)
    now, since = samples[-1].time, dict[Any, float]()
    unread = {part.place: _position(part) for part in samples[-1].partitions if (part.lag or 0) > slack}
    for sample in reversed(samples):
        parts = {part.place: part for part in sample.partitions if part.place in unread}
        same = {place for place, part in parts.items() if (part.lag or 0) > slack and _position(part) == unread[place]}
        since |= dict.fromkeys(same, sample.time)
        unread = {place: at for place, at in unread.items() if place in same}
        if not unread:
            break
    longest = max((now - at for at in since.values()), default=0.0)
    known = bool(samples[-1].partitions) and not samples[-1].unknown
    return longest if longest or known else None


def _position(part: PartitionLag) -> int:
    return (part.end or 0) - (part.lag or 0)


def _not_falling(depths: Sequence[tuple[float, Any]], slack: int) -> float:
    since, later = now, held = depths[-1]
    for at, waiting in reversed(depths):
        if waiting > later or waiting <= slack or held <= slack:
            break
        since, later = at, waiting
    return now - since
