"""The exercises of notebook 08: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
from aio_pika import Message
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, DeliveryError
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiormq.exceptions import PublishError

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.circuit_breaker import CircuitOpen, QueueCircuitBreaker
from mqlib.patterns.link import GONE

WELL, ILL, TOO_LARGE = None, TimeoutError(), MessageSizeTooLargeError()
CALLS = [
    (0, WELL), (1, WELL), (2, ILL), (3, ILL), (8, WELL), (13, ILL), (20, WELL), (33, WELL), (34, ILL), (35, TOO_LARGE),
    (36, ILL), (45, WELL), (46, WELL),
]  # fmt: skip


async def _made() -> list[int]:
    now, made = 0.0, list[int]()
    breaker = QueueCircuitBreaker(window=4, minimum=2, reset_seconds=10, backoff=2, clock=lambda: now)
    for number, (second, error) in enumerate(CALLS, start=1):
        now = float(second)

        async def call(number: int = number, error: Exception | None = error) -> None:
            made.append(number)
            if error:
                raise error

        await asyncio.gather(breaker.execute(call), return_exceptions=True)
    return made


async def judge_1(answer: Any) -> None:
    observed = await _made()
    try:
        given = sorted({int(number) for number in answer})
    except (TypeError, ValueError):
        raise Wrong(f"give a list of numbers; this is {answer!r}") from None
    first = min({*given} ^ {*observed}, default=None)
    if first is not None:
        word = "is made, and not" if first in observed else "is refused, and"
        raise Wrong(f"up to it you are right, but call {first} {word} in your list")


async def _error_of(doing: Awaitable[Any]) -> BaseException:
    """What it raises."""
    try:
        await doing
    except (KafkaError, *GONE) as error:
        return error
    raise AssertionError("this raises nothing")


async def _late() -> None:
    async with asyncio.timeout(0):
        await asyncio.sleep(1)


class Unheard(Exception):
    """An error of which nobody has heard."""


async def _real_errors() -> dict[str, tuple[BaseException, bool]]:
    """Errors as the clients raise them, by what happened, and whether each speaks of illness."""
    kafka, rabbit = mq.kafka(), mq.rabbitmq()
    topic = await mq.topic(kafka, "exercise", max_message_bytes=1000)
    async with mq.producer(kafka) as producer:
        large = await _error_of(producer.send_and_wait(topic, b"x" * 3000))
    nobody = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", request_timeout_ms=500)
    unreachable = await _error_of(nobody.start())
    await nobody.stop()
    body = Message(b"one")
    async with mq.proxy(rabbit) as network, mq.channel(network, on_return_raises=True) as channel:
        limited: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True, arguments=limited)
        for _ in range(2):  # one more than it takes, since it may let one in too many
            await asyncio.gather(channel.default_exchange.publish(body, queue.name), return_exceptions=True)
        full = await _error_of(channel.default_exchange.publish(body, queue.name))
        unroutable = await _error_of(channel.default_exchange.publish(body, rabbit.name("nowhere")))
        connection = await aio_pika.connect(**rabbit.client)
        async with connection:
            other = await connection.channel()
            missing = await _error_of(other.get_exchange(rabbit.name("missing")))
        network.cut()
        await mq.until(lambda: channel.is_closed)
        lost = await _error_of(channel.declare_queue(queue.name, passive=True))
    return {
        "a record is too large": (large, False),
        "no queue takes a message": (unroutable, False),
        "an exchange does not exist": (missing, False),
        "the caller cancelled": (asyncio.CancelledError(), False),
        "Kafka cannot be reached": (unreachable, True),
        "a queue is full": (full, True),
        "the connection is lost": (lost, True),
        "there is no answer": (await _error_of(_late()), True),
        "something new happens": (Unheard("?"), True),
    }


async def judge_2(is_failure: Any) -> None:
    for what, (error, ill) in (await _real_errors()).items():
        if bool(is_failure(error)) is not ill:
            verdict = "is illness" if ill else "is no illness"
            raise Wrong(f"when {what}, the error is {type(error).__name__}, which {verdict}")


def is_failure(error):
    from aio_pika.exceptions import ChannelNotFoundEntity
    from aiokafka.errors import MessageSizeTooLargeError
    from aiormq.exceptions import PublishError

    mistakes = PublishError, ChannelNotFoundEntity, MessageSizeTooLargeError
    return isinstance(error, Exception) and not isinstance(error, mistakes)


def counts_cancelled(error: BaseException) -> bool:
    return not isinstance(error, (PublishError, ChannelNotFoundEntity, MessageSizeTooLargeError))


def excuses_a_full_queue(error: BaseException) -> bool:
    excused = DeliveryError, ChannelNotFoundEntity, MessageSizeTooLargeError
    return isinstance(error, Exception) and not isinstance(error, excused)


def excuses_all_of_amqp(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, (AMQPError, MessageSizeTooLargeError))


def lists_the_failures(error: BaseException) -> bool:
    unroutable = isinstance(error, (PublishError, ChannelNotFoundEntity, MessageSizeTooLargeError))
    return isinstance(error, (OSError, DeliveryError, KafkaError, AMQPError, RuntimeError)) and not unroutable


Send = Callable[[], Awaitable[Any]]


class _Case:
    """One run of an answer: `outcomes` are what its calls come to, the last one for ever."""

    def __init__(self, *outcomes: Exception | None, within: float = 0.4, **options: Any) -> None:
        self.breaker = QueueCircuitBreaker(window=4, minimum=2, **{"reset_seconds": 0.1, **options})
        self.outcomes, self.within, self.calls = list(outcomes), within, 0
        self.asked, execute = 0, self.breaker.execute

        async def counted(call: Send) -> Any:
            self.asked += 1
            return await execute(call)

        self.breaker.execute = counted  # type: ignore[method-assign]

    async def send(self) -> None:
        self.calls += 1
        error = self.outcomes[min(self.calls, len(self.outcomes)) - 1]
        if error:
            raise error

    async def fail(self) -> None:
        raise ConnectionError("no answer")

    async def run(self, deliver: Any, opened: bool = False) -> Any:
        if opened:
            await asyncio.gather(*(self.breaker.execute(self.fail) for _ in range(2)), return_exceptions=True)
        self.asked, start = 0, time.monotonic()
        try:
            async with asyncio.timeout(self.within + 1):
                return await deliver(self.breaker, self.send, self.within)
        except TimeoutError as error:
            if time.monotonic() - start < self.within + 1:
                raise Wrong(f"it raised {type(error).__name__} instead of saying what became of the message") from None
            raise Wrong(f"a second after its time of {self.within} s was up it had not returned") from None


async def judge_3(deliver: Any) -> None:
    wanted = ("acknowledged", "not sent", "unknown")

    async def case(what: str, expected: str, run: _Case, opened: bool = False, asked: int = 40) -> None:
        given = await run.run(deliver, opened)
        if given != expected:
            raise Wrong(f"{what}: it returned {given!r}; right is {expected!r}, of {', '.join(wanted)}")
        if run.asked > asked:
            raise Wrong(f"{what}: it asked the breaker {run.asked} times in {run.within} s")

    await case("a call that succeeds", "acknowledged", _Case(None))
    away = _Case(None, reset_seconds=60)
    await case("a circuit that is open all the time", "not sent", away, opened=True, asked=5)
    await case("a circuit that is open at first", "acknowledged", _Case(None), opened=True, asked=15)
    once = _Case(TimeoutError(), TimeoutError(), reset_seconds=60)
    await case("two time-outs, and then the circuit is open", "unknown", once)
    await case("a lost connection, and then it works", "acknowledged", _Case(ConnectionResetError(), None))
    probing = _Case(None, reset_seconds=0.01)
    await asyncio.gather(*(probing.breaker.execute(probing.fail) for _ in range(2)), return_exceptions=True)
    await asyncio.sleep(0.02)
    probe = asyncio.create_task(probing.breaker.execute(asyncio.Event().wait))
    await asyncio.sleep(0)  # somebody else's probe, which hangs: retry_after is 0
    try:
        await case("somebody else's probe hangs", "not sent", probing, asked=60)
    finally:
        probe.cancel()
        await asyncio.wait([probe])
    large = _Case(MessageSizeTooLargeError())
    try:
        given = await large.run(deliver)
    except MessageSizeTooLargeError:
        return
    raise Wrong(f"a record that is too large will not shrink: let its error pass, and do not return {given!r}")


async def deliver(breaker, send, within):
    import time

    from mqlib.patterns.circuit_breaker import CircuitOpen

    end, outcome = time.monotonic() + within, "not sent"
    while (left := end - time.monotonic()) > 0:
        pause = 0.01
        try:
            async with asyncio.timeout(left):
                await breaker.execute(send)
            return "acknowledged"
        except CircuitOpen as error:  # this call was not made; an earlier one may have been
            pause = max(error.retry_after, pause)
        except OSError:  # a TimeoutError is one
            outcome = "unknown"
        await asyncio.sleep(min(pause, max(end - time.monotonic(), 0)))
    return outcome


async def _until(breaker: Any, send: Send, within: float, pause: Any, outcomes: Any) -> str:
    end, outcome = time.monotonic() + within, "not sent"
    while time.monotonic() < end:
        try:
            await breaker.execute(send)
            return "acknowledged"
        except OSError as error:
            outcome = outcomes(error, outcome)
            await asyncio.sleep(min(pause(error), max(end - time.monotonic(), 0)))
    return outcome


def _pause(error: OSError) -> float:
    return max(error.retry_after, 0.01) if isinstance(error, CircuitOpen) else 0.01


def _outcome(error: OSError, before: str) -> str:
    return before if isinstance(error, CircuitOpen) else "unknown"


async def hammers(breaker: Any, send: Send, within: float) -> str:
    return await _until(breaker, send, within, lambda error: 0.001, _outcome)


async def believes_retry_after(breaker: Any, send: Send, within: float) -> str:
    return await _until(breaker, send, within, lambda error: getattr(error, "retry_after", 0.01), _outcome)


async def calls_a_time_out_failed(breaker: Any, send: Send, within: float) -> str:
    return await _until(breaker, send, within, _pause, lambda error, before: "not sent")


async def forgets_the_first_try(breaker: Any, send: Send, within: float) -> str:
    return await _until(
        breaker, send, within, _pause, lambda error, before: "not sent" if isinstance(error, CircuitOpen) else "unknown"
    )


async def calls_a_refusal_unknown(breaker: Any, send: Send, within: float) -> str:
    return await _until(breaker, send, within, _pause, lambda error, before: "unknown")


async def gives_up_at_once(breaker: Any, send: Send, within: float) -> str:
    try:
        await breaker.execute(send)
        return "acknowledged"
    except CircuitOpen:
        return "not sent"
    except OSError:
        return "unknown"


async def waits_beyond_the_end(breaker: Any, send: Send, within: float) -> str:
    end, outcome = time.monotonic() + within, "not sent"
    while time.monotonic() < end:
        try:
            await breaker.execute(send)
            return "acknowledged"
        except OSError as error:
            outcome = _outcome(error, outcome)
            await asyncio.sleep(_pause(error))
    return outcome


async def swallows_mistakes(breaker: Any, send: Send, within: float) -> str:
    try:
        return await _until(breaker, send, within, _pause, _outcome)
    except KafkaError:
        return "not sent"


TASKS = {
    "08.1": Task(
        question="Which calls are made?",
        start='answer = ...\n\nawait mq.exercise("08.1").check(answer)',
        hints=[
            "Call 3 is one failure of three: less than half. Call 4 makes it two of four. Open for 10 s from then on.",
            "A probe that fails doubles the interval: from 13 to 33. One that succeeds sets it back, and the window is "
            "empty again. A record that is too large is no failure.",
        ],
        solution=None,
        code="answer = [1, 2, 3, 4, 6, 8, 9, 10, 11, 13]",
        judge=judge_1,
        wrong=[
            [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 13],
            [1, 2, 3, 4, 6, 8, 9, 10, 13],
            [1, 2, 3, 6, 8, 9, 10, 11, 13],
            [1, 2, 3, 4, 6, 8, 9, 10, 11],
            [*range(1, 14)],
            [],
            "all",
        ],
    ),
    "08.2": Task(
        question="Ill, or asked wrongly?",
        start='is_failure = ...\n\nawait mq.exercise("08.2").check(is_failure)',
        hints=[
            "Name the mistakes, and let everything else be a failure: `not isinstance(error, MISTAKES)`.",
            "`PublishError` (in `aiormq.exceptions`) is a kind of `DeliveryError`. `asyncio.CancelledError` is a "
            "`BaseException`, and no `Exception`.",
        ],
        solution=is_failure,
        judge=judge_2,
        wrong=[
            counts_cancelled,
            excuses_a_full_queue,
            excuses_all_of_amqp,
            lists_the_failures,
            lambda error: True,
            lambda error: False,
            3,
        ],
    ),
    "08.3": Task(
        question="Say what became of it",
        start='deliver = ...\n\nawait mq.exercise("08.3").check(deliver)',
        hints=[
            'Begin with `"not sent"`. A call that was made and failed makes it `"unknown"`, for good: a refusal '
            "afterwards says nothing about the earlier call.",
            "`CircuitOpen` is an `OSError`, too, so catch it first. Sleep "
            "`min(max(error.retry_after, 0.01), what is left)`.",
        ],
        solution=deliver,
        judge=judge_3,
        wrong=[
            hammers,
            believes_retry_after,
            calls_a_time_out_failed,
            forgets_the_first_try,
            calls_a_refusal_unknown,
            gives_up_at_once,
            waits_beyond_the_end,
            swallows_mistakes,
        ],
    ),
}
