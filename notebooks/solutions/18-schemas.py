"""The exercises of notebook 18: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
from collections import Counter
from pprint import pformat
from typing import Any

import fastavro

from mqlib.checks import Task, Wrong
from mqlib.patterns.compatibility import Schema, SchemaError, breaks, schema, unreadable
from mqlib.patterns.schemas import decode_body, encode_body, frame


def _record(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": "Order", "fields": list(fields)}


def _of(name: str, type: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type, **more}


def _state(*symbols: str) -> dict[str, Any]:
    return _of("state", {"type": "enum", "name": "State", "symbols": list(symbols)})


ID = _of("id", "long")
CHANGES = {
    1: (_record(ID), _record(ID, _of("note", "string", default=""))),
    2: (_record(ID), _record(ID, _of("iban", "string"))),
    3: (_record(ID, _of("iban", "string")), _record(ID)),
    4: (_record(_of("weight", "float")), _record(_of("weight", "double"))),
    5: (_record(_of("token", "string")), _record(_of("token", "bytes"))),
    6: (_record(_of("amount", "long")), _record(_of("amount", "string"))),
    7: (_record(_of("note", "string")), _record(_of("note", ["null", "string"], default=None))),
    8: (_record(_state("new", "paid", "lost")), _record(_state("new", "paid"))),
    9: (
        _record(_of("tier", "string", default="free")),
        _record(_of("level", "string", default="free", aliases=["tier"])),
    ),
    10: (_record(_of("tier", "string", default="free")), _record(_of("tier", "string", default="none"))),
}
KINDS = {(True, True): "FULL", (True, False): "BACKWARD", (False, True): "FORWARD", (False, False): "NONE"}
ORDER = _record(ID, _of("customer", "string"), _of("amount", "long"))


def judge_1(answer: Any) -> None:
    if not isinstance(answer, dict) or {*answer} != {*CHANGES}:
        raise Wrong(f"give a dict with a word for each of 1 to 10; this is {answer!r:.200}")
    for number, pair in CHANGES.items():
        old, new = map(schema, pair)
        problems = [each._replace(writer="old data", reader="the new schema") for each in unreadable(old, new)]
        back = not problems
        problems += [each._replace(writer="new data", reader="the old schema") for each in unreadable(new, old)]
        right = KINDS[back, not unreadable(new, old)]
        if answer[number] != right:
            why = "; ".join(map(str, problems)) or "each of the two schemas reads the other one's data"
            raise Wrong(f"change {number} is not {answer[number]!r}: {why}")


def _read(writer: Schema, value: dict[str, Any], reader: Schema) -> dict[str, Any]:
    result: dict[str, Any] = decode_body(writer, encode_body(writer, value), reader)
    return result


def judge_2(answer: Any) -> None:
    if not isinstance(answer, (list, tuple)) or len(answer) != 2:
        raise Wrong(f"give a list of two schemas; this is {answer!r:.200}")
    try:
        old, first, second = schema(ORDER), schema(answer[0]), schema(answer[1])
    except SchemaError as error:
        raise Wrong(str(error)) from None
    names = [[each["name"] for each in one.parsed["fields"]] for one in (first, second)]
    if "total" not in names[1] or "amount" in names[1] or "currency" not in names[1]:
        raise Wrong(f"the second schema has the fields {', '.join(names[1])}")
    if problems := breaks("FULL", first, [old]):
        raise Wrong(f"the first step is not FULL: {problems[0]}")
    if problems := breaks("BACKWARD_TRANSITIVE", second, [old, first]):
        raise Wrong(f"the second step breaks: {problems[0]}")
    for number in (1, 2):
        value = {"id": number, "customer": "ann", "amount": 100 * number}
        later = value | {"total": 100 * number, "currency": "EUR"}
        later = {name: later[name] for name in names[0] if name in later}
        for writer, given in ((old, value), (first, later)):
            found = _read(writer, given, second)
            if found["total"] != 100 * number:
                raise Wrong(f"an order over {100 * number} is read with a total of {found['total']!r}")
            if found["currency"] != "EUR":
                raise Wrong(f"the currency was always EUR, and is read as {found['currency']!r}")


CURRENCY = _of("currency", "string", default="EUR")
TOTAL = _of("total", "long", aliases=["amount"])
REST = ORDER["fields"][:2]
STEPS = [_record(*ORDER["fields"], CURRENCY), _record(*REST, TOTAL, CURRENCY)]
ZERO = _of("total", "long", default=0)
NO_DEFAULT = _of("currency", "string")


async def judge_3(decode: Any) -> None:
    if not inspect.iscoroutinefunction(decode):
        raise Wrong(f"write `async def decode(data, known, load)`; this is {decode!r:.200}")
    registered = {id: schema(_record(ID, *extra)).parsed for id, extra in ((7, []), (300, [CURRENCY]))}
    loads: Counter[int] = Counter()
    fails = {7: 1}

    async def load(id: int) -> Any:
        loads[id] += 1
        await asyncio.sleep(0.02)
        if fails.get(id, 0):
            fails[id] -= 1
            raise ConnectionError("the registry does not answer")
        if id not in registered:
            raise Wrong(f"`load` was asked for {id}, and the ids here are 7 and 300; they are big-endian")
        return registered[id]

    known: dict[Any, Any] = {}
    values = {7: {"id": 1}, 300: {"id": 2, "currency": "CHF"}}
    framed = {id: frame(id, encode_body(schema(_record(ID, *([CURRENCY] if id == 300 else []))), value))
              for id, value in values.items()}  # fmt: skip
    try:
        await decode(framed[7], known, load)
    except ConnectionError:
        pass
    else:
        raise Wrong("the registry did not answer, and `decode` returned something")
    tried = loads[7]
    for id, value in values.items():
        try:
            found = await asyncio.gather(*(decode(framed[id], known, load) for _ in range(10)))
        except ConnectionError:
            raise Wrong("a load failed once, and is never tried again: the failure is remembered") from None
        if found != [value] * 10:
            raise Wrong(f"schema {id}: {value} was read as {found[0]!r:.200}")
        if await decode(framed[id], known, load) != value:
            raise Wrong(f"schema {id}: {value} was read as something else the second time")
    if tried != 1 or loads != {7: 2, 300: 1}:
        raise Wrong(f"each schema is loaded once, after one failure of 7; these are the loads by id: {dict(loads)}")
    for name, data in {
        "JSON": json.dumps(values[7]).encode(), "four bytes": framed[7][:4], "no bytes": b"",
        "a byte too many": framed[300] + b"x", "another magic byte": b"\1" + framed[7][1:],
    }.items():  # fmt: skip
        try:
            found = await decode(data, known, load)
        except ValueError:
            continue
        except Exception as error:
            raise Wrong(f"{name} should be a ValueError, and was a {type(error).__name__}") from None
        raise Wrong(f"{name} should be a ValueError, and was read as {found!r:.200}")


async def decode(data, known, load):
    import io

    import fastavro

    if len(data) < 5 or data[0] != 0:
        raise ValueError("not in the wire format")
    id = int.from_bytes(data[1:5], "big")
    if id not in known:
        known[id] = asyncio.ensure_future(load(id))
    loading = known[id]
    try:
        schema = await asyncio.shield(loading)
    except Exception:
        if known.get(id) is loading:
            del known[id]
        raise
    stream = io.BytesIO(data[5:])
    value = fastavro.schemaless_reader(stream, schema, None)
    if stream.read():
        raise ValueError("bytes are left over")
    return value


async def remembers_nothing(data: Any, known: Any, load: Any) -> Any:
    return await decode(data, {}, load)


async def remembers_too_late(data: Any, known: Any, load: Any) -> Any:
    if len(data) < 5 or data[0] != 0:
        raise ValueError("not in the wire format")
    id = int.from_bytes(data[1:5], "big")
    if id not in known:
        known[id] = await load(id)
    return fastavro.schemaless_reader(io.BytesIO(data[5:]), known[id], None)


async def remembers_failures(data: Any, known: Any, load: Any) -> Any:
    id = int.from_bytes(data[1:5], "big")
    if id not in known:
        known[id] = asyncio.ensure_future(load(id))
    return fastavro.schemaless_reader(io.BytesIO(data[5:]), await known[id], None)


async def little_endian(data: Any, known: Any, load: Any) -> Any:
    return await decode(data[:1] + data[4:0:-1] + data[5:], known, load)


async def leaves_bytes_over(data: Any, known: Any, load: Any) -> Any:
    if len(data) < 5 or data[0] != 0:
        raise ValueError("not in the wire format")
    try:
        return await decode(data, known, load)
    except ValueError:
        return None


RIGHT = {1: "FULL", 2: "FORWARD", 3: "BACKWARD", 4: "BACKWARD", 5: "FULL", 6: "NONE", 7: "BACKWARD", 8: "FORWARD",
         9: "FULL", 10: "FULL"}  # fmt: skip


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "18.1": Task(
        question="Ten changes",
        start=_start("answer", "18.1"),
        hints=[
            "BACKWARD: does the new schema read everything that the old one wrote? FORWARD: the other way round.",
            "A union's data may be any of its branches, so a reader needs to know each of them.",
            "A reader with a default does without the field; a reader ignores a field that it does not have.",
        ],
        solution=None,
        code=f"answer = {RIGHT}",
        judge=judge_1,
        wrong=[
            dict.fromkeys(RIGHT, "FULL"),
            RIGHT | {7: "FULL"},
            RIGHT | {9: "BACKWARD"},
            RIGHT | {8: "BACKWARD"},
            {1: "FULL"},
            ["FULL"] * 10,
        ],
    ),
    "18.2": Task(
        question="A rename that harms nobody",
        start=_start("answer", "18.2"),
        hints=[
            "The first step only adds `currency`; with a default, since the old orders do not have it.",
            "In the second step `total` takes the place of `amount`: `aliases` says what it was called.",
            "A default for `total` would hide that it was not found.",
        ],
        solution=None,
        code=f"answer = {pformat(STEPS, width=100, sort_dicts=False)}",
        judge=judge_2,
        wrong=[
            [_record(*ORDER["fields"], CURRENCY), _record(*REST, ZERO, CURRENCY)],
            [_record(*ORDER["fields"], CURRENCY, ZERO), _record(*REST, ZERO, CURRENCY)],
            [_record(*ORDER["fields"], NO_DEFAULT), _record(*REST, TOTAL, CURRENCY)],
            [_record(*ORDER["fields"], CURRENCY), _record(*REST, TOTAL, NO_DEFAULT)],
            [_record(*REST, TOTAL, CURRENCY), _record(*REST, TOTAL, CURRENCY)],
            [STEPS[0], STEPS[0]],
            [STEPS[0], {"type": "record"}],
            STEPS[1],
        ],
    ),
    "18.3": Task(
        question="A decoder that remembers",
        start=_start("decode", "18.3"),
        hints=[
            "`int.from_bytes(data[1:5], 'big')` is the id; the body begins at 5.",
            "Remember the *loading*: `known[id] = asyncio.ensure_future(load(id))`, and let all await that.",
            "If it fails, take it out of `known` before you raise. `stream.read()` is what is left over.",
        ],
        solution=decode,
        judge=judge_3,
        wrong=[remembers_nothing, remembers_too_late, remembers_failures, little_endian, leaves_bytes_over, 3],
    ),
}
