"""A saga: steps in several services, of which all happen, or those that happened are undone; led by an orchestrator.

Where a saga is stands in a database before the command for it is sent, so an orchestrator that dies goes on when it is
started again; commands may go out twice, which `participant` expects. A step that gives no answer in time is *unknown*:
it is undone as well, and an answer that comes too late changes nothing. Timeouts are messages that wait in RabbitMQ.
See Garcia-Molina and Salem, "Sagas" (1987), https://microservices.io/patterns/data/saga.html, and EIP: Process Manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from aio_pika.abc import AbstractIncomingMessage
from sqlalchemy.dialects import postgresql, sqlite

from ..brokers.base import Connectable
from ..queues import declare
from ..waiting import beside, until
from .delays import SAFE
from .link import Consumer, consuming
from .sending import Unconfirmed, json_message, send

PAUSE_SECONDS = 0.2
PREFETCH = 10


@dataclass(frozen=True)
class Step:
    """A step: its name, the queue of the service that does and undoes it, and how many seconds an answer may take.

    What is not `undoable` (a parcel that is handed over) is told again when it does not answer, and never undone: put
    it last, since a refusal after it would undo the steps before it, and not this one.
    """

    name: str
    queue: str
    timeout: float = 30.0
    undoable: bool = True


class Saga(NamedTuple):
    """Where a saga is. `phase` is running, undoing, completed or compensated; `step` is the one that is waited for."""

    id: str
    phase: str
    step: str
    turn: int
    """Commands that were decided on; a timeout belongs to one of them."""
    tries: int
    """How often the present command was sent before, in vain."""
    stuck: bool
    reason: str | None
    """Why it is undone, or stuck."""
    data: Any
    answers: dict[str, Any]
    """What each step that was done answered, by its name."""

    @property
    def outcome(self) -> str:
        """completed, compensated, or stuck: then it needs a person, and `resume`. Otherwise its phase."""
        return "stuck" if self.stuck else self.phase


METADATA = sa.MetaData()
SAGAS = sa.Table(
    "sagas", METADATA,
    sa.Column("orchestrator", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("phase", sa.String, nullable=False, index=True),
    sa.Column("step", sa.String, nullable=False),
    sa.Column("turn", sa.Integer, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("stuck", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("answers", sa.JSON, nullable=False),
)  # fmt: skip
UNFINISHED = ("running", "undoing")


class Orchestrator:
    """Leads the sagas of one kind; made by `orchestrate`."""

    def __init__(self, engine: sa.Engine, name: str, steps: Sequence[Step], attempts: int) -> None:
        self.late = 0
        """Answers and timeouts that were no longer waited for; a second copy of an answer counts as well."""
        self.unreadable = 0
        """Messages in the queue of the answers that are none."""
        self.error: Exception | None = None
        """The last trouble with the broker or the database."""
        self.answers = f"{name}.answers"
        self._engine, self._name, self._attempts = engine, name, attempts
        self._steps = {each.name: each for each in steps}
        self._due: asyncio.Queue[Saga] = asyncio.Queue()
        self._consumer: Consumer

    async def start(self, data: Any, id: str | None = None) -> str:
        """Starts a saga with `data` (what JSON can hold), and returns its id. From then on it happens or is undone.

        A saga that is there already, with this `id`, is not started again. Raises what the database raises: then it may
        have been started, so try again with the same `id`.
        """
        json.dumps(data, allow_nan=False)
        first, saga = next(iter(self._steps)), id or uuid.uuid4().hex
        made = Saga(saga, "running", first, 1, 0, False, None, data, {})
        row = {"orchestrator": self._name, **made._asdict()}
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        insertion = dialect.insert(SAGAS).values(row).on_conflict_do_nothing().returning(SAGAS.c.id)

        def insert() -> bool:
            with self._engine.begin() as connection:
                return connection.execute(insertion).first() is not None

        if await asyncio.to_thread(insert):
            self._due.put_nowait(made)
        return saga

    async def get(self, id: str) -> Saga:
        """Where a saga is. Raises `LookupError` for one that is not there."""
        if not (found := await self._select(SAGAS.c.id == id)):
            raise LookupError(f"{self._name} has no saga {id!r}")
        return found[0]

    async def ended(self, id: str, within: float = 60.0) -> Saga:
        """Waits until a saga is completed, compensated or stuck. Raises `TimeoutError` after `within` seconds."""

        async def end() -> Saga | None:
            found = await self.get(id)
            return None if found.outcome in UNFINISHED else found

        saga: Saga = await until(end, within)
        return saga

    async def stuck(self) -> list[Saga]:
        """The sagas that need a person: undoing them was refused, or a service gives no answer. Alert on them."""
        return await self._select(SAGAS.c.stuck)

    async def resume(self, id: str) -> None:
        """Lets a stuck saga try again what it was at, once its cause is mended."""

        def work() -> Saga | None:
            with self._engine.begin() as connection:
                saga = self._load(connection, id)
                return self._store(connection, saga, stuck=False, tries=0) if saga and saga.stuck else None

        if saga := await asyncio.to_thread(work):
            self._due.put_nowait(saga)

    async def _select(self, which: Any) -> list[Saga]:
        wanted = sa.select(*(SAGAS.c[name] for name in Saga._fields)).where(SAGAS.c.orchestrator == self._name, which)

        def read() -> list[Saga]:
            with self._engine.connect().execution_options(sqlite_begin="DEFERRED") as connection, connection.begin():
                return [Saga(*row) for row in connection.execute(wanted)]

        return await asyncio.to_thread(read)

    def _load(self, connection: sa.Connection, id: str) -> Saga | None:
        columns = [SAGAS.c[name] for name in Saga._fields]
        mine = sa.and_(SAGAS.c.orchestrator == self._name, SAGAS.c.id == id)
        row = connection.execute(sa.select(*columns).where(mine).with_for_update()).one_or_none()
        return Saga(*row) if row else None

    def _store(self, connection: sa.Connection, saga: Saga, **changes: Any) -> Saga:
        """The saga in its next turn."""
        new = saga._replace(turn=saga.turn + 1, **changes)
        mine = sa.and_(SAGAS.c.orchestrator == self._name, SAGAS.c.id == saga.id)
        connection.execute(sa.update(SAGAS).where(mine).values(new._asdict()))
        return new

    def _move(self, answer: dict[str, Any]) -> Saga | None:
        """Takes an answer or a timeout in; None when it was not waited for."""
        with self._engine.begin() as connection:
            saga = self._load(connection, answer["saga"])
            waited_for = saga and ({"running": "do", "undoing": "undo"}.get(saga.phase), saga.step)
            if saga is None or waited_for != (answer["action"], answer["step"]):
                return None
            if answer["outcome"] == "timeout":
                return self._timed_out(connection, saga) if answer["turn"] == saga.turn else None
            if saga.phase == "undoing":
                return self._undo(connection, saga, self._before(saga.step), saga.reason)
            if answer["outcome"] != "done":
                reason = f"{saga.step}: {answer['answer']}"
                return self._undo(connection, saga, self._before(saga.step), reason)
            answers = {**saga.answers, saga.step: answer["answer"]}
            names = [*self._steps]
            following = names[names.index(saga.step) + 1 :]
            phase, step = ("running", following[0]) if following else ("completed", saga.step)
            return self._store(connection, saga, phase=phase, step=step, tries=0, stuck=False, answers=answers)

    def _timed_out(self, connection: sa.Connection, saga: Saga) -> Saga:
        words = f"{saga.step}: no answer within {self._steps[saga.step].timeout:g} s"
        if saga.phase == "running" and self._steps[saga.step].undoable:
            return self._undo(connection, saga, saga.step, words)  # it may have been done
        if saga.tries + 1 < self._attempts:
            return self._store(connection, saga, tries=saga.tries + 1)
        doing = "doing" if saga.phase == "running" else "undoing"
        reason = f"{doing} {words}, {self._attempts} times" + (f" (after {saga.reason})" if saga.reason else "")
        return self._store(connection, saga, stuck=True, reason=reason)

    def _undo(self, connection: sa.Connection, saga: Saga, step: str | None, reason: str | None) -> Saga:
        phase = "undoing" if step else "compensated"
        return self._store(connection, saga, phase=phase, step=step or saga.step, tries=0, stuck=False, reason=reason)

    def _before(self, step: str) -> str | None:
        """The last step before this one that can be undone."""
        names = [*self._steps]
        earlier = names[: names.index(step)]
        return next((name for name in reversed(earlier) if self._steps[name].undoable), None)

    async def _answer(self, message: AbstractIncomingMessage) -> None:
        try:
            answer = json.loads(message.body)
            answer["saga"], answer["step"], answer["action"]
            answer["turn" if answer["outcome"] == "timeout" else "answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self.unreadable += 1
            return
        try:
            saga = await asyncio.to_thread(self._move, answer)
        except Exception as error:  # it goes back to the queue, and not at once
            self.error = error
            await asyncio.sleep(PAUSE_SECONDS)
            raise
        if saga is None:
            self.late += 1
        elif saga.outcome in UNFINISHED:
            self._due.put_nowait(saga)

    async def _dispatch(self) -> None:
        """Sends commands, each after its timeout: what is lost in between is decided by that."""
        while True:
            saga = await self._due.get()
            step = self._steps[saga.step]
            told = {"saga": saga.id, "step": step.name, "action": "do" if saga.phase == "running" else "undo"}
            timeout = json_message(told | {"outcome": "timeout", "turn": saga.turn})
            while not await self._sent(timeout, _waiting(self._name, step)):  # noqa: ASYNC110
                await asyncio.sleep(PAUSE_SECONDS)
            command = told | {"data": saga.data, "answers": saga.answers, "reply_to": self.answers}
            await self._sent(json_message(command, f"{saga.id}.{step.name}.{told['action']}"), step.queue)

    async def _sent(self, message: Any, queue: str) -> bool:
        try:
            await send(self._consumer.link, message, queue)
        except Unconfirmed as error:
            self.error = error
            return False
        return True


def _waiting(name: str, step: Step) -> str:
    return f"{name}.timeout.{int(step.timeout * 1000)}"


@contextlib.asynccontextmanager
async def orchestrate(
    rabbit: Connectable, engine: sa.Engine, name: str, steps: Sequence[Step], attempts: int = 5
) -> AsyncIterator[Orchestrator]:
    """Leads sagas of these steps for the length of the block, and goes on with those that are unfinished.

    `engine` is one of `inbox.database`; its table `sagas` is made, as are the queues whose names begin with `name`. An
    undo, or a step that cannot be undone, is told `attempts` times, its timeout apart, before the saga is stuck.
    Several orchestrators of one name share the work; what one that dies had decided, and not sent, goes out when one is
    started. Raises `ValueError` for steps that make no sense, also when an unfinished saga is at one that is gone;
    `BrokerError` for a queue that is there and is another.
    """
    names = [step.name for step in steps]
    if not steps or len({*names}) < len(names) or attempts < 1 or any(step.timeout < 0.001 for step in steps):
        raise ValueError("a saga has steps, each of another name, with a timeout of at least 1 ms, and at least one "
                         f"attempt: {names}, {[step.timeout for step in steps]}, {attempts}")  # fmt: skip
    METADATA.create_all(engine)
    made = Orchestrator(engine, name, steps, attempts)
    unfinished = await made._select(sa.and_(SAGAS.c.phase.in_(UNFINISHED), sa.not_(SAGAS.c.stuck)))
    if lost := [saga for saga in unfinished if saga.step not in names]:
        raise ValueError(f"saga {lost[0].id!r} is at {lost[0].step!r}, and the steps are {names}: let it end first")
    await declare(rabbit, made.answers, durable=True, arguments={"x-queue-type": "quorum"})
    for step in steps:
        route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": made.answers}
        patience = {"x-message-ttl": int(step.timeout * 1000)}
        await declare(rabbit, _waiting(name, step), durable=True, arguments={**SAFE, **route, **patience})
    for saga in unfinished:
        made._due.put_nowait(saga)
    taking = consuming(rabbit, made.answers, made._answer, PREFETCH, requeue=True)
    async with taking as made._consumer, beside(made._dispatch()):
        yield made
