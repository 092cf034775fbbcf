"""Where a reader is, in its database; and what a stream has first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aio_pika
import pytest
import sqlalchemy as sa
from aio_pika.exceptions import ChannelNotFoundEntity

import mqlib as mq
from mqlib.patterns import stream_offsets
from mqlib.patterns.link import GONE
from mqlib.patterns.stream_offsets import create_tables, first_offset, offset_of, store_offset, stored_offset
from tests.patterns import test_outbox as databases
from tests.patterns.test_stream_reader import new_stream

engine, postgres = databases.engine, databases.postgres


async def test_each_reader_of_each_stream_has_its_offset(engine: sa.Engine) -> None:
    create_tables(engine)
    create_tables(engine)
    with engine.begin() as connection:
        assert stored_offset(connection, "orders", "billing") is None
        store_offset(connection, "orders", "billing", 7)
        store_offset(connection, "orders", "search", 3_000_000_000)
        store_offset(connection, "returns", "billing", 0)
    with engine.begin() as connection:
        names = [("orders", "billing"), ("orders", "search"), ("returns", "billing"), ("returns", "search")]
        assert [stored_offset(connection, *name) for name in names] == [7, 3_000_000_000, 0, None]
        store_offset(connection, "orders", "billing", 2)
        store_offset(connection, "orders", "search", None)
        assert [stored_offset(connection, *name) for name in names] == [2, None, 0, None]


async def test_an_offset_goes_with_its_transaction(engine: sa.Engine) -> None:
    create_tables(engine)
    with engine.connect() as connection:
        store_offset(connection, "orders", "billing", 7)
        connection.rollback()
        assert stored_offset(connection, "orders", "billing") is None
        connection.rollback()


async def test_nobody_changes_an_offset_that_was_read_before_the_transaction_ends(engine: sa.Engine) -> None:
    create_tables(engine)
    with engine.begin() as connection:
        store_offset(connection, "orders", "billing", 7)

    def other() -> int | None:
        with engine.begin() as connection:
            return stored_offset(connection, "orders", "billing")

    with engine.connect() as connection:
        assert stored_offset(connection, "orders", "billing") == 7
        answer = asyncio.ensure_future(asyncio.to_thread(other))
        done, _ = await asyncio.wait([answer], timeout=0.3)
        assert not done
        store_offset(connection, "orders", "billing", 8)
        connection.commit()
    assert await answer == 8


async def test_the_first_offset_from_somewhere_on(rabbit: mq.RabbitMQ) -> None:
    stream, empty = await new_stream(rabbit, 5), await new_stream(rabbit)
    assert [await first_offset(rabbit, stream, start) for start in ("first", "last", 2)] == [0, 4, 2]
    assert await first_offset(rabbit, stream, 5, within=0.3) is None
    assert await first_offset(rabbit, empty, within=0.3) is None
    with pytest.raises(ChannelNotFoundEntity):
        await first_offset(rabbit, rabbit.name("nothing"))


async def outcome(question: Coroutine[Any, Any, int | None]) -> object:
    try:
        return await question
    except Exception as error:
        return error


async def test_no_answer_is_not_taken_for_an_empty_stream(rabbit: mq.RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, consume, begun = await new_stream(rabbit), aio_pika.Queue.consume, asyncio.Event()

    async def consumes(*arguments: Any, **options: Any) -> Any:
        tag = await consume(*arguments, **options)
        begun.set()
        return tag

    monkeypatch.setattr(aio_pika.Queue, "consume", consumes)
    for cut in (True, False):
        begun.clear()
        monkeypatch.setattr(stream_offsets, "OPEN_SECONDS", 20 if cut else 5)
        async with mq.proxy(rabbit) as proxy, asyncio.TaskGroup() as group:
            answer = group.create_task(outcome(first_offset(proxy, stream, within=60 if cut else 2)))
            await begun.wait()
            if cut:
                proxy.cut()
                error = await answer
                assert isinstance(error, GONE)
                assert not isinstance(error, TimeoutError), "it is told at once"
            else:
                with proxy.swallow("down"):
                    assert isinstance(await answer, TimeoutError)


async def test_the_offset_of_a_message(rabbit: mq.RabbitMQ) -> None:
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("classic"), durable=True)
        await channel.default_exchange.publish(aio_pika.Message(b""), queue.name)
        [message] = await mq.take_messages(queue, 1)
    with pytest.raises(ValueError, match="is no stream"):
        offset_of(message)
