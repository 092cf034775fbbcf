"""Routing on RabbitMQ: a message goes on to the queues that a decision names, and is acknowledged when they have it.

A *hop* is the core: one message in, any number out, each confirmed, then the acknowledgement; what can go nowhere goes
to an invalid-message channel, which cannot be left out. A router and a step of a routing slip are hops with a decision
of their own; a splitter, filter, detour or recipient list is a function to write. After Hohpe and Woolf, "Enterprise
Integration Patterns": Message Router, Dynamic Router, Routing Slip, Invalid Message Channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import ChannelInvalidStateError

from ..brokers.base import Connectable
from ..queues import declare
from .dead_letter import KEPT, NOT_SENT_BACK
from .link import FIRST_PAUSE, LONGEST_PAUSE, OPEN_SECONDS, Consumer, Link, consuming, uncancelled
from .sending import Unconfirmed, Unrouted, bury, json_message, send

Out = tuple[str, Message]  # the name of a queue, and what goes there
Decide = Callable[[AbstractIncomingMessage], Iterable[Out] | Awaitable[Iterable[Out]]]
DELIVERIES = 20  # returns, from hops that crashed or lost their connection, before a message counts as invalid
SLIP, LONGEST_SLIP = "routing-slip", 32


class Invalid(Exception):
    """What a decision raises for a message that can go nowhere. (Any other exception says the same.)"""


async def declare_input(rabbit: Connectable, queue: str, invalid: str, **arguments: Any) -> None:
    """Declares two quorum queues: `queue`, and `invalid`, to which its dead letters go at least once. Safe to repeat.

    Raises `BrokerError` if one is there and is another, `ValueError` for the same name twice.
    """
    if queue == invalid:
        raise ValueError(f"{queue!r} cannot be its own invalid-message channel: it would go round for ever")
    quorum = {"x-queue-type": "quorum"}
    await declare(rabbit, invalid, durable=True, arguments=quorum)
    route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": invalid, "x-delivery-limit": DELIVERIES}
    safe = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    await declare(rabbit, queue, durable=True, arguments={**quorum, **route, **safe, **arguments})


def forwarded(message: AbstractIncomingMessage, data: Any = ..., headers: Mapping[str, Any] | None = None) -> Message:
    """A persistent copy to be sent on, with the same properties; `data`, if given, becomes its JSON body.

    `headers` are added; `CC`, which would send it to all its recipients again, deaths and deliveries are left out. An
    expiration starts anew. Raises `TypeError` for data that is not JSON.
    """
    about = {name: getattr(message, name) for name in (*KEPT, "expiration") if name != "headers"}
    kept = {name: value for name, value in message.headers.items() if not NOT_SENT_BACK.match(name)}
    body = message.body if data is ... else json_message(data).body
    return Message(body, headers={**kept, **(headers or {})}, delivery_mode=DeliveryMode.PERSISTENT, **about)


class Hop:
    """A hop at work; made by `start_hop`. Counts of messages; one that is delivered again counts again."""

    def __init__(self, queue: str, decide: Decide, invalid: str) -> None:
        self.passed = self.dropped = 0
        """Came in, and all that they became is confirmed; and those of these that became nothing, as in a filter."""
        self.sent = 0
        """Went out, confirmed."""
        self.invalid = 0
        """In the invalid-message channel now, with the reason in the header `dead-letter-error`."""
        self.waited = 0
        """Attempts to send that were not confirmed, as when the next queue is full. They are made again."""
        self.consumer: Consumer
        """What delivers: `consumer.link.reconnects`, `consumer.unsettled`."""
        self._queue, self._decide, self._letters = queue, decide, invalid

    def __str__(self) -> str:
        return ", ".join(f"{word} {getattr(self, word)}" for word in ("passed", "sent", "dropped", "invalid", "waited"))

    async def _work(self, message: AbstractIncomingMessage) -> None:
        """Sends on what a message becomes. When it returns, the message is acknowledged."""
        link, nowhere = self.consumer.link, list[str]()

        def again() -> bool:
            self.waited += 1
            return not gone(message)

        try:
            with uncancelled():
                decided = self._decide(message)
                outs = list(await decided if inspect.isawaitable(decided) else decided)
            for queue, copy in outs:
                try:
                    await send_until_confirmed(link, copy, queue, again)
                    self.sent += 1
                except Unrouted as error:  # the others get theirs
                    nowhere.append(str(error))
            if nowhere:
                raise Invalid("; ".join(nowhere))
        except Unconfirmed:  # the message is delivered again
            raise
        except Exception as error:
            await bury(link, message, error, 1, self._queue, self._letters)
            self.invalid += 1
        else:
            self.passed, self.dropped = self.passed + 1, self.dropped + (not outs)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name.encode()) <= 255


def gone(message: AbstractIncomingMessage) -> bool:
    """Whether the channel that brought a message is closed: then it is delivered again."""
    with contextlib.suppress(ChannelInvalidStateError):
        return bool(message.channel.is_closed)
    return True


async def send_until_confirmed(connection: Link, message: Message, queue: str, again: Callable[[], bool]) -> None:
    """`sending.send` until it is confirmed, with pauses, so a full queue holds up whoever sends.

    Raises `Unrouted` when there is no such queue; what `send` raised when `again()`, asked after a pause, is false.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return await send(connection, message, queue)
        except Unconfirmed as error:
            if isinstance(error, Unrouted):
                raise
            await asyncio.sleep(pause)
            if not again():
                raise
        pause = min(2 * pause, LONGEST_PAUSE)


@contextlib.asynccontextmanager
async def start_hop(
    rabbit: Connectable, queue: str, decide: Decide, invalid: str, prefetch: int = 10, drain: float = 5.0
) -> AsyncIterator[Hop]:
    """Sends each message of `queue` on to where `decide(message)` says, during the block, `prefetch` of them at once.

    `decide`, plain or async, returns (queue, message) pairs; `forwarded` makes the message. At least once: the message
    is acknowledged when all are confirmed, so a crash in between sends some again, with the same message id. A full or
    unreachable queue is waited for. A message for which `decide` raises (`Unconfirmed`: it goes back), or names a queue
    that is not there, goes to `invalid`. `prefetch=1` keeps the order. `queue` and `invalid` are declared, see
    `declare_input`. At the end of the block running decisions get `drain` seconds; the rest goes back.
    """
    hop = Hop(queue, decide, invalid)
    await declare_input(rabbit, queue, invalid)
    async with consuming(rabbit, queue, hop._work, prefetch, requeue=True, drain=drain) as hop.consumer:
        yield hop


@dataclass(frozen=True)
class Rule:
    """JSON messages go to the queue `to` when these `fields` have these values and `test(data)`, if given, is true;
    without both all of them: the last of the rules, for a default. Raises `ValueError` for what is no name of a queue.
    """

    to: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    test: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.to) or not isinstance(self.fields, Mapping):
            raise ValueError(f"a rule needs the name of a queue, and fields with their values: {self!r}")

    def takes(self, data: Any) -> bool:
        """Whether it takes a message with this content."""
        fits = not self.fields or (isinstance(data, dict) and data.items() >= self.fields.items())
        return fits and (self.test is None or bool(self.test(data)))


class Router:
    """A content-based router at work; made by `start_router`."""

    def __init__(self, rules: Iterable[Rule], every: bool) -> None:
        self.hop: Hop
        """What sends, and counts."""
        self.announced = dict[str, Rule]()
        """The rules that came over the control queue, by name, in their order."""
        self.unreadable = 0
        """Messages in the control queue that make no sense; they change nothing."""
        self._rules, self._every = list(rules), every
        self._from: dict[str, Any] = {"x-stream-offset": "first"}
        self._mark, self._up_to_date = uuid.uuid4().hex, asyncio.Event()

    def _route(self, message: AbstractIncomingMessage) -> list[Out]:
        data = json.loads(message.body)
        taken = (rule.to for rule in [*self.announced.values(), *self._rules] if rule.takes(data))
        queues = dict.fromkeys(taken if self._every else islice(taken, 1))
        if not queues:
            raise Invalid("no rule takes it")
        return [(queue, forwarded(message)) for queue in queues]

    async def _change(self, message: AbstractIncomingMessage) -> None:
        try:
            change = json.loads(message.body)
            if change.get("mark"):
                self._up_to_date.set() if change["mark"] == self._mark else None
            elif change["to"] is None:
                self.announced.pop(change["name"], None)
            else:
                self.announced[change["name"]] = Rule(change["to"], change["fields"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.unreadable += 1
        # A connection that is lost goes on behind this one: `consuming` hands these arguments over each time.
        self._from["x-stream-offset"] = int(str(message.headers["x-stream-offset"])) + 1

    @contextlib.asynccontextmanager
    async def _controlled(self, rabbit: Connectable, control: str | None) -> AsyncIterator[None]:
        if control is None:
            yield
            return
        await declare_control(rabbit, control)
        async with consuming(rabbit, control, self._change, 20, arguments=self._from) as reading:
            await send(reading.link, json_message({"mark": self._mark}), control)
            async with asyncio.timeout(OPEN_SECONDS):  # all that was announced before is known then
                await self._up_to_date.wait()
            yield


@contextlib.asynccontextmanager
async def start_router(
    rabbit: Connectable, queue: str, rules: Iterable[Rule], invalid: str, every: bool = False,
    control: str | None = None, prefetch: int = 10, drain: float = 5.0,
) -> AsyncIterator[Router]:  # fmt: skip
    """Sends each JSON message of `queue` to the queue of the first rule that takes it, or of `every` one, once each.

    What no rule takes goes to `invalid`. Over `control`, a stream, rules can be announced and withdrawn; they come
    before its own. A router reads that from the beginning before it takes a message. Otherwise as `start_hop`.
    """
    router = Router(rules, every)
    async with (
        router._controlled(rabbit, control),
        start_hop(rabbit, queue, router._route, invalid, prefetch, drain) as router.hop,
    ):
        yield router


async def declare_control(rabbit: Connectable, control: str) -> None:
    """Declares the stream over which rules are announced. Raises `BrokerError` if that is another queue."""
    await declare(rabbit, control, durable=True, arguments={"x-queue-type": "stream"})


async def announce_rule(connection: Link, control: str, name: str, rule: Rule | None, within: float = 5.0) -> None:
    """Tells all routers of `control` a rule, which replaces one of that name; None withdraws it. It holds once they
    have read it. Raises as `send` does, and `ValueError` for a rule with a test, which cannot be sent."""
    if not name or (rule and rule.test is not None):
        raise ValueError("what is announced has a name, and fields only: a test is a function, and cannot be sent")
    change = {"name": name, "to": rule.to if rule else None, "fields": dict(rule.fields) if rule else {}}
    await send(connection, json_message(change), control, within=within)


def slip_of(message: AbstractIncomingMessage) -> list[str]:
    """The queues that a message has still to visit, by its header `routing-slip`. Raises `Invalid`."""
    slip: Any = message.headers.get(SLIP)
    if not (isinstance(slip, list) and len(slip) <= LONGEST_SLIP and all(map(_is_name, slip))):
        raise Invalid(f"its header {SLIP!r} should be a list of at most {LONGEST_SLIP} queues, and is {slip!r}")
    return slip


async def send_along(
    connection: Link, slip: Sequence[str], data: Any, id: str | None = None, within: float = 5.0
) -> str:
    """Sends `data` on its way through these queues, and returns its message id once the first one has it. Raises as
    `sending.send` does, and `ValueError` for a slip that cannot be."""
    if isinstance(slip, str) or not all(map(_is_name, slip)) or not 0 < len(slip) <= LONGEST_SLIP + 1:
        raise ValueError(f"a routing slip is 1 to {LONGEST_SLIP + 1} names of queues, and not {slip!r}")
    message = json_message(data, id, headers={SLIP: list(slip[1:])})
    await send(connection, message, slip[0], within=within)
    return message.message_id or ""


@contextlib.asynccontextmanager
async def start_step(
    rabbit: Connectable, queue: str, handle: Callable[[Any], Awaitable[Any]], invalid: str, prefetch: int = 10,
    drain: float = 5.0,
) -> AsyncIterator[Hop]:  # fmt: skip
    """A step of routing slips: what `handle(data)` returns goes to the first queue on the slip, without that on it.

    With an empty slip it goes nowhere. A malformed slip, or a handler that raises: to `invalid`. Else as `start_hop`.
    """

    async def decide(message: AbstractIncomingMessage) -> list[Out]:
        slip = slip_of(message)
        data = await handle(json.loads(message.body))
        return [(slip[0], forwarded(message, data, {SLIP: slip[1:]}))] if slip else []

    async with start_hop(rabbit, queue, decide, invalid, prefetch, drain) as hop:
        yield hop
