"""RabbitMQ, around the calls that a reader came to see: connections, bounded receive, what a queue holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote, urlsplit

import aio_pika
import httpx
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelClosed, ChannelPreconditionFailed

from .brokers import BrokerError, RabbitMQ
from .brokers.base import Connectable
from .sampling import curve, sampling

if TYPE_CHECKING:
    import pandas

ANSWER_SECONDS = 5.0

_REASONS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class _Quiet(logging.Handler):
    """Keeps the libraries' warnings off stderr, and the one fact among them that aiormq 7.2 tells nowhere else."""

    def emit(self, record: logging.LogRecord) -> None:
        if "was blocked by" in record.msg and isinstance(record.args, tuple):
            _REASONS[record.args[0]] = str(record.args[1])


for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).addHandler(_Quiet())


async def blocked(channel: AbstractChannel) -> str | None:
    """Why the broker lets nobody publish on the channel's connection now ("low on memory", "low on disk"), or None.

    See https://www.rabbitmq.com/docs/connection-blocked.
    """
    connection = (await channel.get_underlay_channel()).connection
    try:
        async with asyncio.timeout(0.05):  # it does not wait at all when the connection is not blocked
            await connection.ready()
    except TimeoutError:
        return _REASONS.get(connection, "an alarm")
    return None


@contextlib.asynccontextmanager
async def channel(rabbit: Connectable, prefetch: int | None = None, **options: Any) -> AsyncIterator[AbstractChannel]:
    """A channel on a connection of its own (to a broker, or through a proxy), both closed at the end of the block.

    `prefetch` limits the unacknowledged deliveries of each consumer; `options` go to `connection.channel(...)`.
    """
    connection = await aio_pika.connect(**rabbit.client)
    async with connection:
        opened = await connection.channel(**options)
        if prefetch is not None:
            await opened.set_qos(prefetch_count=prefetch)
        yield opened


async def take_messages(
    queue: AbstractQueue, count: int, within: float = 5.0, ack: bool = True
) -> list[AbstractIncomingMessage]:
    """Up to `count` messages, fetched one by one; fewer when `within` seconds pass first, or, with `within=0`, when the
    queue is empty. With `ack=False` they stay unacknowledged.
    """
    messages: list[AbstractIncomingMessage] = []
    deadline = time.monotonic() + within
    while len(messages) < count:
        message = await queue.get(fail=False)
        if message is not None:
            if ack:
                await message.ack()
            messages.append(message)
        elif time.monotonic() >= deadline:
            break
        else:
            await asyncio.sleep(0.02)
    return messages


async def declare(rabbit: Connectable, queue: str, **options: Any) -> None:
    """Declares a queue, as `channel.declare_queue(queue, **options)` does, and explains why that cannot be.

    It happens on a connection of its own: RabbitMQ answers a declaration that does not fit the queue that is there by
    closing the channel, and whatever else used that channel would go down with it. Raises `BrokerError`, which names
    the argument, what was wanted and what is there; `ValueError` without a name, since nobody would learn the one that
    RabbitMQ makes up. See https://www.rabbitmq.com/docs/queues#property-equivalence.
    """
    if not queue:
        raise ValueError("a queue that is declared for others needs a name")
    try:
        async with channel(rabbit) as asking:
            await asking.declare_queue(queue, **options)
    except ChannelPreconditionFailed as error:
        found = re.search(r"inequivalent arg '(.+?)' for queue .* received (.+) but current is (.+)", str(error))
        if not found:
            raise BrokerError(f"RabbitMQ refuses the queue {queue!r}: {error}") from None
        # 'quorum' may also be told as: the value 'quorum' of type 'longstr'
        argument, wanted, present = (
            re.sub(r"the value '(.*)' of type .*|^'|'$", r"\1", part) for part in found.groups()
        )
        raise BrokerError(
            f"the queue {queue!r} is there with {argument} {present}, and not {wanted}: what a queue is cannot be "
            "changed. Delete it, or use another name."
        ) from None
    except ChannelClosed as error:
        raise BrokerError(f"RabbitMQ refuses the queue {queue!r}: {error}") from None


@dataclass(frozen=True)
class Depth:
    """What a queue holds: `ready` to be delivered, `unacknowledged` by its consumers (None: not known); and how many
    consumers."""

    ready: int
    unacknowledged: int | None
    consumers: int


async def depth(rabbit: RabbitMQ, queue: str, by: Literal["management", "amqp"] | None = None) -> Depth:
    """What the queue holds now, from the management API where there is one, else by AMQP.

    The management API needs up to `collect_statistics_interval` to notice; AMQP (a passive declaration) is right at
    once, but does not tell what is unacknowledged. Raises `BrokerError` when there is no such queue, or no answer.
    """
    if by not in (None, "management", "amqp"):
        raise ValueError(f"by is management, amqp or None, not {by!r}")
    if by == "amqp" or (by is None and not rabbit.management_url):
        try:
            async with asyncio.timeout(ANSWER_SECONDS), channel(rabbit) as asking:
                found = (await asking.declare_queue(queue, passive=True)).declaration_result
        except (AMQPError, OSError) as error:
            raise BrokerError(f"the depth of queue {queue!r} is unknown: {str(error) or 'no answer in time'}") from None
        return Depth(found.message_count or 0, None, found.consumer_count or 0)
    known = await management(rabbit, f"/queues/{vhost(rabbit)}/{quote(queue, safe='')}")
    return Depth(known.get("messages_ready", 0), known.get("messages_unacknowledged", 0), known.get("consumers", 0))


class DepthMonitor:
    """What one queue of RabbitMQ holds. `by` as in `depth`."""

    def __init__(self, rabbit: RabbitMQ, queue: str, by: Literal["management", "amqp"] | None = None) -> None:
        self.queue, self.samples = queue, list[tuple[float, Depth]]()
        self.missed = 0
        """Samples that the broker did not answer."""
        self._rabbit, self._by = rabbit, by

    async def sample(self) -> Depth:
        """What it holds now; also kept in `samples`. Raises `BrokerError` when there is no answer, or no such queue."""
        found = await depth(self._rabbit, self.queue, self._by)
        self.samples.append((time.monotonic(), found))
        return found

    def curve(self) -> tuple[list[float], list[float]]:
        """Seconds since the first sample, and ready messages, for a figure."""
        return curve([(at, found.ready) for at, found in self.samples])

    def frame(self) -> pandas.DataFrame:
        """One row a sample: `time` in seconds since the first, ready, unacknowledged, consumers."""
        import pandas

        rows = ((at - self.samples[0][0], *vars(found).values()) for at, found in self.samples)
        columns = ["time", *Depth.__dataclass_fields__]
        return pandas.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[1:], "Int64"))


@contextlib.asynccontextmanager
async def monitor_depth(
    rabbit: RabbitMQ, queue: str, every: float = 0.2, by: Literal["management", "amqp"] | None = None
) -> AsyncIterator[DepthMonitor]:
    """A `DepthMonitor` that samples every `every` seconds during the block, first when it begins, last when it ends.

    A moment at which the broker does not answer makes no sample: `missed` counts those. Raises `BrokerError` when there
    is no answer to the first.
    """
    monitor = DepthMonitor(rabbit, queue, by)
    async with sampling(monitor, every):
        yield monitor


def vhost(rabbit: RabbitMQ) -> str:
    """The virtual host as it stands in a path of the management API."""
    return quote(unquote(urlsplit(rabbit.url).path[1:]) or "/", safe="")


async def management(rabbit: RabbitMQ, path: str) -> Any:
    """One GET of the management API, decoded. Raises `BrokerError` with its answer, or when it does not answer."""
    if not rabbit.management_url:
        raise BrokerError("this RabbitMQ has no management API; MQLIB_RABBITMQ_MANAGEMENT_URL names its address")
    address = rabbit.address[1]
    where = urlsplit(address).hostname
    try:
        async with httpx.AsyncClient(timeout=ANSWER_SECONDS) as client:
            answer = await client.get(f"{address}/api{path}")
    except httpx.HTTPError as error:
        raise BrokerError(
            f"RabbitMQ's management API on {where} does not answer ({type(error).__name__}). Is the plugin enabled? "
            "MQLIB_RABBITMQ_MANAGEMENT_URL names its address."
        ) from None
    if answer.is_error:
        raise BrokerError(f"RabbitMQ's management API answers {path} with {answer.status_code} {answer.reason_phrase}")
    return answer.json()
