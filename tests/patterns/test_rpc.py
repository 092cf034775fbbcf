"""A call is answered, or ends by its deadline with a word for what is known; nothing leaks or works on behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

import mqlib as mq
from mqlib.patterns.rpc import (
    LARGEST,
    NoSuchService,
    RemoteError,
    RequestRefused,
    RpcClient,
    RpcError,
    RpcInterrupted,
    RpcTimeout,
    rpc_client,
    start_rpc_server,
)

Answer = Callable[[AbstractChannel, AbstractIncomingMessage], Awaitable[object]]


@contextlib.asynccontextmanager
async def service(rabbit: mq.RabbitMQ, answer: Answer | None, **arguments: Any) -> AsyncIterator[str]:
    """A queue with a service made by hand, which may do what ours never does; without `answer` nobody is there."""
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("service"), durable=True, arguments=arguments)

        async def take(message: AbstractIncomingMessage) -> None:
            await message.ack()
            assert answer is not None
            await answer(channel, message)

        if answer is not None:
            await queue.consume(take)
        yield queue.name


def reply_to(message: AbstractIncomingMessage, body: bytes, **properties: Any) -> Message:
    return Message(body, **{"correlation_id": message.correlation_id, **properties})


async def send(channel: AbstractChannel, message: AbstractIncomingMessage, reply: Message) -> None:
    assert message.reply_to is not None
    await channel.default_exchange.publish(reply, message.reply_to, mandatory=False)


async def echo(request: Any) -> Any:
    return request


class Gate:
    """A handler that waits for `open`; counts who began, ended, and was stopped."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.began, self.ended, self.stopped = list[Any](), list[Any](), list[Any]()

    def has(self, count: int) -> bool:
        return len(self.began) == count

    async def __call__(self, request: Any) -> Any:
        self.began.append(request)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.stopped.append(request)
            raise
        self.ended.append(request)
        return request


async def reconnected(client: RpcClient, times: int) -> None:
    await mq.until(lambda: client.link.reconnects == times)


async def outcome(call: Awaitable[Any]) -> str:
    try:
        await call
    except RpcError as error:
        return error.outcome
    return "answered"


async def left(rabbit: mq.RabbitMQ, queue: str) -> int:
    return (await mq.depth(rabbit, queue, by="amqp")).ready


async def test_10_000_calls_each_get_their_own_answer(rabbit: mq.RabbitMQ) -> None:
    """Two hundred at once over one connection, answered out of order."""
    ledger, count = mq.Ledger(), 10_000

    async def handle(number: int) -> dict[str, int]:
        await asyncio.sleep(0.002 if number % 7 == 0 else 0)
        ledger.handled(number)
        return {"answer": number}

    async with start_rpc_server(rabbit, rabbit.name("rpc"), handle, 100) as server, rpc_client(rabbit) as client:
        numbers, order = iter(range(count)), list[int]()

        async def work() -> None:
            for number in numbers:
                ledger.sent(number)
                answer = await client.call_rpc(server.service, number, within=60)
                ledger.received(answer["answer"])
                ledger.acknowledged(number)
                assert answer == {"answer": number}
                order.append(number)

        await asyncio.gather(*(work() for _ in range(200)))
        assert (client.pending, client.late, client.foreign) == (0, 0, 0)
    assert (server.answered, server.failed) == (count, 0)
    assert ledger.exact
    assert ledger.table().loc["", "handled"] == count
    assert order != sorted(order), "some overtook others, or the test shows nothing"


async def test_no_answer_is_a_timeout_at_the_deadline_and_the_outcome_is_unknown(rabbit: mq.RabbitMQ) -> None:
    """B17 a: a service takes the request and never answers."""
    taken = list[bytes]()

    async def silent(_: AbstractChannel, message: AbstractIncomingMessage) -> None:
        taken.append(message.body)

    async with service(rabbit, silent) as name, rpc_client(rabbit) as client:
        start = time.monotonic()
        with pytest.raises(RpcTimeout, match=rf"no answer from '{name}' within 0\.3 s") as caught:
            await client.call_rpc(name, "hello", within=0.3)
        assert time.monotonic() - start >= 0.3
        assert (caught.value.outcome, taken, client.pending) == ("unknown", [b'"hello"'], 0)
        assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("lost", [False, True])
async def test_a_service_that_does_not_exist_is_known_at_once(rabbit: mq.RabbitMQ, lost: bool) -> None:
    """B17 b and c: within a minute's deadline, also after the connection was lost and made again (L1)."""
    async with mq.proxy(rabbit) as network, rpc_client(network) as client:
        if lost:
            network.cut()
            await reconnected(client, 1)
        async with asyncio.timeout(20):
            with pytest.raises(NoSuchService, match=r"no queue is named '.*nowhere.*'") as caught:
                await client.call_rpc(rabbit.name("nowhere"), "hello", within=60)
        assert (caught.value.outcome, client.pending) == ("not done", 0)


async def test_a_thousand_timeouts_leave_nothing(rabbit: mq.RabbitMQ) -> None:
    """No entry in the table, no task, no request in the queue; and the client still works."""
    async with service(rabbit, None) as name, rpc_client(rabbit) as client:
        tasks = asyncio.all_tasks()
        outcomes = await asyncio.gather(*(outcome(client.call_rpc(name, n, within=0.5)) for n in range(1000)))
        assert Counter(outcomes) == {"unknown": 1000}
        assert client.pending == 0
        await mq.until(lambda: asyncio.all_tasks() == tasks)

        async def expired() -> bool:
            return await left(rabbit, name) == 0

        await mq.until(expired)
        async with start_rpc_server(rabbit, rabbit.name("rpc"), echo) as server:
            assert await client.call_rpc(server.service, "still there") == "still there"


async def test_a_request_whose_caller_has_left_is_not_worked_on(rabbit: mq.RabbitMQ) -> None:
    """The deadline is the request's expiration: a service that comes later gets only what somebody waits for."""
    name, seen = rabbit.name("rpc"), list[Any]()

    async def handle(request: Any) -> None:
        seen.append(request)

    async with start_rpc_server(rabbit, name, echo):
        pass  # its queue stays
    async with rpc_client(rabbit) as client:
        assert await outcome(client.call_rpc(name, "stale", within=0.2)) == "unknown"
        async with asyncio.TaskGroup() as group:
            group.create_task(client.call_rpc(name, "early", within=30))
            async with start_rpc_server(rabbit, name, handle):
                await client.call_rpc(name, "fresh")
    assert seen == ["early", "fresh"]


async def test_a_handler_is_stopped_when_its_caller_has_left(rabbit: mq.RabbitMQ) -> None:
    """Prefetch 1: the next caller does not wait for work that nobody wants."""
    gate = Gate()
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), gate, prefetch=1) as server,
        rpc_client(rabbit) as client,
    ):
        assert await outcome(client.call_rpc(server.service, "slow", within=0.2)) == "unknown"
        await mq.until(lambda: gate.stopped == ["slow"])
        gate.open.set()
        assert await client.call_rpc(server.service, "next") == "next"
    assert (server.abandoned, server.answered) == (1, 1)
    assert await left(rabbit, server.service) == 0, "it is not delivered again"


async def test_late_double_and_foreign_replies_reach_nobody_and_are_counted(rabbit: mq.RabbitMQ) -> None:
    held = list[AbstractIncomingMessage]()

    async def answer(channel: AbstractChannel, message: AbstractIncomingMessage) -> None:
        if json.loads(message.body) == "late":
            held.append(message)
            return
        await send(channel, held[0], reply_to(held[0], b'"late"'))
        for stranger in ("of-somebody-else", None):
            await send(channel, message, reply_to(message, b'"foreign"', correlation_id=stranger))
        await asyncio.gather(*(send(channel, message, reply_to(message, b"%d" % number)) for number in range(20)))

    async with service(rabbit, answer) as name, rpc_client(rabbit) as client:
        assert await outcome(client.call_rpc(name, "late", within=0.2)) == "unknown"
        assert await client.call_rpc(name, "now") == 0
        await mq.until(lambda: client.late == 20)  # one came too late, and nineteen again
        assert (client.late, client.foreign, client.pending) == (20, 2, 0)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [(LookupError("no price"), "LookupError", "no price"), (TimeoutError("of its own"), "TimeoutError", "of its own"),
     (ConnectionError("database"), "ConnectionError", "database"), (None, "TypeError", "not JSON serializable")],
)  # fmt: skip
async def test_what_the_handler_raises_is_the_callers_error(
    rabbit: mq.RabbitMQ, error: Exception | None, kind: str, text: str
) -> None:
    """Also what looks like a lost connection, and an answer that is no JSON; the server goes on."""

    async def handle(request: str) -> Any:
        if request != "bad":
            return request
        if error is None:
            return object()
        raise error

    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), handle, prefetch=1) as server,
        rpc_client(rabbit) as client,
    ):
        with pytest.raises(RemoteError, match=f"{kind}: .*{text}") as caught:
            await client.call_rpc(server.service, "bad")
        assert (caught.value.kind, caught.value.outcome) == (kind, "failed")
        assert await client.call_rpc(server.service, "good") == "good"
    assert (server.failed, server.answered) == (1, 1)


@pytest.mark.parametrize(("body", "kind"), [(b"\xff", None), (b"[]", "error"), (b"{}", "error")])
async def test_a_reply_that_nobody_can_read_is_an_error_and_not_an_answer(
    rabbit: mq.RabbitMQ, body: bytes, kind: str | None
) -> None:
    async def answer(channel: AbstractChannel, message: AbstractIncomingMessage) -> None:
        await send(channel, message, reply_to(message, body, type=kind))

    async with service(rabbit, answer) as name, rpc_client(rabbit) as client:
        with pytest.raises(RemoteError, match="UnreadableReply"):
            await client.call_rpc(name, "hello")


async def test_what_cannot_be_answered_is_rejected_counted_and_stops_nobody(rabbit: mq.RabbitMQ) -> None:
    """No reply address; no JSON, whose caller is told. Both leave for the dead-letter queue, and prefetch 1 is free."""
    dead = rabbit.name("dead")
    await mq.declare(rabbit, dead, durable=True)
    route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), echo, prefetch=1, arguments=route) as server,
        rpc_client(rabbit) as client,
        mq.channel(rabbit) as channel,
    ):
        replies = await channel.declare_queue(exclusive=True)
        for message in (Message(b'"from nobody"'), Message(b"{", reply_to=replies.name, correlation_id="1")):
            await channel.default_exchange.publish(message, server.service)
        assert await client.call_rpc(server.service, "good") == "good"
        [told] = await mq.take_messages(replies, 1)
        letters = await mq.take_messages(await channel.get_queue(dead), 2)
        assert [letter.body for letter in letters] == [b'"from nobody"', b"{"]
        assert (told.type, told.correlation_id, json.loads(told.body)["type"]) == ("error", "1", "JSONDecodeError")
    assert (server.rejected, server.answered, server.failed) == (2, 1, 0)


async def test_a_caller_whose_reply_queue_is_gone_is_counted_as_unreachable(rabbit: mq.RabbitMQ) -> None:
    """The reply is confirmed and mandatory, so the server does not believe that it answered."""
    async with mq.channel(rabbit) as leaving:
        gone = (await leaving.declare_queue(exclusive=True)).name
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), echo, prefetch=1) as server,
        rpc_client(rabbit) as client,
        mq.channel(rabbit) as channel,
    ):
        await channel.default_exchange.publish(Message(b'"hello"', reply_to=gone), server.service)
        assert await client.call_rpc(server.service, "good") == "good"
    assert (server.unreachable, server.answered) == (1, 1)


async def test_a_queue_that_takes_no_more_is_known_as_not_done(rabbit: mq.RabbitMQ) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    async with service(rabbit, None, **full) as name, rpc_client(rabbit) as client, asyncio.TaskGroup() as group:
        waits = group.create_task(outcome(client.call_rpc(name, 1, within=1)))

        async def held() -> int:
            return await left(rabbit, name)

        await mq.until(held)
        with pytest.raises(RequestRefused, match="does not take the request") as caught:
            await client.call_rpc(name, 2, within=60)
        assert caught.value.outcome == "not done"
        assert await waits == "unknown"


async def test_a_lost_connection_ends_the_calls_that_wait_and_the_next_ones_go_through(rabbit: mq.RabbitMQ) -> None:
    """At once and not at the deadline of an hour: their reply address is gone. Twice, to be sure of the second time."""
    gate = Gate()
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), gate, prefetch=50, drain=0) as server,
        mq.proxy(rabbit) as network,
        rpc_client(network) as client,
    ):
        for again in (1, 2):
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                calls = [group.create_task(outcome(client.call_rpc(server.service, n, within=3600))) for n in range(20)]
                await mq.until(partial(gate.has, 20 * again))
                network.cut()
                assert {await call for call in calls} == {"unknown"}
            assert client.pending == 0
            async with start_rpc_server(rabbit, rabbit.name("other"), echo) as other:
                answers = await asyncio.gather(*(client.call_rpc(other.service, n) for n in range(5)))
            assert (answers, client.link.reconnects) == ([0, 1, 2, 3, 4], again)


async def test_a_cut_while_requests_are_being_published_is_unknown_and_never_hangs(rabbit: mq.RabbitMQ) -> None:
    """Calls run all the time while the network fails three times: each ends, and an answer is always the right one."""
    outcomes, handled = Counter[str](), Counter[int]()

    async def handle(number: int) -> int:
        handled[number] += 1
        return number

    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), handle, prefetch=50) as server,
        mq.proxy(rabbit) as network,
        rpc_client(network) as client,
    ):
        numbers, busy = iter(range(100_000)), True

        async def work() -> None:
            while busy:
                number = next(numbers)
                try:
                    assert await client.call_rpc(server.service, number, within=20) == number
                except RpcInterrupted as error:
                    outcomes[error.outcome] += 1
                else:
                    outcomes["answered"] += 1
                    assert handled[number] >= 1

        async def answered(more: int) -> None:
            enough = outcomes["answered"] + more
            await mq.until(lambda: outcomes["answered"] > enough)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(work())
            for cuts in range(3):
                await answered(100)
                network.cut()
                await reconnected(client, cuts + 1)
            busy = False
        assert set(outcomes) == {"answered", "unknown"}
        assert (client.pending, client.foreign) == (0, 0)


@pytest.mark.parametrize("lost", [False, True])
async def test_an_answer_that_overtakes_the_confirm_counts(
    rabbit: mq.RabbitMQ, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """The confirm never comes, or the connection is lost instead: the answer is there, and is not thrown away. Nor does
    a second answer replace it."""

    async def answer(channel: AbstractChannel, message: AbstractIncomingMessage) -> None:
        for number in (1, 2):
            await send(channel, message, reply_to(message, b"%d" % number))

    async with service(rabbit, answer) as name, rpc_client(rabbit) as client:
        below: Any = await (await client.link.channel()).get_underlay_channel()
        publish = below.basic_publish

        async def unconfirmed(*arguments: Any, **options: Any) -> None:
            await publish(*arguments, **options)
            await mq.until(lambda: client.late == 1)
            if lost:
                raise ConnectionError("reset")
            await asyncio.Event().wait()

        monkeypatch.setattr(below, "basic_publish", unconfirmed)
        assert await client.call_rpc(name, "hello", within=0.5) == 1
        assert (client.pending, client.late) == (0, 1)


async def test_a_network_that_swallows_everything_is_noticed_before_the_deadline(rabbit: mq.RabbitMQ) -> None:
    """No reset tells of it, only the missing heartbeats: once a second here, every ten by default."""
    gate = Gate()
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), gate, drain=0) as server,
        mq.proxy(rabbit) as network,
        asyncio.TaskGroup() as group,
    ):
        network.client["heartbeat"] = 1
        async with rpc_client(network) as client:
            call = group.create_task(outcome(client.call_rpc(server.service, "hello", within=3600)))
            await mq.until(lambda: gate.began)
            with network.swallow("up", "down"):
                async with asyncio.timeout(20):
                    assert await call == "unknown"
            gate.open.set()
            assert await client.call_rpc(server.service, "again", within=20) == "again"


async def test_through_a_broker_that_freezes_dies_and_comes_back() -> None:
    """B19, and every word for what is known: frozen is unknown, killed is unknown at once, without a connection nothing
    was done. After the restart client and server are there again by themselves."""
    with mq.rabbitmq(private=True) as rabbit:
        gate = Gate()
        async with (
            start_rpc_server(rabbit, rabbit.name("rpc"), gate, drain=0) as server,
            rpc_client(rabbit) as client,
        ):
            gate.open.set()
            assert await client.call_rpc(server.service, "before") == "before"
            async with mq.paused(rabbit.nodes[0]):
                with pytest.raises(RpcTimeout) as frozen:
                    await client.call_rpc(server.service, "frozen", within=0.5)
            gate.open.clear()
            async with asyncio.TaskGroup() as group:
                call = group.create_task(outcome(client.call_rpc(server.service, "killed", within=3600)))
                await mq.until(lambda: gate.began[-1] == "killed")
                async with mq.killed(rabbit.nodes[0]):
                    async with asyncio.timeout(20):
                        assert await call == "unknown"
                    with pytest.raises(RpcTimeout) as away:
                        await client.call_rpc(server.service, "away", within=0.3)
            gate.open.set()
            answers = [await client.call_rpc(server.service, number, within=30) for number in range(5)]
            assert answers == [0, 1, 2, 3, 4]
            assert (frozen.value.outcome, away.value.outcome) == ("unknown", "not done")
            assert "away" not in gate.began
            assert client.link.reconnects >= 1
            assert server.consumer.link.reconnects >= 1
            assert client.pending == 0


async def crashes(rabbit: Any, name: str) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.rpc import start_rpc_server

    async def handle(request: Any) -> None:
        print("began", request)
        mqlib.crash()

    async with start_rpc_server(rabbit, name, handle):
        print("ready")
        await asyncio.sleep(60)


async def test_a_server_that_is_killed_hands_its_request_to_another_one(rabbit: mq.RabbitMQ) -> None:
    """SIGKILL in the handler: the caller gets its answer, from the second server. At least once, so twice begun."""
    name = rabbit.name("rpc")
    async with rpc_client(rabbit) as client, asyncio.TaskGroup() as group:
        async with mq.worker(crashes, rabbit, name) as worker:
            await worker.printed("ready")
            call = group.create_task(client.call_rpc(name, "precious", within=30))
            await worker.printed("began precious")
            await worker.ended()
        assert worker.crashed
        assert not call.done()
        async with start_rpc_server(rabbit, name, echo) as server:
            assert await call == "precious"
        assert server.answered == 1


async def test_a_server_stops_in_bounded_time_and_loses_no_request(rabbit: mq.RabbitMQ) -> None:
    """What can finish within `drain` is answered; the rest, begun or only fetched, goes to the next server."""
    quick, name = asyncio.Event(), rabbit.name("rpc")
    began, stopped = list[str](), list[str]()

    async def handle(request: str) -> str:
        began.append(request)
        try:
            await (quick.wait() if request == "quick" else asyncio.Event().wait())
        except asyncio.CancelledError:
            stopped.append(request)
            raise
        return "first server"

    async with rpc_client(rabbit) as client, asyncio.TaskGroup() as group:
        async with start_rpc_server(rabbit, name, handle, prefetch=2, drain=0.5):
            calls = {}
            for request in ("quick", "stuck", "waiting"):
                calls[request] = group.create_task(client.call_rpc(name, request, within=60))
            await mq.until(lambda: len(began) == 2)
            asyncio.get_running_loop().call_later(0.1, quick.set)
        assert (sorted(began), stopped) == (["quick", "stuck"], ["stuck"])

        async def second(_: str) -> str:
            return "second server"

        async with start_rpc_server(rabbit, name, second):
            answers = {request: await call for request, call in calls.items()}
    assert answers == {"quick": "first server", "stuck": "second server", "waiting": "second server"}


async def test_no_more_than_prefetch_run_at_once(rabbit: mq.RabbitMQ) -> None:
    gate = Gate()
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), gate, prefetch=3) as server,
        rpc_client(rabbit) as client,
        asyncio.TaskGroup() as group,
    ):
        calls = [group.create_task(client.call_rpc(server.service, number, within=30)) for number in range(7)]

        async def fetched() -> bool:
            return await left(rabbit, server.service) == 4

        await mq.until(fetched)
        await mq.until(lambda: len(gate.began) == 3)
        gate.open.set()
        assert [await call for call in calls] == list(range(7))


async def test_a_call_that_is_cancelled_leaves_the_table_and_is_no_error_of_ours(rabbit: mq.RabbitMQ) -> None:
    gate = Gate()
    async with (
        start_rpc_server(rabbit, rabbit.name("rpc"), gate, drain=0) as server,
        rpc_client(rabbit) as client,
        asyncio.TaskGroup() as group,
    ):
        call = group.create_task(client.call_rpc(server.service, "hello", within=30))
        await mq.until(lambda: gate.began)
        call.cancel()
        await asyncio.wait([call])
        assert (call.cancelled(), client.pending) == (True, 0)
        gate.open.set()
        await mq.until(lambda: client.late == 1)


async def test_the_end_of_the_block_ends_the_calls_and_later_ones_are_refused(rabbit: mq.RabbitMQ) -> None:
    async with service(rabbit, None) as name, asyncio.TaskGroup() as group:
        async with rpc_client(rabbit) as client:
            call = group.create_task(outcome(client.call_rpc(name, "hello", within=3600)))
            await mq.until(lambda: client.pending)
        async with asyncio.timeout(20):
            assert await call == "unknown"
        with pytest.raises(RuntimeError, match="the client is closed"):
            await client.call_rpc(name, "hello")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [((1, 0), ValueError, "within is in seconds, above 0"), ((1, float("inf")), ValueError, "at most 4,000,000"),
     ((object(), 1), TypeError, "not JSON serializable"), (("x" * LARGEST, 1), ValueError, "16,777,218 bytes as JSON")],
)  # fmt: skip
async def test_what_cannot_be_sent_is_said_before_it_harms_other_calls(
    rabbit: mq.RabbitMQ, arguments: tuple[Any, float], error: type[Exception], message: str
) -> None:
    async with rpc_client(rabbit) as client:
        with pytest.raises(error, match=message):
            await client.call_rpc("service", *arguments)
        with pytest.raises(ValueError, match="too long"):
            await client.call_rpc("s" * 256, 1)
        assert (client.pending, client.link.reconnects) == (0, 0)


async def test_a_service_whose_queue_is_there_with_other_arguments_is_explained(rabbit: mq.RabbitMQ) -> None:
    async with service(rabbit, None) as name:
        with pytest.raises(mq.BrokerError, match=r"is there with x-max-length"):
            async with start_rpc_server(rabbit, name, echo, arguments={"x-max-length": 5}):
                pytest.fail("it should not start")


async def test_nothing_is_left_behind(rabbit: mq.RabbitMQ) -> None:
    tasks, files = asyncio.all_tasks(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        async with start_rpc_server(rabbit, rabbit.name("rpc"), echo) as server, rpc_client(rabbit) as client:
            await client.call_rpc(server.service, 1)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)
    if files:
        await mq.until(lambda: len(os.listdir("/proc/self/fd")) <= files, within=10)
