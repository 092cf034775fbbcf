"""A real Jupyter kernel for tests: what a reader sees when cells run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

CELL_SECONDS = 60


def notebook_of(*sources: str) -> Any:
    """A notebook with these code cells; its cells' ids are always the same."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
    return notebook


def run_cells(folder: Path, *sources: str) -> list[list[Any]]:
    """Runs cells in a fresh kernel, each of them also after a failure; returns the outputs of each."""
    notebook = notebook_of(*sources)
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )  # fmt: skip
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return [list(cell.outputs) for cell in notebook.cells]
