"""A harmless message through the real path, again and again: does it arrive, and how long does it take?

A canary is a monitor: `watching(canary, {silent: failures}, every=5)` sends a probe every five seconds. Who consumes
answers it: `if await answer(client, message): return`, first of all in a handler. After "Test Message" (Hohpe
and Woolf, Enterprise Integration Patterns) and "Prober" in Google's Site Reliability Engineering.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.errors import KafkaError

from ..brokers import BrokerError, Kafka
from ..brokers.base import Connectable
from ..metrics import QueueMetrics
from ..topics import consumer, partitions_of, poll, producer
from ..waiting import beside
from .link import Link, link
from .sending import Refused, Unconfirmed, Unrouted, send

Clock = Callable[[], float]
Fate = Literal["on time", "late", "lost", "unknown"]
HEADER, REPLY = "canary", "canary-reply-to"
REMEMBERED = 1000  # probes that may still arrive, or arrive again
ANSWER_SECONDS = 5.0


@dataclass
class Probe:
    """One message of a canary."""

    id: str
    time: float
    """When it was sent, by the canary's clock."""
    fate: Fate = "unknown"
    """"lost" only where that is known: no queue took it, or the log went on past it. A time that passed leaves it
    "unknown", and makes it "late" if it comes."""
    seconds: float | None = None
    """From end to end; None until it arrives."""
    confirmed: bool = False
    """The broker has said that it is stored."""
    partition: int | None = None
    """Where it was sent, on Kafka."""
    offset: int | None = None
    """Where it is stored, if it is the log itself that is read."""
    settled: asyncio.Event = field(default_factory=asyncio.Event, repr=False)


class Canary:
    """Sends probes, and knows what became of them. `kafka_canary` and `rabbit_canary` make one with its way there and
    back; for another path `send(probe)` returns when the probe is stored, and the way back calls `arrived`.

    A probe is on time within `within` seconds. While `most` have no answer none is sent, so that they do not pile up in
    front of a consumer that hangs; each counts among these for `patience` seconds. `metrics`, with `labels`, gets what
    was confirmed, each latency, and failures by fate: a late one counts as unknown first, then as consumed and late.
    """

    def __init__(
        self, send: Callable[[Probe], Awaitable[None]], within: float = 5.0, metrics: QueueMetrics | None = None,
        labels: dict[str, str] | None = None, most: int = 10, patience: float = 600.0, clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        if not 0 < within <= patience or most < 1:
            raise ValueError(
                f"0 < within ({within}) <= patience ({patience}), in seconds, and most ({most}) is 1 or more"
            )
        self.samples: list[Probe] = []
        self.fates: Counter[str] = Counter()
        """How many probes have which fate now."""
        self.duplicated = 0
        """Arrivals of a probe that had arrived."""
        self.foreign = 0
        """Arrivals of what is none of ours, or too old; they are ignored."""
        self._send, self._within, self._most, self._patience, self._clock = send, within, most, patience, clock
        self._labels = labels or {}
        self.metrics = metrics or QueueMetrics(*self._labels)
        self.metrics.record_produced(0, **self._labels)  # raises for other labels than declared
        self._run, self._probes = uuid.uuid4().hex, dict[str, Probe]()

    def __str__(self) -> str:
        return ", ".join(f"{fate} {count}" for fate, count in sorted((+self.fates).items()))

    @property
    def open(self) -> list[Probe]:
        """What was confirmed, at most `patience` seconds ago, and has not arrived."""
        since = self._clock() - self._patience
        return [p for p in self._probes.values() if p.confirmed and p.fate == "unknown" and p.time >= since]

    async def sample(self) -> Probe:
        """Sends a probe, and waits until it arrives, `within` seconds in all; the last one again if `most` are open.

        Raises `BrokerError` when it was not confirmed: then nobody knows whether it is on its way.
        """
        if len(waiting := self.open) >= self._most:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._within):
                    await waiting[-1].settled.wait()
            return waiting[-1]
        number = sum(self.fates.values())
        probe = Probe(f"{self._run}-{number}", self._clock())
        self.fates["unknown"] += 1
        self.samples.append(probe)
        self._probes[probe.id] = probe
        self._probes.pop(f"{self._run}-{number - REMEMBERED}", None)
        try:
            async with asyncio.timeout(self._within):
                await self._send(probe)
                probe.confirmed = True
                self.metrics.record_produced(1, **self._labels)
                await probe.settled.wait()
        except (Unrouted, Refused):
            self._become(probe, "lost")
        except Exception as error:
            if not probe.settled.is_set():
                self.metrics.record_failed("unknown", **self._labels)
                if not probe.confirmed:
                    why = str(error) or f"no answer within {self._within:g} s"
                    raise BrokerError(f"a canary was not confirmed, and may be stored: {why}") from error
        return probe

    def arrived(self, id: str) -> None:
        """To be called for whatever comes back."""
        probe = self._probes.get(id)
        if probe is None:
            self.foreign += 1
        elif probe.seconds is not None:
            self.duplicated += 1
        else:
            probe.seconds = max(self._clock() - probe.time, 0.0)
            self.metrics.record_consumed(probe.seconds, **self._labels)
            self._become(probe, "on time" if probe.seconds <= self._within else "late")

    def passed(self, partition: int, position: int) -> None:
        """To be called by who reads a log itself: all before `position` has come. What is not among that is lost."""
        for probe in self.open:
            if probe.partition == partition and probe.offset is not None and probe.offset < position:
                self._become(probe, "lost")

    def _become(self, probe: Probe, fate: Fate) -> None:
        self.fates.subtract([probe.fate])
        self.fates[fate] += 1
        probe.fate = fate
        probe.settled.set()
        if fate != "on time":
            self.metrics.record_failed(fate, **self._labels)


def failures(samples: Sequence[Probe]) -> int:
    """What an alert looks at: how many of the newest probes did not arrive on time, in a row; of a topic it is the most
    over the partitions. Those that were not confirmed tell nothing, and do not count."""
    found, arrives = Counter[int | None](), set[int | None]()
    for probe in reversed(samples):
        if probe.fate == "on time":
            arrives.add(probe.partition)
        elif probe.partition not in arrives and (probe.confirmed or probe.fate == "lost"):
            found[probe.partition] += 1
    return max(found.values(), default=0)


@contextlib.asynccontextmanager
async def kafka_canary(
    kafka: Kafka, topic: str, replies: str | None = None, within: float = 5.0, **options: Any
) -> AsyncIterator[Canary]:
    """A canary for a topic, each of its partitions in turn. `options` as of `Canary`.

    Without `replies` it reads the topic itself, from now on and outside of any group: that is the brokers' part, and
    all records of the topic come along. With `replies`, another topic, it waits for the consumers' `answer` there.
    Raises `BrokerError` when there is no such topic.
    """
    places, back = [await partitions_of(kafka, name) for name in (topic, replies or topic)]
    turn = cycle(places)
    latest = {"auto_offset_reset": "latest", "enable_auto_commit": False}
    async with producer(kafka, acks="all") as sender, consumer(kafka, **latest) as reader:
        reader.assign(back)
        await reader.seek_to_end(*back)
        for place in back:
            await reader.position(place)

        async def send_to(probe: Probe) -> None:
            probe.partition = next(turn).partition
            headers = [(HEADER, probe.id.encode())] + ([(REPLY, replies.encode())] if replies else [])
            # With a key, since a compacted topic takes no other.
            stored = await sender.send_and_wait(topic, b"", HEADER.encode(), probe.partition, headers=headers)
            probe.offset = None if replies else stored.offset

        async def receive() -> None:
            while True:
                for place, records in (await poll(reader, 0.1)).items():
                    for record in records:
                        if id := dict(record.headers).get(HEADER):
                            canary.arrived(id.decode(errors="replace"))
                    canary.passed(place.partition, records[-1].offset + 1)

        canary = Canary(send_to, within, **options)
        async with beside(receive()):
            yield canary


@contextlib.asynccontextmanager
async def rabbit_canary(
    rabbit: Connectable, queue: str, within: float = 5.0, **options: Any
) -> AsyncIterator[Canary]:  # fmt: skip
    """A canary for a queue, whose consumers `answer`. `options` as of `Canary`.

    The answers come to a queue of its own, which ends with the connection: what was under way then stays unknown.
    """
    replies = ""

    async def came(message: AbstractIncomingMessage) -> None:
        canary.arrived(str(message.correlation_id))

    async def setup(channel: AbstractChannel) -> None:
        nonlocal replies
        made = await channel.declare_queue(exclusive=True)
        await made.consume(came, no_ack=True)
        replies = made.name

    async def send_to(probe: Probe) -> None:
        await connection.channel()  # there is one, and its queue for the answers
        message = Message(
            b"", headers={HEADER: probe.id}, reply_to=replies, correlation_id=probe.id, message_id=probe.id,
            delivery_mode=DeliveryMode.PERSISTENT,
        )  # fmt: skip
        await send(connection, message, queue, within=0.9 * within)  # before `sample` gives up, so that it says why

    canary = Canary(send_to, within, **options)
    async with link(rabbit, setup) as connection:
        yield canary


async def answer(client: AIOKafkaProducer | Link, received: ConsumerRecord | AbstractIncomingMessage) -> bool:
    """Whether what was received is a canary's probe. If it is, it has been answered, or not: a canary that is gone, or
    a broker that does not take it within 5 s, is nothing that a consumer should fail of."""
    headers = dict(received.headers)
    if HEADER not in headers:
        return False
    with contextlib.suppress(KafkaError, Unconfirmed, TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            if not isinstance(client, Link):
                if REPLY in headers:
                    header = [(HEADER, headers[HEADER])]
                    await client.send_and_wait(headers[REPLY].decode(), b"", headers=header)
            elif received.reply_to:
                await send(client, Message(b"", correlation_id=received.correlation_id), received.reply_to)
    return True
