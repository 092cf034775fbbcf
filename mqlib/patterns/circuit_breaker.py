"""A circuit breaker around calls of a broker, or of what a consumer depends on.

Closed: calls pass, and their outcomes go into a sliding window. Open: calls are refused at once. Half-open: after a
while one call at a time may pass as a probe, and its outcome decides. After M. Nygard, "Release It!", and
https://learn.microsoft.com/azure/architecture/patterns/circuit-breaker.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, TypeVar

from aio_pika.exceptions import PublishError
from aiokafka import AIOKafkaProducer, errors
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed

from .sending import Unrouted

T = TypeVar("T")


class State(StrEnum):
    """What a breaker does with a call."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitOpen(ConnectionError):
    """The call was refused and not made; `retry_after` seconds from now the next probe may pass. That is 0 while one is
    under way: nobody knows when it ends."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the circuit is open; a probe may pass in {retry_after:.3g} s")
        self.retry_after = retry_after


REQUEST_ERRORS = (
    errors.MessageSizeTooLargeError, errors.InvalidTopicError, errors.TopicAuthorizationFailedError, Unrouted,
    PublishError, ChannelNotFoundEntity, ChannelAccessRefused, ChannelPreconditionFailed, TypeError, ValueError,
)  # fmt: skip
"""The caller's own mistakes. (An unknown topic is none: aiokafka 0.14 says so of a broker that does not answer.)"""


def is_failure(error: BaseException) -> bool:
    """Whether an error says that the other side is ill: everything except the caller's own mistakes."""
    return isinstance(error, Exception) and not isinstance(error, REQUEST_ERRORS)


class QueueCircuitBreaker:
    """Opens when `failure_rate` of the last `window` calls failed (of at least `minimum`).

    It stays open for `reset_seconds`, after each failed probe `backoff` times longer, up to `longest_reset`.
    `call_seconds` limits each call: one that takes longer counts as failed, and its outcome is unknown. Set it where a
    call may wait for ever, as a send of aiokafka's idempotent producer does: what never ends never fails. `failure`
    tells failures from the caller's own mistakes, which count as nothing: many are found before the other side is
    asked. `listeners` are called with the old and the new state; one that raises is reported to the event loop's
    exception handler. Not for several threads.
    """

    def __init__(
        self, window: int = 20, failure_rate: float = 0.5, minimum: int = 5, reset_seconds: float = 10.0,
        backoff: float = 2.0, longest_reset: float = 300.0, call_seconds: float | None = None,
        failure: Callable[[BaseException], bool] = is_failure, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not 1 <= minimum <= window:
            raise ValueError(f"minimum is from 1 to the window ({window}), not {minimum}")
        if not 0 < failure_rate <= 1:
            raise ValueError(f"failure_rate is above 0 and at most 1, not {failure_rate}")
        if reset_seconds <= 0 or backoff < 1 or longest_reset < reset_seconds:
            raise ValueError("reset_seconds must be positive, backoff at least 1, longest_reset at least reset_seconds")
        self.listeners: list[Callable[[State, State], object]] = []
        self.refused = 0
        """Calls that were refused."""
        self._window: deque[bool] = deque(maxlen=window)
        self._rate, self._minimum, self._call_seconds, self._failure = failure_rate, minimum, call_seconds, failure
        self._first_reset, self._backoff, self._longest_reset = reset_seconds, backoff, longest_reset
        self._clock = clock
        self._reset = reset_seconds
        self._open_until = 0.0
        self._state = State.CLOSED
        self._generation = 0  # of the state: what a call that began in another one comes to is no news
        self._probing = False

    @property
    def state(self) -> State:
        """The state now. An open breaker whose time is over is half-open for the next call."""
        if self._state is State.OPEN and self._clock() >= self._open_until:
            return State.HALF_OPEN
        return self._state

    async def execute(self, call: Callable[[], Awaitable[T]]) -> T:
        """Awaits `call()` if the circuit allows it.

        Raises `CircuitOpen` if it does not, `TimeoutError` after `call_seconds`, and what the call raises.
        """
        async with self.guard():
            return await call()

    def guard(self) -> _Guard:
        """The same, around a block: `async with breaker.guard(): …`."""
        return _Guard(self)

    def _admit(self) -> int:
        state = self.state
        if state is not State.CLOSED:
            if state is State.OPEN or self._probing:
                self.refused += 1
                raise CircuitOpen(max(self._open_until - self._clock(), 0.0))
            if self._state is State.OPEN:
                self._become(State.HALF_OPEN)
            self._probing = True
        return self._generation

    def _record(self, generation: int, error: BaseException | None) -> None:
        if generation != self._generation:
            return
        failed = error is not None
        if error is not None and not (isinstance(error, Exception) and self._failure(error)):
            self._probing = False  # nothing was learnt, as of a call that was cancelled, and the next caller may probe
            return
        if self._state is State.HALF_OPEN:
            self._probing = False
            if failed:
                self._reset = min(self._reset * self._backoff, self._longest_reset)
                self._open()
            else:
                self._reset = self._first_reset
                self._become(State.CLOSED)
            return
        self._window.append(failed)
        if failed and len(self._window) >= self._minimum and sum(self._window) >= self._rate * len(self._window):
            self._open()

    def _open(self) -> None:
        self._open_until = self._clock() + self._reset
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        before, self._state = self._state, state
        self._generation += 1
        self._window.clear()
        for listener in self.listeners:
            try:
                listener(before, state)
            except Exception as error:  # the caller is owed the outcome of its call
                context = {"message": "a circuit breaker's listener failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)


class _Guard:
    """One call. (A class, since a generator would double what a call costs.)"""

    __slots__ = ("_breaker", "_generation", "_limit")

    def __init__(self, breaker: QueueCircuitBreaker) -> None:
        self._breaker = breaker

    async def __aenter__(self) -> None:
        seconds = self._breaker._call_seconds
        self._limit = None if seconds is None else asyncio.timeout(seconds)
        self._generation = self._breaker._admit()
        if self._limit is not None:
            await self._limit.__aenter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if self._limit is not None:
                await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            error = late
            raise
        finally:
            self._breaker._record(self._generation, error)


async def send_with_circuit_breaker(
    breaker: QueueCircuitBreaker, producer: AIOKafkaProducer, topic: str, value: bytes, **options: Any
) -> Any:
    """`producer.send_and_wait(topic, value, **options)` through a breaker; returns the record's metadata.

    Raises `CircuitOpen` when it was not sent, and what `send_and_wait` raises.
    """
    return await breaker.execute(lambda: producer.send_and_wait(topic, value, **options))
