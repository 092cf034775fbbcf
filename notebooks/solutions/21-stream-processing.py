"""The exercises of notebook 21: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import random
from typing import Any

from mqlib.checks import Task, Wrong


def _visits(seed: int) -> tuple[list[tuple[str, int]], int]:
    chance = random.Random(seed)
    gap = chance.choice([1, 3, 5, 10])
    return [(chance.choice(["ann", "bob"]), chance.randrange(60)) for _ in range(chance.randrange(20))], gap


def _by_pairs(events: list[tuple[str, int]], gap: int) -> list[tuple[str, int, int, int]]:
    """Every two events less than a gap apart are put together, until nothing changes."""
    groups = [[event] for event in events]
    for one in range(len(events)):
        for other in range(one):
            (user, at), (whose, when) = events[one], events[other]
            a, b = (next(group for group in groups if any(each is event for each in group))
                    for event in (events[one], events[other]))  # fmt: skip
            if user == whose and abs(at - when) < gap and a is not b:
                groups.remove(b)
                a += b
    found = [(group[0][0], [at for _, at in group]) for group in groups]
    return sorted((user, min(times), max(times), len(times)) for user, times in found)


def judge_1(find_sessions: Any) -> None:
    if not callable(find_sessions):
        raise Wrong(f"write a function `find_sessions(events, gap)`; this is {find_sessions!r:.200}")
    small = [
        ([("ann", 3), ("ann", 0)], 10),
        ([("ann", 0), ("ann", 10)], 10),
        ([("ann", 0), ("ann", 12), ("ann", 6)], 10),
        ([("ann", 5), ("bob", 6)], 10),
    ]
    for given, gap in [*small, *map(_visits, range(40))]:
        # Two equal events are two objects, so that brute force can tell them.
        right = _by_pairs([(user, at) for user, at in given], gap)
        found = find_sessions(list(given), gap)
        if found is None or [tuple(each) for each in found] != right:
            raise Wrong(f"{given} with a gap of {gap} is {right}, and not {found!r:.300}")


def find_sessions(events, gap):
    found = []
    for user, at in sorted(events):
        if found and found[-1][0] == user and at - found[-1][2] < gap:
            _, first, _, count = found[-1]
            found[-1] = (user, first, at, count + 1)
        else:
            found.append((user, at, at, 1))
    return found


def as_they_come(events: Any, gap: int) -> Any:
    """Joins the first session that is near, and never puts two together."""
    found: list[list[Any]] = []
    for user, at in events:
        for each in found:
            if each[0] == user and each[1] - gap < at < each[2] + gap:
                each[1:] = min(each[1], at), max(each[2], at), each[3] + 1
                break
        else:
            found.append([user, at, at, 1])
    return sorted(map(tuple, found))


def the_gap_itself_joins(events: Any, gap: int) -> Any:
    return find_sessions(events, gap + 1)


def all_users_in_one(events: Any, gap: int) -> Any:
    return find_sessions([("ann", at) for _, at in events], gap)


def from_the_first_event(events: Any, gap: int) -> Any:
    """Measures the gap from the session's beginning."""
    found: list[Any] = []
    for user, at in sorted(events):
        if found and found[-1][0] == user and at - found[-1][1] < gap:
            found[-1] = (user, found[-1][1], at, found[-1][3] + 1)
        else:
            found.append((user, at, at, 1))
    return found


def late_with(times: list[int], size: int, lateness: int, grace: int) -> list[int]:
    """The events that are late, by the rule of the exercise."""
    late, watermark = [], 0
    for at in times:
        if at // size * size + size + grace <= watermark:
            late.append(at)
        watermark = max(watermark, at - lateness)
    return late


def _disorder(seed: int) -> tuple[list[int], int, int]:
    chance = random.Random(seed)
    spread = chance.choice([0, 3, 15, 60])
    arrivals = sorted((at + chance.randint(0, spread), at) for at in range(0, 100, 2))
    return [at for _, at in arrivals], chance.choice([1, 5, 10]), chance.choice([0, 2, 7])


def judge_2(smallest_grace: Any) -> None:
    if not callable(smallest_grace):
        raise Wrong(f"write a function `smallest_grace(times, size, lateness)`; this is {smallest_grace!r:.200}")
    small = [
        ([1, 2, 3], 10, 0),
        ([20, 4], 10, 0),
        ([20, 4], 10, 5),
        ([10, 9], 10, 0),
        ([4, 30, 12, 3], 10, 5),
        ([], 5, 0),
    ]
    for times, size, lateness in [*small, *map(_disorder, range(30))]:
        given = smallest_grace(list(times), size, lateness)
        what = f"windows of {size}, lateness {lateness}, arrivals {times!s:.120}"
        if type(given) is not int or given < 0:
            raise Wrong(f"{what}: a whole number from 0 on is wanted, and this is {given!r:.100}")
        if late := late_with(times, size, lateness, given):
            raise Wrong(f"{what}: with a grace of {given}, {len(late)} are late, the first of them is {late[0]}")
        if given and not late_with(times, size, lateness, given - 1):
            raise Wrong(f"{what}: a grace of {given} loses nothing, but neither does {given - 1}")


def smallest_grace(times, size, lateness):
    grace = watermark = 0
    for at in times:
        end = at // size * size + size
        grace = max(grace, watermark - end + 1)
        watermark = max(watermark, at - lateness)
    return grace


def one_too_few(times: Any, size: int, lateness: int) -> int:
    return max(0, smallest_grace(times, size, lateness) - 1)


def the_largest_disorder(times: Any, size: int, lateness: int) -> int:
    """As if an event were late behind the watermark itself, and not behind its window's end."""
    return max([0, *(max(times[:n], default=0) - at for n, at in enumerate(times))])


def no_lateness(times: Any, size: int, lateness: int) -> int:
    return smallest_grace(times, size, 0)


def from_the_last_watermark(times: Any, size: int, lateness: int) -> int:
    last = max([0, *(at - lateness for at in times)])
    return max([0, *(last - (at // size * size + size) + 1 for at in times)])


def _plans(seed: int) -> tuple[list[tuple[str, int, str | None]], list[tuple[str, int, str]]]:
    chance = random.Random(seed)
    users = [(chance.choice(["ann", "bob"]), chance.randrange(12), chance.choice(["free", "plat", "gold", None]))
             for _ in range(chance.randrange(12))]  # fmt: skip
    return users, [(chance.choice(["ann", "bob", "eve"]), chance.randrange(15), "tea") for _ in range(8)]


def _then(users: list[tuple[str, int, str | None]], key: str, second: int) -> str | None:
    """The latest version of that key; among those of one second, the last."""
    best: tuple[int, int] | None = None
    for offset, (name, at, _) in enumerate(users):
        if name == key and at <= second and (best is None or (at, offset) >= best):
            best = at, offset
    return None if best is None else users[best[1]][2]


SMALL: list[tuple[list[tuple[str, int, str | None]], list[tuple[str, int, str]], str]] = [
    ([("ann", 0, "free"), ("ann", 9, "plat")], [("ann", 3, "tea")], "the plan at that second, and not the last one"),
    ([("ann", 0, "free"), ("ann", 5, None)], [("ann", 7, "tea")], "after a tombstone there is none"),
    ([("ann", 5, "free")], [("ann", 4, "tea"), ("ann", 5, "tea")], "none before the first, the new one in its second"),
    ([("ann", 5, None), ("ann", 2, "free")], [("ann", 7, "tea"), ("ann", 3, "tea")], "records may be out of order"),
    ([("ann", 2, "free"), ("ann", 2, "plat")], [("ann", 2, "tea")], "of two in one second the later offset counts"),
    ([("ann", 2, None), ("ann", 2, "plat")], [("ann", 2, "tea")], "also after a tombstone in the same second"),
]  # fmt: skip


def judge_3(enrich: Any) -> None:
    if not callable(enrich):
        raise Wrong(f"write a function `enrich(users, orders)`; this is {enrich!r:.200}")
    for users, orders, why in [*SMALL, *((*_plans(seed), "as by brute force") for seed in range(40))]:
        right = [(key, second, _then(users, key, second)) for key, second, _ in orders]
        found = enrich(list(users), list(orders))
        if found is None or [tuple(each) for each in found] != right:
            raise Wrong(f"users {users}, orders {orders}: {why}; right is {right}, and not {found!r:.200}")


def enrich(users, orders):
    from bisect import bisect_right

    versions = {}
    for key, second, plan in sorted(users, key=lambda record: record[1]):  # stable: offsets keep their order
        versions.setdefault(key, []).append((second, plan))
    found = []
    for key, second, _ in orders:
        own = versions.get(key, [])
        at = bisect_right(own, second, key=lambda version: version[0])
        found.append((key, second, own[at - 1][1] if at else None))
    return found


def as_it_is_now(users: Any, orders: Any) -> Any:
    plans = {key: plan for key, _, plan in users}
    return [(key, second, plans.get(key)) for key, second, _ in orders]


def without_tombstones(users: Any, orders: Any) -> Any:
    return enrich([record for record in users if record[2] is not None], orders)


def in_order_of_offsets(users: Any, orders: Any) -> Any:
    found = []
    for key, second, _ in orders:
        plan = None
        for name, at, each in users:
            if name == key and at <= second:
                plan = each
        found.append((key, second, plan))
    return found


def before_the_second(users: Any, orders: Any) -> Any:
    return [(key, second + 1, plan) for key, second, plan in enrich(users, [(k, s - 1, v) for k, s, v in orders])]


def first_offset_counts(users: Any, orders: Any) -> Any:
    return enrich(users[::-1], orders)


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "21.1": Task(
        question="Sessions of a stream",
        start=_start("find_sessions", "21.1"),
        hints=[
            "Sort first: then the events of a user stand together, in the order of time.",
            "An event belongs to the last session if that is of the same user and ended less than a gap ago.",
            "An event exactly one gap later begins a new session.",
        ],
        solution=find_sessions,
        judge=judge_1,
        wrong=[as_they_come, the_gap_itself_joins, all_users_in_one, from_the_first_event, lambda events, gap: None, 3],
    ),
    "21.2": Task(
        question="The grace that loses nothing",
        start=_start("smallest_grace", "21.2"),
        hints=[
            "Which grace does one event need, if its window ends at `end` and it finds the watermark at `w`?",
            "It is late if end + grace <= w, so it needs w - end + 1; or 0 if that is less.",
            "The watermark that it finds is made by the events before it, and never goes back.",
        ],
        solution=smallest_grace,
        judge=judge_2,
        wrong=[one_too_few, the_largest_disorder, no_lateness, from_the_last_watermark, lambda *_: 1000, 0],
    ),
    "21.3": Task(
        question="A join with tombstones",
        start=_start("enrich", "21.3"),
        hints=[
            "Keep all versions of a user, and not the last one alone; None is a version, too.",
            "Sort the versions by second; `sorted` leaves those of one second in the order of offsets.",
            "`bisect_right(versions, second, key=…)` is one behind the version that held then.",
        ],
        solution=enrich,
        judge=judge_3,
        wrong=[as_it_is_now, without_tombstones, in_order_of_offsets, before_the_second, first_offset_counts,
               lambda users, orders: None, "nothing"],
    ),
}  # fmt: skip
