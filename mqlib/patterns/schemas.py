"""A registry of Avro schemas in a compacted Kafka topic, and Confluent's wire format.

Several may register at the same time, without a leader or a lock: each entry bears the number after the last one that
its writer had seen, and of two entries with one number all who read the topic take the first. Whoever lost sees that,
and tries again on what is there now. Nothing that was taken is ever compacted away: each entry has a key of its own.

See https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html ("Wire format").
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import re
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import fastavro
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from fastavro.validation import validate

from ..brokers import Kafka
from ..brokers.base import BrokerError, Connectable
from ..bulk import REFUSED
from ..topics import consumer, partitions_of, poll, producer
from .compatibility import DEFAULT_MODE, MODES, Incompatible, Schema, SchemaError, breaks, schema, unreadable

HEADER = "schema-id"
PREFIX = struct.Struct(">BI")
MAGIC = 0
POLL_SECONDS = 0.1


class UnknownSchema(SchemaError):
    """The registry has no schema with that id; it was asked just now."""


class Unreachable(SchemaError):
    """The registry did not answer in time. That says nothing of the schema: try again. One that was being registered
    may be; to register it again is safe."""


class Malformed(SchemaError):
    """Bytes that are not what they should be: no magic byte, no id, or no value of that schema."""


class Unfit(SchemaError):
    """A value that is not as its schema says. Nothing was written."""


def encode_body(of: Schema, value: Any) -> bytes:
    """The value in Avro's binary encoding, alone. Raises `Unfit`, which names the field: also for a field that the
    schema does not have, and for a number that is too large, which fastavro would let pass."""
    stream = io.BytesIO()
    try:
        validate(value, of.parsed)
        fastavro.schemaless_writer(stream, of.parsed, value, strict_allow_default=True)
    except Exception as error:  # fastavro raises whatever it stumbles over
        raise Unfit(f"not a value of schema {of.id}: {error!s:.500}") from None
    return stream.getvalue()


def decode_body(writer: Schema, body: bytes, reader: Schema | None = None) -> Any:
    """The value that was written with `writer`, in the shape of `reader` if there is one.

    Raises `Malformed` when the bytes, all of them, are not one value, `Incompatible` when the reader cannot read it.
    """
    stream = io.BytesIO(body)
    try:
        value = fastavro.schemaless_reader(stream, writer.parsed, reader.parsed if reader else None)
    except fastavro.read.SchemaResolutionError as error:
        problems = unreadable(writer, reader) if reader else []
        raise Incompatible(f"data of schema {writer.id} cannot be read: {error}", problems) from None
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise Malformed(f"{len(body)} bytes are not a value of schema {writer.id}: {why}") from None
    if rest := len(body) - stream.tell():
        raise Malformed(f"{rest} of {len(body)} bytes are left over after a value of schema {writer.id}")
    # fastavro 1.13 puts the default itself into each record: who appends to such a list changes all later records.
    return copy.deepcopy(value) if reader and re.search(r'"default":[\[{]', reader.text) else value


def frame(id: int, body: bytes) -> bytes:
    """Confluent's wire format: a magic byte 0, the id in four bytes, big-endian, and the body."""
    return PREFIX.pack(MAGIC, id) + body


def unframe(data: bytes | None) -> tuple[int, bytes]:
    """The id and the body. Raises `Malformed` for what is not in the wire format."""
    if data is None or len(data) < PREFIX.size or data[0] != MAGIC:
        begin = "nothing at all" if data is None else f"{len(data)} bytes that begin with {data[:5].hex(' ') or 'none'}"
        raise Malformed(f"not in the wire format, a 0 and four bytes of id: {begin}")
    return PREFIX.unpack_from(data)[1], data[PREFIX.size :]


def encode(of: Schema, value: Any) -> bytes:
    """The value in the wire format. Raises `Unfit`; `ValueError` for a schema that no registry gave an id."""
    if not of.id:
        raise ValueError("this schema has no id: register it, and encode with what `register` returns")
    return frame(of.id, encode_body(of, value))


def id_header(of: Schema) -> tuple[str, bytes]:
    """The id as a header, for a body that stays bare. (RabbitMQ's headers are text: decode the value.)"""
    return HEADER, b"%d" % of.id


def id_in(headers: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> int:
    """The id in the headers of a record or a message. Raises `Malformed` when there is none, or no number."""
    value = dict(headers).get(HEADER)
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text):
        raise Malformed(f"the header {HEADER!r} is {value!r}, and not the id of a schema")
    return int(text)


@dataclass
class Subject:
    """What the registry knows of a subject, such as `orders-value`."""

    mode: str = DEFAULT_MODE
    versions: list[Schema] = field(default_factory=list)  # oldest first; version 1 stands at 0


class Registry:
    """The registry of one topic, kept in memory, read on when something is asked that it lacks; made by `registry`."""

    def __init__(self, topic: str, reading: AIOKafkaConsumer, writing: AIOKafkaProducer) -> None:
        self.topic = topic
        self.subjects: dict[str, Subject] = {}  # as of the last reading; see `refresh`
        self.reads = 0
        """How often the topic was asked for its end."""
        self.races = 0
        """Entries of this registry that came second, and were tried again."""
        self.ignored = 0
        """Records of the topic that were not taken: those that came second, and what is no entry."""
        self._part = TopicPartition(topic, 0)
        self._reading, self._writing, self._lock, self._next = reading, writing, asyncio.Lock(), 0
        self._taken: list[bytes] = []  # the key of each entry that was taken; its place is its number
        self._ids: dict[int, Schema] = {}
        self._texts: dict[str, Schema] = {}

    async def register(self, subject: str, definition: Any, within: float = 10.0) -> Schema:
        """The schema with its id: the same id for the same schema, under whichever subjects, however often.

        Raises `SchemaError` for what is no schema or is too large, `Incompatible` when the subject's mode forbids it,
        `Unreachable` after `within` seconds.
        """
        if not subject:
            raise ValueError("a subject needs a name, such as orders-value")
        new = schema(definition)

        def entry() -> dict[str, Any] | None:
            there = self.subjects.get(subject, Subject())
            if any(new.text == each.text for each in there.versions):
                return None
            if problems := breaks(there.mode, new, there.versions):
                raise Incompatible(f"{subject!r} is {there.mode}, and this is not", problems)
            known = self._texts.get(new.text)
            id = known.id if known else max(self._ids, default=0) + 1
            return {"version": len(there.versions) + 1, "id": id, "schema": json.loads(new.text)}

        await self._append(subject, entry, within)
        return self._texts[new.text]

    async def set_mode(self, subject: str, mode: str, within: float = 10.0) -> None:
        """Sets what the next versions must be compatible with; see `MODES`. Raises `ValueError` for another mode."""
        if mode not in MODES:
            raise ValueError(f"the mode {mode!r} for {subject!r} is none of {', '.join(MODES)}")

        def entry() -> dict[str, Any] | None:
            return None if self.subjects.get(subject, Subject()).mode == mode else {"mode": mode}

        await self._append(subject, entry, within)

    async def by_id(self, id: int, within: float = 10.0) -> Schema:
        """The schema with that id, from memory if it is there. Raises `UnknownSchema`, or `Unreachable` as `refresh`
        does: then nobody knows, and the record that asks for it must wait."""
        if id not in self._ids:
            await self.refresh(within)
        if id not in self._ids:
            raise UnknownSchema(f"{self.topic} has no schema with the id {id}; it has {len(self._ids)} others")
        return self._ids[id]

    async def decode(self, data: bytes | None, reader: Schema | None = None, within: float = 10.0) -> Any:
        """The value of what is in the wire format. Raises as `unframe`, `by_id` and `decode_body` do."""
        id, body = unframe(data)
        return decode_body(await self.by_id(id, within), body, reader)

    async def refresh(self, within: float = 10.0) -> None:
        """Reads what others have added. Raises `Unreachable` after `within` seconds."""
        async with self._reaching(within):
            await self._catch_up()

    @contextlib.asynccontextmanager
    async def _reaching(self, within: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(within):
                yield
        except REFUSED as error:
            raise SchemaError(f"{self.topic} refuses the entry: {type(error).__name__}: {error}") from error
        except (KafkaError, OSError) as error:  # `TimeoutError` is an `OSError`
            why = f"{type(error).__name__} {error}".strip()
            raise Unreachable(f"{self.topic} did not answer within {within:g} s: {why}; try again") from error

    async def _append(self, subject: str, entry: Callable[[], dict[str, Any] | None], within: float) -> None:
        """Adds what `entry()` says of the state as it is, until it has nothing to add.

        An answer that is lost is no harm: the entry is taken if nobody else was first, and then it is right.
        """
        async with self._reaching(within):
            await self._catch_up()
            while what := entry():
                key, number = uuid.uuid4().hex.encode(), len(self._taken)
                value = json.dumps({"number": number, "subject": subject, **what}).encode()
                await self._writing.send_and_wait(self.topic, value, key=key)
                await self._catch_up()
                if self._taken[number : number + 1] != [key]:
                    self.races += 1
                    await self._writing.send_and_wait(self.topic, None, key=key)  # compaction may take it away

    async def _catch_up(self) -> None:
        async with self._lock:
            self.reads += 1
            end = (await self._reading.end_offsets([self._part]))[self._part]
            if end < self._next:
                raise SchemaError(f"{self.topic} ends at {end}, and {self._next} records were read: was it made anew?")
            if end == self._next:
                return
            # Paused in between: a fetch that waits for news would hold up the next question on its connection.
            self._reading.seek(self._part, self._next)
            self._reading.resume(self._part)
            try:
                while self._next < end:
                    for record in (await poll(self._reading, POLL_SECONDS)).get(self._part, []):
                        self._take(record)
                        self._next = record.offset + 1
                    self._next = max(self._next, await self._reading.position(self._part))  # compaction leaves holes
            finally:
                self._reading.pause(self._part)

    def _take(self, record: ConsumerRecord) -> None:
        """One record of the topic, in order: the same decision for all who read it."""
        if record.value is None:
            return
        try:
            entry = json.loads(record.value)
            there = self.subjects.get(entry["subject"], Subject())
            if entry["number"] != len(self._taken):
                raise ValueError("somebody else was first")
            if "mode" in entry:
                there.mode = entry["mode"] if entry["mode"] in MODES else DEFAULT_MODE
            else:
                new = schema(entry["schema"], entry["id"])
                if not 0 < new.id < 2**32 or not self._texts.get(new.text, new) == self._ids.get(new.id, new) == new:
                    raise ValueError("an id stands for one schema")
                self._texts[new.text] = self._ids[new.id] = new
                there.versions.append(new)
        except (ValueError, TypeError, KeyError, SchemaError):
            self.ignored += 1
            return
        self.subjects[entry["subject"]] = there
        self._taken.append(record.key)


@contextlib.asynccontextmanager
async def registry(kafka: Connectable, topic: str, within: float = 10.0) -> AsyncIterator[Registry]:
    """The `Registry` in a topic, for the length of the block. The topic has one partition, and is compacted.

    Whoever has all the schemas it needs in memory goes on when Kafka is away. Raises `BrokerError` for a topic that is
    missing or otherwise, `Unreachable` when it cannot be read within `within` seconds.
    """
    parts = await partitions_of(cast(Kafka, kafka), topic)
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        config = ConfigResource(ConfigResourceType.TOPIC, topic, {"cleanup.policy": None})
        policy = (await admin.describe_configs([config]))[0].resources[0][4][0][1]
    finally:
        await admin.close()
    if len(parts) != 1 or policy != "compact":
        raise BrokerError(
            f"the registry's topic {topic!r} has {len(parts)} partitions and cleanup.policy={policy}; it needs one, "
            "for there must be one order, and compact, or its schemas are deleted when they are old"
        )
    async with consumer(kafka, fetch_max_wait_ms=20) as reading, producer(kafka, acks="all") as writing:
        reading.assign(parts)
        reading.pause(*parts)
        known = Registry(topic, reading, writing)
        await known.refresh(within)
        yield known
