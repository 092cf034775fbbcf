"""The skeleton that every notebook has: the template of a new one, and the lint that holds the others to it."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path
from typing import Any

import nbformat

from .brokers.base import BrokerError

HEADINGS = (
    "Set-up", "The naive version, failing", "The techniques", "Measured", "What if", "Exercises", "In production",
)  # fmt: skip
TAGS = ("setup", "picture", "cover", "what-if", "nbval-ignore-output")
INTRODUCTION = "00"
"""The number of the notebook that explains the others; it teaches no pattern, so it has a skeleton of its own."""
MAX_CODE_LINES = 20
MAX_BYTES = 600_000


def read_catalogue(folder: Path) -> list[dict[str, str]]:
    """The rows of `catalogue.tsv`: id, notebook, technique, …"""
    with open(folder / "catalogue.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_new(name: str, folder: Path) -> Path:
    """Writes `notebooks/<name>.ipynb` from the template and returns its path.

    Raises `BrokerError` when the name is not `NN-kebab-name` or the file is there already.
    """
    if not re.fullmatch(r"\d\d(-[a-z0-9]+)+", name):
        raise BrokerError(f"{name!r} is not of the form NN-kebab-name, for example 27-claim-check")
    path = folder / f"{name}.ipynb"
    taken = sorted(folder.glob(f"{name[:2]}-*.ipynb"))
    if taken:
        raise BrokerError(f"the number {name[:2]} is taken by {taken[0].name}")
    nbformat.write(template(name, [row for row in read_catalogue(folder) if row["notebook"] == name]), path)
    return path


def template(name: str, techniques: list[dict[str, str]]) -> Any:
    """A notebook with every part that the house style asks for, and a heading for each of its techniques."""
    number, title = name[:2], name[3:].replace("-", " ").capitalize()
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        text(f"# {number} {title}\n\nThe problem, as a question?\n\nAfter this notebook you can …\n\n"
             "*0 minutes to teach, 0 to exercise. Broker: Kafka.*"),
        text("## Set-up"),
        code("import mqlib as mq\nfrom mqlib import check, plots\n\nkafka = mq.kafka()",
             metadata={"tags": ["setup", "nbval-ignore-output"]}),
        code('plots.topology({"a": ("app", 0, 0), "b": ("topic", 1, 0)}, [("a", "b", "send")], title="")',
             metadata={"tags": ["picture"]}),
        text("## The naive version, failing"),
        text("## The techniques"),
    ]  # fmt: skip
    for row in techniques:
        cells.append(text(f"### {row['technique']}\n{row['demonstration']}"))
        cells.append(code(f"# {row['assertion']}", metadata={"tags": [f"technique:{row['id']}"]}))
    cells += [
        text("## Measured"),
        text("## What if"),
        code("KNOB = 1", metadata={"tags": ["what-if"]}),
        text(f"## Exercises\n\n### {number}.1 …"),
        code(f'answer = ...\n\nawait mq.exercise("{number}.1").check(answer)'),
        text("## In production\n\n| setting | default | advice |\n|---|---|---|\n\n**When not to use it.**\n\n"
             "**Alert on**\n\n**Related.**\n\n**Sources.**"),
    ]  # fmt: skip
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index:02d}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def problems(path: Path, catalogue: list[dict[str, str]]) -> list[str]:
    """Everything in which a notebook departs from the house rules; empty when it keeps them."""
    notebook = nbformat.read(path, as_version=4)
    found = [*_text_problems(path, notebook), *_output_problems(path, notebook)]
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {index}: {problem}" for problem in code_problems(cell.source)]
    if path.stem[:2] != INTRODUCTION:
        found += _technique_problems(path, notebook, catalogue)
    return found


def _text_problems(path: Path, notebook: Any) -> list[str]:
    found = []
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    first = texts[0] if texts else ""
    if not re.match(rf"# {path.stem[:2]} \S", first):
        found.append(f"the title is not '# {path.stem[:2]} …'")
    if path.stem[:2] == INTRODUCTION:
        return found
    if "?" not in first:
        found.append("the first cell asks no question")
    if not re.search(r"\*\d+ minutes to teach, \d+ to exercise\. Brokers?: [^*]+\*", first):
        found.append("the first cell does not say: *N minutes to teach, N to exercise. Broker: …*")
    headings = [line[3:] for text in texts for line in text.splitlines() if line.startswith("## ")]
    if headings != list(HEADINGS):
        found.append(f"the headings are {headings}, not {list(HEADINGS)}")
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    found += [f"no cell has the tag {tag}" for tag in ("setup", "picture", "what-if") if tag not in tags]
    unknown = {tag for tag in tags if tag not in TAGS and not tag.startswith("technique:")}
    found += [f"unknown tag {tag}" for tag in sorted(unknown)]
    last = texts[-1]
    for wanted in ("| setting | default |", "**When not to use it.**", "**Alert on**", "**Related.**", "**Sources.**"):
        if wanted not in last:
            found.append(f"'In production' lacks {wanted}")
    exercises = re.findall(rf"^### {path.stem[:2]}\.\d", "\n".join(texts), re.MULTILINE)
    if not 2 <= len(exercises) <= 4:
        found.append(f"{len(exercises)} exercises, not 2 to 4")
    return found


def _output_problems(path: Path, notebook: Any) -> list[str]:
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("it was not run from top to bottom in a fresh kernel: python3 -m mqlib run NN --save")
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {index}: output on stderr")
            if output.output_type == "error":
                found.append(f"cell {index}: it ended with {output.ename}")
        if "nbval-ignore-output" in cell.metadata.get("tags", []) and "setup" not in cell.metadata["tags"]:
            found.append(f"cell {index}: only a set-up cell may have outputs that are not compared")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size // 1000} kB; {MAX_BYTES // 1000} are allowed")
    return found


def code_problems(source: str) -> list[str]:
    """What a code cell may not have: shell calls and magics, a trailing semicolon, endless loops, too many lines."""
    found = []
    for line in source.splitlines():
        if re.match(r"\s*[!%]", line) or re.search(r"get_ipython\(\)", line):
            found.append(f"{line.strip()!r}: nbval passes a shell command or a magic that fails")
    if source.rstrip().endswith(";"):
        found.append("a trailing semicolon hides nothing from nbval")
    if "clear_output" in source or "update_display" in source:
        found.append("nbval cannot compare an output that replaces another")
    lines = [line for line in source.splitlines() if line.strip()]
    if len(lines) > MAX_CODE_LINES:
        found.append(f"{len(lines)} lines of code; {MAX_CODE_LINES} are allowed")
    try:
        tree = ast.parse(source, mode="exec")
    except SyntaxError:
        try:  # top-level await is right in a notebook
            tree = compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            return [*found, f"it is not Python: {error.msg}"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("create_task", "ensure_future"):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in ("asyncio", "loop"):
                found.append("an error in a task that nobody awaits passes in silence: use an asyncio.TaskGroup")
        if isinstance(node, ast.While) and isinstance(node.test, ast.Constant):
            found.append("`while True` has no end of its own: bound it by a count or a deadline")
    return found


def _technique_problems(path: Path, notebook: Any, catalogue: list[dict[str, str]]) -> list[str]:
    wanted = {row["id"] for row in catalogue if row["notebook"] == path.stem}
    checked: set[str] = set()
    tagged: set[str] = set()
    for cell in notebook.cells:
        ids = {tag.partition(":")[2] for tag in cell.metadata.get("tags", []) if tag.startswith("technique:")}
        tagged |= ids
        if ids and has_check(cell.source):
            checked |= ids
    return [
        *(f"{each}: in the catalogue, and no cell is tagged technique:{each}" for each in sorted(wanted - tagged)),
        *(f"{each}: tagged, and not in the catalogue for this notebook" for each in sorted(tagged - wanted)),
        *(f"{each}: no cell of it has a check" for each in sorted(tagged - checked)),
    ]


def has_check(source: str) -> bool:
    """Whether a cell has a `check` that can fail."""
    return bool(checks_of(source))


def checks_of(source: str) -> list[ast.Call]:
    """The calls of `check` in a cell that can fail, in order: those whose claim is not a constant."""
    tree = compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "id", "") == "check" or getattr(node.func, "attr", "") == "check")
        and len(node.args) >= 2
        and any(isinstance(inner, ast.Name) for inner in ast.walk(node.args[1]))
    ]
    return sorted(found, key=lambda call: call.lineno)
