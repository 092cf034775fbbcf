"""Pieces that keep a fast side from drowning a slow one; each is bounded, and belongs to one event loop.

See Google's "Site Reliability Engineering", Handling Overload; the AWS Builders' Library on load shedding and fairness;
Reactive Streams. (aiolimiter 1.3 lets small requests overtake a large one for ever, and takes no clock.)
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from math import inf
from typing import Any, Generic, TypeVar

from aio_pika import Message
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from ..brokers.base import BrokerError
from ..queues import blocked
from ..topics import poll
from ..waiting import beside
from .link import GONE, Link
from .sending import NotSent, Refused, Unknown, send

T = TypeVar("T")
Clock = Callable[[], float]
ROUNDING, NOBODY = 1e-6, TopicPartition("", 0)


class Full(BrokerError):
    """There is no room, and waiting would only hide it: slow down, or let the caller try later."""


class Buffer(Generic[T]):
    """First in, first out, between two water marks: at `high` items its source is paused, at `low` it goes on.

    With `high_bytes` it is also paused at so many bytes, by `size(item)`, and goes on at half of them. `pause()` and
    `resume()` are called then. `peak` and `peak_bytes` are the most that it held, `pauses` how often it was paused.
    """

    def __init__(
        self, high: int, low: int | None = None, high_bytes: float = inf, size: Callable[[T], int] | None = None,
        pause: Callable[[], object] = lambda: None, resume: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.high, self.low, self.high_bytes = high, high // 2 if low is None else low, high_bytes
        if not 0 <= self.low < high or not high_bytes > 0 or (size is None and high_bytes < inf):
            raise ValueError(f"the low mark is below the high one: {self.low}, {high}; bytes need a size: {high_bytes}")
        self.paused, self.bytes, self.pauses, self.peak, self.peak_bytes = False, 0, 0, 0, 0
        self._size, self._items, self._content = size or (lambda _: 0), asyncio.Semaphore(0), deque[tuple[T, int]]()
        self._pause, self._resume, self._turn, self._open = pause, resume, asyncio.Lock(), asyncio.Event()

    def __len__(self) -> int:
        return len(self._content)

    async def put(self, item: T) -> None:
        """Adds an item, in the order of the calls, once the buffer is not paused: at most `high` get in that way."""
        async with self._turn:
            while self.paused:
                await self._open.wait()
            self.add(item)

    def add(self, item: T) -> None:
        """Adds an item at once, also while it is paused: for a source that hands over several at a time."""
        self._content.append((item, size := self._size(item)))
        self.bytes += size
        self.peak, self.peak_bytes = max(self.peak, len(self)), max(self.peak_bytes, self.bytes)
        self._items.release()
        if not self.paused and (len(self) >= self.high or self.bytes >= self.high_bytes):
            self.paused, self.pauses = True, self.pauses + 1
            self._open.clear()
            self._pause()

    async def get(self) -> T:
        """The oldest item; waits while there is none."""
        await self._items.acquire()
        item, size = self._content.popleft()
        self.bytes -= size
        if self.paused and len(self) <= self.low and self.bytes <= self.high_bytes / 2:
            self.paused = False
            self._open.set()
            self._resume()
        return item


@contextlib.asynccontextmanager
async def reading(
    consumer: AIOKafkaConsumer, buffer: Buffer[ConsumerRecord], max_records: int = 100
) -> AsyncIterator[Buffer[ConsumerRecord]]:
    """Fills the buffer from the consumer during the block, whose partitions are paused while the buffer is.

    It polls on meanwhile, to stay in its group, and takes each poll whole: the buffer holds less than `high` +
    `max_records`, the client one fetch a partition. Commit what is handled, by offset: what waits at the end, or when
    it is revoked, comes again. Raises what a poll raises, and `ValueError` for a consumer that commits by itself.
    """
    if consumer._group_id is not None and consumer._enable_auto_commit:
        raise ValueError("enable_auto_commit would commit what only waits in the buffer: switch it off")

    async def fill() -> None:
        while True:
            (consumer.pause if (paused := buffer.paused) else consumer.resume)(*consumer.assignment())  # new ones, too
            if paused:  # asked for them, aiokafka 0.14 would drop what it has fetched, into garbage that stays for long
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await consumer.getmany(NOBODY, timeout_ms=10)
                continue
            for records in (await poll(consumer, 0.1, max_records)).values():
                for record in records:
                    buffer.add(record)

    async with beside(fill()):
        yield buffer


class TokenBucket:
    """`rate` tokens a second drip into a bucket that holds `burst`, full at first. `ValueError` for more at once."""

    def __init__(
        self, rate: float, burst: float = 1, clock: Clock = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        if not (0 < rate < inf and 0 < burst < inf):
            raise ValueError(f"rate and burst are above 0 and finite, not {rate} and {burst}")
        self.rate, self.burst, self._clock, self._sleep = rate, burst, clock, sleep
        self._level, self._at, self._turn, self._waiting = float(burst), clock(), asyncio.Lock(), 0

    def _missing(self, count: float) -> float:
        if not 0 < count <= self.burst:
            raise ValueError(f"{count} tokens at once: the bucket holds its burst of {self.burst} at most")
        now = self._clock()
        self._level, self._at = min(self.burst, self._level + max(now - self._at, 0) * self.rate), now
        return missing if (missing := count - self._level) > ROUNDING else 0.0

    def try_acquire(self, count: float = 1) -> bool:
        """Takes the tokens if they are there and nobody waits for some; says whether it did."""
        taken = not self._missing(count) and not self._waiting
        self._level -= count * taken
        return taken

    async def acquire(self, count: float = 1) -> None:
        """Takes the tokens once they are there, in the order of the calls. One that is cancelled has taken none."""
        self._waiting += 1
        try:
            async with self._turn:
                while missing := self._missing(count):
                    await self._sleep(max(missing / self.rate, ROUNDING))
                self._level -= count
        finally:
            self._waiting -= 1


class Limiter:
    """At most `limit` at once, in the order of the calls, as in `async with limiter.slot()`; at most `waiting` wait.

    Between `least` and `most` (both `limit` unless given) it adapts: a little more after a success while it is in use,
    `backoff` times as much after an overload, once for all that had begun before (AIMD, as in TCP). An overload is one
    of `errors`, or a block of `slow` seconds. `in_flight` is how many are at it, `peak` the most that ever were.
    """

    def __init__(
        self, limit: float, waiting: int = 1000, least: float | None = None, most: float | None = None,
        slow: float = inf, errors: tuple[type[BaseException], ...] = (TimeoutError, Refused, Unknown),
        backoff: float = 0.7, clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        least, most = limit if least is None else least, limit if most is None else most
        if not (1 <= least <= limit <= most and 0 < backoff < 1 and waiting >= 0):
            raise ValueError(f"1 ≤ {least=} ≤ {limit=} ≤ {most=}, 0 < {backoff=} < 1 and 0 ≤ {waiting=} must hold")
        self.limit, self.waiting, self.in_flight, self.peak = limit, waiting, 0, 0
        self._range, self._slow, self._errors, self._backoff, self._clock = (least, most), slow, errors, backoff, clock
        self._turn, self._room, self._waiting, self._lowered = asyncio.Lock(), asyncio.Event(), 0, -inf

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A turn for the length of the block, however that ends. Raises `Full` when `waiting` wait already."""
        if self._waiting >= self.waiting and (self._waiting or self.in_flight + 1 > self.limit):
            raise Full(f"{self.in_flight} of {self.limit:g} are under way, and {self.waiting} wait already")
        self._waiting += 1
        try:
            async with self._turn:
                while self.in_flight + 1 > self.limit:
                    self._room.clear()
                    await self._room.wait()
                self.in_flight += 1
        finally:
            self._waiting -= 1
        self.peak, began = max(self.peak, self.in_flight), self._clock()
        try:
            yield
            self._learn(began, self._clock() - began >= self._slow)
        except self._errors:
            self._learn(began, True)
            raise
        finally:
            self.in_flight -= 1
            self._room.set()

    def _learn(self, began: float, overload: bool) -> None:
        least, most = self._range
        if overload and began > self._lowered:
            self.limit, self._lowered = max(least, self.limit * self._backoff), self._clock()
        elif not overload and self.in_flight * 2 >= self.limit:
            self.limit = min(most, self.limit + 1 / self.limit)


async def send_bounded(
    limiter: Limiter, connection: Link, message: Message, routing_key: str, exchange: str = "", within: float = 5.0
) -> None:
    """`sending.send` in a slot of the limiter, `within` seconds in all: what is not confirmed yet is bounded.

    While an alarm is known to block the connection nothing more is handed over, and that is `NotSent`; only what was
    under way is `Unknown`. Raises `Full` as the limiter does.
    """
    end, why = time.monotonic() + within, f"none of {limiter.limit:g} slots was free"
    try:
        async with asyncio.timeout(within) as limit, limiter.slot():
            why = "no connection"
            with contextlib.suppress(*GONE):  # then `send` waits for the next one
                while alarm := await blocked(await connection.channel()):
                    why = f"blocked by broker ({alarm})"
            limit.reschedule(None)  # `send` has its own
            await send(connection, message, routing_key, exchange, end - time.monotonic())
    except TimeoutError:
        words = f"message {message.message_id} to {routing_key!r}: {why} within {within:g} s; it is stored nowhere"
        raise NotSent(message.message_id or "", words) from None


def deadline(within: float, clock: Clock = time.time) -> dict[str, Any]:
    """The headers of a message that is of use for so many seconds (for Kafka: as digits in bytes)."""
    return {"sent": (now := int(clock() * 1000)), "deadline": now + int(within * 1000)}


class Shedder:
    """A handler, for `link.consuming` or `consumer.consume`, that hands on to `handle` what is not late, and drops the
    rest: `shed` counts that by reason, `told(message, reason)` hears of each. It is neither handled nor lost.
    Late is what `seconds` of work would end after its deadline, or was sent `max_age` seconds ago, if clocks agree.
    """

    def __init__(
        self, handle: Callable[[Any], Awaitable[Any]], seconds: float = 0.0, max_age: float = inf,
        clock: Clock = time.time, told: Callable[[Any, str], object] = lambda message, reason: None,
    ) -> None:  # fmt: skip
        self.shed, self._handle, self._clock, self._told = Counter[str](), handle, clock, told
        self._limits = {"deadline": seconds * 1000, "sent": -max_age * 1000}

    async def __call__(self, message: Any) -> None:
        """Raises what `handle` and `late` do: such a message is not shed."""
        if reason := self.late(message.headers):
            self._told(message, reason)
            self.shed[reason] += 1
        else:
            await self._handle(message)

    def late(self, headers: Mapping[str, Any] | Sequence[tuple[str, bytes]]) -> str | None:
        """Which header says that it is late (deadline, sent), or None. `ValueError` for one that is no integer."""
        found, now = dict(headers), self._clock() * 1000
        for name, limit in self._limits.items():
            value = found.get(name, inf)
            if not (value == inf or isinstance(value, int) or (isinstance(value, bytes) and value.isdigit())):
                raise ValueError(f"the header {name} is ms since 1970, an integer (floats lose a minute): {value!r}")
            if now + limit > float(value):
                return name
        return None


class FairQueue(Generic[T]):
    """Items of many tenants, who take turns however much each puts in: at most `each` of a tenant, and `total` of all.

    A tenant of weight 3 (1 unless given) is served three times as often as one of weight 1 while both wait; each one's
    own items stay in order. `waiting` counts them. After Golestani, "A self-clocked fair queueing scheme", 1994.
    """

    def __init__(self, each: int = 100, total: int = 10_000, weights: Mapping[str, float] | None = None) -> None:
        self.each, self.total, self.waiting, self._weights = each, total, Counter[str](), weights or {}
        if min(each, total) < 1 or not all(weight > 0 for weight in self._weights.values()):
            raise ValueError(f"limits are at least 1, weights above 0: not {each}, {total}, {weights}")
        self._heap: list[tuple[float, int, str, T]] = []
        self._items, self._finish, self._now, self._number = asyncio.Semaphore(0), dict[str, float](), 0.0, 0

    def put(self, tenant: str, item: T) -> None:
        """Adds an item. Raises `Full` when the tenant, or the queue, holds as many as it may."""
        mine, all_ = self.waiting[tenant], len(self._heap)
        if mine >= self.each or all_ >= self.total:
            raise Full(f"{mine} items of tenant {tenant!r} wait, {self.each} may; of all {all_}, {self.total} may")
        # When it would be done, were all tenants served at once, each by its weight.
        finish = max(self._now, self._finish.get(tenant, 0.0)) + 1 / self._weights.get(tenant, 1)
        self._finish[tenant], self._number = finish, self._number + 1
        heapq.heappush(self._heap, (finish, self._number, tenant, item))
        self.waiting[tenant] += 1
        self._items.release()

    async def get(self) -> tuple[str, T]:
        """The tenant whose turn it is, and its item; waits while there is none."""
        await self._items.acquire()
        self._now, _, tenant, item = heapq.heappop(self._heap)
        self.waiting[tenant] -= 1
        if not self.waiting[tenant]:
            del self.waiting[tenant], self._finish[tenant]
        return tenant, item
