"""A read model has each event once, whoever dies; a query can wait for a write; a new model takes over at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns.event_store import Model, Token, writer
from mqlib.patterns.projection import (
    POSITIONS,
    Behind,
    NotYet,
    ProjectionFailed,
    create_tables,
    forget,
    positions,
    project,
    reached,
    switch,
)
from tests.patterns import test_outbox as databases

engine, postgresql, sqlite, postgres = (
    databases.engine, databases.postgresql, databases.sqlite, databases.postgres
)  # fmt: skip
TABLES = sa.MetaData()
BALANCES, SECOND = (
    sa.Table(name, TABLES, sa.Column("name", sa.String, primary_key=True), sa.Column("amount", sa.Integer))
    for name in ("balances_v1", "balances_v2")
)


def adds(table: sa.Table, factor: int = 1) -> Any:
    """Not idempotent: an event that is applied twice is seen."""

    def apply(connection: sa.Connection, record: ConsumerRecord) -> None:
        name, amount = record.key.decode(), factor * int(record.value)
        changed = sa.update(table).where(table.c.name == name).values(amount=table.c.amount + amount)
        if not connection.execute(changed).rowcount:
            connection.execute(sa.insert(table).values(name=name, amount=amount))

    return apply


def model(engine: sa.Engine, table: str = "balances_v1") -> dict[str, int]:
    with engine.connect().execution_options(sqlite_begin="DEFERRED") as connection:
        rows = connection.exec_driver_sql(f"SELECT name, amount FROM {table}")
        return {row.name: row.amount for row in rows}


async def filled(kafka: mq.Kafka, count: int, partitions: int = 2, topic: str = "") -> tuple[str, list[Token]]:
    """`count` deposits of 1 by four customers, and the positions behind the last ones."""
    topic = topic or await mq.topic(kafka, "accounts", partitions)
    last = {}
    async with mq.producer(kafka) as producer:
        sent = [await producer.send(topic, b"1", b"customer %d" % (number % 4)) for number in range(count)]
        for record in await asyncio.gather(*sent):
            last[record.partition] = Token(record.partition, record.offset + 1)
    return topic, [*last.values()]


@pytest.fixture(autouse=True)
def tables(engine: sa.Engine) -> None:
    TABLES.create_all(engine)
    create_tables(engine)


async def test_the_read_model_is_the_fold_and_goes_on_where_it_ended(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, tokens = await filled(kafka, 100)
    for count in (100, 200):
        async with project(kafka, engine, topic, "v1", adds(BALANCES), batch=7) as projector:
            for token in tokens:
                await reached(engine, "v1", token, within=15)
        assert projector.applied == 100
        assert model(engine) == {f"customer {number}": count / 4 for number in range(4)}
        if count == 100:
            _, tokens = await filled(kafka, 100, topic=topic)
    with engine.connect() as connection:
        assert positions(connection, "v1") == {token.partition: token.next for token in tokens}


async def test_what_is_aborted_is_not_applied_and_marks_are_passed_by(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic = await mq.topic(kafka, "accounts")
    async with writer(kafka, topic, 0, Model(0, lambda state, event: state + event.data)) as accounts:
        for _ in range(3):
            token = await accounts.append("ann", [("deposited", 1)])
    async with project(kafka, engine, topic, "v1", adds(BALANCES)):
        await reached(engine, "v1", token, within=15)
        async with mq.producer(kafka, transactional_id=kafka.name("other")) as other:
            await other.begin_transaction()
            aborted = await other.send_and_wait(topic, b"1", b"ann")
            await other.abort_transaction()
        await reached(engine, "v1", (0, aborted.offset + 1), within=15)
    assert model(engine) == {"ann": 3}


async def dies(kafka: mq.Kafka, url: str, topic: str, at: int, when: str) -> None:
    """Ends by SIGKILL while it applies the n-th event, or right after that event's commit."""
    import asyncio

    import sqlalchemy as sa

    import mqlib
    from mqlib.patterns.inbox import database
    from mqlib.patterns.projection import project

    engine, seen = database(url), 0

    def apply(connection: Any, record: Any) -> None:
        nonlocal seen
        seen += 1
        connection.exec_driver_sql("INSERT INTO balances_v1 VALUES ('total', 0) ON CONFLICT DO NOTHING")
        connection.exec_driver_sql("UPDATE balances_v1 SET amount = amount + 1 WHERE name = 'total'")
        mqlib.crash() if seen == at and when == "within" else None

    def committed(connection: Any) -> None:
        mqlib.crash() if seen == at and when == "after" else None

    # The pool gets a connection back once its transaction is over.
    sa.event.listen(engine, "checkin", lambda *_: committed(None))
    async with project(kafka, engine, topic, "v1", apply, batch=1):
        await asyncio.Event().wait()


@pytest.mark.parametrize("when", ["within", "after"])
async def test_each_event_counts_once_when_the_projector_is_killed(
    kafka: mq.Kafka, engine: sa.Engine, when: str
) -> None:
    topic, tokens = await filled(kafka, 30, partitions=1)
    for at in (5, 9):
        arguments = (kafka, databases.url_of(engine), topic, at, when)
        async with mq.worker(dies, *arguments) as process:
            await process.ended(within=40)
            assert process.crashed
    assert model(engine) == {"total": 4 + 8 if when == "within" else 5 + 9}

    def count(connection: sa.Connection, record: ConsumerRecord) -> None:
        connection.execute(sa.update(BALANCES).values(amount=BALANCES.c.amount + 1))

    async with project(kafka, engine, topic, "v1", count):
        await reached(engine, "v1", tokens[0], within=15)
    assert model(engine) == {"total": 30}


async def test_two_projectors_of_one_name_apply_each_event_once(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, tokens = await filled(kafka, 200)
    async with (
        project(kafka, engine, topic, "v1", adds(BALANCES), batch=5) as one,
        project(kafka, engine, topic, "v1", adds(BALANCES), batch=3) as other,
    ):
        for token in tokens:
            await reached(engine, "v1", token, within=30)
        _, tokens = await filled(kafka, 200, topic=topic)
        for token in tokens:
            await reached(engine, "v1", token, within=30)
        await mq.until(lambda: one.yielded + other.yielded > 0, within=30)  # whoever was behind has noticed
    assert sum(model(engine).values()) == one.applied + other.applied == 400


async def test_a_read_waits_for_its_write_or_says_that_it_is_not_there_yet(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, [token] = await filled(kafka, 1, partitions=1)
    with pytest.raises(NotYet, match=r"'v1' is at 0 of partition 0, and not at 1 after 0.1 s: what was written is in"):
        await reached(engine, "v1", token, within=0.1)
    gate = threading.Event()

    def apply(connection: sa.Connection, record: ConsumerRecord) -> None:
        assert gate.wait(30)
        adds(BALANCES)(connection, record)

    async with project(kafka, engine, topic, "v1", apply), asyncio.TaskGroup() as group:
        reading = group.create_task(reached(engine, "v1", token, within=30))
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done
        assert model(engine) == {}
        gate.set()
        await reading
        assert model(engine) == {"customer 0": 1}


async def test_a_new_model_takes_over_when_it_has_caught_up_and_no_query_sees_less(
    kafka: mq.Kafka, engine: sa.Engine
) -> None:
    topic, tokens = await filled(kafka, 100)
    seen, stop = list[int](), threading.Event()

    def query() -> None:
        while not stop.is_set():
            with engine.connect().execution_options(sqlite_begin="DEFERRED") as connection:
                seen.append(connection.exec_driver_sql("SELECT sum(abs(amount)) FROM balances").scalar_one())

    async with project(kafka, engine, topic, "v1", adds(BALANCES)):
        for token in tokens:
            await reached(engine, "v1", token, within=15)
        with engine.begin() as connection:
            switch(connection, "balances", "v1", "balances_v1")
        words = r"'v2' is at 0 of partition ., and 'balances' shows \d+: not switched"
        with pytest.raises(Behind, match=words), engine.begin() as connection:
            switch(connection, "balances", "v2", "balances_v2")
        assert model(engine, "balances") == model(engine)
        asking = asyncio.gather(asyncio.to_thread(query))
        try:
            async with project(kafka, engine, topic, "v2", adds(SECOND, -1)):
                for token in tokens:
                    await reached(engine, "v2", token, within=15)
                with engine.begin() as connection:
                    switch(connection, "balances", "v2", "balances_v2")
                await mq.until(lambda: len(seen) > 3)
                _, tokens = await filled(kafka, 4, topic=topic)
                for token in tokens:
                    await reached(engine, "balances", token, within=15)
        finally:
            stop.set()
            await asking
    assert min(seen) == 100
    assert model(engine, "balances") == {f"customer {number}": -26 for number in range(4)}
    assert sum(model(engine).values()) == 104  # the old one can take over again
    with engine.begin() as connection:
        switch(connection, "balances", "v1", "balances_v1")
    assert model(engine, "balances") == model(engine)


async def test_no_position_moves_while_a_view_is_switched(engine: sa.Engine) -> None:
    """Else the old model could have been seen further than the new one is."""

    def move() -> None:
        with engine.begin() as connection:
            connection.execute(sa.update(POSITIONS).where(POSITIONS.c.projection == "v1").values(next=6))

    rows = [{"projection": name, "partition": 0, "next": 5} for name in ("v1", "v2")]
    with engine.begin() as connection:
        connection.execute(sa.insert(POSITIONS), rows)
        switch(connection, "balances", "v1", "balances_v1")
    with engine.begin() as connection:
        switch(connection, "balances", "v2", "balances_v2")
        moving = asyncio.ensure_future(asyncio.to_thread(move))
        done, _ = await asyncio.wait([moving], timeout=0.3)
        assert not done
    await moving


async def test_waiting_by_the_views_name_waits_for_the_model_behind_it(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, [token] = await filled(kafka, 1, partitions=1)
    with engine.begin() as connection:
        switch(connection, "balances", "v2", "balances_v2")
    async with project(kafka, engine, topic, "v1", adds(BALANCES)):
        await reached(engine, "v1", token, within=15)
        with pytest.raises(NotYet, match="'balances' is at 0"):
            await reached(engine, "balances", token, within=0.1)
    with engine.begin() as connection:
        switch(connection, "balances", "v1", "balances_v1")
    await reached(engine, "balances", token, within=0.1)


async def test_a_rebuild_in_place_starts_from_the_beginning(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, tokens = await filled(kafka, 20)
    for _ in range(2):
        async with project(kafka, engine, topic, "v1", adds(BALANCES)):
            for token in tokens:
                await reached(engine, "v1", token, within=15)
        assert sum(model(engine).values()) == 20
        with engine.begin() as connection:
            forget(connection, "v1")
            connection.execute(sa.delete(BALANCES))


async def test_an_event_that_cannot_be_applied_is_an_error_that_says_where(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, _ = await filled(kafka, 5, partitions=1)
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, b"much", b"customer 1")

    async def work() -> None:
        async with project(kafka, engine, topic, "v1", adds(BALANCES), batch=1):
            await asyncio.Event().wait()

    with pytest.raises(ProjectionFailed, match=rf"v1: {topic}-0, offset 5: ValueError: invalid literal"):
        async with asyncio.timeout(30):
            await work()
    assert sum(model(engine).values()) == 5
    with engine.connect() as connection:
        assert positions(connection, "v1") == {0: 5}


async def test_events_that_are_deleted_before_they_were_applied_are_an_error(
    kafka: mq.Kafka, engine: sa.Engine
) -> None:
    """A consumer would go on at the first that is left, and the read model would be wrong for ever."""
    topic, _ = await filled(kafka, 10, partitions=1)
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=5)})
    finally:
        await admin.close()
    with pytest.raises(ProjectionFailed, match=f"v1: {topic} has no longer, or never had, what comes next"):
        async with asyncio.timeout(30), project(kafka, engine, topic, "v1", adds(BALANCES)):
            await asyncio.Event().wait()
    assert model(engine) == {}


async def test_a_topic_that_is_not_there(kafka: mq.Kafka, engine: sa.Engine) -> None:
    with pytest.raises(BrokerError, match="Kafka has no topic"):
        async with project(kafka, engine, kafka.name("missing"), "v1", adds(BALANCES)):
            pass
