"""The table is what the topic says, also across holes; and it says so when it cannot know."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns.provisioning import Topic, apply
from mqlib.patterns.state_table import (
    NotCompacted,
    NotReady,
    Stale,
    StateTable,
    TableError,
    Truncated,
    Unreadable,
    state_table,
)

DAY = 86_400_000
Update = tuple[bytes | None, bytes | None]


async def compacted(kafka: mq.Kafka, partitions: int = 1, **config: Any) -> str:
    return await mq.topic(kafka, "state", partitions, **{"cleanup_policy": "compact", **config})


async def write(
    kafka: mq.Kafka, topic: str, updates: Sequence[Update], days_ago: int = 0, partition: int | None = 0, **options: Any
) -> None:
    stamp = int(time.time() * 1000) - days_ago * DAY
    async with mq.producer(kafka, linger_ms=5, **options) as producer:
        for key, value in updates:
            await producer.send(topic, value, key, partition=partition, timestamp_ms=stamp)
        await producer.flush()


def puts(**values: Any) -> list[Update]:
    return [(key.encode(), None if value is None else json.dumps(value).encode()) for key, value in values.items()]


def texts(kafka: Any, topic: str, **options: Any) -> contextlib.AbstractAsyncContextManager[StateTable[str, Any]]:
    return state_table(kafka, topic, bytes.decode, json.loads, **options)


@contextlib.asynccontextmanager
async def table_of(kafka: mq.Kafka, topic: str, **options: Any) -> AsyncIterator[StateTable[str, Any]]:
    async with texts(kafka, topic, **options) as table:
        await table.ready(within=30)
        yield table


async def offsets(kafka: mq.Kafka, topic: str) -> list[int]:
    return [record.offset for record in await mq.read(kafka, topic)]


async def cleaned(kafka: mq.Kafka, topic: str, wanted: Callable[[list[int]], bool]) -> list[int]:
    async def left() -> list[int]:
        found = await offsets(kafka, topic)
        return found if wanted(found) else []

    return list(await mq.until(left, within=30))


async def stable_end(kafka: mq.Kafka, topic: str, wanted: int) -> bool:
    """Whether a reader of what is committed gets so far. (A marker is written after its producer has its answer.)"""
    part = TopicPartition(topic, 0)
    async with mq.consumer(kafka, isolation_level="read_committed") as consumer:
        return bool((await consumer.end_offsets([part]))[part] == wanted)


async def truncate(kafka: mq.Kafka, topic: str, before: int) -> None:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before)})
    await admin.close()


async def test_the_table_is_the_last_value_of_each_key_without_the_deleted(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka, partitions=3)
    updates = [(f"k{n % 13}", None if n % 7 == 0 else n) for n in range(90)]
    for part in range(3):
        await write(kafka, topic, [puts(**{key: value})[0] for key, value in updates if int(key[1:]) % 3 == part],
                    partition=part)  # fmt: skip
    expected = {key: value for key, value in dict(updates).items() if value is not None}
    async with table_of(kafka, topic) as table:
        assert dict(table) == expected
        assert len(table) == len(expected) < 13
        assert sum(table.as_of.values()) == 90
        assert table.get("k-none", "nothing") == "nothing"
        assert "k-none" not in table
        with pytest.raises(KeyError):
            table["k-none"]


async def test_an_empty_topic_is_an_empty_table_at_once(kafka: mq.Kafka) -> None:
    async with table_of(kafka, await compacted(kafka, partitions=2)) as table:
        assert dict(table) == {}
        assert table.as_of == {0: 0, 1: 0}


async def test_it_follows(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, puts(a=1, b=1))
    async with table_of(kafka, topic) as table, mq.producer(kafka) as producer:
        sent = await producer.send_and_wait(topic, b"2", b"a")
        await table.reached(sent.partition, sent.offset)
        assert dict(table) == {"a": 2, "b": 1}
        await producer.send_and_wait(topic, None, b"b")
        await table.refresh()
        assert dict(table) == {"a": 2}
        assert table.as_of == {0: 4}
        before = dict(table)
        await producer.send_and_wait(topic, b"3", b"a")
        await table.refresh()
        assert (before, dict(table)) == ({"a": 2}, {"a": 3})
    assert dict(table) == {"a": 3}, "what was read can be read when the block has ended"


async def test_half_a_table_cannot_be_read(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, puts(a=1, b=2))
    apply = StateTable._apply
    seen: list[str] = []

    def half(table: StateTable[str, Any], record: Any) -> None:
        for question in (lambda: table["a"], lambda: table.get("a"), lambda: len(table), lambda: [*table],
                         lambda: "a" in table):  # fmt: skip
            with pytest.raises(NotReady, match=r"await its ready\(\) first"):
                question()
            seen.append("refused")
        apply(table, record)

    monkeypatch.setattr(StateTable, "_apply", half)
    async with table_of(kafka, topic) as table:
        assert dict(table) == {"a": 1, "b": 2}
    assert len(seen) == 10


async def test_waiting_has_an_end_that_says_where_the_table_is(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, puts(a=1))
    async with table_of(kafka, topic) as table:
        with pytest.raises(TimeoutError, match=r"is at \{0: 1\}, not at \[8\], after 0.2 s"):
            await table.reached(0, 7, within=0.2)
        with pytest.raises(KeyError):
            await table.reached(1, 0, within=0.2)


async def test_aborted_and_open_transactions_are_not_seen_and_their_markers_do_not_hold_it_up(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    async with mq.producer(kafka, transactional_id=kafka.name("writer")) as producer:
        async with producer.transaction():
            await producer.send(topic, b"1", b"a")
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"2", b"a")
        await producer.send_and_wait(topic, b"2", b"b")
        await producer.abort_transaction()
        await mq.until(lambda: stable_end(kafka, topic, 5), within=30)
        async with table_of(kafka, topic) as table:
            assert (dict(table), table.as_of) == ({"a": 1}, {0: 5}), "a, marker, a, b, marker"
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"3", b"a")
            await table.refresh()
            assert (dict(table), table.as_of) == ({"a": 1}, {0: 5}), "not yet"
            await producer.commit_transaction()
            await mq.until(lambda: stable_end(kafka, topic, 7), within=30)
            await table.refresh()
            assert (dict(table), table.as_of) == ({"a": 3}, {0: 7})


async def test_holes_from_compaction_are_no_missing_records(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    for number in range(20):
        await write(kafka, topic, puts(a=number, b=number), days_ago=30)
    await write(kafka, topic, puts(b=None), days_ago=30)
    await write(kafka, topic, puts(c=1))
    assert await cleaned(kafka, topic, lambda left: len(left) == 3) == [38, 40, 41]
    async with table_of(kafka, topic) as table:
        assert (dict(table), table.as_of) == ({"a": 19, "c": 1}, {0: 42})


async def test_a_table_wants_a_topic_that_does_not_forget(kafka: mq.Kafka) -> None:
    for policy, words in (("delete", "is deleted; set it to compact"), ("compact,delete", "may_expire=True")):
        topic = await mq.topic(kafka, "state", cleanup_policy=policy, retention_ms=7 * DAY)
        with pytest.raises(NotCompacted, match=rf"cleanup.policy={policy}.*retention.ms \({7 * DAY}\).*{words}"):
            async with texts(kafka, topic):
                pass
    async with table_of(kafka, topic, may_expire=True) as table:
        assert dict(table) == {}
    with pytest.raises(NotCompacted):
        async with texts(kafka, await mq.topic(kafka, "state", cleanup_policy="delete"), may_expire=True):
            pass
    with pytest.raises(BrokerError, match="no topic 'nowhere'"):
        async with texts(kafka, "nowhere"):
            pass


async def test_a_topic_that_has_forgotten_gives_no_table_unless_that_is_meant(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka, cleanup_policy="compact,delete")
    await write(kafka, topic, puts(a=1, b=1, c=1))
    await truncate(kafka, topic, 2)
    async with table_of(kafka, topic, may_expire=True) as table:
        assert (dict(table), table.as_of) == ({"c": 1}, {0: 3})
    await apply(kafka, [Topic(topic, 1, configs={"cleanup.policy": "compact"})])
    with pytest.raises(Truncated, match=r"begins at \{0: 2\} .*and not at 0"):
        async with texts(kafka, topic):
            pass


async def test_records_that_were_deleted_before_they_were_read_end_the_table(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await compacted(kafka, cleanup_policy="compact,delete")
    await write(kafka, topic, puts(a=1, b=1, c=1))
    ends = AIOKafkaConsumer.end_offsets

    async def overtaken(self: AIOKafkaConsumer, parts: Any) -> Any:
        await truncate(kafka, topic, 2)  # it has asked where the topic begins, and not yet for the first record
        return await ends(self, parts)

    monkeypatch.setattr(AIOKafkaConsumer, "end_offsets", overtaken)
    with pytest.raises(Truncated, match="partition 0: offsets 0 to 1 were deleted unread; make the table anew"):
        async with texts(kafka, topic, may_expire=True) as table:
            await table.ready(within=30)
    for question in (lambda: table.get("c"), lambda: len(table)):
        with pytest.raises(TableError, match=r"has ended at .*deleted unread"):
            question()


async def test_a_topic_that_ends_before_what_was_read_was_made_anew(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await compacted(kafka)
    seek = AIOKafkaConsumer.seek
    monkeypatch.setattr(AIOKafkaConsumer, "seek", lambda self, part, _: seek(self, part, 9))
    with pytest.raises(Truncated, match="it ends before 9: made anew"):
        async with texts(kafka, topic) as table:
            await table.reached(0, 12, within=30)


async def test_what_cannot_be_decoded_is_set_aside_and_the_table_goes_on(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, puts(a=1, b=1, c=1))
    await write(kafka, topic, [(b"a", b"{"), (b"\xff", b"1"), (b"c", b"2")])
    async with table_of(kafka, topic) as table:
        assert dict(table) == {"b": 1, "c": 2}
        assert len(table) == 2
        assert {raw: aside.record.offset for raw, aside in table.aside.items()} == {b"a": 3, b"\xff": 4}
        for question in (lambda: table["a"], lambda: table.get("a"), lambda: "a" in table):
            with pytest.raises(Unreadable, match=r"'a' in .*: offset 3: JSONDecodeError"):
                question()
        await write(kafka, topic, [(b"a", b"3"), (b"b", b"{"), (b"\xff", None)])
        await table.refresh()
        assert dict(table) == {"a": 3, "c": 2}
        assert [*table.aside] == [b"b"]
        await write(kafka, topic, puts(b=None))
        await table.refresh()
        assert table.get("b") is None
        assert table.aside == {}


async def test_a_key_that_cannot_be_a_key_is_set_aside(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, [(b"[1]", b"1"), (b"2", b"2")])
    async with state_table(kafka, topic, json.loads, json.loads) as table:
        await table.ready(within=30)
        assert dict(table) == {2: 2}
        assert "unhashable" in table.aside[b"[1]"].why


async def test_two_spellings_of_a_key_are_one_key(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, [(b"A", b"{"), (b"a", b"2")])
    async with state_table(kafka, topic, lambda raw: raw.decode().lower(), json.loads) as table:
        await table.ready(within=30)
        assert (dict(table), table.aside) == ({"a": 2}, {})


async def test_records_without_a_key_from_before_it_was_compacted(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "state")
    await write(kafka, topic, [(None, b"1"), (b"a", b"{"), (b"b", b"2"), (b"a", b"3")])
    await apply(kafka, [Topic(topic, 1, configs={"cleanup.policy": "compact"})])
    async with table_of(kafka, topic) as table:
        assert dict(table) == {"a": 3, "b": 2}
        assert [*table.aside] == [None]
        assert table.aside[None].why == "offset 0: ValueError: it has no key"


async def test_a_key_in_two_partitions_has_no_last_value(kafka: mq.Kafka) -> None:
    """As two clients with different partitioners write it. Which one is later cannot be told when both are replayed."""
    topic = await compacted(kafka, partitions=2)
    await write(kafka, topic, puts(a=1, b=1), partition=0)
    async with table_of(kafka, topic) as table:
        await write(kafka, topic, puts(a=2, c=2), partition=1)
        await table.refresh()
        assert dict(table) == {"b": 1, "c": 2}
        with pytest.raises(Unreadable, match=r"'a' .* in partition 1, and in another one before"):
            table["a"]
        await write(kafka, topic, puts(a=3), partition=0)
        await table.refresh()
        assert "a" not in dict(table), "nor has it one later"
        await write(kafka, topic, puts(b=None), partition=1)
        await table.refresh()
        with pytest.raises(Unreadable):
            table["b"]


async def test_more_partitions_end_the_table(kafka: mq.Kafka) -> None:
    topic = await compacted(kafka)
    await write(kafka, topic, puts(a=1))

    async def heard(table: StateTable[str, Any]) -> None:
        await table._reading._client.force_metadata_update()
        len(table)

    async def grown() -> None:
        async with table_of(kafka, topic) as table:
            admin = AIOKafkaAdminClient(**kafka.client)
            await admin.start()
            await admin.create_partitions({topic: NewPartitions(2)})
            await admin.close()
            await mq.until(lambda: heard(table), within=30)

    with pytest.raises(TableError, match="has got more partitions"):
        await grown()


async def test_who_was_behind_for_longer_than_tombstones_are_kept_may_have_missed_one(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await compacted(kafka, delete_retention_ms=DAY)
    await write(kafka, topic, puts(a=1))
    asked = AIOKafkaConsumer.last_poll_timestamp
    away, followed = [0.0], list[dict[str, Any]]()

    def later(self: AIOKafkaConsumer, part: TopicPartition) -> float:
        return float(asked(self, part) or 0) + away[0]

    monkeypatch.setattr(AIOKafkaConsumer, "last_poll_timestamp", later)

    async def follow() -> None:
        async with table_of(kafka, topic) as table:
            for hours in (20, 40, 60):  # never away for long
                away[0] = hours * 3_600_000
                await write(kafka, topic, puts(a=hours))
                await table.refresh()
            followed.append(dict(table))
            away[0] = 90 * 3_600_000
            await table.reached(0, 10, within=30)

    with pytest.raises(Stale, match=r"behind for more than delete.retention.ms, 8.64e\+07 ms"):
        await follow()
    assert followed == [{"a": 60}]


async def test_when_kafka_is_away_the_table_stays_as_it_was_and_a_refresh_says_so() -> None:
    with mq.kafka(private=True) as own:
        topic = await compacted(own)
        await write(own, topic, puts(a=1))
        async with mq.proxy(own) as network, table_of(network, topic) as table:  # type: ignore[arg-type]
            with network.swallow("up", "down"):
                with pytest.raises(TimeoutError):
                    await table.refresh(within=0.3)
                assert table["a"] == 1
            network.cut()
            await write(own, topic, puts(a=2))
            await mq.until(lambda: table.as_of == {0: 2}, within=30)
            assert table["a"] == 2
