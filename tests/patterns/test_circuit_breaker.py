"""The breaker opens for illness, not for mistakes; one probe at a time; late and cancelled calls decide nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib.patterns.circuit_breaker import (
    CircuitOpen,
    QueueCircuitBreaker,
    State,
    is_failure,
    send_with_circuit_breaker,
)


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def fine() -> str:
    return "fine"


async def ill() -> None:
    raise KafkaConnectionError("no answer")


async def opened(clock: Clock, **options: Any) -> QueueCircuitBreaker:
    """A breaker that has just opened, for ten seconds."""
    breaker = QueueCircuitBreaker(minimum=2, clock=clock, **options)
    for _ in range(2):
        with pytest.raises(KafkaConnectionError):
            await breaker.execute(ill)
    assert breaker.state is State.OPEN
    return breaker


async def test_an_open_circuit_refuses_without_calling() -> None:
    clock, calls = Clock(), list[int]()
    breaker = await opened(clock)

    async def call() -> None:
        calls.append(1)

    clock.now = 4.0
    with pytest.raises(CircuitOpen, match="a probe may pass in 6 s") as refused:
        await breaker.execute(call)
    assert (refused.value.retry_after, calls, breaker.refused) == (6.0, [], 1)


async def test_half_open_one_probe_passes_and_a_late_success_does_not_override_its_failure() -> None:
    """Ten callers at once: one runs, nine are refused; the probe fails, so it is open again, and for longer."""
    clock = Clock()
    breaker = await opened(clock)
    clock.now = 10.0
    assert str(breaker.state) == "half-open"
    gate, ran = asyncio.Event(), list[int]()

    async def probe() -> None:
        ran.append(1)
        await gate.wait()
        raise KafkaConnectionError("still no answer")

    calls = [asyncio.create_task(breaker.execute(probe)) for _ in range(10)]
    await asyncio.sleep(0)
    gate.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [KafkaConnectionError] + [CircuitOpen] * 9
    assert (len(ran), str(breaker.state)) == (1, "open")
    clock.now = 29.9
    assert str(breaker.state) == "open", "twice as long"
    clock.now = 30.0
    assert await breaker.execute(fine) == "fine"
    assert breaker.state is State.CLOSED
    assert (await opened_again(breaker, clock)) == 10.0, "a success sets the interval back"


async def opened_again(breaker: QueueCircuitBreaker, clock: Clock) -> float:
    for _ in range(2):
        with pytest.raises(KafkaConnectionError):
            await breaker.execute(ill)
    with pytest.raises(CircuitOpen) as refused:
        await breaker.execute(fine)
    return refused.value.retry_after


@pytest.mark.parametrize("late", ["success", "failure"])
async def test_a_call_from_before_the_opening_decides_nothing(late: str) -> None:
    """Neither a late success closes the circuit, nor a late failure lengthens the interval or ends a probe."""
    clock, gate = Clock(), asyncio.Event()
    breaker = QueueCircuitBreaker(minimum=2, clock=clock)

    async def slow() -> None:
        await gate.wait()
        if late == "failure":
            raise KafkaConnectionError("late")

    before = asyncio.create_task(breaker.execute(slow))
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(KafkaConnectionError):
            await breaker.execute(ill)
    clock.now = 5.0
    gate.set()
    await asyncio.gather(before, return_exceptions=True)
    assert breaker.state is State.OPEN
    clock.now = 10.0
    assert await breaker.execute(fine) == "fine"


async def test_a_cancelled_probe_frees_its_place() -> None:
    clock = Clock()
    breaker = await opened(clock)
    clock.now = 10.0
    probe = asyncio.create_task(breaker.execute(asyncio.Event().wait))
    await asyncio.sleep(0)
    with pytest.raises(CircuitOpen):
        await breaker.execute(fine)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert breaker.state is State.HALF_OPEN
    assert await breaker.execute(fine) == "fine"


async def test_the_callers_own_mistakes_do_not_open_it() -> None:
    breaker = QueueCircuitBreaker(minimum=2, clock=Clock())

    async def mistake() -> None:
        raise MessageSizeTooLargeError

    for _ in range(20):
        with pytest.raises(MessageSizeTooLargeError):
            await breaker.execute(mistake)
    assert breaker.state is State.CLOSED
    assert not is_failure(asyncio.CancelledError())


async def test_a_call_that_takes_too_long_counts_as_failed() -> None:
    breaker = QueueCircuitBreaker(minimum=2, call_seconds=0.01)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await breaker.execute(asyncio.Event().wait)
    assert breaker.state is State.OPEN


async def test_listeners_hear_each_change() -> None:
    clock, heard = Clock(), list[tuple[State, State]]()
    breaker = QueueCircuitBreaker(minimum=2, clock=clock)
    breaker.listeners.append(lambda *change: heard.append(change))
    await opened_again(breaker, clock)
    clock.now = 10.0
    await breaker.execute(fine)
    assert heard == [
        (State.CLOSED, State.OPEN), (State.OPEN, State.HALF_OPEN), (State.HALF_OPEN, State.CLOSED),
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(strategies.lists(strategies.booleans(), max_size=60), strategies.integers(1, 6), strategies.integers(0, 4),
       strategies.sampled_from([0.25, 0.4, 0.5, 1.0]))  # fmt: skip
def test_it_opens_exactly_when_the_window_says_so(outcomes: list[bool], minimum: int, more: int, rate: float) -> None:
    """Against the sentence that describes it, for every sequence of outcomes."""
    breaker = QueueCircuitBreaker(window=minimum + more, minimum=minimum, failure_rate=rate, clock=Clock())

    async def run() -> None:
        last: deque[bool] = deque(maxlen=minimum + more)
        for failed in outcomes:
            last.append(failed)
            await asyncio.gather(breaker.execute(ill if failed else fine), return_exceptions=True)
            should = failed and len(last) >= minimum and sum(last) >= rate * len(last)
            assert (breaker.state is State.OPEN) is should
            if should:
                return

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minimum": 30}, "minimum is from 1 to the window"), ({"failure_rate": 0}, "failure_rate is above 0"),
     ({"reset_seconds": 0}, "must be positive"), ({"backoff": 0.5}, "backoff at least 1")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueueCircuitBreaker(**options)


async def test_sending_through_it_to_a_broker_that_freezes_and_comes_back() -> None:
    """Calls fail fast while it is away; what had no answer is unknown, and the ledger shows that it is not lost."""
    ledger = mq.Ledger()
    with mq.kafka(private=True) as kafka:
        topic = await mq.topic(kafka, "guarded")
        breaker = QueueCircuitBreaker(minimum=2, reset_seconds=0.2, backoff=1, longest_reset=0.2, call_seconds=0.5)

        async def send(number: int) -> None:
            ledger.sent(number)
            try:
                await send_with_circuit_breaker(breaker, producer, topic, b"%d" % number)
            except CircuitOpen:
                ledger.failed(number)
            except TimeoutError:
                pass  # unknown
            else:
                ledger.acknowledged(number)

        async with mq.producer(kafka) as producer:
            await send(0)
            async with mq.paused(kafka.nodes[0]):
                for number in range(1, 10):
                    await send(number)
                assert breaker.refused >= 5
            number = 10

            async def recovered() -> bool:
                nonlocal number
                await send(number)
                number += 1
                return breaker.state is State.CLOSED

            await mq.until(recovered, within=20, every=0.1)
        for record in await mq.read(kafka, topic):
            ledger.received(int(record.value))
    assert (ledger.lost, ledger.duplicated) == (0, 0)
    assert ledger.unknown >= 1
    assert ledger.delivered_although_unacknowledged == ledger.unknown, "a timeout is not a failure: they came later"
