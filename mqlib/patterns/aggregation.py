"""Many into one, on RabbitMQ: the parts of a group become one message; several services are asked, with one deadline.

A part says in its headers where it belongs: `seq-id` (the group: what correlates them), `seq-no` (from 0), `seq-size`.
A group goes out once, complete or, after a time, partial. After Hohpe and Woolf, "Enterprise Integration Patterns":
Splitter, Aggregator, Scatter-Gather, Message Sequence, Correlation Identifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from ..brokers.base import Connectable
from ..waiting import beside
from .link import CLOSE_SECONDS, GONE, Link, link, uncancelled
from .routing import Invalid, declare_input, gone, send_until_confirmed
from .rpc import RpcClient, RpcError
from .sending import Unconfirmed, Unrouted, bury, json_message

SEQ_ID, SEQ_NO, SEQ_SIZE = "seq-id", "seq-no", "seq-size"
LARGEST_GROUP = 10_000


def parts_of(id: str, items: Iterable[Any], **properties: Any) -> list[Message]:
    """A message for each of the items, as JSON, as parts of the group `id`; with the message ids `id/0`, `id/1`, …

    So who splits a message twice, after a crash, makes copies that can be told. `properties` are those of a message.
    Raises `ValueError` without an id or an item, or with more than `LARGEST_GROUP`; `TypeError` for what is not JSON.
    """
    items = list(items)
    if not id or not 0 < len(items) <= LARGEST_GROUP:
        raise ValueError(f"a group has an id and 1 to {LARGEST_GROUP:,} parts; this is {id!r} with {len(items):,}")
    headers = {**properties.pop("headers", {}), SEQ_ID: id, SEQ_SIZE: len(items)}
    return [
        json_message(item, f"{id}/{number}", headers={**headers, SEQ_NO: number}, **properties)
        for number, item in enumerate(items)
    ]


@dataclass
class Group:
    """Parts that belong together."""

    id: str
    size: int
    """How many there should be."""
    deadline: float
    data: dict[int, Any] = field(default_factory=dict)
    """What came, by number, in their order; once it is out, only the numbers count."""
    outcome: Literal["open", "complete", "partial", "invalid"] = "open"
    held: list[AbstractIncomingMessage] = field(default_factory=list)
    """Not acknowledged yet."""

    @property
    def missing(self) -> list[int]:
        """The numbers of the parts that did not come."""
        return [number for number in range(self.size) if number not in self.data]


class Late(Invalid):
    """A part of a group that is out already, without it."""


def _part(message: AbstractIncomingMessage) -> tuple[str, int, int, Any]:
    id, number, size = (message.headers.get(name) for name in (SEQ_ID, SEQ_NO, SEQ_SIZE))
    whole = type(number) is int and type(size) is int and 0 <= number < size <= LARGEST_GROUP
    if not (isinstance(id, str) and id and whole):
        raise Invalid(f"no part of a group: {SEQ_ID} is {id!r}, {SEQ_NO} {number!r}, {SEQ_SIZE} {size!r}")
    return id, int(str(number)), int(str(size)), json.loads(message.body)


class Aggregator:
    """An aggregator at work; made by `start_aggregator`."""

    def __init__(
        self, queue: str, to: str, combine: Callable[[Group], Any], invalid: str, timeout: float,
        complete: Callable[[Group], bool], prefetch: int, remember: int,
    ) -> None:  # fmt: skip
        self.complete = self.partial = 0
        """Groups that went out, and are confirmed."""
        self.crowded_out = 0
        """Those of the partial ones that went out before their time, since no further part could be held."""
        self.duplicates = 0
        """Copies of parts that had come already; they are acknowledged, and count for nothing."""
        self.late = self.invalid = 0
        """Parts in the invalid-message channel: of groups that were out already; and all others."""
        self.unsettled = 0
        """Parts that were done with when the connection was gone; they are delivered again, and are duplicates."""
        self.waited = 0
        """Attempts to send a group that were not confirmed, as when the next queue is full."""
        self.link: Link
        self._queue, self._to, self._letters = queue, to, invalid
        self._combine, self._is_complete = combine, complete
        self._timeout, self._prefetch, self._remember = timeout, prefetch, remember
        self._open, self._out = dict[str, Group](), dict[str, Group]()
        self._arrived, self._wake = deque[tuple[float, AbstractIncomingMessage]](), asyncio.Event()
        self._stopping = False

    def __str__(self) -> str:
        words = ("complete", "partial", "duplicates", "late", "invalid")
        return ", ".join(f"{word} {getattr(self, word)}" for word in words)

    @property
    def open(self) -> int:
        """Groups that wait for parts."""
        return len(self._open)

    async def _setup(self, channel: AbstractChannel) -> None:
        """On a new connection: what was held comes again."""
        self._open.clear()
        self._arrived.clear()
        queue = await channel.get_queue(self._queue)
        await queue.consume(self._arrive)

    async def _arrive(self, message: AbstractIncomingMessage) -> None:
        self._arrived.append((asyncio.get_running_loop().time(), message))
        self._wake.set()

    async def _run(self) -> None:
        """Does one thing after the other: so no group can be in two states."""
        loop = asyncio.get_running_loop()
        while not self._stopping:
            first = next(iter(self._open.values()), None)  # of one timeout for all, the first to be due
            # When no part can come any more before some are acknowledged, to wait helps nobody.
            full = not self._arrived and sum(len(group.held) for group in self._open.values()) >= self._prefetch
            # What arrived before a group was due counts, though it is looked at later.
            now = self._arrived[0][0] if self._arrived else loop.time()
            if first is not None and (full or first.deadline <= now):
                self.crowded_out += full and first.deadline > now
                await self._emit(first, "partial")
            elif self._arrived:
                await self._take(*self._arrived.popleft())
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(first.deadline if first else None):
                        await self._wake.wait()

    async def _take(self, arrived: float, message: AbstractIncomingMessage) -> None:
        try:
            id, number, size, data = _part(message)
            group = self._open.get(id) or self._out.get(id) or Group(id, size, arrived + self._timeout)
            if size != group.size:
                raise Invalid(f"{SEQ_SIZE} is {size}, and an earlier part of {id!r} said {group.size}")
            if group.outcome != "open" and number not in group.data:
                raise Late(f"part {number} of {id!r} came when that was out, {group.outcome}")
        except Exception as error:
            await self._set_aside(message, error)
            return
        if number in group.data:
            self.duplicates += 1
            await self._acknowledge(message)
            return
        group.data[number] = data
        group.held.append(message)
        self._open[id] = group
        if self._is_complete(group):
            await self._emit(group, "complete")

    async def _emit(self, group: Group, outcome: Literal["complete", "partial"]) -> None:
        """Sends the result, and acknowledges the parts when it is confirmed."""
        del self._open[group.id]
        if any(map(gone, group.held)):
            return  # the connection is lost, and all of them come again
        group.outcome, group.data = outcome, dict(sorted(group.data.items()))
        headers: dict[str, Any] = {"group-outcome": outcome, "group-missing": group.missing}

        def again() -> bool:
            self.waited += 1
            return not any(map(gone, group.held))

        try:
            result = json_message(self._combine(group), group.id, headers=headers, correlation_id=group.id)
            await send_until_confirmed(self.link, result, self._to, again)
        except Exception as error:
            if isinstance(error, Unconfirmed) and not isinstance(error, Unrouted):
                return
            group.outcome = "invalid"  # the fault is in what combines them, or in where they should go
            for message in group.held:
                await self._set_aside(message, error)
        else:
            self.complete, self.partial = self.complete + (outcome == "complete"), self.partial + (outcome == "partial")
            for message in group.held:
                await self._acknowledge(message)
        group.held, group.data = [], dict.fromkeys(group.data)
        self._out[group.id] = group
        while len(self._out) > self._remember:
            del self._out[next(iter(self._out))]

    async def _set_aside(self, message: AbstractIncomingMessage, error: Exception) -> None:
        if gone(message):
            return
        with contextlib.suppress(*GONE):
            await bury(self.link, message, error, 1, self._queue, self._letters)
            if not message.processed:
                await self._acknowledge(message)
            late = isinstance(error, Late)
            self.late, self.invalid = self.late + late, self.invalid + (not late)

    async def _acknowledge(self, message: AbstractIncomingMessage) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):  # aiormq may wait for ever to write to what is lost
                with uncancelled():
                    await message.ack()
        except GONE:
            self.unsettled += 1

    async def _stop(self, running: asyncio.Task[Any], drain: float) -> None:
        self._stopping = True
        self._wake.set()
        await asyncio.wait([running], timeout=drain)


def all_there(group: Group) -> bool:
    """The usual condition: as many parts as there should be."""
    return len(group.data) == group.size


@contextlib.asynccontextmanager
async def start_aggregator(
    rabbit: Connectable, queue: str, to: str, combine: Callable[[Group], Any], invalid: str, timeout: float = 30.0,
    complete: Callable[[Group], bool] = all_there, prefetch: int = 200, remember: int = 10_000, drain: float = 5.0,
) -> AsyncIterator[Aggregator]:  # fmt: skip
    """Makes one message for the queue `to` of the parts of each group in `queue`, during the block.

    It is `combine(group)` as JSON, when `complete(group)`, or `timeout` seconds after the first part came, with what is
    there. Its message id is the group's, its headers `group-outcome` and `group-missing`. The parts are acknowledged
    when it is confirmed: a crash loses nothing, and in between makes a second copy, with the same id. A full queue `to`
    is waited for. At most `prefetch` parts are held, hence as many groups are open; when that is reached the oldest
    goes out partial at once. A copy of a part counts once; one that comes when its group is out goes to the queue
    `invalid`, as does what is no part, and the parts for which `combine` raises or `to` is not there. `remember` says
    of how many groups that are out it knows this; a process that starts knows of none.

    The queues `queue` and `invalid` are declared, see `declare_input`; of several aggregators one is active, since it
    needs all the parts of a group. Raises as that does, `ValueError` for limits that cannot be, what `complete` raises.
    """
    if prefetch < 1 or remember < 1 or not timeout > 0:
        raise ValueError(f"prefetch and remember are at least 1, timeout above 0: {prefetch}, {remember}, {timeout}")
    await declare_input(rabbit, queue, invalid, **{"x-single-active-consumer": True})
    made = Aggregator(queue, to, combine, invalid, timeout, complete, prefetch, remember)
    async with link(rabbit, made._setup, prefetch) as made.link, beside(made._run()) as running:
        try:
            yield made
        finally:
            await made._stop(running, drain)


@dataclass(frozen=True)
class Gathered:
    """What came in time, by service, the first answer first; and of the others why not."""

    answers: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, RpcError] = field(default_factory=dict)


async def scatter_gather(
    client: RpcClient, services: Sequence[str], request: Any, within: float = 1.0, enough: int | None = None
) -> Gathered:
    """Asks all the services at once, and returns after `within` seconds at the latest with what came until then.

    With `enough` it returns at that many answers. A service that did not answer is in `missing`, with the `RpcError`:
    in time, at all, or with an error. Raises `ValueError` for no services, one twice, or a number that cannot be;
    what `call_rpc` raises for a request that cannot be sent.
    """
    wanted = len(services) if enough is None else enough
    if isinstance(services, str) or len({*services}) < len(services) or not 1 <= wanted <= len(services):
        raise ValueError(f"give a list of different services, and enough as 1 to their number: {services!r}, {enough}")
    found = Gathered()

    async def ask(service: str) -> None:
        try:
            found.answers[service] = await client.call_rpc(service, request, within)
        except RpcError as error:
            found.missing[service] = error

    asking = {asyncio.create_task(ask(service)): service for service in services}
    waiting = {*asking}
    try:
        while waiting and len(found.answers) < wanted:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    for service in services:
        if service not in found.answers and service not in found.missing:
            found.missing[service] = RpcError(f"{service!r} was not waited for: enough had answered")
    return found
