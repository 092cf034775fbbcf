"""The publisher knows what became of each event; what reached a durable subscription is handled, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aio_pika import Message
from aio_pika.connection import Connection
from aiormq.exceptions import ChannelLockedResource

import mqlib as mq
from mqlib.patterns.pubsub import (
    Event,
    NotSent,
    Refused,
    Subscription,
    Unconfirmed,
    Unknown,
    Unrouted,
    publish_event,
    publishing,
    subscribe_to_events,
)


@dataclass
class Names:
    """An exchange of a test's own, with the names that belong to it."""

    rabbit: mq.RabbitMQ
    exchange: str = field(init=False)
    queue: str = field(init=False)
    dead: str = field(init=False)

    def __post_init__(self) -> None:
        self.exchange, self.queue, self.dead = (self.rabbit.name(each) for each in ("events", "audit", "dead"))

    def subscribe(
        self, patterns: Any, handle: Any, durable: bool = False, through: Any = None, **options: Any
    ) -> contextlib.AbstractAsyncContextManager[Subscription]:
        queue = self.queue if durable else None
        options = {"dead_letters": self.dead, **options}
        return subscribe_to_events(through or self.rabbit, self.exchange, patterns, handle, queue, **options)

    async def letters(self, count: int) -> list[Any]:
        """All that are there, once there are `count`."""
        async with mq.channel(self.rabbit) as channel:
            queue = await channel.get_queue(self.dead)
            return await mq.take_messages(queue, count, within=15) + await mq.take_messages(queue, 100, within=0)


@pytest.fixture
def names(rabbit: mq.RabbitMQ) -> Names:
    return Names(rabbit)


class Handler:
    """Collects what it is given; `fails` says which events raise; `gate` holds them all."""

    def __init__(self, fails: Callable[[Event], bool] = lambda _: False) -> None:
        self.seen: list[Event] = []
        self.fails, self.gate = fails, asyncio.Event()
        self.running = self.most = 0
        self.gate.set()

    async def __call__(self, event: Event) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            self.seen.append(event)
            await self.gate.wait()
            if self.fails(event):
                raise RuntimeError(f"cannot {event.data}")
        finally:
            self.running -= 1

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.seen]

    def has(self, *data: Any) -> Callable[[], bool]:
        return lambda: {*data} <= {*self.data}


async def nothing(_: Event) -> None:
    pass


async def test_each_subscriber_gets_a_copy_of_what_fits_its_patterns_in_order(names: Names) -> None:
    one, other, both = Handler(), Handler(), Handler()
    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("feature.*", one),
        names.subscribe("#.created", other, durable=True),
        names.subscribe(["feature.*", "feature.created"], both),
    ):
        for number, type in enumerate(["feature.created", "feature.created.eu", "user.created", "feature.removed"]):
            with contextlib.suppress(Unrouted):
                await publish_event(publisher, type, number)
        await mq.until(lambda: (len(one.seen), len(other.seen), len(both.seen)) == (2, 2, 2))
    assert (one.data, other.data, both.data) == ([0, 3], [0, 2], [0, 3])
    assert [event.type for event in other.seen] == ["feature.created", "user.created"]


async def test_an_event_is_persistent_json_that_says_what_and_when_it_is(names: Names) -> None:
    async with mq.channel(names.rabbit) as channel, publishing(names.rabbit, names.exchange) as publisher:
        await channel.declare_exchange(names.exchange, "topic", durable=True)  # or it would raise
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(names.exchange, "#")
        ids = [
            await publish_event(publisher, "feature.created", {"name": "é"}),
            await publish_event(publisher, "x", [1]),
        ]
        first, second = await mq.take_messages(queue, 2)
    assert (json.loads(first.body), json.loads(second.body)) == ({"name": "é"}, [1])
    assert [first.message_id, second.message_id] == ids
    assert ids[0] != ids[1]
    assert (first.type, first.content_type, first.delivery_mode) == ("feature.created", "application/json", 2)
    assert first.timestamp is not None
    assert abs((datetime.now(UTC) - first.timestamp).total_seconds()) < 60


async def test_what_became_of_an_event_is_told_apart(names: Names) -> None:
    """Unrouted, refused, unknown, not sent: and each word is true, as the queue shows."""
    full = names.rabbit.name("full")
    async with (
        mq.proxy(names.rabbit) as network,
        mq.channel(names.rabbit) as channel,
        publishing(network, names.exchange) as publisher,
    ):
        limits: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        narrow = await channel.declare_queue(full, durable=True, arguments=limits)
        await narrow.bind(names.exchange, "full")
        wide = await channel.declare_queue(exclusive=True)
        await wide.bind(names.exchange, "wide")
        with pytest.raises(Unrouted, match="stored nowhere"):
            await publish_event(publisher, "nobody", 0)

        async def refused() -> bool:  # a full queue is noticed a little later
            try:
                await publish_event(publisher, "full", 0)
            except Refused:
                return True
            return False

        await mq.until(refused)
        with network.swallow("down"), pytest.raises(Unknown, match=r"no answer within 0\.3 s") as unknown:
            await publish_event(publisher, "wide", "answer lost", within=0.3)

        async def not_sent() -> bool:
            try:
                await publish_event(publisher, "wide", "nowhere", within=0.3)
            except NotSent as error:
                return "no connection within 0.3 s" in str(error)
            except Unknown:  # the loss is not noticed yet
                return False
            raise AssertionError("nothing gets through")

        with network.swallow("up", "down"):
            network.cut()
            await mq.until(not_sent, within=10)
        assert await publish_event(publisher, "wide", "again", id=unknown.value.id) == unknown.value.id
        copies = [(json.loads(message.body), message.message_id) for message in await mq.take_messages(wide, 9, 0.3)]
    assert copies == [("answer lost", unknown.value.id), ("again", unknown.value.id)], "what is unknown may be stored"


async def test_a_connection_that_ends_before_the_confirm_is_unknown_at_once(names: Names) -> None:
    async with mq.proxy(names.rabbit) as network, publishing(network, names.exchange) as publisher:

        async def cut() -> None:
            await mq.until(lambda: network.swallowed, every=0.005)
            network.cut()

        async with names.subscribe("#", handler := Handler()), asyncio.TaskGroup() as group:
            with network.swallow("up"):
                group.create_task(cut())
                with pytest.raises(Unknown, match="the connection was lost"):
                    await publish_event(publisher, "event", 0, within=30)
            await publish_event(publisher, "event", 1, within=30)
            await mq.until(handler.has(1))
    assert handler.data == [1]


async def test_many_events_take_one_connection(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    connect = Connection.connect

    async def counting(*arguments: Any, **options: Any) -> None:
        nonlocal made
        made += 1
        await connect(*arguments, **options)

    async with names.subscribe("#", nothing) as subscription:
        monkeypatch.setattr(Connection, "connect", counting)
        async with publishing(names.rabbit, names.exchange) as publisher:
            await asyncio.gather(*(publish_event(publisher, "event", number) for number in range(100)))
            await mq.until(lambda: subscription.handled == 100)
    assert made == 1


@pytest.mark.parametrize("type", ["", "feature.*", "#", "a" * 256, "é" * 128])
async def test_a_type_that_no_event_can_have_is_refused(names: Names, type: str) -> None:
    async with publishing(names.rabbit, names.exchange) as publisher:
        with pytest.raises(ValueError, match="joined by dots"):
            await publish_event(publisher, type, 0)


@pytest.mark.parametrize("data", [{1, 2}, float("nan"), b"bytes", {"when": datetime.now(UTC)}])
async def test_data_that_is_not_json_is_refused(names: Names, data: Any) -> None:
    async with publishing(names.rabbit, names.exchange) as publisher:
        with pytest.raises(TypeError, match="not JSON"):
            await publish_event(publisher, "event", data)


async def test_what_is_there_and_is_something_else_is_named(names: Names) -> None:
    async with mq.channel(names.rabbit) as channel:
        await channel.declare_exchange(names.exchange, "fanout", durable=True)
        await channel.declare_queue(names.queue, durable=True)
    with pytest.raises(
        mq.BrokerError, match=rf"exchange '{names.exchange}' is there, and is no durable topic exchange"
    ):
        async with publishing(names.rabbit, names.exchange):
            pytest.fail("it is a fanout exchange")
    with pytest.raises(mq.BrokerError, match=rf"queue '{names.queue}' is there"):
        async with names.subscribe("#", nothing, durable=True):
            pytest.fail("it is a classic queue")


@pytest.mark.parametrize(
    ("patterns", "options", "words"),
    [("", {}, "a pattern is words"), (["a", "x" * 256], {}, "a pattern is words"), ("#", {"attempts": 0}, "first one"),
     ("#", {"prefetch": 0}, "prefetch is at least 1")],
)  # fmt: skip
async def test_a_subscription_that_cannot_be_is_refused(names: Names, patterns: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        async with names.subscribe(patterns, nothing, **options):
            pytest.fail("it cannot be")


async def test_a_durable_subscription_gets_what_came_while_nobody_was_there(names: Names) -> None:
    handler = Handler()
    async with publishing(names.rabbit, names.exchange) as publisher:
        async with names.subscribe("#", handler, durable=True):
            await publish_event(publisher, "event", 0)
            await mq.until(handler.has(0))
        await publish_event(publisher, "event", 1)
        async with names.subscribe("#", handler, durable=True) as subscription:
            await mq.until(handler.has(1))
    assert handler.data == [0, 1]
    assert (subscription.handled, subscription.gaps) == (1, 0)
    assert not any(event.redelivered for event in handler.seen)


async def test_a_temporary_subscription_is_nobody_elses_and_ends_with_its_block(names: Names) -> None:
    async with publishing(names.rabbit, names.exchange) as publisher:
        async with names.subscribe("#", nothing) as subscription, mq.channel(names.rabbit) as channel:
            await publish_event(publisher, "event", 0)
            with pytest.raises(ChannelLockedResource):
                await channel.get_queue(subscription.queue.name)

        async def unrouted() -> bool:  # the queue goes with the connection, soon
            with contextlib.suppress(Unrouted):
                await publish_event(publisher, "event", 1)
                return False
            return True

        await mq.until(unrouted)


async def test_subscribers_with_the_same_queue_share_its_events(names: Names) -> None:
    one, other = Handler(), Handler()
    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", one, durable=True),
        names.subscribe("#", other, durable=True),
    ):
        for number in range(20):
            await publish_event(publisher, "event", number)
        await mq.until(lambda: len(one.seen) + len(other.seen) == 20)
    assert sorted(one.data + other.data) == list(range(20))
    assert one.data
    assert other.data


@pytest.mark.parametrize("prefetch", [1, 5])
async def test_only_so_many_handlers_run_at_once_and_the_rest_stays_for_others(names: Names, prefetch: int) -> None:
    handler = Handler()
    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", handler, durable=True, prefetch=prefetch),
    ):
        handler.gate.clear()
        for number in range(20):
            await publish_event(publisher, "event", number)
        await mq.until(lambda: handler.running == prefetch)
        async with mq.channel(names.rabbit) as channel:
            spare = await mq.take_messages(await channel.get_queue(names.queue), 20, within=0)
        assert [json.loads(message.body) for message in spare] == list(range(prefetch, 20))
        handler.gate.set()
    assert handler.most == prefetch
    assert sorted(handler.data) == list(range(prefetch))


async def test_a_failing_event_is_tried_so_often_and_then_a_dead_letter_with_its_reason(names: Names) -> None:
    """Two attempts mean two; the others go on; one that passes at its second attempt is handled."""
    tries = Counter[Any]()

    def fails(event: Event) -> bool:
        tries[event.data] += 1
        return event.data == "poison" or (event.data == "shaky" and tries["shaky"] == 1)

    handler = Handler(fails)
    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", handler, durable=True, attempts=2, backoff=0.01) as subscription,
    ):
        ids = [await publish_event(publisher, "event.new", data) for data in ("good", "poison", "shaky", "last")]
        await mq.until(lambda: subscription.handled == 3)
        [letter] = await names.letters(1)
    assert tries == {"good": 1, "poison": 2, "shaky": 2, "last": 1}
    assert str(subscription) == "handled 3, failed 3, unparsable 0, dead-lettered 1, gaps 0, reconnects 0"
    assert (letter.body, letter.message_id, letter.type) == (b'"poison"', ids[1], "event.new")
    assert (letter.routing_key, letter.delivery_mode) == ("event.new", 2)
    about = {name: value for name, value in letter.headers.items() if name.startswith("dead-letter-")}
    assert about == {
        "dead-letter-queue": names.queue, "dead-letter-attempts": 2, "dead-letter-error": "RuntimeError: cannot poison",
    }  # fmt: skip
    assert str(subscription.error) == "cannot poison"


@pytest.mark.parametrize("durable", [True, False])
async def test_a_body_that_is_no_json_is_a_dead_letter_at_once(names: Names, durable: bool) -> None:
    handler, bodies = Handler(), [b"\xff", b"", b"{", b"[" * 100_000]
    async with (
        mq.channel(names.rabbit) as channel,
        names.subscribe("#", handler, durable=durable, attempts=3) as subscription,
    ):
        exchange = await channel.get_exchange(names.exchange)
        for body in [*bodies, b"1"]:
            await exchange.publish(Message(body), "event")
        await mq.until(handler.has(1))
        letters = await names.letters(4)
    assert [letter.body for letter in letters] == bodies
    assert handler.data == [1]
    assert (subscription.unparsable, subscription.dead_lettered, subscription.failed) == (4, 4, 0)
    assert {letter.headers["dead-letter-attempts"] for letter in letters} == {0}


async def test_a_foreign_event_without_properties_is_handled(names: Names) -> None:
    handler = Handler()
    async with mq.channel(names.rabbit) as channel, names.subscribe("#", handler):
        exchange = await channel.get_exchange(names.exchange)
        await exchange.publish(Message(b"{}", headers={"trace": "t1"}), "foreign")
        await mq.until(lambda: handler.seen)
    [event] = handler.seen
    assert (event.type, event.data, event.time, event.headers["trace"]) == ("foreign", {}, None, "t1")


async def test_a_handler_that_is_not_async_works_and_one_that_is_cancelled_within_has_failed(names: Names) -> None:
    """A cancellation of the handler's own making must not leave the event, and the place it takes, for ever."""
    plain, tries = list[Any](), list[Any]()

    async def cancelled(event: Event) -> None:
        tries.append(event.data)
        if event.data == 0:
            lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            lost.cancel()
            await lost

    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", lambda event: plain.append(event.data)),
        names.subscribe("#", cancelled, durable=True) as subscription,
    ):
        for number in range(2):
            await publish_event(publisher, "event", number)
        await mq.until(lambda: (len(plain), subscription.handled) == (2, 1))
        assert len(await names.letters(1)) == 1
    assert (plain, tries) == ([0, 1], [0, 1])


async def test_a_long_error_still_makes_a_dead_letter(names: Names) -> None:
    """The headers of a message must fit into one frame, 128 kB."""

    async def handle(event: Event) -> None:
        raise ValueError("x" * 200_000)

    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", handle, durable=True) as subscription,
    ):
        await publish_event(publisher, "event", 0)
        [letter] = await names.letters(1)
        assert subscription.reconnects == 0
    assert len(letter.headers["dead-letter-error"]) == 1000


async def test_a_dead_letter_waits_while_its_queue_is_gone(names: Names) -> None:
    """Nobody takes it: the broker keeps it in the subscription's queue until there is one again."""
    handler = Handler(lambda event: event.data == 0)
    async with publishing(names.rabbit, names.exchange) as publisher, mq.channel(names.rabbit) as channel:
        async with names.subscribe("#", handler, durable=True) as subscription:
            await channel.queue_delete(names.dead)
            await publish_event(publisher, "event", 0)
            await publish_event(publisher, "event", 1)
            await mq.until(lambda: (subscription.handled, subscription.dead_lettered) == (1, 1))
        async with names.subscribe("#", handler, durable=True):  # it declares the queue again
            [letter] = await names.letters(1)
    assert letter.body == b"0"


async def test_an_event_that_kills_its_subscriber_each_time_ends_as_a_dead_letter(names: Names) -> None:
    arguments = {"x-delivery-limit": 1}
    async with publishing(names.rabbit, names.exchange) as publisher:
        async with names.subscribe("#", nothing, durable=True, arguments=arguments):
            pass
        await publish_event(publisher, "event", "deadly")
        for _ in range(2):
            async with mq.worker(dies, names.rabbit, names.exchange, names.queue, names.dead, arguments) as worker:
                await worker.ended(within=30)
            assert worker.crashed
        [letter] = await names.letters(1)
        assert letter.body == b'"deadly"'
        async with names.subscribe("#", handler := Handler(), durable=True, arguments=arguments):
            await publish_event(publisher, "event", "harmless")
            await mq.until(handler.has("harmless"))
    assert handler.data == ["harmless"]


async def dies(rabbit: Any, exchange: str, queue: str, dead: str, arguments: Any) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.pubsub import subscribe_to_events

    options = {"queue": queue, "dead_letters": dead, "arguments": arguments}
    async with subscribe_to_events(rabbit, exchange, "#", lambda event: mqlib.crash(), **options):
        await asyncio.sleep(60)


async def test_a_subscriber_that_is_killed_loses_nothing(names: Names, tmp_path: Path) -> None:
    """SIGKILL between effect and acknowledgement: the next one repeats that event, marked, and skips none."""
    ledger, handler = mq.Ledger(), Handler()
    async with publishing(names.rabbit, names.exchange) as publisher:
        arguments = (names.rabbit, names.exchange, names.queue, names.dead, str(tmp_path / "journal"))
        async with mq.worker(dies_at_five, *arguments) as worker:
            await worker.printed("subscribed", within=30)
            for number in range(10):
                ledger.sent(number)
                await publish_event(publisher, "event", number)
                ledger.acknowledged(number)
            await worker.ended(within=30)
        assert worker.crashed
        ledger.replay(tmp_path / "journal")
        async with names.subscribe("#", handler, durable=True):
            await mq.until(handler.has(9))
    for number in handler.data:
        ledger.received(number)
    assert handler.data == [5, 6, 7, 8, 9]
    assert [event.redelivered for event in handler.seen] == [True] + [False] * 4
    assert (ledger.lost, ledger.duplicated) == (0, 1)


async def dies_at_five(rabbit: Any, exchange: str, queue: str, dead: str, path: str) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns.pubsub import subscribe_to_events

    journal = mqlib.Journal(path)

    async def handle(event: Any) -> None:
        await asyncio.sleep(0.01)  # a handler that is not awaited would be overtaken by the acknowledgement
        journal.received(event.data)
        if event.data == 5:
            mqlib.crash()

    async with subscribe_to_events(rabbit, exchange, "#", handle, queue, dead_letters=dead):
        print("subscribed")
        await asyncio.sleep(60)


async def test_at_the_end_a_running_handler_may_finish_and_one_that_takes_too_long_comes_again(names: Names) -> None:
    started, slow = asyncio.Event(), asyncio.Event()
    done = list[Any]()

    async def handle(event: Event) -> None:
        started.set()
        await asyncio.wait_for(slow.wait(), 30)
        done.append((event.data, event.redelivered))

    async with publishing(names.rabbit, names.exchange) as publisher:
        async with names.subscribe("#", handle, durable=True, drain=0.05):
            await publish_event(publisher, "event", 0)
            await started.wait()
            later = asyncio.get_running_loop().call_later(2, slow.set)
        later.cancel()
        assert done == [], "it was cancelled"
        started.clear()
        async with names.subscribe("#", handle, durable=True, drain=20):
            await started.wait()
            asyncio.get_running_loop().call_later(0.05, slow.set)
        assert done == [(0, True)]
        async with names.subscribe("#", handler := Handler(), durable=True):
            await publish_event(publisher, "event", 1)
            await mq.until(handler.has(1))
    assert handler.data == [1], "what finished in time was acknowledged"


async def test_a_temporary_queue_that_is_made_again_is_a_gap_and_a_durable_one_is_not(names: Names) -> None:
    temporary, durable = Handler(), Handler()
    async with (
        mq.proxy(names.rabbit) as network,
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("#", temporary, through=network) as one,
        names.subscribe("#", durable, durable=True, through=network) as other,
    ):
        await publish_event(publisher, "event", 0)
        await mq.until(lambda: temporary.data == durable.data == [0])
        with network.swallow("up", "down"):
            network.cut()
            await publish_event(publisher, "event", 1)
        await mq.until(lambda: one.reconnects == other.reconnects == 1, within=20)
        await publish_event(publisher, "event", 2)
        await mq.until(lambda: temporary.has(2)() and durable.has(2)())
    assert (temporary.data, durable.data) == ([0, 2], [0, 1, 2])
    assert (one.gaps, other.gaps) == (1, 0)


async def test_a_durable_queue_that_somebody_deletes_is_a_gap_too(names: Names) -> None:
    handler = Handler()
    async with (
        publishing(names.rabbit, names.exchange) as publisher,
        mq.channel(names.rabbit) as channel,
        names.subscribe("#", handler, durable=True) as subscription,
    ):
        await channel.queue_delete(names.queue)
        await mq.until(lambda: subscription.gaps == 1)
        await publish_event(publisher, "event", 1)
        await mq.until(handler.has(1))


async def test_bindings_change_at_run_time_and_outlive_a_connection(names: Names) -> None:
    handler = Handler()
    async with (
        mq.proxy(names.rabbit) as network,
        publishing(names.rabbit, names.exchange) as publisher,
        names.subscribe("always", handler, through=network) as subscription,
    ):

        async def publish_all(turn: int) -> None:
            for type in ("other", "always"):
                with contextlib.suppress(Unrouted):
                    await publish_event(publisher, type, f"{type} {turn}")
            await mq.until(handler.has(f"always {turn}"))

        await publish_all(0)
        await subscription.bind("other")
        await publish_all(1)
        network.cut()
        await mq.until(lambda: subscription.gaps == 1)
        await publish_all(2)
        await subscription.unbind("other")
        await publish_all(3)
        network.cut()
        await mq.until(lambda: subscription.gaps == 2)
        await publish_all(4)
    assert [data for data in handler.data if "other" in data] == ["other 1", "other 2"]


async def test_ten_thousand_events_through_a_network_that_is_cut(names: Names) -> None:
    """The publisher repeats what is unknown, with the same id: none is lost, and every second copy can be told."""
    ledger, ids, left = mq.Ledger(), Counter[str | None](), iter(range(10_000))

    async def handle(event: Event) -> None:
        ledger.received(event.data)
        ids[event.id] += 1

    def exceeds(share: int) -> bool:
        return len(ids) > share

    async def publish(publisher: Any) -> None:
        for number in left:
            ledger.sent(number)
            id = f"{names.exchange}-{number}"
            while True:
                try:
                    await publish_event(publisher, "event", number, id=id, within=20)
                    break
                except (Unknown, NotSent):
                    pass
            ledger.acknowledged(number)

    async with (
        mq.proxy(names.rabbit) as network,
        publishing(network, names.exchange) as publisher,
        names.subscribe("#", handle, durable=True, through=network, prefetch=200) as subscription,
    ):
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(publish(publisher))
            for share in (2000, 5000, 8000):
                await mq.until(partial(exceeds, share), within=40)
                network.cut()
        await mq.until(lambda: len(ids) == 10_000, within=30)
    assert publisher.link.reconnects >= 3
    assert subscription.reconnects >= 3
    assert (ledger.lost, ledger.unexpected, ledger.unknown) == (0, 0, 0)
    assert sum(ids.values()) == 10_000 + ledger.duplicated
    assert subscription.dead_lettered == subscription.failed == subscription.gaps == 0


@contextlib.asynccontextmanager
async def alarm(rabbit: mq.RabbitMQ) -> AsyncIterator[None]:
    control = rabbit.nodes[0].control
    await asyncio.to_thread(control, "set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        await asyncio.to_thread(control, "set_vm_memory_high_watermark", "0.4")


async def test_both_sides_go_on_after_the_broker_was_killed_and_a_memory_alarm_is_unknown() -> None:
    """SIGKILL and restart: five events are handled by each, the reconnections are counted, and the temporary
    subscription says that it had a gap. Then an alarm: the event is unknown, and comes when it is over."""
    with mq.rabbitmq(private=True) as rabbit:
        names, temporary, durable = Names(rabbit), Handler(), Handler()
        async with (
            publishing(rabbit, names.exchange) as publisher,
            names.subscribe("#", temporary) as one,
            names.subscribe("#", durable, durable=True) as other,
        ):
            # RabbitMQ answers a declaration, and then writes it down, within a second: do not kill it sooner.
            await asyncio.sleep(2)
            durable.gate.clear()
            await publish_event(publisher, "event", "before")
            await mq.until(lambda: durable.running == 1)
            async with mq.killed(rabbit.nodes[0]):
                with pytest.raises(Unconfirmed):
                    await publish_event(publisher, "event", "while it is down", within=0.2)
            durable.gate.set()
            await mq.until(lambda: min(one.reconnects, other.reconnects) > 0, within=30)
            for number in range(5):
                await publish_event(publisher, "event", number, within=30)
            await mq.until(lambda: temporary.has(*range(5))() and durable.has(*range(5))(), within=20)
            assert publisher.link.reconnects >= 1
            assert (one.gaps, other.gaps) == (one.reconnects, 0)
            assert durable.data == ["before", "before", *range(5)], "what was not acknowledged comes again"
            assert durable.seen[1].redelivered
            async with alarm(rabbit):
                with pytest.raises(Unknown, match=r"blocked by broker \(low on memory\)"):
                    await publish_event(publisher, "event", "alarmed", within=1)
            await mq.until(lambda: temporary.has("alarmed")() and durable.has("alarmed")(), within=20)


async def test_nothing_is_left_behind(names: Names) -> None:
    async with publishing(names.rabbit, names.exchange) as publisher:
        tasks = asyncio.all_tasks()
        for durable in (True, False):
            async with names.subscribe("#", handler := Handler(), durable=durable):
                await publish_event(publisher, "event", 0)
                await mq.until(handler.has(0))
        await mq.until(lambda: asyncio.all_tasks() == tasks)
