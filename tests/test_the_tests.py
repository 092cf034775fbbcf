"""The test of the tests: pytest with nbval is green for a notebook as it is, and red when a claim no longer holds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest

import mqlib as mq
from mqlib.execute import execute, save_outputs
from tests.kernel import notebook_of

SETUP = """\
import asyncio
from aio_pika import Message
import mqlib as mq
from mqlib import check, plots

rabbit = mq.rabbitmq()"""

WORK = """\
async def through_a_queue(count):
    ledger = mq.Ledger()
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("tasks"), durable=True)
        for number in range(count):
            ledger.sent(number)
            await channel.default_exchange.publish(Message(b"%d" % number), queue.name)
            ledger.acknowledged(number)
        for message in await mq.take_messages(queue, count):
            ledger.received(int(message.body))
    return ledger"""

CLAIM = """\
ledger = await through_a_queue(20)
print(ledger)
check("nothing lost", ledger.lost == 0)"""

GROUP = """\
async with asyncio.TaskGroup() as group:
    runs = [group.create_task(through_a_queue(5)) for _ in range(3)]
check("three at once lose nothing", all(run.result().exact for run in runs))"""

FIGURE = 'plots.bars({"sent": 20, "lost": ledger.lost}, "Nothing is lost", "messages", ["produced", "failed"])'

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def good(rabbit: mq.RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small notebook on a real queue, with the outputs that `mqlib run --save` writes."""
    path = tmp_path_factory.mktemp("good") / "90-small.ipynb"
    notebook = notebook_of(SETUP, WORK, CLAIM, GROUP, FIGURE)
    notebook.cells[0].metadata["tags"] = ["setup", "nbval-ignore-output"]
    nbformat.write(notebook, path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rabbit.environment.items():
            patch.setenv(name, value)
        outcome = execute(path)
    assert outcome.error == ""
    save_outputs(outcome)
    return path


def run_nbval(folder: Path, rabbit: mq.RabbitMQ, limit: int = 60) -> tuple[int, dict[str, list[int]]]:
    """pytest over the notebooks in a folder, as `mqlib test` runs it: the exit code, and each one's failed cells."""
    report = folder / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", f"--nbval-cell-timeout={limit}", "--nbval-current-env",
         "-p", "no:cacheprovider", "-q", f"--junitxml={report}", str(folder)],
        cwd=folder, env={**os.environ, **rabbit.environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    cells: dict[str, list[int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        notebook, cell = Path(case.get("classname", "")).stem, case.get("name", "").split()[-1]
        cells.setdefault(notebook, []).extend([int(cell)] if len(case) else [])
    return done.returncode, cells


def test_the_stored_outputs_are_facts(good: Path) -> None:
    """What the tests below compare with: the ledger's line, the checks, a figure without its bytes being compared."""
    outputs = [cell.outputs for cell in nbformat.read(good, as_version=4).cells]
    assert outputs[2][0].text == (
        "sent 20, acknowledged 20, received 20: lost 0, duplicated 0, reordered 0\n✓ nothing lost\n"
    )
    assert outputs[3][0].text == "✓ three at once lose nothing\n"
    assert outputs[4][0].data["text/plain"] == "<figure>"


def test_an_unchanged_notebook_is_green_five_times(good: Path, rabbit: mq.RabbitMQ, tmp_path: Path) -> None:
    """Five runs, each in a kernel of its own: no flaky output, no leftovers of the run before."""
    for number in range(5):
        (tmp_path / f"9{number}-small.ipynb").write_bytes(good.read_bytes())
    code, failed = run_nbval(tmp_path, rabbit)
    assert (code, failed) == (0, {f"9{number}-small": [] for number in range(5)})


def other_claim(notebook: Any) -> None:
    notebook.cells[2].source = notebook.cells[2].source.replace("ledger.lost == 0", "ledger.lost == 1")


def edited_output(notebook: Any) -> None:
    output = notebook.cells[2].outputs[0]
    output.text = output.text.replace("lost 0", "lost 1")


def missing_output(notebook: Any) -> None:
    notebook.cells[3].outputs = []


def failing_task(notebook: Any) -> None:
    notebook.cells[3].source = notebook.cells[3].source.replace("through_a_queue(5)", "through_a_queue(None)")


def stray_line(notebook: Any) -> None:
    notebook.cells[2].source += '\nimport sys\nprint("a warning", file=sys.stderr)'


def failing_setup(notebook: Any) -> None:
    notebook.cells[0].source += (
        "\nget_ipython()._last_traceback = []  # as after any earlier error"
        "\n\nasync def broken():\n    raise LookupError('no such queue')\n\n"
        "async with asyncio.TaskGroup() as group:\n    group.create_task(broken())"
    )
    notebook.cells[0].outputs = []


CHANGES: dict[str, tuple[Change, int]] = {
    change.__name__: (change, cell)
    for change, cell in [
        (other_claim, 2), (edited_output, 2), (missing_output, 3), (failing_task, 3), (stray_line, 2),
        (failing_setup, 0),
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(
    good: Path, rabbit: mq.RabbitMQ, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, list[int]]]:
    """One run over a copy for each change."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (change, _) in CHANGES.items():
        notebook = nbformat.read(good, as_version=4)
        change(notebook)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return run_nbval(folder, rabbit, limit=20)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_that_breaks_a_claim_is_red(broken: tuple[int, dict[str, list[int]]], name: str) -> None:
    """A claim that does not hold, an output that is not what the run prints, an error in a task of a group (also in a
    set-up cell, whose outputs are not compared), a line on stderr: that cell is red, and no cell before it is."""
    code, failed = broken
    assert code == 1
    assert failed[name][:1] == [CHANGES[name][1]]
