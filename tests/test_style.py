"""The palette, the marks that survive a black-and-white print, wrapped words, the key, the events."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mqlib import plots, style

TITLE = "prefetch 1: nobody waits behind the slow worker"


def grey(colour: Any) -> float:
    """How light a colour is on a black-and-white print: 0 to 255."""
    red, green, blue = to_rgb(colour)
    return 255 * (0.299 * red + 0.587 * green + 0.114 * blue)


def told_apart(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two marks, each (colour, hatch or dash or marker …), differ without colour."""
    return tuple(one[1:]) != tuple(two[1:]) or abs(grey(one[0]) - grey(two[0])) > 40


def test_series_are_six_and_differ() -> None:
    for marks in (style.SERIES, style.HATCHES, style.MARKERS, style.DASHES):
        assert len({str(mark) for mark in marks}) == len(marks) == 6


def test_a_meaning_has_one_colour_and_no_other_has_it() -> None:
    """But for the two words for what does not work and what does."""
    twins = [{"failed", "naive"}, {"produced", "fixed"}]
    for one, two in itertools.combinations(style.MEANING, 2):
        assert (style.MEANING[one][0] == style.MEANING[two][0]) is ({one, two} in twins)
        assert told_apart(style.MEANING[one], style.MEANING[two]) is ({one, two} not in twins)


def test_six_looks_can_be_told_apart_in_grey_whatever_they_mean() -> None:
    """A name that is a meaning has that colour and hatch in any company; the others have what is left."""
    meanings = set(style.MEANING) - {"naive", "fixed"}
    for count in range(6):
        for meant in itertools.combinations(sorted(meanings), count):
            names = [*(f"consumer {number}" for number in range(6 - count)), *meant]
            looks = style.looks(names)
            assert list(looks) == names
            assert all(looks[name][:2] == style.MEANING[name] for name in meant)
            assert all(told_apart(one[:2], two[:2]) for one, two in itertools.combinations(looks.values(), 2)), names
            assert len({colour for colour, *_ in looks.values()}) == 6, "one colour, one meaning"


@pytest.mark.parametrize("meant", [[], ["consumed", "failed"]], ids=len)
def test_sixteen_looks_are_all_different(meant: list[str]) -> None:
    looks = style.looks([*meant, *(f"consumer {number}" for number in range(16 - len(meant)))]).values()
    assert len({look[:2] for look in looks}) == len({str(look[2:]) for look in looks}) == 16


def test_a_breaker_looks_the_same_whatever_else_is_in_the_figure() -> None:
    breaker = {"closed": style.MEANING["consumed"], "half-open": style.MEANING["redelivered"],
               "open": style.MEANING["failed"]}  # fmt: skip
    for names in itertools.permutations(["half-open", "up", "open", "closed"]):
        looks = style.looks(names)
        assert {name: looks[name][:2] for name in breaker} == breaker
        assert looks["up"][0] not in {colour for colour, _ in breaker.values()}


@pytest.mark.parametrize(
    ("text", "width", "wrapped"),
    [
        ("fire and forget", 10, "fire and\nforget"),
        ("orders.created.v1", 10, "orders.\ncreated.v1"),
        ("at-least-once", 9, "at-least-\nonce"),
        ("max_batch_size", 10, "max_batch_\nsize"),
        ("own\nline", 10, "own\nline"),
        ("p99 is 12.5 ms", 9, "p99 is\n12.5 ms"),
        ("a", 0, "a"),
        (7, 4, "7"),
    ],
)
def test_names_are_wrapped_where_they_can_be_read(text: object, width: int, wrapped: str) -> None:
    assert style.wrap(text, width) == wrapped


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (7.5, "7.5"), (99.96, "100"), (12345.6, "12,346"), (-9, "-9")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert style.short(value) == text


def test_nothing_to_draw_is_an_error_that_names_what_is_empty() -> None:
    with pytest.raises(ValueError, match="figure 'title': there is nothing to draw"):
        style.canvas("title", {})
    with pytest.raises(ValueError, match="figure 'title': 'second' is empty"):
        style.canvas("title", {"first": [1], "second": []})
    style.canvas("title", {"first": []}, hollow=True)


def test_a_long_title_is_wrapped_and_the_figure_grows() -> None:
    short, _ = style.canvas("a title", {"a": 1})
    long, _ = style.canvas("a title " * 20, {"a": 1})
    assert long.get_suptitle().count("\n") == 2
    assert long.get_figheight() > short.get_figheight()


@pytest.mark.parametrize(("names", "beside"), [(["lag"], False), (["a", "b", "c", "d"], False), (list("abcde"), True)])
def test_a_key_of_more_than_four_is_beside_the_figure(names: list[str], beside: bool) -> None:
    figure, (axes,) = style.canvas(TITLE, {"a": 1})
    style.key(figure, axes, {name: axes.plot([1], [1])[0] for name in names})
    legend: Any = figure.legends[0] if beside else axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert (axes.get_legend() is None) is beside


def test_a_tall_key_makes_the_figure_higher() -> None:
    figure, (axes,) = style.canvas(TITLE, {"a": 1})
    style.key(figure, axes, {f"partition {number}": axes.plot([1], [1])[0] for number in range(30)})
    figure._repr_png_()
    box = figure.legends[0].get_window_extent()
    assert box.height < figure.bbox.height - 30, "the title has its place above it"


def events(figure: plots.Picture) -> tuple[dict[str, float], list[float]]:
    """The names of events with the height that each is written at, and where the lines are."""
    names = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    dashed: list[Any] = [line for line in figure.axes[0].lines if line.get_color() == style.INK]
    return names, [line.get_xdata()[0] for line in dashed]


def test_an_event_is_a_line_and_a_period_a_ground() -> None:
    figure = plots.lines({"lag": ([0, 10], [0, 9])}, TITLE, "s", "records", events={"killed": 4, "away": (5.0, 7.0)})
    names, lines = events(figure)
    assert (list(names), lines) == (["killed", "away"], [4, 5])
    grounds: list[Any] = list(figure.axes[0].patches)
    assert [(ground.get_x(), ground.get_width()) for ground in grounds] == [(4, 0), (5, 2)]


def test_names_of_events_that_are_close_are_below_each_other() -> None:
    far, _ = events(plots.lines({"lag": ([0, 10], [0, 9])}, TITLE, "s", "records", events={"one": 1, "two": 8}))
    near, _ = events(plots.lines({"lag": ([0, 10], [0, 9])}, TITLE, "s", "records", events={"one": 1, "two": 1.1}))
    assert far["one"] == far["two"]
    assert near["one"] > near["two"]


@pytest.mark.parametrize("log", [False, True])
def test_events_leave_the_data_room_and_are_all_in_sight(log: bool) -> None:
    """An event after the last value widens the axis; the names are above the line, and not beside the axes."""
    given = {"early": -1.0, "late": 20.0}
    figure = plots.lines({"lag": ([0, 10], [1, 90])}, TITLE, "s", "records", log_y=log, events=given)
    axes = figure.axes[0]
    assert axes.get_xlim()[0] <= -1
    assert axes.get_xlim()[1] >= 20
    figure._repr_png_()
    assert all(text.get_window_extent().x1 <= axes.bbox.x1 for text in axes.texts)
    lowest = min(height for height in events(figure)[0].values()) - 0.08
    assert axes.transAxes.inverted().transform(axes.transData.transform((10, 90)))[1] < lowest


def test_a_picture_has_a_palette_that_changes_no_colour_to_be_seen() -> None:
    """Against the same figure without one: a pixel differs by at most 12 of 255."""
    figure = plots.grouped({f"series {n}": {"a": n + 1, "b": 2} for n in range(6)}, TITLE, "records")
    full = io.BytesIO()
    figure.savefig(full, format="png")
    small = figure._repr_png_()
    assert len(small) < len(full.getvalue()) / 2
    pixels = [Image.open(io.BytesIO(png)).convert("RGB").tobytes() for png in (full.getvalue(), small)]
    assert max(abs(one - two) for one, two in zip(*pixels, strict=True)) <= 12


def test_the_style_is_matplotlibs_for_figures_of_ones_own() -> None:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        plots.use_style()
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == style.SERIES
