"""A reader of a RabbitMQ stream that goes on where it was: after a crash, a lost connection, a pause of a week.

It keeps its offset itself, in its database: in the transaction of the effect (`applying`: each message has its effect
once), or every few messages (`handling`: at least once). What retention removed before it was read is told, and never
skipped in silence. See https://www.rabbitmq.com/docs/streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from ..brokers.base import Connectable
from ..waiting import beside
from .link import CLOSE_SECONDS, FIRST_PAUSE, GONE, Link, link, uncancelled
from .stream_offsets import OFFSET, PATIENCE_SECONDS, Start, first_offset, offset_of, store_offset, stored_offset

FILTER_VALUE = "x-stream-filter-value"
PREFETCH = 200

T = TypeVar("T")
Effect = Callable[[sa.Connection, AbstractIncomingMessage], object]
Handler = Callable[[AbstractIncomingMessage], Awaitable[object]]
OnGap = Callable[["Gap"], object] | None
Process = Callable[[list[AbstractIncomingMessage], int], Awaitable[None]]


@dataclass(frozen=True)
class Gap:
    """Offsets from `first` to `last`, both included, that retention removed before this reader had read them.

    A few of them may have been the broker's own entries, which also take offsets, or, with a filter, not wanted.
    """

    first: int
    last: int

    def __str__(self) -> str:
        return f"lost: offsets {self.first} to {self.last}"


class OffsetsLost(Exception):
    """Retention was faster than the reader; `gap` says what was never read."""

    def __init__(self, gap: Gap, stream: str) -> None:
        super().__init__(
            f"{gap} of stream {stream!r}, removed by retention before they were read. To go on behind "
            "them, pass `on_gap`; to lose less, keep more (x-max-length-bytes, x-max-age) or read faster."
        )
        self.gap = gap


class StreamReader:
    """A reader at work; made by `applying` and `handling`."""

    def __init__(
        self, rabbit: Connectable, stream: str, engine: sa.Engine, reader: str, batch: int, start: Start,
        only: str | Sequence[str], on_gap: OnGap,
    ) -> None:  # fmt: skip
        if isinstance(start, datetime) and start.tzinfo is None:
            raise ValueError(f"start is {start}, in no time zone: say which, as in datetime.now(UTC)")
        if batch < 1:
            raise ValueError(f"an offset is stored every so many messages, at least 1, not {batch}")
        self.handled = 0
        """Messages that had their effect, or whose handler returned."""
        self.stored: int | None = None
        """The last offset in the database, by this reader or one of the same name."""
        self.dropped = 0
        """Delivered, and done with before."""
        self.unwanted = 0
        """Delivered, and not of `only`: the broker's filter lets some of these through."""
        self.gaps: list[Gap] = []
        """What retention removed before it was read."""
        self.link: Link
        self._rabbit, self._stream, self._engine, self._mine = rabbit, stream, engine, (stream, reader)
        self._batch, self._start, self._on_gap = batch, start, on_gap
        self._only = [only] if isinstance(only, str) else list(only)
        self._position: int | None = None  # everything up to there is done with
        self._now = 0
        self._arrived: deque[AbstractIncomingMessage] = deque()
        self._news = asyncio.Event()
        self._stopping = False

    async def setup(self, opened: AbstractChannel) -> None:
        """Reads on behind the last offset, on every new connection."""
        self.stored = await self._transaction(lambda connection: stored_offset(connection, *self._mine))
        seen = self._further(self.stored)
        if seen is not None and await self._first(max(seen, 0)) is None:
            raise LookupError(
                f"reader {self._mine[1]!r} was at offset {seen} of stream {self._stream!r}, which has nothing there, "
                "nor behind it: was it deleted and made again? Then `store_offset(…, None)` lets it start anew."
            )
        self._position = self._further(seen)  # a batch may have been finished meanwhile
        arrived = self._arrived = deque()  # what the connection before brought comes again

        async def deliver(message: AbstractIncomingMessage) -> None:
            arrived.append(message)
            self._news.set()

        arguments: dict[str, Any] = {OFFSET: self._start if self._position is None else self._position + 1}
        if self._only:
            arguments["x-stream-filter"] = self._only
        await (await opened.get_queue(self._stream)).consume(deliver, arguments=arguments)

    async def _first(self, start: Start = "first") -> int | None:
        return await first_offset(self._rabbit, self._stream, start, PATIENCE_SECONDS)

    def _before(self) -> int | None:
        return self._start - 1 if self._position is None and isinstance(self._start, int) else self._position

    def _further(self, offset: int | None) -> int | None:
        return max((each for each in (offset, self._position) if each is not None), default=None)

    def stop(self) -> None:
        """Takes no more; what is being handled is finished."""
        self._stopping = True
        self._news.set()

    async def run(self, process: Process) -> None:
        """Hands over what is new, in its order, so many messages at a time."""
        while not self._stopping:
            if not self._arrived:
                self._news.clear()
                await self._news.wait()
                continue
            messages = [self._arrived.popleft() for _ in range(min(self._batch, len(self._arrived)))]
            before = self._before()  # the broker delivers whole chunks
            new = [each for each in messages if before is None or offset_of(each) > before]
            self.dropped += len(messages) - len(new)
            if new and await self._all_there([offset_of(each) for each in new]):
                wanted = [each for each in new if not self._only or each.headers.get(FILTER_VALUE) in self._only]
                self.unwanted += len(new) - len(wanted)
                try:
                    await process(wanted, offset_of(new[-1]))
                except Exception as error:
                    error.add_note(f"at offset {self._now} of stream {self._stream!r}")
                    raise
            with contextlib.suppress(*GONE):  # of a connection that is lost
                async with asyncio.timeout(CLOSE_SECONDS):
                    with uncancelled():
                        await messages[-1].ack(multiple=True)  # to a stream that is credit for as many more

    async def _all_there(self, offsets: list[int]) -> bool:
        """Looks for what retention removed before these came. False when it is time to stop."""
        before = self._before()
        pairs = zip([offsets[0] - 1 if before is None else before, *offsets], offsets, strict=False)
        jumps = [Gap(one + 1, other - 1) for one, other in pairs if other > one + 1]
        kept = None  # the broker's own entries make jumps, too, and so do filters
        while jumps and kept is None:
            if self._stopping:
                return False
            try:
                kept = await self._first()
            except GONE:
                await asyncio.sleep(FIRST_PAUSE)
        for gap in jumps:
            if kept is not None and gap.first < kept:
                self.gaps.append(gap := Gap(gap.first, min(gap.last, kept - 1)))
                if self._on_gap is None:
                    raise OffsetsLost(gap, self._stream)
                self._on_gap(gap)
        return True

    async def apply(self, effect: Effect, messages: list[AbstractIncomingMessage], last: int) -> None:
        """The effects of these messages, and the offset `last`, in one transaction."""

        def work(connection: sa.Connection) -> int:
            stored = stored_offset(connection, *self._mine)
            # What else there is, a second reader of this name has done.
            new = [each for each in messages if stored is None or offset_of(each) > stored]
            for message in new:
                self._now = offset_of(message)
                effect(connection, message)
            self._save(connection, last)
            return len(new)

        count = await self._transaction(work)
        self.handled, self.dropped = self.handled + count, self.dropped + len(messages) - count
        self._position = last

    async def handle(self, handler: Handler, messages: list[AbstractIncomingMessage], last: int) -> None:
        """The handler for each of these messages; the offset is stored after so many of them."""
        for message in messages:
            if self._stopping:
                return
            self._now = offset_of(message)
            await handler(message)
            self.handled, self._position = self.handled + 1, self._now
            if self.handled % self._batch == 0:
                await self.save()
        self._position = last

    async def save(self) -> None:
        """Stores the offset of what is done with, unless a later one is stored."""
        if (position := self._position) is not None:
            await self._transaction(lambda connection: self._save(connection, position))

    def _save(self, connection: sa.Connection, offset: int) -> None:
        stored = stored_offset(connection, *self._mine)
        self.stored = offset if stored is None else max(stored, offset)
        store_offset(connection, *self._mine, self.stored)

    async def _transaction(self, work: Callable[[sa.Connection], T]) -> T:
        def run() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        return await asyncio.to_thread(run)


@contextlib.asynccontextmanager
async def applying(
    rabbit: Connectable, stream: str, engine: sa.Engine, reader: str, effect: Effect, batch: int = 100,
    start: Start = "first", only: str | Sequence[str] = (), on_gap: OnGap = None,
) -> AsyncIterator[StreamReader]:  # fmt: skip
    """Calls `effect(connection, message)` for each message of a stream during the block, in order, in a thread, and
    commits up to `batch` effects with their last offset. So each has its effect once, whatever crashes, and a second
    reader of the same name does no harm: it stands by. (The effect must be in the database of `engine`.)

    It goes on behind the stored offset; `start` counts only when there is none: "first", "last" (the last *chunk*, of
    one message or of many), "next" (what is published from now on; a connection that is lost before the first message
    begins anew), an offset, or a time, which means the chunk of that second. `only` are values of the header
    `x-stream-filter-value`: the broker filters from 3.13 on, by chunk, and the reader checks each message.

    Raises, and the block with it: what the effect raises, with a note of its offset (none of its batch has happened);
    `OffsetsLost` when retention was faster, unless `on_gap` is to be told; `LookupError` when the stream ends before
    the stored offset; what the broker says at the first connection, when there is no such stream, or another kind of
    queue; `ValueError` for a `batch` below 1 and a time without a zone.
    """
    work = StreamReader(rabbit, stream, engine, reader, batch, start, only, on_gap)
    run = partial(work.run, partial(work.apply, effect))
    async with link(rabbit, work.setup, PREFETCH) as work.link, beside(run(), work.stop):
        yield work


@contextlib.asynccontextmanager
async def handling(
    rabbit: Connectable, stream: str, engine: sa.Engine, reader: str, handler: Handler, store_every: int = 100,
    start: Start = "first", only: str | Sequence[str] = (), on_gap: OnGap = None,
) -> AsyncIterator[StreamReader]:  # fmt: skip
    """Awaits `handler(message)` for each message of a stream, one after the other, and stores the offset after each
    `store_every` of them and when the block ends. For effects outside the database: after a crash up to `store_every`
    messages are handled again, and none is left out. The rest is as in `applying`.
    """
    work = StreamReader(rabbit, stream, engine, reader, store_every, start, only, on_gap)
    async with link(rabbit, work.setup, PREFETCH) as work.link:
        try:
            async with beside(work.run(partial(work.handle, handler)), work.stop):
                yield work
        finally:
            await work.save()
