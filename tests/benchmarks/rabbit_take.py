"""Messages of 200 B out of a durable classic queue, each acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

import mqlib as mq
from tests.benchmarks.core import Contender, Promise

BODY = bytes(200)
PREFETCH = 500
Way = Callable[[AbstractQueue, int], Awaitable[list[AbstractIncomingMessage]]]


async def take(queue: AbstractQueue, count: int) -> list[AbstractIncomingMessage]:
    return await mq.take_messages(queue, count, within=60)


async def get(queue: AbstractQueue, count: int) -> list[AbstractIncomingMessage]:
    messages = []
    for _ in range(count):
        messages.append(await queue.get())
        await messages[-1].ack()
    return messages


async def iterate(queue: AbstractQueue, count: int) -> list[AbstractIncomingMessage]:
    messages = []
    async with queue.iterator() as iterator:
        async for message in iterator:
            await message.ack()
            messages.append(message)
            if len(messages) == count:
                break
    return messages


async def consume(queue: AbstractQueue, count: int, together: int) -> list[AbstractIncomingMessage]:
    """Acknowledges `together` messages at a time."""
    messages: list[AbstractIncomingMessage] = []
    done = asyncio.Event()

    async def on_message(message: AbstractIncomingMessage) -> None:
        messages.append(message)
        if len(messages) % together == 0 or len(messages) == count:
            await message.ack(multiple=together > 1)
        if len(messages) == count:
            done.set()

    tag = await queue.consume(on_message)
    await done.wait()
    await queue.cancel(tag)
    return messages


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    rabbit = mq.rabbitmq()
    count = 100 if quick else 3_000
    async with mq.channel(rabbit, prefetch=PREFETCH) as channel:
        queue: Any = await channel.declare_queue(rabbit.name("bench"), durable=True)

        def client(way: Way) -> Callable[[], Awaitable[float]]:
            async def measure() -> float:
                await mq.pump_messages(channel.default_exchange, queue.name, (Message(BODY) for _ in range(count)))
                start = perf_counter()
                messages = await way(queue, count)
                seconds = perf_counter() - start
                assert len({message.delivery_tag for message in messages}) == count
                return count / seconds

            return measure

        yield [
            Contender("get and ack", client(get), "messages/s"),
            Contender("mq.take_messages", client(take), "messages/s", (Promise("get and ack", 0.95),)),
            Contender("iterator", client(iterate), "messages/s"),
            Contender("consume", client(partial(consume, together=1)), "messages/s"),
            Contender("consume, ack 100 at once", client(partial(consume, together=100)), "messages/s"),
        ]
