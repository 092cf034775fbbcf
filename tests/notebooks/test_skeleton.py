"""Every notebook keeps the house rules, and the lint that says so can say no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from mqlib import skeleton
from mqlib.brokers import BrokerError
from tests.conftest import NOTEBOOKS

EVERY = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
GOOD = NOTEBOOKS / "04-work-queue.ipynb"
CATALOGUE = skeleton.read_catalogue(NOTEBOOKS)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_house_rules(path: Path) -> None:
    assert skeleton.problems(path, CATALOGUE) == []


def test_the_catalogue_has_unique_techniques() -> None:
    ids = [row["id"] for row in CATALOGUE]
    assert len(set(ids)) == len(ids) == 341


def altered(tmp_path: Path, change: Any) -> list[str]:
    notebook = nbformat.read(GOOD, as_version=4)
    change(notebook)
    path = tmp_path / GOOD.name
    nbformat.write(notebook, path)
    return skeleton.problems(path, CATALOGUE)


def cell_with_tag(notebook: Any, tag: str) -> Any:
    return next(cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))


def drop_heading(notebook: Any) -> None:
    cell = next(cell for cell in notebook.cells if cell.source.startswith("## Measured"))
    cell.source = cell.source.replace("## Measured", "## Results")


def drop_question(notebook: Any) -> None:
    notebook.cells[0].source = notebook.cells[0].source.replace("?", ".")


def drop_tag(notebook: Any) -> None:
    cell_with_tag(notebook, "technique:T055").metadata.tags = []


def foreign_tag(notebook: Any) -> None:
    cell_with_tag(notebook, "technique:T055").metadata.tags.append("technique:T001")


def drop_checks(notebook: Any) -> None:
    cell = cell_with_tag(notebook, "technique:T055")
    cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("check("))


def constant_check(notebook: Any) -> None:
    cell = cell_with_tag(notebook, "technique:T055")
    lines = [line for line in cell.source.splitlines() if not line.startswith("check(")]
    cell.source = "\n".join([*lines, 'check("all is well", True)'])


def add_magic(notebook: Any) -> None:
    notebook.cells[3].source = "!ls"


def add_semicolon(notebook: Any) -> None:
    notebook.cells[3].source += ";"


def add_lines(notebook: Any) -> None:
    notebook.cells[3].source = "x = 1\n" * 21


def add_loose_task(notebook: Any) -> None:
    notebook.cells[3].source = "asyncio.create_task(work())"


def add_endless_loop(notebook: Any) -> None:
    notebook.cells[3].source = "while True:\n    pass"


def rerun_a_cell(notebook: Any) -> None:
    notebook.cells[3].execution_count = 99


def stderr(notebook: Any) -> None:
    notebook.cells[3].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="warning"))


def error(notebook: Any) -> None:
    notebook.cells[3].outputs.append(nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[]))


def ignored_output(notebook: Any) -> None:
    cell_with_tag(notebook, "technique:T055").metadata.tags.append("nbval-ignore-output")


def too_large(notebook: Any) -> None:
    notebook.cells[3].outputs.append(nbformat.v4.new_output("stream", name="stdout", text="x" * 700_000))


def drop_alert(notebook: Any) -> None:
    notebook.cells[-1].source = notebook.cells[-1].source.replace("**Alert on**", "Watch")


def one_exercise(notebook: Any) -> None:
    for cell in notebook.cells:
        cell.source = cell.source.replace("### 04.2", "###").replace("### 04.3", "###")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_heading, "headings"), (drop_question, "no question"), (drop_tag, "T055: in the catalogue"),
        (foreign_tag, "T001: tagged, and not in the catalogue"), (drop_checks, "T055: no cell of it has a check"),
        (constant_check, "T055: no cell of it has a check"), (add_magic, "magic"), (add_semicolon, "semicolon"),
        (add_lines, "21 lines"), (add_loose_task, "TaskGroup"), (add_endless_loop, "while True"),
        (rerun_a_cell, "fresh kernel"), (stderr, "stderr"), (error, "ended with KeyError"),
        (ignored_output, "only a set-up cell"), (too_large, "600 are allowed"), (drop_alert, "Alert on"),
        (one_exercise, "1 exercises"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_lint_sees_each_departure(tmp_path: Path, change: Any, words: str) -> None:
    found = altered(tmp_path, change)
    assert any(words in problem for problem in found), found


def test_the_lint_accepts_the_notebook_unchanged(tmp_path: Path) -> None:
    assert altered(tmp_path, lambda notebook: None) == []


def test_a_new_notebook_has_every_heading_and_each_of_its_techniques(tmp_path: Path) -> None:
    (tmp_path / "catalogue.tsv").write_bytes((NOTEBOOKS / "catalogue.tsv").read_bytes())
    path = skeleton.write_new("06-dead-letters", tmp_path)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    headings = [
        line[3:]
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert headings == list(skeleton.HEADINGS)
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert len([tag for tag in tags if tag.startswith("technique:")]) == 12
    assert any("no cell of it has a check" in problem for problem in skeleton.problems(path, CATALOGUE))


@pytest.mark.parametrize("name", ["work-queue", "4-work-queue", "04", "04-Work-Queue", "../04-x", "04-work-queue"])
def test_a_name_that_cannot_be_or_is_taken_is_refused(name: str) -> None:
    before = sorted(NOTEBOOKS.iterdir())
    with pytest.raises(BrokerError, match=r"NN-kebab-name|is taken"):
        skeleton.write_new(name, NOTEBOOKS)
    assert sorted(NOTEBOOKS.iterdir()) == before
