"""Any delay on RabbitMQ without a plugin: one queue for each binary digit, and a message waits in those that are 1.

All messages of a queue wait equally long there, so none waits behind a longer one, as with a TTL for each message. The
queues are quorum queues that dead-letter at least once: what waits survives a restart. For jobs that are cancelled or
recur see `scheduler`. After NServiceBus, "Delayed delivery" of its transport for RabbitMQ, and
https://www.rabbitmq.com/docs/ttl, https://www.rabbitmq.com/docs/quorum-queues#dead-lettering.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from aio_pika import DeliveryMode, ExchangeType, Message
from aio_pika.abc import AbstractChannel, AbstractMessage

from .link import Link
from .sending import send

SAFE = {"x-queue-type": "quorum", "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
KEY_LIMIT = 255
"""Bytes of an AMQP routing key."""


@dataclass(frozen=True)
class Delays:
    """The queues and exchanges whose names begin with `name`; the same everywhere where it is used.

    `unit` is in milliseconds: a delay is rounded up to it, and the longest is `2 ** levels - 1` units (31 days). A
    message is late by a few ms for each queue that it passes. With `durable=False` the queues are classic ones, faster,
    and a message that is not persistent, or is being passed on, is lost when the broker ends.
    """

    name: str
    unit: int = 10
    levels: int = 28
    durable: bool = True

    def __post_init__(self) -> None:
        if self.unit < 1 or not 1 <= self.levels <= 48:
            raise ValueError(f"a unit is at least 1 ms, and there are 1 to 48 levels: {self}")

    @property
    def longest(self) -> int:
        """The longest delay, in milliseconds."""
        return int(self.unit * (2**self.levels - 1))

    @property
    def unroutable(self) -> str:
        """The queue for messages that are due and have nowhere to go."""
        return f"{self.name}.unroutable"

    async def declare(self, channel: AbstractChannel) -> None:
        """Declares everything; doing so again changes nothing. Give it to `link` as its set-up."""
        astray = await channel.declare_exchange(f"{self.name}.astray", ExchangeType.FANOUT, durable=True)
        await (await channel.declare_queue(self.unroutable, durable=True)).bind(astray)
        below = await channel.declare_exchange(
            f"{self.name}.due", ExchangeType.TOPIC, durable=True, arguments={"alternate-exchange": astray.name}
        )
        for level in range(self.levels):
            exchange = await channel.declare_exchange(f"{self.name}.{level}", ExchangeType.TOPIC, durable=True)
            arguments: dict[str, Any] = {"x-message-ttl": self.unit * 2**level, "x-dead-letter-exchange": below.name}
            arguments |= SAFE if self.durable else {}
            queue = await channel.declare_queue(exchange.name, durable=True, arguments=arguments)
            higher = "*." * (self.levels - 1 - level)
            await queue.bind(exchange, f"{higher}1.#")
            await below.bind(exchange, f"{higher}0.#")
            below = exchange

    async def delete(self, channel: AbstractChannel) -> None:
        """Deletes everything, and the messages that wait with it."""
        levels = [str(level) for level in range(self.levels)]
        for queue in ("unroutable", *levels):
            await channel.queue_delete(f"{self.name}.{queue}")
        for exchange in ("astray", "due", *levels):
            await channel.exchange_delete(f"{self.name}.{exchange}")

    async def bind(self, channel: AbstractChannel, queue: str) -> None:
        """Lets delayed messages reach a queue, which must be there: `ChannelNotFoundEntity` says that it is not."""
        if {"*", "#"} & {*queue.split(".")}:
            raise ValueError(f"the queue {queue!r} has a name that is a pattern, and would get the messages of others")
        await (await channel.get_queue(queue)).bind(f"{self.name}.due", "*." * self.levels + queue)

    def route(self, queue: str, delay: int) -> str:
        """The routing key: the delay's binary digits in units, rounded up, and the queue. Raises `ValueError`."""
        if type(delay) is not int or not 0 <= delay <= self.longest:
            raise ValueError(f"a delay is an integer from 0 to {self.longest} ms, not {delay!r}")
        key = ".".join([*f"{-(-delay // self.unit):0{self.levels}b}", queue])
        if len(key.encode()) > KEY_LIMIT:
            raise ValueError(
                f"{self.levels} levels leave {KEY_LIMIT - 2 * self.levels} bytes for a queue's name: {queue!r}"
            )
        return key

    async def send(
        self, connection: Link, queue: str, message: AbstractMessage | bytes, delay: int, persistent: bool = True,
        within: float = 5.0,
    ) -> None:  # fmt: skip
        """Publishes, to arrive in `queue` in `delay` ms and not before, and returns when the broker has confirmed.

        Raises what `sending.send` does: after `Unknown` it may arrive or not. Raises `ValueError` for a delay that is
        out of range, and for a message with an `expiration`, which would end its delay.
        """
        made: Any = Message(message) if isinstance(message, bytes) else copy.copy(message)
        if made.expiration is not None:
            raise ValueError(f"the message has an expiration of {made.expiration} s, which would end its delay")
        # RabbitMQ before 4.0 drops a message that was here before, and says so in this header, as one in a circle.
        made.headers = {name: value for name, value in made.headers.items() if name != "x-death"}
        made.delivery_mode = DeliveryMode.PERSISTENT if persistent else DeliveryMode.NOT_PERSISTENT
        made.message_id = made.message_id or uuid4().hex
        await send(connection, made, self.route(queue, delay), f"{self.name}.{self.levels - 1}", within)
