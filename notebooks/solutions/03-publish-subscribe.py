"""The exercises of notebook 03: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aio_pika import Message

import mqlib as mq
from mqlib.checks import Task, Wrong

PATTERNS = {"a": ["order.*"], "b": ["order.#"], "c": ["*.*.eu"], "d": ["#.eu", "order.created.*"]}
KEYS = ["order", "order.created", "order.created.eu", "user.deleted.eu", "order.created.eu.north"]
LONGEST = 4.0
"""Seconds that an answer may take."""


async def _who_gets_it() -> dict[str, int]:
    rabbit, counts = mq.rabbitmq(), {}
    async with mq.channel(rabbit) as channel:
        exchange = await channel.declare_exchange(rabbit.name("exercise"), "topic", durable=True)
        queues = {}
        for name, patterns in PATTERNS.items():
            queues[name] = await channel.declare_queue(exclusive=True)
            for pattern in patterns:
                await queues[name].bind(exchange, pattern)
        for key in KEYS:
            await exchange.publish(Message(key.encode()), key)
        for name, queue in queues.items():
            counts[name] = len(await mq.take_messages(queue, 9, within=0))
    return counts


async def judge_1(answer: Any) -> None:
    if not isinstance(answer, dict) or set(answer) != set(PATTERNS):
        raise Wrong(f"give a dictionary with the keys a, b, c and d; this is {answer!r}")
    observed = await _who_gets_it()
    for name, count in observed.items():
        if answer[name] != count:
            patterns = " and ".join(PATTERNS[name])
            raise Wrong(f"queue {name}, bound with {patterns}, does not hold {answer[name]} messages")


async def judge_2(remember: Any) -> None:
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel:
        exchange = await channel.declare_exchange(rabbit.name("exercise"), "topic", durable=True)
        async with asyncio.timeout(LONGEST):
            history = await remember(channel, exchange, 3)
        keys = ["price.gold", "price.gold.eu", "order.created"] * 3
        for number, key in enumerate(keys):
            await exchange.publish(Message(b"%d" % number), key)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(history, "")
        await exchange.publish(Message(b"9"), "order.created")
        await exchange.publish(Message(b"10"), "price.gold")
        found = [int(message.body) for message in await mq.take_messages(queue, 9, within=0.5)]
    wanted = [4, 6, 7, 10]
    if found != wanted:
        raise Wrong(
            f"0, 1, 3, 4, 6, 7 are prices; then a queue is bound, and 10 is one, too. It got {found}, not {wanted}"
        )


async def remember(channel, exchange, count):
    history = await channel.declare_exchange(
        f"{exchange.name}.history",
        "x-recent-history",
        durable=False,
        auto_delete=True,
        arguments={"x-recent-history-length": count},
    )
    await history.bind(exchange, "price.#")
    return history


async def remembers_nothing(channel: Any, exchange: Any, count: int) -> Any:
    history = await channel.declare_exchange(f"{exchange.name}.history", "fanout", auto_delete=True)
    await history.bind(exchange, "price.#")
    return history


async def remembers_too_much(channel: Any, exchange: Any, count: int) -> Any:
    history = await channel.declare_exchange(f"{exchange.name}.history", "x-recent-history", auto_delete=True)
    await history.bind(exchange, "price.#")
    return history


async def remembers_two_words(channel: Any, exchange: Any, count: int) -> Any:
    history = await channel.declare_exchange(
        f"{exchange.name}.history", "x-recent-history", auto_delete=True, arguments={"x-recent-history-length": count}
    )
    await history.bind(exchange, "price.*")
    return history


async def remembers_all_kinds(channel: Any, exchange: Any, count: int) -> Any:
    history = await channel.declare_exchange(
        f"{exchange.name}.history", "x-recent-history", auto_delete=True, arguments={"x-recent-history-length": count}
    )
    await history.bind(exchange, "#")
    return history


async def judge_3(catch_up: Any) -> None:
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel, mq.channel(rabbit) as changing:
        exchange = await changing.declare_exchange(rabbit.name("exercise"), "topic", durable=True)
        changes: list[int] = []

        async def change(until: int) -> None:
            for number in range(len(changes), until):
                changes.append(number)
                await exchange.publish(Message(b"%d" % number), "index.changed", mandatory=False)

        async def load() -> list[int]:
            await change(6)
            snapshot = list(changes)
            await change(9)
            return snapshot

        await change(4)
        there = await channel.get_exchange(exchange.name)
        try:
            async with asyncio.timeout(LONGEST), asyncio.TaskGroup() as group:
                answer = group.create_task(catch_up(channel, there, load, 11))
                await mq.until(lambda: len(changes) == 9, within=2)
                await change(12)
                found = await answer
        except TimeoutError:
            raise Wrong(
                f"it had not returned after {LONGEST:g} s; a change that it waits for will not come again"
            ) from None
    if not isinstance(found, list):
        raise Wrong(f"it returned {found!r}, not a list of numbers")
    if found != list(range(12)):
        missing, twice = sorted(set(range(12)) - set(found)), sorted({n for n in found if found.count(n) > 1})
        raise Wrong(f"it returned {found}: missing {missing}, more than once {twice}")


async def catch_up(channel, exchange, load, last):
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "#")  # first, so that nothing is missed while it loads
    changes = await load()
    async with queue.iterator() as events:
        while changes[-1] < last:
            event = await anext(events)
            await event.ack()
            if int(event.body) > changes[-1]:  # the others are in the snapshot
                changes.append(int(event.body))
    return changes


async def loads_first(channel: Any, exchange: Any, load: Any, last: int) -> list[int]:
    changes: list[int] = await load()
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "#")
    while changes[-1] < last:
        changes += [int(event.body) for event in await mq.take_messages(queue, 1, within=0.1)]
    return changes


async def takes_both(channel: Any, exchange: Any, load: Any, last: int) -> list[int]:
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "#")
    changes: list[int] = await load()
    while changes[-1] < last:
        changes += [int(event.body) for event in await mq.take_messages(queue, 1)]
    return changes


async def loads_only(channel: Any, exchange: Any, load: Any, last: int) -> Any:
    return await load()


TASKS = {
    "03.1": Task(
        question="Who gets it?",
        start='answer = ...\n\nawait mq.exercise("03.1").check(answer)',
        hints=[
            "`*` is exactly one word, `#` is any number of them, none included: `order.#` fits `order`.",
            "A queue with two patterns that fit gets one copy. `*.*.eu` wants exactly three words.",
        ],
        solution=None,
        code='answer = {"a": 1, "b": 4, "c": 2, "d": 2}',
        judge=judge_1,
        wrong=[{"a": 2, "b": 4, "c": 2, "d": 2}, {"a": 1, "b": 3, "c": 2, "d": 2}, {"a": 1, "b": 4, "c": 2, "d": 3}, 9],
    ),
    "03.2": Task(
        question="A memory for late joiners",
        start='remember = ...\n\nawait mq.exercise("03.2").check(remember)',
        hints=[
            "Look at *Recent-history exchange* and at *Exchange-to-exchange binding* together.",
            "`price.*` fits two words only. The argument of the exchange is `x-recent-history-length`.",
        ],
        solution=remember,
        judge=judge_2,
        wrong=[remembers_nothing, remembers_too_much, remembers_two_words, remembers_all_kinds],
    ),
    "03.3": Task(
        question="Subscribe, then load",
        start='catch_up = ...\n\nawait mq.exercise("03.3").check(catch_up)',
        hints=[
            "What is published between the snapshot and your binding, nobody keeps for you. Which comes first?",
            "Bind first; then events and snapshot overlap. Skip an event that is not newer than what you have.",
        ],
        solution=catch_up,
        judge=judge_3,
        wrong=[loads_first, takes_both, loads_only],
    ),
}
