"""The registry: one id a schema, whoever is first; the wire format; and what is known when Kafka does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import mqlib as mq
from mqlib.patterns import schemas
from mqlib.patterns.compatibility import Incompatible, Schema, SchemaError, schema
from mqlib.patterns.schemas import Malformed, Registry, Unfit, UnknownSchema, Unreachable, registry
from mqlib.topics import poll


def record(*names: str, name: str = "Order", **defaults: Any) -> dict[str, Any]:
    fields: list[dict[str, Any]] = [{"name": each, "type": "int"} for each in names]
    return {"type": "record", "name": name, "fields": [*fields, *(
        {"name": each, "type": "int", "default": value} for each, value in defaults.items())]}  # fmt: skip


A, AB, AB_REQUIRED, AC = record("a"), record("a", b=1), record("a", "b"), record("a", c=1)


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka with a proxy in front of it."""
    with mq.kafka(private=True) as broker:
        yield broker


async def fresh(kafka: mq.Kafka, **config: Any) -> str:
    return await mq.topic(kafka, "schemas", **{"cleanup_policy": "compact", **config})


@contextlib.asynccontextmanager
async def two(kafka: mq.Kafka) -> AsyncIterator[tuple[Registry, Registry]]:
    topic = await fresh(kafka)
    async with registry(kafka, topic) as ours, registry(kafka, topic) as theirs:
        yield ours, theirs


def state(known: Registry) -> dict[str, Any]:
    return {name: (each.mode, each.versions) for name, each in known.subjects.items()}


async def test_the_same_schema_has_the_same_id_everywhere(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        first = await ours.register("orders", A)
        again = {key: A[key] for key in reversed(A)}
        assert [first, await ours.register("orders", again), await theirs.register("archive", A)] == [first] * 3
        second = await theirs.register("orders", AB)
        assert (first.id, second.id) == (1, 2)
        assert await ours.register("orders", A) == first, "also when it is no longer the last one"
        await ours.refresh()
        assert state(ours)["orders"] == ("BACKWARD", [first, second])
        assert state(ours) == state(theirs)
        async with registry(kafka, ours.topic) as later:
            assert state(later) == state(ours)
            assert await later.by_id(2) == second


async def test_what_is_not_compatible_is_refused_and_nothing_is_stored(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        await ours.register("orders", A)
        before = await mq.end_offsets(kafka, ours.topic)
        with pytest.raises(Incompatible, match=r"'orders' is BACKWARD.*cannot read version 1: Order\.b") as caught:
            await theirs.register("orders", AB_REQUIRED)
        assert [each.where for each in caught.value.problems] == ["Order.b"]
        with pytest.raises(SchemaError, match="no Avro schema"):
            await theirs.register("orders", {"type": "nope"})
        with pytest.raises(ValueError, match=r"'BACKWARDS' .* is none of NONE, BACKWARD"):
            await ours.set_mode("orders", "BACKWARDS")
        with pytest.raises(ValueError, match="needs a name"):
            await ours.register("", A)
        assert await mq.end_offsets(kafka, ours.topic) == before


async def test_a_mode_holds_for_all_registrars(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        await ours.register("orders", A)
        await ours.set_mode("orders", "NONE")
        await ours.set_mode("orders", "NONE")
        await theirs.register("orders", AB_REQUIRED)
        await theirs.set_mode("orders", "FULL_TRANSITIVE")
        with pytest.raises(Incompatible, match="'orders' is FULL_TRANSITIVE") as caught:
            await ours.register("orders", record("b", a=1))
        assert [(each.reader, each.where) for each in caught.value.problems] == [("the new schema", "Order.b")]
        assert await mq.end_offsets(kafka, ours.topic) == [4]


def overtake(known: Registry, first: Any) -> None:
    """Lets `first` happen after `known` has looked, and before it writes; once."""
    send = known._writing.send_and_wait

    async def late(*args: Any, **options: Any) -> Any:
        known._writing.send_and_wait = send
        await first
        return await send(*args, **options)

    known._writing.send_and_wait = late


async def test_who_comes_second_does_not_get_an_id_that_is_taken(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        overtake(ours, theirs.register("payments", record("x")))
        second = await ours.register("orders", A)
        await theirs.refresh()
        assert (second.id, theirs.subjects["payments"].versions[0].id, ours.races) == (2, 1, 1)
        assert state(theirs) == state(ours)
        last = (await mq.read(kafka, ours.topic))[2]
        lost = [each for each in await mq.read(kafka, ours.topic) if each.key == last.key]
        assert [each.value is None for each in lost] == [False, True], "its entry may be compacted away"


async def test_who_comes_second_is_checked_against_who_came_first(kafka: mq.Kafka) -> None:
    """Each of the two alone would be compatible with version 1; together they are not."""
    async with two(kafka) as (ours, theirs):
        await ours.register("orders", A)
        await ours.set_mode("orders", "FORWARD_TRANSITIVE")
        overtake(ours, theirs.register("orders", AB_REQUIRED))
        with pytest.raises(Incompatible, match=r"version 2 cannot read the new schema: Order\.b"):
            await ours.register("orders", AC)
        await ours.set_mode("orders", "NONE")
        overtake(ours, theirs.set_mode("orders", "FORWARD_TRANSITIVE"))
        with pytest.raises(Incompatible, match="'orders' is FORWARD_TRANSITIVE"):
            await ours.register("orders", AC)
        assert [each.id for each in theirs.subjects["orders"].versions] == [1, 2]
        assert state(ours) == state(theirs)


async def test_two_who_register_the_same_at_the_same_time_share_the_id(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        overtake(ours, theirs.register("orders", A))
        assert (await ours.register("orders", A)).id == 1
        assert len(ours.subjects["orders"].versions) == 1


async def register_ten(kafka: Any, topic: str, name: str) -> None:
    from mqlib.patterns.schemas import registry

    async with registry(kafka, topic) as known:
        for number in range(10):
            fields = [{"name": f"f{number}", "type": "int"}]
            mine = {"type": "record", "name": name, "fields": fields}
            own = await known.register(f"{name}-{number}", mine, within=60)
            both = await known.register("both", {**mine, "name": "Both"}, within=60)
            print(own.id, both.id)


async def test_two_processes_and_several_tasks_at_once(kafka: mq.Kafka) -> None:
    topic = await fresh(kafka)
    async with registry(kafka, topic) as known:
        await known.set_mode("both", "NONE")
        async with (
            mq.worker(register_ten, kafka, topic, "P") as one,
            mq.worker(register_ten, kafka, topic, "Q") as other,
        ):
            tasks = [known.register(f"task-{number}", record(f"g{number}"), within=60) for number in range(5)]
            mine = await asyncio.gather(*tasks)
            await one.ended(within=60)
            await other.ended(within=60)
        await known.refresh()
    pairs = [[tuple(map(int, line.split())) for line in worker.lines] for worker in (one, other)]
    own = [pair[0] for worker in pairs for pair in worker] + [each.id for each in mine]
    assert len(set(own)) == 25, "no id stands for two schemas"
    assert [pair[1] for pair in pairs[0]] == [pair[1] for pair in pairs[1]], "and no schema has two ids"
    assert sorted(own + [pair[1] for pair in pairs[0]]) == list(range(1, 36))
    async with registry(kafka, topic) as later:
        assert state(later) == state(known)


async def test_an_answer_that_is_lost_is_no_second_version(own: mq.Kafka) -> None:
    """It is stored, and nobody is told; the client sends it again later, and so does the caller."""
    topic = await fresh(own)
    async with mq.proxy(own) as network, registry(network, topic) as known:
        await known.set_mode("orders", "FULL")
        send, stack = known._writing.send_and_wait, contextlib.ExitStack()

        async def unheard(*args: Any, **options: Any) -> Any:
            known._writing.send_and_wait = send
            stack.enter_context(network.swallow("down"))
            return await send(*args, **options)

        known._writing.send_and_wait = unheard
        with pytest.raises(Unreachable, match=r"did not answer within 1\.5 s.*try again"):
            await known.register("orders", A, within=1.5)
        await mq.until(lambda: stored(own, topic, 2), within=10)
        stack.close()
        assert (await known.register("orders", A)).id == 1
        assert len(known.subjects["orders"].versions) == 1
    async with registry(own, topic) as later:
        assert state(later) == {"orders": ("FULL", [schema(A, 1)])}


async def stored(kafka: mq.Kafka, topic: str, count: int) -> bool:
    return (await mq.end_offsets(kafka, topic))[0] >= count


async def test_when_kafka_is_away_what_is_known_is_known_and_the_rest_has_to_wait(own: mq.Kafka) -> None:
    async with mq.proxy(own) as network, registry(network, await fresh(own)) as known:
        first = await known.register("orders", A)
        framed = schemas.encode(first, {"a": 7})
        with network.swallow("up", "down"):
            assert await known.decode(framed, within=0.1) == {"a": 7}
            with pytest.raises(Unreachable):
                await known.by_id(2, within=0.3)
            with pytest.raises(Unreachable):
                await known.register("orders", AB, within=0.3)
        with pytest.raises(UnknownSchema, match=r"no schema with the id 9"):
            await known.by_id(9)
        network.cut()
        assert (await known.register("orders", AB)).id == 2


async def test_a_reading_that_is_cut_short_loses_nothing(kafka: mq.Kafka) -> None:
    async with two(kafka) as (ours, theirs):
        for number in range(12):
            await theirs.register(f"s{number}", record(f"f{number}"))
            task = asyncio.ensure_future(ours.refresh())
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await ours.refresh()
        assert state(ours) == state(theirs)
        assert len(ours.subjects) == 12


async def test_records_that_were_fetched_and_dropped_are_fetched_again(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dropped(*args: Any) -> Any:
        assert await poll(*args)
        raise asyncio.CancelledError

    async with two(kafka) as (ours, theirs):
        await theirs.register("orders", A)
        monkeypatch.setattr(schemas, "poll", dropped)
        with pytest.raises(asyncio.CancelledError):
            await ours.refresh()
        monkeypatch.setattr(schemas, "poll", poll)
        await ours.refresh()
        assert state(ours) == state(theirs)


async def test_a_topic_that_is_shorter_than_it_was_is_told(kafka: mq.Kafka) -> None:
    async with registry(kafka, await fresh(kafka)) as known:
        await known.register("orders", A)
        known._next += 1  # as if it had been deleted, and made anew
        with pytest.raises(SchemaError, match="ends at 1, and 2 records were read: was it made anew"):
            await known.refresh()


async def test_what_is_no_entry_is_not_taken(kafka: mq.Kafka) -> None:
    topic = await fresh(kafka)
    entry = {"number": 1, "subject": "orders", "version": 2, "id": 2, "schema": AB}
    wrong: list[Any] = [
        "x", 3, [], {}, {"number": 1}, {**entry, "number": 0}, {**entry, "number": 2}, {**entry, "id": 1},
        {**entry, "id": 0}, {**entry, "id": "2"}, {**entry, "id": 2**32}, {**entry, "schema": {"type": "nope"}},
        {**entry, "subject": []}, {**entry, "id": 3, "schema": A},
    ]  # fmt: skip
    async with registry(kafka, topic) as known:
        await known.register("orders", A)
        async with mq.producer(kafka) as producer:
            for number, value in enumerate(wrong):
                await producer.send_and_wait(topic, json.dumps(value).encode(), key=b"%d" % number)
            await producer.send_and_wait(topic, b"\xff{", key=b"no JSON")
        await known.refresh()
        assert known.ignored == len(wrong) + 1
        assert state(known) == {"orders": ("BACKWARD", [schema(A, 1)])}
        assert (await known.register("orders", AB)).id == 2


async def test_a_topic_that_would_lose_schemas_is_refused(kafka: mq.Kafka) -> None:
    two_partitions, deleted = await fresh(kafka, partitions=2), await fresh(kafka, cleanup_policy="delete")
    for topic, words in (
        (two_partitions, "has 2 partitions and cleanup.policy=compact"),
        (deleted, "has 1 partitions and cleanup.policy=delete"),
    ):
        with pytest.raises(mq.BrokerError, match=words):
            async with registry(kafka, topic):
                pass


async def test_an_entry_that_kafka_refuses_is_told_and_the_next_one_is_taken(kafka: mq.Kafka) -> None:
    async with registry(kafka, await fresh(kafka, max_message_bytes=2000)) as known:
        with pytest.raises(SchemaError, match="refuses the entry: MessageSizeTooLarge"):
            await known.register("orders", {**A, "doc": "x" * 5000})
        assert (await known.register("orders", A)).id == 1


ORDER = schema({"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "int"}, {"name": "customer", "type": "string"},
    {"name": "tags", "type": {"type": "array", "items": "string"}, "default": []},
]}, id=7)  # fmt: skip
VALUE = {"id": 1, "customer": "ann", "tags": ["new"]}
BODY = schemas.encode_body(ORDER, VALUE)


def test_the_wire_format() -> None:
    framed = schemas.encode(ORDER, VALUE)
    assert framed == b"\x00\x00\x00\x00\x07" + BODY
    assert schemas.unframe(framed) == (7, BODY)
    assert schemas.frame(2**31, b"")[1:] == b"\x80\x00\x00\x00"
    assert schemas.decode_body(ORDER, BODY) == VALUE
    with pytest.raises(ValueError, match="no id: register it"):
        schemas.encode(schema(A), {"a": 1})


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "nothing at all"), (b"", "0 bytes that begin with none"), (b"\0\0\0\0", "4 bytes that begin with 00 00"),
     (b'{"id": 1}', "9 bytes that begin with 7b 22 69 64 22"), (b"\x01\0\0\0\x07", "begin with 01")],
)  # fmt: skip
def test_what_is_not_in_the_wire_format_is_refused(data: bytes | None, words: str) -> None:
    with pytest.raises(Malformed, match=f"not in the wire format.*{words}"):
        schemas.unframe(data)


@pytest.mark.parametrize(
    "body",
    [b"", BODY[:-1], BODY[:2], BODY + b"\0", b"\x02\x04\xff\xff\x00", b"\x02\x7f", b"\xff" * 12],
    ids=["nothing", "cut", "half", "longer", "no UTF-8", "too short a text", "noise"],
)
def test_a_body_that_is_not_one_value_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed, match=r"(are not a value|are left over after a value) of schema 7"):
        schemas.decode_body(ORDER, body)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**VALUE, "id": 2**31}, r"Order\.id"),
        ({**VALUE, "id": "1"}, r"Order\.id"),
        ({**VALUE, "colour": "red"}, "colour"),
        ({"id": 1}, r"customer"),
        ({**VALUE, "customer": None}, r"Order\.customer"),
        ({**VALUE, "tags": [1]}, "tags"),
        ([1], "list"),
        (None, "None"),
    ],
)
def test_a_value_that_does_not_fit_is_not_written(value: Any, words: str) -> None:
    with pytest.raises(Unfit, match=f"not a value of schema 7: (.|\n)*{words}"):
        schemas.encode_body(ORDER, value)


def test_a_default_is_written_and_read_and_not_shared() -> None:
    assert schemas.decode_body(ORDER, schemas.encode_body(ORDER, {"id": 1, "customer": "ann"}))["tags"] == []
    old = schema({"type": "record", "name": "Order", "fields": ORDER.parsed["fields"][:2]}, id=3)
    body = schemas.encode_body(old, {"id": 1, "customer": "ann"})
    schemas.decode_body(old, body, ORDER)["tags"].append("spoilt")
    assert schemas.decode_body(old, body, ORDER)["tags"] == []


def test_a_reader_that_cannot_is_told_why() -> None:
    reader: Schema = schema({"type": "record", "name": "Order", "fields": [{"name": "sum", "type": "int"}]})
    with pytest.raises(Incompatible, match=r"data of schema 7 cannot be read: .*Order\.sum") as caught:
        schemas.decode_body(ORDER, BODY, reader)
    assert [each.where for each in caught.value.problems] == ["Order.sum"]


def test_the_id_in_a_header() -> None:
    name, value = schemas.id_header(ORDER)
    assert (name, value) == ("schema-id", b"7")
    for headers in ([("other", b"1"), (name, value)], {name: "7"}, {name: 7}):
        assert schemas.id_in(headers) == 7
    for wrong in ("seven", 0, -7, b"\xff", 7.0, None, b"", "1" * 11):
        with pytest.raises(Malformed, match=r"the header 'schema-id' is .*not the id"):
            schemas.id_in({name: wrong})
    with pytest.raises(Malformed, match="is None"):
        schemas.id_in([])
