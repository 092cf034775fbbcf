"""How late scheduled messages are, at the broker; and that none is sent before it is due, lost, or sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from statistics import quantiles
from typing import Any

import mqlib as mq
from mqlib.patterns.scheduler import TIMER_TOPIC, now_ms, schedule_message, start_scheduler
from tests.benchmarks.core import Contender, Promise

ROUNDS = 3


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    kafka = mq.kafka()
    count = 500 if quick else 10_000
    stamped: dict[str, Any] = {"message_timestamp_type": "LogAppendTime"}
    wrong: dict[bool, list[int]] = {True: [], False: []}

    async def run(exactly_once: bool) -> float:
        """Jobs that are due over some seconds: the 99th percentile of how late they are, in ms."""
        timers, target = await mq.topic(kafka, "timers", **TIMER_TOPIC), await mq.topic(kafka, "target", **stamped)
        async with start_scheduler(kafka, timers, exactly_once=exactly_once) as work, mq.producer(kafka) as producer:
            start = now_ms() + 2000 + count // 5
            dues = [start + number * (count // 2) // count for number in range(count)]
            for first in range(0, count, 500):
                jobs = range(first, first + 500)
                await asyncio.gather(
                    *(schedule_message(producer, timers, target, b"%d" % job, dues[job], job=str(job)) for job in jobs)
                )
            await mq.until(lambda: work.report.fired >= count, within=60)
        records = await mq.read(kafka, target, isolation_level="read_committed")
        late = [record.timestamp - dues[int(record.value)] for record in records]
        missing = count - len({record.value for record in records})
        wrong[exactly_once].append(sum(each < 0 for each in late) + missing + len(records) - count + missing)
        return float(quantiles(late, n=100)[98])

    def lateness(exactly_once: bool) -> Callable[[], Awaitable[float]]:
        return lambda: run(exactly_once)

    async def mistakes() -> float:
        return float(max(max(each, default=0) for each in wrong.values()))

    yield [
        Contender("at least once, p99 late", lateness(False), "ms", (Promise(50.0, 1, "≤"),), ROUNDS),
        Contender("exactly once, p99 late", lateness(True), "ms", rounds=ROUNDS),
        Contender("early, lost or doubled", mistakes, "messages", (Promise(1.0, 0, "≤"),), ROUNDS),
    ]
