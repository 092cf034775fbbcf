"""RabbitMQ, around the calls that a reader came to see: connections, bounded receive, what a queue holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aio_pika
import httpx
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from .brokers import BrokerError, RabbitMQ
from .brokers.base import Connectable

for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


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


@dataclass(frozen=True)
class Depth:
    """What a queue holds: `ready` to be delivered, `unacknowledged` by its consumers; and how many consumers."""

    ready: int
    unacknowledged: int
    consumers: int


async def depth(rabbit: RabbitMQ, queue: str) -> Depth:
    """What the queue holds now, from the management API, which needs up to `collect_statistics_interval` to notice.

    Raises `BrokerError` when there is no such queue, or no management API.
    """
    found = await management(rabbit, f"/queues/{vhost(rabbit)}/{quote(queue, safe='')}")
    return Depth(found.get("messages_ready", 0), found.get("messages_unacknowledged", 0), found.get("consumers", 0))


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
        async with httpx.AsyncClient(timeout=5) as client:
            answer = await client.get(f"{address}/api{path}")
    except httpx.HTTPError as error:
        raise BrokerError(
            f"RabbitMQ's management API on {where} does not answer ({type(error).__name__}). Is the plugin enabled? "
            "MQLIB_RABBITMQ_MANAGEMENT_URL names its address."
        ) from None
    if answer.is_error:
        raise BrokerError(f"RabbitMQ's management API answers {path} with {answer.status_code} {answer.reason_phrase}")
    return answer.json()
