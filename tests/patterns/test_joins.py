"""Joins find what brute force finds, forget what nobody needs, and hand back what came too late or alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from mqlib.patterns.joins import AllOf, Complete, Incomplete, Join, Merge, Pair, Table, TooOld, Unmatched
from mqlib.patterns.windows import Late, Watermark

FAR = 10**9
TIMES = strategies.integers(0, 40)
BOTH = strategies.lists(
    strategies.tuples(strategies.sampled_from(["left", "right"]), strategies.sampled_from("ab"), TIMES), max_size=40
)


@settings(max_examples=300)
@given(BOTH, strategies.integers(0, 8), strategies.integers(0, 5), strategies.integers(0, 5))
def test_a_join_makes_each_pair_of_the_events_it_took_once(
    events: list[tuple[str, str, int]], within: int, lateness: int, grace: int
) -> None:
    join, watermark = Join(within, grace), Watermark(["both"], lateness)
    pairs, alone, taken = list[tuple[Any, ...]](), [], []
    for n, (side, key, time) in enumerate(events):
        late = time + grace < watermark.time
        for each in join.left(key, time, n) if side == "left" else join.right(key, time, n):
            if isinstance(each, Late):
                assert late
                assert each == Late(key, time, n)
            else:
                assert each == Pair(key, max(events[each.left][2], events[each.right][2]), each.left, each.right)
                pairs.append((key, each.left, each.right))
        taken += [] if late else [n]
        alone += join.advance(watermark.observe("both", time))
    alone += join.advance(FAR)
    wanted = {
        (events[a][1], a, b)
        for a in taken
        for b in taken
        if events[a][:2] == ("left", events[b][1]) and events[b][0] == "right"
        and abs(events[a][2] - events[b][2]) <= within
    }  # fmt: skip
    assert sorted(pairs) == sorted(wanted)
    found = {number for _, *both in pairs for number in both}
    assert sorted(alone) == sorted(Unmatched(events[n][0], *events[n][1:], n) for n in taken if n not in found)  # type: ignore[arg-type]
    assert [each.time for each in alone] == sorted(each.time for each in alone)
    assert join.held == 0
    assert join._held == {}


def test_a_join_holds_what_is_within_its_window_and_the_lateness() -> None:
    join, watermark = Join(within=10), Watermark(["views", "clicks"], lateness=5)
    for time in range(5000):
        join.left("ann", time, None)
        watermark.observe("views", time)
        join.right("ann", time, None)
        join.advance(watermark.observe("clicks", time))
        assert join.held <= 2 * (10 + 5 + 2)


def test_only_events_of_one_key_and_not_further_apart_than_said() -> None:
    join = Join(within=5)
    assert join.left(1, 0, "view") == []
    assert join.right(1, 5, "click") == [Pair(1, 5, "view", "click")]
    assert join.right(1, 6, "click") == []
    assert join.right(2, 3, "click") == []
    assert join.right(1, 0, "first") == [Pair(1, 0, "view", "first")], "from both sides, also before it"


def test_a_table_gives_what_held_then() -> None:
    table = Table[str]()
    for time, tier in ((10, "free"), (30, None), (20, "plat")):  # in any order
        table.put("ann", time, tier)
    assert [table.get("ann", time) for time in (9, 10, 19, 20, 29, 30, 99)] == [
        None, "free", "free", "plat", "plat", None, None,
    ]  # fmt: skip
    assert table.get("bob", 15) is None
    table.put("ann", 20, "gold")
    assert (table.get("ann", 25), len(table)) == ("gold", 3), "the later call counts"


def test_a_table_forgets_what_was_replaced_and_refuses_to_guess() -> None:
    table = Table[str]()
    for time, tier in ((10, "free"), (20, "plat"), (30, "gold")):
        table.put("ann", time, tier)
    table.advance(25)
    table.advance(3)
    assert (len(table), table.get("ann", 25), table.get("ann", 31)) == (2, "plat", "gold")
    with pytest.raises(TooOld, match="'ann' at 24: versions are kept from 25 on"):
        table.get("ann", 24)
    assert table.put("ann", 24, "late") == Late("ann", 24, "late")
    assert (len(table), table.get("ann", 25)) == (2, "plat")
    table.put("bob", 25, "just in time")
    assert table.get("bob", 25) == "just in time"
    table.put("ann", 40, None)
    table.put("bob", 40, None)
    table.advance(40)
    assert (len(table), table.get("ann", 50)) == (0, None), "tombstones go, too"


@given(strategies.lists(strategies.tuples(strategies.sampled_from("ab"), TIMES, strategies.sampled_from("xyz")
                                          | strategies.none(), TIMES), max_size=40))  # fmt: skip
def test_a_table_is_as_brute_force_says_from_its_watermark_on(versions: list[tuple[str, int, Any, int]]) -> None:
    table, put = Table[str](), list[tuple[str, int, Any]]()
    for key, time, value, watermark in versions:
        late = time < table.watermark
        assert table.put(key, time, value) == (Late(key, time, value) if late else None)
        put += [] if late else [(key, time, value)]
        table.advance(watermark)
        for asked in range(table.watermark, 45):
            for name in "ab":
                before = [(at, n, held) for n, (other, at, held) in enumerate(put) if other == name and at <= asked]
                assert table.get(name, asked) == (max(before)[2] if before else None)
    table.advance(FAR)
    last = [table.get(name, FAR) for name in "ab"]
    assert len(table) == sum(value is not None for value in last)
    assert table._changes == []


def test_all_of_fires_once_in_whichever_order() -> None:
    wait = AllOf(["paid", "packed"], within=60)
    sent = [(1, "paid", 0), (2, "packed", 1), (1, "packed", 2), (3, "paid", 3), (2, "paid", 4), (2, "paid", 4)]
    fired = [wait.add(key, name, time, f"{name} at {time}") for key, name, time in sent]
    assert fired == [
        None, None, Complete(1, {"paid": "paid at 0", "packed": "packed at 2"}), None,
        Complete(2, {"packed": "packed at 1", "paid": "paid at 4"}), None,
    ]  # fmt: skip
    assert wait.duplicates == 1
    assert wait.advance(63) == []
    assert wait.advance(64) == [Incomplete(3, {"paid": "paid at 3"}, {"packed"})]
    assert wait.add(3, "packed", 70) is None, "63 + 60 is passed: the key begins anew"
    with pytest.raises(ValueError, match="'lost' is none of packed, paid"):
        wait.add(1, "lost", 5)


def test_all_of_is_not_fooled_by_copies_however_late() -> None:
    """The group is remembered until the copies are late themselves."""
    wait = AllOf(["paid", "packed"], within=10)
    wait.add(1, "paid", 0)
    assert isinstance(wait.add(1, "packed", 9), Complete)
    for watermark in range(0, 40):
        wait.advance(watermark)
        for name, time in (("paid", 0), ("packed", 9)):
            assert not isinstance(wait.add(1, name, time), Complete)
        assert wait.held == (watermark <= 19)
    assert wait.advance(FAR) == [], "and nobody reports it as incomplete"


def test_all_of_gives_up_by_the_first_event_and_takes_no_more() -> None:
    wait = AllOf(["a", "b", "c"], within=10)
    wait.add(1, "b", 8, "B")
    wait.add(1, "a", 5, "A")
    assert wait.advance(15) == []
    assert wait.advance(16) == [Incomplete(1, {"b": "B", "a": "A"}, {"c"})]
    assert wait.add(1, "c", 17, "C") == Late(1, 17, "C"), "the others were handed back already"
    assert wait.add(2, "a", 5, "x") == Late(2, 5, "x"), "it would be given up at once"
    assert wait.add(2, "a", 6, "x") is None
    assert wait.advance(27) == [Incomplete(2, {"a": "x"}, {"b", "c"})]
    assert wait.held == 1, "1 was last heard of at 17"
    wait.advance(28)
    assert wait.held == 0


@given(strategies.lists(strategies.tuples(strategies.integers(1, 3), strategies.sampled_from("xyz"), TIMES)))
def test_all_of_reports_every_group_once(events: list[tuple[int, str, int]]) -> None:
    """With nothing late, each key is complete or incomplete, once, and never both."""
    wait, out = AllOf("xyz", within=50), list[Any]()
    for key, name, time in events:
        out += [each] if (each := wait.add(key, name, time)) else []
    out += wait.advance(FAR)
    complete = {key for key in (1, 2, 3) if {name for other, name, _ in events if other == key} == set("xyz")}
    assert sorted(each.key for each in out) == sorted({key for key, *_ in events})
    assert {each.key for each in out if isinstance(each, Complete)} == complete
    assert wait.held == 0


@given(strategies.lists(TIMES), strategies.lists(TIMES), strategies.randoms(use_true_random=False))
def test_a_merge_of_streams_in_order_is_in_order_and_complete(
    left: list[int], right: list[int], chance: random.Random
) -> None:
    merge, watermark = Merge[tuple[str, int]](), Watermark("lr", lateness=0)
    inputs = {"l": sorted(left), "r": sorted(right)}
    out = list[tuple[int, tuple[str, int]]]()
    while any(inputs.values()):
        name = chance.choice([name for name, times in inputs.items() if times])
        time = inputs[name].pop(0)
        assert merge.add(time, (name, time)) is None, "no input is out of order, so nothing is late"
        out += merge.advance(watermark.observe(name, time))
    out += merge.advance(FAR)
    assert [time for time, _ in out] == sorted(left + right)
    assert all(time == item[1] for time, item in out)
    assert len(merge) == 0


def test_a_merge_waits_for_the_slow_one_but_not_for_ever() -> None:
    now = [0.0]
    merge, watermark = Merge[str](), Watermark(["quick", "slow"], lateness=0, idle=5, clock=lambda: now[0])
    for time in (1, 2, 3):
        merge.add(time, f"quick {time}")
        assert merge.advance(watermark.observe("quick", time)) == []
    merge.add(2, "slow 2")
    assert merge.advance(watermark.observe("slow", 2)) == [(1, "quick 1"), (2, "quick 2"), (2, "slow 2")]
    watermark.at_end("slow")
    now[0] = 4.9
    assert merge.advance(watermark.time) == []
    now[0] = 5
    assert merge.advance(watermark.time) == [(3, "quick 3")]
    assert merge.add(2, "too late") == Late(None, 2, "too late")
    assert merge.add(3, "just in time") is None
    assert merge.advance(watermark.observe("slow", 3)) == [(3, "just in time")]


def test_what_makes_no_sense_is_refused() -> None:
    for make, why in (
        (lambda: Join(-1), "0 or more"),
        (lambda: Join(1, -1), "0 or more"),
        (lambda: AllOf([], 5), "at least one name"),
        (lambda: AllOf("a", -5), "0 or longer"),
        (lambda: Join(1).left("a", -1, ""), "without a timestamp"),
        (lambda: Join(1).right("a", -1, ""), "without a timestamp"),
        (lambda: AllOf("a", 5).add("k", "a", -1), "without a timestamp"),
        (lambda: Merge[str]().add(-1, "a"), "without a timestamp"),
        (lambda: Table[str]().put("a", -1, "x"), "without a timestamp"),
        (lambda: Table[str]().get("a", -1), "without a timestamp"),
    ):
        with pytest.raises(ValueError, match=why):
            make()
