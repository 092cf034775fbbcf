from __future__ import annotations

import asyncio
import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aio_pika.connection import Connection
from aio_pika.exceptions import ChannelNotFoundEntity, PublishError

import mqlib as mq
from mqlib.patterns.link import Link, consuming, link
from mqlib.patterns.sending import NotSent, json_message, send


async def publish(made: Link, queue: str, *numbers: int) -> None:
    async with asyncio.timeout(20):
        channel = await made.channel()
        for number in numbers:
            message = aio_pika.Message(b"%d" % number, delivery_mode=2)
            await channel.default_exchange.publish(message, routing_key=queue)


async def nothing(_: AbstractIncomingMessage) -> None:
    pass


class Collector:
    """A handler that keeps what it got, and waits where it is told to."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.running = self.most = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, message: AbstractIncomingMessage) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.got.append(int(message.body))
        await self.go_on.wait()
        self.running -= 1


async def test_consumers_go_on_after_a_restart_of_the_broker() -> None:
    """Of a durable queue that is there, and of a temporary one that is made again, with what comes after it."""
    with mq.rabbitmq(private=True) as rabbit:
        await mq.declare(rabbit, durable_queue := rabbit.name("durable"), durable=True)
        temporary = rabbit.name("temporary")

        async def own(channel: AbstractChannel) -> AbstractQueue:
            return await channel.declare_queue(temporary, exclusive=True)

        first, second = Collector(), Collector()
        async with (
            link(rabbit) as sender,
            consuming(rabbit, durable_queue, first) as one,
            consuming(rabbit, own, second) as other,
        ):
            await publish(sender, durable_queue, 0)
            await publish(sender, temporary, 0)
            await mq.until(lambda: first.got == second.got == [0])
            await asyncio.to_thread(rabbit.nodes[0].restart, graceful=True)
            await mq.until(lambda: min(sender.reconnects, one.link.reconnects, other.link.reconnects) == 1, within=30)
            await publish(sender, durable_queue, *range(1, 6))
            await publish(sender, temporary, *range(1, 6))
            await mq.until(lambda: len(first.got) == len(second.got) == 6)
            with pytest.raises(PublishError):  # what no queue takes is told after the reconnect, too
                await publish(sender, "nobody", 1)
    assert first.got == second.got == [0, 1, 2, 3, 4, 5]


async def test_a_cut_does_not_interrupt_a_handler_and_the_message_comes_again(rabbit: mq.RabbitMQ) -> None:
    await mq.declare(rabbit, queue := rabbit.name("cut"), durable=True)
    collect = Collector()
    collect.go_on.clear()
    async with mq.proxy(rabbit) as proxy, link(rabbit) as sender, consuming(proxy, queue, collect) as consumer:
        await publish(sender, queue, 0, 1)
        await mq.until(lambda: collect.got == [0])
        proxy.cut()
        await mq.until(lambda: consumer.link.reconnects == 1, within=15)
        assert collect.running == 1, "the handler was not told"
        collect.go_on.set()
        await mq.until(lambda: collect.got == [0, 0, 1])
        await mq.until(lambda: consumer.unsettled == 1)
        await mq.until(lambda: collect.running == 0)
    assert collect.most == 1, "the prefetch holds over both connections"
    assert (await mq.depth(rabbit, queue, by="amqp")).ready == 0


async def test_a_queue_that_is_deleted_is_declared_again(rabbit: mq.RabbitMQ) -> None:
    name = rabbit.name("deleted")

    async def declared(channel: AbstractChannel) -> AbstractQueue:
        return await channel.declare_queue(name, durable=True)

    collect = Collector()
    async with link(rabbit) as sender, consuming(rabbit, declared, collect) as consumer:
        async with mq.channel(rabbit) as other:
            await (await other.get_queue(name)).delete(if_unused=False)
        await mq.until(lambda: consumer.link.reconnects == 1, within=15)
        await publish(sender, name, 1)
        await mq.until(lambda: collect.got == [1])


async def test_it_says_which_limit_the_broker_enforced() -> None:
    """A job that takes longer than the broker waits for its acknowledgement; nothing else runs meanwhile."""
    with mq.rabbitmq(private=True, settings={"consumer_timeout": "1000"}) as rabbit:
        await mq.declare(rabbit, queue := rabbit.name("slow"), durable=True)
        collect = Collector()
        collect.go_on.clear()
        async with link(rabbit) as sender, consuming(rabbit, queue, collect) as consumer:
            await publish(sender, queue, 0)
            await mq.until(lambda: consumer.link.error, within=15)
            assert "delivery acknowledgement on channel" in str(consumer.link.error).lower()
            collect.go_on.set()
            await mq.until(lambda: collect.got == [0, 0], within=15)


@pytest.mark.parametrize("requeue", [False, True])
async def test_a_handler_that_raises(rabbit: mq.RabbitMQ, requeue: bool) -> None:
    await mq.declare(rabbit, dead := rabbit.name("dead"), durable=True)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    await mq.declare(rabbit, queue := rabbit.name("work"), durable=True, arguments=arguments)
    tries: list[bool] = []

    async def fail(message: AbstractIncomingMessage) -> None:
        tries.append(bool(message.redelivered))
        if len(tries) < 3:
            raise ValueError("not today")

    async with link(rabbit) as sender, consuming(rabbit, queue, fail, requeue=requeue) as consumer:
        await publish(sender, queue, 1)
        if requeue:
            await mq.until(lambda: len(tries) == 3)
        async with mq.channel(rabbit) as reading:
            got = await mq.take_messages(await reading.get_queue(dead), 1, within=0 if requeue else 5)
    assert tries == ([False, True, True] if requeue else [False])
    assert len(got) == (0 if requeue else 1)
    assert consumer.errors == (2 if requeue else 1)
    assert str(consumer.error) == "not today"


async def test_a_handler_may_settle_its_message_itself(rabbit: mq.RabbitMQ) -> None:
    await mq.declare(rabbit, queue := rabbit.name("own"), durable=True)

    async def settle(message: AbstractIncomingMessage) -> None:
        await message.reject(requeue=not message.redelivered)

    async with link(rabbit) as sender, consuming(rabbit, queue, settle) as consumer:
        await publish(sender, queue, 1)
        await mq.until(lambda: consumer.delivered == 2)
    assert (consumer.errors, consumer.unsettled) == (0, 0)
    assert (await mq.depth(rabbit, queue, by="amqp")).ready == 0


@pytest.mark.parametrize("drain", [5.0, 0.0])
async def test_at_the_end_running_handlers_get_their_time_and_the_rest_goes_back(
    rabbit: mq.RabbitMQ, drain: float
) -> None:
    await mq.declare(rabbit, queue := rabbit.name("end"), durable=True)
    collect = Collector()
    collect.go_on.clear()
    async with link(rabbit) as sender, consuming(rabbit, queue, collect, prefetch=2, drain=drain):
        await publish(sender, queue, *range(5))
        await mq.until(lambda: collect.running == 2)
        if drain:
            asyncio.get_running_loop().call_later(0.2, collect.go_on.set)  # while it is being stopped
    assert collect.running == (0 if drain else 2)  # those that were cancelled did not finish
    assert sorted(collect.got) == [0, 1]
    async with mq.channel(rabbit) as reading:
        left = await mq.take_messages(await reading.get_queue(queue), 5, within=2 if drain else 5)
    assert sorted(int(message.body) for message in left) == ([2, 3, 4] if drain else [0, 1, 2, 3, 4])


def unclosed() -> list[Connection]:
    return [each for each in gc.get_objects() if isinstance(each, Connection) and not each.is_closed]


async def test_every_connection_is_closed_also_of_attempts_that_failed(rabbit: mq.RabbitMQ) -> None:
    """One that is not complains on stderr, if it is collected in another thread than that of its loop."""
    before = unclosed()
    async with contextlib.AsyncExitStack() as stack:
        async with mq.proxy(rabbit) as proxy:
            made = await stack.enter_async_context(link(proxy))
        await mq.until(lambda: "Connect call failed" in str(made.error))
        error = made.error  # its traceback holds what failed
    assert [each for each in unclosed() if each not in before] == [], error


async def test_a_link_whose_block_is_over_says_so_to_who_asks_and_to_who_waits(rabbit: mq.RabbitMQ) -> None:
    """Not: wait for a connection that nobody makes any more."""
    async with contextlib.AsyncExitStack() as stack:
        async with mq.proxy(rabbit) as proxy:
            made = await stack.enter_async_context(link(proxy))
        await mq.until(lambda: "Connect call failed" in str(made.error))
        waiting = asyncio.create_task(made.channel())
        await asyncio.sleep(0)
    for late in (waiting, made.channel()):
        with pytest.raises(RuntimeError, match="its block is over"):
            await asyncio.wait_for(late, 30)
    with pytest.raises(NotSent, match="its block is over"):
        await asyncio.wait_for(send(made, json_message(1), "any", within=60), 30)


async def test_what_cannot_be_is_said_at_once(rabbit: mq.RabbitMQ) -> None:
    nowhere: Any = SimpleNamespace(client={"url": "amqp://guest:guest@127.0.0.1:1/"})
    with pytest.raises(ConnectionError):
        async with link(nowhere):
            pass
    with pytest.raises(ChannelNotFoundEntity, match="no queue"):
        async with consuming(rabbit, rabbit.name("missing"), nothing):
            pass
    with pytest.raises(ValueError, match="prefetch is at least 1, not 0"):
        async with consuming(rabbit, "any", nothing, prefetch=0):
            pass
