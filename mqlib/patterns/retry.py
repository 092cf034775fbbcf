"""Retries with a limit, for calls and for messages: when to stop, how long to wait, which errors are worth it.

The policies are tenacity's, which combine: `stop_after_attempt(5) | stop_after_delay(60)`, `wait_fixed(1) + …`. Here
is what it lacks: a retry budget, full jitter with a seed, and messages that wait in the broker while others go on, in
retry topics of Kafka and in the delay queues of RabbitMQ. Such a message is overtaken by later ones of its key.
After https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter,
https://sre.google/sre-book/handling-overload, https://www.uber.com/blog/reliable-reprocessing.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tenacity
from aio_pika.abc import AbstractIncomingMessage
from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, KafkaTimeoutError
from tenacity.retry import retry_base
from tenacity.stop import stop_any, stop_base
from tenacity.wait import wait_base

from ..brokers import BrokerError, RabbitMQ
from ..brokers.base import Connectable
from ..queues import channel
from ..topics import described, producer
from ..waiting import until
from .consumer import Policy, consume
from .dead_letter import NOT_SENT_BACK, setup_dlq
from .delays import Delays
from .link import Consumer, consuming, uncancelled
from .scheduler import now_ms
from .sending import ERROR_CHARACTERS, Unconfirmed, bury

SPREAD_SECONDS, PAUSE_SECONDS = 5.0, 0.5


class Permanent(Exception):
    """What a handler raises when no further attempt can help."""


PERMANENT = (Permanent, ValueError, TypeError)
"""Unless told otherwise every other error is worth another attempt. (A body that does not parse never will.)"""


class FullJitter(wait_base):
    """Any time from 0 to `base * 2 ** (attempt - 1)` seconds, at most `cap`; with a seeded `rng` a test repeats."""

    def __init__(self, base: float = 0.1, cap: float = 60.0, rng: random.Random | None = None) -> None:
        self.base, self.cap, self.rng = base, cap, rng or random.Random()

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        return self.rng.uniform(0, min(self.cap, self.base * 2 ** min(retry_state.attempt_number - 1, 64)))


def ladder(*seconds: float) -> wait_base:
    """Waits of these lengths, one after the other; the last again and again."""
    return tenacity.wait_chain(*map(tenacity.wait_fixed, seconds))


class Budget(stop_base):
    """Retries that a process may spend: each first attempt earns `ratio`, each retry costs 1, `reserve` is there.

    So an outage multiplies the load by 1 + ratio, not by the attempts. After Finagle's RetryBudget; share it widely.
    """

    def __init__(self, ratio: float = 0.1, reserve: float = 10.0) -> None:
        if not 0 <= ratio <= 1 <= reserve:
            raise ValueError(f"a ratio is from 0 to 1, and a reserve at least 1: not {ratio} and {reserve}")
        self.ratio, self.reserve, self.left = ratio, reserve, reserve

    def begin(self, attempt: int) -> None:
        """Counts an attempt: the first one earns."""
        self.left = min(self.reserve, self.left + self.ratio * (attempt == 1))

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        """Pays for a retry, and stops when there is too little left."""
        affordable = self.left > 1 - 1e-9
        self.left -= affordable
        return not affordable


@dataclass(frozen=True)
class RetryPolicy:
    """Which errors are tried again, how often, after how long: tenacity's parts, in seconds."""

    stop: stop_base = field(default_factory=lambda: tenacity.stop_after_attempt(4))
    wait: wait_base = field(default_factory=FullJitter)
    retry: retry_base = field(default_factory=lambda: tenacity.retry_if_not_exception_type(PERMANENT))
    budget: Budget | None = None

    def calls(self, **options: Any) -> tenacity.AsyncRetrying:
        """For calls: `await policy.calls()(function, …)`. Raises the last error; `options` are tenacity's."""
        if budget := self.budget:
            options = {"before": lambda state: budget.begin(state.attempt_number), **options}
        stop = self.stop | budget if budget else self.stop
        return tenacity.AsyncRetrying(stop=stop, wait=self.wait, retry=self.retry, reraise=True, **options)

    def verdict(self, error: BaseException, attempt: int, age: float) -> float | str:
        """For messages: seconds until the next attempt; or why there is none: permanent, budget, or the stop's name.

        `attempt` counts from 1, `age` is the message's, in seconds. Pays from the budget.
        """
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = attempt
        state.set_exception((type(error), error, error.__traceback__))
        state.start_time = (state.outcome_timestamp or 0) - age
        if not self.retry(state):
            return "permanent"
        state.upcoming_sleep = self.wait(state)
        if (reason := _stopped(self.stop, state)) or (self.budget and self.budget(state)):
            return reason or "budget"
        return float(state.upcoming_sleep)


def _stopped(stop: Any, state: tenacity.RetryCallState) -> str | None:
    """The name of the first stop that says so, as `after_attempt`."""
    if isinstance(stop, stop_any):
        return next((name for each in stop.stops if (name := _stopped(each, state))), None)
    return type(stop).__name__.removeprefix("stop_") if stop(state) else None


class Retries:
    """What became of messages; by `retry_topics` and `retry_queue`. One that is delivered twice counts twice."""

    def __init__(self, handle: Callable[[Any], Awaitable[Any]], policy: RetryPolicy, clock: Callable[[], int]) -> None:
        self.handled = self.retried = self.dead_lettered = 0
        self.unconfirmed = 0
        """Copies that the broker did not confirm: it may have them, and they are sent again."""
        self.consumer: Consumer
        """What delivers, on RabbitMQ."""
        self._handle, self._policy, self._clock = handle, policy, clock

    async def outcome(self, message: Any, attempt: int, first: int) -> tuple[float | str, Exception | None]:
        """Handles it; the policy's verdict and the error, if there is one."""
        if self._policy.budget:
            self._policy.budget.begin(attempt)
        try:
            with uncancelled():
                await self._handle(message)
        except Exception as error:
            return self._policy.verdict(error, attempt, (self._clock() - first) / 1000), error
        self.handled += 1
        return 0.0, None


async def _make_topics(kafka: Connectable, like: str, names: list[str]) -> None:
    async def ready(*names: str) -> list[dict[str, Any]]:
        found = await described(admin, [*names])
        bad = any(part["error_code"] for each in found for part in (each, *each["partitions"]))
        return [] if bad else found

    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        parts = (await until(lambda: ready(like), SPREAD_SECONDS))[0]["partitions"]
        new = [NewTopic(name, len(parts), len(parts[0]["replicas"])) for name in names]
        errors = (await admin.create_topics(new)).topic_errors
        if refused := [each for each in errors if each[1] not in (0, 36)]:  # 36: it is there
            raise BrokerError(f"Kafka refuses the topic {refused[0][0]!r}: {refused[0][2]}")
        await until(lambda: ready(*names), SPREAD_SECONDS)
    except TimeoutError:
        raise BrokerError(f"Kafka has no topic {like!r}, or no leader for its partitions") from None
    finally:
        await admin.close()


@contextlib.asynccontextmanager
async def retry_topics(
    kafka: Connectable, topic: str, group: str, handle: Callable[[ConsumerRecord], Awaitable[Any]],
    policy: RetryPolicy | None = None, levels: Sequence[float] = (1, 10, 60), name: str | None = None,
    by: Literal["partition", "key"] = "key", concurrency: int = 16, drain: float = 5.0,
    clock: Callable[[], int] = now_ms, **options: Any,
) -> AsyncIterator[Retries]:  # fmt: skip
    """Runs `handle(record)` for each record of the topic; one that fails does not hold up those behind it.

    It is sent on to `{name}.retry.1`, `.2`, …, made if they are not there: to the first whose level, in seconds, is not
    shorter than its wait. There it is handled when it is due, up to a level late where waits differ within a level. At
    the end it goes to `{name}.dlt`. Without a `policy` it waits one level after the other. `name` is the topic's unless
    told; groups that read the same topic need one each.
    Headers: `retry-attempts`, `-first-seen` and `-due` (ms since 1970), `-topic`, `-partition`, `-offset`, `-timestamp`
    (of the record that came first), `-group`, `-error`; of dead letters `dead-letter-…`, with a `-reason`. At least
    once. Raises `BrokerError` for a missing topic, `HandlerFailed` when a copy is refused. `options`: the consumers'.
    """
    policy = policy or RetryPolicy(tenacity.stop_after_attempt(len(levels) + 1), ladder(*levels))
    name, leaving, work = name or topic, asyncio.Event(), Retries(handle, policy, clock)
    later, dead = [f"{name}.retry.{level}" for level, _ in enumerate(levels, 1)], f"{name}.dlt"

    async def attempt(record: ConsumerRecord) -> None:
        # What comes to the topic itself starts anew, also what somebody sent back with its headers.
        known = {} if record.topic == topic else dict(record.headers)
        left, number = int(known.get("retry-due", 0)) - clock(), int(known.get("retry-attempts", 0)) + 1
        task = asyncio.current_task()
        with contextlib.suppress(TimeoutError):
            if left > 0 and await asyncio.wait_for(leaving.wait(), left / 1000) and task:
                task.cancel()  # as the consumer does with one that takes too long: it is not handled, nor committed
                await asyncio.sleep(0)
        first = int(known.get("retry-first-seen", clock()))
        verdict, error = await work.outcome(record, number, first)
        if error is None:
            return
        about: dict[str, Any] = {"attempts": number, "first-seen": first, "group": group}
        about["error"] = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
        for place in ("topic", "partition", "offset", "timestamp"):
            about[place] = known[f"retry-{place}"].decode() if known else getattr(record, place)
        if isinstance(verdict, str):
            await store(dead, record, "dead-letter", {**about, "reason": verdict})
            work.dead_lettered += 1
        else:
            level = next((at for at, longest in enumerate(levels) if verdict <= longest), len(levels) - 1)
            await store(later[level], record, "retry", {**about, "due": clock() + math.ceil(verdict * 1000)})
            work.retried += 1

    async def store(to: str, record: ConsumerRecord, prefix: str, about: dict[str, Any]) -> None:
        own = [header for header in record.headers if not header[0].startswith("retry-")]
        headers = [*own, *((f"{prefix}-{name}", str(value).encode()) for name, value in about.items())]
        value = b"" if record.value is record.key is None else record.value  # both None are refused by aiokafka
        while True:
            try:
                await sending.send_and_wait(to, value, key=record.key, headers=headers)
                return
            except KafkaError as refused:
                if not (refused.retriable or isinstance(refused, KafkaTimeoutError)):
                    raise
                work.unconfirmed += 1
                await asyncio.sleep(PAUSE_SECONDS)

    await _make_topics(kafka, topic, [*later, dead])
    waiting = Policy(concurrency=100_000, drain=drain)  # who waits until it is due takes a slot, too
    async with (
        producer(kafka, acks="all") as sending,
        consume(kafka, [topic], group, attempt, Policy(by=by, concurrency=concurrency, drain=drain), **options),
        consume(kafka, later, f"{group}.retry", attempt, waiting, **options),
    ):
        try:
            yield work
        finally:
            leaving.set()


async def setup_retries(rabbit: RabbitMQ, queue: str, delays: Delays, deliveries: int = 5) -> str:
    """Declares a quorum queue, its dead letters (by `setup_dlq`) and the delays; returns the dead letters' queue.

    A message that ends its worker's process `deliveries` times in a row is set aside by the broker. Safe to repeat.
    Raises what `setup_dlq` does.
    """
    dead = await setup_dlq(rabbit, queue, {"x-queue-type": "quorum", "x-delivery-limit": max(deliveries - 1, 0)})
    async with channel(rabbit) as declaring:
        await delays.declare(declaring)
        await delays.bind(declaring, queue)
    return dead


@contextlib.asynccontextmanager
async def retry_queue(
    rabbit: Connectable, queue: str, handle: Callable[[AbstractIncomingMessage], Awaitable[Any]], delays: Delays,
    policy: RetryPolicy | None = None, prefetch: int = 10, drain: float = 5.0, clock: Callable[[], int] = now_ms,
) -> AsyncIterator[Retries]:  # fmt: skip
    """Runs `handle(message)` for each message of a queue that `setup_retries` made; one that fails waits in `delays`.

    It comes back to this queue with the headers `retry-attempts` and `retry-first-seen` (ms since 1970). A delivery
    that ended with its process or its connection is an attempt, too. Dead letters have `dead-letter-reason`,
    `-attempts`, `-error`, `-queue`, `-first-seen`; the broker's have `x-death`. At least once: a crash may double one.
    """
    work = Retries(handle, policy or RetryPolicy(), clock)
    ours = ("retry-attempts", "retry-first-seen", "x-delivery-count")

    async def attempt(message: Any) -> None:
        # Not by x-death: RabbitMQ 4 begins it anew when a program sends a message again, and 3 goes on counting.
        before, first, returns = (message.headers.get(name) for name in ours)
        number = 1 + sum(count for count in (before, returns) if isinstance(count, int))
        first = first if isinstance(first, int) else clock()
        verdict, error = await work.outcome(message, number, first)
        if error is None:
            return
        headers = {key: it for key, it in message.headers.items() if not (key in ours or NOT_SENT_BACK.match(key))}
        if isinstance(verdict, str):
            died = {"x-first-death-queue": queue, "x-first-death-reason": verdict}  # by which `redrive` knows it
            message.headers = {**headers, **died, "dead-letter-reason": verdict, "dead-letter-first-seen": first}
            await bury(work.consumer.link, message, error, number, queue, queue, f"{queue}.dlx")
            work.dead_lettered += 1
            return
        again = copy.copy(message)
        again.headers, again.expiration = {**headers, ours[0]: number, ours[1]: first}, None
        try:
            await delays.send(work.consumer.link, queue, again, min(math.ceil(verdict * 1000), delays.longest))
            work.retried += 1
        except Unconfirmed:
            work.unconfirmed += 1
            await message.reject(requeue=True)

    async with consuming(rabbit, queue, attempt, prefetch, drain=drain) as work.consumer:
        yield work
