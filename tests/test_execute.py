"""Notebooks run without a browser: each outcome is told, and what is written back is the same at every run."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from mqlib import execute as subject
from mqlib.brokers import BrokerError
from mqlib.execute import Outcome, execute, execute_all, find, save_outputs, write_html
from tests.conftest import NOTEBOOKS
from tests.kernel import notebook_of

FIGURE = 'from mqlib import plots\nplots.bars({"a": 1}, "one", "records")'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("01-producer", "04-work-queue", "10-other", "notes"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    return tmp_path


def write(path: Path, *sources: str, title: str = "# 90 A title\n\nIs it so?") -> Path:
    """A notebook with a title and these code cells."""
    notebook = notebook_of(*sources)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(title, id="title"))
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["04"], ["04-work-queue"]),
        (["04-work-queue"], ["04-work-queue"]),
        (["04-work-queue.ipynb"], ["04-work-queue"]),
        (["notebooks/04-work-queue.ipynb"], ["04-work-queue"]),
        (["all"], ["01-producer", "04-work-queue", "10-other"]),
        (["10", "01"], ["10-other", "01-producer"]),
        (["04", "all", "04"], ["04-work-queue", "01-producer", "10-other"]),
    ],
    ids=str,
)
def test_a_number_a_name_or_all_means_notebooks(folder: Path, names: list[str], expected: list[str]) -> None:
    """In the order in which they were named, each once."""
    assert [path.stem for path in find(names, folder)] == expected


@pytest.mark.parametrize("name", ["99", "4", "work-queue", "notes", "", "0*", "ALL"])
def test_a_name_that_means_none_lists_those_there_are(folder: Path, name: str) -> None:
    with pytest.raises(BrokerError) as error:
        find(["04", name], folder)
    assert str(error.value) == (
        f"there is no notebook {name!r}. There are: 01-producer, 04-work-queue, 10-other; or say all"
    )


def test_a_notebook_that_passes_has_no_error_and_its_outputs(tmp_path: Path) -> None:
    """Top-level await works, the kernel is where the notebook is, and the file is not touched."""
    path = write(
        tmp_path / "90-good.ipynb",
        "import asyncio, os\nawait asyncio.sleep(0)\nprint(os.listdir())",
        'from mqlib import check\nlost = 0\ncheck("nothing lost", lost == 0)',
        FIGURE,
    )
    before = path.read_bytes()
    outcome = execute(path)
    assert (outcome.error, outcome.path, outcome.title, outcome.question) == ("", path, "90 A title", "Is it so?")
    assert [cell.outputs[0].get("text") for cell in outcome.notebook.cells[1:3]] == [
        "['90-good.ipynb']\n", "✓ nothing lost\n",
    ]  # fmt: skip
    assert base64.b64decode(outcome.picture).startswith(b"\x89PNG")
    assert outcome.seconds > 0
    assert path.read_bytes() == before


def test_a_failing_check_is_the_error_with_what_was_observed(tmp_path: Path) -> None:
    """The cells after it are not run."""
    path = write(
        tmp_path / "90-bad.ipynb",
        "from mqlib import Ledger, check\nledger = Ledger()\nledger.sent(3)",
        'check("nothing lost", ledger.lost == 0)',
        'print("never")',
    )
    outcome = execute(path)
    assert outcome.error == "CheckFailed: ✗ nothing lost\n  observed: ledger.lost = 1"
    assert outcome.notebook.cells[3].outputs == []
    assert outcome.picture == ""


def test_an_error_in_a_task_group_is_the_notebooks_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, as an output of the cell. IPython 9 prints exception groups to stderr, and ipykernel 7 then sends no
    answer at all: every house rule sends background work through a `TaskGroup`, so `mqlib` has to mend that."""
    monkeypatch.setattr(subject, "CELL_SECONDS", 20)
    source = (
        "import asyncio\nimport mqlib as mq\n\nasync def work():\n    raise LookupError('no such queue')\n\n"
        "async with asyncio.TaskGroup() as group:\n    group.create_task(work())"
    )
    outcome = execute(write(tmp_path / "90-task.ipynb", source))
    assert outcome.error.startswith("ExceptionGroup: ")
    [output] = outcome.notebook.cells[1].outputs
    assert output.output_type == "error"
    assert "LookupError: no such queue" in "\n".join(output.traceback)


@pytest.mark.parametrize("source", ["while True:\n    pass", "import asyncio\nawait asyncio.Event().wait()"])
def test_a_cell_that_never_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Busy or waiting, it is ended, and so is its kernel."""
    import psutil

    monkeypatch.setattr(subject, "CELL_SECONDS", 3)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    outcome = execute(write(tmp_path / "90-endless.ipynb", "print('a start')", source))
    assert outcome.error == "a cell did not end within 3 s"
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_kernel_that_dies_is_an_error(tmp_path: Path) -> None:
    """As when the system kills it for want of memory."""
    path = write(tmp_path / "90-dead.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "1")
    assert execute(path).error == "the kernel died"


def test_all_are_run_and_the_exit_code_says_whether_one_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed one is neither saved nor the end of the run."""
    bad = write(tmp_path / "91-bad.ipynb", 'from mqlib import check\nlost = 2\ncheck("nothing lost", lost == 0)')
    good = write(tmp_path / "92-good.ipynb", "print('well')")
    before = bad.read_bytes()
    assert execute_all([bad, good], None, save=True) == 1
    said = re.sub(r"\d+ s", "N s", capsys.readouterr().out.replace("\r", "\n"))
    assert "✗ 91-bad  N s\n    CheckFailed: ✗ nothing lost\n      observed: lost = 2\n" in said
    assert "✓ 92-good  N s\n" in said
    assert said.endswith("1 notebooks passed, 1 failed\n")
    assert bad.read_bytes() == before
    assert nbformat.read(good, as_version=4).cells[1].outputs[0].text == "well\n"
    assert execute_all([good], None, save=False) == 0


def test_saving_the_same_outputs_twice_changes_no_byte(tmp_path: Path) -> None:
    """So that a run of an unchanged notebook leaves the repository clean: no times, no machine, no run's identity."""
    path = write(
        tmp_path / "90-stable.ipynb",
        "print('one')\nprint('two')",
        "{'b': 1, 'a': [1, 2]}",
        FIGURE,
        "import sys\nprint('out', flush=True)\nprint('more')",
    )
    files = []
    for _ in range(2):
        outcome = execute(path)
        assert outcome.error == ""
        save_outputs(outcome)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2, 3, 4]
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert "version" not in notebook.metadata.language_info, "which Python it was is no part of the notebook"


def test_text_that_comes_in_pieces_is_saved_as_one(tmp_path: Path) -> None:
    """Whether a kernel sends two lines together depends on the moment; the saved file must not."""
    path = write(
        tmp_path / "90-pieces.ipynb",
        "import asyncio\nfor number in range(3):\n    print(number, flush=True)\n    await asyncio.sleep(0.3)",
    )
    outcome = execute(path)
    assert outcome.error == ""
    save_outputs(outcome)
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    assert [(output.name, output.text) for output in outputs] == [("stdout", "0\n1\n2\n")]


def outcome_of(name: str, error: str = "", figures: int = 0) -> Outcome:
    notebook = notebook_of("1")
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {name} <Queue> & co\n\nWhat is lost <here>?\n\nMore."))
    for number in range(figures):
        data = {"image/png": base64.b64encode(b"figure %d" % number).decode() + "\n", "text/plain": "<figure>"}
        notebook.cells[1].outputs.append(nbformat.v4.new_output("display_data", data))
    return Outcome(Path(f"{name}-queue.ipynb"), 1.0, error, notebook)


def test_the_index_has_title_question_and_one_picture_each(tmp_path: Path) -> None:
    """Escaped, linked, failed ones marked; every page is there."""
    outcomes = [outcome_of("04", figures=3), outcome_of("05", "CheckFailed: ✗ 1 < 2"), outcome_of("06")]
    index = write_html(outcomes, tmp_path / "new" / "html")
    assert index == tmp_path / "new" / "html" / "index.html"
    articles = re.findall(r"<article>.*?</article>", index.read_text(encoding="utf-8"), re.DOTALL)
    assert len(articles) == 3
    for number, article in zip(("04", "05", "06"), articles, strict=True):
        assert f'<a href="{number}-queue.html">{number} &lt;Queue&gt; &amp; co</a>' in article
        assert "<p>What is lost &lt;here&gt;?</p>" in article
        assert "Queue" in (index.parent / f"{number}-queue.html").read_text(encoding="utf-8")
    assert [article.count("<img ") for article in articles] == [1, 0, 0]
    assert base64.b64encode(b"figure 0").decode() in articles[0]
    assert [("failed" in article) for article in articles] == [False, True, False]
    assert "Failed: CheckFailed: ✗ 1 &lt; 2" in articles[1]
    assert write_html(outcomes, index.parent) == index, "and once more into the same folder"


def test_the_picture_of_a_notebook_is_its_cover_or_else_its_first_figure(tmp_path: Path) -> None:
    """And it is saved beside the notebook, for the README."""
    other = 'from mqlib import plots\nplots.bars({"b": 2}, "another", "records")'
    path = write(tmp_path / "90-cover.ipynb", FIGURE, other)
    notebook = nbformat.read(path, as_version=4)
    first = execute(path)
    notebook.cells[2].metadata["tags"] = ["cover"]
    nbformat.write(notebook, path)
    cover = execute(path)
    assert (first.error, cover.error) == ("", "")
    figures = [cell.outputs[0].data["image/png"].replace("\n", "") for cell in cover.notebook.cells[1:]]
    assert figures[0] != figures[1]
    assert [first.picture, cover.picture] == figures
    save_outputs(cover)
    assert (tmp_path / "pictures" / "90-cover.png").read_bytes() == base64.b64decode(cover.picture)


VARYING = {
    "a date": r"\d{4}-\d\d-\d\d", "a time": r"\b\d\d:\d\d:\d\d\b", "a home folder": r"/home\b|/root\b|/Users\b",
    "a temporary folder": r"/tmp\b|/var/folders", "a process id": r"(?i)\bpid\b",
    "an address": r"object at 0x|\b0x[0-9a-f]{6}",
    "a local port": r"127\.0\.0\.1:\d|localhost:\d",
}  # fmt: skip


def texts_of(notebook: Any) -> list[str]:
    """What the outputs say, but for the line in which a broker names its provider."""
    said = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            text += output.get("data", {}).get("text/html", "")
            said += [line for line in text.splitlines() if not re.match(r"(Kafka|RabbitMQ) [\d.]+, \w+", line)]
    return said


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")), ids=lambda path: path.stem)
def test_committed_outputs_have_nothing_of_the_run_or_the_machine(path: Path) -> None:
    """Neither times nor paths, ids or ports: a second run on another machine says the same."""
    notebook = nbformat.read(path, as_version=4)
    found = [
        (what, line) for line in texts_of(notebook) for what, pattern in VARYING.items() if re.search(pattern, line)
    ]
    assert found == []
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
