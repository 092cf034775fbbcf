"""The exercises of notebook 15: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aio_pika import Message
from aio_pika.exceptions import DeliveryError

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.flow import Buffer
from mqlib.patterns.link import consuming


async def judge_1(answer: Any) -> None:
    buffer, most, resumed = Buffer[int](500, 200), 0, -1
    for before in (0, 250, 499):  # how many wait when the next poll is accepted
        while len(buffer) > before:
            await buffer.get()
        while len(buffer) < before:
            buffer.add(0)
        for _ in range(300):
            buffer.add(0)
        most = max(most, len(buffer))
        while buffer.paused:
            await buffer.get()
            resumed = len(buffer)
    try:
        given = tuple(int(number) for number in answer)
    except (TypeError, ValueError):
        raise Wrong(f"give two numbers, as (most, resumed); this is {answer!r}") from None
    if len(given) != 2:
        raise Wrong(f"give two numbers, as (most, resumed); these are {len(given)}")
    if given[0] != most:
        raise Wrong(f"the most that can wait is not {given[0]}: how many wait when the last poll is still asked for?")
    if given[1] != resumed:
        raise Wrong(f"it is not resumed when {given[1]} wait")


class _Watched:
    """An exchange that counts the publishes that are under way."""

    def __init__(self, exchange: Any) -> None:
        self.now = self.peak = self.refused = 0
        self._exchange = exchange

    async def publish(self, message: Message, routing_key: str, **options: Any) -> Any:
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            return await self._exchange.publish(message, routing_key, **options)
        except DeliveryError:
            self.refused += 1
            raise
        finally:
            self.now -= 1


async def judge_2(publish_all: Any) -> None:
    rabbit, ledger, window = mq.rabbitmq(), mq.Ledger(), 8
    for number in range(60):
        ledger.sent(number)

    async def slow(message: Any) -> None:
        await asyncio.sleep(0.004)
        ledger.received(int(message.body))

    arguments: dict[str, Any] = {"x-max-length": 5, "x-overflow": "reject-publish"}
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True, arguments=arguments)
        exchange = _Watched(channel.default_exchange)
        async with consuming(rabbit, queue.name, slow, prefetch=1):
            try:
                async with asyncio.timeout(5):
                    await publish_all(exchange, queue.name, [b"%d" % number for number in range(60)], window)
            except TimeoutError:
                raise Wrong(f"after 5 s it had not returned; {len(ledger.missing())} of 60 are not stored") from None
            except DeliveryError:
                raise Wrong("a DeliveryError came out of it: the queue was full, and the body was not stored") from None
            stored = mq.until(lambda: not ledger.missing(), within=1)
            await asyncio.gather(stored, return_exceptions=True)
    if exchange.peak > window:
        raise Wrong(f"{exchange.peak} were under way at once, and the window is {window}")
    if ledger.missing():
        raise Wrong(f"{len(ledger.missing())} bodies were never stored; {exchange.refused} publishes were refused")
    if ledger.duplicated:
        raise Wrong(f"{ledger.duplicated} bodies were stored more than once")
    if exchange.peak < 2:
        raise Wrong("it publishes one by one: use the window")


async def publish_all(exchange, queue, bodies, window):
    from aio_pika import Message
    from aio_pika.exceptions import DeliveryError

    slots = asyncio.Semaphore(window)

    async def publish(body):
        async with slots:
            for _ in range(1000):
                try:
                    await exchange.publish(Message(body), queue)
                    break
                except DeliveryError:
                    await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for body in bodies:
            group.create_task(publish(body))


async def never_waits(exchange: Any, queue: str, bodies: list[bytes], window: int) -> None:
    await publish_all(exchange, queue, bodies, len(bodies))


async def gives_up(exchange: Any, queue: str, bodies: list[bytes], window: int) -> None:
    for start in range(0, len(bodies), window):
        some = (exchange.publish(Message(body), queue) for body in bodies[start : start + window])
        await asyncio.gather(*some, return_exceptions=True)


async def one_by_one(exchange: Any, queue: str, bodies: list[bytes], window: int) -> None:
    await publish_all(exchange, queue, bodies, 1)


async def raises(exchange: Any, queue: str, bodies: list[bytes], window: int) -> None:
    for body in bodies:
        await exchange.publish(Message(body), queue)


def judge_3(adapt: Any) -> None:
    limit, place = 1.0, 0
    for capacity, calls in ((20, 1500), (5, 1500), (20, 1000)):
        limits = list[float]()
        while len(limits) < calls:
            at_once = int(limit)
            for _ in range(at_once):  # a round: as many calls at once as the limit allows
                limit = adapt(limit, at_once > capacity)
                place += 1
                if not isinstance(limit, int | float) or not limit >= 1:
                    raise Wrong(f"after call {place} the limit is {limit!r}: it is a number, 1 or more")
                if limit > 1000:
                    raise Wrong(f"after call {place} the limit is {limit:,.0f}: it never comes down")
                limits.append(limit)
        settled = limits[calls // 2 :]
        mean, over = sum(settled) / len(settled), sum(each >= capacity + 2 for each in settled) / len(settled)
        if mean < capacity * 0.4:
            raise Wrong(f"the capacity is {capacity}, and the limit stays at {mean:.1f} in the mean: raise it sooner")
        if over > 0.5 or mean > capacity * 1.3:
            raise Wrong(f"the capacity is {capacity}, and the limit is at {mean:.1f} in the mean: cut it deeper")


def adapt(limit, overloaded):
    return max(1, limit * 0.9) if overloaded else limit + 1 / limit


def stays(limit: float, overloaded: bool) -> float:
    return 10


def only_rises(limit: float, overloaded: bool) -> float:
    return limit + 1 / limit


def never_recovers(limit: float, overloaded: bool) -> float:
    return max(1, limit / 2) if overloaded or limit > 4 else limit + 1 / limit


def falls_below_one(limit: float, overloaded: bool) -> float:
    return limit * 0.5 if overloaded else limit * 0.9


TASKS = {
    "15.1": Task(
        question="How many can wait?",
        start='answer = ...\n\nawait mq.exercise("15.1").check(answer)',
        hints=[
            "A poll is accepted whole. It is asked for as long as the high mark is not reached.",
            "At most one below the high mark, and one whole poll more.",
        ],
        solution=None,
        code="answer = 799, 200",
        judge=judge_1,
        wrong=[(500, 200), (800, 200), (799, 199), (799,), 799, "many"],
    ),
    "15.2": Task(
        question="A publisher that feels the back-pressure",
        start='publish_all = ...\n\nawait mq.exercise("15.2").check(publish_all)',
        hints=[
            "An `asyncio.Semaphore(window)` around each publish bounds what is under way.",
            "A body that was refused keeps its place in the window while it waits: that is what slows the others down.",
        ],
        solution=publish_all,
        judge=judge_2,
        wrong=[never_waits, gives_up, one_by_one, raises],
    ),
    "15.3": Task(
        question="Find the capacity",
        start='adapt = ...\n\nawait mq.exercise("15.3").check(adapt)',
        hints=[
            "Add a little for a success, and take a part away for an overload.",
            "All calls of a round meet the same overload, so each should take only a small part away.",
        ],
        solution=adapt,
        judge=judge_3,
        wrong=[stays, only_rises, never_recovers, falls_below_one],
    ),
}
