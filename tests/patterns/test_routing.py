"""A message goes on, confirmed, before it is acknowledged: crashes, cuts, full queues, bad input; rules that change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

import mqlib as mq
from mqlib.patterns import routing
from mqlib.patterns.link import Link, link
from mqlib.patterns.routing import (
    LONGEST_SLIP,
    SLIP,
    Invalid,
    Out,
    Router,
    Rule,
    announce_rule,
    declare_control,
    declare_input,
    forwarded,
    send_along,
    start_hop,
    start_router,
    start_step,
)
from mqlib.patterns.sending import NotSent, Unrouted, json_message, send


async def made(rabbit: mq.RabbitMQ, *names: str, **arguments: Any) -> list[str]:
    """Queues of these names."""
    full = [rabbit.name(name) for name in names]
    async with mq.channel(rabbit) as channel:
        for name in full:
            await channel.declare_queue(name, durable=True, arguments=arguments)
    return full


async def held(rabbit: mq.RabbitMQ, queue: str, count: int = 0) -> list[AbstractIncomingMessage]:
    """All that is in the queue, once there are `count`."""
    async with mq.channel(rabbit) as channel:
        there = await channel.get_queue(queue)
        return [*await mq.take_messages(there, count), *await mq.take_messages(there, 1000, within=0)]


async def bodies(rabbit: mq.RabbitMQ, queue: str, count: int = 0) -> list[Any]:
    return [json.loads(message.body) for message in await held(rabbit, queue, count)]


async def put(rabbit: mq.RabbitMQ, queue: str, *several: Any, **properties: Any) -> None:
    async with link(rabbit) as connection:
        for data in several:
            await send(connection, json_message(data, **properties), queue)


REGIONS = ["eu", "us", "apac", "eu"]


@asynccontextmanager
async def regional(rabbit: mq.RabbitMQ, **options: Any) -> AsyncIterator[tuple[Router, Link, dict[str, str]]]:
    """A router for eu and us, a connection to publish with, and the names of the queues."""
    names = ("eu", "us")
    queues = dict(zip(names, await made(rabbit, *names), strict=True))
    queues |= {name: rabbit.name(name) for name in ("orders", "invalid")}
    rules = [Rule(queues[name], {"region": name}) for name in names]
    async with (
        link(rabbit) as connection,
        start_router(rabbit, queues["orders"], rules, queues["invalid"], **options) as router,
    ):
        yield router, connection, queues


async def test_each_goes_to_the_first_rule_that_takes_it_and_the_rest_is_set_aside_with_the_reason(
    rabbit: mq.RabbitMQ,
) -> None:
    async with regional(rabbit) as (router, connection, queues):
        for number, region in enumerate(REGIONS):
            message = json_message({"n": number, "region": region}, correlation_id="c", type="order", priority=3)
            message.headers["trace"] = "t"
            await send(connection, message, queues["orders"])
        await mq.until(lambda: router.hop.passed == 3 and router.hop.invalid == 1)
    first, second = await held(rabbit, queues["eu"])
    assert [json.loads(each.body)["n"] for each in (first, second)] == [0, 3]
    assert [each["n"] for each in await bodies(rabbit, queues["us"])] == [1]
    [letter] = await held(rabbit, queues["invalid"])
    assert letter.headers["dead-letter-error"] == "Invalid: no rule takes it"
    assert letter.headers["dead-letter-queue"] == queues["orders"]
    assert await held(rabbit, queues["orders"]) == []
    assert (second.message_id, second.correlation_id, second.type, second.priority) == (
        message.message_id, "c", "order", 3,
    )  # fmt: skip
    assert (second.headers["trace"], second.delivery_mode) == ("t", 2)
    assert str(router.hop) == "passed 3, sent 3, dropped 0, invalid 1, waited 0"


async def test_every_rule_that_takes_it_gets_a_copy_and_a_queue_only_one(rabbit: mq.RabbitMQ) -> None:
    one, two = await made(rabbit, "one", "two")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    rules = [Rule(one, {"a": 1}), Rule(two, test=lambda data: data["b"] > 1), Rule(one, {"b": 2})]
    async with start_router(rabbit, orders, rules, invalid, every=True) as router:
        await put(rabbit, orders, {"a": 1, "b": 2}, {"a": 0, "b": 5})
        await mq.until(lambda: router.hop.passed == 2)
    assert [len(await held(rabbit, queue)) for queue in (one, two, invalid)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff", "UnicodeDecodeError"), (b"{", "JSONDecodeError"), (b"[" * 100_000, "RecursionError"),
        (b'"text"', "Invalid: no rule"), (b'{"region": ["eu"]}', "Invalid: no rule"), (b"null", "Invalid: no rule"),
    ],
    ids=["no text", "no JSON", "too deep", "no object", "another type", "null"],
)  # fmt: skip
async def test_bad_input_is_set_aside_and_stops_nobody(rabbit: mq.RabbitMQ, body: bytes, reason: str) -> None:
    async with regional(rabbit, prefetch=1) as (router, connection, queues):
        await send(connection, Message(body), queues["orders"])
        await send(connection, json_message({"region": "eu"}), queues["orders"])
        await mq.until(lambda: router.hop.passed == 1)
    [letter] = await held(rabbit, queues["invalid"])
    assert letter.body == body
    assert str(letter.headers["dead-letter-error"]).startswith(reason)


async def test_a_test_that_raises_and_a_queue_that_is_not_there_are_no_loss(rabbit: mq.RabbitMQ) -> None:
    """The other recipients get theirs, and the letter names the queue."""
    [there] = await made(rabbit, "there")
    orders, invalid, nowhere = (rabbit.name(name) for name in ("orders", "invalid", "nowhere"))
    rules = [Rule(nowhere, {"to": "both"}), Rule(there, test=lambda data: data["to"] != "")]
    async with start_router(rabbit, orders, rules, invalid, every=True) as router:
        await put(rabbit, orders, {"to": "both"}, {"total": 3})
        await mq.until(lambda: router.hop.invalid == 2)
    letters = {str(each.headers["dead-letter-error"]) for each in await held(rabbit, invalid)}
    assert len(letters) == 2
    assert "KeyError: 'to'" in letters
    assert any(nowhere in error and "no queue is bound" in error for error in letters)
    assert await bodies(rabbit, there) == [{"to": "both"}]
    assert (router.hop.passed, router.hop.sent) == (0, 1)


async def test_a_hop_may_make_many_of_one_or_none_and_decide_with_patience(rabbit: mq.RabbitMQ) -> None:
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    [lines] = await made(rabbit, "lines")

    async def split(message: AbstractIncomingMessage) -> list[Out]:
        await asyncio.sleep(0)
        return [(lines, forwarded(message, line, {"no": n})) for n, line in enumerate(json.loads(message.body))]

    async with start_hop(rabbit, orders, split, invalid) as hop:
        await put(rabbit, orders, ["a", "b", "c"], [])
        await mq.until(lambda: hop.passed == 2)
    found = await held(rabbit, lines)
    assert [(json.loads(each.body), each.headers["no"]) for each in found] == [("a", 0), ("b", 1), ("c", 2)]
    assert (hop.sent, hop.dropped, hop.invalid) == (3, 1, 0)


async def test_what_is_sent_on_has_no_recipients_of_the_past(rabbit: mq.RabbitMQ) -> None:
    """A header CC would send the copy to them again, and so it would a letter."""
    other, target = await made(rabbit, "other", "target")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    async with start_router(rabbit, orders, [Rule(target, {"good": True})], invalid) as router:
        headers: dict[str, Any] = {"CC": [other], "x-death": [], "mine": 1}
        when = datetime(2026, 1, 2, tzinfo=UTC)
        async with link(rabbit) as connection:
            for body in (b'{"good": true}', b'{"good": false}'):
                await send(connection, Message(body, headers=dict(headers), timestamp=when, expiration=600), orders)
        await mq.until(lambda: router.hop.passed == router.hop.invalid == 1)
    assert len(await held(rabbit, other)) == 2
    [copy] = await held(rabbit, target)
    assert copy.headers == {"mine": 1}
    assert (copy.timestamp, copy.expiration) == (when, 600)
    assert len(await held(rabbit, invalid)) == 1


async def test_a_full_queue_is_waited_for_and_nothing_is_lost_or_doubled(rabbit: mq.RabbitMQ) -> None:
    [narrow] = await made(rabbit, "narrow", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    async with start_router(rabbit, orders, [Rule(narrow)], invalid, prefetch=1) as router:
        await put(rabbit, orders, 1, 2, 3)
        await mq.until(lambda: router.hop.waited >= 2)
        assert (router.hop.passed, router.hop.consumer.delivered) == (1, 2), "it waits, and does not come back"
        async with mq.channel(rabbit) as channel:
            taken = await mq.take_messages(await channel.get_queue(narrow), 3, within=20)
        await mq.until(lambda: router.hop.passed == 3)
    assert [json.loads(message.body) for message in taken] == [1, 2, 3]
    assert await held(rabbit, orders) == await held(rabbit, invalid) == await held(rabbit, narrow) == []


async def test_one_that_waits_is_left_to_its_next_delivery_when_the_connection_is_lost(rabbit: mq.RabbitMQ) -> None:
    """Or both would send it on."""
    [full] = await made(rabbit, "full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    await put(rabbit, full, "first")
    async with mq.proxy(rabbit) as network, start_router(network, orders, [Rule(full)], invalid) as router:
        await put(rabbit, orders, "second")
        await mq.until(lambda: router.hop.waited)
        network.cut()
        await mq.until(lambda: router.hop.consumer.errors == 1 and router.hop.consumer.delivered == 2, within=15)
        async with mq.channel(rabbit) as channel:
            taken = await mq.take_messages(await channel.get_queue(full), 2, within=15)
        await mq.until(lambda: router.hop.passed == 1)
    assert [json.loads(message.body) for message in taken] == ["first", "second"]
    assert await held(rabbit, full) == []
    assert router.hop.sent == 1


async def test_a_decision_that_could_not_send_itself_is_asked_again(rabbit: mq.RabbitMQ) -> None:
    orders, invalid, asked = rabbit.name("orders"), rabbit.name("invalid"), list[bool]()

    def decide(message: AbstractIncomingMessage) -> list[Out]:
        asked.append(bool(message.redelivered))
        if len(asked) < 3:
            raise NotSent("", "there was no connection")
        return []

    async with start_hop(rabbit, orders, decide, invalid) as hop:
        await put(rabbit, orders, 1)
        await mq.until(lambda: hop.dropped == 1)
    assert asked == [False, True, True]
    assert await held(rabbit, invalid) == []


async def test_what_cannot_go_on_goes_back_at_the_end_and_not_to_the_invalid(rabbit: mq.RabbitMQ) -> None:
    [full] = await made(rabbit, "full", **{"x-max-length": 0, "x-overflow": "reject-publish"})
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    async with start_router(rabbit, orders, [Rule(full)], invalid, drain=0) as router:
        await put(rabbit, orders, 1, 2)
        await mq.until(lambda: router.hop.waited >= 2)
    assert sorted(await bodies(rabbit, orders, 2)) == [1, 2]
    assert await held(rabbit, invalid) == []


async def test_a_cut_connection_loses_nothing(rabbit: mq.RabbitMQ) -> None:
    """Cut again and again while a hundred messages pass; copies bear the same id."""
    [target] = await made(rabbit, "target")
    orders, invalid, ids = rabbit.name("orders"), rabbit.name("invalid"), {str(n) for n in range(100)}
    async with mq.proxy(rabbit) as network, start_router(network, orders, [Rule(target)], invalid) as router:
        async with link(rabbit) as connection:
            for id in ids:
                await send(connection, json_message({}, id), orders)
                if int(id) % 25 == 0:
                    network.cut()
        async with mq.channel(rabbit) as channel:
            seen, queue = set[str | None](), await channel.get_queue(target)
            async with asyncio.timeout(30):
                while seen != ids:
                    seen |= {message.message_id for message in await mq.take_messages(queue, 1)}
        assert router.hop.consumer.link.reconnects >= 1
    assert await held(rabbit, orders) == await held(rabbit, invalid) == []


async def router_that_dies(rabbit: Any, orders: str, target: str, invalid: str) -> None:
    """In the decision of its tenth message."""
    import itertools

    import mqlib
    from mqlib.patterns.routing import Rule, start_router

    asked = itertools.count(1)

    def dies(data: Any) -> bool:
        return bool(mqlib.crash()) if next(asked) == 10 else True  # type: ignore[func-returns-value]

    async with start_router(rabbit, orders, [Rule(target, test=dies)], invalid, prefetch=5):
        await mqlib.until(lambda: False, within=60)


async def test_a_crash_loses_nothing_and_copies_only_what_was_in_flight(rabbit: mq.RabbitMQ) -> None:
    [target] = await made(rabbit, "target")
    orders, invalid, ledger = rabbit.name("orders"), rabbit.name("invalid"), mq.Ledger()
    await declare_input(rabbit, orders, invalid)
    for number in range(40):
        ledger.sent(number)
    await put(rabbit, orders, *range(40))
    async with mq.worker(router_that_dies, rabbit, orders, target, invalid) as process:
        await process.ended(within=30)
        assert process.crashed
    async with start_router(rabbit, orders, [Rule(target)], invalid), mq.channel(rabbit) as channel:
        queue = await channel.get_queue(target)
        async with asyncio.timeout(30):
            while ledger.lost:
                for message in await mq.take_messages(queue, 1):
                    ledger.received(json.loads(message.body))
    for number in await bodies(rabbit, target):
        ledger.received(number)
    assert (ledger.lost, ledger.unexpected) == (0, 0)
    assert ledger.duplicated <= 5
    assert await held(rabbit, invalid) == []


async def test_one_that_comes_back_too_often_is_set_aside_by_the_broker(
    rabbit: mq.RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a message that ends its router each time does not do so for ever."""
    monkeypatch.setattr(routing, "DELIVERIES", 2)
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    await declare_input(rabbit, orders, invalid)
    await put(rabbit, orders, "poison")
    for _ in range(3):
        async with mq.channel(rabbit) as channel:
            [message] = await mq.take_messages(await channel.get_queue(orders), 1, ack=False)
            await message.reject(requeue=True)
    assert await bodies(rabbit, invalid, 1) == ["poison"]


def goes_to(router: Router, queue: str) -> bool:
    return "".join(rule.to for rule in router.announced.values()) == queue


def has_passed(router: Router, count: int) -> bool:
    return router.hop.passed == count


async def test_rules_are_announced_replaced_and_withdrawn_while_it_runs(rabbit: mq.RabbitMQ) -> None:
    control, (default, one, two) = rabbit.name("control"), await made(rabbit, "default", "one", "two")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    async with (
        link(rabbit) as connection,
        start_router(rabbit, orders, [Rule(default)], invalid, control=control) as router,
    ):
        for count, to in enumerate(("", one, two, ""), start=1):
            await announce_rule(connection, control, "cakes", Rule(to, {"kind": "cake"}) if to else None)
            await mq.until(partial(goes_to, router, to))
            await send(connection, json_message({"kind": "cake", "n": count}), orders)
            await mq.until(partial(has_passed, router, count))
    found = {queue: [each["n"] for each in await bodies(rabbit, queue)] for queue in (default, one, two)}
    assert found == {default: [1, 4], one: [2], two: [3]}


async def test_a_router_that_starts_anew_knows_what_was_announced_and_all_of_them_do(rabbit: mq.RabbitMQ) -> None:
    """And takes no message before it does."""
    control, (one, two) = rabbit.name("control"), await made(rabbit, "one", "two")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    await declare_control(rabbit, control)
    await declare_input(rabbit, orders, invalid)
    await put(rabbit, orders, {"kind": "cake"}, {"kind": "tea"})
    async with link(rabbit) as connection:
        await announce_rule(connection, control, "cakes", Rule(one, {"kind": "cake"}))
        await announce_rule(connection, control, "teas", Rule(one, {"kind": "tea"}))
        await announce_rule(connection, control, "jams", Rule(two, {"kind": "jam"}))
        await announce_rule(connection, control, "teas", Rule(two, {"kind": "tea"}))
        await announce_rule(connection, control, "jams", None)
    for _ in range(2):
        async with start_router(rabbit, orders, [], invalid, control=control) as router:
            assert [*router.announced] == ["cakes", "teas"]
            await mq.until(lambda: router.hop.passed == 2)
        assert [len(await held(rabbit, queue)) for queue in (one, two, invalid)] == [1, 1, 0]
        await put(rabbit, orders, {"kind": "cake"}, {"kind": "tea"})
    async with (
        start_router(rabbit, orders, [], invalid, control=control) as first,
        start_router(rabbit, orders, [], invalid, control=control) as second,
    ):
        assert first.announced == second.announced


async def test_it_takes_no_message_before_it_knows_what_was_announced(
    rabbit: mq.RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, [one] = rabbit.name("control"), await made(rabbit, "one")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    await declare_control(rabbit, control)
    await declare_input(rabbit, orders, invalid)
    await put(rabbit, orders, {"kind": "cake"})
    async with link(rabbit) as connection:
        await announce_rule(connection, control, "cakes", Rule(one, {"kind": "cake"}))
    change = Router._change

    async def slowly(router: Router, message: AbstractIncomingMessage) -> None:
        await asyncio.sleep(0.5)
        await change(router, message)

    monkeypatch.setattr(Router, "_change", slowly)
    async with start_router(rabbit, orders, [], invalid, control=control) as router:
        await mq.until(lambda: router.hop.passed + router.hop.invalid == 1)
    assert await bodies(rabbit, one) == [{"kind": "cake"}]


async def test_after_a_cut_it_reads_on_where_it_was(rabbit: mq.RabbitMQ) -> None:
    control, (one, two) = rabbit.name("control"), await made(rabbit, "one", "two")
    orders, invalid = rabbit.name("orders"), rabbit.name("invalid")
    async with (
        mq.proxy(rabbit) as network,
        link(rabbit) as connection,
        start_router(network, orders, [], invalid, control=control) as router,
    ):
        await announce_rule(connection, control, "a", Rule(one, {"kind": "a"}))
        await mq.until(lambda: router.announced)
        rule = router.announced["a"]
        network.cut()
        await announce_rule(connection, control, "b", Rule(two, {"kind": "b"}))
        await mq.until(lambda: "b" in router.announced, within=15)
        assert router.announced["a"] is rule, "it was read again"


@pytest.mark.parametrize(
    "words",
    [
        b"{", b"3", b"[]", b'{"name": "x"}', b'{"to": null}', b'{"name": "x", "to": 3, "fields": {}}',
        b'{"name": "x", "to": "q", "fields": [1]}', b'{"name": [], "to": "q", "fields": {}}', b'{"name": "", "to": ""}',
    ],
)  # fmt: skip
async def test_what_makes_no_sense_on_the_control_queue_changes_nothing(rabbit: mq.RabbitMQ, words: bytes) -> None:
    control, orders, invalid = (rabbit.name(name) for name in ("control", "orders", "invalid"))
    async with (
        link(rabbit) as connection,
        start_router(rabbit, orders, [], invalid, control=control) as router,
    ):
        await send(connection, Message(words), control)
        await announce_rule(connection, control, "good", Rule("queue", {"a": 1}))
        await mq.until(lambda: router.announced)
        assert [*router.announced] == ["good"]
        assert router.unreadable == 1


async def test_a_rule_is_refused_where_it_is_made(rabbit: mq.RabbitMQ) -> None:
    with pytest.raises(ValueError, match="needs the name of a queue"):
        Rule("")
    with pytest.raises(ValueError, match="fields with their values"):
        Rule("queue", "region")  # type: ignore[arg-type]
    async with link(rabbit) as connection:
        with pytest.raises(ValueError, match="a test is a function"):
            await announce_rule(connection, "control", "name", Rule("queue", test=bool))
        with pytest.raises(Unrouted):
            await announce_rule(connection, rabbit.name("no-control"), "name", Rule("queue"))


async def test_a_hop_needs_a_channel_for_what_is_invalid_of_its_own(rabbit: mq.RabbitMQ) -> None:
    queue = rabbit.name("orders")
    with pytest.raises(ValueError, match="go round for ever"):
        await declare_input(rabbit, queue, queue)
    with pytest.raises(ValueError, match="needs a name"):
        await declare_input(rabbit, queue, "")
    [classic] = await made(rabbit, "classic")
    with pytest.raises(mq.BrokerError, match=f"{classic}' is there with"):
        async with start_router(rabbit, classic, [], rabbit.name("invalid")):
            pass


async def test_a_slip_leads_through_its_steps_and_no_other(rabbit: mq.RabbitMQ) -> None:
    names = {name: rabbit.name(name) for name in "abc"}
    invalid, end, seen = rabbit.name("invalid"), (await made(rabbit, "end"))[0], list[str]()

    async def work(name: str, data: Any) -> Any:
        seen.append(name)
        return [*data, name]

    async with (
        link(rabbit) as connection,
        start_step(rabbit, names["a"], lambda data: work("a", data), invalid) as a,
        start_step(rabbit, names["b"], lambda data: work("b", data), invalid) as b,
        start_step(rabbit, names["c"], lambda data: work("c", data), invalid) as c,
    ):
        id = await send_along(connection, [names["a"], names["c"], end], [])
        await mq.until(lambda: c.passed == 1)
        await send_along(connection, [names["b"]], [])
        await mq.until(lambda: b.passed == 1)
    [message] = await held(rabbit, end)
    assert (json.loads(message.body), message.headers[SLIP], message.message_id) == (["a", "c"], [], id)
    assert seen == ["a", "c", "b"]
    assert (a.sent, b.sent, b.dropped, c.sent) == (1, 0, 1, 1)


@pytest.mark.parametrize(
    "headers",
    [
        {}, {SLIP: "b"}, {SLIP: [1]}, {SLIP: [""]}, {SLIP: ["n" * 256]}, {SLIP: {"b": 1}},
        {SLIP: ["b"] * (LONGEST_SLIP + 1)},
    ],
    ids=["none", "a text", "a number", "no name", "a long name", "a table", "too long"],
)  # fmt: skip
async def test_a_malformed_slip_is_refused_before_the_work(rabbit: mq.RabbitMQ, headers: dict[str, Any]) -> None:
    queue, invalid = rabbit.name("step"), rabbit.name("invalid")

    async def work(data: Any) -> Any:
        raise AssertionError("it must not be worked")

    async with start_step(rabbit, queue, work, invalid) as step:
        await put(rabbit, queue, [], headers=headers)
        await mq.until(lambda: step.invalid == 1)
    [letter] = await held(rabbit, invalid)
    assert "'routing-slip' should be a list" in str(letter.headers["dead-letter-error"])


async def test_a_step_that_raises_or_leads_nowhere_sets_aside_what_came_in(rabbit: mq.RabbitMQ) -> None:
    queue, invalid = rabbit.name("step"), rabbit.name("invalid")

    async def work(data: Any) -> Any:
        return {"half": 1 / data}

    async with link(rabbit) as connection, start_step(rabbit, queue, work, invalid) as step:
        await send_along(connection, [queue, "nowhere"], 0)
        await send_along(connection, [queue, "nowhere"], 2)
        await mq.until(lambda: step.invalid == 2)
    letters = {str(each.headers["dead-letter-error"])[:17]: each for each in await held(rabbit, invalid)}
    assert sorted(letters) == ["Invalid: message ", "ZeroDivisionError"]
    assert {json.loads(each.body) for each in letters.values()} == {0, 2}
    assert letters["ZeroDivisionError"].headers[SLIP] == ["nowhere"], "so that it can be sent again"


@pytest.mark.parametrize("slip", [[], "queue", ["a", ""], ["a"] * (LONGEST_SLIP + 2)], ids=str)
async def test_a_slip_that_cannot_be_is_not_sent(rabbit: mq.RabbitMQ, slip: Any) -> None:
    async with link(rabbit) as connection:
        with pytest.raises(ValueError, match="a routing slip is 1 to"):
            await send_along(connection, slip, {})


def test_what_a_rule_takes() -> None:
    assert Rule("q").takes(None)
    assert Rule("q", {"a": 1, "b": [2]}).takes({"a": 1, "b": [2], "c": 3})
    assert not Rule("q", {"a": 1, "b": 2}).takes({"a": 1})
    assert not Rule("q", {"a": None}).takes({})
    assert not Rule("q", {"a": 1}).takes([("a", 1)])
    assert not Rule("q", {"a": 1}, lambda data: False).takes({"a": 1})
    assert issubclass(Invalid, Exception)
