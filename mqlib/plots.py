"""One house style: a palette with one colour a meaning, hatches and markers that survive a black-and-white print.

Every function draws one kind of figure, and its `title` states the finding. In a notebook the figure shows itself.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito's palette, which colour-blind readers can tell apart; lightness differs, so that grey does, too.
MEANING = {
    "produced": "#0072B2",
    "consumed": "#009E73",
    "failed": "#D55E00",
    "redelivered": "#E69F00",
    "dead-lettered": "#8A4F7D",
    "lag": "#56B4E9",
    "naive": "#D55E00",
    "fixed": "#0072B2",
    "neutral": "#6B6B6B",
}
SERIES = ["#0072B2", "#E69F00", "#009E73", "#8A4F7D", "#56B4E9", "#D55E00"]
HATCHES = ["", "///", "...", "\\\\\\", "xxx", "---"]
HATCH_OF = {
    "consumed": "", "produced": "///", "failed": "...", "redelivered": "\\\\\\", "dead-lettered": "xxx", "lag": "---",
    "naive": "...", "fixed": "///", "neutral": "|||",
}  # fmt: skip
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]

STYLE = {
    "figure.figsize": (7.2, 3.2), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "hatch.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=SERIES),
}  # fmt: skip


def use_style() -> None:
    """Makes the house style matplotlib's; importing this module has done so."""
    matplotlib.rcParams.update(STYLE)


use_style()


class Picture(Figure):
    """A figure that shows itself as the value of a cell, once, as a PNG of 100 dpi; without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    def __repr__(self) -> str:
        return "<figure>"  # the same at every run, whatever was measured: nbval compares it


def _figure(title: str, height: float = 3.2, rows: int = 1, columns: int = 1) -> tuple[Picture, list[Any]]:
    """A picture with its finding above it, and its panels."""
    figure = Picture(figsize=(7.2, height))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, list(panels.flat)


Panel = tuple[str, Sequence[float], Sequence[float]]


def _colour(name: str, index: int) -> str:
    return MEANING.get(name, SERIES[index % len(SERIES)])


def bars(
    values: Mapping[str, float], title: str, unit: str, meanings: Sequence[str] = (), log: bool = False,
    decimals: int = 0,
) -> Picture:  # fmt: skip
    """One bar a name, with its value on it. `meanings` names each bar's colour; `log` for values far apart."""
    figure, (axes,) = _figure(title)
    for index, (name, value) in enumerate(values.items()):
        meaning = meanings[index] if meanings else name
        label = textwrap.fill(name, max(72 // len(values), 4))
        axes.bar(label, value, width=0.6, color=_colour(meaning, index), hatch=HATCHES[index % len(HATCHES)],
                 edgecolor="white", linewidth=0)  # fmt: skip
        axes.annotate(f"{value:,.{decimals}f}", (index, value), ha="center", va="bottom", fontsize=9,
                      xytext=(0, 2), textcoords="offset points")  # fmt: skip
    axes.set_ylabel(unit)
    axes.margins(y=0.15)
    if log:
        axes.set_yscale("log")
    return figure


def grouped(values: Mapping[str, Mapping[str, float]], title: str, unit: str, x: str = "") -> Picture:
    """Groups of bars: `values[series][group]`. For a comparison of a few series over a few groups."""
    figure, (axes,) = _figure(title)
    groups = list(next(iter(values.values())))
    width = 0.8 / len(values)
    for index, (series, members) in enumerate(values.items()):
        places = [place + (index - (len(values) - 1) / 2) * width for place in range(len(groups))]
        drawn = axes.bar(
            places, [members[group] for group in groups], width * 0.92, label=series, linewidth=0, edgecolor="white",
            color=_colour(series, index), hatch=HATCHES[index % len(HATCHES)],
        )  # fmt: skip
        axes.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel(x)
    axes.set_ylabel(unit)
    axes.margins(y=0.15)
    axes.legend(ncols=len(values), loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str, log_x: bool = False,
    log_y: bool = False, steps: bool = False,
) -> Picture:  # fmt: skip
    """One line a name, from its x and y values; told apart by colour, marker and dash. `steps` for counts over time."""
    figure, (axes,) = _figure(title)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        dash = DASHES[(index + index // len(SERIES)) % len(DASHES)]  # the seventh line differs from the first
        axes.plot(xs, ys, label=name, color=_colour(name, index), linestyle=dash,
                  marker=MARKERS[index % len(MARKERS)] if len(xs) <= 30 else None, markersize=5,
                  drawstyle="steps-post" if steps else "default")  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    if not log_y:
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend()
    return figure


def pair(left: Panel, right: Panel, title: str, x: str) -> Picture:
    """Two quantities over the same setting, side by side: each panel is (name and unit, x values, y values)."""
    figure, panels = _figure(title, columns=2)
    for index, (axes, (name, xs, ys)) in enumerate(zip(panels, (left, right), strict=True)):
        axes.plot(range(len(xs)), ys, color=SERIES[index], marker=MARKERS[index], linestyle=DASHES[index])
        axes.set_xticks(range(len(xs)), [str(value) for value in xs])
        axes.set_title(name, fontsize=10, fontweight="normal")
        axes.set_xlabel(x)
        axes.set_ylim(bottom=0)
    return figure


def boxes(samples: Mapping[str, Sequence[float]], title: str, unit: str, log: bool = False) -> Picture:
    """The spread of each sample: median, quartiles, 5th to 95th percentile."""
    figure, (axes,) = _figure(title)
    drawn = axes.boxplot(list(samples.values()), tick_labels=list(samples), whis=(5, 95), showfliers=False,
                         patch_artist=True, widths=0.5, medianprops={"color": "black", "linewidth": 1.5})  # fmt: skip
    for index, (box, name) in enumerate(zip(drawn["boxes"], samples, strict=True)):
        box.set(facecolor=_colour(name, index), hatch=HATCHES[index % len(HATCHES)], alpha=0.85)
    axes.set_ylabel(unit)
    axes.set_xlabel("box: quartiles, whiskers: 5 to 95 %", fontsize=8, color=MEANING["neutral"])
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return figure


class Span(NamedTuple):
    """Work done by somebody from `start` to `end`, in seconds."""

    who: str
    start: float
    end: float
    what: str = "consumed"


def gantt(runs: Mapping[str, Sequence[Span]], title: str) -> Picture:
    """Who did what when, one panel a run, on one time axis; `what` of a span is its meaning, hence its colour."""
    figure, panels = _figure(title, height=0.9 + 1.15 * len(runs), rows=len(runs))
    people = sorted({span.who for spans in runs.values() for span in spans}, reverse=True)
    last = max(span.end for spans in runs.values() for span in spans)
    shown: dict[str, Any] = {}
    for axes, (name, spans) in zip(panels, runs.items(), strict=True):
        for span in spans:
            shown[span.what] = axes.barh(
                people.index(span.who), span.end - span.start, left=span.start, height=0.7, edgecolor="white",
                # A white edge tells neighbours apart, but would cover a span that is only some pixels wide.
                linewidth=0.6 if span.end - span.start > last / 150 else 0.15, color=_colour(span.what, 0),
                hatch=HATCH_OF.get(span.what, ""),
            )  # fmt: skip
        axes.set_yticks(range(len(people)), people)
        axes.set(ylim=(-0.5, len(people) - 0.5), xlim=(0, last * 1.02))
        axes.set_title(name, fontsize=10, fontweight="normal")
        axes.grid(axis="x")
    panels[-1].set_xlabel("seconds since the start")
    if len(shown) > 1:
        figure.legend(shown.values(), shown.keys(), ncols=len(shown), loc="outside lower right")
    return figure


def matrix(cells: Mapping[str, Mapping[str, str]], title: str, good: Sequence[str] = ("kept",)) -> Picture:
    """A table of words, `cells[row][column]`; the `good` ones are light, the others dark and hatched."""
    rows, columns = list(cells), list(next(iter(cells.values())))
    figure, (axes,) = _figure(title, height=0.9 + 0.5 * len(rows))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            word = cells[row][column]
            fine = word in good
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor="#CDE6F5" if fine else MEANING["failed"],
                                         edgecolor="white", linewidth=2, hatch="" if fine else "///"))  # fmt: skip
            axes.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontweight="bold",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.9})  # fmt: skip
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


KINDS = {"app": ("#F2F2F2", "round,pad=0.02"), "exchange": ("#FCE3C0", "circle,pad=0.04"),
         "queue": ("#CDE6F5", "square,pad=0.02"), "topic": ("#CDE6F5", "square,pad=0.02")}  # fmt: skip


def topology(
    nodes: Mapping[str, tuple[str, float, float]], arrows: Sequence[tuple[str, str, str]], title: str
) -> Picture:
    """The path of a message: `nodes[name] = (kind, column, row)`, arrows as (from, to, label).

    Kinds are `app`, `exchange`, `queue`, `topic`; rows count from the top. Raises `KeyError` for another one.
    """
    columns = max(column for _, column, _ in nodes.values())
    rows = max(row for *_, row in nodes.values())
    figure, (axes,) = _figure(title, height=0.9 + 0.95 * (rows + 1))
    boxes_of: dict[str, Any] = {}
    for name, (kind, column, row) in nodes.items():
        face, _ = KINDS[kind]
        boxes_of[name] = axes.text(
            column, -row, name, ha="center", va="center", fontsize=9.5, zorder=3,
            bbox={"boxstyle": {"app": "round", "exchange": "round4", "queue": "square", "topic": "square"}[kind]
                  + ",pad=0.5", "facecolor": face, "edgecolor": "#333333",
                  "linestyle": "--" if kind == "exchange" else "-"},
        )  # fmt: skip
    for start, end, label in arrows:
        axes.annotate(
            "", xy=(nodes[end][1], -nodes[end][2]), xytext=(nodes[start][1], -nodes[start][2]),
            arrowprops={"arrowstyle": "-|>", "color": "#333333", "patchA": boxes_of[start].get_bbox_patch(),
                        "patchB": boxes_of[end].get_bbox_patch(), "shrinkA": 2, "shrinkB": 2},
        )  # fmt: skip
        middle = ((nodes[start][1] + nodes[end][1]) / 2, -(nodes[start][2] + nodes[end][2]) / 2)
        axes.text(middle[0], middle[1] + 0.12, label, ha="center", va="bottom", fontsize=8.5, color="#333333",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.set(xlim=(-0.6, columns + 0.6), ylim=(-rows - 0.6, 0.6))
    axes.axis("off")
    return figure


__all__ = [
    "Picture",
    "Span", "bars", "boxes", "gantt", "grouped", "lines", "matrix", "pair", "topology", "use_style",
]  # fmt: skip
