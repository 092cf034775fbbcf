"""The ledger: `sent`, `acknowledged` and `received` of each message, in order."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import process_time

import mqlib as mq
from tests.benchmarks.core import Contender, Promise


def keep(count: int) -> mq.Ledger:
    ledger = mq.Ledger()
    sent, acknowledged, received = ledger.sent, ledger.acknowledged, ledger.received
    for number in range(count):
        sent(number)
        acknowledged(number)
        received(number)
    assert ledger.exact
    return ledger


async def speed(count: int) -> float:
    """Records for each second of the processor's time: what else runs on the machine does not count."""
    start = process_time()
    keep(count)
    return count / (process_time() - start)


async def peak(count: int) -> float:
    """The most memory that it takes meanwhile, in MB."""
    tracemalloc.start()
    try:
        keep(count)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    count, many = (10_000, 100_000) if quick else (1_000_000, 10_000_000)
    yield [
        Contender("mq.Ledger", lambda: speed(count), "records/s", (Promise(1_000_000, 1),)),
        Contender(f"… memory for {many:,}", lambda: peak(many), "MB", (Promise(50, 1, "≤"),), rounds=1),
    ]
