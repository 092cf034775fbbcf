"""Things that answer, or do not, where a broker should be: sockets of this process, for as long as a block lasts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mqlib.brokers.machine import HOST, free_ports


def closed_port() -> int:
    """A port at which nobody listens."""
    return free_ports(1)[0]


@contextmanager
def black_hole() -> Iterator[int]:
    """The port of something that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        yield server.getsockname()[1]


@contextmanager
def full_backlog() -> Iterator[int]:
    """The port of something that does not even take a connection, as behind a firewall that drops packets."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen(0)
        address = server.getsockname()
        clients = [socket.socket() for _ in range(3)]
        try:
            for client in clients:
                client.setblocking(False)
                client.connect_ex(address)
            yield address[1]
        finally:
            for client in clients:
                client.close()


@contextmanager
def hanging_up() -> Iterator[int]:
    """The port of something that takes a connection and ends it, as a proxy without a backend does."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@contextmanager
def web_server() -> Iterator[int]:
    """The port of an HTTP server."""
    server = ThreadingHTTPServer((HOST, 0), _Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
