"""The exercises of notebook 13: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import inspect
import math
import sqlite3
from contextlib import closing, suppress
from typing import Any

from mqlib.checks import Task, Wrong

DELIVERIES = (b"1", b"2", b"2", b"3", b"1", b"3")
TABLES = """
CREATE TABLE inbox (message_id BLOB PRIMARY KEY);
CREATE TABLE effects (message_id BLOB);
CREATE TABLE outbox (id INTEGER PRIMARY KEY, value BLOB);
"""


def judge_1(handle: Any) -> None:
    if not callable(handle):
        raise Wrong(f"write a function `handle(db, id, effect)`; this is {handle!r}")
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(TABLES)
        failures = 0
        for place, id in enumerate(DELIVERIES):
            for attempt in range(3):  # a delivery that failed comes again

                def effect(
                    connection: sqlite3.Connection, id: bytes = id, fails: bool = place == 3 and not attempt
                ) -> None:
                    connection.execute("INSERT INTO effects VALUES (?)", (id,))
                    if fails:
                        raise ConnectionError("the effect failed once")

                try:
                    handle(db, id, effect)
                    break
                except ConnectionError:
                    failures += 1
                    if attempt == 2:
                        raise Wrong("the effect fails once, and `handle` failed three times") from None
            db.rollback()  # what is not committed now would be gone in a crash
        done = sorted(id for (id,) in db.execute("SELECT message_id FROM effects"))
    if failures != 1:
        raise Wrong(f"the effect raised once, and that came out of `handle` {failures} times")
    if done != [b"1", b"2", b"3"]:
        words = [f"{id.decode()} has {done.count(id)} effects" for id in (b"1", b"2", b"3") if done.count(id) != 1]
        raise Wrong("six deliveries of three ids, id 3 failed at first: " + ", ".join(words))


def handle(db, id, effect):
    with db:
        if db.execute("INSERT OR IGNORE INTO inbox VALUES (?)", (id,)).rowcount:
            effect(db)


def id_first(db: Any, id: Any, effect: Any) -> None:
    with db:
        new = db.execute("INSERT OR IGNORE INTO inbox VALUES (?)", (id,)).rowcount
    if new:
        with db:
            effect(db)


def effect_always(db: Any, id: Any, effect: Any) -> None:
    with db:
        effect(db)
        db.execute("INSERT OR IGNORE INTO inbox VALUES (?)", (id,))


def never_commits(db: Any, id: Any, effect: Any) -> None:
    if db.execute("INSERT OR IGNORE INTO inbox VALUES (?)", (id,)).rowcount:
        effect(db)


def swallows(db: Any, id: Any, effect: Any) -> None:
    with suppress(ConnectionError):
        handle(db, id, effect)


class _Outbox:
    """An outbox of `count` rows, a Kafka that fails at one of them, and a lower id that commits late."""

    def __init__(self, count: int, fails_at: int | None = None, late: bool = False) -> None:
        self.db = sqlite3.connect(":memory:")
        self.db.executescript(TABLES)
        self.sent: list[int] = []
        self.largest = 0
        self.fails_at, self.late = fails_at, late
        first = 10 if late else 1
        with self.db:
            self.db.executemany(
                "INSERT INTO outbox VALUES (?, ?)", [(n, b"%d" % n) for n in range(first, first + count)]
            )

    async def send(self, id: int, value: bytes) -> None:
        if value != b"%d" % id:
            raise Wrong(f"the event with id {id} was sent with the value {value!r}")
        if len(self.sent) > 5000:
            raise Wrong("it has sent 5000 events by now, and there are 250: it does not end")
        if id == self.fails_at:
            raise ConnectionError("Kafka does not answer")
        self.sent.append(id)
        if self.late and id == 150:
            with self.db:
                self.db.execute("INSERT INTO outbox VALUES (5, ?)", (b"5",))

    def left(self) -> list[int]:
        self.db.rollback()
        return [id for (id,) in self.db.execute("SELECT id FROM outbox ORDER BY id")]


async def judge_2(relay: Any) -> None:
    if not inspect.iscoroutinefunction(relay):
        raise Wrong(f"write `async def relay(db, send)`; this is {relay!r}")
    box = _Outbox(250)
    await relay(box.db, box.send)
    if box.sent != list(range(1, 251)):
        raise Wrong(f"250 events wait, and it sent {len(box.sent)}, of which the first are {box.sent[:5]}")
    if left := box.left():
        raise Wrong(f"everything is acknowledged, and {len(left)} rows are still there")
    box = _Outbox(250, fails_at=120)
    try:
        await relay(box.db, box.send)
    except ConnectionError:
        pass
    else:
        raise Wrong("`send` raised at id 120, and `relay` ended as if all were well")
    left = box.left()
    if lost := [id for id in range(120, 251) if id not in left]:
        raise Wrong(f"`send` raised at id 120, and {len(lost)} events that were not acknowledged are deleted")
    if len(left) > 131 + 99:
        raise Wrong(f"119 events were acknowledged when `send` raised, and {250 - len(left)} of their rows are deleted")
    box = _Outbox(250, late=True)
    await relay(box.db, box.send)
    if 5 not in box.sent:
        raise Wrong("id 5 became visible while id 150 was being sent, and was never sent: a gap")


async def relay(db, send):
    while rows := db.execute("SELECT id, value FROM outbox ORDER BY id LIMIT 100").fetchall():
        for id, value in rows:
            await send(id, value)
            with db:
                db.execute("DELETE FROM outbox WHERE id = ?", (id,))


async def deletes_first(db: Any, send: Any) -> None:
    while rows := db.execute("SELECT id, value FROM outbox ORDER BY id LIMIT 100").fetchall():
        with db:
            db.execute("DELETE FROM outbox WHERE id <= ?", (rows[-1][0],))
        for id, value in rows:
            await send(id, value)


async def remembers_the_last_id(db: Any, send: Any) -> None:
    last = 0
    while rows := db.execute("SELECT id, value FROM outbox WHERE id > ? ORDER BY id LIMIT 100", (last,)).fetchall():
        for id, value in rows:
            await send(id, value)
            with db:
                db.execute("DELETE FROM outbox WHERE id = ?", (id,))
            last = id


async def deletes_nothing(db: Any, send: Any) -> None:
    for id, value in db.execute("SELECT id, value FROM outbox ORDER BY id").fetchall():
        await send(id, value)


async def one_batch(db: Any, send: Any) -> None:
    for id, value in db.execute("SELECT id, value FROM outbox ORDER BY id LIMIT 100").fetchall():
        await send(id, value)
        with db:
            db.execute("DELETE FROM outbox WHERE id = ?", (id,))


def judge_3(false_drops: Any) -> None:
    if not callable(false_drops):
        raise Wrong(f"write a function `false_drops(ids, bits, hashes)`; this is {false_drops!r}")
    ids = [b"exercise-%d" % number for number in range(2000)]
    for bits, hashes in ((40_000, 5), (8_000, 3), (4_000, 5)):
        given = false_drops(ids, bits, hashes)
        if not isinstance(given, int):
            raise Wrong(f"it should return a number, and returned {given!r}")
        right = sum((1 - math.exp(-hashes * known / bits)) ** hashes for known in range(len(ids)))
        if abs(given - right) > 5 + 0.2 * right:
            words = (
                "a filter drops some: is it a set?" if given == 0 else "are its hashes independent, and all checked?"
            )
            raise Wrong(
                f"2000 ids, {bits} bits, {hashes} hashes: about {right:.0f} are expected, {given} found; {words}"
            )


def false_drops(ids, bits, hashes):
    import hashlib

    field, drops = bytearray(bits), 0
    for id in ids:
        digest = hashlib.blake2b(id, digest_size=4 * hashes).digest()
        places = [int.from_bytes(digest[at : at + 4], "big") % bits for at in range(0, 4 * hashes, 4)]
        drops += all(field[place] for place in places)
        for place in places:
            field[place] = 1
    return drops


def a_set(ids: Any, bits: int, hashes: int) -> int:
    return len(ids) - len(set(ids))


def one_hash(ids: Any, bits: int, hashes: int) -> int:
    return int(false_drops(ids, bits, 1))


def any_bit(ids: Any, bits: int, hashes: int) -> int:
    field, drops = set[int](), 0
    for id in ids:
        places = {hash((id, number)) % bits for number in range(hashes)}
        drops += bool(places & field)
        field |= places
    return drops


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "13.1": Task(
        question="The right order",
        start=_start("handle", "13.1"),
        hints=[
            "`with db:` is a transaction: it commits at the end of the block, and rolls back when the block raises.",
            "`db.execute('INSERT OR IGNORE INTO inbox VALUES (?)', (id,)).rowcount` is 1 for a new id, 0 for a copy.",
            "The id and the effect belong into the same block.",
        ],
        solution=handle,
        judge=judge_1,
        wrong=[id_first, effect_always, never_commits, swallows, 3],
    ),
    "13.2": Task(
        question="A relay",
        start=_start("relay", "13.2"),
        hints=[
            "Ask for the first 100 rows, again and again, until there is none.",
            "Delete a row after `send` has returned, in a transaction: `with db:`.",
            "Do not remember the last id: what is left in the table is what has to be sent.",
        ],
        solution=relay,
        judge=judge_2,
        wrong=[deletes_first, remembers_the_last_id, deletes_nothing, one_batch, "nothing"],
    ),
    "13.3": Task(
        question="An inbox in a Bloom filter",
        start=_start("false_drops", "13.3"),
        hints=[
            "Each id sets `hashes` places in a field of `bits`. It is taken for known if all of them were set before.",
            "`hashlib.blake2b(id, digest_size=4 * hashes)` gives four bytes for each place; take them modulo `bits`.",
            "For a million ids and one in a thousand: 14.4 bits an id and 10 hashes, hence 1.8 MB.",
        ],
        solution=false_drops,
        judge=judge_3,
        wrong=[a_set, one_hash, any_bit, "nothing"],
    ),
}
