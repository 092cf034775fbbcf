"""The benchmarks run, take turns, judge by the median of the rounds' ratios, and say what was missed, and how far."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle
from PIL import Image

import mqlib as mq
from mqlib import cli
from tests.benchmarks import core
from tests.benchmarks.core import Contender, Promise
from tests.conftest import ROOT


class Made:
    """A benchmark whose contenders take their values from lists."""

    def __init__(self, **values: Sequence[float]) -> None:
        self.values, self.turns, self.promises = values, list[str](), dict[str, tuple[Promise, ...]]()

    def measure(self, name: str) -> Callable[[], Awaitable[float]]:
        left = iter(self.values[name])

        async def measure() -> float:
            self.turns.append(name)
            return next(left)

        return measure

    @asynccontextmanager
    async def contenders(self, quick: bool) -> AsyncIterator[list[Contender]]:
        yield [
            Contender(name, self.measure(name), "records/s", self.promises.get(name, ()), rounds=len(values))
            for name, values in self.values.items()
        ]
        self.turns.append("cleaned up")


async def test_contenders_take_turns() -> None:
    """Round after round; one with fewer rounds drops out; what was prepared is cleaned up behind them."""
    made = Made(raw=[1, 2, 3], ours=[4, 5])
    raw, ours = await core.run("made", made, quick=False)
    assert made.turns == ["raw", "ours", "raw", "ours", "raw", "cleaned up"]
    assert (raw.values, ours.values) == ([1, 2, 3], [4, 5])


async def test_a_quick_run_is_one_round() -> None:
    made = Made(raw=[1, 2], ours=[3, 4])
    await core.run("made", made, quick=True)
    assert made.turns == ["raw", "ours", "cleaned up"]


async def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    """A round in which the machine was slow was slow for both. (The medians' ratio would be 90 : 100.)"""
    made = Made(raw=[100, 10, 200], ours=[90, 20, 400])
    _, ours = await core.run("made", made, quick=False)
    assert (ours.reference, ours.ratio) == ("raw", 2)


async def test_promises_are_judged_and_a_miss_says_how_close() -> None:
    """Each in a row of its own: against another contender, and against a figure."""
    made = Made(raw=[100.0] * 3, ours=[90.0] * 3)
    made.promises["ours"] = (Promise("raw", 0.95), Promise("raw", 0.8), Promise(60, 1, "≤"), Promise(180.0, 1, "≤"))
    _, *ours = await core.run("made", made, quick=False)
    assert [(row.reference, row.ratio, row.held) for row in ours] == [
        ("raw", 0.9, False), ("raw", 0.9, True), ("60 records/s", 1.5, False), ("180 records/s", 0.5, True),
    ]  # fmt: skip
    assert ours[0].missed() == "made: ours is 0.9 × raw, promised ≥ 0.95 (5% off)"
    assert ours[2].missed() == "made: ours is 1.5 × 60 records/s, promised ≤ 1 (50% off)"


async def test_the_tables_say_what_was_measured() -> None:
    made = Made(raw=[1000, 2000, 3000], ours=[500, 1000, 1500])
    made.promises["ours"] = (Promise("raw", 0.95),)
    found = await core.run("made", made, quick=False)
    assert core.table(found, judged=True) == [
        "benchmark  contender  median      min – max  unit       ratio  to   promise  held",
        "made       raw         2,000  1,000 – 3,000  records/s",
        "made       ours        1,000    500 – 1,500  records/s   0.50  raw  ≥ 0.95   NO",
    ]
    assert core.markdown(found, judged=False).splitlines()[-1] == (
        "| made | ours | 1,000 | 500 – 1,500 | records/s | 0.50 | raw | ≥ 0.95 |  |"
    )


async def test_the_figure_has_a_bar_for_each_ratio_and_a_mark_for_each_promise() -> None:
    made = Made(raw=[100], ours=[90], other=[300])
    made.promises["ours"] = (Promise("raw", 0.95),)
    picture = core.figure(await core.run("made", made, quick=False), judged=True)
    [axes] = picture.axes
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [0.9, 3]
    assert [line.get_path().get_extents().x0 for line in axes.lines] == [0.95]
    assert picture.get_suptitle() == "0 of 1 promises held"
    assert Image.open(BytesIO(picture._repr_png_())).width == 720


def test_a_quick_run_measures_everything_and_judges_nothing(
    kafka: mq.Kafka, rabbit: mq.RabbitMQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, on the brokers that are there."""
    for name, value in {**kafka.environment, **rabbit.environment}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "mqlib", "bench", "rabbit_take", "ledger", "--quick", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    for row in ("rabbit_take | mq.take_messages", "rabbit_take | consume", "ledger | mq.Ledger", "ledger | … memory"):
        assert f"| {row}" in text
        assert row.replace(" | ", " ") in " ".join(done.stdout.split())
    assert "| yes |" not in text
    assert "| NO |" not in text
    assert "no ratio was judged" in done.stdout
    assert (tmp_path / "out" / "benchmarks.png").stat().st_size > 1000


@pytest.mark.parametrize("name", cli.BENCHMARKS)
def test_every_benchmark_has_contenders(name: str) -> None:
    """What is in the folder can be run: nothing else is taken for a benchmark."""
    assert callable(import_module(f"tests.benchmarks.{name}").contenders)
