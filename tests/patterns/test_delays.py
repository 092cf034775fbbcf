"""Delays on RabbitMQ: none early, none behind a longer one, none lost at a restart."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity

import mqlib as mq
from mqlib.brokers.base import Connectable
from mqlib.patterns.delays import Delays
from mqlib.patterns.link import Link, consuming, link
from mqlib.patterns.sending import Unconfirmed, Unknown


class Arrivals:
    """What came, in order: number and moment."""

    def __init__(self) -> None:
        self.came: list[tuple[int, float]] = []
        self.messages: list[AbstractIncomingMessage] = []

    async def __call__(self, message: AbstractIncomingMessage) -> None:
        self.came.append((int(message.body), time.monotonic()))
        self.messages.append(message)

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.came]


@asynccontextmanager
async def delaying(
    rabbit: mq.RabbitMQ, through: Connectable | None = None, **options: Any
) -> AsyncIterator[tuple[Link, Delays, str, Arrivals]]:
    """A connection, delays, a bound queue, and what arrives there."""
    delays, arrivals, queue = Delays(rabbit.name("delays"), **{"levels": 10, **options}), Arrivals(), rabbit.name("due")
    await mq.declare(rabbit, queue, durable=True)
    async with link(through or rabbit, delays.declare) as connection, consuming(rabbit, queue, arrivals, prefetch=50):
        await delays.bind(await connection.channel(), queue)
        yield connection, delays, queue, arrivals
        await delays.delete(await connection.channel())


@pytest.mark.parametrize("durable", [True, False])
async def test_none_is_early_and_none_waits_for_a_longer_one(rabbit: mq.RabbitMQ, durable: bool) -> None:
    """A long one first, then shorter ones: each comes when it is due, with its body and headers."""
    asked, start = [1500, 400, 900, 0, 5], {}
    async with delaying(rabbit, durable=durable) as (connection, delays, queue, arrivals):
        for number, delay in enumerate(asked):
            start[number] = time.monotonic()
            message = Message(b"%d" % number, headers={"trace": "t"}, correlation_id="c")
            await delays.send(connection, queue, message, delay)
        await mq.until(lambda: len(arrivals.came) == 5, within=20)
    assert sorted(arrivals.numbers[:2]) == [3, 4]
    assert arrivals.numbers[2:] == [1, 2, 0]
    assert all(at - start[number] >= asked[number] / 1000 for number, at in arrivals.came)
    assert {(each.headers["trace"], each.correlation_id, each.delivery_mode) for each in arrivals.messages} == {
        ("t", "c", 2)
    }


async def test_a_message_that_was_delayed_may_be_delayed_again(rabbit: mq.RabbitMQ) -> None:
    """With the headers that RabbitMQ gave it; 3.10 would take it for one in a circle, and drop it."""
    async with delaying(rabbit) as (connection, delays, queue, arrivals):
        await delays.send(connection, queue, b"0", 50)
        [_] = await mq.until(lambda: arrivals.messages)
        assert "x-death" in arrivals.messages[0].headers
        await delays.send(connection, queue, arrivals.messages[0], 50)
        await mq.until(lambda: len(arrivals.came) == 2)


async def test_queues_with_names_alike_get_their_own(rabbit: mq.RabbitMQ) -> None:
    """A name with a dot is two words of a routing key, and the other name may be the last of them."""
    async with delaying(rabbit) as (connection, delays, queue, arrivals):
        short, longer = queue.rpartition(".")[2], Arrivals()
        channel = await connection.channel()
        await channel.declare_queue(short, exclusive=True)
        await delays.bind(channel, short)
        async with consuming(rabbit, queue, longer):
            await delays.send(connection, queue, b"0", 20)
            await delays.send(connection, queue, b"1", 0)
            await mq.until(lambda: len(longer.came) + len(arrivals.came) == 2)
        assert (await channel.declare_queue(short, passive=True)).declaration_result.message_count == 0


async def test_what_has_nowhere_to_go_is_kept(rabbit: mq.RabbitMQ) -> None:
    async with delaying(rabbit) as (connection, delays, _, _):
        await delays.send(connection, "nobody", b"7", 30)
        channel = await connection.channel()
        [astray] = await mq.take_messages(await channel.get_queue(delays.unroutable), 1)
    assert astray.body == b"7"


async def test_nothing_is_left_when_it_is_deleted(rabbit: mq.RabbitMQ) -> None:
    async with delaying(rabbit, levels=3) as (_, delays, _, _):
        pass
    for kind, name in (("queue", "0"), ("queue", "2"), ("queue", "unroutable"), ("exchange", "2"), ("exchange", "due")):
        async with mq.channel(rabbit) as channel:
            with pytest.raises(ChannelNotFoundEntity):
                await getattr(channel, f"get_{kind}")(f"{delays.name}.{name}", ensure=True)


@pytest.mark.parametrize("delay", [-1, 10_231, 0.5, True, "soon"])
async def test_a_delay_that_cannot_be_is_refused(rabbit: mq.RabbitMQ, delay: Any) -> None:
    with pytest.raises(ValueError, match="an integer from 0 to 10230 ms"):
        Delays("d", levels=10).route("queue", delay)


async def test_other_mistakes_are_refused(rabbit: mq.RabbitMQ) -> None:
    wrong: list[dict[str, Any]] = [{"unit": 0}, {"levels": 0}, {"levels": 49}]
    for options in wrong:
        with pytest.raises(ValueError, match="1 to 48 levels"):
            Delays("d", **options)
    with pytest.raises(ValueError, match="10 levels leave 235 bytes"):
        Delays("d", levels=10).route("q" * 236, 1)
    async with delaying(rabbit) as (connection, delays, queue, arrivals):
        with pytest.raises(ValueError, match="an expiration of 1"):
            await delays.send(connection, queue, Message(b"0", expiration=1), 30)
        async with mq.channel(rabbit) as channel:
            with pytest.raises(ValueError, match="is a pattern"):
                await delays.bind(channel, "a.#")
            with pytest.raises(ChannelNotFoundEntity):
                await delays.bind(channel, "not-there")
        await delays.send(connection, queue, b"1", 10)
        await mq.until(lambda: arrivals.numbers == [1])


def test_the_route_is_the_delay_rounded_up() -> None:
    delays = Delays("d", unit=10, levels=4)
    assert [delays.route("q", delay) for delay in (0, 1, 10, 11, 150)] == [
        "0.0.0.0.q", "0.0.0.1.q", "0.0.0.1.q", "0.0.1.0.q", "1.1.1.1.q",
    ]  # fmt: skip
    assert Delays("d").longest == 10 * (2**28 - 1)


async def test_ten_thousand_messages_each_once_and_none_early(rabbit: mq.RabbitMQ) -> None:
    ledger, numbers, sent = mq.Ledger(), random.Random(7), dict[int, float]()
    asked = [numbers.randrange(1000) for _ in range(10_000)]
    async with delaying(rabbit, levels=7, durable=False) as (connection, delays, queue, arrivals):

        async def send(number: int) -> None:
            ledger.sent(number)
            sent[number] = time.monotonic()
            await delays.send(connection, queue, b"%d" % number, asked[number], within=30)
            ledger.acknowledged(number)

        for first in range(0, 10_000, 500):
            await asyncio.gather(*map(send, range(first, first + 500)))
        await mq.until(lambda: len(arrivals.came) >= 10_000, within=60)
    for number in arrivals.numbers:
        ledger.received(number)
    assert ledger.exact, ledger
    assert all(at - sent[number] >= asked[number] / 1000 for number, at in arrivals.came)


def beyond(proxy: mq.Proxy, bytes_up: int) -> bool:
    return proxy.up > bytes_up


async def test_a_connection_that_is_cut_loses_nothing_that_was_confirmed(rabbit: mq.RabbitMQ) -> None:
    """What has no answer is unknown, and sent again it may come twice: never called failed, never lost."""
    ledger = mq.Ledger()
    async with mq.proxy(rabbit) as proxy, delaying(rabbit, proxy) as (connection, delays, queue, arrivals):

        async def send(number: int) -> None:
            ledger.sent(number)
            while True:
                try:
                    await delays.send(connection, queue, b"%d" % number, 200)
                    break
                except Unconfirmed:
                    pass
            ledger.acknowledged(number)

        for part in range(5):
            async with asyncio.TaskGroup() as tasks:
                for number in range(40 * part, 40 * part + 40):
                    tasks.create_task(send(number))
                await mq.until(partial(beyond, proxy, proxy.up))
                proxy.cut()
        await mq.until(lambda: len(set(arrivals.numbers)) == 200, within=20)
        assert connection.reconnects >= 1
    for number in arrivals.numbers:
        ledger.received(number)
    assert ledger.lost == 0, ledger


async def test_a_restart_of_the_broker_keeps_what_waits() -> None:
    """Overdue ones come when it is back, others when they are due. In classic queues only persistent ones do."""
    with mq.rabbitmq(private=True) as rabbit:
        node, far = rabbit.nodes[0], 9000
        async with (
            delaying(rabbit, durable=True) as (safe, quorum, first, survivors),
            delaying(rabbit, durable=False) as (fast, classic, second, others),
        ):
            start = time.monotonic()
            for persistent in (True, False):  # the numbers 0 and 1 are soon, 10 and 11 late
                for number, delay in ((1 - persistent, 500), (11 - persistent, far)):
                    await quorum.send(safe, first, b"%d" % number, delay, persistent)
                    await classic.send(fast, second, b"%d" % number, delay, persistent)
            await asyncio.to_thread(node.restart, graceful=True)
            back = time.monotonic()
            await mq.until(lambda: len(survivors.came) == 4 and len(others.came) == 2, within=30)
            assert sorted(survivors.numbers) == [0, 1, 10, 11], "all, persistent or not"
            assert sorted(others.numbers) == [0, 10], "the others are lost, as said"
            late = [at for number, at in survivors.came + others.came if number >= 10]
            assert all(at - start >= far / 1000 for at in late)
            assert all(at < back + far / 1000 for at in late), "and their delay did not begin anew"
            await asyncio.wait_for(safe.channel(), 30)  # the sender is back, too
            async with mq.paused(node):
                with pytest.raises(Unknown, match=r"no answer within 0\.3 s"):
                    await quorum.send(safe, first, b"20", 10, within=0.3)
            await mq.until(lambda: 20 in survivors.numbers, within=20)
