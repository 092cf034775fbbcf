"""The exercises of notebook 16: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncIterator
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractQueue
from aio_pika.exceptions import PublishError

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.link import link
from mqlib.patterns.routing import Rule, start_router
from mqlib.patterns.sending import json_message, send

ORDERS: list[dict[str, Any]] = [
    {"region": "eu", "total": 200}, {"region": "us", "total": 50}, {"region": "apac", "total": 10},
    {"region": "eu", "total": 100}, {"region": "us"}, {"region": "apac", "total": 500},
]  # fmt: skip


async def _routed() -> dict[str, int]:
    rabbit = mq.rabbitmq()
    names = {name: rabbit.name(name) for name in ("big", "eu", "us", "invalid", "orders")}
    rules = [
        Rule(names["big"], test=lambda order: order["total"] > 100),
        Rule(names["eu"], {"region": "eu"}),
        Rule(names["us"], {"region": "us"}),
    ]
    async with mq.channel(rabbit) as channel:
        for name in ("big", "eu", "us"):
            await channel.declare_queue(names[name], durable=True)
        async with link(rabbit) as connection, start_router(rabbit, names["orders"], rules, names["invalid"]) as router:
            for order in ORDERS:
                await send(connection, json_message(order), names["orders"])
            await mq.until(lambda: router.hop.passed + router.hop.invalid == len(ORDERS))
        found = {}
        for name in ("big", "eu", "us", "invalid"):
            found[name] = len(await mq.take_messages(await channel.get_queue(names[name]), 10, within=0))
    return found


async def judge_1(answer: Any) -> None:
    if not isinstance(answer, dict) or {*answer} != {"big", "eu", "us", "invalid"}:
        raise Wrong(f"give a dict with the keys big, eu, us and invalid; this is {answer!r}")
    found = await _routed()
    if wrong := [name for name in found if answer[name] != found[name]]:
        name = wrong[0]
        raise Wrong(f"a real router puts {found[name]} into {name!r}, and you say {answer[name]!r}")


async def _of(queue: AbstractQueue) -> list[Any]:
    return [(json.loads(m.body), m.headers.get("routing-slip")) for m in await mq.take_messages(queue, 10, within=0)]


async def _one_step(step: Any, data: Any, slip: Any, *targets: str) -> tuple[list[Any], bool, Exception | None]:
    """What is in the invalid queue and in the targets, whether the message is still there, and what was raised."""
    rabbit, raised = mq.rabbitmq(), None

    async def work(data: Any) -> Any:
        return [*data, "worked"]

    async with mq.channel(rabbit) as outside:
        source = await outside.declare_queue(rabbit.name("exercise"), durable=True)
        names = {name: rabbit.name(name) for name in ("invalid", *targets, "nowhere")}
        queues = [await outside.declare_queue(names[name], durable=True) for name in ("invalid", *targets)]
        headers = {} if slip is None else {"routing-slip": slip}
        if isinstance(slip, list):
            headers = {"routing-slip": [names.get(each, each) for each in slip]}
        await outside.default_exchange.publish(Message(json.dumps(data).encode(), headers=headers), source.name)
        async with mq.channel(rabbit, on_return_raises=True) as channel:
            [message] = await mq.take_messages(await channel.get_queue(source.name), 1, ack=False)
            try:
                async with asyncio.timeout(5):
                    await step(channel, message, work, names["invalid"])
            except Exception as error:
                raised = error
        left = bool(await mq.take_messages(source, 1, within=0.3))
        found = [await _of(queue) for queue in queues]
    again = {full: name for name, full in names.items()}
    return (
        [[(body, [again.get(n, n) for n in s] if isinstance(s, list) else s) for body, s in each] for each in found],
        left,
        raised,
    )


async def judge_2(step: Any) -> None:
    if not callable(step):
        raise Wrong(f"write `async def step(channel, message, work, invalid)`; this is {step!r}")
    found, left, raised = await _one_step(step, ["a"], ["two", "three"], "two", "three")
    if raised:
        raise Wrong(f"with the slip [two, three] it raised {type(raised).__name__}: {raised}")
    if found != [[], [(["a", "worked"], ["three"])], []]:
        raise Wrong(f"with the slip [two, three], queue two should hold the new data and the slip [three]; {found[1]}")
    if left:
        raise Wrong("the message went on, and was not acknowledged: it will go on again")
    found, left, raised = await _one_step(step, ["a"], [], "two")
    if found != [[], []] or left or raised:
        raise Wrong(f"an empty slip is the end: nothing to publish, and acknowledged; {found}, {raised!r}")
    for slip in (None, "two", ["two", 3]):
        found, left, raised = await _one_step(step, ["a"], slip, "two", "t")
        if raised or left or [body for body, _ in found[0]] != [["a"]] or found[1:] != [[], []]:
            raise Wrong(f"the slip {slip!r} is no list of names; it belongs, unworked, into the queue `invalid`")
    found, left, raised = await _one_step(step, ["a"], ["nowhere"])
    if not left:
        raise Wrong("the next queue was not there, and the message is lost: acknowledge after the publish")
    if not isinstance(raised, PublishError):
        raise Wrong("the next queue was not there, and nobody was told: let PublishError come out")


async def step(channel, message, work, invalid):
    out, slip = channel.default_exchange, message.headers.get("routing-slip")
    if not isinstance(slip, list) or not all(isinstance(name, str) for name in slip):
        await out.publish(Message(message.body), invalid)
    else:
        data = await work(json.loads(message.body))
        if slip:
            headers = {"routing-slip": slip[1:]}
            await out.publish(Message(json.dumps(data).encode(), headers=headers), slip[0])
    await message.ack()


async def acknowledges_first(channel: Any, message: Any, work: Any, invalid: str) -> None:
    await message.ack()
    slip = message.headers.get("routing-slip")
    if not isinstance(slip, list) or not all(isinstance(name, str) for name in slip):
        await channel.default_exchange.publish(Message(message.body), invalid)
    elif slip:
        copy = Message(json.dumps(await work(json.loads(message.body))).encode(), headers={"routing-slip": slip[1:]})
        await channel.default_exchange.publish(copy, slip[0])


async def keeps_the_slip(channel: Any, message: Any, work: Any, invalid: str) -> None:
    slip = message.headers.get("routing-slip")
    if slip:
        copy = Message(json.dumps(await work(json.loads(message.body))).encode(), headers={"routing-slip": slip})
        await channel.default_exchange.publish(copy, slip[0])
    await message.ack()


async def believes_any_slip(channel: Any, message: Any, work: Any, invalid: str) -> None:
    slip = message.headers.get("routing-slip")
    if slip:
        copy = Message(json.dumps(await work(json.loads(message.body))).encode(), headers={"routing-slip": slip[1:]})
        await channel.default_exchange.publish(copy, slip[0])
    await message.ack()


async def swallows(channel: Any, message: Any, work: Any, invalid: str) -> None:
    with contextlib.suppress(PublishError):
        await step(channel, message, work, invalid)


class _Parts:
    """A queue of parts, whose dead letters are the parts that came too late."""

    def __init__(self, channel: AbstractChannel, queue: AbstractQueue, late: AbstractQueue) -> None:
        self.channel, self.queue, self.late = channel, queue, late
        self.emitted = list[tuple[str, str, list[bytes]]]()

    async def add(self, id: str, *numbers: int) -> None:
        for number in numbers:
            headers: dict[str, Any] = {"seq-id": id, "seq-no": number, "seq-size": 3}
            message = Message(f"{id}{number}".encode(), headers=headers)
            await self.channel.default_exchange.publish(message, self.queue.name)

    async def emit(self, id: str, outcome: str, bodies: Any) -> None:
        self.emitted.append((id, outcome, list(bodies)))

    @contextlib.asynccontextmanager
    async def running(self, aggregate: Any, emit: Any, timeout: float) -> AsyncIterator[None]:
        """The answer at work on a channel of its own, until the end of the block."""
        async with mq.channel(mq.rabbitmq(), prefetch=20) as channel:
            task = asyncio.ensure_future(aggregate(await channel.get_queue(self.queue.name), emit, timeout))
            try:
                yield
            finally:
                task.cancel()
                _, slow = await asyncio.wait([task], timeout=2)
            if not slow and not task.cancelled() and (error := task.exception()):
                raise Wrong(f"it ended with {type(error).__name__}: {error}")

    async def left(self, wanted: int) -> list[str]:
        messages = await mq.take_messages(self.queue, wanted, within=2)
        return sorted(m.body.decode() for m in [*messages, *await mq.take_messages(self.queue, 20, within=0)])


async def _seen(fact: Any, otherwise: str) -> None:
    try:
        await mq.until(fact, within=5)
    except TimeoutError:
        raise Wrong(otherwise) from None


async def judge_3(aggregate: Any) -> None:
    if not callable(aggregate):
        raise Wrong(f"write `async def aggregate(queue, emit, timeout)`; this is {aggregate!r}")
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel:
        late = await channel.declare_queue(rabbit.name("late"), durable=True)
        route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": late.name}
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True, arguments={**route})
        parts = _Parts(channel, queue, late)
        await parts.add("A", 2, 1, 1, 0)
        await parts.add("B", 0, 2)
        async with parts.running(aggregate, parts.emit, 60):
            await _seen(lambda: parts.emitted, "all parts of group A came, and after 5 s it is not out")
        if parts.emitted != [("A", "complete", [b"A0", b"A1", b"A2"])]:
            raise Wrong(f"A came with a copy of its part 1, B lacks one, time was left; it emitted {parts.emitted}")
        if (left := await parts.left(2)) != ["B0", "B2"]:
            raise Wrong(f"A is out, and B not yet: B0 and B2 should be back in the queue; there are {left}")
        stuck = asyncio.Event()

        async def hang(id: str, outcome: str, bodies: Any) -> None:
            stuck.set()
            await asyncio.sleep(60)

        await parts.add("C", 0, 1, 2)
        async with parts.running(aggregate, hang, 60):
            await _seen(stuck.is_set, "all parts of group C came, and after 5 s it is not out")
        if (left := await parts.left(3)) != ["C0", "C1", "C2"]:
            raise Wrong(f"it ended before `emit` had returned: the three parts should be back; there are {left}")
        parts.emitted.clear()
        await parts.add("D", 0, 2)
        async with parts.running(aggregate, parts.emit, 0.3):
            await _seen(lambda: parts.emitted, "a part of D is missing; its time was over, and after 5 s it is not out")
            await parts.add("D", 1)
            count = len(await mq.take_messages(late, 1, within=2))
        if parts.emitted != [("D", "partial", [b"D0", b"D2"])]:
            raise Wrong(f"D went out without its part 1, which came late; it emitted {parts.emitted}")
        if not count:
            raise Wrong("the late part of D should be rejected without requeue, so that it becomes a dead letter")


async def aggregate(queue, emit, timeout):
    open, out, clock = {}, set(), asyncio.get_running_loop().time
    while True:
        message = await queue.get(fail=False)
        if message is None:
            await asyncio.sleep(0.01)
        else:
            id, number, size = (message.headers[name] for name in ("seq-id", "seq-no", "seq-size"))
            _, _, parts = open.get(id, (0, 0, {}))
            if id in out:
                await message.reject(requeue=False)
            elif number in parts:
                await message.ack()
            else:
                open.setdefault(id, (clock() + timeout, size, parts))[2][number] = message
        for id, (due, size, parts) in list(open.items()):
            if len(parts) == size or clock() >= due:
                outcome = "complete" if len(parts) == size else "partial"
                await emit(id, outcome, [parts[number].body for number in sorted(parts)])
                for part in parts.values():
                    await part.ack()
                del open[id]
                out.add(id)


async def _collect(queue: Any, emit: Any, timeout: float, early: bool, copies: bool, remembers: bool) -> None:
    """The solution, with its faults to choose."""
    open, out, clock = dict[str, Any](), set[str](), asyncio.get_running_loop().time
    for _ in range(2000):
        message = await queue.get(fail=False)
        if message is None:
            await asyncio.sleep(0.01)
        else:
            id = message.headers["seq-id"]
            due, parts = open.setdefault(id, (clock() + timeout, []))
            known = {part.headers["seq-no"] for part in parts}
            if id in out and remembers:
                del open[id]
                await message.reject(requeue=False)
            elif copies or message.headers["seq-no"] not in known:
                parts.append(message)
            if early or message not in parts:
                await (message.ack() if not message.processed else asyncio.sleep(0))
        for id, (due, parts) in list(open.items()):
            if len(parts) == 3 or clock() >= due:
                bodies = [part.body for part in sorted(parts, key=lambda part: part.headers["seq-no"])]
                await emit(id, "complete" if len(parts) == 3 else "partial", bodies)
                for part in parts:
                    if not part.processed:
                        await part.ack()
                del open[id]
                out.add(id)


async def counts_copies(queue: Any, emit: Any, timeout: float) -> None:
    await _collect(queue, emit, timeout, early=False, copies=True, remembers=True)


async def acknowledges_at_once(queue: Any, emit: Any, timeout: float) -> None:
    await _collect(queue, emit, timeout, early=True, copies=False, remembers=True)


async def forgets_what_is_out(queue: Any, emit: Any, timeout: float) -> None:
    await _collect(queue, emit, timeout, early=False, copies=False, remembers=False)


async def waits_for_all(queue: Any, emit: Any, timeout: float) -> None:
    await _collect(queue, emit, 3600, early=False, copies=False, remembers=True)


async def looks_at_the_end(queue: Any, emit: Any, timeout: float) -> None:
    await asyncio.sleep(timeout)
    await aggregate(queue, emit, 0)


def _start(name: str, number: str) -> str:
    return f'{name} = ...\n\nawait mq.exercise("{number}").check({name})'


TASKS = {
    "16.1": Task(
        question="Who gets it?",
        start=_start("answer", "16.1"),
        hints=[
            "The first rule that takes an order gets it, and no other: eu 200 is big.",
            'The order without a total: `order["total"]` raises in the first rule. That is no "no".',
        ],
        solution=None,
        code='answer = {"big": 2, "eu": 1, "us": 1, "invalid": 2}',
        judge=judge_1,
        wrong=[
            {"big": 2, "eu": 2, "us": 2, "invalid": 1},
            {"big": 2, "eu": 1, "us": 2, "invalid": 1},
            {"big": 1, "eu": 1, "us": 1, "invalid": 3},
            [2, 1, 1, 2],
        ],
    ),
    "16.2": Task(
        question="A step of a routing slip",
        start=_start("step", "16.2"),
        hints=[
            'A text is a sequence, too: `"two"[0]` is "t". Ask `isinstance(slip, list)`, and for each name `str`.',
            "`await channel.default_exchange.publish(Message(body, headers=…), name)` returns when it is confirmed.",
            "The acknowledgement is the last line, whichever way the message went.",
        ],
        solution=step,
        code=f"import json\n\nfrom aio_pika import Message\n\n\n{inspect.getsource(step)}",
        judge=judge_2,
        wrong=[acknowledges_first, keeps_the_slip, believes_any_slip, swallows, 3],
    ),
    "16.3": Task(
        question="Aggregate with a missing part",
        start=_start("aggregate", "16.3"),
        hints=[
            "`message = await queue.get(fail=False)` is None when nothing is there: then sleep for 10 ms.",
            "Keep for each open group when it is due, its size, and its messages by number.",
            "Keep the ids of the groups that are out: `await message.reject(requeue=False)` for whoever comes after.",
        ],
        solution=aggregate,
        judge=judge_3,
        wrong=[
            counts_copies, acknowledges_at_once, forgets_what_is_out, waits_for_all, looks_at_the_end, "nothing",
        ],
    ),
}  # fmt: skip
