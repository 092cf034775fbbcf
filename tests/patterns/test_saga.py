"""Orders over three services: each is complete or undone, money and stock are conserved, whatever dies or is late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import mqlib as mq
from mqlib.patterns import participant
from mqlib.patterns.inbox import database
from mqlib.patterns.link import link
from mqlib.patterns.participant import Command, Refused, participate
from mqlib.patterns.saga import Orchestrator, Saga, Step, orchestrate
from mqlib.patterns.sending import json_message, send
from mqlib.patterns.work_queue import dead_letters_of
from tests.patterns import test_outbox as databases

engine, postgresql, sqlite, postgres = (
    databases.engine, databases.postgresql, databases.sqlite, databases.postgres
)  # fmt: skip
START = {"stock": 5, "money": 100, "parcels": 0}
DONE = {"stock": 4, "money": 90, "parcels": 1}


class Shop:
    """Three services, their accounts in one database; what they were told, and what they wait for."""

    def __init__(self, rabbit: mq.RabbitMQ, engine: sa.Engine) -> None:
        self.rabbit, self.engine, self.told = rabbit, engine, list[tuple[str, str]]()
        # The orchestrator's own: a service that takes its time holds SQLite's only lock.
        self.book = database(f"{engine.url}.book") if engine.dialect.name == "sqlite" else engine
        self.effects: Counter[tuple[str, str, str]] = Counter()
        self.queues = {step: rabbit.name(step) for step in ("reserve", "charge", "ship")}
        self.refuses: set[str] = set()
        self.broken: set[str] = set()
        self.gates = {step: threading.Event() for step in self.queues}
        for gate in self.gates.values():
            gate.set()
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE accounts (name VARCHAR PRIMARY KEY, amount INTEGER)")
            for name, amount in START.items():
                connection.exec_driver_sql(f"INSERT INTO accounts VALUES ('{name}', {amount})")

    def steps(self, timeout: float = 30.0, **others: float) -> list[Step]:
        return [Step(step, queue, others.get(step, timeout), step != "ship") for step, queue in self.queues.items()]

    @property
    def accounts(self) -> dict[str, int]:
        with self.engine.connect().execution_options(sqlite_begin="DEFERRED") as connection:
            rows = connection.exec_driver_sql("SELECT name, amount FROM accounts")
            return {row.name: row.amount for row in rows}

    def _change(self, connection: sa.Connection, command: Command, sign: int) -> None:
        name, amount = {"reserve": ("stock", -1), "charge": ("money", -10), "ship": ("parcels", 1)}[command.step]
        connection.exec_driver_sql(f"UPDATE accounts SET amount = amount + {sign * amount} WHERE name = '{name}'")

    def do(self, connection: sa.Connection, command: Command) -> dict[str, Any]:
        self.told.append((command.step, "do"))
        assert self.gates[command.step].wait(30)
        self._change(connection, command, 1)
        if command.step in self.broken:
            raise ConnectionError("broken")
        if command.step in self.refuses:
            raise Refused(f"no {command.step} today")
        self.effects[command.saga, command.step, "do"] += 1
        return {"by": command.step, "after": [*command.answers], "order": command.data}

    def undo(self, connection: sa.Connection, command: Command) -> None:
        self.told.append((command.step, "undo"))
        assert self.gates[command.step].wait(30)
        if f"undo {command.step}" in self.broken:
            raise ConnectionError("broken")
        assert command.answers[command.step]["by"] == command.step
        self._change(connection, command, -1)
        self.effects[command.saga, command.step, "undo"] += 1

    @contextlib.asynccontextmanager
    async def open(self, *steps: str, attempts: int = 1) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for step in steps or self.queues:
                serving = participate(
                    self.rabbit, self.engine, self.queues[step], self.do, self.undo, attempts, backoff=0.01
                )
                await stack.enter_async_context(serving)
            yield


@pytest.fixture
def shop(rabbit: mq.RabbitMQ, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(rabbit, database(f"sqlite:///{tmp_path}/shop.db"))
    yield made
    made.book.dispose()
    made.engine.dispose()


def leading(shop: Shop, name: str, steps: list[Step], attempts: int = 2) -> Any:
    return orchestrate(shop.rabbit, shop.book, name, steps, attempts)


async def test_all_steps_happen_in_order_and_each_knows_what_was_answered_before(
    rabbit: mq.RabbitMQ, engine: sa.Engine
) -> None:
    shop = Shop(rabbit, engine)
    async with shop.open(), leading(shop, rabbit.name("orders"), shop.steps()) as orders:
        id = await orders.start({"item": "tea"})
        end = await orders.ended(id)
    assert (end.outcome, end.reason) == ("completed", None)
    assert shop.told == [("reserve", "do"), ("charge", "do"), ("ship", "do")]
    assert shop.accounts == DONE
    assert [each["after"] for each in end.answers.values()] == [[], ["reserve"], ["reserve", "charge"]]
    assert end.answers["ship"]["order"] == {"item": "tea"}
    assert await orders.stuck() == []


async def test_a_refusal_undoes_what_was_done_in_reverse(rabbit: mq.RabbitMQ, engine: sa.Engine) -> None:
    shop = Shop(rabbit, engine)
    shop.refuses = {"ship"}
    async with shop.open(), leading(shop, rabbit.name("orders"), shop.steps()) as orders:
        end = await orders.ended(await orders.start(1))
    assert (end.outcome, end.reason) == ("compensated", "ship: no ship today")
    assert shop.told[3:] == [("charge", "undo"), ("reserve", "undo")]
    assert shop.accounts == START


async def test_a_refusal_of_the_first_step_leaves_nothing_to_undo(shop: Shop) -> None:
    shop.refuses = {"reserve"}
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        end = await orders.ended(await orders.start(1))
    assert (end.outcome, shop.told, shop.accounts) == ("compensated", [("reserve", "do")], START)


async def test_a_step_that_cannot_be_undone_is_passed_by(shop: Shop) -> None:
    shop.refuses = {"ship"}
    steps = [Step(name, queue, undoable=name == "reserve") for name, queue in shop.queues.items()]
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), steps) as orders:
        end = await orders.ended(await orders.start(1))
    assert (end.outcome, shop.told[3:]) == ("compensated", [("reserve", "undo")])


async def test_an_answer_after_the_timeout_changes_nothing_and_what_it_tells_of_is_undone(shop: Shop) -> None:
    """The classical error: the payment is late, the saga has given up, and the money is gone."""
    shop.gates["charge"].clear()
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(charge=0.2)) as orders:
        id = await orders.start(1)
        await mq.until(lambda: ("charge", "do") in shop.told, within=15)

        async def gives_up() -> bool:
            return bool((await orders.get(id)).phase == "undoing")

        await mq.until(gives_up, within=30)
        assert shop.accounts == START | {"stock": 4}
        shop.gates["charge"].set()
        end = await orders.ended(id)
        await mq.until(lambda: orders.late > 0, within=15)
    assert (end.outcome, end.reason) == ("compensated", "charge: no answer within 0.2 s")
    assert shop.effects[id, "charge", "do"] == shop.effects[id, "charge", "undo"] == 1
    assert shop.accounts == START


async def test_an_undo_that_overtakes_its_command_stops_it(shop: Shop) -> None:
    """Nobody serves payments until the saga has given up: the command is delivered after all, and has no effect."""
    queue, name = shop.queues["charge"], shop.rabbit.name("orders")
    async with shop.open("charge"):
        pass  # now the queue is there
    async with shop.open("reserve", "ship"), leading(shop, name, shop.steps(charge=0.2), attempts=100) as orders:
        id = await orders.start(1)

        async def both_wait() -> bool:
            return (await orders.get(id)).phase == "undoing" and (await mq.depth(shop.rabbit, queue, "amqp")).ready >= 2

        await mq.until(both_wait, within=30)
        async with mq.channel(shop.rabbit) as channel:  # the command goes to the end of the queue
            waiting = await channel.get_queue(queue)
            [first] = await mq.take_messages(waiting, 1)
            again = json_message(json.loads(first.body), first.message_id)
            await channel.default_exchange.publish(again, queue)
        async with shop.open("charge"):
            end = await orders.ended(id)
            await mq.until(lambda: ("charge", "do") not in shop.told and orders.late > 0, within=15)
    assert end.outcome == "compensated"
    assert shop.effects[id, "charge", "do"] == 0
    assert shop.accounts == START


async def test_a_compensation_that_fails_at_first_is_tried_again(shop: Shop) -> None:
    shop.refuses, shop.broken = {"ship"}, {"undo charge"}
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(charge=0.3), attempts=100) as orders:
        id = await orders.start(1)
        await mq.until(lambda: shop.told.count(("charge", "undo")) >= 2, within=30)
        shop.broken.clear()
        end = await orders.ended(id)
    assert (end.outcome, end.reason) == ("compensated", "ship: no ship today")
    assert shop.effects[id, "charge", "undo"] == 1
    assert shop.accounts == START


async def test_a_compensation_that_never_succeeds_is_stuck_and_goes_on_when_a_person_says_so(shop: Shop) -> None:
    shop.refuses, shop.broken = {"ship"}, {"undo charge"}
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(charge=0.3), attempts=2) as orders:
        id = await orders.start(1)
        end = await orders.ended(id)
        assert end.outcome == "stuck"
        assert end.reason == "undoing charge: no answer within 0.3 s, 2 times (after ship: no ship today)"
        assert [each.id for each in await orders.stuck()] == [id]
        assert shop.told.count(("charge", "undo")) == 2
        assert shop.accounts == DONE | {"parcels": 0}
        shop.broken.clear()
        await orders.resume(id)
        end = await orders.ended(id)
        await orders.resume(id)  # that changes nothing any more
        assert await orders.get(id) == end
    assert (end.outcome, await orders.stuck()) == ("compensated", [])
    assert shop.accounts == START


async def test_what_cannot_be_undone_is_told_again_and_never_undone(shop: Shop) -> None:
    """A parcel may be on its way: neither goes on without knowing, nor is the money returned."""
    shop.broken = {"ship"}
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(ship=0.3), attempts=3) as orders:
        id = await orders.start(1)
        end = await orders.ended(id)
        assert (end.outcome, end.reason) == ("stuck", "doing ship: no answer within 0.3 s, 3 times")
        assert shop.told.count(("ship", "do")) == 3
        assert shop.accounts == DONE | {"parcels": 0}
        shop.broken.clear()
        shop.gates["ship"].clear()
        await orders.resume(id)
        assert (await orders.get(id)).tries == 0
        shop.gates["ship"].set()
        assert (await orders.ended(id)).outcome == "completed"
    assert shop.accounts == DONE


async def test_a_restart_leaves_to_the_person_what_is_stuck(shop: Shop) -> None:
    shop.broken, name = {"reserve"}, shop.rabbit.name("orders")
    steps = [Step("reserve", shop.queues["reserve"], 0.3, undoable=False)]
    async with shop.open("reserve"), leading(shop, name, steps, attempts=1) as orders:
        stuck = await orders.ended(await orders.start(1))
        assert stuck.outcome == "stuck"
    shop.broken.clear()
    told = [*shop.told]
    async with shop.open("reserve"), leading(shop, name, shop.steps()[:1]) as orders:
        await orders.ended(await orders.start(2))  # what is sent at the start is sent before this
        assert await orders.get(stuck.id) == stuck
    assert shop.told[len(told) :] == [("reserve", "do")]


async def test_a_late_answer_frees_a_saga_that_is_stuck(shop: Shop) -> None:
    shop.gates["ship"].clear()
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(ship=0.2), attempts=1) as orders:
        id = await orders.start(1)
        assert (await orders.ended(id)).outcome == "stuck"
        shop.gates["ship"].set()

        async def completed() -> bool:
            return bool((await orders.get(id)).outcome == "completed")

        await mq.until(completed, within=15)
    assert (await orders.stuck(), shop.accounts) == ([], DONE)


async def test_a_saga_with_the_same_id_is_started_once(shop: Shop) -> None:
    """Its first command goes out once; that of the next saga comes right behind it."""
    async with shop.open(attempts=3):
        pass  # now the queues are there
    async with leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        assert await orders.start(1, id="a") == await orders.start(2, id="a") == "a"
        await orders.start(3, id="b")
        async with mq.channel(shop.rabbit) as channel:  # closed, it gives them back
            waiting = await channel.get_queue(shop.queues["reserve"])
            commands = await mq.take_messages(waiting, 2, within=15, ack=False)
        assert [json.loads(each.body)["saga"] for each in commands] == ["a", "b"]
        async with shop.open(attempts=3):
            end = await orders.ended("a")
            await orders.ended("b")
            await orders.start(4, id="a")
    assert (end.data, shop.accounts) == (1, {"stock": 3, "money": 80, "parcels": 2})


async def test_a_timeout_belongs_to_one_command(shop: Shop) -> None:
    """After a restart there may be two of them: the second says nothing about what was sent meanwhile."""
    shop.gates["ship"].clear()
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps(), attempts=9) as orders:
        id = await orders.start(1)
        await mq.until(lambda: ("ship", "do") in shop.told, within=15)
        turn = (await orders.get(id)).turn
        timeout = {"saga": id, "step": "ship", "action": "do", "outcome": "timeout", "turn": turn}
        late = orders.late
        async with link(shop.rabbit) as connection:
            for _ in range(2):
                await send(connection, json_message(timeout), orders.answers)
        await mq.until(lambda: orders.late == late + 1, within=15)
        saga = await orders.get(id)
        assert (saga.tries, saga.turn) == (1, turn + 1)
        shop.gates["ship"].set()
        assert (await orders.ended(id)).outcome == "completed"


async def lead(rabbit: mq.RabbitMQ, url: str, name: str, queues: dict[str, str], id: str, point: int) -> None:
    """An orchestrator that ends by SIGKILL at the n-th of these: before a commit, before a message, after it."""
    import asyncio

    import sqlalchemy as sa

    import mqlib
    from mqlib.patterns import saga
    from mqlib.patterns.inbox import database

    def at_a_point() -> None:
        nonlocal point
        point -= 1
        mqlib.crash() if point == 0 else None

    sending, engine = vars(saga)["send"], database(url)

    async def send(*arguments: Any) -> None:
        at_a_point()
        await sending(*arguments)
        at_a_point()

    def writes(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("UPDATE sagas", "INSERT INTO sagas")):
            connection.info["wrote"] = True

    def before_commit(connection: Any) -> None:
        if connection.info.pop("wrote", False):
            at_a_point()

    vars(saga)["send"] = send
    sa.event.listen(engine, "before_cursor_execute", writes)
    sa.event.listen(engine, "commit", before_commit)
    steps = [saga.Step(step, queue, 30.0, step != "ship") for step, queue in queues.items()]
    async with saga.orchestrate(rabbit, engine, name, steps) as orders:
        if id:
            await orders.start(1, id=id)
        print("started", flush=True)
        await asyncio.Event().wait()


@pytest.mark.parametrize("refuses", [set(), {"ship"}], ids=["completed", "compensated"])
async def test_an_orchestrator_that_is_killed_anywhere_goes_on(shop: Shop, refuses: set[str]) -> None:
    """Every point of its way: a turn is a commit, and before and after each of two messages; the end is a commit. The
    last turn when all goes well is the only one that is not among those of the other way."""
    shop.refuses = refuses
    points = range(1, 5 * 5 + 2) if refuses else range(2 * 5, 3 * 5 + 2)
    left = iter(points)

    async def killed_at(point: int) -> None:
        name, id = shop.rabbit.name("orders"), f"order-{point}"
        async with mq.worker(lead, shop.rabbit, str(shop.book.url), name, shop.queues, id, point) as process:
            await process.ended(within=60)
            assert process.crashed, point
        async with leading(shop, name, shop.steps()) as orders:
            await orders.start(1, id=id)  # whoever ordered got no answer, and asks again
            end = await orders.ended(id)
        assert end.outcome == ("compensated" if refuses else "completed"), point

    async def several() -> None:
        for point in left:
            await killed_at(point)

    with shop.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE accounts SET amount = 1000 WHERE name IN ('stock', 'money')")
    async with shop.open(), asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(several())
    assert set(shop.effects.values()) == {1}
    done = 0 if refuses else len(points)
    assert shop.accounts == {"stock": 1000 - done, "money": 1000 - 10 * done, "parcels": done}


async def serve(rabbit: mq.RabbitMQ, url: str, queue: str, point: str, action: str) -> None:
    """Payments, by a process that ends by SIGKILL at a point of its first command to do or undo something."""
    import asyncio

    import mqlib
    from mqlib.patterns import participant
    from mqlib.patterns.inbox import database

    def effect(connection: Any, command: Any, amount: int, what: str) -> None:
        connection.exec_driver_sql(f"UPDATE accounts SET amount = amount + {amount} WHERE name = 'money'")
        mqlib.crash() if (point, action) == ("in the transaction", what) else None

    sending = vars(participant)["send"]

    async def send(link: Any, message: Any, to: str) -> None:
        mine = f'"{action}"'.encode() in message.body
        mqlib.crash() if point == "before the answer" and mine else None
        await sending(link, message, to)
        mqlib.crash() if point == "after the answer" and mine else None

    vars(participant)["send"] = send
    engine = database(url)
    async with participant.participate(
        rabbit, engine, queue,
        lambda connection, command: effect(connection, command, -10, "do"),
        lambda connection, command: effect(connection, command, 10, "undo"),
    ):  # fmt: skip
        print("serving", flush=True)
        await asyncio.Event().wait()


@pytest.mark.parametrize("point", ["in the transaction", "before the answer", "after the answer"])
@pytest.mark.parametrize("action", ["do", "undo"])
async def test_a_service_that_is_killed_anywhere_has_its_effect_once(shop: Shop, point: str, action: str) -> None:
    shop.refuses = {"ship"}
    url, queue = str(shop.engine.url), shop.queues["charge"]
    async with shop.open("reserve", "ship"), leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        async with mq.worker(serve, shop.rabbit, url, queue, point, action) as dies:
            await dies.printed("serving", within=30)
            id = await orders.start(1)
            await dies.ended(within=60)
            assert dies.crashed
        async with mq.worker(serve, shop.rabbit, url, queue, "never", "") as lives:
            await lives.printed("serving", within=30)
            end = await orders.ended(id)
    assert (end.outcome, shop.accounts) == ("compensated", START)


async def test_commands_again_and_again_have_one_effect_and_the_same_answer(
    rabbit: mq.RabbitMQ, engine: sa.Engine
) -> None:
    shop = Shop(rabbit, engine)
    participant.create_tables(engine)
    command = Command("a", "charge", 1, {})

    def tell(action: str, told: Command = command) -> tuple[str, Any]:
        with engine.begin() as connection:
            return participant.handle(connection, action, told, shop.do, shop.undo)

    first = tell("do")
    assert first[0] == "done"
    assert tell("do") == first
    assert shop.accounts["money"] == 90
    assert [tell("undo")[0], tell("undo")[0], tell("do")[0]] == ["undone"] * 3
    assert shop.accounts["money"] == 100
    other = command._replace(saga="b")
    assert [tell("undo", other)[0], tell("do", other)[0]] == ["undone", "undone"]
    refused = command._replace(saga="c")
    shop.refuses = {"charge"}
    assert tell("do", refused) == ("refused", "no charge today")
    shop.refuses = set()
    assert tell("do", refused) == ("refused", "no charge today")
    assert tell("undo", refused)[0] == "undone"
    assert shop.effects == {("a", "charge", "do"): 1, ("a", "charge", "undo"): 1}
    assert shop.accounts == START
    with pytest.raises(ValueError, match=r"saga a, step 'charge': the action is do or undo, not 'redo'"):
        tell("redo")


@pytest.mark.parametrize("action", ["do", "undo"])
async def test_two_deliveries_at_once_have_one_effect(rabbit: mq.RabbitMQ, engine: sa.Engine, action: str) -> None:
    shop = Shop(rabbit, engine)
    participant.create_tables(engine)
    command = Command("a", "charge", 1, {})

    def tell(action: str) -> tuple[str, Any]:
        with engine.begin() as connection:
            return participant.handle(connection, action, command, shop.do, shop.undo)

    if action == "undo":
        tell("do")
    shop.gates["charge"].clear()
    both = asyncio.gather(*(asyncio.to_thread(tell, action) for _ in range(2)))
    await mq.until(lambda: ("charge", action) in shop.told)
    done, _ = await asyncio.wait([both], timeout=0.2)  # so long, the second one waits for the first
    assert not done
    shop.gates["charge"].set()
    first, second = await both
    assert first == second
    assert shop.effects["a", "charge", action] == 1
    assert shop.accounts["money"] == (90 if action == "do" else 100)


async def test_what_is_no_answer_is_counted_and_holds_nothing_up(shop: Shop) -> None:
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        async with link(shop.rabbit) as connection:
            bad: list[Any] = [[], {"saga": "x"}, {"saga": "x", "step": "ship", "action": "do", "outcome": "timeout"}]
            for data in bad:
                await send(connection, json_message(data), orders.answers)
            stranger = {"saga": "x", "step": "ship", "action": "do", "outcome": "done", "answer": 1}
            await send(connection, json_message(stranger), orders.answers)
        assert (await orders.ended(await orders.start(1))).outcome == "completed"
        await mq.until(lambda: (orders.unreadable, orders.late) == (3, 1), within=15)


async def test_a_command_that_no_queue_takes_ends_by_its_timeout(shop: Shop) -> None:
    steps = [Step("reserve", shop.queues["reserve"]), Step("charge", shop.rabbit.name("nowhere"), 0.2)]
    async with shop.open("reserve"), leading(shop, shop.rabbit.name("orders"), steps, attempts=1) as orders:
        end = await orders.ended(await orders.start(1))
        assert "no queue is bound for it" in str(orders.error)
    assert (end.outcome, shop.accounts) == ("stuck", START | {"stock": 4})


async def test_a_database_that_fails_loses_no_answer(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    moving, failures = Orchestrator._move, [sa.exc.OperationalError("", {}, Exception("disk full"))]

    def move(self: Orchestrator, answer: dict[str, Any]) -> Saga | None:
        if answer["step"] == "charge" and answer["outcome"] == "done" and failures:
            raise failures.pop()
        return moving(self, answer)

    monkeypatch.setattr(Orchestrator, "_move", move)
    async with shop.open(), leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        assert (await orders.ended(await orders.start(1))).outcome == "completed"
        assert "disk full" in str(orders.error)
    assert not failures


async def test_steps_that_make_no_sense_are_refused(shop: Shop) -> None:
    for steps in ([], [Step("a", "q"), Step("a", "r")], [Step("a", "q", timeout=0)]):
        with pytest.raises(ValueError, match="a saga has steps, each of another name"):
            async with leading(shop, shop.rabbit.name("orders"), steps):
                pass
    with pytest.raises(ValueError, match="at least one attempt"):
        async with leading(shop, shop.rabbit.name("orders"), shop.steps(), attempts=0):
            pass


async def test_a_step_that_is_gone_while_a_saga_is_at_it_is_an_error(shop: Shop) -> None:
    name = shop.rabbit.name("orders")
    async with shop.open("reserve"), leading(shop, name, shop.steps()) as orders:
        id = await orders.start(1)

        async def waits() -> bool:
            return bool((await orders.get(id)).step == "charge")

        await mq.until(waits, within=15)
    with pytest.raises(ValueError, match=rf"saga '{id}' is at 'charge', and the steps are \['reserve', 'ship'\]"):
        async with leading(shop, name, [step for step in shop.steps() if step.name != "charge"]):
            pass


async def test_a_saga_that_is_not_there_and_data_that_is_not_json(shop: Shop) -> None:
    async with leading(shop, shop.rabbit.name("orders"), shop.steps()) as orders:
        with pytest.raises(LookupError, match="has no saga 'x'"):
            await orders.get("x")
        for data in ({1, 2}, float("nan")):
            with pytest.raises((TypeError, ValueError)):
                await orders.start(data)


async def test_a_step_that_fails_by_accident_is_tried_again_and_then_set_aside(shop: Shop) -> None:
    shop.broken = {"reserve"}
    steps = shop.steps(reserve=0.5)
    async with shop.open(attempts=2), leading(shop, shop.rabbit.name("orders"), steps) as orders:
        end = await orders.ended(await orders.start(1))
    assert shop.told.count(("reserve", "do")) == 2
    assert (end.outcome, shop.accounts) == ("compensated", START)
    assert (await mq.depth(shop.rabbit, dead_letters_of(shop.queues["reserve"]), "amqp")).ready == 1
