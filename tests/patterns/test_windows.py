"""Windows hold what brute force says, in whichever order events come; what is late is handed back; idle inputs wait."""

from __future__ import annotations

import json
import operator
import random
from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from mqlib.patterns.stateful import Json
from mqlib.patterns.windows import Aggregator, Hopping, Late, Result, Session, Tumbling, Watermark, Window

FAR = 10**9
EVENTS = strategies.lists(strategies.tuples(strategies.sampled_from("ab"), strategies.integers(0, 60)), max_size=40)
KINDS = strategies.sampled_from([Tumbling(10), Hopping(10, 5), Hopping(10, 3), Hopping(7, 7), Session(4), Session(1)])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def count(windows: Hopping | Session, **options: Any) -> Aggregator[str, list[str]]:
    """Collects what is in a window, in order, so that nothing may be missing or there twice."""
    return Aggregator(
        windows, list, lambda held, value: sorted([*held, value]), lambda a, b: sorted([*a, *b]), **options
    )


def brute(windows: Hopping | Session, events: Iterable[tuple[str, int, str]]) -> dict[tuple[str, int, int], list[str]]:
    """What each window of each key holds, found in another way: every start is tried; sorted times are cut at gaps."""
    events, found = list(events), defaultdict[tuple[str, int, int], list[str]](list)
    for key in {key for key, *_ in events}:
        own = sorted((time, value) for name, time, value in events if name == key)
        if isinstance(windows, Hopping):
            for start in range(0, 70, windows.advance):
                held = [value for time, value in own if start <= time < start + windows.size]
                if held:
                    found[key, start, start + windows.size] = sorted(held)
            continue
        session: list[tuple[int, str]] = []
        for time, value in [*own, (FAR, "")]:
            if session and time - session[-1][0] >= windows.gap:
                place = key, session[0][0], session[-1][0] + windows.gap
                found[place] = sorted(value for _, value in session)
                session = []
            session.append((time, value))
    return dict(found)


def table(results: Iterable[Result | Late]) -> dict[tuple[str, int, int], list[str]]:
    finals = [each for each in results if isinstance(each, Result) and each.kind == "final"]
    found = {(each.key, *each.window): each.value for each in finals}
    assert len(found) == len(finals), "a window was closed twice"
    return found


@given(EVENTS, KINDS)
def test_without_a_watermark_nothing_is_late_and_all_is_as_brute_force_says(
    events: list[tuple[str, int]], windows: Hopping | Session
) -> None:
    aggregator = count(windows)
    named = [(key, time, str(n)) for n, (key, time) in enumerate(events)]
    for event in named:
        assert aggregator.add(*event) == []
    results = aggregator.advance(FAR)
    assert table(results) == brute(windows, named)
    assert [each.window.end for each in results] == sorted(each.window.end for each in results)
    assert (aggregator.open, aggregator.on_time, aggregator.late) == (0, len(events), 0)


@settings(max_examples=300)
@given(EVENTS, KINDS, strategies.integers(0, 12), strategies.integers(0, 12))
def test_with_a_watermark_every_event_counts_or_is_handed_back(
    events: list[tuple[str, int]], windows: Hopping | Session, lateness: int, grace: int
) -> None:
    """The closed windows are those of brute force over what was taken; no window is closed twice."""
    aggregator, watermark = count(windows, grace=grace), Watermark("i", lateness)
    out: list[Result | Late] = []
    taken: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    accepted, behind = [], 0
    for n, (key, time) in enumerate(events):
        before = watermark.time
        new = aggregator.add(key, time, str(n))
        missed = [window for late in new if isinstance(late, Late) for window in late.missed]
        if isinstance(windows, Hopping):
            assert missed == [each for each in windows.assign(time) if each.end + grace <= before]
            for window in set(windows.assign(time)) - set(missed):
                taken[key, window.start, window.end].append(str(n))
        else:
            assert bool(missed) == (time + grace < before)
            accepted += [] if missed else [(key, time, str(n))]
        behind += bool(missed)
        closed = aggregator.advance(watermark.observe("i", time))
        assert all(each.window.end + grace <= watermark.time for each in closed)
        out += [*new, *closed]
    out += aggregator.advance(FAR)
    wanted = brute(windows, accepted) if isinstance(windows, Session) else taken
    assert table(out) == {place: sorted(values) for place, values in wanted.items()}
    assert (aggregator.late, aggregator.on_time) == (behind, len(events) - behind)


@given(EVENTS, KINDS)
def test_updates_end_with_the_same_values_and_withdraw_what_was_merged(
    events: list[tuple[str, int]], windows: Hopping | Session
) -> None:
    aggregator, shown = count(windows, emit="update"), dict[tuple[str, Window], list[str]]()
    named = [(key, time, str(n)) for n, (key, time) in enumerate(events)]
    for event in named:
        results = aggregator.add(*event)
        updates = [each for each in results if isinstance(each, Result) and each.kind == "update"]
        assert len(updates) == len(windows.assign(event[1])), "one for each of its windows"
        for each in results:
            assert isinstance(each, Result)
            if each.kind == "withdrawn":
                assert each.value is None
                del shown[each.key, each.window]
            else:
                shown[each.key, each.window] = each.value
    assert {(key, *window): value for (key, window), value in shown.items()} == brute(windows, named)
    assert aggregator.advance(FAR) == []
    assert aggregator.open == 0


@given(EVENTS, KINDS, strategies.randoms(use_true_random=False))
def test_a_state_that_is_kept_elsewhere_makes_a_crash_unnoticed(
    events: list[tuple[str, int]], windows: Hopping | Session, chance: random.Random
) -> None:
    """The state passes through bytes, as in a changelog; each life ends after some events."""
    kept: dict[bytes, bytes] = {}

    def life(mark: int) -> Aggregator[str, list[str]]:
        return count(windows, state=Json(kept, "open/"), watermark=mark)

    sturdy, mortal, watermark = count(windows), life(0), Watermark("i", 6)
    for n, (key, time) in enumerate(events):
        assert sturdy.add(key, time, str(n)) == mortal.add(key, time, str(n))
        mark = watermark.observe("i", time)
        assert sorted(sturdy.advance(mark)) == sorted(mortal.advance(mark))
        if chance.random() < 0.3:
            mortal = life(mortal.watermark)
    assert sturdy.open == mortal.open
    assert sorted(sturdy.advance(FAR)) == sorted(mortal.advance(FAR))
    assert kept == {}


def test_the_windows_of_a_time() -> None:
    assert Tumbling(10).assign(0) == [Window(0, 10)]
    assert Tumbling(10).assign(19) == [Window(10, 20)]
    assert Tumbling(10).assign(20) == [Window(20, 30)]
    assert Hopping(10, 5).assign(12) == [Window(5, 15), Window(10, 20)]
    assert Hopping(10, 5).assign(4) == [Window(0, 10)], "no window begins before 0"
    assert Hopping(10, 4).assign(11) == [Window(4, 14), Window(8, 18)]
    assert Session(10).assign(3) == [Window(3, 13)]


def test_an_event_exactly_one_gap_later_begins_a_session() -> None:
    aggregator = Aggregator[int, int](Session(10), int, operator.add, operator.add)
    for time in (0, 9, 19, 40):
        aggregator.add("ann", time, 1)
    assert [(tuple(each.window), each.value) for each in aggregator.advance(FAR)] == [
        ((0, 19), 2), ((19, 29), 1), ((40, 50), 1),
    ]  # fmt: skip


def test_an_event_between_two_sessions_makes_one_of_them() -> None:
    """In whichever order they come; what was told of the two is withdrawn."""
    aggregator = count(Session(10), emit="update")
    told = [aggregator.add("ann", time, name) for time, name in ((30, "c"), (15, "a"), (22, "b"), (50, "d"))]
    assert told[2] == [
        Result("ann", Window(15, 25), None, "withdrawn"), Result("ann", Window(30, 40), None, "withdrawn"),
        Result("ann", Window(15, 40), ["a", "b", "c"], "update"),
    ]  # fmt: skip
    assert aggregator.open == 2


def test_a_late_event_says_which_windows_it_missed_and_counts_in_the_others() -> None:
    aggregator = count(Hopping(10, 5))
    aggregator.advance(15)
    assert aggregator.add("ann", 12, "x") == [Late("ann", 12, "x", (Window(5, 15),))]
    assert (aggregator.late, aggregator.on_time) == (1, 0)
    assert table(aggregator.advance(FAR)) == {("ann", 10, 20): ["x"]}


def test_a_session_does_not_join_a_closed_one() -> None:
    """Its own window would still be open; the session that it belongs to is out, without it."""
    aggregator = count(Session(10))
    aggregator.add("ann", 0, "a")
    assert table(aggregator.advance(12)) == {("ann", 0, 10): ["a"]}
    assert aggregator.add("ann", 5, "b") == [Late("ann", 5, "b", (Window(5, 15),))]
    assert aggregator.add("ann", 12, "c") == []
    assert table(aggregator.advance(FAR)) == {("ann", 12, 22): ["c"]}


def test_the_watermark_does_not_go_back_and_a_failing_add_changes_nothing() -> None:
    aggregator = Aggregator[int, int](Tumbling(10), int, operator.add)
    aggregator.add("ann", 3, 1)
    aggregator.advance(9)
    aggregator.advance(2)
    assert aggregator.watermark == 9
    with pytest.raises(TypeError):
        aggregator.add("ann", 4, "one")  # type: ignore[arg-type]
    assert (aggregator.on_time, aggregator.open) == (1, 1)
    assert [each.value for each in aggregator.advance(10)] == [1]
    assert aggregator.advance(FAR) == []


def test_the_window_before_this_event_is_judged_by_the_watermark_before_it() -> None:
    """A state that keeps references sees a new list at each event."""

    class Watched(dict[Any, Any]):
        sets = 0

        def __setitem__(self, key: Any, value: Any) -> None:
            assert self.get(key) is not value
            self.sets += 1
            super().__setitem__(key, value)

    state = Watched()
    aggregator = Aggregator[int, int](Tumbling(10), int, operator.add, state=state)
    for time in (1, 2, 3):
        aggregator.add("ann", time, 1)
    assert state == {"ann": [[0, 10, 3]]}
    assert state.sets == 3


@pytest.mark.parametrize("time", [-1, 1.5, "3", None])
def test_what_is_no_event_time_is_refused(time: Any) -> None:
    aggregator = count(Tumbling(10))
    for attempt in (lambda: aggregator.add("ann", time, ""), lambda: Session(3).assign(time),
                    lambda: Watermark("i", 0).observe("i", time)):  # fmt: skip
        with pytest.raises(ValueError, match="whole number from 0 on, such as milliseconds"):
            attempt()
    with pytest.raises(ValueError, match="-1 is Kafka's word for a record without a timestamp"):
        aggregator.add("ann", -1, "")
    assert aggregator.on_time == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Tumbling(0), "0 < advance <= size"),
        (lambda: Hopping(5, 10), "0 < advance <= size"),
        (lambda: Hopping(5, -1), "0 < advance <= size"),
        (lambda: Session(0), "longer than 0"),
        (lambda: Aggregator(Session(3), int, operator.add), "may join two sessions"),
        (lambda: Aggregator(Tumbling(3), int, operator.add, grace=-1), "grace is 0 or more"),
        (lambda: Aggregator(Tumbling(3), int, operator.add, emit="never"), "'close' or 'update'"),  # type: ignore[arg-type]
        (lambda: Watermark([], 3), "0 inputs"),
        (lambda: Watermark("a", -3), "lateness of -3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


def test_the_watermark_is_that_of_the_slowest_input_and_never_goes_back() -> None:
    watermark = Watermark(["orders-0", "orders-1"], lateness=5)
    assert watermark.observe("orders-0", 100) == 0, "nobody knows what orders-1 has"
    assert watermark.observe("orders-1", 30) == 25
    assert watermark.observe("orders-1", 20) == 25
    assert watermark.observe("orders-0", 3) == 25
    assert watermark.observe("orders-1", 200) == 95, "orders-0 has been at 100"
    assert watermark.observe("orders-1", 3) == 95
    assert Watermark("a", 5).observe("a", 3) == 0, "never below 0"
    with pytest.raises(ValueError, match=r"'orders-2' is none of the inputs orders-0, orders-1; after a rebalance"):
        watermark.observe("orders-2", 1)
    with pytest.raises(ValueError, match="none of the inputs"):
        watermark.at_end("orders-2")


def test_an_idle_input_is_left_out_until_its_next_event() -> None:
    clock = Clock()
    watermark = Watermark("ab", lateness=0, idle=10, clock=clock)
    watermark.observe("a", 50)
    clock.now += 1000
    assert watermark.observe("a", 60) == 0, "b is read slowly for all we know, and not at its end"
    assert watermark.at_end("b") == 0
    clock.now += 9.9
    assert (watermark.at_end("b"), watermark.idle) == (0, set())
    clock.now += 0.1
    assert watermark.at_end("b") == 60, "the first time counts"
    assert watermark.idle == {"b"}
    assert watermark.observe("b", 7) == 60, "late, but time does not go back"
    assert watermark.observe("a", 90) == 60, "b is awake, and holds it up again"
    assert watermark.observe("b", 61) == 61
    clock.now += 10
    assert (watermark.time, watermark.idle) == (61, set())


def test_when_all_are_idle_the_furthest_one_counts() -> None:
    clock = Clock()
    watermark = Watermark("abc", lateness=2, idle=10, clock=clock)
    watermark.observe("a", 50)
    watermark.observe("b", 80)
    for input in "cba":
        watermark.at_end(input)
    clock.now += 10
    assert watermark.time == 78
    none = Watermark("a", lateness=2, idle=0, clock=clock)
    assert none.at_end("a") == 0, "nothing was ever heard"


def test_memory_is_bounded_by_what_is_open() -> None:
    aggregator, watermark = Aggregator[int, int](Tumbling(10), int, operator.add), Watermark("i", 5)
    for time in range(10_000):
        aggregator.add(time % 7, time, 1)
        aggregator.advance(watermark.observe("i", time))
        assert aggregator.open <= 7 * 3
        assert len(aggregator._ends) <= 7 * 3
    aggregator.advance(FAR)
    for _ in range(100):
        aggregator.add("ann", FAR + 1, 1)
    assert len(aggregator._ends) == 1, "a window is noted once, and not for each event"


def test_json_is_a_mapping_of_its_prefix_alone() -> None:
    bytes_below: MutableMapping[bytes, bytes] = {b"other": b"1"}
    state = Json(bytes_below, "open/")
    state["ann"] = [1, 2]
    state["ann"].append(3)
    assert (state["ann"], list(state), len(state), "bob" in state) == ([1, 2], ["ann"], 1, False)
    assert bytes_below == {b"other": b"1", b"open/ann": json.dumps([1, 2]).encode()}
    del state["ann"]
    with pytest.raises(KeyError):
        state["ann"]
