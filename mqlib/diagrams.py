"""The figures that are no charts: who did what when, who was in which state, what holds, how a message travels.

Notebooks call them by `plots`, which has them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .style import GROUND, INK, MEANING, Events, Picture, canvas, inside, key, looks, lying, mark_events, short, wrap


class Span(NamedTuple):
    """Work done by somebody from `start` to `end`, in seconds; an instant when they are equal."""

    who: str
    start: float
    end: float
    what: str = "consumed"


def gantt(runs: Mapping[str, Sequence[Span]], title: str, events: Events = None, order: Sequence[str] = ()) -> Picture:
    """Who did what when, one panel a run, on one time axis; `what` of a span is its meaning, hence its colour.

    Rows from the top: those of `order`, then the others by name. An instant is drawn as a marker. `events` names
    moments and periods. Raises `ValueError` without any span.
    """
    spans = [span for run in runs.values() for span in run]
    people = list(dict.fromkeys([*order, *sorted(span.who for span in spans)]))
    figure, panels = canvas(title, runs if spans else {}, height=0.9 + max(1.15, 0.5 + 0.2 * len(people)) * len(runs),
                            rows=len(runs), hollow=True)  # fmt: skip
    last = max(span.end for span in spans) or 1
    look, shown = looks(span.what for span in spans), dict[str, Any]()
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        for who, at, end, what in run:
            (colour, hatch, _, marker), y, size = look[what], people.index(who), end - at
            # A white edge tells neighbours apart, but would cover a span that is only some pixels wide.
            edge = 0.6 if size > last / 150 else 0.15
            if size:
                shown[what] = axes.barh(y, size, 0.7, at, color=colour, hatch=hatch, edgecolor="white", linewidth=edge)
            else:
                (shown[what],) = axes.plot(at, y, marker, color=colour, markersize=8, markeredgecolor="black",
                                           clip_on=False, zorder=3)  # fmt: skip
        lying(axes, people, "seconds since the start" if axes is panels[-1] else "")
        axes.set_xlim(0, last * 1.02)
        axes.set_title(name, fontsize=10, fontweight="normal")
    if len(shown) > 1:
        key(figure, panels[0], shown, taken=len(next(iter(runs))))
    mark_events(panels, events)
    return figure


def states(
    timelines: Mapping[str, Sequence[tuple[float, str]]], end: float, title: str, events: Events = None
) -> Picture:
    """Who was in which state: a row a name, of changes (seconds, new state) in order, the last one up to `end`.

    For owners of partitions, breakers, connections; the states may be samples, too. A breaker's `closed`, `half-open`
    and `open` have fixed colours; an empty state draws nothing. Raises `ValueError` for a name without a change, and
    for times that go back.
    """
    figure, (axes,) = canvas(title, timelines, height=1.0 + max(0.36 * len(timelines), 0.6) + 0.18 * len(events or {}))
    look = looks(state for changes in timelines.values() for _, state in changes if state)
    begin = min(changes[0][0] for changes in timelines.values())
    keyed = dict[str, Any]()
    for y, (name, changes) in enumerate(timelines.items()):
        turns = [next(group) for _, group in itertools.groupby(changes, key=lambda change: change[1])]
        for (at, state), (stop, _) in itertools.pairwise([*turns, (end, "")]):
            if stop < at:
                raise ValueError(f"figure {title!r}: {name!r} is {state!r} from {at} to {stop}: times go back")
            if state:
                colour, hatch, *_ = look[state]
                bar = axes.barh(y, stop - at, 0.7, at, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
                written = inside(axes, (at + stop) / 2, y, state, (stop - at) / (end - begin))
                keyed[state] = None if written else keyed.get(state, bar)
    lying(axes, timelines, "seconds since the start")
    axes.set_xlim(begin, end)
    if unwritten := {state: bar for state, bar in keyed.items() if bar}:
        key(figure, axes, unwritten)
    mark_events([axes], events)
    return figure


def matrix(cells: Mapping[str, Mapping[str, str]], title: str, good: Sequence[str] = ("kept",)) -> Picture:
    """A table of words, `cells[row][column]`; the `good` ones are light, the others dark and hatched."""
    figure, (axes,) = canvas(title, cells, height=0.9 + 0.5 * len(cells))
    columns = list(next(iter(cells.values())))
    for (y, row), (x, column) in itertools.product(enumerate(cells.values()), enumerate(columns)):
        fine = row[column] in good
        axes.barh(y, 1, 1, x, color="#CDE6F5" if fine else MEANING["failed"][0],
                  edgecolor="white", linewidth=2, hatch="" if fine else "///")  # fmt: skip
        axes.text(x + 0.5, y, wrap(row[column], 60 // len(columns)), ha="center", va="center", fontweight="bold",
                  fontsize=10 if len(columns) < 6 else 8.5, bbox=GROUND)  # fmt: skip
    _table(axes, cells, columns)
    return figure


def heatmap(cells: Mapping[str, Mapping[Any, float | str]], title: str, x: str, y: str, unit: str = "") -> Picture:
    """A field of numbers, or of words such as owners: `cells[row][column]`; dark is much.

    `unit` is that of the numbers. A missing cell stays white. Numbers and words are written where there is room.
    """
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    table = {name: [row.get(column) for column in columns] for name, row in cells.items()}
    if any(isinstance(cell, str) for row in table.values() for cell in row):
        words = {name: [(at, str(cell or "")) for at, cell in enumerate(row)] for name, row in table.items()}
        figure = states(words, len(columns), title)
        axes: Any = figure.axes[0]
    else:
        figure, (axes,) = canvas(title, table, height=1.2 + max(0.3 * len(cells), 0.8))
        numbers = np.array(list(table.values()), dtype=float)
        mesh = axes.pcolormesh(np.arange(len(columns) + 1), np.arange(len(cells) + 1) - 0.5, numbers, cmap="Blues",
                               vmin=min(0, np.nanmin(numbers)), edgecolors="white", linewidth=1)  # fmt: skip
        figure.colorbar(mesh, label=unit).outline.set_visible(False)
        for (at, column), number in np.ndenumerate(numbers):
            if len(columns) <= 12 and not np.isnan(number):
                axes.text(column + 0.5, at, short(number), ha="center", va="center", fontsize=8.5,
                          color="white" if mesh.norm(number) > 0.65 else "black")  # fmt: skip
    _table(axes, cells, [f"{column:g}" if isinstance(column, float) else str(column) for column in columns], x, y)
    return figure


def _table(axes: Any, rows: Mapping[str, Any], columns: Sequence[str], x: str = "", y: str = "") -> None:
    """Names of rows and columns, every so many when they are more than 12; no lines."""
    few = range(0, len(columns), -(-len(columns) // 12))
    lying(axes, rows, x)
    axes.set_xticks([at + 0.5 for at in few], [wrap(columns[at], 66 // len(few)) for at in few])
    axes.set(xlim=(0, len(columns)), ylabel=y)
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
            column, -row, wrap(name, room - 2), ha="center", va="center", fontsize=9.5, zorder=3,
            bbox={"boxstyle": f"{shape},pad=0.5", "facecolor": face, "edgecolor": INK, "linestyle": edge},
        )  # fmt: skip
    for start, end, label in arrows:
        (_, x, y), (_, to_x, to_y) = nodes[start], nodes[end]
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 2, "shrinkB": 2}
        ends = {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        axes.annotate("", (to_x, -to_y), (x, -y), arrowprops=arrow | ends)
        axes.text((x + to_x) / 2, -(y + to_y) / 2 + 0.12, wrap(label, room - 3), ha="center", va="bottom", fontsize=8.5,
                  color=INK, bbox=GROUND, zorder=2)  # fmt: skip
    axes.set(xlim=(-0.6, columns + 0.6), ylim=(-rows - 0.6, 0.6))
    axes.axis("off")
    return figure
