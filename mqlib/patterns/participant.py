"""A service that takes part in sagas: it does its step, or undoes it, once, however often and in any order it is told.

What became of a step is a row beside its effect, in one transaction. So a command that is delivered again gets the same
answer and has no second effect; and one that comes after its own compensation has none at all: a saga that has waited
long enough undoes a step of which it does not know whether it was done. See `saga`, and Garcia-Molina and Salem,
"Sagas" (1987).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ..brokers.base import Connectable
from .sending import json_message, send
from .work_queue import Task, Worker, start_worker

METADATA = sa.MetaData()
STEPS = sa.Table(
    "saga_steps", METADATA,
    sa.Column("saga", sa.String, primary_key=True),
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("answer", sa.JSON),
)  # fmt: skip
"""What became of each step here: done, refused, or undone; `answer` is what it returned, or why it was refused."""


class Refused(Exception):
    """Raised by a step that cannot be done, such as one that finds nothing in stock. Nothing of it has happened, and
    trying again would not help; whatever else a step raises is tried again."""


class Command(NamedTuple):
    """What a step is told: the saga's data, and what earlier steps answered, by their names; an undo knows the answer
    of what it undoes, too."""

    saga: str
    step: str
    data: Any
    answers: dict[str, Any]


Effect = Callable[[sa.Connection, Command], Any]


def create_tables(engine: sa.Engine) -> None:
    """Makes the table `saga_steps` unless it is there."""
    METADATA.create_all(engine)


def handle(connection: sa.Connection, action: str, command: Command, do: Effect, undo: Effect) -> tuple[str, Any]:
    """Does or undoes a step within a transaction, unless that has happened. Returns what became of it, and its answer:
    done, refused (with the reason), or undone.

    An undo that comes first is remembered: what it undoes will not happen any more.
    """
    if action not in ("do", "undo"):
        raise ValueError(f"saga {command.saga}, step {command.step!r}: the action is do or undo, not {action!r}")
    mine = sa.and_(STEPS.c.saga == command.saga, STEPS.c.step == command.step)
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    row = {"saga": command.saga, "step": command.step, "state": "undone"}
    # A second delivery at the same time waits here until the first is committed.
    insert = dialect.insert(STEPS).values(row).on_conflict_do_nothing().returning(STEPS.c.saga)
    new = connection.execute(insert).first() is not None
    state, answer = connection.execute(sa.select(STEPS.c.state, STEPS.c.answer).where(mine).with_for_update()).one()
    before = state
    if action == "undo":
        if state == "done":
            undo(connection, command._replace(answers={**command.answers, command.step: answer}))
        state = "undone"
    elif new:
        try:
            with connection.begin_nested():
                state, answer = "done", do(connection, command)
        except Refused as reason:
            state, answer = "refused", str(reason)
    if state != before or new:
        connection.execute(sa.update(STEPS).where(mine).values(state=state, answer=answer))
    return state, answer


@contextlib.asynccontextmanager
async def participate(
    rabbit: Connectable, engine: sa.Engine, queue: str, do: Effect, undo: Effect, attempts: int = 3, prefetch: int = 1,
    backoff: float = 0.1,
) -> AsyncIterator[Worker]:  # fmt: skip
    """Takes the commands of a queue during the block: `do(connection, command)` or `undo(connection, command)` in a
    thread, in one transaction with what became of it; then the answer is sent, then the command acknowledged.

    What `do` returns (what JSON can hold) is its answer. It raises `Refused` when it cannot; on any other error all is
    rolled back and tried again, `attempts` times in all, after which the command is a dead letter and the saga's
    timeout decides. The other arguments are those of `work_queue.start_worker`.
    """
    create_tables(engine)

    async def work(task: Task) -> None:
        told = task.data
        command = Command(told["saga"], told["step"], told["data"], told["answers"])

        def once() -> tuple[str, Any]:
            with engine.begin() as connection:
                return handle(connection, told["action"], command, do, undo)

        outcome, answer = await asyncio.to_thread(once)
        reply = {"saga": command.saga, "step": command.step, "action": told["action"], "outcome": outcome}
        message = json_message(reply | {"answer": answer}, f"{task.id}.answer")
        await send(worker.consumer.link, message, told["reply_to"])

    async with start_worker(rabbit, queue, work, attempts, prefetch, backoff) as worker:
        yield worker
