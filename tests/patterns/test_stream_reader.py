"""A stream is read once, or at least once, from anywhere, through crashes and cuts; and what is lost is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import aio_pika
import pytest
import sqlalchemy as sa
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

import mqlib as mq
from mqlib.patterns import stream_reader
from mqlib.patterns.stream_offsets import create_tables, first_offset, offset_of, store_offset, stored_offset
from mqlib.patterns.stream_reader import Gap, OffsetsLost, applying, handling
from tests.patterns import test_outbox as databases

engine, sqlite, postgresql, postgres = (
    databases.engine, databases.sqlite, databases.postgresql, databases.postgres
)  # fmt: skip
EFFECTS = databases.EFFECTS
SMALL = {"x-max-length-bytes": 60_000, "x-stream-max-segment-size-bytes": 20_000}


@pytest.fixture(autouse=True)
def tables(request: pytest.FixtureRequest) -> None:
    for name in ("engine", "sqlite", "postgresql"):
        if name in request.fixturenames:
            create_tables(request.getfixturevalue(name))


async def publish(rabbit: mq.RabbitMQ, stream: str, numbers: Sequence[int], *filters: str) -> None:
    """These numbers, with these filter values in turn; each is a chunk of its own."""
    async with mq.channel(rabbit) as channel:
        for number in numbers:
            headers: dict[str, Any] = {"x-stream-filter-value": filters[number % len(filters)]} if filters else {}
            message = aio_pika.Message(b"%d" % number, headers=headers)
            await channel.default_exchange.publish(message, stream)


async def new_stream(rabbit: mq.RabbitMQ, count: int = 0, *filters: str, **arguments: Any) -> str:
    stream = rabbit.name("stream")
    await mq.declare(rabbit, stream, durable=True, arguments={"x-queue-type": "stream", **arguments})
    await publish(rabbit, stream, range(count), *filters)
    return stream


async def flood(rabbit: mq.RabbitMQ, stream: str, beyond: int) -> None:
    """Publishes until retention has removed everything up to the offset `beyond`."""
    async with mq.channel(rabbit) as channel:
        for _ in range(200):
            message = aio_pika.Message(b"0" * 1000)
            await asyncio.gather(*(channel.default_exchange.publish(message, stream) for _ in range(50)))
            if (await first_offset(rabbit, stream) or 0) > beyond:
                return
    raise AssertionError("retention removed nothing")


def effect(connection: sa.Connection, message: AbstractIncomingMessage) -> None:
    connection.execute(sa.insert(EFFECTS), {"number": int(message.body)})


def effects(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(EFFECTS.c.number)))


def stored(engine: sa.Engine, stream: str, reader: str = "r") -> int | None:
    with engine.begin() as connection:
        return stored_offset(connection, stream, reader)


def put(engine: sa.Engine, stream: str, offset: int | None) -> None:
    with engine.begin() as connection:
        store_offset(connection, stream, "r", offset)


class Collector:
    """A handler that keeps what it got, and stops at `until` until it is let go on."""

    def __init__(self, until: int | None = None) -> None:
        self.got: list[int] = []
        self.until = until
        self.go_on = asyncio.Event()

    def has(self, count: int) -> bool:
        return len(self.got) == count

    async def __call__(self, message: AbstractIncomingMessage) -> None:
        self.got.append(int(message.body))
        if self.until == self.got[-1]:
            await self.go_on.wait()


async def test_each_message_has_its_effect_once_and_the_next_reader_goes_on(
    rabbit: mq.RabbitMQ, engine: sa.Engine
) -> None:
    stream = await new_stream(rabbit, 25)
    async with applying(rabbit, stream, engine, "r", effect, batch=10) as reader:
        await mq.until(lambda: reader.handled == 25)
        assert reader.stored == 24
    await publish(rabbit, stream, range(25, 30))
    async with applying(rabbit, stream, engine, "r", effect) as reader:
        await mq.until(lambda: reader.handled == 5)
    assert effects(engine) == list(range(30))
    assert stored(engine, stream) == 29
    assert stored(engine, stream, "another") is None


async def test_the_offset_is_in_the_transaction_of_the_effects(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """What was done before the failure in the same batch is undone with it; the batches before stay."""
    stream = await new_stream(rabbit, 30)

    def fails(connection: sa.Connection, message: AbstractIncomingMessage) -> None:
        effect(connection, message)
        if message.body == b"17":
            raise ValueError("poison")

    with pytest.raises(ValueError, match="poison") as caught:
        async with applying(rabbit, stream, sqlite, "r", fails, batch=5):
            await asyncio.sleep(30)
    assert caught.value.__notes__ == [f"at offset 17 of stream {stream!r}"]
    done = effects(sqlite)
    assert done == list(range(len(done)))
    assert len(done) <= 17
    assert stored(sqlite, stream) == (len(done) - 1 if done else None)


async def test_a_batch_is_no_larger_than_it_may_be(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream, transactions, all_there = await new_stream(rabbit, 30), list[Any](), threading.Event()

    def keeps(connection: sa.Connection, _: AbstractIncomingMessage) -> None:
        transactions.append(connection.get_transaction())
        assert all_there.wait(20)

    async with applying(rabbit, stream, sqlite, "r", keeps, batch=4) as reader:
        await mq.until(lambda: len(reader._arrived) >= 20)
        all_there.set()
        await mq.until(lambda: reader.handled == 30)
    assert max(transactions.count(each) for each in transactions) == 4


async def test_more_than_the_prefetch_is_read(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream, count = await new_stream(rabbit), 3 * stream_reader.PREFETCH
    async with mq.channel(rabbit) as channel:
        messages = [aio_pika.Message(b"%d" % number) for number in range(count)]
        await asyncio.gather(*(channel.default_exchange.publish(message, stream) for message in messages))
    async with applying(rabbit, stream, sqlite, "r", effect) as reader:
        await mq.until(lambda: reader.handled == count, within=20)
    assert effects(sqlite) == list(range(count))


async def test_a_batch_of_one_takes_one_at_a_time(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream = await new_stream(rabbit, 5)
    async with applying(rabbit, stream, sqlite, "r", effect, batch=1) as reader:
        await mq.until(lambda: reader.handled == 5)
    assert effects(sqlite) == [0, 1, 2, 3, 4]


async def test_where_it_starts(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """Each message is a chunk of its own, so that the last chunk is the last message."""
    stream = await new_stream(rabbit, 10)
    ago, ahead = (datetime.now(UTC) + timedelta(hours=hours) for hours in (-1, 1))
    starts: dict[str, Any] = {"first": "first", "last": "last", "four": 4, "ago": ago, "next": "next", "ahead": ahead}
    first: dict[str, list[int]] = {}
    async with contextlib.AsyncExitStack() as stack:
        readers = {}
        for name, start in starts.items():
            first[name] = []

            async def handler(message: AbstractIncomingMessage, got: list[int] = first[name]) -> None:
                got.append(int(message.body))

            block = handling(rabbit, stream, sqlite, name, handler, start=start)
            readers[name] = await stack.enter_async_context(block)
        await publish(rabbit, stream, [10])
        await mq.until(lambda: all(got[-1:] == [10] for got in first.values()))
    assert {name: got[0] for name, got in first.items()} == {
        "first": 0, "last": 9, "four": 4, "ago": 0, "next": 10, "ahead": 10
    }  # fmt: skip
    assert readers["four"].dropped == 0


async def test_what_is_stored_counts_and_not_where_to_start(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream = await new_stream(rabbit, 10)
    put(sqlite, stream, 2)
    for start in ("next", 7):
        collect = Collector()
        async with handling(rabbit, stream, sqlite, "r", collect, start=start):
            await mq.until(partial(collect.has, 7))
        assert collect.got == list(range(3, 10))
        put(sqlite, stream, 2)
    put(sqlite, stream, None)
    collect = Collector()
    async with handling(rabbit, stream, sqlite, "r", collect, start=7):
        await mq.until(lambda: len(collect.got) == 3)
    assert collect.got == [7, 8, 9]


async def test_what_a_chunk_brings_of_before_is_dropped(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """As a broker that delivers whole chunks would: here the offset in the request is lowered on its way."""
    stream = await new_stream(rabbit, 10)
    cases: list[tuple[Any, int | None]] = [("first", 5), (6, None)]
    for start, position in cases:
        put(sqlite, stream, position)
        collect = Collector()
        with pytest.MonkeyPatch.context() as patch:
            consume = aio_pika.Queue.consume

            async def lowered(self: Any, callback: Any, arguments: Any, consume: Any = consume) -> Any:
                if arguments["x-stream-offset"] == 6:
                    arguments = {"x-stream-offset": 3}
                return await consume(self, callback, arguments=arguments)

            patch.setattr(aio_pika.Queue, "consume", lowered)
            async with handling(rabbit, stream, sqlite, "r", collect, start=start) as reader:
                await mq.until(partial(collect.has, 4))
        assert collect.got == [6, 7, 8, 9]
        assert reader.dropped == 3


async def test_a_handler_is_called_for_one_after_the_other_and_the_offset_stored_every_so_often(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine
) -> None:
    stream, collect = await new_stream(rabbit, 30), Collector(until=25)
    async with handling(rabbit, stream, sqlite, "r", collect, store_every=10) as reader:
        await mq.until(lambda: collect.got[-1:] == [25])
        assert collect.got == list(range(26))
        assert stored(sqlite, stream) == reader.stored == 19
        collect.go_on.set()
        await mq.until(lambda: reader.handled == 30)
    assert stored(sqlite, stream) == 29, "when the block ends, too"


async def test_the_end_of_the_block_waits_for_the_handler_and_takes_no_more(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine
) -> None:
    """Although the others have been fetched in the same batch."""
    stream, got, leaving = await new_stream(rabbit, 30), list[int](), asyncio.Event()
    stops = {0: asyncio.Event(), 5: asyncio.Event()}

    async def handler(message: AbstractIncomingMessage) -> None:
        got.append(int(message.body))
        if got[-1] in stops:
            await stops[got[-1]].wait()

    async def work() -> None:
        async with handling(rabbit, stream, sqlite, "r", handler) as reader:
            await mq.until(lambda: len(reader._arrived) >= 20)
            stops[0].set()
            await mq.until(lambda: got[-1:] == [5])
            leaving.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(work())
        await leaving.wait()
        await asyncio.sleep(0.1)
        assert not task.done()
        stops[5].set()
    assert got == [0, 1, 2, 3, 4, 5]
    assert stored(sqlite, stream) == 5


async def test_a_handler_that_raises_ends_the_block_and_what_was_done_before_is_stored(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine
) -> None:
    stream, done = await new_stream(rabbit, 10), list[int]()

    async def fails(message: AbstractIncomingMessage) -> None:
        if message.body == b"7":
            raise ConnectionError("the mail server is down")
        done.append(int(message.body))

    with pytest.raises(ConnectionError, match="mail server") as caught:
        async with handling(rabbit, stream, sqlite, "r", fails):
            await asyncio.sleep(30)
    assert caught.value.__notes__ == [f"at offset 7 of stream {stream!r}"]
    assert stored(sqlite, stream) == 6
    collect = Collector()
    async with handling(rabbit, stream, sqlite, "r", collect):
        await mq.until(lambda: len(collect.got) == 3)
    assert collect.got == [7, 8, 9]


@pytest.mark.parametrize("way", ["applying", "handling"])
async def test_cuts_of_the_connection_lose_and_double_nothing(rabbit: mq.RabbitMQ, sqlite: sa.Engine, way: str) -> None:
    stream, got = await new_stream(rabbit), list[int]()

    async def handler(message: AbstractIncomingMessage) -> None:
        got.append(int(message.body))

    async with mq.proxy(rabbit) as proxy:
        block: Any = (
            applying(proxy, stream, sqlite, "r", effect)
            if way == "applying"
            else handling(proxy, stream, sqlite, "r", handler, store_every=1000)
        )
        async with block as reader:
            for turn in range(4):
                await publish(rabbit, stream, range(turn * 20, turn * 20 + 20))
                await mq.until(lambda least=turn * 20: reader.handled > least, within=20)  # type: ignore[misc]
                proxy.cut()
                await mq.until(lambda least=turn: reader.link.reconnects > least, within=20)  # type: ignore[misc]
            await mq.until(lambda: reader.handled == 80, within=20)
    assert (effects(sqlite) if way == "applying" else got) == list(range(80))


async def test_a_cut_while_a_handler_is_at_work_does_not_repeat_it(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream, collect = await new_stream(rabbit, 10), Collector(until=5)
    async with mq.proxy(rabbit) as proxy, handling(proxy, stream, sqlite, "r", collect) as reader:
        await mq.until(lambda: collect.got[-1:] == [5])
        proxy.cut()
        await mq.until(lambda: reader.link.reconnects == 1, within=20)
        await mq.until(lambda: len(reader._arrived) == 5)  # 5 to 9 again
        collect.go_on.set()
        await mq.until(lambda: reader.handled == 10 and reader.dropped, within=20)  # 5, or all that it had already
    assert collect.got == list(range(10))


async def test_what_is_finished_while_the_connection_is_made_again_is_not_repeated(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, collect = await new_stream(rabbit, 10), Collector(until=5)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> int | None:
        asked.set()
        await answer.wait()
        return await first_offset(*arguments)

    monkeypatch.setattr(stream_reader, "first_offset", slow)
    async with mq.proxy(rabbit) as proxy, handling(proxy, stream, sqlite, "r", collect) as reader:
        await mq.until(lambda: collect.got[-1:] == [5])
        proxy.cut()
        await asyncio.wait_for(asked.wait(), 20)
        collect.go_on.set()
        await mq.until(lambda: reader.handled == 10)
        answer.set()
        await mq.until(lambda: reader.link.reconnects == 1, within=20)
        await publish(rabbit, stream, [10])
        await mq.until(lambda: collect.got[-1:] == [10])
    assert collect.got == list(range(11))


async def process(rabbit: Any, url: str, stream: str, crash_at: int, way: str) -> None:
    """Dies by SIGKILL in the middle of a transaction, or after a handler's effect."""
    import sqlalchemy as sa

    import mqlib as mq
    from mqlib.patterns.outbox import database
    from mqlib.patterns.stream_reader import applying, handling

    engine = database(url)

    def effect(connection: Any, message: Any) -> None:
        connection.execute(sa.text("INSERT INTO effects VALUES (:number)"), {"number": int(message.body)})
        mq.crash() if way == "applying" and int(message.body) == crash_at else None

    async def handler(message: Any) -> None:
        with engine.begin() as connection:
            effect(connection, message)
        mq.crash() if int(message.body) == crash_at else None

    block: Any = (
        applying(rabbit, stream, engine, "r", effect, batch=10)
        if way == "applying"
        else handling(rabbit, stream, engine, "r", handler, store_every=10)
    )
    async with block as reader:
        await mq.until(lambda: reader.stored == 59, within=30)


@pytest.mark.parametrize("way", ["applying", "handling"])
async def test_a_crash(rabbit: mq.RabbitMQ, sqlite: sa.Engine, way: str) -> None:
    """Each message once; or those since the last stored offset twice, and none left out."""
    stream = await new_stream(rabbit, 60)
    for crash_at in (27, 1000):
        async with mq.worker(process, rabbit, databases.url_of(sqlite), stream, crash_at, way) as worker:
            await worker.ended(within=40)
            assert worker.crashed == (crash_at == 27)
    done = effects(sqlite)
    again = [] if way == "applying" else list(range(20, 28))
    assert sorted(done) == sorted([*range(60), *again])


async def test_two_readers_of_one_name_do_each_message_once(rabbit: mq.RabbitMQ, engine: sa.Engine) -> None:
    stream = await new_stream(rabbit, 200)
    async with (
        applying(rabbit, stream, engine, "r", effect, batch=3) as one,
        applying(rabbit, stream, engine, "r", effect, batch=7) as other,
    ):
        await mq.until(lambda: one.handled + other.handled == 200, within=30)
        await mq.until(lambda: (one.stored, other.stored) == (199, 199), within=30)
    assert effects(engine) == list(range(200))


async def test_a_handler_s_offset_never_goes_back(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream, collect = await new_stream(rabbit, 10), Collector()
    async with handling(rabbit, stream, sqlite, "r", collect):
        await mq.until(lambda: len(collect.got) == 10)
        put(sqlite, stream, 50)  # a second reader was faster
    assert stored(sqlite, stream) == 50


async def test_what_retention_removed_before_the_start_is_told(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream = await new_stream(rabbit, 3, **SMALL)
    put(sqlite, stream, 1)
    await flood(rabbit, stream, beyond=50)
    kept = await first_offset(rabbit, stream) or 0
    with pytest.raises(OffsetsLost, match=f"lost: offsets 2 to {kept - 1} of stream '{stream}'") as caught:
        async with applying(rabbit, stream, sqlite, "r", effect):
            await asyncio.sleep(30)
    assert caught.value.gap == Gap(2, kept - 1)
    assert (effects(sqlite), stored(sqlite, stream)) == ([], 1)
    told: list[Gap] = []
    async with applying(rabbit, stream, sqlite, "r", effect, on_gap=told.append) as reader:
        await mq.until(lambda: reader.handled > 0)
        assert reader.gaps == told == [Gap(2, kept - 1)]


async def test_an_offset_to_start_from_that_is_gone_is_told(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    stream = await new_stream(rabbit, 3, **SMALL)
    await flood(rabbit, stream, beyond=50)
    with pytest.raises(OffsetsLost, match="lost: offsets 5 to"):
        async with applying(rabbit, stream, sqlite, "r", effect, start=5):
            await asyncio.sleep(30)


@pytest.mark.parametrize("only", [(), "eu"])
async def test_a_reader_that_retention_overtakes_while_it_reads_is_told(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch, only: Any
) -> None:
    monkeypatch.setattr(stream_reader, "PREFETCH", 1)
    stream, collect, told = await new_stream(rabbit, 3, "eu", **SMALL), Collector(until=1), list[Gap]()
    block = handling(rabbit, stream, sqlite, "r", collect, store_every=1, only=only, on_gap=told.append)
    async with block as reader:
        await mq.until(lambda: collect.got == [0, 1])
        await flood(rabbit, stream, beyond=500)
        await publish(rabbit, stream, [7], "eu")
        collect.go_on.set()
        await mq.until(lambda: collect.got[-1:] == [7], within=40)
        assert reader.link.reconnects == 0
    assert told
    assert told == reader.gaps
    kept = await first_offset(rabbit, stream) or 0
    assert all(gap.first <= gap.last < kept for gap in told)
    lost = sum(gap.last - gap.first + 1 for gap in told)
    if only:  # the broker leaves out what is not wanted, so no more is known than the limits
        assert lost > 0
    else:
        assert lost > 200


async def test_the_broker_s_own_entries_are_no_gap(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """A new segment may begin with one, which takes an offset."""
    stream, offsets = await new_stream(rabbit, **{"x-stream-max-segment-size-bytes": 20_000}), list[int]()
    async with mq.channel(rabbit) as channel:
        for _ in range(300):
            await channel.default_exchange.publish(aio_pika.Message(b"0" * 1000), stream)

    def effect(_: sa.Connection, message: AbstractIncomingMessage) -> None:
        offsets.append(offset_of(message))

    async with applying(rabbit, stream, sqlite, "r", effect) as reader:
        await mq.until(lambda: reader.handled == 300, within=20)
    assert reader.gaps == []
    assert offsets[-1] > 299, "there was none: this test shows nothing"


async def test_a_stream_that_was_made_again_is_no_stream_to_wait_for(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its offsets begin at 0 again, and the broker would be silent until they reach the stored one."""
    monkeypatch.setattr(stream_reader, "PATIENCE_SECONDS", 0.5)
    stream = await new_stream(rabbit, 3)
    put(sqlite, stream, 2)
    async with applying(rabbit, stream, sqlite, "r", effect):
        pass  # 2 is there, and behind it nothing
    put(sqlite, stream, 3)
    with pytest.raises(LookupError, match=r"'r' was at offset 3 of stream .* which has nothing there"):
        async with applying(rabbit, stream, sqlite, "r", effect):
            await asyncio.sleep(30)


@pytest.mark.parametrize("batch", [1, 1000])
async def test_a_stream_that_is_made_again_while_it_is_read(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Also before the first offset is stored."""
    monkeypatch.setattr(stream_reader, "PATIENCE_SECONDS", 0.5)
    stream = await new_stream(rabbit, 3)

    async def work() -> None:
        async with handling(rabbit, stream, sqlite, "r", Collector(), store_every=batch) as reader:
            await mq.until(lambda: reader.handled == 3)
            async with mq.channel(rabbit) as channel:
                await (await channel.get_queue(stream)).delete(if_unused=False, if_empty=False)
                await mq.declare(rabbit, stream, durable=True, arguments={"x-queue-type": "stream"})
            await asyncio.sleep(30)

    with pytest.raises(LookupError, match="made again"):
        await work()


async def test_a_connection_that_is_lost_before_anything_was_read_is_no_reason_to_give_up(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine
) -> None:
    stream = await new_stream(rabbit)
    async with (
        mq.proxy(rabbit) as proxy,
        applying(proxy, stream, sqlite, "first", effect) as one,
        applying(proxy, stream, sqlite, "zero", effect, start=0) as other,
    ):
        proxy.cut()
        await mq.until(lambda: one.link.reconnects == other.link.reconnects == 1, within=20)
        await publish(rabbit, stream, [1])
        await mq.until(lambda: one.handled == other.handled == 1)


async def test_the_reader_looks_at_each_message_itself(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """The broker filters by chunk, and before 3.13 not at all. These all go into a few chunks."""
    stream = await new_stream(rabbit)
    async with mq.channel(rabbit) as channel:
        regions = ["eu", "us", "asia", ""] * 25
        headers: list[Any] = [{"x-stream-filter-value": region} if region else {} for region in regions]
        messages = [aio_pika.Message(b"%d" % number, headers=each) for number, each in enumerate(headers)]
        await asyncio.gather(*(channel.default_exchange.publish(message, stream) for message in messages))
    for name, only, right in (("one", "eu", {"eu"}), ("two", ["eu", "asia"], {"eu", "asia"})):
        collect = Collector()
        async with handling(rabbit, stream, sqlite, name, collect, only=only) as reader:
            await mq.until(partial(collect.has, 25 * len(right)))
            if rabbit.version < (3, 13):  # it delivers the others, too, the last of all among them
                unwanted = 100 - len(collect.got)
                await mq.until(lambda count=unwanted: reader.unwanted == count)  # type: ignore[misc]
        assert collect.got == [number for number, region in enumerate(regions) if region in right]
        assert reader.unwanted > 0
        assert reader.handled == 25 * len(right)
        if rabbit.version < (3, 13):
            assert reader.stored == 99, "what is not wanted is done with"


async def test_the_broker_is_told_what_is_wanted(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    """Each message is a chunk of its own here, so that a broker that filters delivers no other."""
    stream = await new_stream(rabbit, 60, "eu", "us", "asia")
    async with applying(rabbit, stream, sqlite, "r", effect, only="eu") as reader:
        await mq.until(lambda: reader.handled == 20)
        if rabbit.version < (3, 13):
            await mq.until(lambda: reader.unwanted == 40)
            await mq.until(lambda: reader.stored == 59)  # what is not wanted is done with, too
        else:
            assert (reader.unwanted, reader.stored) == (0, 57)
    assert effects(sqlite) == list(range(0, 60, 3))


async def test_another_kind_of_queue_is_refused_and_keeps_its_messages(rabbit: mq.RabbitMQ, sqlite: sa.Engine) -> None:
    await mq.declare(rabbit, queue := rabbit.name("classic"), durable=True)
    await publish(rabbit, queue, [1])
    with pytest.raises(ChannelPreconditionFailed, match="x-stream-offset"):
        async with applying(rabbit, queue, sqlite, "r", effect):
            await asyncio.sleep(30)
    assert (await mq.depth(rabbit, queue, by="amqp")).ready == 1
    with pytest.raises(ChannelNotFoundEntity, match="no queue"):
        async with applying(rabbit, rabbit.name("nothing"), sqlite, "r", effect):
            await asyncio.sleep(30)


@pytest.mark.parametrize(
    ("options", "words"), [({"batch": 0}, "at least 1, not 0"), ({"start": datetime(2030, 1, 1)}, "no time zone")]
)
async def test_what_cannot_be_is_refused(
    rabbit: mq.RabbitMQ, sqlite: sa.Engine, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        async with applying(rabbit, "stream", sqlite, "r", effect, **options):
            pass
