"""What all figures share: a palette with one colour a meaning, marks that survive a black-and-white print, the page."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, which colour-blind readers can tell apart; lightness differs, so that grey does, too.
MEANING = {  # colour and hatch
    "consumed": ("#009E73", ""), "produced": ("#0072B2", "///"), "failed": ("#D55E00", "..."),
    "redelivered": ("#E69F00", "\\\\\\"), "dead-lettered": ("#8A4F7D", "xxx"), "lag": ("#56B4E9", "---"),
    "naive": ("#D55E00", "..."), "fixed": ("#0072B2", "///"), "neutral": ("#6B6B6B", "|||"),
}  # fmt: skip
SERIES = ["#0072B2", "#E69F00", "#009E73", "#8A4F7D", "#56B4E9", "#D55E00"]
HATCHES = ["", "///", "...", "\\\\\\", "xxx", "---"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
# A circuit breaker looks the same in every notebook: work flows, is tried, does not flow.
BREAKER = {"closed": "consumed", "half-open": "redelivered", "open": "failed"}
INK, DIM = "#333333", "#6B6B6B"

STYLE = {
    "figure.figsize": (7.2, 3.2), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "hatch.linewidth": 0.6,
    "axes.prop_cycle": f"cycler(color={SERIES})",
}  # fmt: skip
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}  # for words on a hatch or a line

Events = Mapping[str, float | tuple[float, float]] | None
"""By its name a moment on the axis of time, or a period from one to another."""


def use_style() -> None:
    """Makes the house style matplotlib's; importing this module has done so."""
    matplotlib.rcParams.update(STYLE)


use_style()


class Picture(Figure):
    """A figure that shows itself as the value of a cell, once, as a PNG of 100 dpi; without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        # A palette of 256 colours: hatched figures are a third as large, and look the same.
        image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(small, "PNG", dpi=(100, 100))
        return small.getvalue()

    def __repr__(self) -> str:
        return "<figure>"  # the same at every run, whatever was measured: nbval compares it


def canvas(
    title: str, values: Mapping[str, Any], height: float = 3.2, rows: int = 1, columns: int = 1, hollow: bool = False
) -> tuple[Picture, list[Any]]:
    """A picture with its finding above it, and its panels.

    Raises `ValueError` when there are no `values`, or when one of them is an empty collection and not `hollow`.
    """
    empty = [name for name, members in values.items() if isinstance(members, Sized) and not len(members)]
    if not values or (empty and not hollow):
        raise ValueError(f"figure {title!r}: " + (f"{empty[0]!r} is empty" if empty else "there is nothing to draw"))
    heading = wrap(title, 76)
    figure = Picture(figsize=(7.2, height + 0.19 * heading.count("\n")))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=rows > 1).flat)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in panels):
        axis.set_major_formatter("{x:,.10g}")
    return figure, panels


class _Wrapper(textwrap.TextWrapper):
    wordsep_re = re.compile(r"(\s+|[^\s._/-]*[._/-]+(?=[^\W\d]))")  # names of topics have dots, and so have numbers


def wrap(text: object, width: int) -> str:
    """The text in lines of at most `width` characters, its own line ends kept."""
    return "\n".join(_Wrapper(max(width, 4)).fill(line) for line in str(text).split("\n"))


def short(value: float) -> str:
    """A number as a label: three digits that count, and the whole part of a large one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def looks(names: Iterable[str]) -> dict[str, tuple[str, str, Any, str]]:
    """Colour, hatch, dash and marker of each name: its meaning's; otherwise such as no meaning among them has."""
    kinds = {name: BREAKER.get(name, name) for name in names}
    own = {name: MEANING[kind] for name, kind in kinds.items() if kind in MEANING}
    colours = [colour for colour in SERIES if colour not in {taken for taken, _ in own.values()}] or SERIES
    hatches = [hatch for hatch in HATCHES if hatch not in {taken for _, taken in own.values()}] or HATCHES
    # The second round of colours has each with another hatch, and with another dash.
    rounds = ((colours[n % len(colours)], hatches[(n + n // len(colours)) % len(hatches)]) for n in itertools.count())
    strokes = ((DASHES[(n + n // 6) % 6], MARKERS[n % 6]) for n in itertools.count())
    return {name: (*(own.get(name) or next(rounds)), *next(strokes)) for name in kinds}


def key(figure: Picture, axes: Any, drawn: Mapping[str, Any], taken: int = 0) -> None:
    """What the marks mean: in a row above `axes`, beside a title of `taken` characters; else to the right of all."""
    if len(drawn) <= 4 and sum(len(name) + 8 for name in drawn) + taken <= 84:
        axes.legend(drawn.values(), drawn, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3)
        return
    names = [wrap(name, 22) for name in drawn]
    figure.set_figheight(max(figure.get_figheight(), 0.8 + 0.22 * "\n".join(["", *names]).count("\n")))
    figure.legend(drawn.values(), names, loc="outside right center")


def lying(axes: Any, names: Iterable[str], unit: str) -> None:
    """Rows from the top, named at the left, of what is measured along them."""
    labels = [wrap(name, 24) for name in names]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel=unit, ylim=(len(labels) - 0.5, -0.5))
    axes.grid(False)
    axes.grid(axis="x")


def inside(axes: Any, x: float, y: float, text: str, share: float) -> bool:
    """Writes in the middle of a bar that has this share of the axes' width, if there is room; says if there was."""
    if room := share * 70 >= len(text) + 1:
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=GROUND)
    return room


def mark_events(panels: Sequence[Any], events: Events) -> None:
    """A vertical line for each moment and a grey ground for each period, named at the top of the first panel."""
    periods = sorted((when if isinstance(when, tuple) else (when, when), name) for name, when in (events or {}).items())
    if not periods:
        return
    first, figure, filled = panels[0], panels[0].figure, list[float]()
    left, right = first.get_xlim()
    first.set_xlim(min([left, *(start for (start, _), _ in periods)]), max([right, *(end for (_, end), _ in periods)]))
    wide, high = 400 if figure.legends else 600, 0.18 * len(panels) / max(figure.get_figheight() - 0.9, 0.5)
    for (start, end), name in periods:
        for axes in panels:
            axes.axvline(start, color=INK, linestyle=(0, (3, 2)), linewidth=1.2, clip_on=False)
            axes.axvspan(start, end, color=DIM, alpha=0.18, linewidth=0, zorder=0)
        # No two names overlap: each goes into the first row that is free where its line is.
        share = (6.8 * len(name) + 8) / wide
        at = max(min(first.transAxes.inverted().transform(first.transData.transform((start, 1)))[0], 1 - share), 0)
        row = next((number for number, until in enumerate(filled) if until <= at), len(filled))
        filled[row : row + 1] = [at + share]
        first.text(at + 4 / wide, 1 - high * row, name, transform=first.transAxes, fontsize=8.5, va="top", bbox=GROUND)
    scale = first.yaxis.get_transform()
    low, top = scale.transform(first.get_ylim())
    first.set_ylim(top=scale.inverted().transform(low + (top - low) / (1 - high * len(filled))))
