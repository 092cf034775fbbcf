"""A payload goes by the store: whole or not at all, never altered, never deleted too early; with both brokers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aio_pika import Message

import mqlib as mq
from mqlib.patterns.claim_check import (
    TICKET,
    AlteredPayload,
    BadTicket,
    ClaimError,
    FolderStore,
    MissingPayload,
    check_in,
    claim,
)

LARGE = random.Random(17).randbytes(300_000)
HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "payloads")


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "payloads").iterdir())


def aged(path: Path, seconds: float) -> None:
    """As if it had been checked in so long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


async def test_a_large_one_goes_by_the_store_and_a_small_one_inline(store: FolderStore, tmp_path: Path) -> None:
    body, headers = await check_in(store, LARGE)
    assert len(body) + len(TICKET) + len(headers[TICKET]) < 100
    assert await claim(store, body, headers) == LARGE
    assert await check_in(store, b"x" * 99_999) == (b"x" * 99_999, {})
    assert (await check_in(store, b"x" * 100_000))[0] == b""
    assert len(files(tmp_path)) == 2
    assert await claim(store, b"small", {"other": "header"}) == b"small"
    assert await claim(store, b"small", None) == b"small"
    assert await claim(store, *await check_in(store, b"", inline_below=0)) == b""


async def test_through_rabbitmq_and_through_kafka(store: FolderStore, rabbit: mq.RabbitMQ, kafka: mq.Kafka) -> None:
    body, headers = await check_in(store, LARGE)
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("claims"), durable=True)
        await channel.default_exchange.publish(Message(body, headers={**headers, "n": 1}), queue.name)
        [message] = await mq.take_messages(queue, 1)
    assert await claim(store, message.body, message.headers) == LARGE
    topic = await mq.topic(kafka, "claims")
    async with mq.producer(kafka) as producer:
        pairs = [(name, text.encode()) for name, text in headers.items()]
        await producer.send_and_wait(topic, body, headers=[("other", b"\xff"), *pairs])
    [record] = await mq.read(kafka, topic)
    assert await claim(store, record.value, record.headers) == LARGE


async def checks_in_and_crashes(rabbit: Any, folder: str, queue: str) -> None:
    import aio_pika

    import mqlib
    from mqlib.patterns.claim_check import FolderStore, check_in

    body, headers = await check_in(FolderStore(folder), b"x" * 200_000)
    mqlib.crash()
    async with mqlib.channel(rabbit) as channel:
        await channel.default_exchange.publish(aio_pika.Message(body, headers=headers), queue)


async def test_a_crash_before_the_publish_leaves_a_payload_and_no_message(
    rabbit: mq.RabbitMQ, store: FolderStore, tmp_path: Path
) -> None:
    name = rabbit.name("crash")
    await mq.declare(rabbit, name, durable=True)
    async with mq.worker(checks_in_and_crashes, rabbit, str(tmp_path / "payloads"), name) as process:
        await process.ended(within=30)
        assert process.crashed
    assert len(files(tmp_path)) == 1
    async with mq.channel(rabbit) as channel:
        assert await mq.take_messages(await channel.get_queue(name), 1, within=0) == []
    aged(files(tmp_path)[0], 2 * HOUR + 1)
    assert await store.sweep(retention=HOUR) == 1
    assert files(tmp_path) == []


async def test_nothing_is_published_when_the_store_fails(store: FolderStore, tmp_path: Path) -> None:
    os.rmdir(tmp_path / "payloads")
    with pytest.raises(FileNotFoundError):
        await check_in(store, LARGE)


async def test_a_write_that_fails_in_the_middle_leaves_nothing(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        await check_in(store, LARGE)
    assert files(tmp_path) == []


async def test_a_payload_that_is_gone_or_altered_is_an_error_that_says_so(store: FolderStore, tmp_path: Path) -> None:
    body, headers = await check_in(store, LARGE)
    [path] = files(tmp_path)
    for wrong in (LARGE[:-1], LARGE + b"x", b"y" + LARGE[1:], b""):
        path.write_bytes(wrong)
        with pytest.raises(AlteredPayload, match="is not what was checked in"):
            await claim(store, body, headers)
    await check_in(store, LARGE)  # heals it
    assert await claim(store, body, headers) == LARGE
    path.unlink()
    with pytest.raises(MissingPayload, match=rf"{path.name} \(300000 bytes\) is not in the store"):
        await claim(store, body, headers)


@pytest.mark.parametrize(
    "ticket",
    ["", "sha256:", "sha256:../../etc/passwd;size=1", f"sha256:{'a' * 64}", f"sha256:{'A' * 64};size=1",
     f"sha256:{'a' * 64};size=-1", f"sha256:{'a' * 64};size=1\n", b"\xff\xfe", 5, f"sha256:{'a' * 64};size={'9' * 16}"],
)  # fmt: skip
async def test_what_is_no_ticket_is_refused(store: FolderStore, ticket: Any) -> None:
    with pytest.raises(BadTicket, match=r"the header 'claim-check' is 'sha256:…;size=…', and not"):
        await claim(store, b"", {TICKET: ticket})


async def test_more_than_the_consumer_takes_is_not_read(store: FolderStore) -> None:
    body, headers = await check_in(store, LARGE)
    with pytest.raises(BadTicket, match="has 300000 bytes; this consumer takes 299999"):
        await claim(store, body, headers, limit=299_999)
    assert issubclass(BadTicket, ClaimError)


async def test_a_store_that_does_not_answer_is_another_error(tmp_path: Path) -> None:
    class Down:
        async def put(self, key: str, data: bytes) -> None:
            raise ConnectionError("the store is down")

        async def get(self, key: str, limit: int) -> bytes | None:
            raise ConnectionError("the store is down")

    _, headers = await check_in(FolderStore(tmp_path), LARGE)
    for attempt in (check_in(Down(), LARGE), claim(Down(), b"", headers)):
        with pytest.raises(ConnectionError, match="the store is down"):
            await attempt


async def test_a_key_cannot_lead_out_of_the_folder(store: FolderStore) -> None:
    for call in (store.put("../escaped", b""), store.get("../escaped", 1)):
        with pytest.raises(ValueError, match=r"64 hexadecimal digits, and not '../escaped'"):
            await call


async def test_a_sweep_keeps_what_a_message_may_still_name(store: FolderStore, tmp_path: Path) -> None:
    _, headers = await check_in(store, LARGE)
    [path] = files(tmp_path)
    aged(path, 2 * HOUR - 60)
    assert await store.sweep(retention=HOUR, publish_within=HOUR) == 0
    await check_in(store, LARGE)  # for another message, which names the same payload
    aged(path, HOUR)
    assert await store.sweep(retention=HOUR, publish_within=HOUR) == 0
    aged(path, HOUR + 60)
    assert await store.sweep(retention=HOUR, publish_within=HOUR) == 1
    with pytest.raises(MissingPayload):
        await claim(store, b"", headers)


@pytest.mark.parametrize("moment", ["before it is moved", "after it is moved"])
async def test_a_check_in_during_the_sweep_keeps_the_payload(
    store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between the look at its age and the deletion; and a claim in that moment finds it, too."""
    _, headers = await check_in(store, LARGE)
    [path] = files(tmp_path)
    aged(path, 3 * HOUR)
    replace, seen = os.replace, list[bytes | None]()

    def meanwhile(old: Path, new: Path) -> None:
        if not new.name.endswith("aside"):
            replace(old, new)  # the check-in's own
            return
        if moment == "before it is moved":
            store._put(path, LARGE)
        replace(old, new)
        seen.append(store._get(path, len(LARGE)))
        if moment == "after it is moved":
            store._put(path, LARGE)

    monkeypatch.setattr(os, "replace", meanwhile)
    await store.sweep(retention=HOUR)
    assert seen == [LARGE]
    assert files(tmp_path) == [path]
    assert await claim(store, b"", headers) == LARGE
    assert await store.sweep(retention=1, publish_within=60) == 0, "it is young again"


async def test_what_a_crash_left_in_the_folder_is_swept_or_put_back(store: FolderStore, tmp_path: Path) -> None:
    """A write that never ended, a sweep that died after it had moved a young payload, and files of others."""
    _, headers = await check_in(store, LARGE)
    [path] = files(tmp_path)
    path.rename(path.with_name(f"{path.name}.1.aside"))
    assert await claim(store, b"", headers) == LARGE
    unfinished, foreign = path.with_name(f"{path.name}.2.writing"), path.with_name("readme.txt")
    for other in (unfinished, foreign):
        other.write_bytes(b"")
    assert await store.sweep(retention=HOUR) == 0
    assert files(tmp_path) == sorted([path, unfinished, foreign])
    for each in (path, unfinished, foreign):
        aged(each, 3 * HOUR)
    assert await store.sweep(retention=HOUR) == 1
    assert files(tmp_path) == [foreign]


async def test_sweeps_and_check_ins_at_once(store: FolderStore, tmp_path: Path) -> None:
    """What has just been checked in is there, though an old one of the same name was being deleted."""
    payloads, now, over, missed = [b"%d" % n * 1000 for n in range(4)], time.time(), threading.Event(), list[bytes]()

    def sweeping() -> None:
        while not over.is_set():
            store._sweep(now - HOUR)

    def use(payload: bytes) -> None:
        path = store._path(hashlib.sha256(payload).hexdigest())
        for _ in range(50):
            store._put(path, payload)
            if store._get(path, 10_000) != payload:
                missed.append(payload)
            with contextlib.suppress(FileNotFoundError):  # a sweep has it in hand
                os.utime(path, (now - 2 * HOUR, now - 2 * HOUR))

    sweeps = [asyncio.ensure_future(asyncio.to_thread(sweeping)) for _ in range(2)]
    await asyncio.gather(*(asyncio.to_thread(use, payload) for payload in payloads))
    over.set()
    await asyncio.gather(*sweeps)
    assert missed == []


@pytest.mark.parametrize("times", [(0, 1), (-1, 1), (float("inf"), 1), (1, -1), (float("nan"), 1)])
async def test_a_sweep_needs_times(store: FolderStore, times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="retention is a time in seconds above 0"):
        await store.sweep(*times)
