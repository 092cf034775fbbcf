"""The breaker opens for illness, not for mistakes; one probe at a time; late and cancelled calls decide nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelInvalidStateError
from aiokafka.errors import KafkaConnectionError, KafkaError, MessageSizeTooLargeError
from hypothesis import given, settings, strategies

import mqlib as mq
from mqlib.patterns.circuit_breaker import (
    REQUEST_ERRORS,
    CircuitOpen,
    QueueCircuitBreaker,
    State,
    is_failure,
    send_with_circuit_breaker,
)
from mqlib.patterns.link import GONE, link
from mqlib.patterns.sending import send


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


async def test_calls_that_their_callers_cancelled_are_no_failures() -> None:
    breaker = QueueCircuitBreaker(window=4, minimum=1, clock=Clock())
    calls = [asyncio.create_task(breaker.execute(asyncio.Event().wait)) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert str(breaker.state) == "closed"
    with pytest.raises(KafkaConnectionError):
        await breaker.execute(ill)
    assert str(breaker.state) == "open", "nor do they dilute a failure: it is one of one"


async def test_the_interval_doubles_up_to_the_longest() -> None:
    clock, intervals = Clock(), list[float]()
    breaker = await opened(clock, reset_seconds=10, longest_reset=45)
    for _ in range(5):
        with pytest.raises(CircuitOpen) as refused:
            await breaker.execute(fine)
        intervals.append(refused.value.retry_after)
        clock.now += refused.value.retry_after
        with pytest.raises(KafkaConnectionError):
            await breaker.execute(ill)
    assert intervals == [10, 20, 40, 45, 45]


async def test_a_guard_does_for_a_block_what_execute_does_for_a_call() -> None:
    clock, done = Clock(), list[str]()
    breaker = QueueCircuitBreaker(minimum=2, clock=clock, call_seconds=0.05)
    with pytest.raises(KafkaConnectionError):
        async with breaker.guard():
            raise KafkaConnectionError("no answer")
    with pytest.raises(TimeoutError):
        async with breaker.guard():
            await asyncio.Event().wait()
    with pytest.raises(CircuitOpen):
        async with breaker.guard():
            done.append("although it is open")
    clock.now = 10.0
    async with breaker.guard():
        done.append("as a probe")
    assert (done, str(breaker.state)) == (["as a probe"], "closed")


async def mistake() -> None:
    raise MessageSizeTooLargeError


async def make_mistakes(breaker: QueueCircuitBreaker, count: int) -> None:
    for _ in range(count):
        with pytest.raises(MessageSizeTooLargeError):
            await breaker.execute(mistake)


async def test_the_callers_own_mistakes_do_not_open_it() -> None:
    breaker = QueueCircuitBreaker(minimum=2, clock=Clock())
    await make_mistakes(breaker, 20)
    assert breaker.state is State.CLOSED
    assert not is_failure(asyncio.CancelledError())


async def test_nor_do_they_hide_failures_that_come_between_them() -> None:
    breaker = QueueCircuitBreaker(window=4, minimum=2, failure_rate=1.0, clock=Clock())
    for _ in range(2):
        await make_mistakes(breaker, 3)
        with pytest.raises(KafkaConnectionError):
            await breaker.execute(ill)
    assert breaker.state is State.OPEN, "two of two"


async def test_a_mistake_as_the_probe_decides_nothing_and_frees_its_place() -> None:
    clock = Clock()
    breaker = await opened(clock)
    clock.now = 10.0
    await make_mistakes(breaker, 2)
    assert breaker.state is State.HALF_OPEN
    assert await breaker.execute(fine) == "fine"
    assert str(breaker.state) == "closed"


async def test_what_rabbitmq_says_of_a_callers_mistake_is_no_failure(rabbit: mq.RabbitMQ) -> None:
    """An exchange that is not there, a queue declared otherwise, a message without a queue. A lost channel is one."""
    async with mq.channel(rabbit) as channel:
        name = (await channel.declare_queue(rabbit.name("declared"), durable=True)).name

    async def missing_exchange(channel: AbstractChannel) -> object:
        exchange = await channel.get_exchange(rabbit.name("nowhere"), ensure=False)
        return await exchange.publish(Message(b""), "key")

    async def other_arguments(channel: AbstractChannel) -> object:
        return await channel.declare_queue(name, durable=False)

    async def unrouted(channel: AbstractChannel) -> object:
        return await channel.default_exchange.publish(Message(b""), rabbit.name("nowhere"))

    async def sent_unrouted(channel: AbstractChannel) -> None:
        async with link(rabbit) as connection:
            await send(connection, Message(b""), rabbit.name("nowhere"))

    for call in (missing_exchange, other_arguments, unrouted, sent_unrouted):
        breaker = QueueCircuitBreaker(minimum=1, clock=Clock())
        async with mq.channel(rabbit, on_return_raises=True) as channel:
            with pytest.raises(REQUEST_ERRORS):
                await breaker.execute(partial(call, channel))
        assert breaker.state is State.CLOSED, call.__name__
        with pytest.raises(ChannelInvalidStateError):
            await breaker.execute(partial(unrouted, channel))
        assert str(breaker.state) == "open", "that channel is gone"


async def test_a_listener_that_raises_leaves_the_outcome_alone_and_is_reported() -> None:
    breaker, reported, heard = QueueCircuitBreaker(minimum=1, clock=Clock()), list[Any](), list[State]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def broken(_: State, new: State) -> None:
        raise ZeroDivisionError

    breaker.listeners += [broken, lambda _, new: heard.append(new)]
    with pytest.raises(KafkaConnectionError):
        await breaker.execute(ill)
    assert (heard, [type(error) for error in reported]) == ([State.OPEN], [ZeroDivisionError])


async def test_a_guard_may_be_used_again() -> None:
    breaker = QueueCircuitBreaker(minimum=1, call_seconds=5)
    guard = breaker.guard()
    for _ in range(2):
        async with guard:
            await fine()
    assert breaker.state is State.CLOSED


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


async def test_a_broker_that_is_killed_in_the_middle_of_sends() -> None:
    """What was acknowledged is there, what was refused is not; what timed out may be, and is not there twice."""
    ledger, acknowledged, refused, stop = mq.Ledger(), list[int](), set[int](), asyncio.Event()
    with mq.kafka(private=True) as kafka:
        topic = await mq.topic(kafka, "guarded")
        breaker = QueueCircuitBreaker(minimum=4, reset_seconds=0.2, longest_reset=0.4, call_seconds=0.5)
        numbers = iter(range(1_000_000))

        async def send_on() -> None:
            while not stop.is_set():
                number = next(numbers)
                ledger.sent(number)
                try:
                    await send_with_circuit_breaker(breaker, producer, topic, b"%d" % number)
                except CircuitOpen as error:
                    ledger.failed(number)
                    refused.add(number)
                    await asyncio.sleep(min(max(error.retry_after, 0.01), 0.05))
                except (TimeoutError, KafkaError):
                    pass  # unknown
                else:
                    ledger.acknowledged(number)
                    acknowledged.append(number)
                    await asyncio.sleep(0.002)

        async with mq.producer(kafka, enable_idempotence=True) as producer, asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(send_on())
            await mq.until(lambda: len(acknowledged) > 100, within=10)
            async with mq.killed(kafka.nodes[0]):
                await mq.until(lambda: len(refused) > 20, within=20)
            before = len(acknowledged)
            await mq.until(lambda: len(acknowledged) > before + 100, within=30)
            stop.set()
        received = [int(record.value) for record in await mq.read(kafka, topic)]
    for number in received:
        ledger.received(number)
    assert (ledger.lost_although_acknowledged, ledger.duplicated, ledger.unexpected) == (0, 0, 0)
    assert not refused & set(received), "a refused call was not made"
    assert ledger.unknown >= 4, "those that opened it"
    assert ledger.lost <= ledger.unknown


async def test_a_connection_that_is_cut_while_answers_are_lost(rabbit: mq.RabbitMQ) -> None:
    """RabbitMQ has what timed out, and not what was refused; and the circuit closes on the new connection."""
    ledger, outcomes = mq.Ledger(), list[str]()
    breaker = QueueCircuitBreaker(window=4, minimum=2, reset_seconds=0.1, longest_reset=0.1, call_seconds=0.5)
    async with mq.channel(rabbit) as near, mq.proxy(rabbit) as network, link(network) as far:
        queue = await near.declare_queue(rabbit.name("guarded"), durable=True)

        async def publish(number: int) -> None:
            channel = await far.channel()
            await channel.default_exchange.publish(Message(b"%d" % number), queue.name)

        async def send() -> str:
            number = len(outcomes)
            ledger.sent(number)
            try:
                await breaker.execute(lambda: publish(number))
            except CircuitOpen:
                ledger.failed(number)
                outcomes.append("refused")
            except GONE:
                outcomes.append("unknown")
            else:
                ledger.acknowledged(number)
                outcomes.append("acknowledged")
            return outcomes[-1]

        assert [await send() for _ in range(10)] == ["acknowledged"] * 10
        with network.swallow("down"):  # the connection is reset at its end
            assert [await send() for _ in range(5)] == ["unknown"] * 2 + ["refused"] * 3
        await mq.until(lambda: far.reconnects == 1 and breaker.state is State.HALF_OPEN, within=10)
        assert [await send() for _ in range(10)] == ["acknowledged"] * 10
        for message in await mq.take_messages(queue, 100, within=0):
            ledger.received(int(message.body))
    assert str(ledger) == (
        "sent 25, acknowledged 20, failed 3, unknown 2, received 22: lost 0, duplicated 0, reordered 0"
    )


async def test_ten_thousand_sends_through_it(kafka: mq.Kafka) -> None:
    """All are stored, with as many under way at once as there are callers, and the breaker stays out of the way."""
    ledger, topic = mq.Ledger(), await mq.topic(kafka, "many", partitions=3)
    breaker = QueueCircuitBreaker(call_seconds=60)
    numbers = iter(range(10_000))
    async with mq.producer(kafka, enable_idempotence=True, linger_ms=5) as producer:

        async def send_on() -> None:
            for number in numbers:
                ledger.sent(number)
                await send_with_circuit_breaker(breaker, producer, topic, b"%d" % number)
                ledger.acknowledged(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(500):
                group.create_task(send_on())
    for record in await mq.read(kafka, topic, within=30):
        ledger.received(int(record.value))
    assert ledger.exact
    assert ledger.table()["acknowledged"].sum() == 10_000
    assert (breaker.refused, str(breaker.state)) == (0, "closed")
