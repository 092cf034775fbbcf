"""Publishing on RabbitMQ with one of five outcomes: confirmed, unrouted, refused, not sent, unknown.

See https://www.rabbitmq.com/docs/confirms and https://www.rabbitmq.com/docs/publishers#unroutable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import ChannelInvalidStateError, DeliveryError, PublishError

from ..brokers.base import BrokerError
from ..queues import blocked
from .link import GONE, Link, uncancelled

ERROR_CHARACTERS = 1000
"""What a dead letter says of its error: all its headers must fit into one frame, which RabbitMQ makes 128 kB."""


class Unconfirmed(BrokerError):
    """A message that the broker did not confirm; `id` is its message id. Each kind says what is known."""

    def __init__(self, id: str, words: str) -> None:
        super().__init__(words)
        self.id = id


class NotSent(Unconfirmed):
    """There was no connection in time: it was never handed over, and is stored nowhere."""


class Unrouted(Unconfirmed):
    """No queue is bound for it: the broker returned it, and it is stored nowhere."""


class Refused(Unconfirmed):
    """A queue refused it, as a full one does that is told to. Others that are bound for it may have it."""


class Unknown(Unconfirmed):
    """It was handed over, and no answer came: it may be stored. Send it again with this `id`, so that who gets it can
    tell a second copy."""


def json_message(data: Any, id: str | None = None, **properties: Any) -> Message:
    """A persistent message of `data` as JSON, with a message id (a new one without `id`) and the time.

    `properties` are those of `aio_pika.Message`. Raises `TypeError` for data that JSON cannot hold.
    """
    try:
        body = json.dumps(data, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"that is not JSON: {error}") from None
    return Message(
        body, message_id=id or uuid.uuid4().hex, timestamp=datetime.now(UTC), content_type="application/json",
        delivery_mode=DeliveryMode.PERSISTENT, **properties,
    )  # fmt: skip


async def send(connection: Link, message: Message, routing_key: str, exchange: str = "", within: float = 5.0) -> None:
    """Publishes a message, and returns once the broker has confirmed it: every queue that is bound for it has it.

    Waits `within` seconds at most, for a connection that has to be made again, too. Raises `Unrouted` and `NotSent`
    when it is stored nowhere, `Refused` when a queue did not take it, `Unknown` when no answer came.
    """
    id = message.message_id or ""
    words = f"message {id} to {exchange or 'the queue'} {routing_key!r}: "
    handed_over: AbstractChannel | None = None
    try:
        async with asyncio.timeout(within):
            while True:
                channel = await connection.channel()
                to = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
                handed_over = channel
                try:
                    with uncancelled():
                        await to.publish(message, routing_key=routing_key, mandatory=True)
                    return
                except ChannelInvalidStateError:  # raised before anything is written
                    handed_over = None
                    await asyncio.sleep(0.01)
    except PublishError:
        raise Unrouted(id, f"{words}no queue is bound for it; it is stored nowhere") from None
    except DeliveryError:
        raise Refused(id, f"{words}a queue refused it, as a full one does; others may have it") from None
    except Exception as error:  # whatever it is: what was handed over may be stored
        if handed_over is None:
            why = f"no connection within {within:g} s ({connection.error})"
            raise NotSent(id, words + (why if isinstance(error, GONE) else str(error))) from error
        why = f"the connection was lost ({error})"
        if isinstance(error, TimeoutError):
            why = f"no answer within {within:g} s"
            with contextlib.suppress(*GONE):
                if alarm := await blocked(handed_over):
                    why += f": blocked by broker ({alarm})"
        raise Unknown(id, f"{words}{why}; it may be stored") from error


async def bury(
    connection: Link, message: AbstractIncomingMessage, error: BaseException, attempts: int, queue: str,
    routing_key: str, exchange: str = "",
) -> None:  # fmt: skip
    """Stores a copy of a message of `queue` among the dead letters, with the headers `dead-letter-error`, `-attempts`
    and `-queue`. The caller acknowledges afterwards: a crash in between doubles it, and never loses it.

    When the copy is not confirmed the message is rejected, and the broker does it, which does not know the reason.
    """
    ours = ("x-delivery-count", "CC")  # by CC the broker would send the copy to all its recipients again
    headers: dict[str, Any] = {name: value for name, value in message.headers.items() if name not in ours}
    headers |= {"dead-letter-queue": queue, "dead-letter-attempts": attempts}
    headers["dead-letter-error"] = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
    copy = Message(
        message.body, headers=headers, message_id=message.message_id, timestamp=message.timestamp,
        type=message.type, content_type=message.content_type, correlation_id=message.correlation_id,
        delivery_mode=DeliveryMode.PERSISTENT,
    )  # fmt: skip
    try:
        await send(connection, copy, routing_key, exchange)
    except Unconfirmed:
        await message.reject(requeue=False)
