"""The code's own rules, as tests: lint, format, types, size."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from tests.conftest import NOTEBOOKS, ROOT


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_tools_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")), ids=lambda path: path.stem)
def test_the_code_of_a_notebook_has_no_type_errors(path: Path, tmp_path: Path) -> None:
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    script = tmp_path / f"notebook_{path.stem.replace('-', '_')}.py"
    script.write_text("async def notebook():\n" + textwrap.indent("\n\n\n".join(cells), "    "))
    options = ["--check-untyped-defs", "--allow-redefinition", "--ignore-missing-imports"]
    options += ["--disable-error-code=var-annotated"]  # a reader is spared the type of an empty list
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", *options, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_stays_small() -> None:
    """No module over 300 lines. In lines of code (docstrings, comments and blank lines not counted): the brokers under
    1,500, the kit and the commands under 3,000, a pattern or an experiment under 250."""
    files = list((ROOT / "mqlib").rglob("*.py"))
    assert {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) > 300} == {}
    sizes = {file.relative_to(ROOT / "mqlib"): lines_of_code(file) for file in files}
    assert sum(size for file, size in sizes.items() if file.parts[0] == "brokers") < 1500
    own = ("patterns", "experiments")
    assert sum(size for file, size in sizes.items() if file.parts[0] not in ("brokers", *own)) < 3000
    assert {file: size for file, size in sizes.items() if file.parts[0] in own and size > 250} == {}


def lines_of_code(file: Path) -> int:
    docstrings = {
        line
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(file.read_text().splitlines(), start=1)
    return sum(bool(text.strip()) and text.strip()[0] != "#" and line not in docstrings for line, text in lines)


def test_importing_the_package_is_light() -> None:
    """`import mqlib` loads no client and no plotting library, so that the command line starts at once."""
    script = (
        "import sys, mqlib, mqlib.cli; "
        "print([name for name in ('aiokafka', 'aio_pika', 'matplotlib', 'docker') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
