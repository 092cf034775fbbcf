"""The verdict on two schemas is what fastavro then does with data: for each kind of change, and for random schemas."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import fastavro
import pytest

from mqlib.patterns.compatibility import MODES, Problem, SchemaError, breaks, schema, unreadable


def record(*fields: dict[str, Any], name: str = "Order", **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": list(fields), **more}


def of(name: str, type: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type, **more}


def symbols(*names: str, **more: Any) -> dict[str, Any]:
    return {"type": "enum", "name": "State", "symbols": list(names), **more}


def fixed(size: int) -> dict[str, Any]:
    return {"type": "fixed", "name": "Hash", "size": size}


def examples(node: Any, names: dict[str, Any], deep: int = 0) -> list[Any]:
    """Values that among them have each branch of each union, and each symbol."""
    node = names.get(node, node) if isinstance(node, str) else node
    if isinstance(node, list):
        return [value for branch in node for value in examples(branch, names, deep)]
    kind = node["type"] if isinstance(node, dict) else node
    if kind == "record":
        if deep > 3:
            return []
        of_fields = {each["name"]: examples(each["type"], names, deep + 1) for each in node["fields"]}
        if not all(of_fields.values()):
            return []
        first = {name: values[0] for name, values in of_fields.items()}
        return [first, *({**first, name: value} for name, values in of_fields.items() for value in values[1:])]
    if kind == "array":
        return [[], *([value] for value in examples(node["items"], names, deep + 1))]
    if kind == "map":
        return [{}, *({"k": value} for value in examples(node["values"], names, deep + 1))]
    plain: dict[str, list[Any]] = {
        "null": [None], "boolean": [True], "int": [7], "long": [7], "float": [0.5], "double": [0.5], "bytes": [b"b"],
        "string": ["s"],
    }  # fmt: skip
    if kind == "enum":
        return list(node["symbols"])
    return [b"x" * node["size"]] if kind == "fixed" else plain[kind]


def experiment(writer: Any, reader: Any) -> bool:
    """Whether fastavro reads everything."""
    one, two = schema(writer), schema(reader)
    values = examples(one.parsed, dict(one.names))
    assert values
    for value in values:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, one.parsed, value)
        stream.seek(0)
        try:
            fastavro.schemaless_reader(stream, one.parsed, two.parsed)
        except Exception:
            return False
    return True


def verdict(writer: Any, reader: Any) -> list[str]:
    return [f"{each.where}: {each.why}" for each in unreadable(schema(writer), schema(reader))]


ADDRESS = record(of("street", "string"), name="Address")
PLACE = record(of("street", "string"), of("city", "string"), name="Address")
LINKED = record(of("value", "int"), of("next", ["null", "Order"]))
OTHER = record(of("value", "int"), of("next", ["null", "Order"]), of("text", "string"))
ABSENT = "the writer has no such field, and the reader no default for it"

CASES: list[tuple[str, Any, Any, list[str]]] = [
    ("the same", record(of("a", "int")), record(of("a", "int")), []),
    ("less", record(of("a", "int"), of("b", "int")), record(of("a", "int")), []),
    ("more, with a default", record(of("a", "int")), record(of("a", "int"), of("b", "int", default=1)), []),
    ("more", record(of("a", "int")), record(of("a", "int"), of("b", "int")), [f"Order.b: {ABSENT}"]),
    ("other order", record(of("a", "int"), of("b", "string")), record(of("b", "string"), of("a", "int")), []),
    ("renamed", record(of("a", "int")), record(of("b", "int")), [f"Order.b: {ABSENT}"]),
    ("alias", record(of("a", "int")), record(of("b", "int", aliases=["a"])), []),
    ("widened", record(of("a", "int")), record(of("a", "double")), []),
    ("narrowed", record(of("a", "double")), record(of("a", "int")), ["Order.a: double cannot be read as int"]),
    ("text and bytes", record(of("a", "string")), record(of("a", "bytes")), []),
    ("bytes and text", record(of("a", "bytes")), record(of("a", "string")), []),
    ("text", record(of("a", "int")), record(of("a", "string")), ["Order.a: int cannot be read as string"]),
    ("no longer null", record(of("a", ["null", "int"])), record(of("a", "int")),
     ["Order.a: null cannot be read as int"]),
    ("may be null", record(of("a", "int")), record(of("a", ["null", "int"])), []),
    ("union, promoted", record(of("a", "int")), record(of("a", ["null", "long"])), []),
    ("union without it", record(of("a", "string")), record(of("a", ["null", "long"])),
     ["Order.a: string is none of null, long"]),
    ("union, fewer", record(of("a", ["null", "int", "string"])), record(of("a", ["null", "int"])),
     ["Order.a: string is none of null, int"]),
    ("new symbol", record(of("s", symbols("A", "B", "C"))), record(of("s", symbols("A"))),
     ["Order.s: the reader does not know B, C, and has no default"]),
    ("new symbol, default", record(of("s", symbols("A", "B"))), record(of("s", symbols("A", default="A"))), []),
    ("size", record(of("h", fixed(4))), record(of("h", fixed(8))), ["Order.h: 4 bytes cannot be read as 8"]),
    ("items", record(of("a", {"type": "array", "items": "string"})), record(of("a", {"type": "array", "items": "int"})),
     ["Order.a[]: string cannot be read as int"]),
    ("values", record(of("a", {"type": "map", "values": "int"})), record(of("a", {"type": "map", "values": "long"})),
     []),
    ("nested", record(of("to", ADDRESS)), record(of("to", PLACE)), [f"Order.to.city: {ABSENT}"]),
    ("nested in a union", record(of("to", ADDRESS)), record(of("to", ["null", PLACE])), [f"Order.to.city: {ABSENT}"]),
    ("in an array", record(of("to", {"type": "array", "items": ADDRESS})),
     record(of("to", {"type": "array", "items": PLACE})), [f"Order.to[].city: {ABSENT}"]),
    ("the record's name", record(of("a", "int")), record(of("a", "int"), name="Sale"),
     ["the whole: record Order cannot be read as record Sale"]),
    ("the record's alias", record(of("a", "int")), record(of("a", "int"), name="Sale", aliases=["Order"]), []),
    ("another namespace", record(of("a", "int"), name="old.Order"), record(of("a", "int"), name="new.Order"), []),
    ("no record", record(of("a", "int")), "string", ["the whole: record Order cannot be read as string"]),
    ("of itself", LINKED, LINKED, []),
    ("of itself, more", LINKED, OTHER, [f"Order.text: {ABSENT}"]),
    ("two at once", record(of("a", "int")), record(of("a", "string"), of("b", "int")),
     ["Order.a: int cannot be read as string", f"Order.b: {ABSENT}"]),
    ("plain", "int", "long", []),
    ("plain, not", "long", "int", ["the whole: long cannot be read as int"]),
]  # fmt: skip


@pytest.mark.parametrize(("writer", "reader", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_verdict_names_the_place_and_agrees_with_fastavro(writer: Any, reader: Any, words: list[str]) -> None:
    assert verdict(writer, reader) == words
    assert experiment(writer, reader) is (not words)


def test_two_fields_that_become_one_are_refused() -> None:
    """What fastavro makes of it is one of the two values."""
    writer = record(of("a", "int"), of("b", "int"))
    [words] = verdict(writer, record(of("b", "int", aliases=["a"])))
    assert words == "Order.b: the writer's fields a and b would both be read as this one"


PLAIN = ["null", "boolean", "int", "long", "float", "double", "string", "bytes"]


def random_type(chance: random.Random, deep: int) -> Any:
    match chance.randrange(8 if deep < 2 else 4):
        case 4:
            return {"type": "array", "items": random_type(chance, deep + 1)}
        case 5:
            return {"type": "map", "values": random_type(chance, deep + 1)}
        case 6:
            return chance.sample(["null", "int", "string", "double"], 2)
        case 7:
            return random_record(chance, deep + 1)
        case 3:
            more = {"default": "A"} if chance.random() < 0.3 else {}
            return {**symbols(*chance.choice([("A",), ("A", "B"), ("A", "B", "C")]), **more), "name": f"E{deep}"}
        case _:
            return chance.choice(PLAIN)


def random_record(chance: random.Random, deep: int) -> dict[str, Any]:
    fields = [of(name, random_type(chance, deep)) for name in chance.sample("abc", chance.randrange(1, 4))]
    return record(*fields, name=f"R{deep}")


def changed(chance: random.Random, node: Any, deep: int = 0) -> Any:
    """The same with, here and there, another type, a field less or more, or a null."""
    if chance.random() < 0.1 and deep:
        return random_type(chance, deep)
    if isinstance(node, dict) and node["type"] == "record":
        fields = [{**each, "type": changed(chance, each["type"], deep + 1)} for each in node["fields"]]
        if chance.random() < 0.2:
            fields.pop()
        if chance.random() < 0.2:
            fields.insert(0, of("new", "int", **({"default": 1} if chance.random() < 0.5 else {})))
        return {**node, "fields": fields}
    if node == "int" and chance.random() < 0.3:
        return chance.choice(["long", ["null", "int"], "double"])
    return node


def distinct(node: Any, taken: list[int]) -> Any:
    """Each named type under a name of its own: Avro wants that, and the place in the schema decides which."""
    if isinstance(node, list):
        return [distinct(each, taken) for each in node]
    if not isinstance(node, dict):
        return node
    result = {**node}
    if "name" in node and node["type"] in ("record", "enum"):
        taken.append(0)
        result["name"] = f"{node['name']}n{len(taken)}"
    for part in ("items", "values"):
        if part in node:
            result[part] = distinct(node[part], taken)
    if "fields" in node:
        result["fields"] = [{**each, "type": distinct(each["type"], taken)} for each in node["fields"]]
    return result


def test_random_schemas_the_verdict_is_the_experiment() -> None:
    chance, found = random.Random(18), {True: 0, False: 0}
    for _ in range(600):
        old = random_record(chance, 0)
        new = changed(chance, copy.deepcopy(old))
        writer, reader = distinct(old, []), distinct(new, [])
        for one, two in ((writer, reader), (reader, writer), (writer, writer)):
            fine = experiment(one, two)
            assert fine is (not verdict(one, two)), (one, two, verdict(one, two))
            found[fine] += 1
    assert min(found.values()) > 300, f"both verdicts are put to the test, not {found}"


V1 = schema(record(of("a", "int")))
V2 = schema(record(of("a", "int"), of("b", "int", default=1)))
V3 = schema(record(of("a", "int"), of("b", "int")))


@pytest.mark.parametrize(
    ("mode", "places"),
    [
        ("NONE", []),
        ("BACKWARD", []),
        ("BACKWARD_TRANSITIVE", [("Order.b", "version 1", "the new schema")]),
        ("FORWARD", []),
        ("FULL", []),
        ("FULL_TRANSITIVE", [("Order.b", "version 1", "the new schema")]),
    ],
)
def test_a_transitive_mode_asks_all_versions_another_one_the_last(mode: str, places: list[Any]) -> None:
    """`b` loses the default that only version 1 needs."""
    assert [(each.where, each.writer, each.reader) for each in breaks(mode, V3, [V1, V2])] == places


@pytest.mark.parametrize(
    ("mode", "readers"),
    [("BACKWARD", ["the new schema"]), ("FORWARD", ["version 1"]), ("FULL", ["the new schema", "version 1"])],
)
def test_the_direction_of_a_mode(mode: str, readers: list[str]) -> None:
    text = schema(record(of("a", "string")))
    found = breaks(mode, text, [V1])
    assert [each.reader for each in found] == readers
    assert str(found[0]).startswith(f"{readers[0]} cannot read ")
    assert breaks(mode, text, []) == []


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="none of NONE, BACKWARD, FORWARD"):
        breaks("BACKWARDS", V1, [])
    assert len(MODES) == 7


@pytest.mark.parametrize(
    "wrong",
    [3, None, "nope", {"type": "nope"}, record(of("a", "int", default="x")), record(of("a", "int"), of("a", "int")),
     symbols("A", "A"), {"type": "record", "fields": []}, record(of("a", "int", default=float("nan"))), {"a": {1}}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_schema_is_refused(wrong: Any) -> None:
    with pytest.raises(SchemaError, match="that is no Avro schema"):
        schema(wrong)


def test_a_schema_is_told_by_all_that_it_says_but_not_by_how_it_is_written() -> None:
    one = {"type": "record", "name": "Order", "fields": [{"name": "a", "type": "int", "default": 1}]}
    two = {"fields": [{"default": 1, "type": "int", "name": "a"}], "name": "Order", "type": "record"}
    assert schema(one) == schema(two) == schema(fastavro.parse_schema(copy.deepcopy(one)))
    assert schema(one) != schema(record(of("a", "int", default=2)))
    assert schema(one) != schema(record(of("a", "int")))
    assert str(Problem("a", "why")) == "the reader cannot read the writer: a: why"


def test_what_was_handed_in_is_not_changed() -> None:
    definition = record(of("to", ADDRESS), of("again", "Address"))
    before = copy.deepcopy(definition)
    assert schema(definition).names.keys() == {"Order", "Address"}
    assert definition == before
