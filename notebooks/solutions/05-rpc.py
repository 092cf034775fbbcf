"""The exercises of notebook 05: their judges, hints, wrong answers and solutions.

The solutions have no annotations and bear the names that the exercises ask for, so that a reader can paste them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from typing import Any

from aio_pika import Message

import mqlib as mq
from mqlib.checks import Task, Wrong
from mqlib.patterns.rpc import NoSuchService, RemoteError, RpcClient, RpcError, RpcTimeout, rpc_client, start_rpc_server


async def _begun(expires: bool) -> int:
    """How often a service that is busy for 0.6 s begins, when three attempts of 0.15 s each ask it."""
    rabbit, begun, end = mq.rabbitmq(), list[bytes](), asyncio.Event()

    async def work(message: Any) -> None:
        if message.body == b"end":  # behind all others: each of them is done, or has expired
            end.set()
        else:
            begun.append(message.body)
            await asyncio.sleep(0.6)
        await message.ack()

    async with mq.channel(rabbit, prefetch=1) as serving, mq.channel(rabbit) as asking:
        queue = await serving.declare_queue(rabbit.name("exercise"), durable=True)
        await queue.consume(work)
        for number in range(3):
            request = Message(b"%d" % number, reply_to="nobody", expiration=0.15 if expires else None)
            await asking.default_exchange.publish(request, queue.name)
            await asyncio.sleep(0.15)
        await asking.default_exchange.publish(Message(b"end"), queue.name)
        async with asyncio.timeout(10):
            await end.wait()
    return len(begun)


async def judge_1(answer: Any) -> None:
    try:
        without, with_expiration = (int(number) for number in answer)
    except (TypeError, ValueError):
        raise Wrong(f"give two numbers, as in (1, 2); this is {answer!r}") from None
    begun = await _begun(expires=False)
    if without != begun:
        raise Wrong(f"without expiration the handler began {begun} times, and not {without}")
    begun = await _begun(expires=True)
    if with_expiration != begun:
        raise Wrong(f"with expiration it began {begun} times, and not {with_expiration}")


async def judge_2(on_reply: Any) -> None:
    rabbit, loop = mq.rabbitmq(), asyncio.get_running_loop()
    calls = {name: loop.create_future() for name in ("a", "b", "gone", "patient")}
    calls["gone"].cancel()
    waiting = dict(calls)
    come = [("b", b"for b"), ("stranger", b"?"), ("a", b"for a"), ("a", b"again"), (None, b"?"), ("gone", b"?")]
    expected = [True, False, True, False, False, False]
    async with mq.channel(rabbit) as channel:
        replies = await channel.declare_queue(exclusive=True)
        for name, body in come:
            await channel.default_exchange.publish(Message(body, correlation_id=name), replies.name)
        messages = await mq.take_messages(replies, len(come))
    for message, right in zip(messages, expected, strict=True):
        what = f"the reply with the id {message.correlation_id!r} and the body {message.body!r}"
        try:
            got = on_reply(waiting, message.correlation_id, message.body)
        except Exception as error:
            raise Wrong(f"at {what} it raised {type(error).__name__}: {error}") from None
        if bool(got) != right:
            raise Wrong(f"it returned {got!r} for {what}; {'a call was' if right else 'no call was'} waiting for it")
    for name, body in (("a", b"for a"), ("b", b"for b")):
        if not calls[name].done() or calls[name].result() != body:
            raise Wrong(f"the call {name!r} should have got {body!r}")
    if calls["patient"].done():
        raise Wrong("a call for which nothing came got something")


def on_reply(waiting, correlation_id, body):
    answer = waiting.pop(correlation_id, None)
    if answer is None or answer.done():
        return False
    answer.set_result(body)
    return True


def trusts_every_id(waiting: Any, correlation_id: Any, body: bytes) -> bool:
    waiting[correlation_id].set_result(body)
    return True


def forgets_those_who_left(waiting: Any, correlation_id: Any, body: bytes) -> bool:
    answer = waiting.pop(correlation_id, None)
    if answer is not None:
        answer.set_result(body)
    return answer is not None


def takes_the_next_one(waiting: Any, correlation_id: Any, body: bytes) -> bool:
    for answer in waiting.values():
        if not answer.done():
            answer.set_result(body)
            return True
    return False


class _Counting(RpcClient):
    """Notes every attempt, and makes it with another client."""

    def __init__(self, client: RpcClient) -> None:
        super().__init__()
        self.client, self.requests = client, list[Any]()

    async def call_rpc(self, service: str, request: Any, within: float = 10.0) -> Any:
        self.requests.append(request)
        return await self.client.call_rpc(service, request, within)


async def judge_3(retrying: Any) -> None:
    rabbit = mq.rabbitmq()
    seen, silent = list[Any](), 1  # how many of the first requests get no answer

    async def handle(request: Any) -> Any:
        seen.append(request)
        if request.get("item") == "unicorn":
            raise LookupError("no price")
        if len(seen) <= silent:
            await asyncio.sleep(60)
        return {"for": request["item"]}

    name = rabbit.name("exercise")
    async with start_rpc_server(rabbit, name, handle, drain=0), rpc_client(rabbit) as client:
        counting = _Counting(client)
        answer = await retrying(counting, name, {"item": "apple"}, 0.9)
        if answer != {"for": "apple"}:
            raise Wrong(f"the second attempt is answered with {{'for': 'apple'}}, and it returned {answer!r}")
        keys = [request.get("key") for request in counting.requests]
        if not keys[0] or len(set(keys)) != 1:
            raise Wrong(f"the attempts had the keys {keys}: one new key, the same for all")
        other = _Counting(client)
        await retrying(other, name, {"item": "pear"}, 0.9)
        if other.requests[0].get("key") == keys[0]:
            raise Wrong("two calls had the same key; to the service they are one")
        for where, item, kind in ((rabbit.name("nowhere"), "x", NoSuchService), (name, "unicorn", RemoteError)):
            counting = _Counting(client)
            try:
                await retrying(counting, where, {"item": item}, 0.9)
            except kind:
                pass
            else:
                raise Wrong(f"it should raise {kind.__name__}, and did not")
            if len(counting.requests) != 1:
                raise Wrong(f"{kind.__name__} is a known outcome, and it asked {len(counting.requests)} times")
        silent, counting, start = 10**6, _Counting(client), time.monotonic()
        try:
            await retrying(counting, name, {"item": "apple"}, 0.6)
        except RpcTimeout:
            pass
        else:
            raise Wrong("when no attempt is answered it should raise the last RpcTimeout")
        if (spent := time.monotonic() - start) > 1.2:
            raise Wrong(f"it had 0.6 s for all attempts, and took {spent:.1f} s")
        if len(counting.requests) != 3:
            raise Wrong(f"nobody answered, and it asked {len(counting.requests)} times instead of 3")


async def retrying(client, service, request, within):
    request = {**request, "key": str(uuid.uuid4())}
    left = 3
    while True:
        left -= 1
        try:
            return await client.call_rpc(service, request, within=within / 3)
        except RpcError as error:
            if error.outcome != "unknown" or left == 0:
                raise


async def a_new_key_each_time(client: Any, service: str, request: Any, within: float) -> Any:
    for attempt in range(3):
        try:
            return await client.call_rpc(service, {**request, "key": str(uuid.uuid4())}, within=within / 3)
        except RpcError as error:
            if error.outcome != "unknown" or attempt == 2:
                raise
    return None


async def three_deadlines(client: Any, service: str, request: Any, within: float) -> Any:
    request = {**request, "key": str(uuid.uuid4())}
    for attempt in range(3):
        try:
            return await client.call_rpc(service, request, within=within)
        except RpcError as error:
            if error.outcome != "unknown" or attempt == 2:
                raise
    return None


async def retries_everything(client: Any, service: str, request: Any, within: float) -> Any:
    request = {**request, "key": str(uuid.uuid4())}
    for attempt in range(3):
        try:
            return await client.call_rpc(service, request, within=within / 3)
        except RpcError:
            if attempt == 2:
                raise
    return None


async def asks_once(client: Any, service: str, request: Any, within: float) -> Any:
    return await client.call_rpc(service, {**request, "key": str(uuid.uuid4())}, within=within)


TASKS = {
    "05.1": Task(
        question="How often does it run?",
        start='answer = ...\n\nawait mq.exercise("05.1").check(answer)',
        hints=[
            "A caller that gives up takes nothing back: its request stays in the queue.",
            "When is the service free for the second request, and is that one still alive?",
        ],
        solution=None,
        code="answer = (3, 1)",
        judge=judge_1,
        wrong=[(3, 3), (1, 1), (3, 2), 3, "twice"],
    ),
    "05.2": Task(
        question="Whose reply is this?",
        start='on_reply = ...\n\nawait mq.exercise("05.2").check(on_reply)',
        hints=[
            "`waiting.get(correlation_id)` is None for an id of nobody, and for None, too.",
            "`future.done()` is true for one that has its result, and for one that was cancelled.",
        ],
        solution=on_reply,
        judge=judge_2,
        wrong=[trusts_every_id, forgets_those_who_left, takes_the_next_one, 3],
    ),
    "05.3": Task(
        question="Ask again, within reason",
        start='retrying = ...\n\nawait mq.exercise("05.3").check(retrying)',
        hints=[
            "Every `RpcError` has an `outcome`: 'unknown', 'not done' or 'failed'. Only the first is worth a retry.",
            "Make the key before the loop. A third of the time for each of three attempts keeps the whole.",
        ],
        solution=retrying,
        code=f"import uuid\n\nfrom mqlib.patterns.rpc import RpcError\n\n\n{inspect.getsource(retrying)}",
        judge=judge_3,
        wrong=[a_new_key_each_time, three_deadlines, retries_everything, asks_once],
    ),
}
