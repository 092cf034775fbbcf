"""Publish and subscribe on RabbitMQ: events go to a durable topic exchange, each subscriber has a queue of its own.

The publisher learns of every event what became of it; the subscriber acknowledges one when its handler has finished.
After "Publish-Subscribe Channel" and "Durable Subscriber" (Hohpe and Woolf, Enterprise Integration Patterns),
https://www.rabbitmq.com/tutorials/tutorial-five-python and https://www.rabbitmq.com/docs/confirms.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from ..brokers.base import BrokerError, Connectable
from ..queues import channel, declare
from .link import Consumer, Link, consuming, link
from .sending import NotSent, Refused, Unconfirmed, Unknown, Unrouted, bury, json_message, send

__all__ = [
    "Event", "NotSent", "Publisher", "Refused", "Subscription", "Unconfirmed", "Unknown", "Unrouted", "publish_event",
    "publishing", "subscribe_to_events",
]  # fmt: skip

DURABLE = {
    "x-queue-type": "quorum", "x-delivery-limit": 10, "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}  # fmt: skip
"""A durable subscription's queue. An event that kills its subscriber each time is a dead letter after the limit, and no
dead letter is lost on its way."""


class Publisher:
    """A connection on which events are published to one exchange; made by `publishing`."""

    def __init__(self, exchange: str, connection: Link) -> None:
        self.exchange, self.link = exchange, connection


@contextlib.asynccontextmanager
async def publishing(rabbit: Connectable, exchange: str) -> AsyncIterator[Publisher]:
    """A `Publisher` for the length of the block, on one connection, which is made again when it is lost.

    Raises `BrokerError` when an exchange of that name is there which is no durable topic exchange.
    """
    async with link(rabbit, lambda opened: _exchange(opened, exchange)) as connection:
        yield Publisher(exchange, connection)


async def publish_event(publisher: Publisher, type: str, data: Any, id: str | None = None, within: float = 5.0) -> str:
    """Publishes `data` as persistent JSON with the routing key `type`, and returns its message id once it is confirmed.

    That means that every queue that is bound for it has it. `id` is that of an event that is published again. Raises
    within `within` seconds: `Unrouted` and `NotSent` when it is stored nowhere, `Refused` when a queue did not take it,
    `Unknown` when no answer came. Raises `ValueError` for a type that no event can have, `TypeError` for data that is
    not JSON.
    """
    if not 0 < len(type.encode()) <= 255 or {"*", "#"} & set(type.split(".")):
        raise ValueError(f"an event's type is words joined by dots, 255 bytes at most, none of them * or #: {type!r}")
    message = json_message(data, id, type=type)
    await send(publisher.link, message, type, publisher.exchange, within)
    return message.message_id or ""


@dataclass(frozen=True)
class Event:
    """What a subscriber's handler is given."""

    type: str
    """The routing key."""
    data: Any
    id: str | None
    """The message id; a second copy of an event bears the same."""
    time: datetime | None
    """When it was published, to the second."""
    headers: Mapping[str, Any]
    redelivered: bool
    """It may have been handled before: the connection, or a subscriber, was lost in the middle."""


Handler = Callable[[Event], Any]


class Subscription:
    """A subscriber at work; made by `subscribe_to_events`."""

    def __init__(
        self, rabbit: Connectable, exchange: str, patterns: Collection[str], handle: Handler, queue: str | None,
        attempts: int, backoff: float, dead_letters: str, arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.handled = 0
        """Events whose handler finished; one that is delivered again counts again."""
        self.failed = 0
        """Attempts that raised."""
        self.unparsable = 0
        """Bodies that are not JSON."""
        self.dead_lettered = 0
        """Events that went to the dead letters: unparsable, or failed at every attempt."""
        self.gaps = 0
        """How often the queue was made anew, because it was gone. Events that were published meanwhile are lost."""
        self.error: BaseException | None = None
        """Why the last dead letter is one."""
        self.queue: AbstractQueue
        self.consumer: Consumer
        self._rabbit, self._exchange, self._patterns, self._name = rabbit, exchange, set(patterns), queue
        self._handle, self._attempts, self._backoff = handle, attempts, backoff
        self._dead_letters, self._arguments = dead_letters, dict(arguments)
        self._started = self._gap = False

    def __str__(self) -> str:
        words = ("handled", "failed", "unparsable", "dead_lettered", "gaps", "reconnects")
        return ", ".join(f"{word.replace('_', '-')} {getattr(self, word)}" for word in words)

    @property
    def reconnects(self) -> int:
        """How often the connection was made again."""
        return self.consumer.link.reconnects

    async def bind(self, pattern: str) -> None:
        """Subscribes to `pattern`, too. Raises what the broker says; it may be called again."""
        self._patterns.add(_checked(pattern))
        await self.consumer.link.channel()
        await self.queue.bind(self._exchange, pattern)

    async def unbind(self, pattern: str) -> None:
        """Ends the subscription to `pattern`; what is in the queue stays. Raises as `bind` does."""
        self._patterns.discard(pattern)
        await self.consumer.link.channel()
        await self.queue.unbind(self._exchange, pattern)

    async def prepare(self) -> None:
        """Declares the durable queues, or explains why that cannot be."""
        await declare(self._rabbit, self._dead_letters, durable=True, arguments={"x-queue-type": "quorum"})
        if self._name:
            await declare(self._rabbit, self._name, durable=True, arguments=self._arguments)

    async def declare(self, opened: AbstractChannel) -> AbstractQueue:
        """Declares all that it needs, after every connection."""
        exchange = await _exchange(opened, self._exchange)
        dead = await opened.declare_exchange(self._dead_letters, ExchangeType.FANOUT, durable=True)
        letters = await opened.declare_queue(self._dead_letters, durable=True, arguments={"x-queue-type": "quorum"})
        await letters.bind(dead)
        if self._started and (self._name is None or not await self._is_there(self._name)):
            self._gap = True
        self.queue = await opened.declare_queue(
            self._name, durable=bool(self._name), exclusive=not self._name, arguments=self._arguments
        )
        for pattern in self._patterns:
            await self.queue.bind(exchange, pattern)
        self.gaps += self._gap
        self._started, self._gap = True, False
        return self.queue

    async def _is_there(self, queue: str) -> bool:
        async with channel(self._rabbit) as asking:  # the question closes the channel when the answer is no
            try:
                await asking.declare_queue(queue, passive=True)
            except ChannelNotFoundEntity:
                return False
            return True

    async def work(self, message: AbstractIncomingMessage) -> None:
        """Handles one message. When it returns without settling it, the message is acknowledged."""
        try:
            data = json.loads(message.body)
        except (ValueError, RecursionError) as error:
            self.unparsable += 1
            await self._bury(message, 0, error)
            return
        event = Event(message.routing_key or "", data, message.message_id, message.timestamp, message.headers,
                      bool(message.redelivered))  # fmt: skip
        for attempt in range(1, self._attempts + 1):
            try:
                answer = self._handle(event)
                if inspect.isawaitable(answer):
                    await answer
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                    raise  # we are being ended; else the handler's own, which must not pass for that
                self.failed += 1
                if attempt == self._attempts:
                    await self._bury(message, attempt, error)
                else:
                    await asyncio.sleep(self._backoff)
            else:
                self.handled += 1
                return

    async def _bury(self, message: AbstractIncomingMessage, attempt: int, error: BaseException) -> None:
        self.error = error
        link, letters = self.consumer.link, self._dead_letters
        await bury(link, message, error, attempt, self.queue.name, message.routing_key or "", letters)
        self.dead_lettered += 1


@contextlib.asynccontextmanager
async def subscribe_to_events(
    rabbit: Connectable, exchange: str, patterns: str | Collection[str], handle: Handler, queue: str | None = None,
    prefetch: int = 1, attempts: int = 1, backoff: float = 0.1, dead_letters: str | None = None, drain: float = 5.0,
    arguments: Mapping[str, Any] | None = None,
) -> AsyncIterator[Subscription]:  # fmt: skip
    """Runs `handle(event)` for each event whose type fits one of the patterns, during the block; it then is subscribed.

    With a `queue` the subscription is durable: events wait in that quorum queue while nobody is here, and several
    subscribers with the same queue share them. Its old patterns stay bound until `unbind`. Without one the queue is
    temporary: it goes with the connection, and when it has to be made anew, that is a gap.

    What is in the queue is handled at least once. Up to `prefetch` handlers run at once: 1 keeps the order. An event is
    acknowledged when its handler has finished. One that raises is tried `attempts` times in all, `backoff` seconds
    apart; then, and at once when it is not JSON, it goes to the exchange and queue `dead_letters` (by default the
    exchange's name and `.dead-letters`), with the headers `dead-letter-error`, `-attempts` and `-queue`. At the end of
    the block running handlers get `drain` seconds. `arguments` are the queue's, such as `x-expires`.

    Raises `BrokerError` when queue or exchange are there and are others, `ValueError` for a pattern that cannot be.
    """
    if attempts < 1:
        raise ValueError(f"attempts counts the first one, too, and is not {attempts}")
    wanted = [_checked(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    dead_letters = dead_letters or f"{exchange}.dead-letters"
    route = {"x-dead-letter-exchange": dead_letters, **(DURABLE if queue else {}), **(arguments or {})}
    made = Subscription(rabbit, exchange, wanted, handle, queue, attempts, backoff, dead_letters, route)
    await made.prepare()
    async with consuming(rabbit, made.declare, made.work, prefetch, drain=drain) as made.consumer:
        yield made


def _checked(pattern: str) -> str:
    if not pattern or len(pattern.encode()) > 255:
        raise ValueError(f"a pattern is words, * (one word) or # (any number), joined by dots: {pattern!r}")
    return pattern


async def _exchange(opened: AbstractChannel, name: str) -> AbstractExchange:
    try:
        return await opened.declare_exchange(name, ExchangeType.TOPIC, durable=True)
    except ChannelPreconditionFailed as error:
        raise BrokerError(f"the exchange {name!r} is there, and is no durable topic exchange: {error}") from None
