"""What a change of an Avro schema would break: which data, with which reader, at which field, and why.

The rules are those of https://avro.apache.org/docs/1.12.0/specification/ ("Schema Resolution"), as fastavro applies
them when it reads; the modes are those of Confluent's Schema Registry, https://docs.confluent.io/platform/current/
schema-registry/fundamentals/schema-evolution.html. Nothing here talks to a broker; `schemas` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fastavro

from ..brokers.base import BrokerError

MODES = {
    "NONE": (False, False, False), "BACKWARD": (True, False, False), "FORWARD": (False, True, False),
    "FULL": (True, True, False), "BACKWARD_TRANSITIVE": (True, False, True), "FORWARD_TRANSITIVE": (False, True, True),
    "FULL_TRANSITIVE": (True, True, True),
}  # fmt: skip
"""Must the new schema read old data? Must the old ones read new data? All of them, and not only the last?"""
DEFAULT_MODE = "BACKWARD"
PROMOTIONS = {
    "int": ("long", "float", "double"), "long": ("float", "double"), "float": ("double",),
    "string": ("bytes",), "bytes": ("string",),
}  # fmt: skip


class SchemaError(BrokerError):
    """Something about a schema, or about what is written with one."""


class Problem(NamedTuple):
    """Why data of one schema cannot be read with another."""

    where: str
    """As in `Order.items[].price`; [] is any item, {} any value of a map."""
    why: str
    writer: str = "the writer"
    reader: str = "the reader"

    def __str__(self) -> str:
        return f"{self.reader} cannot read {self.writer}: {self.where}: {self.why}"


class Incompatible(SchemaError):
    """A schema that would break readers or data, with all the `problems`. It is not registered, nothing was read."""

    def __init__(self, words: str, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join([words, *map(str, problems)]))
        self.problems = list(problems)


@dataclass(frozen=True)
class Schema:
    """A schema as fastavro wants it; `id` is 0 as long as no registry gave it another. Made by `schema`, `register`."""

    text: str
    """Its JSON with sorted keys. Schemas with the same text are the same."""
    id: int = 0
    parsed: Any = field(default=None, repr=False, compare=False)
    names: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def schema(definition: Any, id: int = 0) -> Schema:
    """A schema of its JSON, as Python objects. Raises `SchemaError` when it is no Avro schema."""
    names: dict[str, Any] = {}
    if isinstance(definition, dict):  # what fastavro adds to one that it has parsed is not part of it
        definition = {key: value for key, value in definition.items() if not key.startswith("__")}
    try:
        text = json.dumps(definition, sort_keys=True, separators=(",", ":"), allow_nan=False)
        parsed = fastavro.parse_schema(json.loads(text), names)
    except Exception as error:  # fastavro raises whatever it stumbles over
        raise SchemaError(f"that is no Avro schema: {type(error).__name__}: {error}: {definition!r:.200}") from None
    for name, named in names.items():
        fields = [each["name"] for each in named.get("fields", ())]
        if twice := {each for each in fields if fields.count(each) > 1}:
            raise SchemaError(f"that is no Avro schema: {name} has the field {min(twice)!r} twice")
    return Schema(text, id, parsed, names)


def unreadable(writer: Schema, reader: Schema) -> list[Problem]:
    """What stops `reader` from reading *everything* that `writer` may write; empty when nothing does.

    By the rules of Avro's "Schema Resolution", as fastavro applies them. Logical types are not compared.
    """
    return _Resolution(writer.names, reader.names).compare(writer.parsed, reader.parsed, "")


def breaks(mode: str, new: Schema, versions: Sequence[Schema]) -> list[Problem]:
    """What `new` would break, after these `versions` of the subject, oldest first, under a mode of `MODES`.

    Raises `ValueError` for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"the mode {mode!r} is none of {', '.join(MODES)}")
    backward, forward, every = MODES[mode]
    problems, numbered = list[Problem](), list(enumerate(versions, start=1))
    for number, old in numbered if every else numbered[-1:]:
        name = f"version {number}"
        if backward:
            found = unreadable(old, new)
            problems += [each._replace(writer=name, reader="the new schema") for each in found]
        if forward:
            found = unreadable(new, old)
            problems += [each._replace(writer="the new schema", reader=name) for each in found]
    return problems


def _kind(node: Any) -> str:
    while isinstance(node, dict):
        node = node["type"]
    return "union" if isinstance(node, list) else "record" if node == "error" else str(node)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _word(node: Any) -> str:
    return f"{_kind(node)} {_short(node['name'])}" if isinstance(node, dict) and "name" in node else _kind(node)


class _Resolution:
    """Compares two parsed schemas, part by part."""

    def __init__(self, writer: Mapping[str, Any], reader: Mapping[str, Any]) -> None:
        self.writer, self.reader = writer, reader
        self.open: set[tuple[str, str]] = set()  # a record may contain itself

    def compare(self, writer: Any, reader: Any, at: str) -> list[Problem]:
        writer = self.writer.get(writer, writer) if isinstance(writer, str) else writer
        reader = self.reader.get(reader, reader) if isinstance(reader, str) else reader
        if isinstance(writer, list):
            return [problem for branch in writer for problem in self.compare(branch, reader, at)]
        if isinstance(reader, list):
            tried = {index: self.compare(writer, branch, at) for index, branch in enumerate(reader)}
            alike = [tried[index] for index, branch in enumerate(reader) if self._alike(writer, branch)]
            if [] in tried.values():
                return []
            words = ", ".join(_word(branch) for branch in reader)
            return alike[0] if alike else [Problem(at or "the whole", f"{_word(writer)} is none of {words}")]
        kind, wanted = _kind(writer), _kind(reader)
        if kind != wanted or (isinstance(writer, dict) and "name" in writer and not self._alike(writer, reader)):
            fine = wanted in PROMOTIONS.get(kind, ())
            why = f"{_word(writer)} cannot be read as {_word(reader)}"
            return [] if fine else [Problem(at or "the whole", why)]
        if kind in ("array", "map"):
            part, mark = ("items", "[]") if kind == "array" else ("values", "{}")
            return self.compare(writer[part], reader[part], at + mark)
        if kind == "fixed" and writer["size"] != reader["size"]:
            return [Problem(at or _short(reader["name"]), f"{writer['size']} bytes cannot be read as {reader['size']}")]
        if kind == "enum" and "default" not in reader:
            unknown = [symbol for symbol in writer["symbols"] if symbol not in reader["symbols"]]
            why = f"the reader does not know {', '.join(unknown)}, and has no default"
            return [Problem(at or _short(reader["name"]), why)] if unknown else []
        return self._fields(writer, reader, at or _short(reader["name"])) if kind == "record" else []

    def _alike(self, writer: Any, reader: Any) -> bool:
        """Of one kind; and if that has names, of one name, or by the reader's alias."""
        reader = self.reader.get(reader, reader) if isinstance(reader, str) else reader
        if _kind(writer) != _kind(reader) or not (isinstance(writer, dict) and "name" in writer):
            return _kind(writer) == _kind(reader)
        name, aliases = writer["name"], reader.get("aliases", [])
        return _short(name) == _short(reader["name"]) or name in aliases or _short(name) in aliases

    def _fields(self, writer: Any, reader: Any, at: str) -> list[Problem]:
        pair = (writer["name"], reader["name"])
        if pair in self.open:
            return []
        self.open.add(pair)
        names = {each["name"]: each["name"] for each in reader["fields"]}
        aliases = {alias: each["name"] for each in reader["fields"] for alias in each.get("aliases", ())}
        sources: dict[str, list[Any]] = {name: [] for name in names}
        for each in writer["fields"]:
            if target := names.get(each["name"]) or aliases.get(each["name"]):
                sources[target].append(each)
        problems = list[Problem]()
        for each in reader["fields"]:
            found, place = sources[each["name"]], f"{at}.{each['name']}"
            if len(found) > 1:
                words = " and ".join(source["name"] for source in found)
                problems.append(Problem(place, f"the writer's fields {words} would both be read as this one"))
            elif found:
                problems += self.compare(found[0]["type"], each["type"], place)
            elif "default" not in each:
                problems.append(Problem(place, "the writer has no such field, and the reader no default for it"))
        self.open.remove(pair)
        return problems
