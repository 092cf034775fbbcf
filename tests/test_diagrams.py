"""Gantt charts, states, tables and topologies say what they were given."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.colors import to_hex

from mqlib import diagrams, plots, style
from mqlib.plots import Picture, Span
from tests.test_style import TITLE, grey, told_apart


def bars_of(figure: Picture) -> list[Any]:
    return list(figure.axes[0].patches)


def texts_of(figure: Picture) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def rows_of(figure: Picture) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def key_of(figure: Picture) -> list[str]:
    legend: Any = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_plots_has_every_diagram() -> None:
    """Notebooks say `plots.gantt`."""
    for name in ("Span", "gantt", "heatmap", "matrix", "states", "topology"):
        assert getattr(plots, name) is getattr(diagrams, name)


def test_each_meaning_in_a_gantt_can_be_told_apart_in_grey() -> None:
    """One worker may do several kinds of work: every two kinds differ in hatch or clearly in lightness."""
    kinds = [kind for kind in style.MEANING if kind not in ("naive", "fixed")]
    figure = plots.gantt({"run": [Span("w", n, n + 1, kind) for n, kind in enumerate(kinds)]}, TITLE)
    marks = [(bar.get_facecolor(), bar.get_hatch() or "") for bar in bars_of(figure)]
    assert len(marks) == len(kinds)
    assert all(told_apart(*pair) for pair in itertools.combinations(marks, 2))


def test_a_gantt_has_one_axis_of_time_for_all_runs() -> None:
    """Two runs are compared by their lengths: the shorter one is not stretched."""
    figure = plots.gantt({"slow": [Span("b", 0, 10)], "fast": [Span("a", 0, 2)]}, TITLE)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert rows_of(figure) == ["a", "b"]
    top, bottom = (figure.axes[0].transData.transform((0, y))[1] for y in (0, 1))
    assert top > bottom


def test_a_gantt_has_the_order_that_is_asked_for() -> None:
    spans = [Span(who, 0, 1) for who in ("ship", "charge", "reserve", "else")]
    assert rows_of(plots.gantt({"saga": spans}, TITLE, order=["reserve", "charge"])) == [
        "reserve", "charge", "else", "ship",
    ]  # fmt: skip


def test_an_instant_is_a_marker() -> None:
    figure = plots.gantt({"run": [Span("a", 0, 2), Span("a", 2, 2, "failed"), Span("b", 1, 1, "failed")]}, TITLE)
    markers: list[Any] = list(figure.axes[0].lines)
    assert [(*line.get_xdata(), *line.get_ydata()) for line in markers] == [(2, 0), (1, 1)]
    assert {to_hex(line.get_color()).upper() for line in markers} == {style.MEANING["failed"][0]}
    assert len(bars_of(figure)) == 1


def test_a_gantt_has_a_key_only_where_there_is_a_choice() -> None:
    assert key_of(plots.gantt({"run": [Span("a", 0, 1)]}, TITLE)) == []
    assert key_of(plots.gantt({"run": [Span("a", 0, 1), Span("a", 1, 2, "failed")]}, TITLE)) == ["consumed", "failed"]


def test_a_gantt_without_a_span_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.gantt({"run": []}, TITLE)
    assert len(plots.gantt({"nobody came": [], "run": [Span("a", 0, 0)]}, TITLE).axes) == 2


def test_events_of_a_gantt_cross_all_runs_and_are_named_once() -> None:
    figure = plots.gantt({"one": [Span("a", 0, 5)], "two": [Span("a", 0, 9)]}, TITLE, events={"killed": 3})
    crossed = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]  # type: ignore[index]
    assert crossed == [[3], [3]]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["killed"], []]


def test_states_last_until_the_next_one() -> None:
    """Equal samples are one stripe; an empty state draws nothing; the last one lasts to the end."""
    changes = [(0, "A"), (1, "A"), (2, ""), (3, "B"), (4, "B")]
    figure = plots.states({"partition 0": changes}, 9, TITLE)
    assert [(bar.get_x(), bar.get_width()) for bar in bars_of(figure)] == [(0, 2), (3, 6)]
    assert texts_of(figure) == ["A", "B"]
    assert figure.axes[0].get_xlim() == (0, 9)


def test_a_state_has_one_look_in_all_rows() -> None:
    figure = plots.states({"p0": [(0, "A"), (5, "B")], "p1": [(0, "B"), (5, "A")]}, 9, TITLE)
    a, b, again_b, again_a = ((bar.get_facecolor(), bar.get_hatch()) for bar in bars_of(figure))
    assert (a, b) == (again_a, again_b)
    assert told_apart(a, b)


def test_the_states_of_a_breaker_have_fixed_colours() -> None:
    figure = plots.states({"breaker": [(0, "open"), (3, "half-open"), (6, "closed")]}, 9, TITLE)
    colours = [to_hex(bar.get_facecolor()).upper() for bar in bars_of(figure)]
    assert colours == [style.MEANING[kind][0] for kind in ("failed", "redelivered", "consumed")]


def test_a_key_names_the_states_that_are_nowhere_wide_enough_for_their_name() -> None:
    changes = [(0, "closed"), (50, "half-open"), (50.5, "open"), (51, "closed"), (60, "open")]
    assert key_of(plots.states({"breaker": changes}, 99, TITLE)) == ["half-open"]


@pytest.mark.parametrize("changes", [[(0, "A"), (5, "B")], [(3, "A"), (1, "B")]], ids=["after the end", "disorder"])
def test_times_that_go_back_are_an_error(changes: list[tuple[float, str]]) -> None:
    with pytest.raises(ValueError, match=f"{TITLE}.*'p0' is '.' from . to .: times go back"):
        plots.states({"p0": changes}, 4, TITLE)


def test_a_name_without_a_state_is_an_error() -> None:
    with pytest.raises(ValueError, match="'p1' is empty"):
        plots.states({"p0": [(0, "A")], "p1": []}, 4, TITLE)


def test_the_good_words_of_a_matrix_are_light_and_the_others_hatched() -> None:
    figure = plots.matrix({"row": {"a": "kept", "b": "lost"}}, TITLE)
    kept, lost = bars_of(figure)
    assert (kept.get_hatch() or "", bool(lost.get_hatch())) == ("", True)
    assert grey(kept.get_facecolor()) - grey(lost.get_facecolor()) > 60
    assert texts_of(figure) == ["kept", "lost"]


def test_words_of_a_matrix_stand_in_their_row_and_column() -> None:
    figure = plots.matrix({"x": {"a": "xa", "b": "xb"}, "y": {"a": "ya", "b": "yb"}}, TITLE)
    ticks = [figure.axes[0].get_xticks(), figure.axes[0].get_yticks()]
    columns = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    for text in figure.axes[0].texts:
        at = [list(each).index(place) for each, place in zip(ticks, text.get_position(), strict=True)]
        assert text.get_text() == rows_of(figure)[at[1]] + columns[at[0]]


def test_dark_is_much_in_a_heat_map_also_in_grey() -> None:
    figure = plots.heatmap({"row": {n: n for n in range(11)}}, TITLE, "x", "y", "records")
    mesh: Any = figure.axes[0].collections[0]
    mesh.update_scalarmappable()
    lightness = [grey(colour[:3]) for colour in mesh.get_facecolors()]
    assert lightness == sorted(lightness, reverse=True)
    assert all(one - two > 8 for one, two in itertools.pairwise(lightness))
    assert texts_of(figure) == [str(n) for n in range(11)]
    for text, behind in zip(figure.axes[0].texts, lightness, strict=True):
        assert abs(grey(text.get_color()) - behind) > 100, text


def test_a_missing_cell_of_a_heat_map_stays_white() -> None:
    numbers = plots.heatmap({"a": {0: 5, 1: 6}, "b": {1: 7}}, TITLE, "x", "y")
    assert texts_of(numbers) == ["5", "6", "7"]
    words = plots.heatmap({"a": {0: "A", 1: "B"}, "b": {1: "A"}}, TITLE, "x", "y")
    assert [(bar.get_x(), round(bar.get_y() + 0.35), bar.get_width()) for bar in bars_of(words)] == [
        (0, 0, 1), (1, 0, 1), (1, 1, 1),
    ]  # fmt: skip


def test_many_columns_have_some_names_and_no_numbers() -> None:
    figure = plots.heatmap({"row": {at / 4: at for at in range(100)}}, TITLE, "seconds", "y")
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names[:3] == ["0", "2.25", "4.5"]
    assert len(names) <= 12
    assert texts_of(figure) == []


def test_an_unknown_kind_in_a_topology_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="tabel"):
        plots.topology({"a": ("tabel", 0, 0)}, [], TITLE)


def test_an_arrow_to_nowhere_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        plots.topology({"a": ("app", 0, 0)}, [("a", "nowhere", "")], TITLE)


def test_a_long_label_fits_between_two_columns() -> None:
    nodes = {f"node {column}": ("app", column, 0) for column in range(5)}
    figure = plots.topology(nodes, [("node 1", "node 2", "publish with confirms and retry")], TITLE)
    figure._repr_png_()
    start, end, label = (figure.axes[0].texts[at].get_window_extent() for at in (1, 2, -1))
    assert start.x1 < label.x0
    assert label.x1 < end.x0


def test_kinds_of_a_topology_differ_in_shape_or_line() -> None:
    """But for a queue and a topic, which are the same thing to the two brokers."""
    drawn = {kind: plots.topology({"a": (kind, 0, 0)}, [], TITLE).axes[0].texts[0] for kind in diagrams.KINDS}
    boxes: dict[str, Any] = {kind: text.get_bbox_patch() for kind, text in drawn.items()}
    looks = {kind: (type(box.get_boxstyle()), box.get_linestyle()) for kind, box in boxes.items()}
    assert looks.pop("topic") == looks["queue"]
    assert len(set(looks.values())) == len(looks)
