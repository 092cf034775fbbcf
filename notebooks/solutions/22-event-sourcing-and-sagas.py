"""The exercises of notebook 22: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

from mqlib.checks import Task, Wrong

LOGS = [
    (100, [100], 10, 1),
    (100, [7, 55, 99], 1, 1),
    (60, [10, 20, 30, 40, 50, 60], 5, 2),
    (40, [3], 1000, 1),
    (50, [49, 50], 0, 3),
    (30, [], 2, 1),
]


def cost(n: int, events: int, starts: list[int], snapshot_cost: float, replay_cost: float) -> float:
    return events // n * snapshot_cost + sum(start % n for start in starts) * replay_cost


def judge_1(best: Any) -> None:
    if not callable(best):
        raise Wrong(f"write `def best(events, starts, snapshot_cost, replay_cost)`; this is {best!r:.200}")
    for events, starts, snapshot_cost, replay_cost in LOGS:
        given = best(events, list(starts), snapshot_cost, replay_cost)
        if not isinstance(given, int) or not 1 <= given <= events:
            raise Wrong(f"it should return a number from 1 to {events}, and returned {given!r}")
        costs = {n: cost(n, events, starts, snapshot_cost, replay_cost) for n in range(1, events + 1)}
        right = min(costs, key=lambda n: costs[n])
        if given != right:
            raise Wrong(
                f"{events} events, starts at {starts}, {snapshot_cost} a snapshot, {replay_cost} an event: "
                f"every {given} costs {costs[given]}, every {right} costs {costs[right]}"
            )


def best(events, starts, snapshot_cost, replay_cost):
    def cost(n):
        snapshots = events // n
        replayed = sum(start % n for start in starts)
        return snapshots * snapshot_cost + replayed * replay_cost

    return min(range(1, events + 1), key=cost)


def never(events: int, starts: list[int], snapshot_cost: float, replay_cost: float) -> int:
    return events


def only_replays(events: int, starts: list[int], snapshot_cost: float, replay_cost: float) -> int:
    return min(range(1, events + 1), key=lambda n: sum(start % n for start in starts))


def on_average(events: int, starts: list[int], snapshot_cost: float, replay_cost: float) -> int:
    def about(n: int) -> float:
        return events / n * snapshot_cost + len(starts) * n / 2 * replay_cost

    return min(range(1, events + 1), key=about)


def the_largest(events: int, starts: list[int], snapshot_cost: float, replay_cost: float) -> int:
    costs = {n: cost(n, events, starts, snapshot_cost, replay_cost) for n in range(1, events + 1)}
    return max(n for n in costs if costs[n] == min(costs.values()))


ORDER = [("reserve", True), ("charge", True), ("ship", True)]
DIARIES: list[tuple[str, list[tuple[str, bool]], list[tuple[str, str]], list[str]]] = [
    ("all is done", ORDER, [("reserve", "done"), ("charge", "done"), ("ship", "done")], []),
    ("ship is refused", ORDER, [("reserve", "done"), ("charge", "done"), ("ship", "refused")], ["charge", "reserve"]),
    ("the first step is refused", ORDER, [("reserve", "refused")], []),
    ("charge does not answer", ORDER, [("reserve", "done"), ("charge", "timeout")], ["charge", "reserve"]),
    ("charge answers after the timeout", ORDER, [("reserve", "done"), ("charge", "timeout"), ("charge", "done")],
     ["charge", "reserve"]),
    ("charge refuses after the timeout", ORDER, [("reserve", "done"), ("charge", "timeout"), ("charge", "refused")],
     ["charge", "reserve"]),
    ("an answer comes twice", ORDER, [("reserve", "done"), ("reserve", "done"), ("charge", "refused")], ["reserve"]),
    ("the timeout comes after the answer", ORDER,
     [("reserve", "done"), ("reserve", "timeout"), ("charge", "done"), ("ship", "done")], []),
    ("a step needs no undo", [("price", False), *ORDER],
     [("price", "done"), ("reserve", "done"), ("charge", "refused")], ["reserve"]),
    ("what needs no undo does not answer", [("reserve", True), ("price", False)],
     [("reserve", "done"), ("price", "timeout")], ["reserve"]),
    ("nothing is decided yet", ORDER, [("reserve", "done")], []),
]  # fmt: skip


def judge_2(to_undo: Any) -> None:
    if not callable(to_undo):
        raise Wrong(f"write `def to_undo(steps, diary)`; this is {to_undo!r:.200}")
    for words, steps, diary, right in DIARIES:
        given = to_undo(list(steps), list(diary))
        if given is None or isinstance(given, str) or list(given) != right:
            raise Wrong(f"{words}: heard {diary}; to undo are {right}, and you say {given!r:.200}")


def to_undo(steps, diary):
    done = []
    for name, what in diary:
        if name in done:
            continue  # a copy, or a timeout that is too late
        if what == "done":
            done.append(name)
            continue
        unknown = [name] if what == "timeout" else []
        undoable = {step for step, can_be_undone in steps if can_be_undone}
        return [step for step in reversed(done + unknown) if step in undoable]
    return []


def in_order(steps: Any, diary: Any) -> list[str]:
    return list(to_undo(steps, diary))[::-1]


def timeout_is_a_no(steps: Any, diary: Any) -> list[str]:
    return list(to_undo(steps, [(name, "refused" if what == "timeout" else what) for name, what in diary]))


def also_the_refused(steps: Any, diary: Any) -> list[str]:
    return list(to_undo(steps, [(name, "timeout" if what == "refused" else what) for name, what in diary]))


def every_copy(steps: Any, diary: Any) -> list[str]:
    if all(what == "done" for _, what in diary):
        return []
    undoable = dict(steps)
    return [name for name, what in reversed(diary) if what in ("done", "timeout") and undoable[name]]


def even_what_cannot_be(steps: Any, diary: Any) -> list[str]:
    return list(to_undo([(name, True) for name, _ in steps], diary))


def believes_the_late_answer(steps: Any, diary: Any) -> list[str]:
    known = dict(diary)
    return list(to_undo(steps, [(name, known[name]) for name in dict.fromkeys(name for name, _ in diary)]))


class Model:
    """A projector that moves at every question, and a read model that goes with it."""

    def __init__(self, *positions: dict[int, int]) -> None:
        self.positions, self.asked, self.read_at = positions, 0, list[dict[int, int]]()

    @property
    def now(self) -> dict[int, int]:
        return self.positions[min(max(self.asked - 1, 0), len(self.positions) - 1)]

    async def position(self) -> dict[int, int]:
        await asyncio.sleep(0)
        self.asked += 1
        return dict(self.now)

    def query(self) -> str:
        self.read_at.append(self.now)
        return f"state at {self.now}"


async def judge_3(read: Any) -> None:
    if not inspect.iscoroutinefunction(read):
        raise Wrong(f"write `async def read(token, position, query, within)`; this is {read!r:.200}")

    async def answer(token: Any, model: Model, within: float) -> Any:
        async with asyncio.timeout(10 + within):
            return await read(token, model.position, model.query, within)

    for words, token, model, wanted in (
        ("nothing was written", None, Model({}), {}),
        ("the model is there already", (0, 5), Model({0: 5}), {0: 5}),
        ("the model is further", (0, 5), Model({0: 9}), {0: 9}),
        ("the model comes to it", (0, 5), Model({}, {0: 4}, {0: 5}), {0: 5}),
        ("another partition is further", (1, 3), Model({0: 9}, {0: 9, 1: 2}, {0: 9, 1: 3}), {0: 9, 1: 3}),
    ):
        try:
            given = await answer(token, model, 20)
        except TimeoutError:
            raise Wrong(
                f"{words}: the token is {token}, the model passed through {model.positions}, and it gave up"
            ) from None
        if given != f"state at {wanted}":
            raise Wrong(f"{words}: the token is {token}; it returned {given!r}, and 'state at {wanted}' is right")
    late = Model({0: 4})
    try:
        given = await answer((0, 5), late, 0.1)
    except TimeoutError:
        if late.read_at:
            raise Wrong("the write is not there within 0.1 s: the model was read all the same") from None
    else:
        raise Wrong(f"the write is not there within 0.1 s: it should raise TimeoutError, and returned {given!r}")


async def read(token, position, query, within):
    async with asyncio.timeout(within):
        while token:
            if (await position()).get(token[0], 0) >= token[1]:
                break
            await asyncio.sleep(0.01)
    return query()


async def at_once(token: Any, position: Any, query: Any, within: float) -> Any:
    return query()


async def reads_first(token: Any, position: Any, query: Any, within: float) -> Any:
    found = query()
    await read(token, position, lambda: None, within)
    return found


async def any_partition(token: Any, position: Any, query: Any, within: float) -> Any:
    async with asyncio.timeout(within):
        while token:
            if max([0, *(await position()).values()]) >= token[1]:
                break
            await asyncio.sleep(0.01)
    return query()


async def waits_beyond(token: Any, position: Any, query: Any, within: float) -> Any:
    return await read(token and (token[0], token[1] + 1), position, query, min(within, 0.5))


async def gives_in(token: Any, position: Any, query: Any, within: float) -> Any:
    try:
        return await read(token, position, query, within)
    except TimeoutError:
        return query()


def _told(handle: Any, actions: tuple[str, ...], failures: int, words: str) -> None:
    """Tells a service all this, each as often as it fails; then looks at its books."""
    troubles, errors = failures, 0

    def effect(db: sqlite3.Connection, by: int) -> None:
        nonlocal troubles
        db.execute("UPDATE books SET amount = amount + ?", (by,))
        if troubles:
            troubles -= 1
            raise ConnectionError("the carrier does not answer")

    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript("CREATE TABLE steps (saga UNIQUE, state); CREATE TABLE books AS SELECT 0 AS amount")
        for action in actions:
            for _ in range(failures + 1):
                before = troubles
                try:
                    handle(db, "order 1", action, effect)
                except ConnectionError:
                    errors += 1
                    db.rollback()
                    continue
                if troubles < before:
                    raise Wrong(f"{words}: `effect` raised, and `handle` did not")
                break
        db.rollback()  # what is not committed is lost
        [(amount,)] = db.execute("SELECT amount FROM books")
    right = 0 if "undo" in actions else 1
    if amount != right:
        raise Wrong(f"{words}: the books should say {right}, and say {amount}")


def judge_4(handle: Any) -> None:
    if not callable(handle):
        raise Wrong(f"write `def handle(db, saga, action, effect)`; this is {handle!r:.200}")
    for length in range(1, 5):
        for actions in itertools.product(("do", "undo"), repeat=length):
            for failures in (0, 1):
                words = f"told {', '.join(actions)}" + (" (the first effect fails once)" if failures else "")
                _told(handle, actions, failures, words)


def handle(db, saga, action, effect):
    with db:
        row = db.execute("SELECT state FROM steps WHERE saga = ?", (saga,)).fetchone()
        state = row[0] if row else None
        if action == "do" and state is None:
            effect(db, 1)
            db.execute("INSERT INTO steps VALUES (?, 'done')", (saga,))
        elif action == "undo" and state != "undone":
            if state == "done":
                effect(db, -1)
            db.execute("INSERT OR REPLACE INTO steps VALUES (?, 'undone')", (saga,))


def forgets(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    with db:
        effect(db, 1 if action == "do" else -1)


def undo_needs_a_do(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    known = db.execute("SELECT 1 FROM steps WHERE saga = ?", (saga,)).fetchone()
    if action == "do" or known:
        handle(db, saga, action, effect)


def ids_alone(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    with db:
        if db.execute("INSERT OR IGNORE INTO steps VALUES (?, '')", (f"{saga} {action}",)).rowcount:
            effect(db, 1 if action == "do" else -1)


def state_first(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    wanted: list[int] = []
    handle(db, saga, action, lambda db, by: wanted.append(by))
    with db:
        for by in wanted:
            effect(db, by)


def swallows(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    with contextlib.suppress(ConnectionError):
        handle(db, saga, action, effect)


def never_commits(db: Any, saga: str, action: str, effect: Callable[[Any, int], None]) -> None:
    if action == "do" and not db.execute("SELECT 1 FROM steps").fetchone():
        effect(db, 1)
        db.execute("INSERT INTO steps VALUES (?, 'done')", (saga,))


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "22.1": Task(
        question="How often a snapshot?",
        start=_start("best", "22.1"),
        hints=[
            "With one every n there are `events // n` snapshots.",
            "A writer that starts at event s replays `s % n`.",
            "`min(range(1, events + 1), key=cost)` returns the smallest of those with the lowest cost.",
        ],
        solution=best,
        judge=judge_1,
        wrong=[never, only_replays, on_average, the_largest, 3],
    ),
    "22.2": Task(
        question="What has to be undone?",
        start=_start("to_undo", "22.2"),
        hints=[
            "Walk through the diary, and keep the steps that are done, in order. A step that is done stays done.",
            "Refused means that nothing happened. A timeout means that you do not know: undo that one as well.",
            "Stop at the first of these: whatever comes later is late. And leave out what cannot be undone.",
        ],
        solution=to_undo,
        judge=judge_2,
        wrong=[in_order, timeout_is_a_no, also_the_refused, every_copy, even_what_cannot_be, believes_the_late_answer,
               "nothing"],
    ),
    "22.3": Task(
        question="A read with a token",
        start=_start("read", "22.3"),
        hints=[
            "`(await position()).get(partition, 0)` is where the model is; it has the write from `next` on.",
            "Ask again and again, with a short sleep in between, in `async with asyncio.timeout(within)`.",
            "Query after that, not before.",
        ],
        solution=read,
        judge=judge_3,
        wrong=[at_once, reads_first, any_partition, waits_beyond, gives_in, "nothing"],
    ),
    "22.4": Task(
        question="A service that can be told anything",
        start=_start("handle", "22.4"),
        hints=[
            "A saga's step is in one of three states: nothing yet, done, undone. Undone is for ever.",
            "An undo without a do has no effect, and must be remembered: 'undone' is stored then, too.",
            "State and effect belong into one transaction: `with db:`.",
        ],
        solution=handle,
        judge=judge_4,
        wrong=[forgets, undo_needs_a_do, ids_alone, state_first, swallows, never_commits, 3],
    ),
}  # fmt: skip
