"""Topologies that lose messages are found; dead letters are stored, reviewed and sent back, and never lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from aio_pika import Message

import mqlib as mq
from mqlib.bulk import pump_messages
from mqlib.patterns import dead_letter
from mqlib.patterns.dead_letter import (
    KINDS,
    DeadLetter,
    Letters,
    Topology,
    check_topology,
    process_dead_letters,
    redrive,
    setup_dlq,
)
from mqlib.patterns.link import consuming
from mqlib.queues import vhost

QUORUM = {"x-queue-type": "quorum"}
TTL = {"x-message-ttl": 50}


@pytest.fixture
async def name(rabbit: mq.RabbitMQ) -> AsyncIterator[str]:
    """A work queue's name; what `setup_dlq` makes for it is deleted afterwards."""
    found = rabbit.name("work")
    yield found
    async with mq.channel(rabbit) as channel:
        for ending in ("", ".dl", ".parked"):
            await channel.queue_delete(found + ending)
        await channel.exchange_delete(f"{found}.dlx")


@pytest.fixture
def letters(tmp_path: Path) -> Any:
    with contextlib.closing(Letters(str(tmp_path / "letters"))) as store:
        yield store


def to(queue: str, **more: Any) -> dict[str, Any]:
    more = {f"x-{setting.replace('_', '-')}": value for setting, value in more.items()}
    return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue, **more}


async def bury(rabbit: mq.RabbitMQ, queue: str, bodies: list[bytes], ledger: mq.Ledger | None = None) -> None:
    """Publishes to a work queue (each message with an id, which aiormq makes), and rejects all of it."""
    async with mq.channel(rabbit) as channel, mq.channel(rabbit, prefetch=100) as working:
        await mq.pump_messages(channel.default_exchange, queue, bodies, ledger=ledger)
        rejected = 0

        async def reject(message: Any) -> None:
            nonlocal rejected
            rejected += 1
            await message.reject(requeue=False)

        await (await working.get_queue(queue)).consume(reject)
        await mq.until(lambda: rejected == len(bodies), within=30)


async def ready(rabbit: mq.RabbitMQ, queue: str, count: int, within: float = 20) -> None:
    """Waits until the queue holds so many."""

    async def holds() -> bool:
        return (await mq.depth(rabbit, queue, by="amqp")).ready == count

    await mq.until(holds, within=within)


async def holding(rabbit: mq.RabbitMQ, queue: str, count: int = 100) -> list[Any]:
    """Takes what the queue holds."""
    async with mq.channel(rabbit) as channel:
        return [*await mq.take_messages(await channel.get_queue(queue), count, within=0)]


def topology(
    queues: dict[str, dict[str, Any]], exchanges: Mapping[str, str | tuple[str, str]] | None = None,
    bindings: tuple[tuple[str, str, str], ...] = (), policies: tuple[dict[str, Any], ...] = (),
) -> Topology:  # fmt: skip
    """As the management API shows it; a binding to an exchange has its name with a `>` before it."""
    here: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for queue, arguments in queues.items():
        here["queues"].append({"name": queue, "type": arguments.get("x-queue-type", "classic"), "arguments": arguments})
    for exchange, kind in {"": "direct", **(exchanges or {})}.items():
        kind, alternate = (kind, "") if isinstance(kind, str) else kind
        arguments = {"alternate-exchange": alternate} if alternate else {}
        here["exchanges"].append({"name": exchange, "type": kind, "arguments": arguments})
    for source, target, key in bindings:
        what = "exchange" if target.startswith(">") else "queue"
        here["bindings"].append(
            {"source": source, "destination_type": what, "destination": target.strip(">"), "routing_key": key}
        )
    for policy in policies:
        here[policy.pop("in", "policies")].append({"pattern": ".", "apply-to": "all", "priority": 0, **policy})
    return Topology(here)


DLX = {"x-dead-letter-exchange": "dlx"}
NO_ROUTE = "w: its dead-letter exchange 'dlx' has no queue for the routing key '{}'"


@pytest.mark.parametrize(
    ("kind", "binding", "key", "arrives"),
    [
        ("direct", "w", "w", True), ("direct", "x", "w", False), ("fanout", "", "w", True), ("headers", "", "w", True),
        ("topic", "a.*", "a.b", True), ("topic", "a.*", "a.b.c", False), ("topic", "a.#", "a", True),
        ("topic", "a.#.d", "a.b.c.d", True), ("topic", "#", "a.b", True), ("topic", "a", "a.b", False),
    ],
)  # fmt: skip
def test_a_dead_letter_exchange_needs_a_binding_that_fits(kind: str, binding: str, key: str, arrives: bool) -> None:
    work = {**DLX, "x-dead-letter-routing-key": key}
    found = topology({"w": work, "d": {}}, {"dlx": kind}, (("dlx", "d", binding),)).problems("w")
    assert found == ([] if arrives else [NO_ROUTE.format(key)])


def test_the_kinds_of_routes() -> None:
    """No key: the keys that the queue is bound with. Exchanges behind exchanges, and alternate ones."""
    queues = {"w": DLX, "d": {}}
    events = {"events": "topic", "dlx": "direct"}
    bound = (("events", "w", "order.new"), ("dlx", "d", "w"))
    assert topology(queues, events, bound).problems() == [NO_ROUTE.format("order.new")]
    assert topology(queues, events, (*bound, ("dlx", "d", "order.new"))).problems() == []
    assert topology(queues, {"dlx": "direct"}, (("dlx", "d", "w"),)).problems() == [], "by its name"
    behind = (("dlx", ">next", "w"), ("next", "d", ""), ("next", ">dlx", ""))
    assert topology(queues, {"dlx": "direct", "next": "fanout"}, behind).problems() == []
    other: dict[str, Any] = {"dlx": ("direct", "rest"), "rest": "fanout"}
    assert topology(queues, other, (("rest", "d", ""),)).problems() == []
    [missing] = topology({"w": DLX}).problems()
    assert missing == "w: its dead-letter exchange 'dlx' is not there, which would get the routing key 'w'"


@pytest.mark.parametrize(
    ("first", "second", "passed"),
    [
        (TTL, TTL, True), ({}, TTL, False), ({"x-max-length": 1}, TTL, True),
        ({"x-max-length": 1, "x-overflow": "reject-publish"}, TTL, False),
        ({**QUORUM, "x-delivery-limit": 3}, TTL, True), ({**QUORUM, "x-delivery-limit": -1}, TTL, False),
    ],
)  # fmt: skip
def test_a_cycle_needs_a_rejection(first: dict[str, Any], second: dict[str, Any], passed: bool) -> None:
    """B15: it is fine where a handler has to reject, and not where limits alone take messages round."""
    found = topology({"a": {**to("b"), **first}, "b": {**to("a"), **second}, "c": to("b")})
    problem = "a -> b -> a: nobody rejects on this cycle, so RabbitMQ drops what comes round"
    assert found.problems("c") == found.problems() == ([problem] if passed else [])


def test_what_else_loses_dead_letters() -> None:
    drops = topology({"w": to("d"), "d": TTL, "x": TTL})
    assert drops.problems() == ["d: its message-ttl drops the dead letters in it"], "that of x is nobody's affair"
    strategy = {"x-dead-letter-strategy": "at-least-once"}
    assert topology({"w": {**to("d"), **strategy}, "d": {}}).problems() == [
        "w: at-least-once without overflow reject-publish becomes at-most-once"
    ]
    assert topology({"w": to("d", overflow="reject-publish") | strategy, "d": {}}).problems() == []


def test_policies_count() -> None:
    """The one with the highest priority, where it applies; arguments win, except against a lower limit."""
    queues = {"w": to("d"), "d": {"x-message-ttl": 9}, "e": {}}
    route = {"dead-letter-exchange": "", "dead-letter-routing-key": "e"}
    low: dict[str, Any] = {"definition": {}}
    high = {"definition": route, "priority": 1, "pattern": "^d$"}
    assert topology(queues, policies=({**low}, {**high})).dead_letters("d") == {"e": {"e"}}
    assert topology(queues, policies=({**high, "priority": -1}, {**low})).dead_letters("d") == {}
    assert topology(queues, policies=({**high, "apply-to": "quorum_queues"},)).dead_letters("d") == {}
    assert topology(queues, policies=({**high, "pattern": "."},)).dead_letters("w") == {"d": {"d"}}
    limits = {"definition": {"message-ttl": 5}}
    assert topology(queues, policies=({**limits, "in": "operator-policies"},)).queues["d"] == {"message-ttl": 5}
    assert topology(queues, policies=({"definition": {"message-ttl": 50}},)).queues["d"] == {"message-ttl": 9}


@pytest.mark.parametrize("arguments", [{}, QUORUM], ids=["classic", "quorum"])
async def test_what_dies_arrives_and_nothing_dies_of_age(
    rabbit: mq.RabbitMQ, name: str, letters: Letters, arguments: dict[str, Any]
) -> None:
    assert await setup_dlq(rabbit, name, arguments) == f"{name}.dl" == await setup_dlq(rabbit, name, arguments)
    assert await check_topology(rabbit, name) == []
    await bury(rabbit, name, [b"%d" % number for number in range(20)])
    async with process_dead_letters(rabbit, f"{name}.dl", letters) as counts:
        await mq.until(lambda: counts["stored"] == 20, within=20)
    found = letters.find("new")
    assert {(letter.reason, letter.queue, letter.deaths, letter.redrives) for letter in found} == {
        ("rejected", name, 1, 0)
    }
    assert {letter.body for letter in found} == {b"%d" % number for number in range(20)}
    deaths = {datetime.fromisoformat(letter.first_death or "") for letter in found}
    assert abs((datetime.now(UTC) - min(deaths)).total_seconds()) < 60
    known = Topology(await dead_letter._here(rabbit)).queues
    assert "message-ttl" not in known[name] | known[f"{name}.dl"] | known[f"{name}.parked"]
    assert known[name].get("dead-letter-strategy") == ("at-least-once" if arguments else None)


async def test_other_arguments_are_explained_and_nobody_is_disturbed(rabbit: mq.RabbitMQ, name: str) -> None:
    """B18: the error has queue, argument, wanted and present; consumers elsewhere go on; rerunning works."""
    got = list[bytes]()
    async with mq.channel(rabbit) as channel:
        await setup_dlq(rabbit, name, {"x-message-ttl": 60_000})
        queue = await channel.get_queue(name)

        async def keep(message: Any) -> None:
            got.append(message.body)

        await queue.consume(keep)
        with pytest.raises(mq.BrokerError, match=rf"queue '{name}' is there with x-message-ttl 60000, and not 5000"):
            await setup_dlq(rabbit, name, {"x-message-ttl": 5000})
        await channel.default_exchange.publish(Message(b"after"), name)
        await mq.until(lambda: got == [b"after"])
        await setup_dlq(rabbit, name, {"x-message-ttl": 60_000})


async def test_a_topology_that_would_lose_is_refused_and_not_declared(rabbit: mq.RabbitMQ, name: str) -> None:
    """An operator's policy gives dead-letter queues a TTL: the API shows it at once as a policy, late in the queue."""
    address = f"{rabbit.management_url}/api/operator-policies/{vhost(rabbit)}/{name}"
    policy = {"pattern": rf"^{name}\.dl$", "definition": {"message-ttl": 1000}, "apply-to": "queues"}
    async with httpx.AsyncClient() as client:
        (await client.put(address, json=policy)).raise_for_status()
        try:
            with pytest.raises(mq.BrokerError, match=r"\.dl: its message-ttl drops the dead letters"):
                await setup_dlq(rabbit, name)
        finally:
            (await client.delete(address)).raise_for_status()
    with pytest.raises(mq.BrokerError, match="no queue"):
        await check_topology(rabbit, name)
    with pytest.raises(ValueError, match="setup_dlq chooses"):
        await setup_dlq(rabbit, name, to("elsewhere"))
    with pytest.raises(mq.BrokerError, match="at-most-once"):
        await setup_dlq(rabbit, name, {**QUORUM, "x-overflow": "drop-head"})
    blind = dataclasses.replace(rabbit, management_url="", nodes=(), addresses=())
    assert await setup_dlq(blind, name) == f"{name}.dl"


async def test_the_broker_drops_what_the_check_says_and_keeps_the_other(rabbit: mq.RabbitMQ) -> None:
    """B15 on the broker: work -reject-> wait -> work counts 1, 2, 3; a(TTL) -> b(TTL) -> a loses."""
    first, second, work, wait = (rabbit.name(base) for base in ("first", "second", "work", "wait"))
    async with mq.channel(rabbit) as channel:
        for queue, arguments in {
            first: to(second) | TTL, second: to(first) | TTL, work: to(wait), wait: to(work) | TTL,
        }.items():  # fmt: skip
            await channel.declare_queue(queue, durable=True, arguments=arguments)
        assert len(await check_topology(rabbit, first)) == 1
        assert await check_topology(rabbit, work) == []
        for queue in (first, work):
            await channel.default_exchange.publish(Message(b"x"), queue)
        counts = []
        for _ in range(4):
            [message] = await mq.take_messages(await channel.get_queue(work), 1, ack=False)
            deaths: Any = message.headers.get("x-death", [])
            counts.append(sum(death["count"] for death in deaths if death["reason"] == "rejected"))
            await message.reject(requeue=False)
        await ready(rabbit, first, 0)
        await ready(rabbit, second, 0)
        assert [await holding(rabbit, queue) for queue in (first, second)] == [[], []]
    assert counts == [0, 1, 2, 3]


STRANGE: list[dict[str, Any]] = [
    {}, {"x-death": "junk"}, {"x-death": [1, {"count": "many", "time": "now"}]}, {"x-first-death-reason": [1]},
    {"x-redrives": "often"}, {"$datetime": "never"}, {"x-first-death-queue": {"$bytes": "zz"}},
]  # fmt: skip


async def test_nothing_in_a_letter_is_an_error(rabbit: mq.RabbitMQ, letters: Letters) -> None:
    """Bodies that nobody can parse, headers that anybody can set: all are stored, as they are."""
    dead = rabbit.name("dead")
    bodies = [b"", b"\xff\x00", b"{", b"\xed\xa0\x80", b'{"order": 1}', b"x" * 100_000, b"null"]
    async with mq.channel(rabbit) as channel:
        await channel.declare_queue(dead, durable=True)
        for body, headers in zip(bodies, STRANGE, strict=True):
            await channel.default_exchange.publish(Message(body, headers=headers), dead)
    async with process_dead_letters(rabbit, dead, letters) as counts:
        await mq.until(lambda: counts.total() == len(bodies), within=20)
    assert counts == {"stored": len(bodies)}
    found = {letter.body: letter for letter in letters.find("new")}
    assert set(found) == set(bodies)
    for body, headers in zip(bodies, STRANGE, strict=True):
        letter = found[body]
        assert (letter.reason, letter.queue, letter.deaths, letter.redrives) == (None, None, 0, 0)
        again = letter.again(1).headers
        assert again == {key: value for key, value in headers.items() if key.startswith("$")} | {"x-redrives": 1}
    await ready(rabbit, dead, 0)


async def test_a_store_that_fails_is_asked_again_and_the_message_stays(
    rabbit: mq.RabbitMQ, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than the 20 deliveries after which RabbitMQ 4 would drop it; what it says is counted."""
    dead, stored, tries = await setup_dlq(rabbit, name, QUORUM), list[DeadLetter](), 0
    await bury(rabbit, name, [b"letter"])

    async def store(letter: DeadLetter) -> None:
        nonlocal tries
        tries += 1
        if tries <= 30:
            raise sqlite3.OperationalError("disk is full")
        stored.append(letter)

    async with process_dead_letters(rabbit, dead, store, pause=0.01) as counts:
        await mq.until(lambda: stored, within=20)
        assert counts["OperationalError: disk is full"] == 30
    await ready(rabbit, dead, 0)

    def broken(letter: DeadLetter) -> None:
        raise OSError("gone")

    monkeypatch.setattr(dead_letter, "consuming", partial(consuming, drain=0.1))  # its end does not take 5 s
    await bury(rabbit, name, [b"second"])
    async with process_dead_letters(rabbit, dead, broken, pause=30) as counts:
        await mq.until(lambda: counts["OSError: gone"], within=20)
    assert [message.body for message in await holding(rabbit, dead)] == [b"second"], "not acknowledged"
    assert (counts["stored"], [letter.body for letter in stored]) == (0, [b"letter"])


@pytest.mark.parametrize("ids", [False, True], ids=["no ids", "message ids"])
async def test_a_crash_between_storing_and_acknowledging_loses_none(
    rabbit: mq.RabbitMQ, name: str, tmp_path: Path, ids: bool
) -> None:
    """SIGKILL there: the letter is stored twice, or, known by its message id, once."""
    dead, path, ledger = await setup_dlq(rabbit, name), str(tmp_path / "letters"), mq.Ledger()
    for number in range(20):
        ledger.sent(number)
        await publish(rabbit, dead, number, {"message_id": f"order-{number}"} if ids else {})
    async with mq.worker(die_at, rabbit, dead, path, 7) as worker:
        await worker.ended(within=30)
    assert worker.crashed
    with contextlib.closing(Letters(path)) as letters:
        async with process_dead_letters(rabbit, dead, letters) as counts:
            await mq.until(lambda: counts["stored"] == 13, within=20)  # from 7 on: 6 had been acknowledged
        for letter in letters.find("new"):
            ledger.received(int(letter.body))
    assert (ledger.lost, ledger.unexpected) == (0, 0)
    assert ledger.duplicated == (0 if ids else 1)


async def publish(rabbit: mq.RabbitMQ, queue: str, number: int, properties: dict[str, Any]) -> None:
    """By the management API, since aiormq gives every message an id."""
    address = f"{rabbit.management_url}/api/exchanges/{vhost(rabbit)}/amq.default/publish"
    what = {"routing_key": queue, "payload": str(number), "payload_encoding": "string"}
    async with httpx.AsyncClient() as client:
        answer = await client.post(address, json={**what, "properties": {"delivery_mode": 2, **properties}})
        assert answer.json() == {"routed": True}


async def die_at(rabbit: Any, dead: str, path: str, number: int) -> None:

    import asyncio

    import mqlib
    from mqlib.patterns.dead_letter import Letters, process_dead_letters

    letters = Letters(path)

    def store(letter: Any) -> None:
        letters(letter)
        if int(letter.body) == number:
            mqlib.crash()

    async with process_dead_letters(rabbit, dead, store, prefetch=1):
        await asyncio.sleep(60)


async def test_a_connection_that_is_cut_loses_none(rabbit: mq.RabbitMQ, name: str, letters: Letters) -> None:
    dead, ledger = await setup_dlq(rabbit, name), mq.Ledger()
    await bury(rabbit, name, [b"%d" % number for number in range(500)], ledger)
    async with mq.proxy(rabbit) as network, process_dead_letters(network, dead, letters) as counts:
        for point in (100, 250, 400):
            await mq.until(lambda point=point: counts["stored"] >= point, within=20)  # type: ignore[misc]
            network.cut()
        await mq.until(lambda: len(letters.find("new")) >= 500, within=30)
        await ready(rabbit, dead, 0)
    for letter in letters.find("new"):
        ledger.received(int(letter.body))
    assert ledger.exact


async def test_the_broker_dies_and_comes_back(letters: Letters) -> None:
    """SIGKILL while letters are stored: none is lost, those that come again are known, and the queue is there."""
    with mq.rabbitmq(private=True) as broker:
        dead, ledger, declared = await setup_dlq(broker, "work", QUORUM), mq.Ledger(), time.monotonic()
        await bury(broker, "work", [b"%d" % number for number in range(500)], ledger)
        await ready(broker, dead, 500)
        # RabbitMQ writes a new queue down some time after it has answered, and a dead letter's confirmation, too.
        await mq.until(lambda: time.monotonic() > declared + 2)
        async with process_dead_letters(broker, dead, letters) as counts:
            await mq.until(lambda: counts["stored"] >= 50, within=20, every=0.001)
            async with mq.killed(broker.nodes[0]):
                assert counts["stored"] < 500
            await mq.until(lambda: len(letters.find("new")) >= 500, within=60)
        letters.move(letters.find("new"), "approved")
        assert await redrive(broker, letters, "work") == {"redriven": 500, "parked": 0}
        for message in await holding(broker, "work", 600):
            ledger.received(int(message.body))
    assert ledger.exact


async def stored(rabbit: mq.RabbitMQ, dead: str, letters: Letters, count: int) -> None:
    """Stores so many letters, and approves them."""
    async with process_dead_letters(rabbit, dead, letters) as counts:
        await mq.until(lambda: counts["stored"] == count, within=60)
    letters.move(letters.find("new"), "approved")


async def test_a_letter_comes_back_as_it_was(rabbit: mq.RabbitMQ, name: str, letters: Letters) -> None:
    """To its queue alone: no copies by `CC`; without the deaths, which RabbitMQ 3 would go on counting."""
    other, dead = rabbit.name("other"), await setup_dlq(rabbit, name)
    moment = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    kept: dict[str, Any] = {"text": "é", "number": 2**40, "raw": bytearray(b"\xff"), "when": moment,
            "price": Decimal("1.5"),
            "deep": {"list": [1, None, True, {"raw": bytearray(b"\x00")}]}}  # fmt: skip
    user = rabbit.url.split("/")[2].split(":")[0]
    message = Message(
        b"\xff", headers={**kept, "CC": [other], "x-redrives": 1}, content_type="x/y", priority=3, correlation_id="c",
        reply_to="r", message_id="m", timestamp=moment, type="t", app_id="a", user_id=user,
    )  # fmt: skip
    async with mq.channel(rabbit) as channel:
        copies = await channel.declare_queue(other, durable=True)
        await channel.default_exchange.publish(message, name)
        [found] = await mq.take_messages(await channel.get_queue(name), 1, ack=False)
        await found.reject(requeue=False)
        await mq.take_messages(copies, 1)
    await stored(rabbit, dead, letters, 1)
    assert await redrive(rabbit, letters, name) == {"redriven": 1, "parked": 0}
    [back] = await holding(rabbit, name)
    assert back.headers == {**kept, "x-redrives": 2}
    assert (back.body, back.content_type, back.priority, back.correlation_id, back.reply_to, back.message_id) == (
        b"\xff", "x/y", 3, "c", "r", "m",
    )  # fmt: skip
    assert (back.timestamp, back.type, back.app_id, back.delivery_mode) == (moment, "t", "a", 2)
    assert await holding(rabbit, other) == []


@pytest.mark.parametrize("limit", [0, 2])
async def test_what_dies_too_often_is_parked(rabbit: mq.RabbitMQ, name: str, letters: Letters, limit: int) -> None:
    """Poison is delivered once more than the limit, then parked; the good one is not; a second redrive moves none."""
    dead, passes = await setup_dlq(rabbit, name), Counter[bytes]()
    async with mq.channel(rabbit) as channel:
        for body in (b"poison", b"good", b"discarded"):
            await channel.default_exchange.publish(Message(body), name)
        queue = await channel.get_queue(name)
        for times in range(limit + 1):
            for message in await mq.take_messages(queue, 3, within=0, ack=False):
                passes[message.body] += 1
                await (message.ack() if message.body == b"good" else message.reject(requeue=False))
            async with process_dead_letters(rabbit, dead, letters) as counts:
                await mq.until(lambda seen=times: counts["stored"] == 1 + (seen == 0), within=20)  # type: ignore[misc]
            letters.move([each for each in letters.find("new") if each.body == b"discarded"], "discarded")
            assert letters.move(letters.find("new"), "approved") == 1
            moved = await redrive(rabbit, letters, name, limit)
            assert moved == ({"redriven": 1, "parked": 0} if times < limit else {"redriven": 0, "parked": 1})
            assert (await redrive(rabbit, letters, name, limit)).total() == 0, "a second time moves none"
    assert passes == {b"poison": limit + 1, b"good": 1, b"discarded": 1}
    assert [message.body for message in await holding(rabbit, f"{name}.parked")] == [b"poison"]
    assert await holding(rabbit, name) == []
    assert {state: len(letters.find(state)) for state in ("new", "approved", "discarded", "parked")} == {
        "new": 0, "approved": 0, "discarded": 1, "parked": 1,
    }  # fmt: skip


async def test_what_the_broker_does_not_take_stays_approved(rabbit: mq.RabbitMQ, name: str, letters: Letters) -> None:
    """A full queue, then one that is not there: failed, not lost; those that fitted are not sent again."""
    dead = await setup_dlq(rabbit, name, {"x-max-length": 3, "x-overflow": "reject-publish"})
    for chunk in (b"12", b"34"):
        await bury(rabbit, name, [bytes([each]) for each in chunk])
    await stored(rabbit, dead, letters, 4)
    with pytest.raises(mq.Undelivered, match=r"acknowledged 3; 1 failed.*refuses"):
        await redrive(rabbit, letters, name)
    assert (len(letters.find("approved", name)), len(letters.find("redriven"))) == (1, 3)
    assert len(await holding(rabbit, name)) == 3
    assert (await redrive(rabbit, letters, name))["redriven"] == 1
    assert len(await holding(rabbit, name)) == 1
    await bury(rabbit, name, [b"5"])
    await stored(rabbit, dead, letters, 1)
    async with mq.channel(rabbit) as channel:
        await channel.queue_delete(name)
    with pytest.raises(mq.Undelivered, match=r"1 failed"):
        await redrive(rabbit, letters, name)
    assert [letter.body for letter in letters.find("approved")] == [b"5"]


async def test_without_an_answer_it_is_unknown_and_sent_again(
    rabbit: mq.RabbitMQ, name: str, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confirms get lost: perhaps twice, never not at all."""
    dead, ledger = await setup_dlq(rabbit, name), mq.Ledger()
    await bury(rabbit, name, [b"%d" % number for number in range(50)], ledger)
    await stored(rabbit, dead, letters, 50)

    async def deaf(*what: Any, **options: Any) -> Any:
        with network.swallow("down"):
            return await pump_messages(*what, **options)

    async with mq.proxy(rabbit) as network:
        monkeypatch.setattr(dead_letter, "pump_messages", deaf)
        with pytest.raises(mq.Undelivered, match="50 outcome unknown"):
            await redrive(network, letters, name, within=0.5)
        monkeypatch.setattr(dead_letter, "pump_messages", pump_messages)
    assert (await redrive(rabbit, letters, name))["redriven"] == 50
    for message in await holding(rabbit, name, 200):
        ledger.received(int(message.body))
    assert (ledger.lost, ledger.unexpected, ledger.duplicated) == (0, 0, 50)


async def test_one_redrive_at_a_time(
    rabbit: mq.RabbitMQ, name: str, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one would send the same letters again; it may run when the first has ended."""
    dead, sending, go = await setup_dlq(rabbit, name), asyncio.Event(), asyncio.Event()
    await bury(rabbit, name, [b"letter"])
    await stored(rabbit, dead, letters, 1)

    async def slow(*what: Any, **options: Any) -> Any:
        sending.set()
        await go.wait()
        return await pump_messages(*what, **options)

    monkeypatch.setattr(dead_letter, "pump_messages", slow)
    async with asyncio.TaskGroup() as group, asyncio.timeout(20):
        first = group.create_task(redrive(rabbit, letters, name))
        await sending.wait()
        with pytest.raises(mq.BrokerError, match="another redrive"):
            await redrive(rabbit, letters, name)
        go.set()
        assert await first == {"redriven": 1, "parked": 0}
    assert await redrive(rabbit, letters, name) == {"redriven": 0, "parked": 0}


async def test_ten_thousand_letters(rabbit: mq.RabbitMQ, name: str, letters: Letters) -> None:
    dead, ledger = await setup_dlq(rabbit, name), mq.Ledger()
    await bury(rabbit, name, [b"%d" % number for number in range(10_000)], ledger)
    await stored(rabbit, dead, letters, 10_000)
    assert await redrive(rabbit, letters, name) == {"redriven": 10_000, "parked": 0}
    async with mq.channel(rabbit, prefetch=1000) as channel:

        async def count(message: Any) -> None:
            ledger.received(int(message.body))

        await (await channel.get_queue(name)).consume(count, no_ack=True)
        await mq.until(lambda: ledger.exact, within=30)
