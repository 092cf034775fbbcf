"""Claim check: a large payload goes into a store, and the message bears a ticket for it: its hash and its size.

The payload is stored before the message is published, so a crash in between leaves a payload that no message names,
never a message without its payload. The hash is the key: storing twice is storing once, a check-in without an answer
may be repeated, and who claims knows that he got what was checked in. A hash is no right of access: the store has its
own. After "Claim Check" (Hohpe and Woolf, Enterprise Integration Patterns), and
https://developer.confluent.io/patterns/event-processing/claim-check/.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

TICKET = "claim-check"
"""The header with the ticket. A message without it has its payload as its body."""
KEY = re.compile("[0-9a-f]{64}")
TICKET_TEXT = re.compile(rf"sha256:({KEY.pattern});size=([0-9]{{1,15}})")


class ClaimError(Exception):
    """A payload that cannot be claimed. Trying again does not help: set the message aside."""


class BadTicket(ClaimError):
    """The header is no ticket, or one for more bytes than the claimer takes."""


class MissingPayload(ClaimError):
    """The store does not have it: it was deleted too early, or this is another store."""


class AlteredPayload(ClaimError):
    """What the store has is not what was checked in."""


class Store(Protocol):
    """What keeps payloads: a folder, or a bucket (`put_object`, and `get_object` with `Range`, do all of this)."""

    async def put(self, key: str, data: bytes) -> None:
        """Stores it; it is safe when this returns. To store it again renews its age. Raises when that is not known."""

    async def get(self, key: str, limit: int) -> bytes | None:
        """The payload, None if there is none. Of one that is longer than `limit`, one byte more than that."""


async def check_in(store: Store, payload: bytes, inline_below: int = 100_000) -> tuple[bytes, dict[str, Any]]:
    """The body and the headers to publish, once the payload is in the store; a shorter one is the body, as it is.

    Publish it afterwards, soon (see `FolderStore.sweep`), and check it in again before a much later attempt. Raises
    what the store raises, such as `OSError`: then do not publish.
    """
    if len(payload) < inline_below:
        return payload, {}
    key = await asyncio.to_thread(_hash, payload)
    await store.put(key, payload)
    return b"", {TICKET: f"sha256:{key};size={len(payload)}"}


async def claim(
    store: Store, body: bytes, headers: Mapping[str, Any] | Iterable[tuple[str, Any]] | None, limit: int = 100_000_000
) -> bytes:
    """The payload of a message, given its body and headers (as RabbitMQ or as Kafka has them).

    Raises a kind of `ClaimError` for a ticket that is none or is for more than `limit` bytes, a payload that is not
    there, and one whose hash differs; what the store raises when it cannot be asked (then try again).
    """
    ticket = dict(headers or {}).get(TICKET)
    if ticket is None:
        return body
    key, size = _read(ticket)
    if size > limit:
        raise BadTicket(f"payload {key} has {size} bytes; this consumer takes {limit}")
    payload = await store.get(key, size)
    if payload is None:
        raise MissingPayload(f"payload {key} ({size} bytes) is not in the store; is its retention shorter than that of "
                             "the messages, or is it another store?")  # fmt: skip
    if len(payload) != size or await asyncio.to_thread(_hash, payload) != key:
        raise AlteredPayload(f"payload {key} is not what was checked in; restore it, or check it in again")
    return payload


def _hash(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _read(ticket: Any) -> tuple[str, int]:
    text = ticket.decode(errors="backslashreplace") if isinstance(ticket, bytes) else str(ticket)
    if not (found := TICKET_TEXT.fullmatch(text)):
        raise BadTicket(f"the header {TICKET!r} is 'sha256:…;size=…', and not {text[:100]!r}")
    return found[1], int(found[2])


class FolderStore:
    """A `Store` in a folder that its users share, a file for each payload. Several processes may use it at once."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    async def put(self, key: str, data: bytes) -> None:
        """Stores it, all or nothing, and on the disk. One that is there is replaced, which heals and renews it."""
        await asyncio.to_thread(self._put, self._path(key), data)

    async def get(self, key: str, limit: int) -> bytes | None:
        """The payload, None if there is none; not more than `limit` bytes and one."""
        return await asyncio.to_thread(self._get, self._path(key), limit)

    async def sweep(self, retention: float, publish_within: float = 3600.0) -> int:
        """Deletes payloads last checked in more than `retention + publish_within` seconds ago; returns how many.

        It never deletes what a message within its retention names, if a message is published at most `publish_within`
        seconds after its check-in and deleted at most `retention` seconds after that: the topic's `retention.ms` and
        segment, or the queue's `x-message-ttl` (without one a message may wait for ever), the dead-letter queues and
        the time until somebody sends dead letters again included. A payload that is checked in while it is being
        deleted stays. What crashes left goes by the same age. Raises `ValueError` unless both are finite times, the
        retention above 0.
        """
        if not (0 < retention < math.inf and 0 <= publish_within < math.inf):
            raise ValueError(f"retention is a time in seconds above 0, publish_within one from 0 on; "
                             f"not {retention} and {publish_within}")  # fmt: skip
        return await asyncio.to_thread(self._sweep, time.time() - retention - publish_within)

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):  # it came in a message, and must not lead out of the folder
            raise ValueError(f"a key is 64 hexadecimal digits, and not {key[:100]!r}")
        return self._folder / key

    def _put(self, path: Path, data: bytes) -> None:
        fresh = self._named(path, "writing")
        try:
            with open(fresh, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        with contextlib.suppress(PermissionError):  # Windows opens no folders, and needs none of it
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)

    def _get(self, path: Path, limit: int) -> bytes | None:
        for _ in range(3):  # a sweep may be moving it aside, or back
            for place in (path, *self._folder.glob(f"{path.name}.*.aside")):
                with contextlib.suppress(FileNotFoundError), open(place, "rb") as file:
                    return file.read(limit + 1)
        return None

    def _sweep(self, limit: float) -> int:
        deleted = 0
        for path in list(self._folder.iterdir()):
            key, _, state = path.name.partition(".")
            if KEY.fullmatch(key):
                with contextlib.suppress(FileNotFoundError):  # another sweep was faster
                    deleted += self._discard(path, self._folder / key, state.rpartition(".")[2], limit)
        return deleted

    def _discard(self, path: Path, home: Path, state: str, limit: float) -> bool:
        """Deletes a file that is too old; returns whether that was a payload."""
        if state != "aside":
            if path.stat().st_mtime >= limit:
                return False
            if state == "writing":  # by somebody who crashed
                path.unlink()
                return False
            # Moved under a name of its own, then looked at again: nobody renews it there, so what is old is old, and
            # what was checked in after the first look goes back.
            aside = self._named(path, "aside")
            os.replace(path, aside)
            path = aside
        old = path.stat().st_mtime < limit
        if not old:
            with contextlib.suppress(FileExistsError):  # checked in once more, and younger
                os.link(path, home)
        path.unlink()
        return old

    @staticmethod
    def _named(path: Path, state: str) -> Path:
        return path.with_name(f"{path.name}.{uuid.uuid4().hex}.{state}")
