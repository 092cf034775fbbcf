"""Faults that are real, and undone at the end of the block, whatever happens in it.

A TCP proxy counts, delays, cuts and swallows; a node is killed or frozen. A process that crashes is in `workers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

from .brokers import BrokerError, Kafka, Node, RabbitMQ


class Proxy:
    """A TCP proxy in front of a broker. Clients connect to it as to the broker; see what passed, and interfere."""

    def __init__(self, client: dict[str, Any]) -> None:
        self._client = client
        self.up = 0
        """Bytes from clients to the broker."""
        self.down = 0
        """Bytes from the broker to clients."""
        self.delay = 0.0
        """Seconds that each piece waits, in each direction."""
        self.swallowed = 0
        """Bytes that went nowhere, during `swallow`."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._torn: set[asyncio.StreamWriter] = set()
        self._swallowing: set[str] = set()
        self._ended = False

    @property
    def client(self) -> dict[str, Any]:
        """The keyword arguments with which a client connects through the proxy, as `broker.client`."""
        return self._client

    def cut(self) -> None:
        """Resets every connection, as a failing network does. New ones may be made."""
        for writer in list(self._writers):
            _reset(writer)

    @contextlib.contextmanager
    def swallow(self, *directions: Literal["up", "down"]) -> Iterator[None]:
        """What comes in these directions goes nowhere during the block, and nobody is told.

        `swallow("down")` loses the broker's answers, although it did what it was asked; both are a black hole. At the
        end of the block every connection that lost something is reset: a stream cannot go on with a hole in it.
        Raises `ValueError` for another direction, or none.
        """
        if not directions or not {*directions} <= {"up", "down"}:
            raise ValueError(f"directions are 'up' (to the broker) and 'down' (from it), not {directions}")
        before, self._swallowing = self._swallowing, self._swallowing | {*directions}
        try:
            yield
        finally:
            self._swallowing = before
            for writer in list(self._torn):
                _reset(writer)

    async def _serve(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            remote_reader, remote_writer = await asyncio.open_connection(host, port)
        except OSError:
            _reset(writer)
            return
        both = {writer, remote_writer}
        self._writers |= both
        if self._ended:  # while the connection was being made
            self.cut()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pipe(reader, remote_writer, "up", both))
                group.create_task(self._pipe(remote_reader, writer, "down", both))
        finally:
            self._writers -= both
            self._torn -= both

    async def _pipe(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: str,
        both: set[asyncio.StreamWriter],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if way in self._swallowing:
                    self.swallowed += len(data)
                    self._torn |= both
                    continue
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with a reset instead of an orderly end of file."""
    with contextlib.suppress(OSError):  # it may be closed already
        now = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
    writer.transport.abort()


@contextlib.asynccontextmanager
async def paused(*nodes: Node) -> AsyncIterator[None]:
    """The nodes are frozen during the block (SIGSTOP): connections stay open, nothing answers. Then they are ready."""
    try:
        for node in nodes:
            node.pause()
        yield
    finally:
        # All of them first: one server of a cluster may need the others to be ready.
        frozen = [node for node in nodes if node.running]
        for node in frozen:
            node.resume()
        await asyncio.gather(*(asyncio.to_thread(node.wait_until_ready) for node in frozen))


@contextlib.asynccontextmanager
async def killed(*nodes: Node) -> AsyncIterator[None]:
    """The nodes are killed (SIGKILL) as the block begins; at its end those that are down start on their data."""
    try:
        for node in nodes:
            node.kill()
        yield
    finally:
        down = [node for node in nodes if not node.running]
        await asyncio.gather(*(asyncio.to_thread(node.restart, graceful=False) for node in down))


@contextlib.asynccontextmanager
async def proxy(broker: Kafka | RabbitMQ) -> AsyncIterator[Proxy]:
    """A proxy in front of a broker, for the length of the block.

    For Kafka this must be a broker of your own (`mq.kafka(private=True)`): a client follows the address that the broker
    advertises, so the broker needs a listener that advertises the proxy's. Raises `BrokerError` for another one.
    """
    if isinstance(broker, Kafka):
        if broker.proxy_ports is None:
            raise BrokerError("this Kafka is shared and advertises no proxy; use mq.kafka(private=True)")
        target, port = broker.proxy_ports
        host, client = "127.0.0.1", {**broker.client, "bootstrap_servers": f"127.0.0.1:{port}"}
    else:
        parts = urlsplit(broker.url)
        host, target, port = parts.hostname or "localhost", parts.port or 5672, 0
        client = dict(broker.client)
    made = Proxy(client)
    server = await asyncio.start_server(lambda r, w: made._serve(host, target, r, w), "127.0.0.1", port)
    if isinstance(broker, RabbitMQ):
        port = server.sockets[0].getsockname()[1]
        parts = urlsplit(broker.url)
        credentials = parts.netloc.rpartition("@")[0]
        made.client["url"] = parts._replace(netloc=f"{credentials}@127.0.0.1:{port}".lstrip("@")).geturl()
    try:
        yield made
    finally:
        server.close()
        made._ended = True
        made.cut()
