"""The figures of the notebooks: every function draws one kind, and its `title` states the finding.

In a notebook the figure shows itself as the value of its cell. The diagrams are in `diagrams`, the palette in `style`.
Every function raises `ValueError` when there is nothing to draw, and says what was empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .diagrams import Span, gantt, heatmap, matrix, states, topology
from .style import (
    DASHES,
    HATCHES,
    MARKERS,
    MEANING,
    SERIES,
    Event,
    Picture,
    canvas,
    colours,
    inside,
    key,
    mark_events,
    short,
    use_style,
    wrap,
)  # fmt: skip

Curve = tuple[Sequence[float], Sequence[float]]
"""x values and y values, as many."""
Panel = tuple[str, Sequence[float], Sequence[float]]


def _dash(index: int) -> Any:
    return DASHES[(index + index // len(SERIES)) % len(DASHES)]  # the seventh line differs from the first


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _hatch(index: int) -> str:
    return HATCHES[(index + index // len(SERIES)) % len(HATCHES)]


def _from_zero(axes: Any) -> None:
    """Lengths can only be compared from zero; and nothing yet, or nothing but zeros, is drawn from 0 to 1."""
    if axes.dataLim.y0 >= 0 or not axes.dataLim.y1 > 0:
        axes.set_ylim(bottom=min(0, axes.dataLim.y0) if np.isfinite(axes.dataLim.y0) else 0)
    if not np.isfinite(axes.dataLim.y1) or axes.dataLim.y0 == axes.dataLim.y1 == 0:
        axes.set_ylim(0, 1)


def bars(
    values: Mapping[str, float], title: str, unit: str, meanings: Sequence[str] = (), log: bool = False,
    decimals: int = 0,
) -> Picture:  # fmt: skip
    """One bar a name, with its value on it; more than eight lie. `meanings` names each bar's colour; `log` for values
    far apart.

    Raises `ValueError` for a meaning without a colour, and when there are not as many as values.
    """
    if meanings and (len(meanings) != len(values) or not set(meanings) <= set(MEANING)):
        raise ValueError(f"figure {title!r}: {len(values)} bars need as many meanings of {', '.join(MEANING)}; "
                         f"got {', '.join(meanings)}")  # fmt: skip
    lying = len(values) > 8
    figure, (axes,) = canvas(title, values, height=1.0 + 0.28 * len(values) if lying else 3.2)
    (axes.barh if lying else axes.bar)(
        range(len(values)), list(values.values()), 0.6, color=colours(meanings or values), edgecolor="white",
        hatch=[_hatch(index) for index in range(len(values))], linewidth=0,
    )  # fmt: skip
    axis, scale = (axes.xaxis, axes.set_xscale) if lying else (axes.yaxis, axes.set_yscale)
    axes.margins(**{"x" if lying else "y": 0.15})
    if log:
        scale("log")
    low = axis.get_view_interval()[0]
    for index, value in enumerate(values.values()):
        height = max(value, low)  # on a logarithmic axis nothing is at 0
        axes.annotate(f"{value:,.{decimals}f}", (height, index) if lying else (index, height), fontsize=9,
                      xytext=(3, 0) if lying else (0, 2), textcoords="offset points",
                      ha="left" if lying else "center", va="center" if lying else "bottom")  # fmt: skip
    names = [wrap(name, 30 if lying else 72 // len(values)) for name in values]
    if lying:
        axes.set_yticks(range(len(values)), names)
        axes.set(xlabel=unit, ylim=(len(values) - 0.5, -0.5))
        axes.grid(axis="x")
        axes.grid(False, axis="y")
    else:
        axes.set_xticks(range(len(values)), names)
        axes.set_ylabel(unit)
    return figure


def grouped(values: Mapping[str, Mapping[str, float]], title: str, unit: str, x: str = "") -> Picture:
    """Groups of bars: `values[series][group]`. For a comparison of a few series over a few groups."""
    figure, (axes,) = canvas(title, values)
    groups = list(next(iter(values.values())))
    width = 0.8 / len(values)
    drawn = []
    for index, (members, colour) in enumerate(zip(values.values(), colours(values), strict=True)):
        places = [place + (index - (len(values) - 1) / 2) * width for place in range(len(groups))]
        drawn.append(axes.bar(places, [members[group] for group in groups], width * 0.92, linewidth=0, color=colour,
                              edgecolor="white", hatch=_hatch(index)))  # fmt: skip
        texts = [f"{members[group]:,.0f}" for group in groups]
        upright = max(map(len, texts)) * len(values) * len(groups) > 70
        axes.bar_label(drawn[-1], texts, fontsize=8, padding=2, rotation=90 if upright else 0)
    axes.set_xticks(range(len(groups)), [wrap(group, 72 // len(groups)) for group in groups])
    axes.set(xlabel=x, ylabel=unit)
    axes.margins(y=0.15)
    key(figure, axes, drawn, list(values))
    return figure


def shares(values: Mapping[str, Mapping[str, float]], title: str, unit: str) -> Picture:
    """What each whole consists of: `values[group][part]`, one lying bar a group; a part that is missing counts as 0.

    For records per partition and member, or tasks in time, late and shed.
    """
    figure, (axes,) = canvas(title, values, height=1.1 + max(0.42 * len(values), 0.8))
    parts = list(dict.fromkeys(part for members in values.values() for part in members))
    longest = max(sum(members.values()) for members in values.values()) or 1
    ends, drawn = [0.0] * len(values), []
    for index, (part, colour) in enumerate(zip(parts, colours(parts), strict=True)):
        sizes = [members.get(part, 0) for members in values.values()]
        drawn.append(axes.barh(range(len(values)), sizes, 0.65, left=ends, color=colour, hatch=_hatch(index),
                               edgecolor="white", linewidth=0.6))  # fmt: skip
        for row, size in enumerate(sizes):
            if size:
                inside(axes, ends[row] + size / 2, row, short(size), size / longest)
            ends[row] += size
    axes.set_yticks(range(len(values)), [wrap(group, 24) for group in values])
    axes.set(xlabel=unit, xlim=(0, longest), ylim=(len(values) - 0.5, -0.5))
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    key(figure, axes, drawn, parts)
    return figure


def lines(
    series: Mapping[str, Curve], title: str, x: str, y: str, log_x: bool = False, log_y: bool = False,
    steps: bool = False, events: Mapping[str, Event] | None = None, band: Mapping[str, Curve] | None = None,
) -> Picture:  # fmt: skip
    """One line a name, from its x and y values; told apart by colour, marker and dash. `steps` for counts over time.

    `events` names moments and periods on the x axis; `band[name]` is the range around that line, as (low, high) values:
    say in `y` what it is. A series may still be empty.
    """
    figure, (axes,) = canvas(title, series, hollow=True)
    drawn = []
    for index, ((name, (xs, ys)), colour) in enumerate(zip(series.items(), colours(series), strict=True)):
        drawn += axes.plot(xs, ys, color=colour, linestyle=_dash(index), marker=_marker(index), markersize=5,
                           markevery=1 if len(xs) <= 30 else len(xs) // 12,
                           drawstyle="steps-post" if steps else "default")  # fmt: skip
        if band and name in band:
            axes.fill_between(xs, *band[name], color=colour, alpha=0.2, linewidth=0, step="post" if steps else None)
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    if not log_y:
        _from_zero(axes)
    if len(series) > 1:
        key(figure, axes, drawn, list(series))
    mark_events([axes], events)
    return figure


def areas(
    series: Mapping[str, Curve], title: str, x: str, y: str, events: Mapping[str, Event] | None = None
) -> Picture:  # fmt: skip
    """What a sum consists of over time: the series on each other, the first one at the bottom; `events` as in `lines`.

    All have the same x values, or `ValueError` is raised. They may still be empty.
    """
    figure, (axes,) = canvas(title, series, hollow=True)
    xs = list(next(iter(series.values()))[0])
    if odd := [name for name, (others, _) in series.items() if list(others) != xs]:
        raise ValueError(f"figure {title!r}: {odd[0]!r} has other x values than {next(iter(series))!r}")
    drawn = axes.stackplot(xs, *(ys for _, ys in series.values()), colors=colours(series), edgecolor="white",
                           linewidth=0.6, hatch=[_hatch(index) for index in range(len(series))])  # fmt: skip
    axes.set(xlabel=x, ylabel=y)
    axes.margins(x=0)
    _from_zero(axes)
    key(figure, axes, drawn, list(series))
    mark_events([axes], events)
    return figure


def pair(left: Panel, right: Panel, title: str, x: str) -> Picture:
    """Two quantities over the same setting, side by side: each panel is (name and unit, x values, y values)."""
    figure, panels = canvas(title, {name: xs for name, xs, _ in (left, right)}, columns=2)
    for index, (axes, (name, xs, ys)) in enumerate(zip(panels, (left, right), strict=True)):
        axes.plot(range(len(xs)), ys, color=SERIES[index], marker=_marker(index), linestyle=_dash(index))
        axes.set_xticks(range(len(xs)), [str(value) for value in xs])
        axes.set_title(wrap(name, 48), fontsize=10, fontweight="normal")
        axes.set_xlabel(x)
        _from_zero(axes)
    return figure


def boxes(samples: Mapping[str, Sequence[float]], title: str, unit: str, log: bool = False) -> Picture:
    """The spread of each sample: median, quartiles, 5th to 95th percentile."""
    figure, (axes,) = canvas(title, samples)
    drawn = axes.boxplot(list(samples.values()), tick_labels=[wrap(name, 72 // len(samples)) for name in samples],
                         whis=(5, 95), showfliers=False, patch_artist=True, widths=0.5,
                         medianprops={"color": "black", "linewidth": 1.5})  # fmt: skip
    for index, (box, colour) in enumerate(zip(drawn["boxes"], colours(samples), strict=True)):
        box.set(facecolor=colour, hatch=_hatch(index), alpha=0.85)
    axes.set_ylabel(unit)
    axes.set_xlabel("box: quartiles, whiskers: 5 to 95 %", fontsize=8, color=MEANING["neutral"])
    if log:
        axes.set_yscale("log")
    else:
        _from_zero(axes)
    return figure


def ecdf(
    samples: Mapping[str, Sequence[float] | Curve], title: str, unit: str, log: bool = True,
    mark: Sequence[float] = (50, 99), mean: bool = False,
) -> Picture:  # fmt: skip
    """How large a share of the messages took at most that long; the percentiles in `mark` stand out, `mean` on request.

    A sample is its values, or a pair (values, shares from 0 to 1), both rising, as a histogram gives them.
    """
    figure, (axes,) = canvas(title, samples)
    drawn, names, means = [], [], {}
    for index, ((name, sample), colour) in enumerate(zip(samples.items(), colours(samples), strict=True)):
        if isinstance(sample, tuple) and np.ndim(sample[0]):
            values, parts = np.asarray(sample[0], dtype=float), np.asarray(sample[1], dtype=float)
        else:
            values = np.sort(np.asarray(sample, dtype=float))
            parts = np.arange(1, len(values) + 1) / len(values)
        if not len(values) or parts[-1] > 1:
            raise ValueError(f"figure {title!r}: {name!r} " + ("has shares above 1" if len(values) else "is empty"))
        drawn += axes.plot([values[0], *values], [0, *(100 * parts)], color=colour, linestyle=_dash(index),
                           marker=_marker(index), markevery=[], drawstyle="steps-post")  # fmt: skip
        ranks = [values[min(int(np.searchsorted(parts, rank / 100)), len(values) - 1)] for rank in mark]
        axes.plot(ranks, mark, _marker(index), color=colour, markeredgecolor="black", markersize=7, zorder=3)
        names.append(f"{name}: " + ", ".join(f"p{rank:g} {short(at)}" for rank, at in zip(mark, ranks, strict=True)))
        average = float(np.average(values, weights=np.diff(parts, prepend=0)))
        means[f"mean {short(average)}" + (f" ({name})" if len(samples) > 1 else "")] = average
    above = 0.0
    for rank in sorted(mark):
        axes.axhline(rank, color=MEANING["neutral"], linestyle=(0, (1, 2)), linewidth=1)
        above = max(rank, above)
        axes.annotate(f"p{rank:g}", (1, above), xycoords=axes.get_yaxis_transform(), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False)  # fmt: skip
        above += 7
    axes.set(xlabel=unit, ylabel="messages at or below, %", ylim=(0, 104), xscale="log" if log else "linear")
    axes.set_yticks(range(0, 101, 25))
    key(figure, axes, drawn, names)
    mark_events([axes], means if mean else None)
    return figure


def histogram(
    samples: Mapping[str, Sequence[float]], title: str, unit: str, y: str = "messages", log: bool = False,
    bins: int = 30,
) -> Picture:  # fmt: skip
    """How many values lie in each of the common `bins`, one outline a sample; `y` is what was counted."""
    figure, (axes,) = canvas(title, samples)
    scaled = {name: np.log10(values) if log else np.asarray(values) for name, values in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(scaled.values())), bins)
    drawn = []
    for index, (values, colour) in enumerate(zip(scaled.values(), colours(samples), strict=True)):
        counts, places = np.histogram(values, edges)[0], 10**edges if log else edges
        axes.stairs(counts, places, fill=True, color=colour, alpha=0.25)
        drawn.append(axes.stairs(counts, places, color=colour, linewidth=2, linestyle=_dash(index)))
    axes.set(xlabel=unit, ylabel=y, xscale="log" if log else "linear")
    if len(samples) > 1:
        key(figure, axes, drawn, list(samples))
    return figure


def scatter(series: Mapping[str, Curve], title: str, x: str, y: str, diagonal: bool = False) -> Picture:
    """One kind of point a name, from its x and y values; `diagonal` draws y = x, where both agree. May be empty."""
    figure, (axes,) = canvas(title, series, hollow=True)
    drawn = [
        axes.scatter(xs, ys, 30 if len(xs) <= 150 else 12, color=colour, marker=_marker(index), edgecolor="white",
                     linewidth=0.4, zorder=3)
        for index, ((xs, ys), colour) in enumerate(zip(series.values(), colours(series), strict=True))
    ]  # fmt: skip
    names = list(series)
    if diagonal:
        drawn.append(axes.axline((0, 0), slope=1, color=MEANING["neutral"], linestyle="--", linewidth=1))
        names.append("y = x")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="x")
    if len(names) > 1:
        key(figure, axes, drawn, names)
    return figure


__all__ = [
    "Picture", "Span", "areas", "bars", "boxes", "ecdf", "gantt", "grouped", "heatmap", "histogram", "lines", "matrix",
    "pair", "scatter", "shares", "states", "topology", "use_style",
]  # fmt: skip
