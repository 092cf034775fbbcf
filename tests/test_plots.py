"""Each figure draws, says its finding and its units, can be read in grey, and is the same file at every run."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from mqlib import plots, style
from mqlib.plots import Picture, Span
from tests.conftest import ROOT
from tests.gallery import SAMPLES, page
from tests.kernel import run_cells

TITLE = "prefetch 1: nobody waits behind the slow worker"
UNITS = {
    "bars": ["records per second"],
    "bars, by meaning, log": ["milliseconds"],
    "bars, many": ["tasks"],
    "grouped": ["bytes on the wire", "size of a record"],
    "shares": ["records"],
    "lines": ["seconds", "records"],
    "pair": ["throughput, messages/s", "p99, ms", "prefetch"],
    "areas": ["seconds", "messages"],
    "boxes": ["milliseconds"],
    "ecdf": ["seconds", "messages at or below, %"],
    "histogram": ["milliseconds", "messages"],
    "scatter": ["asked, seconds", "measured, seconds"],
    "gantt": ["seconds since the start"],
    "states": ["seconds since the start"],
    "heatmap": ["member", "partition", "records"],
}
every_figure = pytest.mark.parametrize("name", SAMPLES)


def grey(colour: Any) -> float:
    """How light a colour is on a black-and-white print: 0 to 255."""
    red, green, blue = to_rgb(colour)
    return 255 * (0.299 * red + 0.587 * green + 0.114 * blue)


def told_apart(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Whether two marks, each (colour, hatch or dash or marker …), differ without colour."""
    return one[1:] != two[1:] or abs(grey(one[0]) - grey(two[0])) > 40


def png_chunks(png: bytes) -> Iterator[str]:
    at = 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        yield kind.decode()
        at += 12 + length


def test_every_public_function_is_among_the_figures() -> None:
    drawn = {name.partition(",")[0] for name in SAMPLES}
    assert drawn | {"Picture", "Span", "use_style"} == set(plots.__all__)


@every_figure
def test_a_figure_is_a_small_picture_with_its_finding(name: str) -> None:
    """At most 100 kB at 100 dpi, with ink on it."""
    figure = SAMPLES[name]()
    assert isinstance(figure, Picture)
    assert len(figure.get_suptitle()) > 10
    png = figure._repr_png_()
    assert len(png) <= 100_000
    image = Image.open(io.BytesIO(png)).convert("L")
    assert image.width == 720
    assert 100 < image.height < 700
    assert len(image.getcolors() or range(99)) > 10, "an empty canvas has one colour"


@pytest.mark.parametrize("name", UNITS)
def test_axes_have_units(name: str) -> None:
    texts = [
        text
        for axes in SAMPLES[name]().axes
        for text in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left"), axes.get_title("center"))
        if text
    ]
    for unit in UNITS[name]:
        assert any(text.startswith(unit) for text in texts), (unit, texts)


@every_figure
def test_nothing_is_drawn_outside_the_picture(name: str) -> None:
    """A long name or title that is cut off at the edge cannot be read."""
    figure = SAMPLES[name]()
    figure._repr_png_()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01


@every_figure
def test_no_text_covers_another(name: str) -> None:
    """What is written over a bar or a line has a ground of its own; but two texts in one place are none."""
    figure = SAMPLES[name]()
    figure._repr_png_()
    axes_of: list[Any] = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    drawn = {tick.label1 for axis in axes_of for tick in axis._update_ticks()}
    hidden = {tick.label1 for axis in axes_of for tick in axis.get_major_ticks() + axis.get_minor_ticks()} - drawn
    texts = [each for each in figure.findobj(Text) if each.get_visible() and each.get_text().strip()]
    texts = [each for each in texts if each not in hidden]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    shown = [(text, box) for text, box in boxes if box.width > 1 and figure.bbox.overlaps(box)]
    covered = [
        (one, two)
        for (one, first), (two, second) in itertools.combinations(shown, 2)
        if (both := Bbox.intersection(first, second)) is not None and both.width > 2 and both.height > 2
    ]
    assert covered == []


def test_the_page_shows_each_figure_twice() -> None:
    written = page()
    assert written.count("<img ") == 2 * len(SAMPLES)
    assert all(f"<h2>plots.{name}</h2><p>" in written for name in SAMPLES)
    assert "<p></p>" not in written, "every function says in its first line what it draws"


@pytest.mark.parametrize("name", sorted(set(plots.__all__) - {"Picture", "Span", "use_style"}))
def test_nothing_to_draw_is_an_error_that_says_so(name: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "pair": (("a, s", [], []), ("b, s", [], []), TITLE, "x"),
        "states": ({}, 1.0, TITLE),
        "topology": ({}, [], TITLE),
        "gantt": ({}, TITLE),
        "matrix": ({}, TITLE),
    }
    axes = {"lines": ("x", "y"), "areas": ("x", "y"), "scatter": ("x", "y"), "heatmap": ("x", "y")}.get(name, ("unit",))
    with pytest.raises(ValueError, match=f"{TITLE}.*(nothing to draw|empty)"):
        getattr(plots, name)(*arguments.get(name, ({}, TITLE, *axes)))


@every_figure
def test_the_same_figure_is_the_same_file(name: str) -> None:
    """Drawn twice, no byte differs, so that a second run changes no notebook."""
    png = SAMPLES[name]()._repr_png_()
    assert SAMPLES[name]()._repr_png_() == png
    assert set(png_chunks(png)) <= {"IHDR", "pHYs", "IDAT", "IEND"}, "no software, no time, no text"


def test_series_colours_are_six_and_differ() -> None:
    assert len(set(style.SERIES)) == len(style.SERIES) == len(style.HATCHES) == len(style.MARKERS) == len(style.DASHES)
    assert len(set(style.HATCHES)) == len(set(style.MARKERS)) == len(set(map(str, style.DASHES))) == 6


def test_a_meaning_has_one_colour_and_no_other_has_it() -> None:
    """But for the two words for what does not work and what does."""
    twins = [{"failed", "naive"}, {"produced", "fixed"}]
    for one, two in itertools.combinations(style.MEANING, 2):
        assert (style.MEANING[one] == style.MEANING[two]) is ({one, two} in twins)


@pytest.mark.parametrize("names", [[f"bar {n}" for n in range(12)], list(style.MEANING)], ids=["series", "meanings"])
def test_bars_side_by_side_never_share_hatch_and_colour(names: list[str]) -> None:
    figure = plots.bars(dict.fromkeys(names, 1), TITLE, "records")
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.axes[0].patches]
    assert len(marks) == len(names)
    assert all(told_apart(left, right) for left, right in itertools.pairwise(marks))


def test_bars_of_one_meaning_still_differ() -> None:
    figure = plots.bars({"a": 1, "b": 2, "c": 3}, TITLE, "records", meanings=["failed"] * 3)
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.axes[0].patches]
    assert len({colour for colour, _ in marks}) == 1
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))


def test_grouped_series_can_be_told_apart_in_grey() -> None:
    figure = plots.grouped({f"series {n}": {"a": 1, "b": 2} for n in range(6)}, TITLE, "records")
    marks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in figure.axes[0].containers]
    assert len(marks) == 6
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"series {n}" for n in range(6)]


@pytest.mark.parametrize("count", [6, 9])
@pytest.mark.parametrize("points", [10, 100], ids=["with markers", "without"])
def test_lines_can_be_told_apart(count: int, points: int) -> None:
    """By dash or marker in grey up to six; beyond that by colour, dash and marker together."""
    figure = plots.lines({f"line {n}": (range(points), range(points)) for n in range(count)}, TITLE, "s", "records")
    drawn: list[Any] = list(figure.axes[0].lines)
    marks = [(line.get_color(), line._dash_pattern, line.get_marker()) for line in drawn]
    assert len(marks) == count
    assert all(told_apart(*each) for each in itertools.combinations(marks[:6], 2))
    assert len(set(map(str, marks))) == count


def test_boxes_can_be_told_apart_in_grey() -> None:
    figure = plots.boxes({f"sample {n}": [1.0, 2.0, 3.0] for n in range(6)}, TITLE, "ms")
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.axes[0].patches]
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))


def test_each_meaning_in_a_gantt_can_be_told_apart_in_grey() -> None:
    """One worker may do several kinds of work: every two kinds differ in hatch or clearly in lightness."""
    kinds = [kind for kind in style.MEANING if kind not in ("naive", "fixed")]
    figure = plots.gantt({"run": [Span("w", n, n + 1, kind) for n, kind in enumerate(kinds)]}, TITLE)
    marks = {
        kind: (patch.get_facecolor(), patch.get_hatch() or "")
        for kind, patch in zip(kinds, figure.axes[0].patches, strict=True)
    }
    alike = [(one, two) for one, two in itertools.combinations(kinds, 2) if not told_apart(marks[one], marks[two])]
    assert alike == []


def test_a_gantt_has_one_axis_of_time_for_all_runs() -> None:
    """Two runs are compared by their lengths: the shorter one is not stretched."""
    figure = plots.gantt({"slow": [Span("a", 0, 10)], "fast": [Span("b", 0, 2)]}, TITLE)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["b", "a"]


def test_a_legend_names_what_is_drawn_and_only_where_there_is_a_choice() -> None:
    one = plots.gantt({"run": [Span("a", 0, 1)]}, TITLE)
    two = plots.gantt({"run": [Span("a", 0, 1), Span("a", 1, 2, "failed")]}, TITLE)
    assert one.legends == []
    assert one.axes[0].get_legend() is None
    legend: Any = two.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["consumed", "failed"]
    assert plots.lines({"lag": ([0], [1])}, TITLE, "s", "records").axes[0].get_legend() is None


def test_bars_bear_their_values() -> None:
    figure = plots.bars({"a": 1234.56, "b": 0.5}, TITLE, "ms", decimals=1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1,234.6", "0.5"]


def test_the_good_words_of_a_matrix_are_light_and_the_others_hatched() -> None:
    figure = plots.matrix({"row": {"a": "kept", "b": "lost"}}, TITLE)
    kept, lost = figure.axes[0].patches
    assert (kept.get_hatch() or "", bool(lost.get_hatch())) == ("", True)
    assert grey(kept.get_facecolor()) - grey(lost.get_facecolor()) > 60
    assert [text.get_text() for text in figure.axes[0].texts] == ["kept", "lost"]


def test_an_unknown_kind_in_a_topology_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="tabel"):
        plots.topology({"a": ("tabel", 0, 0)}, [], TITLE)


def test_an_arrow_to_nowhere_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nowhere"):
        plots.topology({"a": ("app", 0, 0)}, [("a", "nowhere", "")], TITLE)


def test_importing_plots_leaves_pyplot_alone() -> None:
    """pyplot would keep every figure alive, and choose a window system."""
    script = (
        "import sys, mqlib.plots; mqlib.plots.bars({'a': 1}, 't', 'u')._repr_png_(); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_in_a_kernel_a_figure_shows_itself_once(tmp_path: Path) -> None:
    """The last expression of a cell: one PNG, a text that is the same at every run; assigned: nothing."""
    cell = f'plots.bars({{"a": 1}}, "{TITLE}", "records")'
    _, shown, assigned, again = run_cells(tmp_path, "from mqlib import plots", cell, f"figure = {cell}", cell)
    assert [output.output_type for output in shown] == ["execute_result"]
    assert set(shown[0].data) == {"image/png", "text/plain"}
    assert shown[0].data["text/plain"] == "<figure>", "a title may state a measured number, which nbval would compare"
    assert assigned == []
    assert again[0].data == shown[0].data
