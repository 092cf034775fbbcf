"""Each figure draws, says its finding and its units, can be read in grey, and is the same file at every run."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from mqlib import plots, style
from mqlib.plots import Picture
from tests.conftest import ROOT
from tests.gallery import SAMPLES
from tests.kernel import run_cells
from tests.test_style import TITLE, told_apart

FUNCTIONS = sorted(set(plots.__all__) - {"Picture", "Span", "use_style"})
UNITS = {
    "bars": ["records per second"], "bars, many": ["tasks"], "grouped": ["bytes on the wire", "size of a record"],
    "shares": ["records"], "lines": ["seconds", "records (band: of three runs)"], "areas": ["seconds", "messages"],
    "pair": ["throughput, messages/s", "p99, ms", "prefetch"], "boxes": ["milliseconds"],
    "ecdf": ["milliseconds", "messages at or below, %"], "histogram": ["milliseconds", "messages"],
    "scatter": ["asked, seconds", "measured, seconds"], "gantt": ["seconds since the start"],
    "states": ["seconds since the start"], "heatmap": ["member", "partition", "records"],
    "heatmap, many": ["hour of the day", "user", "clicks"],
}  # fmt: skip
every_figure = pytest.mark.parametrize("name", SAMPLES)


def png_chunks(png: bytes) -> Iterator[str]:
    at = 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        yield kind.decode()
        at += 12 + length


def labels(figure: Picture) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def bars_of(figure: Picture) -> list[Any]:
    return list(figure.axes[0].patches)


def lines_of(figure: Picture) -> list[Any]:
    return list(figure.axes[0].lines)


def test_every_function_has_a_sample() -> None:
    assert sorted({name.partition(",")[0] for name in SAMPLES}) == FUNCTIONS


@every_figure
def test_a_figure_is_a_small_picture_with_its_finding(name: str) -> None:
    """At most 60 kB, 7.2 inches of 100 dpi wide, with ink on it, and no warning: it would go to stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = SAMPLES[name]()
        png = figure._repr_png_()
    assert isinstance(figure, Picture)
    assert len(figure.get_suptitle()) > 10
    assert len(png) <= 60_000
    image = Image.open(io.BytesIO(png))
    assert (image.width, [round(dots) for dots in image.info["dpi"]]) == (720, [100, 100])
    assert 100 < image.height < 700
    assert len(image.convert("L").getcolors() or range(99)) > 10, "an empty canvas has one colour"


@pytest.mark.parametrize("name", UNITS)
def test_axes_have_units(name: str) -> None:
    texts = [
        text
        for axes in SAMPLES[name]().axes
        for text in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left"), axes.get_title("center"))
    ]
    assert set(UNITS[name]) <= set(texts)


@every_figure
def test_no_text_is_cut_off_or_covers_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = SAMPLES[name]()
    figure._repr_png_()  # lays it out
    written: dict[Text, None] = {}
    draw = Text.draw

    def recorded(self: Text, renderer: Any) -> None:
        """Ticks outside the axes are never drawn, so only what is drawn counts."""
        if self.get_visible() and self.get_text().strip():
            written[self] = None
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    figure._repr_png_()
    boxes = {f"{number} {text.get_text()}": text.get_window_extent() for number, text in enumerate(written)}
    assert len(boxes) > 3
    page = figure.bbox.padded(1)
    assert {name: box for name, box in boxes.items() if not (page.contains(*box.min) and page.contains(*box.max))} == {}
    covered = [
        (one, two)
        for (one, first), (two, second) in itertools.combinations(boxes.items(), 2)
        if (both := Bbox.intersection(first, second)) and both.width > 1 and both.height > 1
    ]
    assert covered == []


def look(mark: Any) -> tuple[Any, ...]:
    """Colour, hatch, dash and marker of what is drawn, or stands in a key."""
    line = hasattr(mark, "get_color")
    colour = mark.get_color() if line else np.ravel(mark.get_facecolor())[:3]
    return to_hex(colour), *(
        (str(mark._dash_pattern), mark.get_marker()) if line else (mark.get_hatch() or "", str(mark.get_linestyle()))
    )


@every_figure
def test_what_differs_can_be_told_apart_in_grey(name: str) -> None:
    """Any two marks of a key; without one, neighbours in a row. Equal words of a matrix look the same."""
    figure = SAMPLES[name]()
    legends: list[Any] = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for legend in legends:
        marks = [look(handle) for handle in legend.legend_handles]
        assert len(marks) == len(legend.get_texts())
        assert all(told_apart(*pair) for pair in itertools.combinations(marks, 2))
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    for _, row in itertools.groupby(bars, key=Rectangle.get_y):
        different = [(one, two) for one, two in itertools.pairwise(map(look, row)) if one != two]
        assert all(told_apart(*pair) for pair in different)


@every_figure
def test_the_same_figure_is_the_same_file(name: str) -> None:
    """Drawn twice, no byte differs, so that a second run changes no notebook."""
    png = SAMPLES[name]()._repr_png_()
    assert SAMPLES[name]()._repr_png_() == png
    assert set(png_chunks(png)) <= {"IHDR", "PLTE", "pHYs", "IDAT", "IEND"}, "no software, no time, no text"


def test_the_page_shows_each_figure_in_colour_and_in_grey(tmp_path: Path) -> None:
    """One file: nothing is loaded, and it says that its data are made up."""
    file = tmp_path / "page.html"
    subprocess.run([sys.executable, "-m", "tests.gallery", str(file)], cwd=ROOT, check=True)
    written = file.read_text(encoding="utf-8")
    assert written.count('src="data:image/png;base64,') == written.count("src=") == 2 * len(SAMPLES)
    assert written.count("http") == 0
    assert all(f"<h2>plots.{name}</h2><p>" in written for name in SAMPLES)
    assert "<p></p>" not in written, "every function says in its first line what it draws"
    assert "The data are samples" in written


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_to_draw_is_an_error_that_says_so(name: str) -> None:
    given: dict[str, tuple[Any, ...]] = {
        "pair": (("a, s", [], []), ("b, s", [], []), TITLE, "x"), "states": ({}, 1.0, TITLE),
        "topology": ({}, [], TITLE), "gantt": ({}, TITLE), "matrix": ({}, TITLE),
    }  # fmt: skip
    axes = ("x", "y") if name in ("lines", "areas", "scatter", "heatmap") else ("unit",)
    with pytest.raises(ValueError, match=f"{TITLE}.*(nothing to draw|'a, s' is empty)"):
        getattr(plots, name)(*given.get(name, ({}, TITLE, *axes)))


@pytest.mark.parametrize("name", ["grouped", "shares", "boxes", "ecdf", "histogram", "matrix", "heatmap"])
def test_an_empty_member_is_an_error_that_names_it(name: str) -> None:
    rest = {"matrix": (), "heatmap": ("x", "y")}.get(name, ("unit",))
    with pytest.raises(ValueError, match=f"{TITLE}.*'nobody' is empty"):
        getattr(plots, name)({"nobody": []}, TITLE, *rest)


@pytest.mark.parametrize("name", ["lines", "areas", "scatter"])
@pytest.mark.parametrize("points", [0, 1, 2])
def test_a_live_figure_may_begin_with_nothing(name: str, points: int) -> None:
    series = {"ready": (range(points), range(points)), "unacknowledged": (range(points), [5] * points)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = getattr(plots, name)(series, TITLE, "seconds", "messages")
        figure._repr_png_()
    left, right = figure.axes[0].get_xlim()
    assert right - left >= 1, "not thousandths of a second around nothing"


def test_bars_bear_their_values() -> None:
    assert labels(plots.bars({"a": 1234.56, "b": 0.5}, TITLE, "ms", decimals=1)) == ["1,234.6", "0.5"]


@pytest.mark.parametrize("names", [[f"bar {n}" for n in range(12)], list(style.MEANING)], ids=["series", "meanings"])
def test_bars_side_by_side_never_share_hatch_and_colour(names: list[str]) -> None:
    figure = plots.bars(dict.fromkeys(names, 1), TITLE, "records")
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in bars_of(figure)]
    assert len(marks) == len(names)
    assert all(told_apart(left, right) for left, right in itertools.pairwise(marks))


def test_bars_of_one_meaning_still_differ() -> None:
    figure = plots.bars({"a": 1, "b": 2, "c": 3}, TITLE, "records", meanings=["failed"] * 3)
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in bars_of(figure)]
    assert {to_hex(colour).upper() for colour, _ in marks} == {style.MEANING["failed"][0]}
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))


@pytest.mark.parametrize(
    ("values", "flat"),
    [({f"{n}": n for n in range(8)}, False), ({f"{n}": n for n in range(9)}, True),
     ({f"transaction {n}": n for n in range(8)}, True), ({"in one transaction": 1, "two": 2}, False)],
    ids=["8", "9", "long words", "few"],
)  # fmt: skip
def test_many_bars_lie_so_that_their_names_fit(values: dict[str, float], flat: bool) -> None:
    axes = plots.bars(values, TITLE, "records").axes[0]
    names = [label.get_text() for label in (axes.get_yticklabels() if flat else axes.get_xticklabels())]
    assert [name.replace("\n", " ") for name in names] == list(values)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (("records", "") if flat else ("", "records"))


def test_a_bar_of_nothing_has_its_place_on_a_logarithmic_axis() -> None:
    figure = plots.bars({"none": 0, "few": 2, "many": 90_000}, TITLE, "records", log=True)
    figure._repr_png_()
    low, few, many = (patch.get_window_extent().height for patch in bars_of(figure))
    assert labels(figure) == ["0", "2", "90,000"]
    assert low == 0
    assert 20 < few < many / 3
    assert figure.axes[0].get_ylim()[0] == 0


def test_bars_of_nothing_but_zeros_stand_at_the_bottom() -> None:
    assert plots.bars({"a": 0, "b": 0}, TITLE, "lost").axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize("meanings", [["fixed"], ["fixed", "wrong"]], ids=["too few", "unknown"])
def test_meanings_that_do_not_fit_are_an_error(meanings: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{TITLE}.*2 bars need as many meanings of consumed.*{', '.join(meanings)}$"):
        plots.bars({"a": 1, "b": 2}, TITLE, "records", meanings)


def test_grouped_bars_stand_in_their_group() -> None:
    figure = plots.grouped({"naive": {"1 kB": 10, "10 kB": 2000}, "fixed": {"1 kB": 30, "10 kB": 4}}, TITLE, "records")
    heights = {round(patch.get_x() + patch.get_width() / 2, 1): patch.get_height() for patch in bars_of(figure)}
    assert heights == {-0.2: 10, 0.2: 30, 0.8: 2000, 1.2: 4}
    assert labels(figure) == ["10", "2,000", "30", "4"]


def test_parts_of_a_whole_lie_end_to_end() -> None:
    """A part that is missing takes no room; one that is small bears no number."""
    figure = plots.shares({"p0": {"A": 60, "B": 40}, "p1": {"C": 1, "A": 50}}, TITLE, "records")
    placed = {(round(bar.get_y() + 0.325), bar.get_x(), bar.get_width()) for bar in bars_of(figure)}
    assert placed == {(0, 0, 60), (0, 60, 40), (0, 100, 0), (1, 0, 50), (1, 50, 0), (1, 50, 1)}
    assert labels(figure) == ["60", "50", "40"]


@pytest.mark.parametrize("count", [6, 9])
@pytest.mark.parametrize("points", [10, 100])
def test_lines_can_be_told_apart(count: int, points: int) -> None:
    figure = plots.lines({f"line {n}": (range(points), range(points)) for n in range(count)}, TITLE, "s", "records")
    marks = [look(line) for line in figure.axes[0].lines]
    assert len(marks) == count
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))
    assert all(5 < len(range(points)[:: line.get_markevery()]) <= 20 for line in figure.axes[0].lines)


def test_lines_have_a_key_only_where_there_is_a_choice() -> None:
    assert plots.lines({"lag": ([0], [1])}, TITLE, "s", "records").axes[0].get_legend() is None
    legend: Any = plots.lines({"lag": ([0], [1]), "b": ([], [])}, TITLE, "s", "records").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["lag", "b"]


@pytest.mark.parametrize(("ys", "bottom"), [([5, 9], 0), ([0, 0], 0), ([-5, 9], None), ([float("nan"), 3], 0)], ids=str)
def test_lines_begin_at_zero_unless_something_is_below(ys: list[float], bottom: float | None) -> None:
    low, high = plots.lines({"lag": ([0, 1], ys)}, TITLE, "s", "records").axes[0].get_ylim()
    assert low == bottom if bottom is not None else low < min(ys)
    assert high > max(0, *(y for y in ys if y == y))


def test_a_band_lies_around_its_line() -> None:
    series = {"lag": ([0, 1, 2], [5, 6, 7]), "other": ([0, 1], [9, 9])}
    figure = plots.lines(series, TITLE, "s", "records", band={"lag": ([4, 4, 4], [8, 9, 10])})
    band: Any = figure.axes[0].collections[0]
    box = band.get_datalim(figure.axes[0].transData)
    assert (box.x0, box.x1, box.y0, box.y1) == (0, 2, 4, 10)
    assert to_hex(band.get_facecolor()[0]).upper() == style.MEANING["lag"][0]


def test_areas_lie_on_each_other() -> None:
    figure = plots.areas({"ready": ([0, 1], [3, 4]), "unacked": ([0, 1], [2, 2])}, TITLE, "s", "messages")
    tops = [area.get_datalim(figure.axes[0].transData).y1 for area in figure.axes[0].collections]
    assert tops == [4, 6]


def test_areas_over_different_times_are_an_error() -> None:
    with pytest.raises(ValueError, match=f"{TITLE}.*'unacked' has other x values than 'ready'"):
        plots.areas({"ready": ([0, 1], [3, 4]), "unacked": ([0, 2], [2, 2])}, TITLE, "s", "messages")


def test_panels_of_a_pair_have_the_settings_below() -> None:
    figure = plots.pair(("a, s", [1, 10, 1000], [3, 2, 1]), ("b, kB", [1, 10, 1000], [4, 5, 6]), TITLE, "prefetch")
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "1000"]
        assert axes.get_xlabel() == "prefetch"
    assert [axes.get_title("left") for axes in figure.axes] == ["a, s", "b, kB"]


def test_boxes_can_be_told_apart_in_grey() -> None:
    figure = plots.boxes({f"sample {n}": [1.0, 2.0, 3.0] for n in range(6)}, TITLE, "ms")
    marks = [(patch.get_facecolor(), patch.get_hatch()) for patch in bars_of(figure)]
    assert len(marks) == 6
    assert all(told_apart(*each) for each in itertools.combinations(marks, 2))


VALUES = [float(value) for value in np.random.default_rng(3).lognormal(2, 1, 500)]
HISTOGRAM = (np.unique(VALUES).tolist(), (np.arange(1, 501) / 500).tolist())


@pytest.mark.parametrize("sample", [VALUES, np.array(VALUES), tuple(VALUES), HISTOGRAM], ids=lambda s: type(s).__name__)
def test_percentiles_are_those_of_the_sample(sample: Any) -> None:
    """The smallest value that so large a share does not exceed, as numpy computes it."""
    ranks = (50, 90, 99, 99.9)
    figure = plots.ecdf({"run": sample}, TITLE, "ms", mark=ranks, mean=True)
    expected = np.percentile(VALUES, ranks, method="inverted_cdf")
    marked, curve = lines_of(figure)[:2]
    assert np.allclose(marked.get_xdata(), expected)
    assert list(marked.get_ydata()) == list(ranks)
    assert (curve.get_ydata()[0], curve.get_ydata()[-1]) == (0, pytest.approx(100))
    legend: Any = figure.axes[0].get_legend()
    assert legend.get_texts()[0].get_text().startswith(f"run: p50 {style.short(expected[0])}, p90 ")
    assert labels(figure) == [f"mean {style.short(sum(VALUES) / 500)}"]


def test_the_mean_is_marked_where_it_is_and_only_on_request() -> None:
    sample = {"service": [10.0] * 990 + [5000.0] * 10}
    *_, line = lines_of(plots.ecdf(sample, TITLE, "ms", mean=True))
    assert line.get_xdata()[0] == pytest.approx(59.9)
    assert labels(plots.ecdf(sample, TITLE, "ms")) == []


def test_shares_in_percent_are_an_error() -> None:
    with pytest.raises(ValueError, match=f"{TITLE}.*'run' has shares above 1"):
        plots.ecdf({"run": ([1, 2], [50, 100])}, TITLE, "ms")
    with pytest.raises(ValueError, match=f"{TITLE}.*'run' is empty"):
        plots.ecdf({"run": ([], [])}, TITLE, "ms")


@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_counts_each_value_once_in_common_bins(log: bool) -> None:
    samples = {"one": VALUES, "two": [1.0, 2.0, 300.0], "three": [7.0, 7.0]}
    outlines = [steps.get_data() for steps in bars_of(plots.histogram(samples, TITLE, "ms", log=log))[1::2]]
    assert [sum(outline.values) for outline in outlines] == [500, 3, 2]
    assert all(np.array_equal(outline.edges, outlines[0].edges) for outline in outlines)
    assert np.allclose([outlines[0].edges[0], outlines[0].edges[-1]], [min(*VALUES, 1), 300])


def test_points_are_where_they_were_given() -> None:
    figure = plots.scatter({"a": ([1, 2], [3, 4]), "b": ([5], [0])}, TITLE, "due, s", "fired, s", diagonal=True)
    *points, diagonal = lines_of(figure)
    assert [np.column_stack(line.get_data()).tolist() for line in points] == [[[1, 3], [2, 4]], [[5, 0]]]
    assert diagonal.get_slope() == 1
    assert not any(line.get_clip_on() for line in points), "a point at 0 is drawn whole"


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
