"""The exercises of notebook 14: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from mqlib.checks import Task, Wrong


def judge_1(purse: Any) -> None:
    full = purse(0.1, 10)
    if (first := sum(bool(full.retry()) for _ in range(20))) != 10:
        raise Wrong(f"before any call a purse with a reserve of 10 paid for {first} retries")
    for _ in range(9):
        full.call()
    if full.retry():
        raise Wrong("nine calls saved a tenth each, and it paid for a whole retry")
    full.call()
    if not full.retry():
        raise Wrong("ten calls saved a tenth each; it pays for no retry. (Ten times 0.1 is a little less than 1.)")
    if full.retry():
        raise Wrong("a retry that was paid for is not taken out of the purse")
    rich = purse(0.5, 3)
    for _ in range(100):
        rich.call()
    if (saved := sum(bool(rich.retry()) for _ in range(20))) != 3:
        raise Wrong(f"after 100 calls at ease a purse with a reserve of 3 paid for {saved} retries at once")
    one, other = purse(0.1, 1), purse(0.1, 1)
    one.retry()
    if not other.retry():
        raise Wrong("two purses share what is in them")


class Purse:
    def __init__(self, ratio, reserve):
        self.ratio, self.reserve, self.left = ratio, reserve, reserve

    def call(self):
        self.left = min(self.left + self.ratio, self.reserve)

    def retry(self):
        paid = self.left > 1 - 1e-9
        self.left -= paid
        return paid


class NoCeiling(Purse):
    def call(self) -> None:
        self.left += self.ratio


class PaysNothing(Purse):
    def retry(self) -> bool:
        return bool(self.left >= 1)


class Empty(Purse):
    def __init__(self, ratio: float, reserve: float) -> None:
        self.ratio, self.reserve, self.left = ratio, reserve, 0.0


class Overdrawn(Purse):
    def retry(self) -> bool:
        paid = self.left > 0
        self.left -= paid
        return bool(paid)


WAITS = [
    ([1, 10, 60], 3), ([1, 2, 3, 10, 11, 12], 2), ([1, 2, 3, 10, 11, 12], 1), ([5, 5, 5], 2), ([1, 2, 4, 8, 16, 32], 3),
    ([30, 1, 29, 2, 15, 16, 3], 3), ([0.5, 0.7, 4, 4.5, 9], 2),
]  # fmt: skip


def _extra(levels: list[float], waits: list[float]) -> float:
    return max(min(level for level in levels if level >= wait) - wait for wait in waits)


def judge_2(levels: Any) -> None:
    for waits, count in WAITS:
        given = [*levels([*waits], count)]
        if not 1 <= len(given) <= count:
            raise Wrong(f"for {waits} and {count} topics it gives {len(given)} levels: {given}")
        if max(given) < max(waits):
            raise Wrong(f"for {waits} it gives {given}: the wait of {max(waits)} s finds no level that is long enough")
        sizes = range(1, min(count, len(set(waits))) + 1)
        choices = [pick for size in sizes for pick in itertools.combinations(sorted(set(waits)), size)]
        best = min(_extra([*pick], waits) for pick in choices if pick[-1] == max(waits))
        if (extra := _extra(given, waits)) > best + 1e-9:
            raise Wrong(f"for {waits} it gives {given}: some wait {extra:g} s more than asked; {best:g} is possible")


def levels(waits, count):
    waits = sorted(set(waits))
    for extra in sorted(longer - wait for wait in waits for longer in waits if longer >= wait):
        chosen = []
        for wait in waits:
            if not chosen or wait > chosen[-1]:
                chosen.append(max(other for other in waits if other <= wait + extra))
        if len(chosen) <= count:
            break
    return chosen


def evenly(waits: list[float], count: int) -> list[float]:
    return [max(waits) * step / count for step in range(1, count + 1)]


def doubling(waits: list[float], count: int) -> list[float]:
    return [max(waits) / 2**step for step in range(count)]


def one_for_each(waits: list[float], count: int) -> list[float]:
    return sorted(set(waits))


def the_shortest(waits: list[float], count: int) -> list[float]:
    return sorted(set(waits))[:count]


@dataclass(frozen=True)
class Record:
    """A record of a log."""

    key: str
    number: int


async def judge_3(run: Any) -> None:
    records = [Record(key, number) for number in range(4) for key in "abc"]
    failures, tries = {Record("a", 0): 5, Record("b", 2): 3, Record("a", 3): 1}, Counter[Record]()
    done: list[Record] = []
    others: dict[Record, list[int]] = defaultdict(list)

    async def handle(record: Record) -> None:
        await asyncio.sleep(0)
        tries[record] += 1
        if tries.total() > 500:
            raise Wrong("500 attempts, and it goes on")
        others[record].append(len({each for each in done if each.key != record.key}))
        if tries[record] <= failures.get(record, 0):
            raise ConnectionError("not now")
        done.append(record)

    try:
        async with asyncio.timeout(3):
            await run([*records], handle)
    except TimeoutError:
        raise Wrong(f"after 3 s it has not returned; handled were {len(done)} of {len(records)} records") from None
    except ConnectionError:
        raise Wrong("handle raised ConnectionError, and run let that out") from None
    if missing := [record for record in records if record not in done]:
        raise Wrong(f"{missing[0]} was never handled")
    if twice := [record for record, count in Counter(done).items() if count > 1]:
        raise Wrong(f"{twice[0]} was handled twice")
    for key in "abc":
        if (order := [each.number for each in done if each.key == key]) != [0, 1, 2, 3]:
            raise Wrong(f"the records of the key {key!r} were handled in the order {order}")
    if others[Record("a", 0)][1] == 0:
        raise Wrong("after the first failure of a's first record no other key had its turn before the second attempt")


async def run(records, handle):
    lanes = {}
    for record in records:
        lanes.setdefault(record.key, []).append(record)
    while lanes:
        for key, lane in [*lanes.items()]:
            try:
                await handle(lane[0])
            except ConnectionError:
                continue
            lane.pop(0)
            if not lane:
                del lanes[key]


async def to_the_end_of_the_log(records: Any, handle: Any) -> None:
    left = [*records]
    while left:
        record = left.pop(0)
        try:
            await handle(record)
        except ConnectionError:
            left.append(record)


async def everybody_waits(records: Any, handle: Any) -> None:
    for record in records:
        while True:
            try:
                await handle(record)
                break
            except ConnectionError:
                continue


async def gives_up(records: Any, handle: Any) -> None:
    for record in records:
        try:
            await handle(record)
        except ConnectionError:
            continue


async def handles_the_key_again(records: Any, handle: Any) -> None:
    for key in dict.fromkeys(record.key for record in records):
        lane = [record for record in records if record.key == key]
        done = False
        while not done:
            try:
                for record in lane:
                    await handle(record)
                done = True
            except ConnectionError:
                await asyncio.sleep(0)


TASKS = {
    "14.1": Task(
        question="A budget",
        start='Purse = ...\n\nawait mq.exercise("14.1").check(Purse)',
        hints=[
            "Keep one number: how many retries are left. `call` adds to it, `retry` takes 1 away when it is there.",
            "`min` keeps it at the reserve. And ten times 0.1 is not quite 1: compare with a little less.",
        ],
        solution=Purse,
        judge=judge_1,
        wrong=[NoCeiling, PaysNothing, Empty, Overdrawn],
    ),
    "14.2": Task(
        question="Choose the levels",
        start='levels = ...\n\nawait mq.exercise("14.2").check(levels)',
        hints=[
            "The levels of a best choice are among the waits, and the longest wait is one of them.",
            "If you knew the extra wait that is allowed: begin with the shortest wait, and take the longest level that "
            "it may use; go on with the shortest wait that is longer than this level.",
            "Try the differences between two waits, from small to large, until `count` levels are enough.",
        ],
        solution=levels,
        judge=judge_2,
        wrong=[evenly, doubling, one_for_each, the_shortest],
    ),
    "14.3": Task(
        question="Retry, and keep the order of each key",
        start='run = ...\n\nawait mq.exercise("14.3").check(run)',
        hints=[
            "A list of records for each key, in order. Only the first of each list may be tried.",
            "Go round all keys: one attempt each. What failed stays the first of its list.",
        ],
        solution=run,
        judge=judge_3,
        wrong=[to_the_end_of_the_log, everybody_waits, gives_up, handles_the_key_again],
    ),
}
