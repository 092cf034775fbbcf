"""Figures that change: what is drawn, what stays, and that the process that draws leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

import mqlib as mq
from mqlib import live as subject
from mqlib import plots
from mqlib.execute import execute, save_outputs
from mqlib.live import Live, live, what_if
from tests.conftest import ROOT
from tests.kernel import notebook_of, run_cells
from tests.processes import eventually, is_alive
from tests.test_the_tests import run_nbval

DRAWN_SECONDS = 60  # a process that is nice comes last on a busy machine

watch = functools.partial(live, plots.lines, title="watching", x="seconds", y="records", every=0)


@pytest.fixture(autouse=True)
def _nothing_is_left(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test: no process that draws, not even as a zombie; nothing on stderr, nor in asyncio's log."""
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) - before == set()
    gc.collect()  # asyncio complains of an error that nobody asked for when the task is collected
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def artist(owner: int | None = None) -> psutil.Process:
    """The process that draws for a process: for ours unless another is named."""
    [found] = [each for each in psutil.Process(owner).children() if "mqlib.live" in each.cmdline()]
    return found


def alone() -> bool:
    """Whether there is no other task."""
    return asyncio.all_tasks() == {asyncio.current_task()}


async def redrawn(chart: Live, frames: int = 2) -> None:
    before = chart.frames
    await mq.until(lambda: chart.frames >= before + frames, within=DRAWN_SECONDS)


def points(picture: plots.Picture) -> list[list[float]]:
    """What the first line of a picture goes through."""
    line: Any = picture.axes[0].lines[0]
    return [list(point) for point in line.get_xydata()]


async def test_it_is_redrawn_during_the_block_and_a_picture_stays() -> None:
    """The picture has the data and the title that there are at the end."""
    xs, ys = [0.0], [5.0]
    async with watch(lambda: {"lag": (xs, ys)}) as chart:
        await redrawn(chart)
        assert chart.picture is None
        xs.append(1.0)
        ys.append(0.0)
        chart.title = "nothing is left to read"
        frames = chart.frames
    assert alone()
    assert chart.frames == frames >= 2
    assert chart.picture is not None
    assert points(chart.picture) == [[0, 5], [1, 0]]
    assert chart.picture.get_suptitle() == "nothing is left to read"
    assert repr(chart.picture) == "<figure>"


async def test_a_frame_is_what_plots_draws_from_the_data_and_the_title_of_that_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte, also with options, and with a tuple of `plots`."""
    shown: list[bytes] = []
    monkeypatch.setattr(subject, "_shown", lambda picture: shown.append)
    run = {"a": [plots.Span("worker 1", 0, 1)]}
    async with live(plots.gantt, lambda: run, title="at first", every=0) as chart:
        await redrawn(chart)
        first = plots.gantt(run, title="at first")._repr_png_()
        assert set(shown) == {first}
        run["a"].append(plots.Span("worker 2", 1, 2, "failed"))
        chart.title = "then"
        await redrawn(chart)  # the first of these two may have been on its way
    then = plots.gantt(run, title="then")._repr_png_()
    assert first != then
    assert shown[-2:] == [then, then]
    assert set(shown) == {first, then}


async def test_while_a_frame_is_being_drawn_no_other_is_asked_for() -> None:
    """They are skipped, not queued: a process that is stopped is asked once."""
    asked: list[int] = []

    def data() -> dict[str, Any]:
        asked.append(len(asked))
        return {"lag": (asked, asked)}

    async with watch(data) as chart:
        await redrawn(chart)
        artist().suspend()
        before = len(asked)
        for _ in range(200):
            await asyncio.sleep(0.001)
        assert len(asked) <= before + 1
        artist().resume()
        await redrawn(chart)


async def test_it_hears_no_interrupt_and_gives_way_to_others() -> None:
    """An interrupt of the kernel goes to its process group. In a session of its own, Linux would not heed niceness."""
    async with watch(lambda: {"lag": ([], [])}) as chart:
        await redrawn(chart, 1)
        if hasattr(os, "nice"):
            assert artist().nice() == 19
            assert os.getpgid(artist().pid) != os.getpgrp()
            assert os.getsid(artist().pid) == os.getsid(0)


async def test_an_error_of_the_data_is_the_error_of_the_block_at_its_end() -> None:
    """What the cell is really for is not torn."""
    calls = iter([[1], [1]])

    def data() -> dict[str, Any]:
        try:
            return {"lag": (values := next(calls), values)}
        except StopIteration:
            raise LookupError("no lag yet") from None

    async def block() -> None:
        async with watch(data):
            await mq.until(alone, within=DRAWN_SECONDS)
            worked.append("to the end")

    worked: list[str] = []
    with pytest.raises(LookupError, match="no lag yet"):
        await block()
    assert worked == ["to the end"]
    assert alone()


async def test_an_error_of_the_drawing_says_what_was_wrong() -> None:
    """It comes from another process, and nothing of it reaches stderr."""
    xs, ys = [1.0], [1.0]

    async def block() -> None:
        async with watch(lambda: {"lag": (xs, ys)}) as chart:
            await redrawn(chart)
            xs.append(2.0)
            await mq.until(alone, within=DRAWN_SECONDS)
            ys.append(2.0)  # so that the last picture could be drawn

    with pytest.raises(RuntimeError) as error:
        await block()
    assert str(error.value) == (
        "plots.lines cannot draw what live was given: "
        "ValueError: x and y must have same first dimension, but have shapes (2,) and (1,)"
    )
    assert alone()


async def test_data_that_the_other_process_cannot_read_are_an_error_that_says_so() -> None:
    """It has the modules that can be imported, and nothing that a cell has defined."""

    class Unreadable(float):
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    xs = [1.0]

    async def block() -> None:
        async with watch(lambda: {"lag": (xs, [1.0])}):
            xs[0] = Unreadable(1)
            await mq.until(alone, within=DRAWN_SECONDS)

    with pytest.raises(RuntimeError, match="what live was given: ValueError: invalid literal for int"):
        await block()


async def test_the_end_of_the_process_that_draws_is_an_error_that_says_so() -> None:
    async def block() -> None:
        async with watch(lambda: {"lag": ([1], [1])}) as chart:
            await redrawn(chart)
            artist().kill()
            await mq.until(alone, within=DRAWN_SECONDS)

    with pytest.raises(RuntimeError, match="the process that draws has ended, exit code -9"):
        await block()


async def test_the_blocks_own_error_comes_first() -> None:
    """Also when the drawing has failed before; asyncio then has nothing to complain of."""
    values = [1.0]

    async def block() -> None:
        async with watch(lambda: {"lag": (values, [1.0])}):
            values.append(2.0)
            await mq.until(alone, within=DRAWN_SECONDS)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await block()
    assert alone()


@pytest.mark.parametrize("frames", [0, 2], ids=["while the process starts", "while it draws"])
async def test_cancelling_the_block_ends_the_process(frames: int) -> None:
    entered = asyncio.Event()

    async def block() -> None:
        async with watch(lambda: {"lag": ([1], [1])}) as chart:
            await redrawn(chart, frames)
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await entered.wait()
    process = artist()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not process.is_running()
    assert alone()


@pytest.mark.parametrize(
    ("draw", "data", "options", "error", "text"),
    [
        (plots.lines, {"lag": ([1], [])}, {"x": "s", "y": "r"}, ValueError, "x and y must have same first dimension"),
        (plots.lines, {"lag": ([1], [1])}, {"x": "s"}, TypeError, "missing 1 required positional argument: 'y'"),
        (lambda data, title: plots.bars(data, title, "s"), {}, {}, ValueError, "a function of mqlib.plots, not with"),
        (functools.partial(plots.bars, unit="s"), {}, {}, ValueError, "a function of mqlib.plots, not with"),
    ],
    ids=["shape", "option", "lambda", "partial"],
)
async def test_what_cannot_be_drawn_is_an_error_before_the_block(
    draw: Any, data: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    entered = False
    with pytest.raises(error, match=text):
        async with live(draw, lambda: data, title="never", **options):
            entered = True
    assert not entered


def test_the_process_ends_with_its_owner() -> None:
    """SIGKILL leaves the owner no time to tell it."""
    code = """
import asyncio
from mqlib import plots
from mqlib.live import live

async def main():
    async with live(plots.lines, lambda: {"lag": ([1], [1])}, title="t", x="x", y="y") as chart:
        while chart.frames < 1:
            await asyncio.sleep(0.01)
        print("drawn", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "drawn\n"
        process = artist(owner.pid)
        owner.kill()
        owner.wait()
    eventually(lambda: not is_alive(process), within=DRAWN_SECONDS)


IMPORTS = """\
import asyncio, hashlib, os, signal
import psutil
import mqlib as mq
from mqlib import check, plots
from mqlib.live import live, what_if

def fingerprint(picture):
    return hashlib.sha256(picture._repr_png_()).hexdigest()"""

WATCHED = """\
xs, ys = [], []
async with live(plots.lines, lambda: {"read": (xs, ys)}, title="reading", x="seconds", y="records", every=0) as chart:
    async with asyncio.timeout(60):
        while chart.frames < 3:
            xs.append(len(xs))
            ys.append(len(ys))
            await asyncio.sleep(0.01)
    chart.title = "All is read"
check("it was redrawn", chart.frames >= 3)"""


LAST = 'print(fingerprint(plots.lines({"read": (xs, ys)}, "All is read", "seconds", "records")))'


def images(cell: Any) -> list[dict[str, str]]:
    """The pictures among a cell's outputs: each one's text, and the fingerprint of its PNG."""
    return [
        {"text": output.data["text/plain"], "png": hashlib.sha256(b64decode(output.data["image/png"])).hexdigest()}
        for output in cell
        if "image/png" in output.get("data", {})
    ]


def text_of(cell: Any) -> str:
    assert [output for output in cell if output.output_type == "error" or output.get("name") == "stderr"] == []
    return "".join(output.get("text", "") for output in cell)


def saved(path: Path, *sources: str) -> Path:
    """A notebook with the outputs that `mqlib run --save` writes."""
    nbformat.write(notebook_of(*sources), path)
    outcome = execute(path)
    assert outcome.error == ""
    save_outputs(outcome)
    return path


def test_a_saved_notebook_has_the_last_picture_and_no_other(tmp_path: Path) -> None:
    path = saved(tmp_path / "90-live.ipynb", IMPORTS, WATCHED, LAST)
    _, watched, last = [cell.outputs for cell in nbformat.read(path, as_version=4).cells]
    assert images(watched) == [{"text": "<figure>", "png": text_of(last).strip()}]
    assert text_of(watched) == "✓ it was redrawn\n"
    assert len(watched) == 2


RUN = """\
ran = []

async def run(prefetch=7, crash=False, name="a < b"):
    ran.append(prefetch)
    await asyncio.sleep(0)
    if crash:
        raise LookupError("no queue\\n  <b> & co")
    return plots.bars({"prefetch": prefetch}, name, "messages")"""

PANEL = "await what_if(run, prefetch=(1, 50), crash=False, name=['a < b', 'c'])"

CLICKS = """\
from ipywidgets import HTML, Button, Checkbox, IntSlider
from ipywidgets.widgets.widget import _instances

[button], [slider], [box], [note] = (
    [widget for widget in list(_instances.values()) if type(widget) is kind]
    for kind in (Button, IntSlider, Checkbox, HTML)
)
print((slider.value, slider.min, slider.max), box.value, button.disabled, repr(note.value))

async def click():
    button.click()
    button.click()  # it is disabled meanwhile
    print(button.disabled)
    await mq.until(lambda: not button.disabled, within=60)

slider.value = 20
await click()
print(ran, repr(note.value))"""

FAILING = """\
slider.value, box.value = 13, True
await click()
print(ran, note.value)
print(fingerprint(plots.bars({"prefetch": 20}, "a < b", "messages")))"""

AGAIN = """\
slider.value, box.value = 14, False
await click()
print(ran, repr(note.value))"""


def test_a_panel_runs_again_with_the_values_that_were_dragged(tmp_path: Path) -> None:
    """One run at a time; an error is a line in the panel, and goes with the next run; the picture is replaced."""
    _, _, panel, clicks, failing, again = run_cells(tmp_path, IMPORTS, RUN, PANEL, CLICKS, FAILING, AGAIN)
    assert [output.output_type for output in panel] == ["display_data", "display_data"]
    assert panel[0].data["text/plain"] == "<panel: prefetch, crash, name>"
    assert "application/vnd.jupyter.widget-view+json" in panel[0].data
    assert text_of(clicks) == "(7, 1, 50) False False ''\nTrue\n[7, 20] ''\n"
    *lines, fingerprint = text_of(failing).splitlines()
    assert lines == ["True", "[7, 20, 13] LookupError: no queue &lt;b&gt; &amp; co"]
    assert text_of(again) == "True\n[7, 20, 13, 14] ''\n"
    [picture] = images(panel)
    last = plots.bars({"prefetch": 14}, "a < b", "messages")._repr_png_()
    assert picture == {"text": "<figure>", "png": hashlib.sha256(last).hexdigest()}
    assert fingerprint != picture["png"]


def test_an_interrupt_cancels_the_cell_and_ends_the_process(tmp_path: Path) -> None:
    """The picture that was last drawn stays."""
    interrupted = WATCHED.replace('chart.title = "All is read"', "signal.raise_signal(signal.SIGINT)\n"
                                  "    await asyncio.Event().wait()")  # fmt: skip
    _, cell, after = run_cells(tmp_path, IMPORTS, interrupted, "print(psutil.Process().children())")
    assert [output.output_type for output in cell] == ["display_data", "error"]
    assert cell[0].data["text/plain"] == "<figure>"
    assert cell[1].ename in ("CancelledError", "KeyboardInterrupt")
    assert text_of(after) == "[]\n"


def test_nbval_passes_them_and_sees_a_claim_in_the_same_cell_that_does_not_hold(
    rabbit: mq.RabbitMQ, tmp_path: Path
) -> None:
    path = saved(tmp_path / "90-live.ipynb", IMPORTS, WATCHED, RUN, PANEL)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace("chart.frames >= 3", "chart.frames < 3")
    nbformat.write(notebook, tmp_path / "91-broken.ipynb")
    assert run_nbval(tmp_path, rabbit) == (1, {"90-live": [], "91-broken": [1]})


async def test_in_plain_python_what_if_returns_the_picture_of_the_defaults() -> None:
    """A parameter without a control keeps its default; one without a default has its control's value."""

    async def run(workers: int, prefetch: int = 7, crash: float = 0.1, quiet: bool = True) -> plots.Picture:
        return plots.bars({"workers": workers, "prefetch": prefetch, "crash": crash, "quiet": quiet}, "t", "u")

    picture = await what_if(run, workers=[4, 8], prefetch=(1, 50), quiet=False)
    assert picture is not None
    bars: list[Any] = list(picture.axes[0].patches)
    assert [bar.get_height() for bar in bars] == [4, 7, 0.1, True]


@pytest.mark.parametrize(
    ("controls", "text"),
    [
        ({"prefech": (1, 50)}, r"run has no parameter 'prefech'; it has prefetch"),
        ({"prefetch": (10, 50)}, r"prefetch=\(10, 50\) makes no control: the default 7 of run is not among it"),
        ({"prefetch": [1, 10]}, r"prefetch=\[1, 10\] makes no control: .*"),
        ({"prefetch": None}, r"prefetch=None makes no control: use \(low, high\), .*"),
        ({"prefetch": (5, 1)}, r"prefetch=\(5, 1\) makes no control: .*"),
        ({"prefetch": "many"}, r"prefetch='many' makes no control: .*"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_control_that_does_not_fit_is_named(controls: dict[str, Any], text: str) -> None:
    """Before anything runs."""

    async def run(prefetch: int = 7) -> plots.Picture:
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match=f"^{text}$"):
        await what_if(run, **controls)


async def test_what_if_says_that_it_needs_a_picture() -> None:
    async def run(prefetch: int = 7) -> Any:
        return prefetch

    with pytest.raises(TypeError, match=r"run returns a figure of mqlib\.plots for what_if to show, not 7"):
        await what_if(run, prefetch=(1, 50))
