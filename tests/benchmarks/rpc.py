"""Calls of an echo service over RabbitMQ, a hundred at a time: one connection, one each, and aio-pika's own pattern.

Each contender has its own server, in the same process as its callers, which takes a hundred requests at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.patterns import RPC, JsonRPC

import mqlib as mq
from mqlib.patterns.rpc import rpc_client, start_rpc_server
from tests.benchmarks.core import Contender, Promise, rate

TOGETHER = 100
Call = Callable[[int], Awaitable[Any]]


async def echo(request: Any) -> Any:
    return request


async def echo_x(*, x: Any) -> Any:
    """The same for aio-pika, whose services take named arguments."""
    return x


async def calls(call: Call, count: int) -> None:
    left = iter(range(count))

    async def work() -> None:
        for number in left:
            assert await call(number) == number

    await asyncio.gather(*(work() for _ in range(TOGETHER)))


async def connection_a_call(rabbit: mq.RabbitMQ, service: str, number: int) -> Any:
    """The way of the shortest program: a connection, a channel and a reply queue for each call."""
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def take(message: AbstractIncomingMessage) -> None:
        answer.set_result(message.body)

    async with mq.channel(rabbit) as channel:
        replies = await channel.declare_queue(exclusive=True)
        await replies.consume(take, no_ack=True)
        request = Message(json.dumps(number).encode(), reply_to=replies.name, correlation_id="1")
        await channel.default_exchange.publish(request, service)
        return json.loads(await answer)


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    rabbit = mq.rabbitmq()
    count, few = (200, 100) if quick else (4_000, 300)
    service, pickled, other = (rabbit.name(name) for name in ("bench", "pickled", "json"))
    async with (
        start_rpc_server(rabbit, service, echo, prefetch=TOGETHER),
        rpc_client(rabbit) as client,
        mq.channel(rabbit, prefetch=TOGETHER) as serving,
        mq.channel(rabbit) as calling,
    ):
        await (await RPC.create(serving, durable=True)).register(pickled, echo_x, durable=True)
        await (await JsonRPC.create(serving, durable=True)).register(other, echo_x, durable=True)
        rpc, json_rpc = await RPC.create(calling, durable=True), await JsonRPC.create(calling, durable=True)

        def contender(name: str, call: Call, number: int, *promises: Promise) -> Contender:
            return Contender(name, rate(number, lambda: calls(call, number)), "calls/s", promises)

        yield [
            contender("aio_pika.patterns.RPC", lambda number: rpc.call(pickled, {"x": number}), count),
            contender("patterns.rpc", lambda number: client.call_rpc(service, number), count,
                      Promise("a connection each", 5), Promise("aio_pika.patterns.RPC", 1)),
            contender("a connection each", lambda number: connection_a_call(rabbit, service, number), few),
            contender("aio_pika's JsonRPC", lambda number: json_rpc.call(other, {"x": number}), count),
        ]  # fmt: skip
