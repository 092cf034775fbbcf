"""Counters against a naive model, over real HTTP as Prometheus reads them, and on a real Kafka."""

from __future__ import annotations

import asyncio
import itertools
import math
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass
from fractions import Fraction
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strictly_parsed
from prometheus_client.parser import text_string_to_metric_families as parsed

import mqlib as mq
from mqlib.metrics import PERCENTS, QueueMetrics, paced

Samples = dict[tuple[str, frozenset[tuple[str, str]]], Any]

QUEUES, GROUPS = ("orders", "mail"), ("a", "")
PLACES = st.tuples(st.sampled_from(QUEUES), st.sampled_from(GROUPS))
EVENTS = st.one_of(
    st.tuples(st.just("produced"), PLACES, st.integers(0, 1000)),
    # Beyond the hour that is the longest; short ones often, since those have a grid of their own.
    st.tuples(st.just("consumed"), PLACES, st.floats(0, 0.01) | st.floats(0, 10_000)),
    st.tuples(st.just("failed"), PLACES, st.sampled_from(["", "timeout", "ValueError"])),
)


@dataclass
class Hand:
    """A clock that moves when it is told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def order_statistic(ordered: list[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed, by exact arithmetic."""
    return ordered[max(1, math.ceil(Fraction(str(percent)) * len(ordered) / 100)) - 1]


def close(value: float | None, exact: float) -> bool:
    """As an HDR histogram of three figures promises it: within 0.1 %, or its unit of 1 µs."""
    return value is not None and abs(value - exact) <= max(exact * 0.001, 1e-6)


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads that take turns a thousand times as often as usual: what is not locked is torn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@settings(max_examples=30, deadline=None)
@given(st.lists(EVENTS, max_size=80))
def test_any_sequence_counts_as_a_naive_model_does(events: list[tuple[str, tuple[str, str], Any]]) -> None:
    """Totals, reasons, rates, mean and percentiles; of everything, of one label, of both."""
    clock = Hand()
    metrics = QueueMetrics("queue", "group", clock=clock)
    clock.now += 4
    for kind, (queue, group), value in events:
        getattr(metrics, f"record_{kind}")(value, group=group, queue=queue)
    everywhere: dict[str, str] = {}
    one = [{"queue": queue} for queue in QUEUES] + [{"group": group} for group in GROUPS]
    both = [{"queue": queue, "group": group} for queue in QUEUES for group in GROUPS]
    for labels in (everywhere, *one, *both):
        mine = [
            (kind, value)
            for kind, (queue, group), value in events
            if labels.items() <= {"queue": queue, "group": group}.items()
        ]
        produced = sum(value for kind, value in mine if kind == "produced")
        reasons = Counter(value for kind, value in mine if kind == "failed")
        took = sorted(min(value, 3600.0) for kind, value in mine if kind == "consumed")
        found = metrics.get_metrics(**labels)
        assert (found.produced, found.consumed, found.failed) == (produced, len(took), reasons.total())
        assert found.failed_by_reason == reasons
        assert (found.elapsed, found.produced_per_second) == (4, produced / 4)
        assert (found.consumed_per_second, found.failed_per_second) == (len(took) / 4, reasons.total() / 4)
        percentiles = [found.p50, found.p90, found.p99, found.p999, found.max]
        assert metrics.percentiles(*PERCENTS, **labels) == dict(zip(PERCENTS, percentiles, strict=True))
        if not took:
            assert [found.mean, *percentiles] == [None] * 6
            continue
        assert all(close(value, order_statistic(took, p)) for p, value in zip(PERCENTS, percentiles, strict=True))
        assert found.max == round(took[-1] * 1e6) / 1e6, "the longest is not rounded up to the end of its bucket"
        assert found.mean == pytest.approx(sum(took) / len(took))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 0.01) | st.floats(0, 10_000), min_size=1, max_size=80), st.integers(2, 3))
def test_a_distribution_has_the_share_of_the_messages_at_or_below_each_time(took: list[float], queues: int) -> None:
    """The whole curve, over the series of several labels: exact at each of its points, every message in it."""
    metrics = QueueMetrics("queue")
    for number, seconds in enumerate(took):
        metrics.record_consumed(seconds, queue=str(number % queues))
    points, shares = metrics.distribution()
    whole = [round(min(seconds, 3600) * 1e6) for seconds in took]
    assert points == sorted(set(points))
    assert shares == [sum(us <= round(point * 1e6) for us in whole) / len(took) for point in points]
    assert (points[-1], shares[-1]) == (max(whole) / 1e6, 1)
    assert all(any(close(point, us / 1e6) for point in points) for us in whole)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 10, 100, 250, 600, 1000, 1001, 2000])
def test_a_percentile_covers_at_least_that_share(count: int) -> None:
    """Ranks are rounded up: with 600 messages the p99.9 is the slowest one, which the library alone would leave out."""
    metrics = QueueMetrics()
    for number in range(1, count + 1):
        metrics.record_consumed(number / 1000)
    asked = (0, 1, 25, 50, 64.4, 90, 99, 99.9, 100)
    for percent, value in metrics.percentiles(*asked).items():
        assert close(value, max(1, math.ceil(Fraction(str(percent)) * count / 100)) / 1000), percent


def test_the_mean_hides_what_the_percentiles_show() -> None:
    """One message in a hundred takes ten seconds, the others ten milliseconds."""
    metrics = QueueMetrics()
    for number in range(1000):
        metrics.record_consumed(10 if number % 100 == 0 else 0.01)
    found = metrics.get_metrics()
    assert found.mean == pytest.approx(0.1099)
    assert close(found.p50, 0.01)
    assert close(found.p99, 0.01)
    assert close(found.p999, 10)
    assert found.max == 10
    assert [len(points) for points in metrics.distribution()] == [2, 2]
    assert metrics.distribution()[1] == [0.99, 1]


def test_more_than_an_hour_counts_as_an_hour() -> None:
    metrics = QueueMetrics()
    for seconds in (3600.5, 1e300, 7):
        metrics.record_consumed(seconds)
    found = metrics.get_metrics()
    assert (found.consumed, found.p90, found.max) == (3, 3600, 3600)
    assert found.mean == pytest.approx(7207 / 3)


def test_rates_need_time_and_reset_starts_anew() -> None:
    """With no time passed a rate is unknown; after `reset` nothing of before is left, in figures and families too."""
    clock = Hand()
    metrics = QueueMetrics("queue", clock=clock)
    metrics.record_produced(10, queue="orders")
    metrics.record_consumed(0.5, queue="orders")
    metrics.record_failed("timeout", queue="orders")
    found = metrics.get_metrics()
    assert (found.produced, found.produced_per_second, found.consumed_per_second) == (10, None, None)
    clock.now += 5
    assert metrics.get_metrics().produced_per_second == 2
    metrics.reset()
    clock.now += 2
    metrics.record_produced(queue="orders")
    after = metrics.get_metrics(queue="orders")
    assert (after.produced, after.elapsed, after.produced_per_second) == (1, 2, 0.5)
    assert (after.consumed, after.failed, after.failed_by_reason, after.mean, after.max) == (0, 0, {}, None, None)
    assert (metrics.percentiles(50), metrics.distribution()) == ({50: None}, ([], []))
    assert [sample.value for family in metrics.collect() for sample in family.samples] == [1, 0, 0, 0]


def test_what_was_told_stays_as_it_was() -> None:
    metrics = QueueMetrics()
    metrics.record_failed("timeout")
    found = metrics.get_metrics()
    with pytest.raises(FrozenInstanceError):
        found.failed = 5  # type: ignore[misc]
    found.failed_by_reason["timeout"] = 5
    metrics.record_failed("timeout")
    assert (found.failed, metrics.get_metrics().failed_by_reason) == (1, {"timeout": 2})


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m: m.record_produced(), "are: queue, group; given were: none"),
        (lambda m: m.record_produced(queue="a"), "are: queue, group; given were: queue"),
        (lambda m: m.record_consumed(1, queue="a", group="b", topic="c"), "are: queue, group; given were: .*topic"),
        (lambda m: m.record_failed("x", queue="a", topic="b"), "are: queue, group; given were: queue, topic"),
        (lambda m: m.get_metrics(topic="a"), "are: queue, group; given were: topic"),
        (lambda m: m.percentiles(50, topic="a"), "are: queue, group; given were: topic"),
        (lambda m: m.distribution(topic="a"), "are: queue, group; given were: topic"),
        (lambda m: m.record_produced(queue=1, group="b"), "label queue must be a string, not 1"),
        (lambda m: m.record_consumed(1, queue="a", group=["b"]), r"label group must be a string, not \['b'\]"),
        (lambda m: m.get_metrics(group=None), "label group must be a string, not None"),
        (lambda m: m.record_produced(-1, queue="a", group="b"), "count .* from 0 on, not -1"),
        (lambda m: m.record_produced(1.5, queue="a", group="b"), "whole number .* not 1.5"),
        (lambda m: m.record_consumed(-0.001, queue="a", group="b"), "seconds .* from 0 on, not -0.001"),
        (lambda m: m.record_consumed(math.nan, queue="a", group="b"), "seconds .* finite .* not nan"),
        (lambda m: m.record_consumed(math.inf, queue="a", group="b"), "seconds .* finite .* not inf"),
        (lambda m: m.record_failed(ValueError("x"), queue="a", group="b"), "reason .* not ValueError"),
        (lambda m: m.percentiles(50, 100.1, -1), "from 0 to 100, not 100.1, -1"),
        (lambda m: m.percentiles(math.nan), "from 0 to 100, not nan"),
    ],
)
def test_what_is_wrong_is_named_and_not_counted(call: Callable[[Any], object], why: str) -> None:
    metrics = QueueMetrics("queue", "group")
    with pytest.raises(ValueError, match=why):
        call(metrics)
    assert [sample for family in metrics.collect() for sample in family.samples] == []


@pytest.mark.parametrize("name", ["my-queue", "", "1st", "__meta", "größe", "quantile", "reason", "seconds", "count"])
def test_a_name_that_cannot_be_a_label_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        QueueMetrics("queue", name)


def samples(text: str, parse: Callable[[str], Any] = parsed) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def scrape(url: str, **headers: str) -> Samples:
    answer = httpx.get(url, headers=headers, timeout=20).raise_for_status()
    return samples(answer.text, strictly_parsed if "openmetrics" in answer.headers["content-type"] else parsed)


def expected(metrics: QueueMetrics, *combinations: dict[str, str]) -> Samples:
    """What Prometheus has to see, from `get_metrics` of each combination of labels."""
    wanted: Samples = {}
    for labels in combinations:
        found, key = metrics.get_metrics(**labels), frozenset(labels.items())
        wanted["mq_messages_produced_total", key] = found.produced
        wanted["mq_messages_consumed_total", key] = wanted["mq_message_seconds_count", key] = found.consumed
        wanted["mq_message_seconds_sum", key] = pytest.approx((found.mean or 0) * found.consumed)
        for reason, count in found.failed_by_reason.items():
            wanted["mq_messages_failed_total", key | {("reason", reason)}] = count
        quantiles = {"0.5": found.p50, "0.9": found.p90, "0.99": found.p99, "0.999": found.p999, "1.0": found.max}
        for quantile, value in quantiles.items():
            if value is not None:
                wanted["mq_message_seconds", key | {("quantile", quantile)}] = value
    return wanted


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_a_scrape_says_what_get_metrics_says(accept: str) -> None:
    """In both formats, also with label values that need escaping; OpenMetrics' parser is the strict one. Where nothing
    was consumed there are no quantiles."""
    metrics = QueueMetrics("queue", "group")
    busy, odd = {"queue": "orders", "group": "billing"}, {"queue": 'a"b\\c\nd', "group": "é ✓"}
    for number in range(300):
        metrics.record_consumed(number / 1000, **busy)
    metrics.record_produced(301, **busy)
    metrics.record_produced(1, **odd)
    for reason in ("timeout", "timeout", 'said "no"'):
        metrics.record_failed(reason, **odd)
    with metrics.serve() as url:
        seen = scrape(url, accept=accept)
        assert seen == expected(metrics, busy, odd)
        assert len(seen) == 4 + 5 + 4 + 2
        metrics.record_consumed(50, **busy)
        assert scrape(url, accept=accept) == expected(metrics, busy, odd), "each scrape is of now"
        only = scrape(f"{url}?name[]=mq_messages_produced_total", accept=accept)
        assert {name for name, _ in only} == {"mq_messages_produced_total"}


def test_the_families_have_types_and_names_as_prometheus_wants_them() -> None:
    """Also before anything was counted, and in a registry of somebody else."""
    registry = CollectorRegistry()
    registry.register(QueueMetrics("queue"))
    types = {family.name: family.type for family in registry.collect()}
    assert types == {
        "mq_messages_produced": "counter",
        "mq_messages_consumed": "counter",
        "mq_messages_failed": "counter",
        "mq_message_seconds": "summary",
    }


def test_two_objects_do_not_meet() -> None:
    one, two = QueueMetrics("queue"), QueueMetrics()
    one.record_produced(3, queue="orders")
    two.record_produced(5)
    with one.serve() as first, two.serve() as second, one.serve() as third:
        assert scrape(first) == scrape(third) == expected(one, {"queue": "orders"})
        assert scrape(second) == expected(two, {})
    assert (one.get_metrics().produced, two.get_metrics().produced) == (3, 5)


@pytest.mark.usefixtures("fast_switching")
def test_threads_lose_nothing() -> None:
    """Four threads, some series shared, some their own, all of them new to begin with; the totals are exact."""
    metrics = QueueMetrics("queue")
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        calls: list[Callable[[str], None]] = [
            lambda queue: metrics.record_consumed(0.25, queue=queue),
            lambda queue: metrics.record_produced(2, queue=queue),
            lambda queue: metrics.record_failed("timeout", queue=queue),
        ]
        ready.wait()
        for turn, name in itertools.product(range(500), ("shared", f"own-{number}")):
            for call in calls[turn // 10 % 3 :] + calls[: turn // 10 % 3]:
                call(f"{name}-{turn // 10}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for labels, count in (({}, 4000), ({"queue": "shared-7"}, 40), ({"queue": "own-3-7"}, 10)):
        found = metrics.get_metrics(**labels)
        assert (found.produced, found.consumed, found.failed) == (2 * count, count, count)
        assert (found.failed_by_reason, found.mean, found.max) == ({"timeout": count}, 0.25, 0.25)


@pytest.mark.usefixtures("fast_switching")
def test_totals_never_go_backwards_while_another_thread_records() -> None:
    """Also while series appear. A scrape is of whole records: what was consumed was failed and produced before."""
    metrics = QueueMetrics("queue")
    stop = threading.Event()
    rounds = 0

    def record() -> None:
        nonlocal rounds
        while not stop.is_set():
            queue = str(rounds // 50 % 25)
            metrics.record_produced(queue=queue)
            metrics.record_failed("timeout", queue=queue)
            metrics.record_consumed(0.001 * (rounds % 7), queue=queue)
            rounds += 1

    recorder = threading.Thread(target=record)
    recorder.start()
    seen: list[Samples] = []
    try:
        with metrics.serve() as url:
            while len(seen) < 10 or rounds < 2000:
                seen.append(scrape(url))
    finally:
        stop.set()
        recorder.join()
    for before, after in itertools.pairwise(seen):
        growing = {key: value for key, value in before.items() if key[0].endswith(("_total", "_count", "_sum"))}
        assert {key for key, value in growing.items() if after[key] < value} == set()
    for each in seen:
        for (name, key), consumed in each.items():
            if name == "mq_message_seconds_count":
                assert consumed == each["mq_messages_consumed_total", key]
                assert consumed <= each.get(("mq_messages_failed_total", key | {("reason", "timeout")}), 0)
                assert consumed <= each["mq_messages_produced_total", key] <= consumed + 1
    assert metrics.get_metrics().consumed == rounds


def test_the_endpoint_ends_with_its_block_also_after_an_error() -> None:
    """Nobody listens, no thread is left, and the port can be had again at once."""
    metrics = QueueMetrics()
    metrics.record_produced()
    threads = set(threading.enumerate())
    urls: list[httpx.URL] = []

    def failing_block() -> None:
        with metrics.serve() as url:
            assert scrape(url) == expected(metrics, {})
            urls.append(httpx.URL(url))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_block()
    with pytest.raises(httpx.ConnectError):
        httpx.get(urls[0])
    assert not [thread for thread in set(threading.enumerate()) - threads if "serve_forever" in thread.name]
    port = urls[0].port
    assert port
    with metrics.serve(port=port) as url:
        assert url == f"http://127.0.0.1:{port}/metrics"
        assert scrape(url) == expected(metrics, {})


def test_a_port_that_is_taken_or_none_is_named() -> None:
    metrics = QueueMetrics()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1, port {port} .*in use"), metrics.serve(port):
            pass
    with pytest.raises(OSError, match="port 70000"), metrics.serve(70000):
        pass


async def test_latency_on_kafka_counts_from_the_schedule(kafka: mq.Kafka) -> None:
    """200 records, sent on a schedule that each carries; all are consumed, and the percentiles are in order."""
    metrics = QueueMetrics("topic")
    topic = await mq.topic(kafka, "measured")
    async with mq.producer(kafka) as producer, mq.consumer(kafka, topic) as consumer:

        async def produce() -> None:
            async for due in paced(1000, 200):
                await producer.send(topic, repr(due).encode())
                metrics.record_produced(topic=topic)

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            for _ in range(200):
                for record in await mq.take(consumer, 1, within=20):
                    metrics.record_consumed(time.monotonic() - float(record.value), topic=topic)
    found = metrics.get_metrics(topic=topic)
    assert (found.produced, found.consumed, found.failed) == (200, 200, 0)
    assert found.p50 is not None
    assert found.p99 is not None
    assert found.max is not None
    assert 0 < found.p50 <= found.p99 <= found.max


class Late(Hand):
    """A clock that only its own `sleep` moves, and the test; it keeps what it was asked to sleep."""

    def __init__(self, early: float = 0.0) -> None:
        super().__init__()
        self.asked: list[float] = []
        self.early = early

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.asked.append(seconds)
            self.now += max(seconds - self.early, seconds / 2)


async def test_paced_waits_for_each_moment() -> None:
    clock = Late()
    seen = [(due, clock.now) async for due in paced(4, 5, clock, clock.sleep)]
    assert seen == [(at, at) for at in (1000, 1000.25, 1000.5, 1000.75, 1001)]
    assert clock.asked == [0.25] * 4


async def test_paced_stays_on_the_grid_when_its_consumer_is_late() -> None:
    """A stall of a second: none is skipped or moved, those missed come at once, and what they waited is in their
    latency. The last is on time again."""
    clock = Late()
    waited = []
    scheduled = []
    async for due in paced(4, 7, clock, clock.sleep):
        scheduled.append(due)
        waited.append(clock.now - due)
        if due == 1000.25:
            clock.now += 1
    assert scheduled == [1000 + number / 4 for number in range(7)]
    assert waited == [0, 0, 0.75, 0.5, 0.25, 0, 0]
    assert clock.asked == [0.25, 0.25]


async def test_paced_is_never_early() -> None:
    """Also when the sleep is: a latency counted from the schedule is never negative."""
    clock = Late(early=0.1)
    async for due in paced(4, 4, clock, clock.sleep):
        assert clock.now >= due
    assert len(clock.asked) > 3, "it slept again"


async def test_paced_lets_others_run_when_it_is_late() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    late = itertools.count(0, 1000)
    found = [turns async for _ in paced(10, 5, lambda: float(next(late)))]
    task.cancel()
    assert found == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
async def test_paced_refuses_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate .* not {rate}"):
        await anext(aiter(paced(rate, 1)))
