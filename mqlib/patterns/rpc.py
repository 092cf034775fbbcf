"""Request-reply on RabbitMQ: a call that waits for its answer, and never longer than its deadline.

All calls of a client share one connection and one reply consumer, and are told apart by correlation id. After
https://www.rabbitmq.com/docs/direct-reply-to, and Request-Reply, Return Address, Correlation Identifier and Message
Expiration of Hohpe and Woolf, "Enterprise Integration Patterns".
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import DeliveryError, PublishError
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from ..brokers.base import Connectable
from ..queues import declare
from .link import GONE, Consumer, Link, consuming, link

REPLIES = "amq.rabbitmq.reply-to"
LONGEST = 4_000_000.0
"""Seconds. RabbitMQ takes an expiration below 2^32 ms."""
LARGEST = 16 * 1024**2
"""Bytes, RabbitMQ 4's `max_message_size`: it closes the channel of a larger message, with all other calls on it."""

Handler = Callable[[Any], Awaitable[Any]]
Pending = dict[str, asyncio.Future[DeliveredMessage]]


class RpcError(Exception):
    """A call without a result. `outcome` is what is known of the request: "not done", "failed" or "unknown"."""

    outcome = "unknown"


class NoSuchService(RpcError):
    """There is no queue of that name: nobody got the request. Known at once."""

    outcome = "not done"


class RequestRefused(RpcError):
    """The broker did not take the request, as a full queue with `reject-publish` does."""

    outcome = "not done"


class RemoteError(RpcError):
    """The service's handler raised: `kind` is the name of the exception's class, `message` its text."""

    outcome = "failed"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class RpcTimeout(RpcError, TimeoutError):
    """No answer before the deadline. "unknown", or "not done" when there was no connection to send it on."""


class RpcInterrupted(RpcError, ConnectionError):
    """The connection was lost, or the client closed, while the call waited. Sent, or perhaps sent: "unknown"."""


class RpcClient:
    """Calls services; made by `rpc_client`. For any number of tasks at once."""

    def __init__(self) -> None:
        self.late = 0
        """Answers to calls of this client that no longer waited: after the deadline, or a second answer."""
        self.foreign = 0
        """Messages at the reply address that answer no call of this client."""
        self.link: Link
        """The connection; `link.reconnects` counts how often it was made again."""
        self._pending: Pending = {}  # of the channel that is open: replies to earlier ones cannot come any more
        self._token = secrets.token_hex(8) + "-"
        self._numbers = itertools.count()
        self._closed = False

    @property
    def pending(self) -> int:
        """Calls that wait for their answer."""
        return len(self._pending)

    async def call_rpc(self, service: str, request: Any, within: float = 10.0) -> Any:
        """The service's answer to `request`; both are what JSON can hold.

        `within` seconds cover everything: a connection that has to be made again, the broker's confirm, the service,
        the answer. The request expires with them. Raises an `RpcError`: `NoSuchService`, `RequestRefused`,
        `RemoteError`, `RpcTimeout`, `RpcInterrupted`; also `ValueError`, `TypeError` for what cannot be sent.
        """
        if not 0 < within <= LONGEST:
            raise ValueError(f"within is in seconds, above 0 and at most {LONGEST:,.0f}, not {within}")
        if self._closed:
            raise RuntimeError("the client is closed: call inside its `async with` block")
        body = _encoded(request)
        name, reply = f"{self._token}{next(self._numbers)}", asyncio.get_running_loop().create_future()
        pending: Pending | None = None
        try:
            async with asyncio.timeout(within) as limit:
                channel: Any = await (await self.link.channel()).get_underlay_channel()
                left = (limit.when() or 0) - reply.get_loop().time()
                properties = Basic.Properties(
                    correlation_id=name, message_id=name, reply_to=REPLIES, expiration=str(max(int(left * 1000), 0)),
                    content_type="application/json", delivery_mode=1,
                )  # fmt: skip
                pending = self._pending
                pending[name] = reply
                await channel.basic_publish(
                    body, routing_key=service, mandatory=True, properties=properties, wait=False
                )
                return _result(await reply)
        except PublishError:
            raise NoSuchService(f"no queue is named {service!r}; its first server makes it") from None
        except DeliveryError as error:
            raise RequestRefused(f"the queue {service!r} does not take the request ({error.frame})") from None
        except (asyncio.CancelledError, *GONE) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # by the caller; else a future was cancelled: by `_interrupt`, or by aiormq as it closes
            if reply.done() and not reply.cancelled():
                return _result(reply.result())  # it overtook the broker's confirm
            why = "the client was closed" if self._closed else f"the connection was lost: {self.link.error or error}"
            failure = (
                RpcTimeout(f"no answer from {service!r} within {within:g} s") if limit.expired()
                else RpcInterrupted(f"no answer from {service!r}: {why}")
            )  # fmt: skip
            failure.outcome = "not done" if pending is None else "unknown"
            raise failure from None
        finally:
            if pending is not None:
                pending.pop(name, None)

    async def _setup(self, channel: AbstractChannel) -> None:
        _interrupt(self._pending)  # a broker that froze did not say that their channel has closed
        pending: Pending = {}
        self._pending = pending
        channel.close_callbacks.add(lambda *_: _interrupt(pending))
        below = await channel.get_underlay_channel()
        await below.basic_consume(REPLIES, self._on_reply, no_ack=True)

    async def _on_reply(self, message: DeliveredMessage) -> None:
        name = message.header.properties.correlation_id or ""
        reply = self._pending.get(name)
        if reply is not None and not reply.done():
            reply.set_result(message)
        elif name.startswith(self._token):
            self.late += 1
        else:
            self.foreign += 1


def _interrupt(pending: Pending) -> None:
    for reply in pending.values():
        reply.cancel()


def _encoded(value: Any) -> bytes:
    body = json.dumps(value).encode()
    if len(body) > LARGEST:
        raise ValueError(f"{len(body):,} bytes as JSON, and a message has at most {LARGEST:,}: send where it is stored")
    return body


def _result(message: DeliveredMessage) -> Any:
    try:
        answer = json.loads(message.body)
        if message.header.properties.message_type != "error":
            return answer
        kind, text = answer["type"], answer["message"]
    except (ValueError, TypeError, KeyError):
        kind, text = "UnreadableReply", repr(bytes(message.body[:80]))
    raise RemoteError(kind, text)


@contextlib.asynccontextmanager
async def rpc_client(rabbit: Connectable) -> AsyncIterator[RpcClient]:
    """An `RpcClient` for the length of the block. Calls that still wait at its end are interrupted."""
    client = RpcClient()
    async with link(rabbit, client._setup) as client.link:
        try:
            yield client
        finally:
            client._closed = True
            _interrupt(client._pending)


class Unanswerable(Exception):
    """A request that has no answer: it is rejected, so a dead-letter exchange gets it if the queue has one."""


class RpcServer:
    """Answers the requests of one queue; made by `start_rpc_server`. Counts are of requests."""

    def __init__(self, service: str, handle: Handler) -> None:
        self.service = service
        self.answered = 0
        """A result was sent, and the broker has it."""
        self.failed = 0
        """The handler raised, and its error was sent."""
        self.rejected = 0
        """Without a reply address, or no JSON."""
        self.abandoned = 0
        """Stopped in the middle, since the caller's deadline was over."""
        self.unreachable = 0
        """The answer could not be handed over: the caller's reply queue is gone, or refuses it."""
        self.consumer: Consumer
        """What delivers: `consumer.link.reconnects`, `consumer.delivered`."""
        self._handle = handle

    async def _serve(self, message: AbstractIncomingMessage) -> None:
        """Replies, waits for the broker's confirm, and lets `consuming` acknowledge. In this order a crash means that
        the request is delivered again, never that its answer is missing."""
        try:
            # The expiration has run since before we got it, so when it is over here the caller has left.
            async with asyncio.timeout(message.expiration) as limit:  # type: ignore[arg-type]
                await self._answer(message)
        except TimeoutError:
            if not limit.expired():
                raise
            self.abandoned += 1
            raise Unanswerable("the caller left before the answer was ready") from None

    async def _answer(self, message: AbstractIncomingMessage) -> None:
        if not message.reply_to:
            self.rejected += 1
            raise Unanswerable("a request without reply_to")
        try:
            request = json.loads(message.body)
        except ValueError as error:
            self.rejected += 1
            await self._reply(message, _error(error), "error")
            raise Unanswerable(f"a request that is no JSON: {error}") from None
        try:
            body, kind = _encoded(await self._handle(request)), "result"
        except Exception as error:
            body, kind = _error(error), "error"
        if not await self._reply(message, body, kind):
            self.unreachable += 1
        elif kind == "error":
            self.failed += 1
        else:
            self.answered += 1

    async def _reply(self, message: AbstractIncomingMessage, body: bytes, kind: str) -> bool:
        """Whether the broker has it. (Of a direct reply it never says that nobody is there to get it.)"""
        channel: Any = message.channel
        address = message.reply_to or ""
        properties = Basic.Properties(
            correlation_id=message.correlation_id, message_type=kind, content_type="application/json", delivery_mode=1
        )
        mandatory = not address.startswith(REPLIES)  # before RabbitMQ 4.2 a direct reply counts as taken by no queue
        try:
            await channel.basic_publish(
                body, routing_key=address, mandatory=mandatory, properties=properties, wait=False
            )
        except (PublishError, DeliveryError):
            return False
        return True


def _error(error: Exception) -> bytes:
    return json.dumps({"type": type(error).__name__, "message": str(error)}).encode()


@contextlib.asynccontextmanager
async def start_rpc_server(
    rabbit: Connectable, service: str, handle: Handler, prefetch: int = 10, drain: float = 5.0,
    arguments: dict[str, Any] | None = None,
) -> AsyncIterator[RpcServer]:  # fmt: skip
    """Answers the calls of `service` with `await handle(request)`, at most `prefetch` at once, during the block.

    The queue of that name is durable, with these `arguments`, and stays. What the handler raises is the caller's
    `RemoteError`. A handler is stopped when its caller's deadline is over. At least once: a request whose server died
    is handled again, by another one. At the end no further request is taken; running handlers get `drain` seconds, and
    what they did not finish goes back to the queue. Raises `BrokerError` for a queue with other arguments.
    """
    await declare(rabbit, service, durable=True, arguments=arguments)

    async def queue(channel: AbstractChannel) -> AbstractQueue:
        return await channel.declare_queue(service, durable=True, arguments=arguments)

    server = RpcServer(service, handle)
    async with consuming(rabbit, queue, server._serve, prefetch, drain=drain) as server.consumer:
        yield server
