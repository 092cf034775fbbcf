"""The figures that are no charts: who did what when, who was in which state, what holds, how a message travels.

Notebooks call them by `plots`, which has them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from .style import MARKERS, MEANING, Event, Picture, canvas, inside, key, mark_events, marks, short, wrap


class Span(NamedTuple):
    """Work done by somebody from `start` to `end`, in seconds; an instant when they are equal."""

    who: str
    start: float
    end: float
    what: str = "consumed"


def gantt(
    runs: Mapping[str, Sequence[Span]], title: str, events: Mapping[str, Event] | None = None
) -> Picture:  # fmt: skip
    """Who did what when, one panel a run, on one time axis; `what` of a span is its meaning, hence its colour.

    An instant is drawn as a marker. `events` names moments and periods. Raises `ValueError` without any span.
    """
    spans = [span for each in runs.values() for span in each]
    people = sorted({span.who for span in spans}, reverse=True)
    figure, panels = canvas(title, runs if spans else {}, height=0.9 + max(1.15, 0.5 + 0.2 * len(people)) * len(runs),
                            rows=len(runs), hollow=True)  # fmt: skip
    last = max(span.end for span in spans) or 1
    look, shown = marks(span.what for span in spans), dict[str, Any]()
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        for who, start, end, what in run:
            colour, hatch = look[what]
            if end == start:
                (shown[what],) = axes.plot(start, people.index(who), MARKERS[list(look).index(what) % len(MARKERS)],
                                           color=colour, markeredgecolor="black", markersize=8)  # fmt: skip
                continue
            shown[what] = axes.barh(
                people.index(who), end - start, left=start, height=0.7, edgecolor="white", color=colour, hatch=hatch,
                # A white edge tells neighbours apart, but would cover a span that is only some pixels wide.
                linewidth=0.6 if end - start > last / 150 else 0.15,
            )  # fmt: skip
        axes.set_yticks(range(len(people)), [wrap(who, 24) for who in people])
        axes.set(ylim=(-0.5, len(people) - 0.5), xlim=(0, last * 1.02))
        axes.set_title(name, fontsize=10, fontweight="normal")
        axes.grid(axis="x")
    panels[-1].set_xlabel("seconds since the start")
    if len(shown) > 1:
        key(figure, panels[0], list(shown.values()), list(shown), taken=len(next(iter(runs))))
    mark_events(panels, events)
    return figure


def _stripes(
    figure: Picture, axes: Any, rows: Mapping[str, Sequence[tuple[float, str]]], begin: float, end: float
) -> None:  # fmt: skip
    """One row of stripes a name, from each change of state to the next; a key for states without room for a word."""
    look = marks(state for changes in rows.values() for _, state in changes if state)
    shown, written = dict[str, Any](), set()
    for y, changes in enumerate(rows.values()):
        # Two equal states after each other are one stripe, so that states may be sampled.
        turns = [next(group) for _, group in itertools.groupby(changes, key=lambda change: change[1])]
        for (start, state), (stop, _) in itertools.pairwise([*turns, (end, "")]):
            if not state:
                continue
            colour, hatch = look[state]
            shown[state] = axes.barh(y, stop - start, left=start, height=0.7, color=colour, hatch=hatch,
                                     edgecolor="white", linewidth=0.6)  # fmt: skip
            if inside(axes, (start + stop) / 2, y, state, (stop - start) / (end - begin)):
                written.add(state)
    axes.set_yticks(range(len(rows)), [wrap(name, 24) for name in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(begin, end))
    if unwritten := [state for state in look if state not in written]:
        key(figure, axes, [shown[state] for state in unwritten], unwritten)


def states(
    timelines: Mapping[str, Sequence[tuple[float, str]]], end: float, title: str,
    events: Mapping[str, Event] | None = None,
) -> Picture:  # fmt: skip
    """Who was in which state: a row a name, of changes (seconds, new state) in order, the last one up to `end`.

    For owners of partitions, breakers, connections. A breaker's `closed`, `half-open` and `open` have fixed colours; an
    empty state draws nothing. Raises `ValueError` for a name without a change, and for a change after `end`.
    """
    figure, (axes,) = canvas(title, timelines, height=1.0 + max(0.36 * len(timelines), 0.6) + 0.18 * len(events or {}))
    times = [moment for changes in timelines.values() for moment, _ in changes]
    if max(times) > end:
        raise ValueError(f"figure {title!r}: a change at {max(times)} is after the end, {end}")
    _stripes(figure, axes, timelines, min(times), end)
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    axes.set_xlabel("seconds since the start")
    mark_events([axes], events)
    return figure


def matrix(cells: Mapping[str, Mapping[str, str]], title: str, good: Sequence[str] = ("kept",)) -> Picture:
    """A table of words, `cells[row][column]`; the `good` ones are light, the others dark and hatched."""
    figure, (axes,) = canvas(title, cells, height=0.9 + 0.5 * len(cells))
    columns = list(next(iter(cells.values())))
    for y, row in enumerate(cells.values()):
        for x, column in enumerate(columns):
            fine = row[column] in good
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor="#CDE6F5" if fine else MEANING["failed"],
                                     edgecolor="white", linewidth=2, hatch="" if fine else "///"))  # fmt: skip
            axes.text(x + 0.5, y + 0.5, wrap(row[column], 60 // len(columns)), ha="center", va="center",
                      fontweight="bold", fontsize=10 if len(columns) < 6 else 8.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.9})  # fmt: skip
    axes.set(xlim=(0, len(columns)), ylim=(len(cells), 0))
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [wrap(name, 66 // len(columns)) for name in columns])
    axes.set_yticks([y + 0.5 for y in range(len(cells))], [wrap(name, 24) for name in cells])
    _frameless(axes)
    return figure


def heatmap(
    cells: Mapping[str, Mapping[Any, float]] | Mapping[str, Mapping[Any, str]], title: str, x: str, y: str,
    unit: str = "",
) -> Picture:  # fmt: skip
    """A field of numbers, or of words such as owners: `cells[row][column]`; dark is much.

    `unit` is that of the numbers. A missing cell stays white. Numbers and words are written where there is room.
    """
    figure, (axes,) = canvas(title, cells, height=1.2 + max(0.3 * len(cells), 0.8))
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    if isinstance(next(iter(next(iter(cells.values())).values())), str):
        words = {name: [(at, str(row.get(column, ""))) for at, column in enumerate(columns)]
                 for name, row in cells.items()}  # fmt: skip
        _stripes(figure, axes, words, 0, len(columns))
    else:
        numbers = np.array([[row.get(column, np.nan) for column in columns] for row in cells.values()], dtype=float)
        mesh = axes.pcolormesh(np.arange(len(columns) + 1), np.arange(len(cells) + 1) - 0.5, numbers, cmap="Blues",
                               vmin=min(0, np.nanmin(numbers)), edgecolors="white", linewidth=1)  # fmt: skip
        figure.colorbar(mesh, label=unit).outline.set_visible(False)
        for (at, column), number in np.ndenumerate(numbers):
            if len(columns) <= 12 and not np.isnan(number):
                axes.text(column + 0.5, at, short(number), ha="center", va="center", fontsize=8.5,
                          color="white" if mesh.norm(number) > 0.55 else "black")  # fmt: skip
        axes.set_yticks(range(len(cells)), [wrap(name, 24) for name in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
    few = range(0, len(columns), -(-len(columns) // 12))
    names = [f"{columns[at]:g}" if isinstance(columns[at], float) else str(columns[at]) for at in few]
    axes.set_xticks([at + 0.5 for at in few], [wrap(name, 66 // len(few)) for name in names])
    axes.set(xlabel=x, ylabel=y)
    _frameless(axes)
    return figure


def _frameless(axes: Any) -> None:
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


KINDS = {"app": ("#F2F2F2", "round", "-"), "exchange": ("#FCE3C0", "round4", "--"), "queue": ("#CDE6F5", "square", "-"),
         "topic": ("#CDE6F5", "square", "-"), "store": ("#D5EBD0", "square", ":")}  # fmt: skip


def topology(
    nodes: Mapping[str, tuple[str, float, float]], arrows: Sequence[tuple[str, str, str]], title: str
) -> Picture:
    """The path of a message: `nodes[name] = (kind, column, row)`, arrows as (from, to, label).

    Kinds are `app`, `exchange`, `queue`, `topic`, `store`; rows count from the top. Raises `KeyError` for another one,
    and for an arrow from or to nowhere.
    """
    columns = max((column for _, column, _ in nodes.values()), default=0.0)
    rows = max((row for *_, row in nodes.values()), default=0.0)
    figure, (axes,) = canvas(title, nodes, height=0.9 + 0.95 * (rows + 1))
    boxes: dict[str, Any] = {}
    room = int(66 / (columns + 1.2))  # characters from the middle of one column to that of the next
    for name, (kind, column, row) in nodes.items():
        face, shape, edge = KINDS[kind]
        boxes[name] = axes.text(
            column, -row, wrap(name, max(room * 3 // 4, 8)), ha="center", va="center", fontsize=9.5, zorder=3,
            bbox={"boxstyle": f"{shape},pad=0.5", "facecolor": face, "edgecolor": "#333333", "linestyle": edge},
        )  # fmt: skip
    for start, end, label in arrows:
        (_, x, y), (_, to_x, to_y) = nodes[start], nodes[end]
        axes.annotate(
            "", xy=(to_x, -to_y), xytext=(x, -y),
            arrowprops={"arrowstyle": "-|>", "color": "#333333", "patchA": boxes[start].get_bbox_patch(),
                        "patchB": boxes[end].get_bbox_patch(), "shrinkA": 2, "shrinkB": 2},
        )  # fmt: skip
        axes.text((x + to_x) / 2, -(y + to_y) / 2 + 0.12, wrap(label, room), ha="center", va="bottom", fontsize=8.5,
                  color="#333333", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.set(xlim=(-0.6, columns + 0.6), ylim=(-rows - 0.6, 0.6))
    axes.axis("off")
    return figure
