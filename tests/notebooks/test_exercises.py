"""Each exercise is red when empty, red with a wrong answer, green with its solution."""

from __future__ import annotations

import ast
import re

import nbformat
import pytest

from mqlib import checks
from mqlib.checks import Exercise
from tests.conftest import NOTEBOOKS

pytestmark = pytest.mark.usefixtures("kafka", "rabbit")  # they print which brokers they are, once, before a judge does

FILES = sorted((NOTEBOOKS / "solutions").glob("[0-9][0-9]-*.py"))
ALL = {number: task for file in FILES for number, task in checks.tasks(file.stem[:2]).items()}
WRONG = [(number, index) for number, task in ALL.items() for index in range(len(task.wrong))]


@pytest.mark.parametrize("number", ALL)
async def test_an_exercise_is_not_tried_yet_when_its_answer_is_empty(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exercise = Exercise(number, ALL[number])
    await exercise.check(...)
    assert exercise.outcome == "not tried yet"
    assert capsys.readouterr().out.startswith(f"○ {number} not tried yet")


@pytest.mark.parametrize(("number", "index"), WRONG)
async def test_a_wrong_answer_is_not_right_yet_and_says_why(
    number: str, index: int, capsys: pytest.CaptureFixture[str]
) -> None:
    exercise = Exercise(number, ALL[number])
    await exercise.check(ALL[number].wrong[index])
    assert exercise.outcome == "not right yet"
    line = capsys.readouterr().out
    assert re.match(rf"✗ {re.escape(number)} not right yet: \S.{{10}}", line), line


@pytest.mark.parametrize("number", ALL)
def test_an_exercise_has_hints_and_a_solution_that_can_be_shown(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exercise = Exercise(number, ALL[number])
    exercise.hint()
    exercise.solution()
    exercise.reset()
    shown = capsys.readouterr().out
    assert "Hint 1 of" in shown
    assert len(ALL[number].wrong) >= 2
    assert shown.endswith(ALL[number].start + "\n")


@pytest.mark.parametrize("number", ALL)
async def test_the_printed_solution_pasted_over_the_dots_is_right(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Exercise(number, ALL[number]).solution()
    printed = capsys.readouterr().out
    first, rest = ALL[number].start.split("\n", 1)
    assert first.endswith(" = ...")
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    await eval(compile(f"import asyncio\nimport mqlib as mq\n{printed}\n{rest}", "cell", "exec", flags), {})
    assert capsys.readouterr().out == f"✓ {number} right\n"


@pytest.mark.parametrize("number", ALL)
def test_the_notebook_holds_the_exercise_as_it_starts(number: str) -> None:
    [path] = NOTEBOOKS.glob(f"{number[:2]}-*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert ALL[number].start in cells
    tree = compile(ALL[number].start, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(tree.body[0], ast.Assign)


def test_every_exercise_of_a_notebook_has_a_task() -> None:
    for path in NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"):
        named = set(re.findall(r'mq\.exercise\("(\d\d\.\d)"\)\.check', path.read_text().replace('\\"', '"')))
        assert named == {number for number in ALL if number.startswith(path.stem[:2])}
