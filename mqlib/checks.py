"""`check(...)` proves a claim of a notebook; `exercise(...)` lets a reader prove an answer."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

SHOWN = 300
"""Characters of an observed value that a failure shows."""


class CheckFailed(AssertionError):
    """A claim that did not hold, with what was observed instead."""


def check(claim: str, holds: object, observed: object = None) -> None:
    """Prints `✓ claim` when `holds` is true. Raises `CheckFailed` otherwise, with the observed values.

    Those are `observed` if it is given, else the values of the names and attributes in the expression itself.
    """
    if holds:
        print(f"✓ {claim}")
        return
    frame = inspect.currentframe()
    seen = _shorten(repr(observed)) if observed is not None else _operands(frame.f_back if frame else None)
    raise CheckFailed(f"✗ {claim}" + (f"\n  observed: {seen}" if seen else ""))


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def _operands(frame: FrameType | None) -> str:
    """`ledger.lost = 3, limit = 0` for `check("…", ledger.lost <= limit)`; empty where the source is not to be had."""
    from executing import Source

    call = Source.executing(frame).node if frame else None
    if not isinstance(call, ast.Call) or len(call.args) < 2 or frame is None:
        return ""
    values: dict[str, str] = {}
    for node in _shown(call.args[1], frozenset()):
        text = ast.unparse(node)
        try:
            value = eval(text, frame.f_globals, frame.f_locals)
            if not callable(value) and not isinstance(value, ModuleType):
                values[text] = _shorten(repr(value))
        except Exception:
            continue
    return ", ".join(f"{text} = {value}" for text, value in values.items())


def _shown(node: ast.AST, inner: frozenset[str]) -> Iterator[ast.AST]:
    """The names, attributes and items in an expression, each as long as it can be: what looking at has no effect.

    Not those that only exist inside a comprehension or a lambda (`inner`).
    """
    if isinstance(node, ast.Attribute | ast.Subscript | ast.Name) and _is_plain(node):
        if not inner & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}:
            yield node
        # `ledger` says less than `ledger.lost`, but the index of an item says more.
        while isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(node, ast.Subscript):
                yield from _shown(node.slice, inner)
            node = node.value
        return
    inner |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
              and isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp)}  # fmt: skip
    inner |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg) and isinstance(node, ast.Lambda)}
    for child in ast.iter_child_nodes(node):
        yield from _shown(child, inner)


def _is_plain(node: ast.AST) -> bool:
    match node:
        case ast.Name() | ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return True
        case ast.Attribute(value=inner):
            return _is_plain(inner)
        case ast.Subscript(value=inner, slice=index):
            return _is_plain(inner) and _is_plain(index)
    return False


class Wrong(Exception):
    """Raised by an exercise's judge: the answer is not right yet. The message says what was observed, and why."""


@dataclass
class Task:
    """One exercise, as a file in `notebooks/solutions/` defines it.

    `judge(answer)` returns quietly or raises `Wrong`; it may be async and may use real brokers. `wrong` are
    answers that it must refuse: the tests try them. `start` is what the reader's cell holds before the first try.
    """

    question: str
    start: str
    hints: list[str]
    solution: Callable[..., Any] | Any
    judge: Callable[[Any], Awaitable[None] | None]
    wrong: list[Any]
    code: str = ""
    """The solution as text, where it is not a function whose source can be shown."""


class Exercise:
    """What a reader does with an exercise: `check` an answer, ask for a `hint`, see the `solution`, `reset`."""

    def __init__(self, number: str, task: Task) -> None:
        self.number = number
        self.task = task
        self.outcome = "not tried yet"
        self._hints_shown = 0

    async def check(self, answer: object = ...) -> None:
        """Prints one of three outcomes: ○ not tried yet (the answer is still `...`), ✗ not right yet, ✓ right."""
        if answer is ...:
            self.outcome = "not tried yet"
            print(f"○ {self.number} not tried yet: put your answer in place of the dots, and run this cell again")
            return
        try:
            verdict = self.task.judge(answer)
            if inspect.isawaitable(verdict):
                await verdict
        except Wrong as why:
            self.outcome = "not right yet"
            print(f"✗ {self.number} not right yet: {why}")
        except Exception as error:  # the answer's own failure is an outcome, not a traceback
            self.outcome = "not right yet"
            print(f"✗ {self.number} not right yet: it raised {type(error).__name__}: {_shorten(str(error))}")
        else:
            self.outcome = "right"
            print(f"✓ {self.number} right")

    def hint(self) -> None:
        """Prints the next hint; after the last one, the last again."""
        hints = self.task.hints
        index = min(self._hints_shown, len(hints) - 1)
        self._hints_shown += 1
        print(f"Hint {index + 1} of {len(hints)}: {hints[index]}")

    def solution(self) -> None:
        """Prints a solution that passes the check."""
        print(self.task.code or inspect.getsource(self.task.solution))

    def reset(self) -> None:
        """Forgets the hints and the outcome, and prints what the cell held at the start."""
        self.outcome, self._hints_shown = "not tried yet", 0
        print(self.task.start)


_exercises: dict[str, Exercise] = {}


def solutions_folder() -> Path:
    """`notebooks/solutions`, from this project or from where the notebook runs."""
    for folder in (Path.cwd() / "solutions", Path(__file__).resolve().parent.parent / "notebooks" / "solutions"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the folder notebooks/solutions is not beside this notebook, nor in mqlib's project")


def tasks(notebook: str) -> dict[str, Task]:
    """The exercises of a notebook, given by its number ("04"), by their own numbers ("04.1"). Raises `LookupError`."""
    files = sorted(solutions_folder().glob(f"{notebook}-*.py"))
    if not files:
        raise LookupError(f"there is no notebooks/solutions/{notebook}-….py")
    name = f"mqlib_solutions_{notebook}"
    if name not in sys.modules or sys.modules[name].__file__ != os.fspath(files[0]):
        spec = importlib.util.spec_from_file_location(name, files[0])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # `inspect.getsource` and dataclasses look it up there
        spec.loader.exec_module(module)
    found: dict[str, Task] = sys.modules[name].TASKS
    return found


def exercise(number: str) -> Exercise:
    """The exercise with this number ("04.2"); the same object at each call. Raises `LookupError` for an unknown one."""
    if number not in _exercises:
        known = tasks(number.split(".")[0])
        if number not in known:
            raise LookupError(f"there is no exercise {number!r}; this notebook has {', '.join(known)}")
        _exercises[number] = Exercise(number, known[number])
    return _exercises[number]
