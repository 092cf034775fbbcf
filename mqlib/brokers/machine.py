"""This machine: free ports, room on the disk, the cache folder, a lock between two first runs."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .base import BrokerUnavailable

HOST = "127.0.0.1"
NEEDED_BYTES = 300_000_000


def free_ports(count: int) -> list[int]:
    """Ports that are free on loopback now; taken together, so that no two are the same."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def is_free(port: int) -> bool:
    """Whether nobody listens on that port of loopback now."""
    with socket.socket() as each:
        try:
            each.bind((HOST, port))
        except OSError:
            return False
    return True


def require_disk() -> None:
    """Raises `BrokerUnavailable` where the folder for temporary files is (nearly) full."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise BrokerUnavailable(
            f"only {free // 1_000_000} MB are free in {folder}, and a broker needs {NEEDED_BYTES // 1_000_000} MB. "
            "Make room there, or set TMPDIR to a folder with more."
        )


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def cache_folder() -> Path:
    """Where downloads are kept between runs: `MQLIB_CACHE`, or `mqlib` in the user's cache folder."""
    base = os.environ.get("MQLIB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqlib"
    folder = Path(base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrokerUnavailable(
            f"cannot make the folder {folder} ({error.strerror}); set MQLIB_CACHE to another"
        ) from None
    return folder


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Holds a lock of this user, so that two first runs at once do not install the same thing twice."""
    with open(cache_folder() / f"{name}.lock", "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
