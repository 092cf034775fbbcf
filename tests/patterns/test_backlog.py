"""What samples say: rates and drain time against arithmetic, progress by partition, and what nobody can know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib.lag import GroupLag, PartitionLag
from mqlib.patterns.backlog import Drain, drain, stalled
from mqlib.queues import Depth


def part(number: int, committed: int | None, end: int, note: str = "") -> PartitionLag:
    lag = None if committed is None else end - committed
    return PartitionLag("orders", number, committed, 0, end, lag, None, note or ("no commit" if lag is None else ""))


def lags(*moments: Sequence[tuple[int | None, int]]) -> list[GroupLag]:
    """A sample a second; of each partition the commit and the end."""
    return [
        GroupLag(float(second), tuple(part(number, *each) for number, each in enumerate(parts)))
        for second, parts in enumerate(moments)
    ]


def depths(*ready: int, held: int | None = 0, consumers: int = 1) -> list[tuple[float, Depth]]:
    return [(float(second), Depth(each, held, consumers)) for second, each in enumerate(ready)]


def test_the_rates_of_a_group_and_when_it_is_done() -> None:
    """20 a second come and 50 are done, of 900 at the last sample."""
    found = drain(lags(*([(50 * n, 1200 + 20 * n)] for n in range(11))))
    assert found == Drain(900, 20.0, 50.0, 30.0)


def test_of_a_queue_only_the_difference_of_the_rates_is_known() -> None:
    assert drain(depths(*range(100, 49, -5), held=10)) == Drain(60, None, None, 12.0)
    assert drain(depths(*range(100, 49, -5), held=None)) == Drain(50, None, None, 10.0)


@pytest.mark.parametrize("step", [0, 3])
def test_a_backlog_that_does_not_shrink_never_ends(step: int) -> None:
    assert drain(depths(*range(100, 111 if step else 101, step or 1), *[100 + 20 * step] * 9)).seconds == math.inf
    found = drain(lags(*([(10 * n, 100 + (10 + step) * n)] for n in range(10))))
    assert (found.arrivals, found.service, found.seconds) == (10.0 + step, 10.0, math.inf)


def test_nothing_waits_is_0_and_too_little_to_tell_is_unknown() -> None:
    assert drain([]) == Drain(None, None, None, None)
    assert drain(depths(50, 40)) == Drain(40, None, None, None)
    assert drain(depths(0)).seconds == 0.0
    assert drain(lags([(5, 5)])) == Drain(0, None, None, 0.0)
    at_once = [(1.0, Depth(ready, 0, 1)) for ready in (9, 6, 3)]
    assert drain(at_once).seconds is None, "three samples of one moment are no rate"


def test_a_lag_that_is_unknown_or_shrinks_by_retention_has_no_drain_time() -> None:
    falling = lags(*([(50 * n, 1000)] for n in range(5)))
    assert drain([*falling, GroupLag(5.0, (part(0, None, 1000),))]) == Drain(None, None, None, None)
    assert drain([*falling, GroupLag(5.0, (part(0, 0, 1000, "expired"),))]).seconds is None
    assert drain([*falling, GroupLag(5.0, ())]).waiting is None, "the topic is gone"
    holes = [*falling[:2], GroupLag(1.5, (part(0, None, 1000),)), *falling[2:]]
    assert drain(holes) == drain(falling), "an unknown sample in between is left out"


def test_a_partition_that_is_new_begins_the_fit_anew() -> None:
    one = [[(10 * n, 200)] for n in range(5)]
    two = [[(10 * n, 200), (0, 1000)] for n in range(5, 7)]
    assert drain(lags(*one, *two)).seconds is None, "two samples with both are too few"
    assert drain(lags(*one, *two, [(70, 200), (0, 1000)])).service == 10.0


def test_samples_that_are_off_and_commits_in_steps_do_not_mislead() -> None:
    """A least-squares line through the same points says 11 s, not 20."""
    clean = [300 - 10 * n for n in range(11)]
    off = [ready + (400 if n in (1, 4) else 0) for n, ready in enumerate(clean)]
    assert drain(depths(*off)).seconds == pytest.approx(20, rel=0.1)
    steps = lags(*([(50 * (n // 5 * 5), 10_000)] for n in range(61)))
    assert drain(steps).service == pytest.approx(50, rel=0.1)


def test_only_the_last_seconds_count_and_many_samples_are_thinned() -> None:
    burst = depths(*range(0, 1000, 10), *range(1000, 0, -20))
    assert drain(burst, within=30).seconds == pytest.approx(1)
    assert drain(burst).seconds != pytest.approx(1)
    many = [(n / 100, Depth(100_000 - n, 0, 1)) for n in range(5000)]
    assert drain(many).seconds == pytest.approx(950.01)


@settings(max_examples=100, deadline=None)
@given(strategies.integers(0, 500), strategies.integers(0, 500), strategies.integers(1, 10**6),
       strategies.integers(3, 200))  # fmt: skip
def test_drain_is_what_arithmetic_says(arrivals: int, service: int, start: int, count: int) -> None:
    found = drain(lags(*([(service * n, start + 500 * count + arrivals * n)] for n in range(count))), within=1000)
    assert found.waiting is not None
    assert (found.arrivals, found.service) == (arrivals, service)
    net = service - arrivals
    assert found.seconds == (pytest.approx(found.waiting / net) if net > 0 else math.inf)


def test_progress_is_judged_by_partition() -> None:
    """One partition moves, the other does not: the group has stalled since the first moment with something to read."""
    moments = [[(0 + n, 10 + n), (5, 5 if n < 2 else 6 + n)] for n in range(8)]
    assert stalled(lags(*moments)) == 5.0
    assert stalled(lags(*moments, [(8, 18), (6, 14)])) == 0.0, "it moved"
    assert stalled(lags(*moments, [(8, 18), (14, 14)])) == 0.0, "there is nothing to read"
    assert stalled(lags(*[[(9, 10)]] * 9)) == 8.0
    assert stalled(lags(*[[(9, 10)]] * 9), slack=1) == 0.0, "a transaction's marker is nothing to read"


def test_progress_that_nobody_can_know() -> None:
    assert stalled([]) is None
    assert stalled([GroupLag(0.0, ())]) is None
    assert stalled(lags(*[[(None, 10)]] * 5)) is None
    assert stalled(lags(*[[(3, 3), (None, 10)]] * 5)) is None, "half of it is known: that is not enough"
    assert stalled(lags(*[[(3, 9), (None, 10)]] * 5)) == 4.0, "one has stalled, whatever the other does"


def test_a_queue_gets_on_when_its_depth_falls() -> None:
    assert stalled(depths(5, 5, 5, 5)) == 3.0
    assert stalled(depths(9, 5, 6, 7)) == 2.0
    assert stalled(depths(5, 6, 7, 6)) == 0.0
    assert stalled(depths(0, 0, 4, 4)) == 1.0, "it counts from when something waited"
    assert stalled(depths(5, 5, 0)) == 0.0
    assert stalled(depths(0, 0, 0, held=3)) == 2.0, "what a consumer holds waits, too"


async def test_on_a_real_group_that_works_off_a_backlog_in_known_steps(kafka: mq.Kafka) -> None:
    """The samples are real, their times set: 10 committed and 4 written from one second to the next."""
    topic, group = await mq.topic(kafka, "backlog"), kafka.name("backlog")
    now = 0.0
    async with (
        mq.LagMonitor(kafka, group, topic, clock=lambda: now) as monitor,
        mq.producer(kafka) as producer,
        mq.consumer(kafka, group_id=group, enable_auto_commit=False) as consumer,
    ):
        await mq.pump(producer, topic, [b"event"] * 100)
        assert drain([await monitor.sample()]).waiting is None, "a group without a commit"
        [part] = monitor.samples[0].partitions
        consumer.assign([part.place])
        for step in range(1, 5):
            await mq.pump(producer, topic, [b"event"] * 4)
            await consumer.commit({part.place: 10 * step})
            now = float(step)
            await monitor.sample()
    found = drain(monitor.samples)
    assert found == Drain(76, 4.0, 10.0, 76 / 6)
    assert stalled(monitor.samples) == 0.0
