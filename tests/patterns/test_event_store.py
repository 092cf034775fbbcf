"""Accounts whose state is their events: one writer at a time, none lost, none seen too early, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns.event_store import (
    FOREVER,
    Aggregate,
    Conflict,
    Event,
    Fenced,
    Model,
    NotAppended,
    StoreError,
    Unknown,
    as_of,
    parse,
    writer,
)
from mqlib.patterns.inbox import database
from mqlib.patterns.snapshots import TABLE, Snapshots
from tests.patterns import test_outbox as databases

engine, postgresql, sqlite, postgres = (
    databases.engine, databases.postgresql, databases.sqlite, databases.postgres
)  # fmt: skip
MANY = 50


def balance(state: int, event: Event) -> int:
    return state + {"deposited": 1, "withdrawn": -1}[event.type] * int(event.data)


ACCOUNTS = Model(0, balance)


@pytest.fixture
async def topic(kafka: mq.Kafka) -> str:
    return await mq.topic(kafka, "accounts", **FOREVER)


@pytest.fixture(scope="module")
def own() -> Iterator[mq.Kafka]:
    """A Kafka that may be cut off."""
    with mq.kafka(private=True) as broker:
        yield broker


async def filled(kafka: mq.Kafka, topic: str, count: int, snapshots: Snapshots | None = None) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as ann:
        for _ in range(count):
            await ann.append("ann", [("deposited", 1)])


async def test_a_state_is_the_fold_of_its_events_and_the_next_writer_has_it(kafka: mq.Kafka, topic: str) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS) as first:
        assert first.get("ann") == Aggregate(0, 0)
        await first.append("ann", [("deposited", 100), ("withdrawn", 30)])
        await first.append("bob", [("deposited", 5)], expected=0)
        token = await first.append("ann", [("withdrawn", 20)], expected=2)
        known = {name: first.get(name) for name in ("ann", "bob")}
    async with writer(kafka, topic, 0, ACCOUNTS) as second:
        assert {name: second.get(name) for name in ("ann", "bob")} == known
        assert second.replayed == 4
    assert known == {"ann": (50, 3), "bob": (5, 1)}
    records = await mq.read(kafka, topic, isolation_level="read_committed")
    events = [parse(record) for record in records]
    assert [(each.aggregate, each.version, each.type, each.data) for each in events] == [
        ("ann", 1, "deposited", 100), ("ann", 2, "withdrawn", 30), ("bob", 1, "deposited", 5),
        ("ann", 3, "withdrawn", 20),
    ]  # fmt: skip
    assert token == events[-1].token == (0, records[-1].offset + 1)
    assert events[-1].at == records[-1].timestamp


async def test_a_decision_on_an_old_version_is_refused_and_the_writer_goes_on(kafka: mq.Kafka, topic: str) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS) as accounts:
        await accounts.append("ann", [("deposited", 100)])
        withdrawals = [accounts.append("ann", [("withdrawn", 100)], expected=1) for _ in range(5)]
        results = await asyncio.gather(*withdrawals, return_exceptions=True)
        refused = [each for each in results if isinstance(each, Conflict)]
        assert len(refused) == 4
        assert "'ann' is at version 2, not 1" in str(refused[0])
        assert accounts.get("ann") == (0, 2)
        await accounts.append("ann", [("deposited", 1)], expected=2)
    assert len(await mq.read(kafka, topic, isolation_level="read_committed")) == 3


async def test_a_second_writer_ends_the_first_which_says_so(kafka: mq.Kafka, topic: str) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS) as old:
        await old.append("ann", [("deposited", 100)])
        async with writer(kafka, topic, 0, ACCOUNTS) as new:
            with pytest.raises(Fenced, match=f"{topic}-0: another writer has started; nothing was appended"):
                await old.append("ann", [("withdrawn", 100)], expected=1)
            with pytest.raises(NotAppended, match=r"this writer has ended .* open a new one"):
                await old.append("ann", [("withdrawn", 100)])
            assert old.get("ann") == (100, 1)
            await new.append("ann", [("withdrawn", 100)], expected=1)
    async with writer(kafka, topic, 0, ACCOUNTS) as reader:
        assert reader.get("ann") == (0, 2)


async def test_a_writer_that_is_fenced_leaves_no_complaint_of_asyncio(kafka: mq.Kafka, topic: str) -> None:
    """In a notebook it would be on stderr, in a cell that has nothing to do with it."""
    complaints = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with writer(kafka, topic, 0, ACCOUNTS) as old, writer(kafka, topic, 0, ACCOUNTS):
        with pytest.raises(Fenced):
            await old.append("ann", [("deposited", 1)])
    del old
    gc.collect()
    assert complaints == []


async def test_what_is_given_up_does_not_hold_readers_up(kafka: mq.Kafka, topic: str) -> None:
    """Its first record is in the log when the second is refused: the transaction is ended at once."""
    part = TopicPartition(topic, 0)
    async with writer(kafka, topic, 0, ACCOUNTS) as accounts:
        sending = accounts._producer.send

        async def send(*arguments: Any, **options: Any) -> Any:
            if dict(options["headers"])["aggregate-version"] == b"2":
                raise ValueError("refused")
            future = await sending(*arguments, **options)
            await future
            return future

        accounts._producer.send = send
        with pytest.raises(NotAppended, match="ValueError: refused; nothing was appended"):
            await accounts.append("ann", [("deposited", 1), ("deposited", 2)])
        async with mq.consumer(kafka, isolation_level="read_committed") as reader:
            reader.assign([part])
            stable = (await reader.end_offsets([part]))[part]
        assert [stable] == await mq.end_offsets(kafka, topic) != [0]


async def test_two_partitions_have_two_writers(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "accounts", 2, **FOREVER)
    names = [f"account-{number}" for number in range(20)]
    async with writer(kafka, topic, 0, ACCOUNTS) as zero, writer(kafka, topic, 1, ACCOUNTS) as one:
        owners = {}
        for name in names:
            with contextlib.suppress(ValueError):
                await zero.append(name, [("deposited", 1)])
                owners[name] = 0
                continue
            with pytest.raises(
                ValueError, match=f"'{name}' belongs to partition 1, and this is the writer of {topic}-0"
            ):
                zero.get(name)
            owners[name] = (await one.append(name, [("deposited", 1)])).partition
    assert {*owners.values()} == {0, 1}
    async with mq.producer(kafka) as producer:  # any other client puts a key into the same partition
        for name in names:
            assert (await producer.send_and_wait(topic, b"", key=name.encode())).partition == owners[name]


async def open_and_die(kafka: mq.Kafka, topic: str, when: str) -> None:
    import asyncio

    import mqlib
    from mqlib.patterns import event_store

    def apply(state: int, event: Any) -> int:
        return state + int(event.data)

    async with event_store.writer(kafka, topic, 0, event_store.Model(0, apply)) as accounts:
        await accounts.append("ann", [("deposited", 1)])
        producer = accounts._producer
        commit = producer.commit_transaction

        async def dies() -> None:
            mqlib.crash() if when == "before the commit" else None
            await commit()
            mqlib.crash()

        producer.commit_transaction = dies
        await accounts.append("ann", [("deposited", 10), ("deposited", 100)])
    await asyncio.sleep(0)


@pytest.mark.parametrize(("when", "left"), [("before the commit", (1, 1)), ("after the commit", (111, 3))])
async def test_an_append_is_whole_or_not_at_all_when_the_writer_is_killed(
    kafka: mq.Kafka, topic: str, when: str, left: tuple[int, int]
) -> None:
    """The next writer does not wait for a time-out: it ends what the dead one had begun."""
    async with mq.worker(open_and_die, kafka, topic, when) as process:
        await process.ended(within=40)
        assert process.crashed
    async with writer(kafka, topic, 0, ACCOUNTS) as accounts:
        assert accounts.get("ann") == left
        await accounts.append("ann", [("deposited", 1000)], expected=left[1])
        assert accounts.get("ann") == (left[0] + 1000, left[1] + 1)


async def test_without_an_answer_it_is_unknown_and_the_next_writer_knows(own: mq.Kafka) -> None:
    """The commit is stored; its answer is lost."""
    topic = await mq.topic(own, "accounts", **FOREVER)
    async with writer(own, topic, 0, ACCOUNTS, within=1.0) as accounts:
        await accounts.append("ann", [("deposited", 1)])
        commit = accounts._producer.commit_transaction

        async def no_answer() -> None:
            await commit()
            await asyncio.sleep(60)

        accounts._producer.commit_transaction = no_answer
        with pytest.raises(Unknown, match=r"no answer to the commit .*; open a new writer"):
            await accounts.append("ann", [("deposited", 10)])
        with pytest.raises(NotAppended, match="has ended"):
            await accounts.append("ann", [("deposited", 10)])
    async with writer(own, topic, 0, ACCOUNTS) as accounts:
        assert accounts.get("ann") == (11, 2)


async def test_a_broker_that_does_not_answer_is_an_error_in_time(own: mq.Kafka) -> None:
    topic = await mq.topic(own, "accounts", **FOREVER)
    async with writer(own, topic, 0, ACCOUNTS, within=1.0) as accounts, mq.paused(own.nodes[0]):
        with pytest.raises(NotAppended, match=f"{topic}-0: TimeoutError"):
            await accounts.append("ann", [("deposited", 1)])
    async with writer(own, topic, 0, ACCOUNTS) as accounts:
        assert accounts.get("ann") == (0, 0)


async def test_an_append_that_is_cancelled_ends_the_writer(kafka: mq.Kafka, topic: str) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS) as accounts:

        async def never() -> None:
            await asyncio.sleep(60)

        commit, accounts._producer.commit_transaction = accounts._producer.commit_transaction, never
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await accounts.append("ann", [("deposited", 1)])
        accounts._producer.commit_transaction = commit
        with pytest.raises(NotAppended, match="an append was interrupted"):
            await accounts.append("ann", [("deposited", 1)])


async def test_what_is_too_large_or_no_event_is_not_appended(kafka: mq.Kafka, topic: str) -> None:
    async with writer(kafka, topic, 0, ACCOUNTS) as accounts:
        bads: list[Any] = [[], [("deposited", {1})], [("deposited", float("nan"))]]
        for bad in bads:
            with pytest.raises((TypeError, ValueError)):
                await accounts.append("ann", bad)
        with pytest.raises(KeyError, match="vanished"):  # the model does not know it, and would fail at every start
            await accounts.append("ann", [("deposited", 1), ("vanished", 1)])
        with pytest.raises(ValueError, match="needs an aggregate"):
            await accounts.append("", [("deposited", 1)])
        await accounts.append("ann", [("deposited", 7)])
    async with writer(kafka, topic, 0, Model("", lambda state, event: str(event.data))) as texts:
        with pytest.raises(NotAppended, match="MessageSizeTooLarge"):
            await texts.append("ann", [("named", "x" * 2_000_000)])
    records = await mq.read(kafka, topic, isolation_level="read_committed")
    assert [json.loads(record.value) for record in records] == [7]


async def test_a_snapshot_spares_the_replay_and_gives_the_same(kafka: mq.Kafka, engine: sa.Engine, topic: str) -> None:
    snapshots = Snapshots(engine, every=40)
    await filled(kafka, topic, MANY, snapshots)
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as quick, writer(kafka, topic, 0, ACCOUNTS) as slow:
        assert (quick.replayed, slow.replayed) == (10, MANY)
        assert quick.get("ann") == slow.get("ann") == (MANY, MANY)
        assert quick.error is None


async def test_events_that_were_replayed_count_for_the_next_snapshot(
    kafka: mq.Kafka, sqlite: sa.Engine, topic: str
) -> None:
    """Else a writer that restarts often would never take one."""
    snapshots = Snapshots(sqlite, every=10)
    for _ in range(4):
        await filled(kafka, topic, 4, snapshots)
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as accounts:
        assert accounts.replayed == 16 - 10


async def test_a_snapshot_of_another_model_is_not_used(kafka: mq.Kafka, sqlite: sa.Engine, topic: str) -> None:
    snapshots = Snapshots(sqlite, every=10)
    await filled(kafka, topic, 25, snapshots)

    def count(state: list[int], event: Event) -> list[int]:
        return [state[0] + event.data, state[1] + 1]

    async with writer(kafka, topic, 0, Model([0, 0], count, version=2), snapshots) as other:
        assert (other.replayed, other.get("ann").state) == (25, [25, 25])
        await other.append("ann", [("deposited", 1)])
    async with writer(kafka, topic, 0, Model([0, 0], count, version=2), snapshots) as other:
        assert (other.replayed, other.get("ann").state) == (0, [26, 26])
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as old:
        assert (old.replayed, old.get("ann")) == (6, (26, 26))


def test_an_older_snapshot_does_not_replace_a_newer_one(engine: sa.Engine) -> None:
    snapshots, part = Snapshots(engine), TopicPartition("accounts", 0)
    assert snapshots.load(part, 1) == (0, {})
    snapshots.save(part, 1, 50, {"ann": Aggregate(5, 50)})
    snapshots.save(part, 1, 40, {"ann": Aggregate(4, 40)})
    snapshots.save(part, 2, 30, {})
    snapshots.save(TopicPartition("accounts", 1), 1, 60, {})
    assert snapshots.load(part, 1) == (50, {"ann": [5, 50]})
    snapshots.save(part, 1, 51, {"ann": Aggregate(6, 51)})
    assert snapshots.load(part, 1) == (51, {"ann": [6, 51]})
    with pytest.raises(ValueError, match="at least 1, and not 0"):
        Snapshots(engine, every=0)


async def test_a_snapshot_that_cannot_be_saved_harms_nothing(kafka: mq.Kafka, tmp_path: Path, topic: str) -> None:
    engine = database(f"sqlite:///{tmp_path}/gone.db")
    snapshots = Snapshots(engine, every=1)
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as accounts:
        with engine.begin() as connection:
            TABLE.drop(connection)
        await accounts.append("ann", [("deposited", 1)])
        assert "no such table" in str(accounts.error)
        Snapshots(engine)
        await accounts.append("ann", [("deposited", 1)])
        assert accounts.error is None
        assert snapshots.load(TopicPartition(topic, 0), 1)[1] == {"ann": [2, 2]}
    engine.dispose()


async def test_a_log_that_ends_before_its_snapshot_is_an_error(kafka: mq.Kafka, sqlite: sa.Engine, topic: str) -> None:
    snapshots = Snapshots(sqlite)
    snapshots.save(TopicPartition(topic, 0), 1, 99, {"ann": Aggregate(1, 1)})
    with pytest.raises(
        StoreError, match=f"{topic}-0 ends at 0, and its snapshot is of offset 99: .* delete the snapsh"
    ):
        async with writer(kafka, topic, 0, ACCOUNTS, snapshots):
            pass


async def test_events_that_are_deleted_are_an_error_unless_a_snapshot_has_them(
    kafka: mq.Kafka, sqlite: sa.Engine, topic: str
) -> None:
    snapshots = Snapshots(sqlite, every=10)
    await filled(kafka, topic, 10, snapshots)
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        part = TopicPartition(topic, 0)
        await admin.delete_records({part: RecordsToDelete(before_offset=5)})
    finally:
        await admin.close()
    with pytest.raises(StoreError, match="the events from offset 0 to 5 are deleted; see FOREVER"):
        async with writer(kafka, topic, 0, ACCOUNTS):
            pass
    with pytest.raises(StoreError, match="are deleted"):
        await as_of(kafka, topic, ACCOUNTS, 0)
    async with writer(kafka, topic, 0, ACCOUNTS, snapshots) as accounts:
        assert accounts.get("ann") == (10, 10)


async def test_the_past_is_a_fold_up_to_a_time(kafka: mq.Kafka) -> None:
    """Each second an event, in two partitions; the times are the producer's own."""
    topic = await mq.topic(kafka, "accounts", 2, **FOREVER)
    async with mq.producer(kafka) as producer:
        for second in range(1, 11):
            name, version = ("ann", "bob")[second % 2], (second + 1) // 2
            headers = [("event-type", b"deposited"), ("aggregate-version", b"%d" % version)]
            await producer.send_and_wait(
                topic, b"%d" % second, name.encode(), second % 2, timestamp_ms=1000 * second, headers=headers
            )
    assert await as_of(kafka, topic, ACCOUNTS, 999) == {}
    assert await as_of(kafka, topic, ACCOUNTS, 1000) == {"bob": (1, 1)}
    assert await as_of(kafka, topic, ACCOUNTS, 6999) == {"bob": (1 + 3 + 5, 3), "ann": (2 + 4 + 6, 3)}
    assert await as_of(kafka, topic, ACCOUNTS, 10_000) == {"bob": (25, 5), "ann": (30, 5)}
    assert await as_of(kafka, topic, ACCOUNTS, 2**41) == {"bob": (25, 5), "ann": (30, 5)}


async def test_what_is_not_committed_is_not_in_the_past(kafka: mq.Kafka, topic: str) -> None:
    await filled(kafka, topic, 3)
    async with mq.producer(kafka, transactional_id=kafka.name("other")) as other:
        await other.begin_transaction()
        await other.send_and_wait(topic, b"1", b"ann")
        assert await as_of(kafka, topic, ACCOUNTS, 2**41) == {"ann": (3, 3)}
        await other.abort_transaction()
    assert await as_of(kafka, topic, ACCOUNTS, 2**41) == {"ann": (3, 3)}


async def test_the_past_does_not_wait_for_what_is_not_committed(kafka: mq.Kafka, topic: str) -> None:
    """The first later record is in a transaction that is open: nobody may read up to it."""

    async def deposit(producer: Any, second: int) -> None:
        headers = [("event-type", b"deposited"), ("aggregate-version", b"%d" % second)]
        await producer.send_and_wait(topic, b"1", b"ann", timestamp_ms=1000 * second, headers=headers)

    async with mq.producer(kafka, transactional_id=kafka.name("other")) as other:
        async with other.transaction():
            await deposit(other, 1)
        await other.begin_transaction()
        for second in (2, 3):
            await deposit(other, second)
        assert await as_of(kafka, topic, ACCOUNTS, 2500, within=15) == {"ann": (1, 1)}
        await other.abort_transaction()


@pytest.mark.parametrize(
    ("key", "value", "headers", "words"),
    [
        (b"ann", b"1", [], "is no event of this store"),
        (None, b"1", [("event-type", b"deposited"), ("aggregate-version", b"3")], "is no event of this store"),
        (b"ann", b"{", [("event-type", b"deposited"), ("aggregate-version", b"3")], "is no event of this store"),
        (b"ann", None, [("event-type", b"deposited"), ("aggregate-version", b"3")], "is no event of this store"),
        (b"ann", b"1", [("event-type", b"deposited"), ("aggregate-version", b"2")], "version 2 of 'ann' follows vers"),
        (b"ann", b"1", [("event-type", b"deposited"), ("aggregate-version", b"4")], "version 4 of 'ann' follows vers"),
    ],
)  # fmt: skip
async def test_what_others_wrote_into_the_log_is_an_error_that_says_where(
    kafka: mq.Kafka, topic: str, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], words: str
) -> None:
    await filled(kafka, topic, 2)
    async with mq.producer(kafka) as producer:
        at = (await producer.send_and_wait(topic, value, key, headers=headers)).offset
    with pytest.raises(StoreError, match=rf"offset {at}.*{words}"):
        async with writer(kafka, topic, 0, ACCOUNTS):
            pass


async def test_a_topic_or_a_partition_that_is_not_there(kafka: mq.Kafka, topic: str) -> None:
    with pytest.raises(BrokerError, match="Kafka has no topic"):
        async with writer(kafka, kafka.name("missing"), 0, ACCOUNTS):
            pass
    with pytest.raises(ValueError, match=rf"{topic} has the partitions \[0\], and not 3"):
        async with writer(kafka, topic, 3, ACCOUNTS):
            pass


async def test_a_state_that_is_changed_in_place_does_not_leak_into_others(kafka: mq.Kafka, topic: str) -> None:
    def careless(state: list[int], event: Event) -> list[int]:
        state.append(event.data)
        return state

    async with writer(kafka, topic, 0, Model([], careless)) as lists:
        lists.get("ann").state.append(99)
        assert lists.get("bob").state == []
        assert lists.get("ann").state == []
