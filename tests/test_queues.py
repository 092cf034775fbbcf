"""Channels, bounded fetching and what a queue holds, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

import mqlib as mq
from mqlib import queues
from mqlib.brokers.machine import HOST, free_ports
from mqlib.queues import Depth


async def filled(rabbit: mq.RabbitMQ, channel: AbstractChannel, count: int) -> AbstractQueue:
    """A durable queue with `count` messages: 0, 1, 2 …"""
    queue = await channel.declare_queue(rabbit.name("tasks"), durable=True)
    for number in range(count):
        await channel.default_exchange.publish(Message(b"%d" % number), queue.name)
    return queue


def numbers(messages: list[AbstractIncomingMessage]) -> list[int]:
    return [int(message.body) for message in messages]


async def test_a_channel_and_its_connection_end_with_the_block(rabbit: mq.RabbitMQ) -> None:
    """Also when the block raises; nothing stays behind in the kernel."""
    before = asyncio.all_tasks()
    async with mq.channel(rabbit) as channel:
        connection = (await channel.get_underlay_channel()).connection
        assert not channel.is_closed
    assert channel.is_closed
    assert connection.is_closed
    seen: list[AbstractChannel] = []

    async def failing_block() -> None:
        async with mq.channel(rabbit) as channel:
            seen.append(channel)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_block()
    assert seen[0].is_closed
    await mq.until(lambda: asyncio.all_tasks() <= before)


async def test_a_channel_that_the_broker_closed_leaves_its_block_with_the_reason(rabbit: mq.RabbitMQ) -> None:
    """The error is the broker's, not one of closing what is closed already."""
    from aio_pika.exceptions import ChannelNotFoundEntity

    with pytest.raises(ChannelNotFoundEntity, match="no queue"):
        async with mq.channel(rabbit) as channel:
            await channel.get_queue(rabbit.name("missing"), ensure=True)


async def test_options_reach_the_channel(rabbit: mq.RabbitMQ) -> None:
    from aio_pika.exceptions import DeliveryError, PublishError

    async with mq.channel(rabbit, on_return_raises=True) as channel:
        with pytest.raises((DeliveryError, PublishError)):
            await channel.default_exchange.publish(Message(b""), rabbit.name("nobody"))


@pytest.mark.parametrize("prefetch", [1, 2, None])
async def test_prefetch_limits_what_is_unacknowledged(rabbit: mq.RabbitMQ, prefetch: int | None) -> None:
    """The broker's own count: as many as allowed are out, the others wait; without a limit all are out."""
    out = prefetch or 5
    got: list[AbstractIncomingMessage] = []

    async def keep(message: AbstractIncomingMessage) -> None:
        got.append(message)

    async with mq.channel(rabbit, prefetch) as channel:
        queue = await filled(rabbit, channel, 5)
        await queue.consume(keep)

        async def settled() -> bool:
            return await mq.depth(rabbit, queue.name) == Depth(5 - out, out, 1)

        await mq.until(settled, within=20)
        assert numbers(got) == list(range(out))
        if prefetch:  # each acknowledgement lets one more come
            await got[0].ack()
            await mq.until(lambda: len(got) == out + 1, within=20)


async def test_messages_are_taken_up_to_the_count_in_order(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 5)
        taken = [numbers(await mq.take_messages(queue, count, within=20)) for count in (2, 0, 1, 2)]
    assert taken == [[0, 1], [], [2], [3, 4]]


async def test_fewer_messages_are_no_error(rabbit: mq.RabbitMQ) -> None:
    """With `within=0` the queue's being empty is the end; otherwise the deadline is."""
    async with asyncio.timeout(20), mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 2)
        assert numbers(await mq.take_messages(queue, 9, within=0)) == [0, 1]
        assert await mq.take_messages(queue, 9, within=0) == []
        assert await mq.take_messages(queue, 9, within=0.1) == []


async def test_a_message_that_comes_while_waiting_is_taken(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel, asyncio.TaskGroup() as group:
        queue = await filled(rabbit, channel, 0)
        taking = group.create_task(mq.take_messages(queue, 1, within=20))
        await asyncio.sleep(0)
        await channel.default_exchange.publish(Message(b"7"), queue.name)
        assert numbers(await taking) == [7]


async def test_acknowledged_messages_are_gone(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 3)
        await mq.take_messages(queue, 2, within=20)
    async with mq.channel(rabbit) as channel:
        [left] = await mq.take_messages(await channel.get_queue(queue.name), 3, within=0)
    assert (left.body, left.redelivered) == (b"2", False)


async def test_without_an_acknowledgement_they_stay(rabbit: mq.RabbitMQ) -> None:
    """Taken, not acknowledged, and the channel closed: they are delivered again, and say so."""
    async with mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 3)
        assert numbers(await mq.take_messages(queue, 2, within=20, ack=False)) == [0, 1]
    async with mq.channel(rabbit) as channel:
        again = await mq.take_messages(await channel.get_queue(queue.name), 3, within=20)
    assert [(int(message.body), message.redelivered) for message in again] == [(0, True), (1, True), (2, False)]


async def test_depth_is_what_the_queue_holds(rabbit: mq.RabbitMQ) -> None:
    """Ready, unacknowledged and consumers; and the total stays the same while messages are out."""

    async def depth_is(expected: Depth) -> bool:
        return await mq.depth(rabbit, queue.name) == expected

    async def leave_it(message: AbstractIncomingMessage) -> None:
        pass

    async with mq.channel(rabbit, prefetch=1) as channel:
        queue = await filled(rabbit, channel, 6)
        await mq.take_messages(queue, 3, within=20, ack=False)
        await queue.consume(leave_it)
        await mq.until(lambda: depth_is(Depth(2, 4, 1)), within=30)
    await mq.until(lambda: depth_is(Depth(6, 0, 0)), within=30)


async def test_depth_of_a_name_that_has_to_be_quoted(rabbit: mq.RabbitMQ) -> None:
    """AMQP allows what a URL does not."""
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(f"{rabbit.name('odd')}/#,:", exclusive=True)
        found: list[Any] = []

        async def known() -> bool:
            try:
                found[:] = [await mq.depth(rabbit, queue.name)]
            except mq.BrokerError:
                return False
            return True

        await mq.until(known, within=20)
    assert found[0].ready == 0


async def test_depth_of_a_missing_queue_is_an_error_that_names_it(rabbit: mq.RabbitMQ) -> None:
    name = rabbit.name("missing")
    with pytest.raises(mq.BrokerError, match=f"{name}.*404"):
        await mq.depth(rabbit, name)


@pytest.mark.parametrize("address", [f"http://guest:guest@{HOST}:PORT", ""], ids=["closed port", "none"])
async def test_without_a_management_api_the_error_says_so(rabbit: mq.RabbitMQ, address: str) -> None:
    """And which variable names it; never the password, and never "None"."""
    elsewhere = dataclasses.replace(rabbit, management_url=address.replace("PORT", str(free_ports(1)[0])))
    with pytest.raises(mq.BrokerError, match="management API") as error:
        await mq.depth(elsewhere, "any")
    assert "MQLIB_RABBITMQ_MANAGEMENT_URL" in str(error.value)
    assert "None" not in str(error.value)
    assert "guest" not in str(error.value)


async def test_wrong_credentials_of_the_management_api_are_told(rabbit: mq.RabbitMQ) -> None:
    address = rabbit.management_url.rpartition("@")[2]
    stranger = dataclasses.replace(rabbit, management_url=f"http://stranger:wrong@{address}")
    with pytest.raises(mq.BrokerError, match="401"):
        await mq.depth(stranger, "any")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", "%2F"), ("/", "%2F"), ("//", "%2F"), ("/%2F", "%2F"), ("/team", "team"), ("/a%2Fb", "a%2Fb")],
)
def test_the_virtual_host_as_the_management_api_wants_it(rabbit: mq.RabbitMQ, path: str, expected: str) -> None:
    """Every way in which a URL can say it, `//` among them, which aio-pika takes for the host `/`, too."""
    assert queues.vhost(dataclasses.replace(rabbit, url=f"amqp://guest:guest@localhost:5672{path}")) == expected
