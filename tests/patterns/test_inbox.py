"""A message has its effect once: copies, failures, crashes, several at once; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import ConsumerRecord

import mqlib as mq
from mqlib.patterns import inbox
from mqlib.patterns.consumer import Policy, consume
from mqlib.patterns.inbox import once, once_each
from tests.patterns import test_outbox as databases

engine, postgresql, sqlite, postgres = (
    databases.engine, databases.postgresql, databases.sqlite, databases.postgres
)  # fmt: skip
EFFECTS = databases.EFFECTS
QUICK: dict[str, Any] = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}


def effect(connection: sa.Connection, record: ConsumerRecord) -> None:
    connection.execute(sa.insert(EFFECTS), {"number": int(record.value)})


def effects(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(EFFECTS.c.number)))


async def delivered(kafka: mq.Kafka, numbers: Sequence[int]) -> str:
    """A topic with these messages; the same number is the same message."""
    topic = await mq.topic(kafka, "deliveries")
    async with mq.producer(kafka) as producer:
        for number in numbers:
            await producer.send(topic, b"%d" % number, headers=[("message-id", b"id-%d" % number)])
    return topic


async def test_an_id_is_new_once_for_each_consumer(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert [once(connection, id) for id in ("a", "b", "a")] == [True, True, False]
        assert once(connection, "a", consumer="other")
        assert once_each(connection, ["a", "c", "d", "c"]) == {"c", "d"}
        assert once_each(connection, []) == set()


async def test_an_id_goes_with_its_transaction(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert once(connection, "a")
        connection.rollback()
        assert once(connection, "a")
        connection.commit()
    with engine.begin() as connection:
        assert not once(connection, "a")


@pytest.mark.parametrize("commits", [True, False])
async def test_another_transaction_has_the_id_and_is_waited_for(engine: sa.Engine, commits: bool) -> None:
    """Whether it is new is not known before the other one has ended."""
    asking = threading.Event()

    def other() -> bool:
        asking.set()
        with engine.begin() as connection:
            return once(connection, "a")

    with engine.connect() as connection:
        assert once(connection, "a")
        answer = asyncio.ensure_future(asyncio.to_thread(other))
        await mq.until(asking.is_set)
        done, _ = await asyncio.wait([answer], timeout=0.2)
        assert not done
        connection.commit() if commits else connection.rollback()
    assert await answer is not commits


async def test_two_consumers_at_once_do_each_of_2000_once(kafka: mq.Kafka, engine: sa.Engine) -> None:
    """They take the same records, in batches in which the ids overlap; the second in the opposite order."""
    topic = await delivered(kafka, range(2000))
    records = await mq.read(kafka, topic)
    batches = [records[at : at + 100] for at in range(0, 2000, 50)]

    async def work(batches: Sequence[Sequence[ConsumerRecord]]) -> int:
        return sum([await inbox.apply(engine, effect, batch) for batch in batches])

    new = await asyncio.gather(work(batches), work([batch[::-1] for batch in batches]))
    assert sum(new) == 2000
    assert sorted(effects(engine)) == list(range(2000))


async def test_copies_in_one_batch_and_their_order(kafka: mq.Kafka, engine: sa.Engine) -> None:
    records = await mq.read(kafka, await delivered(kafka, [3, 1, 3, 2, 1]))
    assert await inbox.apply(engine, effect, records) == 3
    assert effects(engine) == [3, 1, 2]
    assert await inbox.apply(engine, effect, records) == 0
    assert await inbox.apply(engine, effect, records, consumer="other") == 3


async def test_an_effect_that_raises_has_not_happened_and_may_come_again(kafka: mq.Kafka, engine: sa.Engine) -> None:
    records = await mq.read(kafka, await delivered(kafka, [1, 2, 3]))

    def fails(connection: sa.Connection, record: ConsumerRecord) -> None:
        effect(connection, record)
        if record.value == b"2":
            raise ConnectionError("in the middle")

    with pytest.raises(ConnectionError, match="in the middle"):
        await inbox.apply(engine, fails, records)
    assert effects(engine) == []
    assert await inbox.apply(engine, effect, records) == 3


async def test_with_consume_a_poison_message_is_dead_lettered_and_the_others_are_done_once(
    kafka: mq.Kafka, engine: sa.Engine
) -> None:
    topic, dead = await delivered(kafka, [*range(20), *range(20)]), await mq.topic(kafka, "dead")

    def poison(connection: sa.Connection, record: ConsumerRecord) -> None:
        effect(connection, record)
        if record.value == b"5":
            raise ValueError("poison")

    async def handle(record: ConsumerRecord) -> None:
        await inbox.apply(engine, poison, [record], "billing")

    policy = Policy(attempts=2, backoff=0.01, dead_letters=dead)
    async with consume(kafka, [topic], kafka.name("billing"), handle, policy) as work:
        await mq.until(lambda: work.report.handled + work.report.dead_lettered == 40, within=30)
    assert effects(engine) == [number for number in range(20) if number != 5]
    assert [letter.value for letter in await mq.read(kafka, dead)] == [b"5", b"5"]


async def consumer_process(kafka: Any, url: str, topic: str, group: str, crash_at: int) -> None:
    """Dies by SIGKILL in the middle of the transaction of `crash_at`; of the next one, after its commit."""
    import sqlalchemy as sa

    import mqlib
    from mqlib.patterns import inbox, outbox
    from mqlib.patterns.consumer import Policy, consume

    def effect(connection: sa.Connection, record: Any) -> None:
        connection.execute(sa.text("INSERT INTO effects VALUES (:number)"), {"number": int(record.value)})
        mqlib.crash() if int(record.value) == crash_at else None

    engine = outbox.database(url)

    async def handle(record: Any) -> None:
        await inbox.apply(engine, effect, [record], "billing")
        mqlib.crash() if int(record.value) == -crash_at else None

    options = {"session_timeout_ms": 1000, "heartbeat_interval_ms": 200}
    async with consume(kafka, [topic], group, handle, Policy(commit_every=0.05), **options) as work:
        await mqlib.until(lambda: set(work.report.committed.values()) == {60}, within=30)


async def test_killed_in_the_transaction_and_after_it(kafka: mq.Kafka, engine: sa.Engine) -> None:
    topic, group = await delivered(kafka, range(60)), kafka.name("killed")
    for crash_at in (20, -40, 1000):
        async with mq.worker(consumer_process, kafka, databases.url_of(engine), topic, group, crash_at) as process:
            await process.ended(within=40)
            assert process.crashed == (crash_at < 1000)
        done = effects(engine)
        assert done == list(range({20: 20, -40: 41}.get(crash_at, 60))), crash_at


async def test_a_record_without_an_id_is_an_error_that_names_it(kafka: mq.Kafka, sqlite: sa.Engine) -> None:
    topic = await mq.topic(kafka, "anonymous")
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait(topic, b"1")
    with pytest.raises(ValueError, match=rf"at {topic}-0, offset 0 has no header 'message-id'"):
        await inbox.apply(sqlite, effect, await mq.read(kafka, topic))
    assert effects(sqlite) == []


async def test_old_ids_are_forgotten_and_then_a_copy_has_its_effect_again(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 1000.0
    monkeypatch.setattr(inbox, "time", SimpleNamespace(time=lambda: clock))
    with engine.begin() as connection:
        once(connection, "old")
        clock = 1060
        once(connection, "young")
        clock = 1100
        assert inbox.forget(connection, older_than=100) == 0
        assert inbox.forget(connection, older_than=99) == 1
        assert (once(connection, "young"), once(connection, "old")) == (False, True)


async def test_a_table_of_ones_own(sqlite: sa.Engine) -> None:
    mine = sa.MetaData()
    box = inbox.table(mine, "seen")
    mine.create_all(sqlite)
    with sqlite.begin() as connection:
        mark = partial(once, connection, "a")
        assert [mark(), mark(box=box), mark(box=box), mark()] == [True, True, False, False]
        assert inbox.forget(connection, older_than=-1, box=box) == 1
