"""The exercises of notebook 17: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.chunking import Assembled, Assembler, split


async def _lose_one_chunk() -> tuple[list[str], int, int]:
    """Sends the six parts, reads them, and says what came out and what may be committed."""
    kafka, now = mq.kafka(), [0.0]
    a, b, c = (split(id.encode() * count, size=1, id=id) for id, count in (("a", 3), ("b", 2), ("c", 2)))
    topic = await mq.topic(kafka, "exercise")
    async with mq.producer(kafka) as producer:
        for part in (a[0], b[0], a[1], c[0], b[1], c[1]):
            await producer.send_and_wait(topic, part.body, headers=part.headers)
    assembler, wholes = Assembler(patience=60, clock=lambda: now[0]), list[Assembled]()
    for record in await mq.read(kafka, topic):
        wholes += assembler.add(record)
    for whole in wholes:
        assembler.done(whole)
    [waiting] = assembler.committable().values()
    now[0] = 60.0
    for report in assembler.expired():
        assembler.done(report)
    [reported] = assembler.committable().values()
    return [whole.id for whole in wholes], waiting, reported


async def judge_1(answer: Any) -> None:
    try:
        wholes, waiting, reported = answer
        given = [str(id) for id in wholes], int(waiting), int(reported)
    except (TypeError, ValueError):
        raise Wrong(f'answer as in (["a", "b"], 1, 2); this is {answer!r}') from None
    right = await _lose_one_chunk()
    if given[0] != right[0]:
        raise Wrong(f"{given[0]} do not come out whole, in this order: which lacks a part, and which is whole first?")
    if given[1] != right[1]:
        lost = [offset for offset in (0, 2) if offset < given[1]]
        word = f"then nobody reads offset {lost[0]} again" if lost else "less than that is too little, more too much"
        raise Wrong(f"{given[1]} is not what may be committed while a waits: {word}")
    if given[2] != right[2]:
        raise Wrong(f"when a is reported, nothing waits any more; {given[2]} is not the next offset to read")


def _mixed(seed: int) -> tuple[list[tuple[str, int, int, str, bytes]], dict[str, bytes]]:
    """Parts of eight messages: one lacks a part, one is altered; shuffled, with copies; and what must come out."""
    chance = random.Random(seed)
    data = {f"m{n}": chance.randbytes(chance.randrange(1, 90)) for n in range(8)}
    parts = []
    for id, whole in data.items():
        bodies = [whole[at : at + 10] for at in range(0, len(whole), 10)]
        digest = hashlib.sha256(whole).hexdigest()
        own = [(id, index, len(bodies), digest, body) for index, body in enumerate(bodies)]
        if id == "m3":
            own.pop(chance.randrange(len(own)))
        if id == "m4":
            own[0] = (*own[0][:4], bytes([own[0][4][0] ^ 1]) + own[0][4][1:])
        parts += own
    copies = chance.sample(parts, len(parts) // 3)
    parts += copies
    chance.shuffle(parts)
    parts += copies  # these come when their message is whole
    return parts, {id: whole for id, whole in data.items() if id not in ("m3", "m4")}


def judge_2(assemble: Any) -> None:
    if not callable(assemble):
        raise Wrong(f"write a function `assemble(parts)`; this is {assemble!r}")
    for seed in range(10):
        parts, right = _mixed(seed)
        fed = list[tuple[str, int]]()

        def feed(parts: Any = parts, fed: Any = fed) -> Iterator[Any]:
            for part in parts:
                fed.append(part[:2])
                yield part

        found: dict[str, bytes] = {}
        for id, whole in assemble(feed()) or ():
            if id in found:
                raise Wrong(f"message {id} came out twice; parts of it came again when it was whole")
            if id == "m3":
                raise Wrong("a message came out although one of its parts was lost")
            if id == "m4":
                raise Wrong("a message came out whose data does not have the hash")
            if whole != right[id]:
                raise Wrong(f"message {id} came out with other data; parts come in any order")
            total = next(part[2] for part in parts if part[0] == id)
            if {(id, n) for n in range(total)} == set(fed[:-1]) & {(id, n) for n in range(total)}:
                raise Wrong(f"message {id} came out late: it was whole before part {len(fed)} of {len(parts)} was read")
            found[id] = whole
        if found != right:
            raise Wrong(f"the messages {sorted(right.keys() - found.keys())} did not come out, and were whole")


def assemble(parts):
    import hashlib

    groups, seen = {}, set()
    for id, index, total, sha256, body in parts:
        if id in seen:
            continue
        group = groups.setdefault(id, {})
        group[index] = body
        if len(group) == total:
            del groups[id]
            seen.add(id)
            data = b"".join(group[n] for n in range(total))
            if hashlib.sha256(data).hexdigest() == sha256:
                yield id, data


def _assemble(parts: Any, copies: bool = True, order: bool = True, check: bool = True, late: bool = False) -> Any:
    groups: dict[str, Any] = {}
    seen, ready = set[str](), []
    for id, index, total, sha256, body in parts:
        if copies and id in seen:
            continue
        group = groups.setdefault(id, {})
        group[index] = body
        if len(group) == total:
            del groups[id]
            seen.add(id)
            data = b"".join(group[n] for n in (range(total) if order else group))
            if not check or not order or hashlib.sha256(data).hexdigest() == sha256:
                ready.append((id, data))
                if not late:
                    yield ready.pop()
    yield from ready


def counts_copies(parts: Any) -> Any:
    groups: dict[str, Any] = {}
    for id, index, total, _, body in parts:
        group = groups.setdefault(id, [])
        group.append((index, body))
        if len(group) == total:
            yield id, b"".join(part for _, part in sorted(group))


def in_order_of_arrival(parts: Any) -> Any:
    return _assemble(parts, order=False)


def never_looks_at_the_hash(parts: Any) -> Any:
    return _assemble(parts, check=False)


def at_the_end(parts: Any) -> Any:
    return _assemble(parts, late=True)


def gives_what_it_has(parts: Any) -> Any:
    groups: dict[str, Any] = {}
    for id, index, _, _, body in parts:
        groups.setdefault(id, {})[index] = body
    for id, group in groups.items():
        yield id, b"".join(group[index] for index in sorted(group))


def forgets_whole_ones(parts: Any) -> Any:
    return _assemble(parts, copies=False)


A7, UMLAUT = {"id": "A7", "quantity": 2}, {"id": "Ä7", "quantity": 2}
JSON = b'{"id": "A7", "quantity": 2}'
GOOD: list[tuple[str | None, bytes, dict[str, Any]]] = [
    ("application/json", JSON, A7),
    ("text/csv", b"A7,2", A7),
    ("Application/JSON; Charset=UTF-8", JSON, A7),
    ("text/csv", "Ä7,2".encode(), UMLAUT),
    ("TEXT/CSV;charset=latin-1", "Ä7,2".encode("latin-1"), UMLAUT),
    ("application/json; charset=latin-1", '{"id": "Ä7", "quantity": 2}'.encode("latin-1"), UMLAUT),
]
BAD: list[tuple[str | None, bytes, str]] = [
    (None, JSON, "no content type"),
    ("", b"A7,2", "an empty content type"),
    ("application/xml", JSON, "an unknown content type"),
    ("application/json", b"A7,2", "CSV that is called JSON"),
    ("text/csv", JSON, "JSON that is called CSV"),
    ("application/json", JSON[:-1], "JSON that is cut off"),
    ("application/json", b'{"id": "A7"}', "half an order"),
    ("application/json", b'{"id": "A7", "quantity": 2, "item": "tea"}', "an order with something added"),
    ("application/json", b'[{"id": "A7", "quantity": 2}]', "a list"),
    ("application/json", b'{"id": "A7", "quantity": "2"}', "a quantity that is a text in JSON"),
    ("application/json", b'{"id": "A7", "quantity": 2.5}', "a quantity of 2.5"),
    ("application/json", b'{"id": 7, "quantity": 2}', "an id that is a number in JSON"),
    ("text/csv", b"A7", "a CSV with one field"),
    ("text/csv", b"A7,2,tea", "a CSV with three fields"),
    ("text/csv", b"A7,2\nA8,3", "two orders"),
    ("text/csv", b"A7,two", "a quantity in words"),
    ("text/csv", "Ä7,2".encode("latin-1"), "bytes that are not UTF-8, without a charset"),
    ("text/csv; charset=klingon", b"A7,2", "an unknown charset"),
]


def judge_3(normalize: Any) -> None:
    if not callable(normalize):
        raise Wrong(f"write a function `normalize(content_type, body)`; this is {normalize!r}")
    for content_type, body, right in GOOD:
        try:
            given = normalize(content_type, body)
        except ValueError as error:
            raise Wrong(f"{content_type!r} with {body!r} is an order, and raised ValueError: {error}") from None
        if given != right:
            raise Wrong(f"{content_type!r} with {body!r} gave {given!r} instead of {right!r}")
    for content_type, body, what in BAD:
        try:
            given = normalize(content_type, body)
        except ValueError:
            continue
        except Exception as error:
            raise Wrong(f"{what}: it raised {type(error).__name__}, and not ValueError") from None
        raise Wrong(f"{what}: {content_type!r} with {body!r} must raise ValueError, and gave {given!r}")


def normalize(content_type, body):
    import csv
    import json

    kind, _, parameter = (content_type or "").lower().partition(";")
    charset = parameter.strip().removeprefix("charset=") or "utf-8"
    try:
        text = body.decode(charset)
    except LookupError:
        raise ValueError(f"unknown charset {charset!r}") from None
    if kind.strip() == "application/json":
        order = json.loads(text)
        if not isinstance(order, dict) or order.keys() != {"id", "quantity"}:
            raise ValueError(f"an order has id and quantity; this is {text[:100]!r}")
        id, quantity = order["id"], order["quantity"]
    elif kind.strip() == "text/csv":
        [(id, number)] = csv.reader(text.splitlines())  # one line of two fields, else ValueError
        quantity = int(number)
    else:
        raise ValueError(f"unknown content type {content_type!r}")
    if type(id) is not str or type(quantity) is not int:
        raise ValueError(f"id is a text and quantity a whole number; this is {text[:100]!r}")
    return {"id": id, "quantity": quantity}


def guesses(content_type: Any, body: bytes) -> Any:
    for kind in ("application/json", "text/csv"):
        try:
            return normalize(kind, body)
        except ValueError:
            continue
    raise ValueError("neither")


def is_case_sensitive(content_type: Any, body: bytes) -> Any:
    if content_type not in ("application/json", "text/csv"):
        raise ValueError(f"unknown content type {content_type!r}")
    return normalize(content_type, body)


def knows_one_charset(content_type: Any, body: bytes) -> Any:
    return normalize((content_type or "").partition(";")[0], body)


def lets_an_error_out(content_type: Any, body: bytes) -> Any:
    if "klingon" in (content_type or ""):
        return body.decode("klingon")
    return normalize(content_type, body)


def takes_more(content_type: Any, body: bytes) -> Any:
    return A7 if b"item" in body else normalize(content_type, body)


def returns_nothing(content_type: Any, body: bytes) -> Any:
    try:
        return normalize(content_type, body)
    except ValueError:
        return None


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "17.1": Task(
        question="Lose one chunk",
        start=_start("answer", "17.1"),
        hints=[
            "A message comes out with its last part: b at offset 4, c at offset 5.",
            "While a waits, its parts at the offsets 0 and 2 are only in memory.",
            "What is committed is the next offset that will be read.",
        ],
        solution=None,
        code='answer = (["b", "c"], 0, 6)',
        judge=judge_1,
        wrong=[(["a", "b", "c"], 0, 6), (["b", "c"], 6, 6), (["b", "c"], 1, 6), (["b", "c"], 0, 5), (["c", "b"], 0, 6),
               "nothing"],
    ),
    "17.2": Task(
        question="Put it together",
        start=_start("assemble", "17.2"),
        hints=[
            "A dict for each id, from index to body: a copy then changes nothing.",
            "Join in the order of the index, from 0 to total - 1, not in that of arrival.",
            "Remember the ids that are whole, or their copies begin a new group.",
        ],
        solution=assemble,
        judge=judge_2,
        wrong=[counts_copies, in_order_of_arrival, never_looks_at_the_hash, at_the_end, gives_what_it_has,
               forgets_whole_ones, list, "nothing"],
    ),
    "17.3": Task(
        question="Normalize what the world sends",
        start=_start("normalize", "17.3"),
        hints=[
            'Cut the content type at ";", and put both halves into small letters.',
            "An unknown charset raises LookupError in `decode`; a cut JSON and a wrong byte raise kinds of ValueError.",
            "`[(id, number)] = csv.reader(text.splitlines())` raises ValueError unless it is one line of two fields.",
        ],
        solution=normalize,
        judge=judge_3,
        wrong=[guesses, is_case_sensitive, knows_one_charset, lets_an_error_out, takes_more, returns_nothing, 3],
    ),
}  # fmt: skip
