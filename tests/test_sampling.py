"""Sampling goes on beside a block, counts what was missed, and ends with it; between two samples a line is drawn."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, strategies

import mqlib as mq
from mqlib.sampling import age, curve, sampling


class Counter:
    """A monitor whose samples are numbered; some have no answer."""

    def __init__(self, *unanswered: int) -> None:
        self.taken = self.missed = 0
        self.unanswered = unanswered

    async def sample(self) -> None:
        self.taken += 1
        if self.taken in self.unanswered:
            raise mq.BrokerError("no answer")


async def test_the_first_and_the_last_sample_frame_the_block() -> None:
    monitor, tasks = Counter(), asyncio.all_tasks()
    async with sampling(monitor, every=60):
        assert monitor.taken == 1
    assert (monitor.taken, monitor.missed, asyncio.all_tasks()) == (2, 0, tasks)


async def test_what_has_no_answer_is_counted_except_at_the_start() -> None:
    monitor = Counter(2, 3)
    async with sampling(monitor, every=0.001):
        await mq.until(lambda: monitor.taken > 4)
    assert monitor.missed == 2
    with pytest.raises(mq.BrokerError, match="no answer"):
        async with sampling(Counter(1), every=1):
            pytest.fail("there was no first sample")


async def test_the_blocks_error_passes() -> None:
    tasks = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        async with sampling(Counter(), every=0.001):
            raise ZeroDivisionError
    assert asyncio.all_tasks() == tasks


async def test_an_error_that_is_no_missing_answer_ends_the_block() -> None:
    """It is a fault of ours: nobody should wait for samples that never come."""

    class Broken(Counter):
        async def sample(self) -> None:
            await super().sample()
            if self.taken == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with sampling(Broken(), every=0.001):
            await asyncio.Event().wait()


@pytest.mark.parametrize("every", [0, -1, float("nan")])
async def test_an_interval_that_is_none_is_refused(every: float) -> None:
    monitor = Counter()
    with pytest.raises(ValueError, match=f"above 0, not {every}"):
        async with sampling(monitor, every):
            pytest.fail("it began")
    assert monitor.taken == 0


STEP = strategies.tuples(strategies.integers(1, 9), strategies.integers(0, 9))


@given(strategies.lists(STEP, min_size=1, max_size=12), strategies.integers(0, 120), strategies.integers(0, 50))
def test_the_age_of_an_offset_lies_between_the_samples_around_it(
    steps: list[tuple[int, int]], offset: int, later: int
) -> None:
    """Against a search through all pairs of samples."""
    history = [(0.0, 10)]
    for seconds, written in steps:
        history.append((history[-1][0] + seconds, history[-1][1] + written))
    now = history[-1][0] + later
    expected = [
        now - (before + (after - before) * (offset - low) / (high - low))
        for (before, low), (after, high) in itertools.pairwise(history)
        if low <= offset < high
    ]
    assert age(history, offset, now) == (pytest.approx(expected[0]) if expected else None)


def test_a_curve_begins_at_zero_and_has_gaps_where_nothing_is_known() -> None:
    assert curve([]) == ([], [])
    seconds, values = curve([(5.0, 1), (6.5, None)])
    assert (seconds, values[0], str(values[1])) == ([0.0, 1.5], 1, "nan")
