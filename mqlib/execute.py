"""Executes notebooks without a browser, and writes them as HTML with an index page."""

from __future__ import annotations

import base64
import html as escaping
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

from .brokers.base import BrokerError

CELL_SECONDS = 120
Notebook = Any  # nbformat's NotebookNode has no types


@dataclass
class Outcome:
    """What came of one notebook: `error` is empty when every cell ran and every check held."""

    path: Path
    seconds: float
    error: str
    notebook: Notebook

    @property
    def title(self) -> str:
        return _first(r"^# (.+)$", self.notebook) or self.path.stem

    @property
    def question(self) -> str:
        """The first paragraph after the title."""
        text = self.notebook.cells[0].source.split("\n", 1)[-1].strip() if self.notebook.cells else ""
        return text.split("\n\n")[0].replace("\n", " ")

    @property
    def picture(self) -> str:
        """The figure of the cell tagged `cover` as base 64, else the first; empty where there is none."""
        cells = sorted(self.notebook.cells, key=lambda cell: "cover" not in cell.metadata.get("tags", []))
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        figures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
        return str(figures[0]).replace("\n", "") if figures else ""


def _first(pattern: str, notebook: Notebook) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(pattern, cell.source, re.MULTILINE)):
            return str(found[1])
    return ""


def find(names: list[str], folder: Path) -> list[Path]:
    """The notebooks that `names` mean: `all`, a number, or a name. Raises `BrokerError` for one that means none."""
    every = sorted(folder.glob("[0-9][0-9]-*.ipynb"))
    found: list[Path] = []
    for name in names:
        stem = Path(name).stem if name.endswith(".ipynb") else name
        hits = every if name == "all" else [path for path in every if stem in (path.stem, path.stem.split("-")[0])]
        if not hits:
            known = ", ".join(path.stem for path in every)
            raise BrokerError(f"there is no notebook {name!r}. There are: {known}; or say all")
        found += [path for path in hits if path not in found]
    return found


def execute(path: Path) -> Outcome:
    """Runs one notebook from top to bottom in a fresh kernel; never raises for what happens in a cell."""
    notebook = nbformat.read(path, as_version=4)
    # Each notebook works in a namespace of its own, and its folder is where a reader's kernel would be.
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,  # else it depends on the moment whether two lines are one output
        # Other users of this machine can reach the kernel's ports; ipykernel warns where they are not encrypted.
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )  # fmt: skip
    start, error = time.monotonic(), ""
    try:
        client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    except CellExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    except CellTimeoutError:
        error = f"a cell did not end within {CELL_SECONDS} s"
    except DeadKernelError:
        error = "the kernel died"
    return Outcome(path, time.monotonic() - start, error, notebook)


def execute_all(paths: list[Path], html: Path | None, save: bool) -> int:
    """Runs notebooks one after another; returns 1 when one of them failed, else 0."""
    outcomes = []
    for path in paths:
        print(f"  {path.stem} …", end="", flush=True)
        outcome = execute(path)
        outcomes.append(outcome)
        print(f"\r{'✗' if outcome.error else '✓'} {path.stem}  {outcome.seconds:.0f} s", flush=True)
        if outcome.error:
            print("    " + outcome.error.replace("\n", "\n    "))
        elif save:
            save_outputs(outcome)
    if html is not None:
        print(f"Open {write_html(outcomes, html)}")
    failed = sum(bool(outcome.error) for outcome in outcomes)
    print(f"{len(outcomes) - failed} notebooks passed, {failed} failed")
    return 1 if failed else 0


def save_outputs(outcome: Outcome) -> None:
    """Writes the outputs and the cover picture back, without what changes at every run (times, machine, state)."""
    for cell in outcome.notebook.cells:
        cell.metadata.pop("execution", None)
    outcome.notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(outcome.notebook, outcome.path)
    if outcome.picture:
        pictures = outcome.path.parent / "pictures"
        pictures.mkdir(exist_ok=True)
        (pictures / f"{outcome.path.stem}.png").write_bytes(base64.b64decode(outcome.picture))


INDEX = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Message-queue patterns</title>
<meta name="viewport" content="width=device-width"><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
article{{display:grid;grid-template-columns:1fr 20rem;gap:1.5rem;border-top:1px solid #ccc;padding:1.2rem 0}}
img{{width:100%}} a{{color:#0b5a8f}} .failed{{color:#a40000}} @media(max-width:40rem){{article{{display:block}}}}
</style><h1>Message-queue patterns</h1><p>{count} notebooks, executed on real brokers.</p>{articles}</html>"""


def write_html(outcomes: list[Outcome], folder: Path) -> Path:
    """One page a notebook and `index.html`: title, question, one picture each. Returns the index."""
    from nbconvert import HTMLExporter

    folder.mkdir(parents=True, exist_ok=True)
    articles = []
    for outcome in outcomes:
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(outcome.notebook)
        (folder / f"{outcome.path.stem}.html").write_text(page, encoding="utf-8")
        state = f'<p class="failed">Failed: {escaping.escape(outcome.error)}</p>' if outcome.error else ""
        picture = (
            f'<img alt="the main figure" src="data:image/png;base64,{outcome.picture}">' if outcome.picture else ""
        )
        articles.append(
            f'<article><div><h2><a href="{outcome.path.stem}.html">{escaping.escape(outcome.title)}</a></h2>'
            f"<p>{escaping.escape(outcome.question)}</p>{state}</div><div>{picture}</div></article>"
        )
    index = folder / "index.html"
    index.write_text(INDEX.format(count=len(outcomes), articles="\n".join(articles)), encoding="utf-8")
    return index
