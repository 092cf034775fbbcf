"""The list of techniques says what is executed and checked, and what is not, and its page is up to date."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from mqlib import catalog
from tests.conftest import NOTEBOOKS

NAME = "04-work-queue"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The catalogue with one notebook."""
    for name in ("catalogue.tsv", f"{NAME}.ipynb"):
        shutil.copy(NOTEBOOKS / name, tmp_path)
    return tmp_path


def change(folder: Path, id: str, edit: Callable[[Any], None]) -> None:
    path = folder / f"{NAME}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if f"technique:{id}" in cell.metadata.get("tags", []):
            edit(cell)
    nbformat.write(notebook, path)


def test_the_page_is_what_the_notebooks_say() -> None:
    """If not: python3 -m mqlib catalog --write"""
    assert (NOTEBOOKS / "README.md").read_text() == catalog.page(catalog.techniques(NOTEBOOKS))


def test_every_notebook_that_is_there_is_complete() -> None:
    text, complete = catalog.summary(catalog.techniques(NOTEBOOKS))
    assert complete, text


def test_states(folder: Path) -> None:
    """Each way in which a technique can be less than executed and checked has its own word."""
    rows = {row.id: row for row in catalog.techniques(folder)}
    assert (rows["T047"].state, rows["T001"].state) == ("checked", "planned")
    assert catalog.summary(list(rows.values()))[1]
    change(folder, "T047", lambda cell: cell.metadata.tags.clear())
    change(folder, "T048", lambda cell: cell.update(execution_count=None))
    change(folder, "T049", lambda cell: cell.update(source="check('nothing lost', True)"))
    rows = {row.id: row for row in catalog.techniques(folder)}
    assert [rows[id].state for id in ("T047", "T048", "T049", "T050")] == ["missing", "not run", "unchecked", "checked"]
    text, complete = catalog.summary(list(rows.values()))
    assert not complete
    for line in ("✗ 04-work-queue: 12 of 15", f"    T047 {rows['T047'].name}: missing", "○ 01-producer: planned, 16",
                 "12 of 341 techniques are executed and checked."):  # fmt: skip
        assert line in text.splitlines()


def test_the_claims_are_those_of_the_cell(folder: Path) -> None:
    """In their order, with a mark where the run fills something in, and safe in a table."""
    change(folder, "T050", lambda cell: cell.update(
        source='if x:\n    check(f"at most {n} | lost", x < n)\ncheck("then this", y)\ncheck("a constant", 1 == 1)'
    ))  # fmt: skip
    rows = {row.id: row for row in catalog.techniques(folder)}
    assert rows["T050"].checks == ("at most … | lost", "then this")
    assert "at most … &#124; lost; then this |" in catalog.page(list(rows.values()))
