"""A group goes out once, complete or partial; copies count once, late parts are told; crashes and cuts lose none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

import mqlib as mq
from mqlib.patterns.aggregation import (
    LARGEST_GROUP,
    Aggregator,
    Gathered,
    Group,
    all_there,
    parts_of,
    scatter_gather,
    start_aggregator,
)
from mqlib.patterns.link import Link, link
from mqlib.patterns.rpc import RemoteError, RpcError, RpcTimeout, rpc_client, start_rpc_server
from mqlib.patterns.sending import send
from tests.patterns.test_routing import bodies, held, made


def merged(group: Group) -> Any:
    return {"id": group.id, "data": [*group.data.values()]}


@dataclass
class Bench:
    """An aggregator, its queues, and a connection to publish parts with."""

    rabbit: mq.RabbitMQ
    connection: Link
    parts: str
    done: str
    invalid: str
    aggregator: Aggregator

    async def send(self, *messages: Message) -> None:
        for message in messages:
            await send(self.connection, message, self.parts)


@asynccontextmanager
async def bench(
    rabbit: mq.RabbitMQ, combine: Callable[[Group], Any] = merged, through: Any = None, **options: Any
) -> AsyncIterator[Bench]:
    [done] = await made(rabbit, "done")
    parts, invalid = rabbit.name("parts"), rabbit.name("invalid")
    async with (
        link(rabbit) as connection,
        start_aggregator(through or rabbit, parts, done, combine, invalid, **{"timeout": 60, **options}) as aggregator,
    ):
        yield Bench(rabbit, connection, parts, done, invalid, aggregator)


async def left(rabbit: mq.RabbitMQ, parts: str, count: int = 0) -> list[Any]:
    """The parts in the queue once there are `count`, and what else comes soon. (Such a queue knows no get.)"""
    found: list[Any] = []

    async def keep(message: AbstractIncomingMessage) -> None:
        found.append(json.loads(message.body))

    async with mq.channel(rabbit) as channel:
        await (await channel.get_queue(parts)).consume(keep)
        await mq.until(lambda: len(found) >= count)
        with suppress(TimeoutError):
            await mq.until(lambda: len(found) > count, within=0.2)
    return sorted(found)


async def nothing_is_left(at: Bench) -> None:
    assert await left(at.rabbit, at.parts) == await held(at.rabbit, at.done) == await held(at.rabbit, at.invalid) == []


async def test_a_complete_group_goes_out_at_once_and_once_in_the_order_of_its_numbers(rabbit: mq.RabbitMQ) -> None:
    async with bench(rabbit) as at:
        a, b = parts_of("a", ["x", "y", "z"]), parts_of("b", [1, 2])
        await at.send(a[2], b[1], a[0], b[0], a[1])
        await mq.until(lambda: at.aggregator.complete == 2)
    one, other = await held(rabbit, at.done, 2)
    assert json.loads(one.body) == {"id": "b", "data": [1, 2]}
    assert json.loads(other.body) == {"id": "a", "data": ["x", "y", "z"]}
    assert (other.message_id, other.correlation_id, other.delivery_mode) == ("a", "a", 2)
    assert (other.headers["group-outcome"], other.headers["group-missing"]) == ("complete", [])
    assert str(at.aggregator) == "complete 2, partial 0, duplicates 0, late 0, invalid 0"
    await nothing_is_left(at)


async def test_a_group_that_lacks_a_part_goes_out_partial_and_its_late_part_is_reported(rabbit: mq.RabbitMQ) -> None:
    async with bench(rabbit, timeout=0.05) as at:
        first, late, third = parts_of("b", ["x", "y", "z"])
        await at.send(third, first)
        await mq.until(lambda: at.aggregator.partial == 1)
        await at.send(late)
        await mq.until(lambda: at.aggregator.late == 1)
        await at.send(first)  # a copy of one that was in
        await mq.until(lambda: at.aggregator.duplicates == 1)
    [result] = await held(rabbit, at.done)
    assert json.loads(result.body)["data"] == ["x", "z"]
    assert (result.headers["group-outcome"], result.headers["group-missing"]) == ("partial", [1])
    [letter] = await held(rabbit, at.invalid)
    assert (json.loads(letter.body), letter.headers["seq-no"]) == ("y", 1)
    assert letter.headers["dead-letter-error"] == "Late: part 1 of 'b' came when that was out, partial"
    await nothing_is_left(at)


async def test_a_copy_of_a_part_counts_once_before_and_after(rabbit: mq.RabbitMQ) -> None:
    async with bench(rabbit) as at:
        first, second = parts_of("a", [1, 2])
        await at.send(first, first, first)
        await mq.until(lambda: at.aggregator.duplicates == 2)
        assert (at.aggregator.open, at.aggregator.complete) == (1, 0)
        await at.send(second, second, first)
        await mq.until(lambda: at.aggregator.duplicates == 4)
    assert [each["data"] for each in await bodies(rabbit, at.done)] == [[1, 2]]
    await nothing_is_left(at)


async def test_nothing_is_acknowledged_before_the_result_is_confirmed(rabbit: mq.RabbitMQ) -> None:
    """The next queue is full: the parts stay with the broker, and come back when the aggregator ends."""
    [full] = await made(rabbit, "full", **{"x-max-length": 0, "x-overflow": "reject-publish"})
    parts, invalid = rabbit.name("parts"), rabbit.name("invalid")
    async with (
        link(rabbit) as connection,
        start_aggregator(rabbit, parts, full, merged, invalid, drain=0) as aggregator,
    ):
        for message in (*parts_of("a", [1, 2]), parts_of("b", [3, 4])[0]):
            await send(connection, message, parts)
        await mq.until(lambda: aggregator.waited)
        assert aggregator.complete == 0
    assert await left(rabbit, parts, 3) == [1, 2, 3]
    assert await held(rabbit, invalid) == []


async def test_a_full_queue_is_waited_for(rabbit: mq.RabbitMQ) -> None:
    [narrow] = await made(rabbit, "narrow", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    parts, invalid = rabbit.name("parts"), rabbit.name("invalid")
    async with link(rabbit) as connection, start_aggregator(rabbit, parts, narrow, merged, invalid) as aggregator:
        for id in "abc":
            await send(connection, parts_of(id, [1])[0], parts)
        async with mq.channel(rabbit) as channel:
            found = await mq.take_messages(await channel.get_queue(narrow), 3, within=20)
        await mq.until(lambda: aggregator.complete == 3)
    assert [message.message_id for message in found] == ["a", "b", "c"]


async def test_when_no_part_can_come_any_more_the_oldest_group_makes_room(rabbit: mq.RabbitMQ) -> None:
    """However long its time: with all places taken by open groups nothing would ever become complete."""
    async with bench(rabbit, prefetch=3) as at:
        groups = {id: parts_of(id, [0, 1]) for id in "abc"}
        await at.send(*(groups[id][0] for id in "abc"))
        await mq.until(lambda: at.aggregator.partial == 1)
        assert (at.aggregator.open, at.aggregator.crowded_out) == (2, 1)
        await at.send(groups["c"][1], groups["b"][1])
        await mq.until(lambda: at.aggregator.complete == 2)
    outcomes = {each.message_id: each.headers["group-outcome"] for each in await held(rabbit, at.done)}
    assert outcomes == {"a": "partial", "c": "complete", "b": "complete"}


async def test_it_remembers_so_many_groups_and_no_more(rabbit: mq.RabbitMQ) -> None:
    async with bench(rabbit, remember=2) as at:
        groups = [parts_of(id, [0]) for id in "abc"]
        for messages in groups:
            await at.send(*messages)
        await at.send(*groups[2], *groups[1])
        await mq.until(lambda: at.aggregator.duplicates == 2)
        await at.send(*groups[0])  # forgotten, so it is a group of its own again; its result has the same id
        await mq.until(lambda: at.aggregator.complete == 4)
    assert [each.message_id for each in await held(rabbit, at.done)] == ["a", "b", "c", "a"]


HEADERS = {"seq-id": "a", "seq-no": 0, "seq-size": 2}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"1"), ({**HEADERS, "seq-id": ""}, b"1"), ({**HEADERS, "seq-id": 3}, b"1"),
        ({**HEADERS, "seq-no": 2}, b"1"), ({**HEADERS, "seq-no": -1}, b"1"), ({**HEADERS, "seq-no": "0"}, b"1"),
        ({**HEADERS, "seq-no": True}, b"1"), ({**HEADERS, "seq-size": LARGEST_GROUP + 1}, b"1"),
        ({**HEADERS, "seq-size": 3}, b"1"), (HEADERS, b"{"),
    ],
    ids=["none", "no id", "a number as id", "beyond", "below", "a text", "a truth", "too many", "another size",
         "no JSON"],
)  # fmt: skip
async def test_what_is_no_part_is_set_aside_and_stops_nobody(
    rabbit: mq.RabbitMQ, headers: dict[str, Any], body: bytes
) -> None:
    async with bench(rabbit) as at:
        first, second = parts_of("a", ["x", "y"])
        await at.send(first, Message(body, headers=headers), second)
        await mq.until(lambda: at.aggregator.complete == 1)
        assert at.aggregator.invalid == 1
    assert [each.body for each in await held(rabbit, at.invalid)] == [body]
    assert [each["data"] for each in await bodies(rabbit, at.done)] == [["x", "y"]]


def divides(group: Group) -> Any:
    return 1 / group.data[0] if group.id == "bad" else {"not JSON"} if group.id == "worse" else group.id


async def test_what_cannot_be_combined_is_set_aside_with_the_reason(rabbit: mq.RabbitMQ) -> None:
    async with bench(rabbit, divides) as at:
        await at.send(*parts_of("bad", [0, 1]), *parts_of("worse", [2]), *parts_of("good", [3]))
        await mq.until(lambda: at.aggregator.complete == 1 and at.aggregator.invalid == 3)
    letters = {json.loads(each.body): str(each.headers["dead-letter-error"]) for each in await held(rabbit, at.invalid)}
    assert letters[0] == letters[1] == "ZeroDivisionError: division by zero"
    assert letters[2].startswith("TypeError: that is not JSON")
    assert await bodies(rabbit, at.done) == ["good"]
    await nothing_is_left(at)


async def test_a_result_that_has_nowhere_to_go_is_no_loss(rabbit: mq.RabbitMQ) -> None:
    parts, invalid, nowhere = (rabbit.name(name) for name in ("parts", "invalid", "nowhere"))
    async with link(rabbit) as connection, start_aggregator(rabbit, parts, nowhere, merged, invalid) as aggregator:
        for message in parts_of("a", [1, 2]):
            await send(connection, message, parts)
        await mq.until(lambda: aggregator.invalid == 2)
    assert sorted(await bodies(rabbit, invalid)) == [1, 2]


async def test_a_condition_of_ones_own(rabbit: mq.RabbitMQ) -> None:
    """Two of three bids will do; the third is late."""
    async with bench(rabbit, lambda group: min(group.data.values()), complete=lambda group: len(group.data) == 2) as at:
        await at.send(*parts_of("auction", [10, 9, 8]))
        await mq.until(lambda: at.aggregator.late == 1)
    [best] = await held(rabbit, at.done)
    assert (json.loads(best.body), best.headers["group-outcome"], best.headers["group-missing"]) == (9, "complete", [2])


async def test_a_cut_connection_loses_nothing_and_doubles_nothing_that_waits(rabbit: mq.RabbitMQ) -> None:
    """What was held comes again, and counts once."""
    async with mq.proxy(rabbit) as network, bench(rabbit, through=network) as at:
        first, second, third = parts_of("a", [1, 2, 3])
        await at.send(first, second, parts_of("b", [0, 0])[0])
        await mq.until(lambda: at.aggregator.open == 2)
        network.cut()
        await mq.until(lambda: at.aggregator.link.reconnects == 1, within=15)
        await at.send(third)
        await mq.until(lambda: at.aggregator.complete == 1)
    assert [each["data"] for each in await bodies(rabbit, at.done)] == [[1, 2, 3]]
    assert at.aggregator.duplicates == 0
    assert await left(rabbit, at.parts, 1) == [0]


async def test_results_survive_cuts_and_copies_of_them_can_be_told(rabbit: mq.RabbitMQ) -> None:
    ids = {str(number) for number in range(40)}
    async with mq.proxy(rabbit) as network, bench(rabbit, through=network) as at, mq.channel(rabbit) as channel:
        for id in sorted(ids):
            await at.send(*parts_of(id, [0, 1]))
            if int(id) % 15 == 14:
                network.cut()
        seen, queue = dict[str | None, set[bytes]](), await channel.get_queue(at.done)
        async with asyncio.timeout(30):
            while {*seen} != ids:
                for message in await mq.take_messages(queue, 1):
                    seen.setdefault(message.message_id, set()).add(message.body)
    assert all(len(results) == 1 for results in seen.values()), "copies have the same content"
    assert at.aggregator.partial == at.aggregator.late == at.aggregator.invalid == 0
    assert await left(rabbit, at.parts) == await held(rabbit, at.invalid) == []


async def aggregator_that_dies(rabbit: Any, parts: str, done: str, invalid: str) -> None:
    """When it combines its third group."""
    import itertools

    import mqlib
    from mqlib.patterns.aggregation import start_aggregator

    number = itertools.count(1)

    def combine(group: Any) -> Any:
        return mqlib.crash() if next(number) == 3 else group.id

    async with start_aggregator(rabbit, parts, done, combine, invalid, timeout=60) as aggregator:
        print("ready", flush=True)
        await mqlib.until(lambda: aggregator.complete > 100, within=60)


async def test_after_a_crash_the_standby_takes_over_and_no_part_is_lost(rabbit: mq.RabbitMQ) -> None:
    """Only one is active, so that all parts of a group are with the same one."""
    async with bench(rabbit) as at:
        standby = at.aggregator
        first, second = parts_of("z", [1, 2])
        await at.send(first)
        await mq.until(lambda: standby.open == 1)
    async with mq.worker(aggregator_that_dies, rabbit, at.parts, at.done, at.invalid) as process:
        await process.printed("ready")
        async with (
            link(rabbit) as connection,
            start_aggregator(rabbit, at.parts, at.done, merged, at.invalid, timeout=60) as standby,
        ):
            for id in "abcd":
                for message in parts_of(id, [1, 2]):
                    await send(connection, message, at.parts)
            await process.ended(within=30)
            await send(connection, second, at.parts)
            await mq.until(lambda: standby.complete == 3, within=15)
    assert process.crashed
    found = {each.message_id: json.loads(each.body) for each in await held(rabbit, at.done, 5)}
    assert sorted(str(id) for id in found) == ["a", "b", "c", "d", "z"]
    assert (found["a"], found["z"]) == ("a", {"id": "z", "data": [1, 2]})
    await nothing_is_left(at)


async def test_limits_that_cannot_be_are_refused(rabbit: mq.RabbitMQ) -> None:
    for wrong in ({"prefetch": 0}, {"remember": 0}, {"timeout": 0}, {"timeout": float("nan")}):
        with pytest.raises(ValueError, match="prefetch and remember are at least 1"):
            async with bench(rabbit, **wrong):
                pass
    for id, items in (("", [1]), ("a", []), ("a", range(LARGEST_GROUP + 1))):
        with pytest.raises(ValueError, match="a group has an id and 1 to 10,000 parts"):
            parts_of(id, items)
    with pytest.raises(TypeError, match="that is not JSON"):
        parts_of("a", [object()])


def test_parts_say_where_they_belong() -> None:
    parts = parts_of("a", ["x", "y"], headers={"trace": "t"}, type="line")
    assert [part.headers for part in parts] == [
        {"trace": "t", "seq-id": "a", "seq-no": number, "seq-size": 2} for number in (0, 1)
    ]
    assert [(part.message_id, part.body, part.type) for part in parts] == [
        ("a/0", b'"x"', "line"),
        ("a/1", b'"y"', "line"),
    ]
    group = Group("a", 3, 0, {1: "y"})
    assert (group.missing, all_there(group)) == ([0, 2], False)


@asynccontextmanager
async def shops(rabbit: mq.RabbitMQ, **prices: Any) -> AsyncIterator[dict[str, str]]:
    """A service for each, by the name of its queue: a price, an error to raise, or None to answer never."""
    names = {name: rabbit.name(name) for name in prices}

    async def answer(price: Any, request: Any) -> Any:
        if isinstance(price, Exception):
            raise price
        return price if price is not None else await asyncio.sleep(60)

    async with asyncio.timeout(30):
        stack = [
            start_rpc_server(rabbit, names[name], partial(answer, price), drain=0) for name, price in prices.items()
        ]
        async with stack[0], stack[1], stack[2]:
            yield names


async def test_scatter_gather_returns_what_came_in_time_and_who_is_missing(rabbit: mq.RabbitMQ) -> None:
    async with shops(rabbit, a=10, b=None, c=KeyError("tea")) as names, rpc_client(rabbit) as client:
        nobody = rabbit.name("nobody")
        found = await scatter_gather(client, [*names.values(), nobody], "tea", within=1)
        assert client.pending == 0
    assert found.answers == {names["a"]: 10}
    kinds = {name: type(error).__name__ for name, error in found.missing.items()}
    assert kinds == {names["b"]: "RpcTimeout", names["c"]: "RemoteError", nobody: "NoSuchService"}
    assert isinstance(found.missing[names["b"]], RpcTimeout)
    assert isinstance(found.missing[names["c"]], RemoteError)


async def test_scatter_gather_with_enough_does_not_wait_for_the_others(rabbit: mq.RabbitMQ) -> None:
    async with shops(rabbit, a=10, b=None, c=9) as names, rpc_client(rabbit) as client:
        found = await scatter_gather(client, [*names.values()], "tea", within=25, enough=2)
        assert client.pending == 0
    assert found.answers == {names["a"]: 10, names["c"]: 9}
    assert "enough had answered" in str(found.missing[names["b"]])
    assert found.missing[names["b"]].outcome == "unknown"


async def test_scatter_gather_refuses_what_cannot_be_asked(rabbit: mq.RabbitMQ) -> None:
    async with rpc_client(rabbit) as client:
        wrong: list[tuple[Any, int | None]] = [([], None), (["a", "a"], None), ("ab", None), (["a"], 0), (["a"], 2)]
        for services, enough in wrong:
            with pytest.raises(ValueError, match="a list of different services"):
                await scatter_gather(client, services, "tea", enough=enough)
        with pytest.raises(TypeError):
            await scatter_gather(client, ["a", "b"], object())
        with pytest.raises(ValueError, match="within is in seconds"):
            await scatter_gather(client, ["a"], "tea", within=0)
        assert client.pending == 0
    assert Gathered() == Gathered({}, {})
    assert issubclass(RpcTimeout, RpcError)


async def test_messages_of_the_aggregator_are_typed(rabbit: mq.RabbitMQ) -> None:
    """What a hop may do before: the headers of a part pass through a router."""
    from mqlib.patterns.routing import forwarded, start_hop

    async with bench(rabbit) as at:

        def decide(message: AbstractIncomingMessage) -> list[tuple[str, Message]]:
            return [(at.parts, forwarded(message))]

        source = rabbit.name("source")
        async with start_hop(rabbit, source, decide, rabbit.name("bad")):
            for message in parts_of("a", [1, 2]):
                await send(at.connection, message, source)
            await mq.until(lambda: at.aggregator.complete == 1)
    assert [each["data"] for each in await bodies(rabbit, at.done)] == [[1, 2]]
