"""Counters of a queue's producers and consumers: totals, rates, latency percentiles, for a figure or for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from hdrh.histogram import HdrHistogram
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, Metric, SummaryMetricFamily

LONGEST_SECONDS = 3600
PERCENTS = (50, 90, 99, 99.9, 100)
NAME = "(?!__)[a-zA-Z_][a-zA-Z0-9_]*"
RESERVED = {"self", "count", "seconds", "reason", "quantile"}  # parameters of ours, labels of Prometheus

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True)
class Metrics:
    """What was counted in `elapsed` seconds, since construction or the last reset. What cannot be known is None."""

    produced: int
    consumed: int
    failed: int
    failed_by_reason: dict[str, int]
    elapsed: float
    produced_per_second: float | None
    consumed_per_second: float | None
    failed_per_second: float | None
    mean: float | None
    """Seconds, like all that follow; None when nothing was consumed."""
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None


class _Series:
    """What was counted under one combination of labels, or under several."""

    def __init__(self) -> None:
        self.produced = 0
        self.failed: Counter[str] = Counter()
        self.seconds = 0.0
        self.latency = HdrHistogram(1, LONGEST_SECONDS * 1_000_000, 3)

    def add(self, other: _Series) -> None:
        self.produced += other.produced
        self.failed.update(other.failed)
        self.seconds += other.seconds
        longest = max(self.latency.max_value, other.latency.max_value)
        self.latency.add(other.latency)
        self.latency.max_value = longest  # `add` makes it the upper end of its bucket

    def percentiles(self, percents: Sequence[float]) -> dict[float, float]:
        """The shortest time, in seconds, that so many of the messages did not exceed; empty when there are none."""
        if not (count := self.latency.total_count):
            return {}
        # The library rounds to the nearest rank, so that its p99.9 of 600 messages leaves out the slowest. What it is
        # asked for here are whole ranks, rounded up.
        asked = {percent: 100 * max(1, math.ceil(round(percent * count / 100, 6))) / count for percent in percents}
        values = self.latency.get_percentile_to_value_dict([*asked.values()])
        return {percent: min(values[rank], self.latency.max_value) / 1e6 for percent, rank in asked.items()}


class QueueMetrics:
    """Counts messages produced, consumed and failed, each under a value for each of the labels.

    `QueueMetrics("queue", "group")`, then `record_consumed(0.02, queue="orders", group="billing")`. Latencies are kept
    in HDR histograms, exact to 0.1 % or 1 µs, whichever is more, and the longest to 1 µs; what takes longer than an
    hour counts as an hour. A combination of labels takes 190 kB. May be used from several threads.

    It is a collector of `prometheus_client`. Raises `ValueError` for a label name that Prometheus does not allow.
    """

    def __init__(self, *labels: str, clock: Clock = time.monotonic) -> None:
        if wrong := [name for name in labels if name in RESERVED or not re.fullmatch(NAME, name)]:
            raise ValueError(f"reserved, or no label name for Prometheus: {', '.join(map(repr, wrong))}")
        self._names = dict.fromkeys(labels).keys()
        self._clock = clock
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the rates count from now."""
        with self._lock:
            self._series: defaultdict[frozenset[tuple[str, str]], _Series] = defaultdict(_Series)
            self._started = self._clock()

    def record_produced(self, count: int = 1, **labels: str) -> None:
        """`count` messages were sent. Raises `ValueError` when that is negative, or for other labels than declared."""
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"the count of produced messages must be a whole number from 0 on, not {count!r}")
        with self._lock:
            self._series[self._key(labels)].produced += count

    def record_consumed(self, seconds: float, **labels: str) -> None:
        """A message was consumed; `seconds` is its processing time, or its latency since it was due to be sent.

        Raises `ValueError` when that is negative or not finite, or for other labels than declared.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"the seconds of a consumed message must be finite and from 0 on, not {seconds!r}")
        seconds = min(seconds, LONGEST_SECONDS)
        with self._lock:
            series = self._series[self._key(labels)]
            series.seconds += seconds
            series.latency.record_value(round(seconds * 1e6))

    def record_failed(self, reason: str = "", **labels: str) -> None:
        """A message failed. `reason` is one of few, such as an error's class: each is a time series of its own.

        Raises `ValueError` when it is no string, or for other labels than declared.
        """
        if not isinstance(reason, str):
            raise ValueError(f"the reason of a failure must be a string, not {reason!r}")
        with self._lock:
            self._series[self._key(labels)].failed[reason] += 1

    def get_metrics(self, **labels: str) -> Metrics:
        """The totals over everything that has these labels; without labels, over everything.

        Raises `ValueError` for a label that was not declared. A value that was never recorded has totals of 0.
        """
        total, elapsed = self._total(labels)
        counts = (total.produced, total.latency.total_count, total.failed.total())
        rates = [count / elapsed if elapsed > 0 else None for count in counts]
        mean = total.seconds / total.latency.total_count if total.latency.total_count else None
        latencies = (mean, *map(total.percentiles(PERCENTS).get, PERCENTS))
        return Metrics(*counts, dict(total.failed), elapsed, *rates, *latencies)

    def percentiles(self, *percents: float, **labels: str) -> dict[float, float | None]:
        """`percentiles(50, 99.9)`: for each percentage the seconds that so many of the messages did not exceed.

        None when nothing was consumed. Raises `ValueError` for one that is not from 0 to 100, or a label as above.
        """
        if wrong := [percent for percent in percents if not 0 <= percent <= 100]:
            raise ValueError(f"percentiles are from 0 to 100, not {', '.join(map(str, wrong))}")
        values = self._total(labels)[0].percentiles(percents)
        return {percent: values.get(percent) for percent in percents}

    def distribution(self, **labels: str) -> tuple[list[float], list[float]]:
        """Points of a latency figure: seconds, ascending, and the share of messages that took no longer.

        Both are empty when nothing was consumed. Raises `ValueError` for a label that was not declared.
        """
        all_of = self._total(labels)[0].latency
        steps = [(step.value_iterated_to, step.total_count_to_this_value) for step in all_of.get_recorded_iterator()]
        return [min(us, all_of.max_value) / 1e6 for us, _ in steps], [count / all_of.total_count for _, count in steps]

    def collect(self) -> Iterator[Metric]:
        """The metric families, as a registry of `prometheus_client` asks for them; quantiles are since the last reset.

        Quantiles cannot be added up over the labels: `get_metrics` merges the histograms instead.
        """
        names = [*self._names]
        produced = CounterMetricFamily("mq_messages_produced", "Messages sent.", labels=names)
        consumed = CounterMetricFamily("mq_messages_consumed", "Messages consumed.", labels=names)
        failed = CounterMetricFamily("mq_messages_failed", "Messages failed.", labels=[*names, "reason"])
        took = SummaryMetricFamily("mq_message_seconds", "Seconds that messages took.", labels=names)
        for labels in map(dict, list(self._series)):  # a list is one step, also while others record
            total, _ = self._total(labels)
            values = [labels[name] for name in names]
            produced.add_metric(values, total.produced)
            consumed.add_metric(values, total.latency.total_count)
            for reason, count in total.failed.items():
                failed.add_metric([*values, reason], count)
            for percent, value in total.percentiles(PERCENTS).items():  # `add_metric` of a summary knows no quantiles
                took.add_sample(took.name, {**labels, "quantile": str(round(percent / 100, 3))}, value)
            took.add_metric(values, total.latency.total_count, total.seconds)
        yield from (produced, consumed, failed, took)

    @contextlib.contextmanager
    def serve(self, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
        """Serves the metrics over HTTP until the end of the block, and yields the URL; port 0 is a free one.

        Leaving takes up to half a second. Raises `OSError`, which names the address, when that cannot be had.
        """
        registry = CollectorRegistry(auto_describe=True)
        registry.register(self)
        try:
            server, thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot serve metrics on {host}, port {port} (0 takes a free one): {error}") from error
        try:
            yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _key(self, labels: dict[str, str], whole: bool = True) -> frozenset[tuple[str, str]]:
        """Raises `ValueError` for labels that were not declared, values that are no strings, and, if `whole`, gaps."""
        if labels.keys() != self._names and (whole or not labels.keys() <= self._names):
            declared, given = (", ".join(names) or "none" for names in (self._names, labels))
            raise ValueError(f"the labels of these metrics are: {declared}; given were: {given}")
        for name, value in labels.items():
            if not isinstance(value, str):
                raise ValueError(f"the label {name} must be a string, not {value!r}")
        return frozenset(labels.items())

    def _total(self, labels: dict[str, str]) -> tuple[_Series, float]:
        """A copy of what has these labels, added up, and the seconds since the start."""
        wanted, total = self._key(labels, whole=False), _Series()
        with self._lock:
            for key, series in self._series.items():
                if wanted <= key:
                    total.add(series)
            return total, self._clock() - self._started


async def paced(
    rate_per_second: float, count: int, clock: Clock = time.monotonic, sleep: Sleep = asyncio.sleep
) -> AsyncIterator[float]:
    """`count` times to send at, evenly spaced: waits for each and yields it, as `clock` tells it.

    It skips none when it is late, so that a latency counted from what it yields contains the waiting (no coordinated
    omission). Raises `ValueError` when the rate is not positive.
    """
    if not 0 < rate_per_second < math.inf:
        raise ValueError(f"the rate per second must be positive and finite, not {rate_per_second!r}")
    start = clock()
    for number in range(count):
        due = start + number / rate_per_second
        await sleep(0)  # the others' turn, also when it is late
        while (early := due - clock()) > 0:
            await sleep(early)
        yield due
