"""Transient messages of 200 B to a durable classic queue, each confirmed by the broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractChannel
from aiormq.abc import ChannelFrame
from pamqp import commands
from pamqp.header import ContentHeader

import mqlib as mq
from tests.benchmarks.core import Contender, Promise

BODY = bytes(200)
Way = Callable[[AbstractChannel, str, int], Awaitable[object]]


async def one_by_one(channel: AbstractChannel, queue: str, count: int) -> None:
    for _ in range(count):
        await channel.default_exchange.publish(Message(BODY), queue)


async def tasks(channel: AbstractChannel, queue: str, count: int, window: int) -> None:
    """`window` tasks, each of which publishes one after the other: no task a message."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await channel.default_exchange.publish(Message(BODY), queue)

    await asyncio.gather(*(work() for _ in range(window)))


async def chunks(channel: AbstractChannel, queue: str, count: int, window: int) -> None:
    """A task for each message, `window` at a time."""
    for first in range(0, count, window):
        await asyncio.gather(
            *(channel.default_exchange.publish(Message(BODY), queue) for _ in range(min(window, count - first)))
        )


async def basic_publish(channel: AbstractChannel, queue: str, count: int, window: int) -> None:
    """One level down, in aiormq: the publisher need not wait until the socket has taken each message."""
    below: Any = await channel.get_underlay_channel()
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await below.basic_publish(BODY, routing_key=queue, mandatory=True, wait=False)

    await asyncio.gather(*(work() for _ in range(window)))


async def frames(channel: AbstractChannel, queue: str, count: int, window: int) -> None:
    """Two levels down: aiormq's queue of frames and its table of confirms, fifty messages a time, and no tasks.

    (It waits for the middle of what is under way. Without message ids, what no queue takes could not be told.)
    """
    below: Any = await channel.get_underlay_channel()
    publish = commands.Basic.Publish(exchange="", routing_key=queue, mandatory=True)
    header = ContentHeader(properties=commands.Basic.Properties(delivery_mode=1), body_size=len(BODY))
    under_way: list[asyncio.Future[Any]] = []
    for first in range(0, count, 50):
        several = []
        async with below.lock:
            for _ in range(min(50, count - first)):
                below.delivery_tag += 1
                below.confirmations[below.delivery_tag] = confirm = below.create_future()
                under_way.append(confirm)
                several += [publish, header, *below._split_body(BODY)]
            await below.write_queue.put(ChannelFrame.marshall(frames=several, channel_number=below.number))
        if len(under_way) >= window:
            await under_way[len(under_way) // 2]
            under_way = [confirm for confirm in under_way if not confirm.done()]
    await asyncio.gather(*under_way)


async def pump(channel: AbstractChannel, queue: str, count: int) -> None:
    await mq.pump_messages(channel.default_exchange, queue, (Message(BODY) for _ in range(count)))


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    rabbit = mq.rabbitmq()
    count, single = (200, 20) if quick else (20_000, 2_000)
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("bench"), durable=True)

        def client(way: Way, number: int = count) -> Callable[[], Awaitable[float]]:
            async def measure() -> float:
                start = perf_counter()
                await way(channel, queue.name, number)
                seconds = perf_counter() - start
                assert (await queue.purge()).message_count == number
                return number / seconds

            return measure

        yield [
            Contender("publish, 256 tasks", client(partial(tasks, window=256)), "messages/s"),
            Contender("mq.pump_messages", client(pump), "messages/s", (Promise("publish, 256 tasks", 0.95),)),
            Contender("publish, one by one", client(one_by_one, single), "messages/s"),
            Contender("publish, 64 tasks", client(partial(tasks, window=64)), "messages/s"),
            Contender("publish, 2000 tasks", client(partial(tasks, window=2000)), "messages/s"),
            Contender("publish, chunks of 256", client(partial(chunks, window=256)), "messages/s"),
            Contender("aiormq basic_publish", client(partial(basic_publish, window=256)), "messages/s"),
            Contender("aiormq's frames", client(partial(frames, window=512)), "messages/s"),
        ]
