"""A check that fails says what was observed; an exercise has three outcomes. In files and in real kernels."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import mqlib as mq
from mqlib import checks
from mqlib.checks import CheckFailed, Exercise, Task, Wrong, check
from tests.conftest import NOTEBOOKS
from tests.kernel import run_cells


@dataclass
class Answer:
    offset: int = 5
    headers: dict[str, int] = field(default_factory=lambda: {"tries": 3})
    inner: Any = None


def observed(error: pytest.ExceptionInfo[CheckFailed]) -> str:
    """What a failure says after `observed:`; empty where it says nothing."""
    return str(error.value).partition("\n  observed: ")[2]


def test_a_claim_that_holds_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    limit = 3
    check("nothing lost", limit == 3)
    check("a value counts as what it is", [0])
    assert capsys.readouterr() == ("✓ nothing lost\n✓ a value counts as what it is\n", "")


def test_a_claim_that_fails_raises_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It is an AssertionError, so that every test runner knows what it means."""
    lost = 2
    with pytest.raises(CheckFailed) as error:
        check("nothing lost", lost == 0)
    assert str(error.value) == "✗ nothing lost\n  observed: lost = 2"
    assert isinstance(error.value, AssertionError)
    assert capsys.readouterr() == ("", "")


def test_attributes_are_shown_instead_of_what_they_belong_to() -> None:
    ledger, limit = mq.Ledger(), 0
    ledger.sent(1)
    with pytest.raises(CheckFailed) as error:
        check("nothing lost", ledger.lost <= limit)
    assert observed(error) == "ledger.lost = 1, limit = 0"


def test_items_are_shown() -> None:
    """By a constant, by a name, of an attribute, from the end, and several levels deep."""
    answers, key, answer = [Answer()], "tries", Answer(inner=[Answer(offset=9)])
    with pytest.raises(CheckFailed) as error:
        check("the first offset", answers[0].offset == 0)
    assert observed(error) == "answers[0].offset = 5"
    with pytest.raises(CheckFailed) as error:
        check("one try", answer.headers[key] == 1)
    assert observed(error) == "answer.headers[key] = 3, key = 'tries'"
    with pytest.raises(CheckFailed) as error:
        check("deep", answer.inner[0].headers["tries"] == 1)
    assert observed(error) == "answer.inner[0].headers['tries'] = 3"


def test_items_from_the_end_are_shown() -> None:
    """`rates[-1]` is how notebooks name the last value of a sweep."""
    rates = [1.5, 2.5]
    with pytest.raises(CheckFailed) as error:
        check("the last is the fastest", rates[-1] > 2 * rates[0])
    assert "rates[-1] = 2.5" in observed(error)
    assert "rates[0] = 1.5" in observed(error)


def test_a_name_that_begins_another_is_shown_as_well() -> None:
    """`sent` is no part of `sent_twice`: only what belongs to a longer expression is left out."""
    sent_twice, sent = 4, 3
    with pytest.raises(CheckFailed) as error:
        check("all twice", sent_twice == 2 * sent)
    assert observed(error) == "sent_twice = 4, sent = 3"


def test_modules_and_callables_are_not_shown() -> None:
    items = [1, 2]

    def twice(values: list[int]) -> int:
        return 2 * len(values)

    with pytest.raises(CheckFailed) as error:
        check("three items", twice(items) == 3 and len(items) == max(3, math.floor(math.pi)))
    assert observed(error) == f"items = [1, 2], math.pi = {math.pi!r}"


def test_the_variable_of_a_comprehension_is_not_mistaken_for_one_outside() -> None:
    """A `number` left over from an earlier loop was not observed by this claim."""
    number, numbers = 99, [1, 2, 3]
    with pytest.raises(CheckFailed) as error:
        check("all are even", all(number % 2 == 0 for number in numbers))
    assert observed(error) == "numbers = [1, 2, 3]"
    assert number == 99


def test_calls_are_not_made_again() -> None:
    """Looking at the values has no effect: what the claim called is called once."""
    calls: list[int] = []

    def pop() -> int:
        calls.append(1)
        return len(calls)

    with pytest.raises(CheckFailed):
        check("five", pop() == 5)
    assert calls == [1]


def test_long_values_are_shortened() -> None:
    records = list(range(10_000))
    with pytest.raises(CheckFailed) as error:
        check("few records", len(records) < 5)
    assert observed(error).startswith("records = [0, 1, 2, ")
    assert observed(error).endswith(" …")
    assert len(observed(error)) <= checks.SHOWN + len("records =  …")


def test_observed_takes_the_place_of_the_operands() -> None:
    """Also when it is a false value; and a long one is shortened as well."""
    lost = 3
    for value, text in [("half of them", "'half of them'"), (0, "0"), ([], "[]"), ("x" * 500, f"'{'x' * 299} …")]:
        with pytest.raises(CheckFailed) as error:
            check("nothing lost", lost == 0, observed=value)
        assert observed(error) == text


def test_a_value_that_cannot_be_shown_does_not_hide_the_failure() -> None:
    class Closed:
        def __repr__(self) -> str:
            raise RuntimeError("the connection is closed")

    connection, lost = Closed(), 3
    with pytest.raises(CheckFailed, match="✗ nothing lost"):
        check("nothing lost", lost == 0 and connection)
    with pytest.raises(CheckFailed, match="lost = 3"):
        check("nothing lost", connection and lost == 0)


def test_a_constant_has_nothing_to_show() -> None:
    with pytest.raises(CheckFailed) as error:
        check("it is so", False)
    assert str(error.value) == "✗ it is so"


def test_a_claim_without_source_fails_with_its_words() -> None:
    """Code from `exec` has no source to look at: the claim itself is still said."""
    with pytest.raises(CheckFailed, match="✗ nothing lost"):
        exec('lost = 1\ncheck("nothing lost", lost == 0)', {"check": check})


def test_in_a_kernel_the_source_of_each_cell_is_found(tmp_path: Path) -> None:
    """Cells have no files: values are shown all the same, for awaits, functions of an earlier cell, several lines."""
    outputs = run_cells(
        tmp_path,
        "import asyncio, math\nfrom mqlib import Ledger, check\nledger, limit = Ledger(), 0\nledger.sent(4)",
        'check("something was lost", ledger.lost == 1)\ncheck("nothing lost", ledger.lost <= limit)\nprint("never")',
        'def prove(rate):\n    check("fast", rate > 5)\nprove(3)',
        'await asyncio.sleep(0)\ncheck(\n    "a long claim",\n    ledger.missing == [] and\n'
        "    ledger.duplicated == limit + 1,\n)",
        'async def later():\n    await asyncio.sleep(0)\n    check("pi is three", math.pi == 3)\nawait later()',
    )
    kinds = [[output.output_type for output in each] for each in outputs]
    assert kinds == [[], ["stream", "error"], ["error"], ["error"], ["error"]]
    assert outputs[1][0].text == "✓ something was lost\n"
    said = [each[-1].evalue for each in outputs[1:]]
    assert said == [
        "✗ nothing lost\n  observed: ledger.lost = 1, limit = 0",
        "✗ fast\n  observed: rate = 3",
        "✗ a long claim\n  observed: ledger.duplicated = 0, limit = 0",
        f"✗ pi is three\n  observed: math.pi = {math.pi!r}",
    ]
    assert {each[-1].ename for each in outputs[1:]} == {"CheckFailed"}


async def judge(answer: Any) -> None:
    await asyncio.sleep(0)
    if answer != 42:
        raise Wrong(f"of 42 messages, {answer} came")


def task(**changes: Any) -> Task:
    settings: dict[str, Any] = {
        "question": "How many?", "start": "answer = ...", "hints": ["Count.", "Count all.", "It is even."],
        "solution": judge, "judge": judge, "wrong": [41],
    }  # fmt: skip
    return Task(**{**settings, **changes})


async def test_an_exercise_has_three_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    exercise = Exercise("07.1", task())
    assert exercise.outcome == "not tried yet"
    for answer, outcome, line in [
        (..., "not tried yet", "○ 07.1 not tried yet: put your answer in place of the dots, and run this cell again"),
        (41, "not right yet", "✗ 07.1 not right yet: of 42 messages, 41 came"),
        (42, "right", "✓ 07.1 right"),
        (..., "not tried yet", "○ 07.1 not tried yet: put your answer in place of the dots, and run this cell again"),
    ]:
        await exercise.check(answer)
        assert (exercise.outcome, capsys.readouterr().out) == (outcome, line + "\n")
    await exercise.check()
    assert exercise.outcome == "not tried yet"


async def test_a_judge_may_be_a_plain_function(capsys: pytest.CaptureFixture[str]) -> None:
    def plain(answer: Any) -> None:
        if answer != "yes":
            raise Wrong("say yes")

    exercise = Exercise("07.1", task(judge=plain))
    await exercise.check("no")
    await exercise.check("yes")
    assert capsys.readouterr().out == "✗ 07.1 not right yet: say yes\n✓ 07.1 right\n"


async def test_an_answer_that_raises_is_not_right_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own error is the outcome, in one line; a traceback through the judge would teach nothing."""

    async def calls(answer: Any) -> None:
        await answer("x" * 1000)

    async def broken(text: str) -> None:
        raise KeyError(text)

    exercise = Exercise("07.1", task(judge=calls))
    await exercise.check(broken)
    line = capsys.readouterr().out
    assert exercise.outcome == "not right yet"
    assert line.startswith("✗ 07.1 not right yet: it raised KeyError: 'xxx")
    assert line.endswith(" …\n")
    await exercise.check(3)
    assert capsys.readouterr().out == "✗ 07.1 not right yet: it raised TypeError: 'int' object is not callable\n"


async def test_a_reader_who_interrupts_is_not_judged() -> None:
    async def interrupted(answer: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Exercise("07.1", task(judge=interrupted)).check(1)


def test_hints_come_in_order_and_the_last_stays(capsys: pytest.CaptureFixture[str]) -> None:
    exercise = Exercise("07.1", task())
    for _ in range(4):
        exercise.hint()
    assert capsys.readouterr().out.splitlines() == [
        "Hint 1 of 3: Count.", "Hint 2 of 3: Count all.", "Hint 3 of 3: It is even.", "Hint 3 of 3: It is even.",
    ]  # fmt: skip


async def test_reset_forgets_the_hints_and_the_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    exercise = Exercise("07.1", task())
    exercise.hint()
    await exercise.check(42)
    capsys.readouterr()
    exercise.reset()
    exercise.hint()
    assert (exercise.outcome, capsys.readouterr().out) == ("not tried yet", "answer = ...\nHint 1 of 3: Count.\n")


def test_the_solution_is_source_that_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    Exercise("07.1", task()).solution()
    assert capsys.readouterr().out.startswith("async def judge(answer: Any) -> None:\n    await")
    Exercise("07.1", task(code="answer = 42")).solution()
    assert capsys.readouterr().out == "answer = 42\n"


def first_task() -> str:
    file = sorted((NOTEBOOKS / "solutions").glob("[0-9][0-9]-*.py"))[0]
    return next(iter(checks.tasks(file.stem[:2])))


def test_an_exercise_is_the_same_object_at_each_call() -> None:
    """A cell asks for it again at every run; the hints shown so far are not forgotten."""
    assert mq.exercise(first_task()) is mq.exercise(first_task())


def test_an_unknown_exercise_names_the_known_ones() -> None:
    notebook = first_task()[:2]
    known = ", ".join(checks.tasks(notebook))
    for number in (f"{notebook}.9", notebook, f"{notebook}.1.1"):
        with pytest.raises(LookupError, match=re.escape(f"there is no exercise {number!r}; this notebook has {known}")):
            mq.exercise(number)


def test_an_exercise_of_an_unknown_notebook_is_a_lookup_error() -> None:
    with pytest.raises(LookupError, match="solutions/98"):
        mq.exercise("98.1")


def test_solutions_are_found_from_a_copy_of_the_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attendee's copy of the folder has its own; elsewhere the project's serve."""
    monkeypatch.chdir(tmp_path)
    assert checks.solutions_folder() == NOTEBOOKS / "solutions"
    (tmp_path / "solutions").mkdir()
    assert checks.solutions_folder() == tmp_path / "solutions"


def test_in_a_kernel_an_exercise_is_one_await(tmp_path: Path) -> None:
    """Also in a folder that has no solutions, and with the running event loop of the kernel."""
    number = first_task()
    outputs = run_cells(
        tmp_path,
        "import mqlib as mq",
        f'answer = ...\n\nawait mq.exercise("{number}").check(answer)',
        f'mq.exercise("{number}").hint()',
        f'mq.exercise("{number[:2]}.9")',
    )
    assert outputs[1][0].text.startswith(f"○ {number} not tried yet")
    assert outputs[2][0].text.startswith("Hint 1 of ")
    assert outputs[3][0].ename == "LookupError"
