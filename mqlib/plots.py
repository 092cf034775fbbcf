"""The figures of the notebooks: every function draws one kind, and its `title` states the finding.

In a notebook the figure shows itself as the value of its cell. The diagrams are in `diagrams`, the palette in `style`.
Every function raises `ValueError` when there is nothing to draw, and says what was empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .diagrams import Span, gantt, heatmap, matrix, states, topology
from .style import DIM, MEANING, Events, Picture, canvas, inside, key, looks, lying, mark_events, short, use_style, wrap

Curve = tuple[Sequence[float], Sequence[float]]
"""x values and y values, as many."""
Panel = tuple[str, Sequence[float], Sequence[float]]


def _finish(
    axes: Any, x: str, y: str, drawn: dict[str, Any], log_x: bool = False, log_y: bool = False, events: Events = None
) -> Picture:
    """Names and scales the axes, y from zero unless something is below; adds the key and the events."""
    figure: Picture = axes.figure
    axes.set(xlabel=x, ylabel=y)
    if log_x:
        axes.set_xscale("log")
    elif not axes.dataLim.width > 0:  # no point yet, or one
        axes.set_xlim(start := np.nan_to_num(axes.dataLim.x0, posinf=0), start + 1)
    elif axes.dataLim.x1 >= 1e6:
        axes.locator_params("x", nbins=5)  # for long numbers
    if log_y:
        axes.set_yscale("log")
    elif min(axes.dataLim.y0, 0) == 0:
        axes.set_ylim(0, None if axes.dataLim.y1 > 0 else 1)
    if len(drawn) > 1:
        key(figure, axes, drawn)
    mark_events([axes], events)
    return figure


def bars(
    values: Mapping[str, float], title: str, unit: str, meanings: Sequence[str] = (), log: bool = False,
    decimals: int = 0,
) -> Picture:  # fmt: skip
    """One bar a name, with its value on it; more than eight, or with long words below them, lie.

    `meanings` names each bar's colour; `log` is for values far apart. Raises `ValueError` for a meaning without a
    colour, and for more or fewer of them than values.
    """
    if meanings and (len(meanings) != len(values) or not set(meanings) <= set(MEANING)):
        raise ValueError(f"figure {title!r}: {len(values)} bars need as many meanings of {', '.join(MEANING)}; "
                         f"got {', '.join(meanings)}")  # fmt: skip
    room = 72 // max(len(values), 1)  # characters
    flat = len(values) > 8 or max(map(len, re.split(r"[\s._/-]", " ".join(values)))) > room
    figure, (axes,) = canvas(title, values, height=1.0 + 0.28 * len(values) if flat else 3.2)
    look = looks(meanings or values)
    drawn = (axes.barh if flat else axes.bar)(
        range(len(values)), list(values.values()), 0.6, edgecolor="white", linewidth=0,
        color=[look[name][0] for name in meanings or values],
        hatch=[hatch for _, hatch, *_ in looks(map(str, range(len(values)))).values()],  # one meaning, several bars
    )  # fmt: skip
    if log:  # and yet from zero, for a bar may be of nothing
        least = min((value for value in values.values() if value > 0), default=1)
        (axes.set_xscale if flat else axes.set_yscale)("symlog", linthresh=least)
    axes.bar_label(drawn, [f"{value:,.{decimals}f}" for value in values.values()], fontsize=9, padding=2)
    axes.margins(**{"x" if flat else "y": 0.15})
    if flat:
        lying(axes, values, unit)
        return figure
    axes.set_xticks(range(len(values)), [wrap(name, room) for name in values])
    return _finish(axes, "", unit, {})


def grouped(values: Mapping[str, Mapping[str, float]], title: str, unit: str, x: str = "") -> Picture:
    """Groups of bars: `values[series][group]`. For a comparison of a few series over a few groups."""
    _, (axes,) = canvas(title, values)
    groups = list(next(iter(values.values())))
    width, drawn = 0.8 / len(values), {}
    for index, (name, (colour, hatch, *_)) in enumerate(looks(values).items()):
        places = [place + (index - (len(values) - 1) / 2) * width for place in range(len(groups))]
        sizes = [values[name][group] for group in groups]
        drawn[name] = axes.bar(places, sizes, width * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        upright = len(f"{max(sizes):,.0f}") * len(values) * len(groups) > 70
        axes.bar_label(drawn[name], fmt="{:,.0f}", fontsize=8, padding=2, rotation=90 if upright else 0)
    axes.set_xticks(range(len(groups)), [wrap(group, 72 // len(groups)) for group in groups])
    axes.margins(y=0.2 if upright else 0.15)
    return _finish(axes, x, unit, drawn)


def shares(values: Mapping[str, Mapping[str, float]], title: str, unit: str) -> Picture:
    """What each whole consists of: `values[group][part]`, one flat bar a group; a part that is missing counts as 0.

    For records per partition and member, or tasks in time, late and shed. Small parts bear no number.
    """
    figure, (axes,) = canvas(title, values, height=1.1 + max(0.42 * len(values), 0.8))
    longest = max(sum(members.values()) for members in values.values()) or 1
    rows, ends, drawn = range(len(values)), [0.0] * len(values), {}
    for part, (colour, hatch, *_) in looks(part for members in values.values() for part in members).items():
        sizes = [members.get(part, 0) for members in values.values()]
        drawn[part] = axes.barh(rows, sizes, 0.65, ends, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
        for row, size in zip(rows, sizes, strict=True):
            inside(axes, ends[row] + size / 2, row, short(size), size / longest)
            ends[row] += size
    lying(axes, values, unit)
    axes.set_xlim(0, longest)
    key(figure, axes, drawn)
    return figure


def lines(
    series: Mapping[str, Curve], title: str, x: str, y: str, log_x: bool = False, log_y: bool = False,
    steps: bool = False, events: Events = None, band: Mapping[str, Curve] | None = None,
) -> Picture:  # fmt: skip
    """One line a name, from its x and y values; told apart by colour, marker and dash. `steps` for counts over time.

    `events` names moments and periods on the x axis; `band[name]` is the range around that line, as (low, high) values:
    say in `y` what it is. A series may still be empty.
    """
    _, (axes,) = canvas(title, series, hollow=True)
    drawn = {}
    for name, (colour, _, dash, marker) in looks(series).items():
        xs, ys = series[name]
        (drawn[name],) = axes.plot(xs, ys, color=colour, linestyle=dash, marker=marker, markersize=5,
                                   markevery=1 if len(xs) <= 30 else len(xs) // 12,
                                   drawstyle="steps-post" if steps else None)  # fmt: skip
        if band and name in band:
            axes.fill_between(xs, *band[name], color=colour, alpha=0.2, linewidth=0, step="post" if steps else None)
    return _finish(axes, x, y, drawn, log_x, log_y, events=events)


def areas(series: Mapping[str, Curve], title: str, x: str, y: str, events: Events = None) -> Picture:
    """What a sum consists of over time: the series on each other, the first one at the bottom; `events` as in `lines`.

    All have the same x values, or `ValueError` is raised. They may still be empty.
    """
    _, (axes,) = canvas(title, series, hollow=True)
    xs = list(next(iter(series.values()))[0])
    if odd := [name for name, (others, _) in series.items() if list(others) != xs]:
        raise ValueError(f"figure {title!r}: {odd[0]!r} has other x values than {next(iter(series))!r}")
    colours, hatches, *_ = zip(*looks(series).values(), strict=True)
    drawn = axes.stackplot(xs, *(ys for _, ys in series.values()), colors=colours, hatch=hatches, edgecolor="white",
                           linewidth=0.6)  # fmt: skip
    axes.margins(x=0)
    return _finish(axes, x, y, dict(zip(series, drawn, strict=True)), events=events)


def pair(left: Panel, right: Panel, title: str, x: str) -> Picture:
    """Two quantities over the same setting, side by side: each panel is (name and unit, x values, y values)."""
    figure, panels = canvas(title, {name: xs for name, xs, _ in (left, right)}, columns=2)
    for axes, (name, xs, ys), (colour, _, dash, mark) in zip(panels, (left, right), looks("lr").values(), strict=True):
        axes.plot(range(len(xs)), ys, color=colour, marker=mark, linestyle=dash)
        axes.set_xticks(range(len(xs)), map(str, xs), rotation=45 if len(" ".join(map(str, xs))) > 30 else 0)
        axes.set_title(wrap(name, 48), fontsize=10, fontweight="normal")
        _finish(axes, x, "", {})
    return figure


def boxes(samples: Mapping[str, Sequence[float]], title: str, unit: str, log: bool = False) -> Picture:
    """The spread of each sample: median, quartiles, 5th to 95th percentile."""
    _, (axes,) = canvas(title, samples)
    drawn = axes.boxplot(list(samples.values()), tick_labels=[wrap(name, 72 // len(samples)) for name in samples],
                         whis=(5, 95), showfliers=False, patch_artist=True, widths=0.5,
                         medianprops={"color": "black", "linewidth": 1.5})  # fmt: skip
    for box, (colour, hatch, *_) in zip(drawn["boxes"], looks(samples).values(), strict=True):
        box.set(facecolor=colour, hatch=hatch, alpha=0.85)
    axes.xaxis.label.set(fontsize=8, color=DIM)
    return _finish(axes, "box: quartiles, whiskers: 5 to 95 %", unit, {}, log_y=log)


def ecdf(
    samples: Mapping[str, Sequence[float] | Curve], title: str, unit: str, log: bool = True,
    mark: Sequence[float] = (50, 99), mean: bool = False,
) -> Picture:  # fmt: skip
    """How large a share of the messages took at most that long; the percentiles in `mark` stand out, `mean` on request.

    A sample is its values, or a pair (values, shares from 0 to 1), both rising, as a histogram gives them. Raises
    `ValueError` for shares above 1.
    """
    figure, (axes,) = canvas(title, samples)
    drawn, means = {}, {}
    for name, (colour, _, dash, marker) in looks(samples).items():
        sample: Any = samples[name]
        if not (isinstance(sample, tuple) and np.ndim(sample[0])):
            sample = np.sort(sample), np.arange(1, len(sample) + 1) / len(sample)
        values, parts = map(np.asarray, sample)
        if not len(values) or parts[-1] > 1:
            raise ValueError(f"figure {title!r}: {name!r} " + ("has shares above 1" if len(values) else "is empty"))
        at = values[np.searchsorted(parts, np.divide(mark, 100)).clip(max=len(values) - 1)]
        axes.plot(at, mark, marker, color=colour, markeredgecolor="black", markersize=7, zorder=3)
        label = f"{name}: " + ", ".join(f"p{rank:g} {short(x)}" for rank, x in zip(mark, at, strict=True))
        (drawn[label],) = axes.plot([values[0], *values], [0, *(100 * parts)], color=colour, linestyle=dash,
                                    marker=marker, markevery=[], drawstyle="steps-post")  # fmt: skip
        average = float(np.average(values, weights=np.diff(parts, prepend=0)))
        means[f"mean {short(average)}" + (f" ({name})" if len(samples) > 1 else "")] = average
    # Of percentiles close together, such as 99 and 99.9, only the highest has room for its line.
    axes.set(ylim=(0, 104), yticks=[0, *(rank for rank in mark if not any(0 < other - rank < 7 for other in mark))])
    key(figure, axes, drawn)
    return _finish(axes, unit, "messages at or below, %", {}, log, events=means if mean else None)


def histogram(
    samples: Mapping[str, Sequence[float]], title: str, unit: str, y: str = "messages", log: bool = False,
    bins: int = 30,
) -> Picture:  # fmt: skip
    """How many values lie in each of the common `bins`, one outline a sample; `y` is what was counted."""
    _, (axes,) = canvas(title, samples)
    scaled = {name: np.log10(values) if log else np.asarray(values) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(scaled.values())), bins)
    drawn = {}
    for name, (colour, _, dash, _) in looks(samples).items():
        counts, places = np.histogram(scaled[name], edges)[0], 10**edges if log else edges
        axes.stairs(counts, places, fill=True, color=colour, alpha=0.25)
        drawn[name] = axes.stairs(counts, places, color=colour, linewidth=2, linestyle=dash)
    return _finish(axes, unit, y, drawn, log)


def scatter(series: Mapping[str, Curve], title: str, x: str, y: str, diagonal: bool = False) -> Picture:
    """One kind of point a name, from its x and y values; `diagonal` draws y = x, where both agree. May be empty."""
    _, (axes,) = canvas(title, series, hollow=True)
    drawn = {}
    for name, (colour, _, _, marker) in looks(series).items():
        (drawn[name],) = axes.plot(*series[name], marker, color=colour, markersize=5.5, markeredgecolor="white",
                                   markeredgewidth=0.4, clip_on=False, zorder=3)  # fmt: skip
    if diagonal:
        drawn["y = x"] = axes.axline((0, 0), slope=1, color=DIM, linestyle="--", linewidth=1)
    axes.grid(axis="x")
    return _finish(axes, x, y, drawn)


__all__ = [
    "Picture", "Span", "areas", "bars", "boxes", "ecdf", "gantt", "grouped", "heatmap", "histogram", "lines", "matrix",
    "pair", "scatter", "shares", "states", "topology", "use_style",
]  # fmt: skip
