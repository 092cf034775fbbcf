"""What all figures share: a palette with one colour a meaning, marks that survive a black-and-white print, the page."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

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
# A circuit breaker looks the same in every notebook: work flows, is tried, does not flow.
BREAKER = {"closed": "consumed", "half-open": "redelivered", "open": "failed"}

STYLE = {
    "figure.figsize": (7.2, 3.2), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#DDDDDD", "axes.axisbelow": True, "legend.frameon": False, "hatch.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=SERIES),
}  # fmt: skip

Event = float | tuple[float, float]
"""A moment on the axis of time, or a period from one to another."""


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


def canvas(
    title: str, values: Mapping[str, Any], height: float = 3.2, rows: int = 1, columns: int = 1, hollow: bool = False
) -> tuple[Picture, list[Any]]:
    """A picture with its finding above it, and its panels.

    Raises `ValueError` when there are no `values`, or when one of them is an empty collection and not `hollow`.
    """
    empty = [name for name, members in values.items() if isinstance(members, Sized) and not len(members)]
    if not values or (empty and not hollow):
        raise ValueError(f"figure {title!r}: " + (f"{empty[0]!r} is empty" if empty else "there is nothing to draw"))
    lines = textwrap.wrap(title, 76)
    figure = Picture(figsize=(7.2, height + 0.19 * max(len(lines) - 1, 0)))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1)
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis in (axis for axes in panels.flat for axis in (axes.xaxis, axes.yaxis)):
        axis.set_major_formatter("{x:,.10g}")
    return figure, list(panels.flat)


def wrap(text: object, width: int) -> str:
    """The text in lines of at most `width` characters, its own line ends kept."""
    return "\n".join(textwrap.fill(line, max(width, 4)) for line in str(text).split("\n"))


def short(value: float) -> str:
    """A number as a label: three digits that count, and the whole part of a large one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def colours(names: Iterable[str]) -> list[str]:
    """A colour for each name: its meaning's; otherwise one that no meaning here has."""
    meant = [MEANING.get(name) for name in names]
    others = itertools.cycle([colour for colour in SERIES if colour not in meant] or SERIES)
    return [colour or next(others) for colour in meant]


def marks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a hatch for each name, in the order of their first appearance; no two names share both."""
    known = {name: BREAKER.get(name, name) for name in names}
    fixed = {name: (MEANING[kind], HATCH_OF[kind]) for name, kind in known.items() if kind in MEANING}
    pairs = ((SERIES[n % 6], HATCHES[(n + n // 6) % 6]) for n in range(36))
    taken = {colour for colour, _ in fixed.values()}
    free = itertools.cycle([pair for pair in pairs if pair[0] not in taken])
    return {name: fixed.get(name) or next(free) for name in known}


def key(figure: Picture, axes: Any, handles: Sequence[Any], names: Sequence[str], taken: int = 0) -> None:
    """What the marks mean: in a row above `axes`, beside a title of `taken` characters; else to the right of all."""
    if len(names) <= 4 and sum(len(name) + 6 for name in names) + taken <= 92:
        axes.legend(handles, names, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3)
        return
    names = [wrap(name, 22) for name in names]
    figure.set_figheight(max(figure.get_figheight(), 0.8 + 0.19 * sum(name.count("\n") + 1 for name in names)))
    figure.legend(handles, names, loc="outside right center")


def inside(axes: Any, x: float, y: float, text: str, share: float, **style: Any) -> bool:
    """Writes in the middle of a bar that has this share of the axes' width, if there is room; says if there was."""
    if share * 70 < len(text) + 1:
        return False
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}, **style)  # fmt: skip
    return True


def mark_events(panels: Sequence[Any], events: Mapping[str, Event] | None) -> None:
    """A vertical line for each moment and a grey ground for each period, named at the top of the first panel."""
    periods = sorted((when if isinstance(when, tuple) else (when, when), name) for name, when in (events or {}).items())
    if not periods:
        return
    first = panels[0]
    moments = [moment for period, _ in periods for moment in period]
    first.set_xlim(min(first.get_xlim()[0], *moments), max(first.get_xlim()[1], *moments))
    for axes, ((start, end), _) in itertools.product(panels, periods):
        if end > start:
            axes.axvspan(start, end, color=MEANING["neutral"], alpha=0.18, linewidth=0, zorder=0)
        axes.axvline(start, color="#333333", linestyle=(0, (3, 2)), linewidth=1)
    rows: list[float] = []  # how far each row of names is filled, as a share of the width
    places = []
    for (start, _), name in periods:
        at = first.transAxes.inverted().transform(first.transData.transform((start, 1)))[0]
        width = 0.0125 * len(name) + 0.015
        left = at - width if at + width > 1 else at
        row = next((number for number, filled in enumerate(rows) if filled <= left), len(rows))
        rows[row : row + 1] = [left + width]
        places.append((start, name, "right" if left < at else "left", row))
    height = 0.18 * len(panels) / max(first.figure.get_figheight() - 0.9, 0.5)
    scale = first.yaxis.get_transform()
    low, high = scale.transform(first.get_ylim())
    first.set_ylim(top=scale.inverted().transform(low + (high - low) / (1 - height * len(rows))))
    for start, name, side, row in places:
        first.annotate(
            name, (start, 1 - height * row), xycoords=first.get_xaxis_transform(), fontsize=8.5, ha=side, va="top",
            xytext=(-3 if side == "right" else 3, -1), textcoords="offset points", zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9},
        )  # fmt: skip
