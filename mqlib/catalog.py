"""Which techniques are executed and checked, and by which checks: as a summary, and as `notebooks/README.md`."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import nbformat

from .skeleton import checks_of, read_catalogue

HEAD = """\
# The techniques

Made by `python3 -m mqlib catalog --write` from `catalogue.tsv` and from the notebooks. What stands under "checked" are
the claims that the technique's own cell checks, on a real broker, at every run.
"""


@dataclass(frozen=True)
class Technique:
    """A row of the catalogue and what became of it."""

    id: str
    notebook: str
    name: str
    broker: str
    checks: tuple[str, ...]
    """The claims of its cell, in order; `…` stands for a part that the run fills in."""
    state: str
    """"checked", "planned" (there is no such notebook yet), "missing" (no cell has its tag), "not run", "unchecked"."""


def techniques(folder: Path) -> list[Technique]:
    """Every technique of the catalogue in `folder`, in its order."""
    found: dict[str, dict[str, list[tuple[bool, str]]]] = {}
    for path in folder.glob("[0-9][0-9]-*.ipynb"):
        cells = found.setdefault(path.stem, {})
        for cell in nbformat.read(path, as_version=4).cells:
            for tag in cell.metadata.get("tags", []):
                if tag.startswith("technique:"):
                    cells.setdefault(tag.partition(":")[2], []).append((bool(cell.execution_count), cell.source))
    rows = []
    for row in read_catalogue(folder):
        cells_of = found.get(row["notebook"], {}).get(row["id"], [])
        checks = tuple(label for _, source in cells_of for label in map(_label, checks_of(source)))
        state = (
            "planned" if row["notebook"] not in found
            else "missing" if not cells_of
            else "not run" if not all(run for run, _ in cells_of)
            else "checked" if checks else "unchecked"
        )  # fmt: skip
        rows.append(Technique(row["id"], row["notebook"], row["technique"], row["broker"], checks, state))
    return rows


def _label(check: ast.Call) -> str:
    """The claim of a `check(...)`, as it is written."""
    label = check.args[0]
    parts = label.values if isinstance(label, ast.JoinedStr) else [label]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


def summary(rows: list[Technique]) -> tuple[str, bool]:
    """One line a notebook with what is not checked in it, and whether every notebook that is there is complete."""
    lines, complete = [], True
    for notebook, group in groupby(rows, key=lambda row: row.notebook):
        members = list(group)
        checked = sum(row.state == "checked" for row in members)
        planned = members[0].state == "planned"
        wrong = [f"{row.id} {row.name}: {row.state}" for row in members if row.state not in ("checked", "planned")]
        complete &= not wrong
        mark = "○" if planned else "✗" if wrong else "✓"
        lines += [f"{mark} {notebook}: {'planned, ' if planned else f'{checked} of '}{len(members)}",
                  *(f"    {line}" for line in wrong)]  # fmt: skip
    done = sum(row.state == "checked" for row in rows)
    lines.append(f"{done} of {len(rows)} techniques are executed and checked.")
    return "\n".join(lines), complete


def page(rows: list[Technique]) -> str:
    """`notebooks/README.md`."""
    done = sum(row.state == "checked" for row in rows)
    text = [HEAD, f"{done} of {len(rows)} are executed and checked; the others are planned.\n"]
    for notebook, group in groupby(rows, key=lambda row: row.notebook):
        members = list(group)
        if members[0].state == "planned":
            text += [f"## {notebook} (planned)\n", "; ".join(row.name for row in members) + ".\n"]
        else:
            text += [f"## [{notebook}]({notebook}.ipynb)\n", "| | technique | broker | checked |", "|---|---|---|---|"]
            for row in members:
                claims = "; ".join(row.checks).replace("|", "&#124;") or row.state
                text.append(f"| {row.id} | {row.name} | {row.broker} | {claims} |")
            text.append("")
    return "\n".join(text)
