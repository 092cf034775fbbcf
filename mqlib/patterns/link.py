"""A connection to RabbitMQ that is made again when it is lost, and a consumer that goes on after that.

Everything that a channel needs is declared again on each new connection, by the same function that declared it first.
(aio-pika's own robust connection forgets its hook for returned messages, and remakes queues that were deleted.)
See https://www.rabbitmq.com/docs/reliability.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.connection import Connection, make_url
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

from ..brokers.base import Connectable
from ..waiting import beside

GONE = (AMQPError, ChannelInvalidStateError, OSError)
"""What a call on a channel raises when its connection is lost (`TimeoutError` is an `OSError`)."""
HEARTBEAT_SECONDS = 10
CONNECT_SECONDS = 5.0
OPEN_SECONDS = 30.0
CLOSE_SECONDS = 2.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0

Setup = Callable[[AbstractChannel], Awaitable[Any]]
Handler = Callable[[AbstractIncomingMessage], Awaitable[Any]]
Source = str | Callable[[AbstractChannel], Awaitable[AbstractQueue]]


@contextlib.contextmanager
def uncancelled() -> Iterator[None]:
    """Turns a cancellation that nobody asked for into `ConnectionError`: so aiormq ends what waits on a channel that
    closes, and it would pass for a cancellation of the task."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionError("the connection was lost") from error


class ConsumerCancelled(AMQPError):
    """The broker ended a consumer, for example since its queue was deleted (basic.cancel)."""


class Link:
    """A connection with one channel, made again whenever either is lost; by `link`."""

    def __init__(self, rabbit: Connectable, setup: Setup | None, prefetch: int | None) -> None:
        self.reconnects = 0
        """How often it was made again."""
        self.error: BaseException | None = None
        """Why the last connection, or the last attempt at one, ended; for example the limit that the broker names."""
        self._rabbit, self._setup, self._prefetch = rabbit, setup, prefetch
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._opened, self._lost = asyncio.Event(), asyncio.Event()
        self._ended = False

    async def channel(self) -> AbstractChannel:
        """The open channel, with publisher confirms; a message that no queue took raises `PublishError`.

        Waits while there is none: the caller limits that, as in `async with asyncio.timeout(5)`. Raises `RuntimeError`
        once the block of the link is over.
        """
        if self._channel is not None and self._channel.is_closed:  # and has not said so yet
            self._lose(self._connection, self.error)
        while self._channel is None and not self._ended:
            await self._opened.wait()
        if self._ended or self._channel is None:
            raise RuntimeError("this link to RabbitMQ has ended: its block is over")
        return self._channel

    async def open(self) -> None:
        """Connects, and sets the channel up. Raises what the broker or the network says, one of `GONE`."""
        async with asyncio.timeout(OPEN_SECONDS):
            with uncancelled():
                await self._open()

    async def _open(self) -> None:
        client = {"heartbeat": HEARTBEAT_SECONDS, **self._rabbit.client}
        # Not `aio_pika.connect`: it drops the connection of an attempt that fails, unclosed, which complains on stderr
        # when it is collected in another thread.
        security = client.pop("ssl_context", None)
        self._connection = connection = Connection(make_url(**client), ssl_context=security)
        await connection.connect(timeout=CONNECT_SECONDS)
        channel = await connection.channel(on_return_raises=True)
        self._lost.clear()
        channel.close_callbacks.add(lambda _, error: self._lose(connection, error))
        # The broker cancels a consumer whose queue is deleted or moves. Its channel goes on, and nobody would know.
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda _: self._lose(connection, ConsumerCancelled()))
        if self._prefetch is not None:
            await channel.set_qos(prefetch_count=self._prefetch)
        if self._setup is not None:
            await self._setup(channel)
        if not self._lost.is_set():
            self._channel = channel
            self._opened.set()

    def _lose(self, connection: AbstractConnection | None, error: BaseException | None) -> None:
        if connection is not self._connection:
            return  # one before this: a broker that was frozen may say late that it has closed
        self.error, self._channel = error, None
        self._opened.clear()
        self._lost.set()

    async def keep(self) -> None:
        """Makes it again whenever it is lost, for ever: each failure in a row is followed by a longer pause."""
        pause = FIRST_PAUSE
        while True:
            await self._lost.wait()
            await self.close()
            await asyncio.sleep(pause)
            try:
                await self.open()
            except GONE as error:
                self._lose(self._connection, error)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                self.reconnects, pause = self.reconnects + 1, FIRST_PAUSE

    def end(self) -> None:
        """Nothing is made again: whoever waits for a channel is told."""
        self._ended = True
        self._opened.set()

    async def close(self) -> None:
        """Closes what is open; a broker that does not answer is not waited for."""
        if self._connection is not None:
            with contextlib.suppress(*GONE):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._connection.close()


@contextlib.asynccontextmanager
async def link(rabbit: Connectable, setup: Setup | None = None, prefetch: int | None = None) -> AsyncIterator[Link]:
    """A `Link` for the length of the block. `setup(channel)` declares what is needed, after every connection.

    Raises what the first connection or its set-up raises; later ones are tried again until they succeed.
    """
    made = Link(rabbit, setup, prefetch)
    try:
        await made.open()
        async with beside(made.keep()):
            yield made
    finally:
        made.end()
        await made.close()


class Consumer:
    """A consumer of one queue at work; made by `consuming`."""

    def __init__(self, queue: Source, handle: Handler, prefetch: int, requeue: bool, options: dict[str, Any]) -> None:
        self.delivered = 0
        """Messages whose handler began; one that is delivered again counts again."""
        self.errors = 0
        """Handlers that raised."""
        self.error: Exception | None = None
        """What the last of these raised."""
        self.unsettled = 0
        """Handled, but the connection was gone before the broker was told: it delivers them again."""
        self.link: Link
        self._queue, self._handle, self._requeue, self._options = queue, handle, requeue, options
        self._slots = asyncio.Semaphore(prefetch)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._cancel: Callable[[], Awaitable[Any]]

    async def setup(self, channel: AbstractChannel) -> None:
        """Declares the queue and starts to consume."""
        source = self._queue
        queue = await (channel.get_queue(source) if isinstance(source, str) else source(channel))
        tag = await queue.consume(self._deliver, **self._options)
        self._cancel = partial(queue.cancel, tag)

    async def _deliver(self, message: AbstractIncomingMessage) -> None:
        # A task of our own: aiormq cancels its callbacks when the channel closes, in the middle of what they do.
        task = asyncio.create_task(self._work(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, message: AbstractIncomingMessage) -> None:
        async with self._slots:  # prefetch is by channel: without this a new one would start beside an old one's
            if self._stopping or _gone(message):
                return
            self.delivered += 1
            settle: Callable[[], Awaitable[None]] = message.ack
            try:
                with uncancelled():
                    await self._handle(message)
            except Exception as error:
                self.errors, self.error = self.errors + 1, error
                settle = partial(message.reject, requeue=self._requeue)
            if not message.processed:
                try:
                    async with asyncio.timeout(CLOSE_SECONDS):  # aiormq may wait for ever to write to what is lost
                        with uncancelled():
                            await settle()
                except GONE:
                    self.unsettled += 1

    async def stop(self, drain: float) -> None:
        """Takes no more; running handlers get `drain` seconds, what was only fetched goes back to the queue."""
        self._stopping = True
        with contextlib.suppress(*GONE):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._cancel()
        if self._tasks:
            _, slow = await asyncio.wait(self._tasks, timeout=drain)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)


def _gone(message: AbstractIncomingMessage) -> bool:
    """Whether the channel that brought the message is closed: then it is delivered again elsewhere."""
    try:
        return bool(message.channel.is_closed)
    except ChannelInvalidStateError:
        return True


@contextlib.asynccontextmanager
async def consuming(
    rabbit: Connectable, queue: Source, handle: Handler, prefetch: int = 1, requeue: bool = False,
    drain: float = 5.0, **options: Any,
) -> AsyncIterator[Consumer]:  # fmt: skip
    """Runs `handle(message)` for each message of a queue during the block, at most `prefetch` at once.

    `queue` is the name of one that is there, or a function that declares it on a channel and returns it, called after
    every connection. A handler may settle its message; else it is acknowledged when the handler returns, and rejected
    when it raises: put back with `requeue`, else dead-lettered or dropped. `options` go to `queue.consume`.
    At least once: a connection that is lost before the acknowledgement means a second delivery.
    """
    if prefetch < 1:
        raise ValueError(f"prefetch is at least 1, not {prefetch}: 0 would mean no limit")
    consumer = Consumer(queue, handle, prefetch, requeue, options)
    async with link(rabbit, consumer.setup, prefetch) as consumer.link:
        try:
            yield consumer
        finally:
            await consumer.stop(drain)
