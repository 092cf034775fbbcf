"""Contenders take turns in one run (A B C A B C …), so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import Protocol

from mqlib.plots import Picture
from mqlib.style import MEANING, short

ROUNDS = 5
HEADINGS = ("benchmark", "contender", "median", "min – max", "unit", "ratio", "to", "promise", "held")


@dataclass(frozen=True)
class Promise:
    """The ratio to a reference, another contender's name or a fixed figure, is at least or at most `bound`."""

    reference: str | float
    bound: float
    sign: str = "≥"

    def holds(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sign == "≥" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Contender:
    """Who is measured: `measure` is one round, and returns its value in `unit`.

    One that promises nothing is compared with the first of its benchmark, unless it stands `alone`.
    """

    name: str
    measure: Callable[[], Awaitable[float]]
    unit: str
    promises: tuple[Promise, ...] = ()
    rounds: int = ROUNDS
    alone: bool = False


class Benchmark(Protocol):
    """A module of this package. `quick` asks for as few records as show that it works."""

    def contenders(self, quick: bool) -> AbstractAsyncContextManager[Sequence[Contender]]: ...


@dataclass(frozen=True)
class Row:
    """One contender against one reference. The ratio is the median of the rounds' own."""

    benchmark: str
    contender: str
    values: Sequence[float]
    unit: str
    reference: str = ""
    ratio: float | None = None
    promise: Promise | None = None

    @property
    def held(self) -> bool:
        return self.promise is None or self.ratio is None or self.promise.holds(self.ratio)

    def cells(self, judged: bool) -> tuple[str, ...]:
        return (
            self.benchmark, self.contender, short(statistics.median(self.values)),
            f"{short(min(self.values))} – {short(max(self.values))}", self.unit,
            "" if self.ratio is None else times(self.ratio), self.reference, str(self.promise or ""),
            ("yes" if self.held else "NO") if self.promise and judged else "",
        )  # fmt: skip

    def missed(self) -> str:
        """Which promise was not held, and by how much."""
        assert self.promise is not None
        assert self.ratio is not None
        return (
            f"{self.benchmark}: {self.contender} is {self.ratio:.3g} × {self.reference}, promised {self.promise} "
            f"({abs(self.ratio / self.promise.bound - 1):.0%} off)"
        )


def times(ratio: float) -> str:
    """A ratio: two decimals, and two digits of a small one."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def rate(count: int, work: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[float]]:
    """A round that does `count` pieces of work: their number a second."""

    async def measure() -> float:
        start = perf_counter()
        await work()
        return count / (perf_counter() - start)

    return measure


async def run(name: str, benchmark: Benchmark, quick: bool) -> list[Row]:
    """All rounds of one benchmark, as rows of the table."""
    async with benchmark.contenders(quick) as contenders:
        values: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for turn in range(1 if quick else max(contender.rounds for contender in contenders)):
            for contender in contenders:
                if turn < contender.rounds:
                    gc.collect()  # the rubbish of one is not collected in the time of the next
                    values[contender.name].append(await contender.measure())
    return list(rows(name, contenders, values))


def rows(benchmark: str, contenders: Sequence[Contender], values: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """A row for each promise, and one for a contender that promises nothing."""
    first = contenders[0]
    for contender in contenders:
        row = partial(Row, benchmark, contender.name, values[contender.name], contender.unit)
        for promise in contender.promises:
            name, others = str(promise.reference), values.get(str(promise.reference), [])
            if not isinstance(promise.reference, str):
                name, others = f"{promise.reference:,.10g} {contender.unit}", [promise.reference] * ROUNDS
            yield row(name, ratio(values[contender.name], others), promise)
        if not contender.promises and (contender is first or contender.alone):
            yield row()
        elif not contender.promises:
            yield row(first.name, ratio(values[contender.name], values[first.name]))


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, others, strict=False))


def table(found: Sequence[Row], judged: bool) -> list[str]:
    """The rows as text with aligned columns."""
    lines = [HEADINGS, *(row.cells(judged) for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2, 3, 5}
    return [
        "  ".join(f"{cell:{'>' if at in right else '<'}{widths[at]}}" for at, cell in enumerate(line)).rstrip()
        for line in lines
    ]


def markdown(found: Sequence[Row], judged: bool) -> str:
    """The same table in Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells(judged) for row in found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(found: Sequence[Row], judged: bool) -> Picture:
    """A bar for each ratio, and a mark where its promise begins."""
    shown = [(row, row.ratio) for row in found if row.ratio is not None]
    picture = Picture(figsize=(7.2, 1.1 + 0.24 * len(shown) + 0.24 * len({row.benchmark for row, _ in shown})))
    axes = picture.subplots()
    place, ticks = 0.0, []
    for benchmark, members in groupby(shown, key=lambda each: each[0].benchmark):
        axes.text(0.0, place + 0.1, benchmark, transform=axes.get_yaxis_transform(), fontweight="bold", fontsize=8)
        for row, value in members:
            place += 1
            ticks.append((place, f"{row.contender} : {row.reference}"))
            meaning = "neutral" if row.promise is None or not judged else "fixed" if row.held else "failed"
            colour, hatch = MEANING[meaning]
            axes.barh(place, value, 0.7, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            clear = max(value, row.promise.bound) if row.promise else value
            axes.annotate(times(value), (clear, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
            if row.promise:
                axes.plot([row.promise.bound] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        place += 1
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.set(ylim=(place - 0.3, -0.6), xscale="log", xlabel="ratio; the black mark is what is promised")
    axes.grid(axis="x")
    axes.margins(x=0.1)
    held = [row.held for row, _ in shown if row.promise]
    title = f"{sum(held)} of {len(held)} promises held" if judged else "A quick run: nothing is judged"
    picture.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return picture
