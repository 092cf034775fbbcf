"""Channels, bounded fetching and what a queue holds, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
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
        await mq.depth(elsewhere, "any", by="management")
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


async def test_depth_by_amqp_is_right_at_once(rabbit: mq.RabbitMQ) -> None:
    """Also where there is no management API; what is unacknowledged it cannot know, and says so."""
    bare = dataclasses.replace(rabbit, management_url="")
    async with mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 6)
        await mq.take_messages(queue, 2, within=20, ack=False)
        for found in (await mq.depth(rabbit, queue.name, by="amqp"), await mq.depth(bare, queue.name)):
            assert found == Depth(4, None, 0)
    for broker in (dataclasses.replace(bare, url=f"amqp://guest:guest@{HOST}:{free_ports(1)[0]}/"), bare):
        with pytest.raises(mq.BrokerError, match="the depth of queue 'missing' is unknown"):
            await mq.depth(broker, "missing")


@pytest.mark.parametrize("by", ["management", "amqp"])
async def test_depth_over_time(rabbit: mq.RabbitMQ, by: Any) -> None:
    """As a frame and as a curve, from the block's beginning to its end."""
    async with mq.channel(rabbit) as channel:
        queue = await filled(rabbit, channel, 5)

        async def known() -> bool:
            return (await mq.depth(rabbit, queue.name, by)).ready == 5

        await mq.until(known, within=30)
        async with mq.monitor_depth(rabbit, queue.name, every=0.02, by=by) as monitor:
            await mq.take_messages(queue, 2)
            await mq.until(lambda: monitor.samples[-1][1].ready == 3, within=30)
    frame = monitor.frame()
    assert list(frame.columns) == ["time", "ready", "unacknowledged", "consumers"]
    assert (frame["ready"].iloc[0], frame["ready"].iloc[-1], len(frame)) == (5, 3, len(monitor.samples))
    assert frame["unacknowledged"].isna().all() == (by == "amqp")
    seconds, ready = monitor.curve()
    assert (seconds[0], ready[0], ready[-1], monitor.missed) == (0.0, 5, 3, 0)
    with pytest.raises(mq.BrokerError):
        async with mq.monitor_depth(rabbit, "missing", by=by):
            pytest.fail("there is no such queue")


async def test_depth_by_something_else_is_refused(rabbit: mq.RabbitMQ) -> None:
    with pytest.raises(ValueError, match="'http'"):
        await mq.depth(rabbit, "any", by="http")  # type: ignore[arg-type]


async def test_depth_of_a_broker_that_is_frozen_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither way waits for ever: sampling goes on, and the block ends while nothing answers."""
    tasks, bys = asyncio.all_tasks(), ("management", "amqp")
    with mq.rabbitmq(private=True) as own:
        await mq.declare(own, "tasks", durable=True)
        async with AsyncExitStack() as until_the_end, asyncio.timeout(60), AsyncExitStack() as blocks:
            opened = [blocks.enter_async_context(mq.monitor_depth(own, "tasks", 0.02, by)) for by in bys]  # type: ignore[arg-type]
            monitors = [await each for each in opened]
            monkeypatch.setattr(queues, "ANSWER_SECONDS", 0.5)
            await until_the_end.enter_async_context(mq.paused(own.nodes[0]))
            await mq.until(lambda: all(monitor.missed for monitor in monitors), within=20)
            missed = [monitor.missed for monitor in monitors]
            await blocks.aclose()
            assert all(monitor.missed > before for monitor, before in zip(monitors, missed, strict=True))
    assert {found for monitor in monitors for _, found in monitor.samples} <= {Depth(0, 0, 0), Depth(0, None, 0)}
    await mq.until(lambda: asyncio.all_tasks() <= tasks)


@pytest.mark.parametrize(
    ("present", "wanted", "words"),
    [
        ({"arguments": {"x-message-ttl": 1}}, {"arguments": {"x-message-ttl": 2}}, "x-message-ttl 1, and not 2"),
        ({"durable": True}, {"durable": False}, "durable true, and not false"),
        ({"arguments": {"x-max-length": 5}}, {}, "x-max-length 5, and not none"),
        ({}, {"auto_delete": True}, "auto_delete false, and not true"),
        ({"arguments": {"x-overflow": "drop-head"}}, {"arguments": {"x-overflow": "reject-publish"}},
         "x-overflow drop-head, and not reject-publish"),
        ({}, {"arguments": {"x-dead-letter-exchange": "dlx"}}, "x-dead-letter-exchange none, and not dlx"),
        ({"durable": True, "arguments": {"x-queue-type": "quorum"}}, {"durable": True}, "x-queue-type quorum, and not"),
    ],
    ids=["ttl", "durable", "max length", "auto-delete", "two words", "dead letters", "queue type"],
)  # fmt: skip
async def test_a_declaration_that_does_not_fit_says_what_is_there(
    rabbit: mq.RabbitMQ, present: dict[str, Any], wanted: dict[str, Any], words: str
) -> None:
    """Work on other channels goes on: its consumer, its unacknowledged message, its next declaration."""
    name = rabbit.name("declared")
    async with mq.channel(rabbit) as busy:
        queue = await busy.declare_queue(name, **present)
        got: list[AbstractIncomingMessage] = []

        async def keep(message: AbstractIncomingMessage) -> None:
            got.append(message)

        await queue.consume(keep)
        await busy.default_exchange.publish(Message(b"before"), name)
        await mq.until(lambda: len(got) == 1)
        with pytest.raises(mq.BrokerError, match=f"the queue '{name}' is there with {words}.*Delete it"):
            await mq.declare(rabbit, name, **wanted)
        await busy.default_exchange.publish(Message(b"after"), name)
        await mq.until(lambda: len(got) == 2)
        for message in got:
            await message.ack()
        await mq.declare(rabbit, name, **present)


async def test_a_queue_that_is_declared_is_there(rabbit: mq.RabbitMQ) -> None:
    name = rabbit.name("new")
    await mq.declare(rabbit, name, durable=True)
    async with mq.channel(rabbit) as channel:
        await channel.default_exchange.publish(Message(b"x"), name)
        assert len(await mq.take_messages(await channel.get_queue(name), 1)) == 1


async def test_what_else_rabbitmq_refuses_is_told_in_its_words(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel:
        exclusive = await channel.declare_queue(rabbit.name("mine"), exclusive=True)
        with pytest.raises(mq.BrokerError, match="RESOURCE_LOCKED"):
            await mq.declare(rabbit, exclusive.name, exclusive=True)
    with pytest.raises(mq.BrokerError, match="ACCESS_REFUSED"):
        await mq.declare(rabbit, "amq.mine")
    with pytest.raises(mq.BrokerError, match="NOT_FOUND"):
        await mq.declare(rabbit, rabbit.name("missing"), passive=True)
    with pytest.raises(ValueError, match="needs a name"):
        await mq.declare(rabbit, "")
    with pytest.raises(mq.BrokerError, match="PRECONDITION_FAILED"):
        await mq.declare(rabbit, rabbit.name("odd"), arguments={"x-max-length": -1})
