"""Dead letters of RabbitMQ: a topology that loses none, a store to review them, and a way back with a limit.

See https://www.rabbitmq.com/docs/dlx, and Hohpe and Woolf, "Enterprise Integration Patterns": Dead Letter Channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from datetime import datetime
from decimal import Decimal
from itertools import chain
from typing import Any

from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage
from aiormq.exceptions import ChannelLockedResource

from ..brokers import BrokerError, RabbitMQ
from ..brokers.base import Connectable
from ..bulk import Undelivered, pump_messages
from ..queues import channel, declare, management, vhost
from .link import consuming, link

KINDS = ("policies", "operator-policies", "exchanges", "queues", "bindings")
BINDING = ("source", "destination_type", "destination", "routing_key")
LIMITS = ("message-ttl", "max-length", "max-length-bytes", "delivery-limit")
WORDS = {"*": r"\.[^.]*", "#": r"(\.[^.]*)*"}
REDRIVES = "x-redrives"
NOT_SENT_BACK = re.compile(r"x-(first-|last-)?death|x-delivery-count|B?CC$")
KEPT = ("content_type", "content_encoding", "priority", "correlation_id", "reply_to", "message_id", "timestamp", "type",
        "app_id", "headers")  # fmt: skip
TAGS: dict[str, Any] = {"$bytes": bytearray.fromhex, "$datetime": datetime.fromisoformat, "$Decimal": Decimal}


class Topology:
    """Where dead letters go, by what the management API says is there: lists by the names of `KINDS`."""

    def __init__(self, here: Mapping[str, list[dict[str, Any]]]) -> None:
        def settings(each: dict[str, Any], *kinds: str) -> dict[str, Any]:
            # The API shows policies late. Of two limits the lower one counts, of other settings the argument.
            found = {name.removeprefix("x-"): value for name, value in each["arguments"].items()}
            for policies in (here["policies"], here["operator-policies"]):
                fit = [one for one in policies if one["apply-to"] in kinds and re.search(one["pattern"], each["name"])]
                for name, value in max(fit, key=lambda one: one["priority"])["definition"].items() if fit else ():
                    found[name] = min(value, found.get(name, value)) if name in LIMITS else found.get(name, value)
            return found

        self.queues = {at["name"]: settings(at, f"{at['type']}_queues", "all", "queues") for at in here["queues"]}
        self.exchanges = {at["name"]: (at["type"], settings(at, "all", "exchanges")) for at in here["exchanges"]}
        self.bindings = [tuple(each[name] for name in BINDING) for each in here["bindings"]]

    def routed(self, exchange: str, key: str, passed: tuple[str, ...] = ()) -> set[str]:
        """The queues that get a message; where an exchange looks at more than the key, all that may get it."""
        if exchange == "" or exchange in passed:
            return set() if exchange else {key} & self.queues.keys()
        found, (kind, settings) = set[str](), self.exchanges.get(exchange, ("", {}))
        for source, what, name, pattern in self.bindings:
            if source == exchange and _takes(kind, pattern, key):
                found |= {name} if what == "queue" else self.routed(name, key, (*passed, exchange))
        other = settings.get("alternate-exchange")
        return found if found or other is None else self.routed(other, key, (*passed, exchange))

    def dead_letters(self, queue: str) -> dict[str, set[str]]:
        """Where its dead letters go, by routing key: the one that is set, else those that the queue is bound with."""
        exchange, key = (self.queues[queue].get(f"dead-letter-{name}") for name in ("exchange", "routing-key"))
        bound = {key for source, what, name, key in self.bindings if source and (what, name) == ("queue", queue)}
        keys = sorted(bound or {queue}) if key is None else [key]
        return {} if exchange is None else {key: self.routed(exchange, key) for key in keys}

    def limits(self, queue: str) -> list[str]:
        """Those of its settings by which a message leaves it although nobody rejects it."""
        settings = self.queues[queue]
        full = () if settings.get("overflow") == "reject-publish" else LIMITS[1:3]
        return [name for name in (LIMITS[0], *full, LIMITS[3]) if settings.get(name, -1) >= 0]

    def cycle(self, queue: str) -> list[str]:
        """The shortest way of its dead letters back to it on which nobody has to reject them, or nothing."""
        ways = [[queue]]
        for way in ways:  # which grows
            for after in sorted(set().union(*self.dead_letters(way[-1]).values())) if self.limits(way[-1]) else ():
                if after == queue:
                    return [*way, queue]
                if after not in chain.from_iterable(ways):
                    ways.append([*way, after])
        return []

    def problems(self, *queues: str) -> list[str]:
        """How dead letters of these queues (or of all), and of those where they go, get lost: a sentence each."""
        found, left = dict[str, None](), sorted(queues or self.queues)
        for queue in left:  # which grows
            settings, way = self.queues[queue], self.cycle(queue)
            exchange = settings.get("dead-letter-exchange")
            if settings.get("dead-letter-strategy") == "at-least-once" and settings.get("overflow") != "reject-publish":
                found[f"{queue}: at-least-once without overflow reject-publish becomes at-most-once"] = None
            for key, targets in self.dead_letters(queue).items():
                left += sorted(targets - {*left})
                if not targets:
                    there = "has no queue for" if exchange in self.exchanges else "is not there, which would get"
                    found[f"{queue}: its dead-letter exchange {exchange!r} {there} the routing key {key!r}"] = None
                for name in sorted(targets):
                    if self.limits(name) and not self.dead_letters(name):
                        found[f"{name}: its {self.limits(name)[0]} drops the dead letters in it"] = None
            if way and queue == min(way):
                found[f"{' -> '.join(way)}: nobody rejects on this cycle, so RabbitMQ drops what comes round"] = None
        return [*found]


def _takes(kind: str, pattern: str, key: str) -> bool:
    words = "".join(WORDS.get(word, rf"\.{re.escape(word)}") for word in pattern.split("."))
    return pattern == key if kind == "direct" else kind != "topic" or bool(re.fullmatch(words, f".{key}"))


async def _here(rabbit: RabbitMQ) -> dict[str, list[dict[str, Any]]]:
    return {kind: await management(rabbit, f"/{kind}/{vhost(rabbit)}") for kind in KINDS}


async def check_topology(rabbit: RabbitMQ, *queues: str) -> list[str]:
    """`Topology.problems` of what is there. Raises `BrokerError` for a missing queue, or no management API."""
    topology = Topology(await _here(rabbit))
    if missing := sorted({*queues} - topology.queues.keys()):
        raise BrokerError(f"RabbitMQ has no queue {missing[0]!r}")
    return topology.problems(*queues)


async def setup_dlq(rabbit: RabbitMQ, queue: str, arguments: Mapping[str, Any] | None = None) -> str:
    """Declares, durable, a work queue, its dead-letter exchange `….dlx` and queue `….dl`, and a parking lot `….parked`.

    `arguments` are the work queue's. It has no TTL unless they say so: after an outage that dead-letters work which
    nobody has tried. With a quorum queue all are quorum queues and it dead-letters at least once, else at most once.
    Returns the dead-letter queue's name; safe to repeat. Raises `BrokerError` when a queue has other properties, and
    for a topology that loses messages, as far as it is known: without a management API, what is declared here.
    """
    exchange, dead, parked, arguments = f"{queue}.dlx", f"{queue}.dl", f"{queue}.parked", dict(arguments or {})
    if {"x-dead-letter-exchange", "x-dead-letter-routing-key"} & arguments.keys():
        raise ValueError("setup_dlq chooses the dead-letter exchange and its routing key")
    kind = {"x-queue-type": "quorum"} if arguments.get("x-queue-type") == "quorum" else {}
    safe = {**kind, "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"} if kind else {}
    # From 4.0 on a quorum queue gives up what came back 20 times; what the dead-letter queue gives up is parked.
    park = {**safe, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": parked} if kind else {}
    work = {**safe, "x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": queue, **arguments}
    queues = {parked: kind, dead: park, queue: work}  # the work queue last: what dies in it has somewhere to go
    here = await _here(rabbit) if rabbit.management_url else {kind: [] for kind in KINDS}
    here["exchanges"].append({"name": exchange, "type": "direct", "arguments": {}})
    of = kind.get("x-queue-type", "classic")
    here["queues"] += [{"name": name, "type": of, "arguments": wanted} for name, wanted in queues.items()]
    here["bindings"].append(dict(zip(BINDING, (exchange, "queue", dead, queue), strict=True)))
    if problems := Topology(here).problems(queue):
        raise BrokerError("; ".join(problems))
    for name, wanted in queues.items():
        if name == queue:
            async with channel(rabbit) as asking:
                route = await asking.declare_exchange(exchange, "direct", durable=True)
                await (await asking.get_queue(dead)).bind(route, queue)
        await declare(rabbit, name, durable=True, arguments=wanted)
    return dead


@dataclass(frozen=True)
class DeadLetter:
    """A message that died, as it was; its body is not parsed. What its headers do not tell is None, or 0.

    `reason`, `queue`, `first_death` (ISO 8601): of its first death; `deaths`: how many; `redrives`: how often it was
    sent back; `about`: headers and properties as JSON; `number`: its place in the store.
    """

    reason: str | None
    queue: str | None
    deaths: int
    first_death: str | None
    redrives: int
    body: bytes
    about: str
    number: int | None = None

    @classmethod
    def of(cls, message: AbstractIncomingMessage) -> DeadLetter:
        """What a message tells. Clients can put anything into these headers, so nothing in them is an error."""
        headers = message.headers
        reason, queue = (_as(str, headers.get(f"x-first-death-{name}"), None) for name in ("reason", "queue"))
        deaths = [_as(dict, each, {}) for each in _as(list, headers.get("x-death"), [])]
        times = [each["time"].isoformat() for each in deaths if isinstance(each.get("time"), datetime)]
        count, redrives = sum(_as(int, each.get("count"), 0) for each in deaths), _as(int, headers.get(REDRIVES), 0)
        about = json.dumps({name: getattr(message, name) for name in KEPT}, default=_tagged)
        return cls(reason, queue, count, min(times, default=None), redrives, message.body, about)

    def again(self, redrives: int) -> Message:
        """The message without its deaths, to be sent to a queue; so also without `CC` and `BCC`."""
        about = json.loads(self.about, object_hook=_untagged)
        headers = {name: value for name, value in about.pop("headers").items() if not NOT_SENT_BACK.match(name)}
        return Message(self.body, headers={**headers, REDRIVES: redrives}, delivery_mode=2, **about)


def _as(kind: type, value: Any, otherwise: Any) -> Any:
    return value if isinstance(value, kind) else otherwise


def _tagged(value: Any) -> dict[str, str]:
    if isinstance(value, bytes | bytearray):
        return {"$bytes": value.hex()}
    return {f"${type(value).__name__}": value.isoformat() if isinstance(value, datetime) else str(value)}


def _untagged(pairs: dict[str, Any]) -> Any:
    with contextlib.suppress(Exception):  # what only looks like one of ours
        [(name, value)] = pairs.items()
        return TAGS[name](value)
    return pairs


class Letters:
    """Dead letters in a file of SQLite, each in a state: new; reviewed, that is approved or discarded; and, by
    `redrive`, redriven or parked. What a method has changed is on the disk when it returns."""

    def __init__(self, path: str) -> None:
        self._base = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._base.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
        self._base.execute(
            "CREATE TABLE IF NOT EXISTS letters (reason, queue, deaths, first_death, redrives, body, about, "
            "number INTEGER PRIMARY KEY, state, twin UNIQUE)"
        )
        self.close = self._base.close

    def __call__(self, letter: DeadLetter) -> None:
        """Stores a letter; one with a message id once, also when it is delivered twice."""
        known, values = json.loads(letter.about)["message_id"], astuple(letter)
        twin = repr((known, *values[1:6])) if known else None
        self._base.execute("INSERT OR IGNORE INTO letters VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'new', ?)", (*values, twin))

    def find(self, state: str, queue: str | None = None) -> list[DeadLetter]:
        """The letters in a state, of one queue or of all, oldest first."""
        rows = self._base.execute("SELECT * FROM letters WHERE state = ? ORDER BY number", (state,))
        return [DeadLetter(*row[:8]) for row in rows if queue in (None, row[1])]

    def move(self, letters: Iterable[DeadLetter], state: str, before: str = "new") -> int:
        """Puts letters into another state, those that are in the state `before`, and returns how many."""
        numbers = json.dumps([letter.number for letter in letters])
        words = "UPDATE letters SET state = ? WHERE state = ? AND number IN (SELECT value FROM json_each(?))"
        return self._base.execute(words, (state, before, numbers)).rowcount


@contextlib.asynccontextmanager
async def process_dead_letters(
    rabbit: Connectable, queue: str, store: Callable[[DeadLetter], Any], prefetch: int = 20, pause: float = 1.0
) -> AsyncIterator[Counter[str]]:
    """Moves what a dead-letter queue holds, and what comes, into `store` (`Letters`, or a function) during the block.

    A message is acknowledged after `store(letter)`, which runs in a thread if it is a plain function, and again every
    `pause` seconds while it raises. A crash in between stores a letter twice. Counts what was `stored`, and each error.
    """
    counts = Counter(stored=0)

    async def put(message: AbstractIncomingMessage) -> None:
        letter, outcome = DeadLetter.of(message), ""
        while outcome != "stored":  # put back into the queue, it would come again at once
            await asyncio.sleep(pause if outcome else 0)
            try:
                answer = await asyncio.to_thread(store, letter)
                await answer if inspect.isawaitable(answer) else None
                outcome = "stored"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            counts[outcome] += 1

    async with consuming(rabbit, queue, put, prefetch):
        yield counts


async def redrive(rabbit: Connectable, store: Letters, queue: str, limit: int = 3, within: float = 30) -> Counter[str]:
    """Sends the approved letters of a work queue back to it (not to an exchange: others have had theirs), oldest first.

    One that was sent back `limit` times (header `x-redrives`) goes to its parking lot instead. Counts what became
    `redriven` and `parked`, once the broker has confirmed it: a crash in between sends some twice, and loses none.
    Raises `Undelivered` when some are not confirmed within `within` seconds: these stay approved, and may have been
    sent; `BrokerError` while another redrive of the queue runs.
    """
    sent = Counter(redriven=0, parked=0)
    async with link(rabbit) as connection:
        sending = await connection.channel()
        try:
            await asyncio.wait_for(sending.declare_queue(f"{queue}.redrive", exclusive=True), within)
        except ChannelLockedResource:
            raise BrokerError(f"another redrive of {queue!r} is under way") from None
        for state, target in (("redriven", queue), ("parked", f"{queue}.parked")):
            chosen = [each for each in store.find("approved", queue) if (each.redrives < limit) == (target == queue)]
            for batch in (chosen[at : at + 256] for at in range(0, len(chosen), 256)):
                messages = [letter.again(letter.redrives + (target == queue)) for letter in batch]
                outcome = await pump_messages(sending.default_exchange, target, messages, 256, within, strict=False)
                left = outcome.failed.keys() | outcome.unknown.keys()
                sent[state] += store.move((each for at, each in enumerate(batch) if at not in left), state, "approved")
                if left:
                    raise Undelivered(outcome)
    return sent
