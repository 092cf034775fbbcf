"""Sampling in the background, for as long as a block lasts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from .brokers import BrokerError
from .waiting import beside


class Monitor(Protocol):
    """What can be sampled."""

    missed: int

    async def sample(self) -> Any:
        """Takes and keeps one sample. Raises `BrokerError` when the broker does not answer."""


def curve(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """Points of a figure: seconds since the first, and values, NaN for None."""
    known = list(points)
    return [at - known[0][0] for at, _ in known], [float("nan") if value is None else value for _, value in known]


def age(history: Sequence[tuple[float, int]], offset: int, now: float) -> float | None:
    """Seconds since `offset` was written, between the samples (time, end offset) around it; None if before them."""
    later = bisect_right(history, offset, key=lambda sample: sample[1])
    if not 0 < later < len(history):
        return None
    (before, low), (after, high) = history[later - 1], history[later]
    return now - (before + (after - before) * (offset - low) / (high - low))


@contextlib.asynccontextmanager
async def sampling(monitor: Monitor, every: float) -> AsyncIterator[None]:
    """Takes a sample at once, every `every` seconds, and at the end of the block.

    A moment without an answer counts as `missed`. Raises `BrokerError` when there is no answer to the first, and
    `ValueError` when `every` is not above 0.
    """
    if not every > 0:
        raise ValueError(f"every is the seconds between two samples, above 0, not {every!r}")
    await monitor.sample()

    async def once() -> None:
        try:
            await monitor.sample()
        except BrokerError:
            monitor.missed += 1

    async def keep_on() -> None:
        due = time.monotonic()
        while True:
            due = max(due + every, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            await once()

    async with beside(keep_on()):
        yield
    await once()
