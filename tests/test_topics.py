"""Topics, clients and bounded reads on a real Kafka, also one that dies under its clients."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError

import mqlib as mq
from mqlib import topics
from tests.conftest import ROOT


def numbers(records: list[ConsumerRecord]) -> list[int]:
    return [int(record.value) for record in records]


async def fill(kafka: mq.Kafka, topic: str, count: int, **options: Any) -> None:
    """`count` records with the numbers from 0 on as their values."""
    async with mq.producer(kafka) as producer:
        for future in [await producer.send(topic, b"%d" % number, **options) for number in range(count)]:
            await future


async def config_of(kafka: mq.Kafka, topic: str) -> dict[str, str]:
    """The settings of a topic, as Kafka itself tells them."""
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return {entry[0]: entry[1] for entry in answer.resources[0][4]}
    finally:
        await admin.close()


async def test_a_topic_is_fresh_and_in_the_namespace(kafka: mq.Kafka) -> None:
    """Two calls with one name give two empty topics: a cell that is run again meets nothing of its last run."""
    one = await mq.topic(kafka, "orders")
    await fill(kafka, one, 2)
    two = await mq.topic(kafka, "orders")
    assert one != two
    assert one.startswith(f"{kafka.namespace}.orders.")
    assert two.startswith(f"{kafka.namespace}.orders.")
    assert (await mq.end_offsets(kafka, one), await mq.end_offsets(kafka, two)) == ([2], [0])


async def test_a_topic_is_ready_to_be_written_to(kafka: mq.Kafka) -> None:
    """Each of its partitions, at once: no first send meets an unknown topic."""
    for _ in range(3):
        topic = await mq.topic(kafka, "ready", partitions=5)
        async with mq.producer(kafka) as producer:
            assert await producer.partitions_for(topic) == {0, 1, 2, 3, 4}
            answers = [await producer.send_and_wait(topic, b"x", partition=part) for part in range(5)]
        assert [(answer.partition, answer.offset) for answer in answers] == [(part, 0) for part in range(5)]


async def test_settings_are_applied(kafka: mq.Kafka) -> None:
    """Underscores stand for dots; numbers are written as text. Read back from the broker."""
    topic = await mq.topic(kafka, "configured", max_message_bytes=1234, cleanup_policy="compact")
    told = await config_of(kafka, topic)
    assert (told["max.message.bytes"], told["cleanup.policy"]) == ("1234", "compact")


@pytest.mark.parametrize(
    "settings", [{"no_such_setting": 1}, {"retention_ms": "soon"}, {"partitions": 0}, {"replicas": 9}], ids=str
)
async def test_a_topic_that_kafka_refuses_is_named(kafka: mq.Kafka, settings: dict[str, Any]) -> None:
    with pytest.raises(mq.BrokerError, match="'orders'") as error:
        await mq.topic(kafka, "orders", **settings)
    assert len(str(error.value)) > len("Kafka refuses the topic 'orders': ") + 8, "and says why"
    assert not isinstance(error.value, mq.BrokerUnavailable)


async def test_a_name_that_no_topic_can_have_is_refused(kafka: mq.Kafka) -> None:
    with pytest.raises(mq.BrokerError, match="'my orders'"):
        await mq.topic(kafka, "my orders")


async def test_the_clients_are_the_readers_own_and_end_with_their_block(kafka: mq.Kafka) -> None:
    """Options reach the client; after the block it is closed, also when the block raises."""
    topic = await mq.topic(kafka, "clients")
    async with mq.producer(kafka, client_id="mine", linger_ms=3) as producer:
        assert isinstance(producer, AIOKafkaProducer)
        assert producer.client._client_id == "mine"
        await producer.send_and_wait(topic, b"0")
    assert producer._closed
    left: list[Any] = []

    async def failing_block() -> None:
        async with mq.producer(kafka) as producer, mq.consumer(kafka, topic, max_poll_records=1) as consumer:
            left.extend([producer, consumer])
            assert numbers(await mq.take(consumer, 1, within=20)) == [0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_block()
    assert [client._closed for client in left] == [True, True]


async def test_a_consumer_starts_with_what_is_there_unless_told_otherwise(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "earliest")
    await fill(kafka, topic, 3)
    async with mq.consumer(kafka, topic) as consumer:
        assert numbers(await mq.take(consumer, 3, within=20)) == [0, 1, 2]
    async with mq.consumer(kafka, topic, auto_offset_reset="latest") as consumer:
        [part] = consumer.assignment()
        assert await consumer.position(part) == 3


async def test_take_is_bounded_by_the_count_and_loses_nothing(kafka: mq.Kafka) -> None:
    """What a batch had beyond the count comes with the next call, in order."""
    topic = await mq.topic(kafka, "count")
    await fill(kafka, topic, 10)
    async with mq.consumer(kafka, topic) as consumer:
        taken = [numbers(await mq.take(consumer, count, within=20)) for count in (4, 0, 1, 5)]
    assert taken == [[0, 1, 2, 3], [], [4], [5, 6, 7, 8, 9]]


async def test_take_is_bounded_by_the_deadline(kafka: mq.Kafka) -> None:
    """Fewer records are no error; without time none are taken."""
    topic = await mq.topic(kafka, "deadline")
    await fill(kafka, topic, 3)
    async with mq.consumer(kafka, topic) as consumer:
        assert await mq.take(consumer, 5, within=0) == []
        assert numbers(await mq.take(consumer, 1, within=20)) == [0]
        async with asyncio.timeout(20):
            assert numbers(await mq.take(consumer, 5, within=1)) == [1, 2]
            assert await mq.take(consumer, 5, within=0.1) == []


async def test_read_gives_all_partitions_of_all_topics_in_order(kafka: mq.Kafka) -> None:
    """Topics as they were named, then partitions, then offsets; and it commits nothing, so it can be done again."""
    one, two = await mq.topic(kafka, "one", partitions=3), await mq.topic(kafka, "two")
    await fill(kafka, two, 4)
    for part in (2, 0):
        await fill(kafka, one, 3, partition=part)
    for names in ((one, two), (two, one)):
        records = await mq.read(kafka, *names)
        places = [(record.topic, record.partition, record.offset) for record in records]
        assert len(places) == 10
        assert places == sorted(places, key=lambda place: (names.index(place[0]), *place[1:]))
    assert numbers(await mq.read(kafka, one)) == [0, 1, 2, 0, 1, 2]


async def test_read_of_an_empty_topic_is_nothing(kafka: mq.Kafka) -> None:
    empty, full = await mq.topic(kafka, "empty", partitions=2), await mq.topic(kafka, "full")
    await fill(kafka, full, 1)
    assert await mq.read(kafka, empty) == []
    assert numbers(await mq.read(kafka, empty, full)) == [0]
    assert await mq.read(kafka) == []


async def test_read_starts_where_the_log_starts(kafka: mq.Kafka) -> None:
    """After records were deleted (or retention took them) the first offset is not 0, and that is no error."""
    topic = await mq.topic(kafka, "shortened")
    await fill(kafka, topic, 5)
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    try:
        from aiokafka import TopicPartition
        from aiokafka.admin.records_to_delete import RecordsToDelete

        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=3)})
    finally:
        await admin.close()
    assert numbers(await mq.read(kafka, topic)) == [3, 4]


async def transaction(kafka: mq.Kafka, topic: str, values: range, outcome: str) -> None:
    async with mq.producer(kafka, transactional_id=kafka.name("writer")) as producer:
        await producer.begin_transaction()
        for value in values:
            await producer.send_and_wait(topic, b"%d" % value)
        await (producer.commit_transaction() if outcome == "commit" else producer.abort_transaction())


async def test_read_committed_sees_no_aborted_record_and_ends_behind_the_markers(kafka: mq.Kafka) -> None:
    """Each transaction's end takes an offset of its own, also the last: reading must not wait for a record there."""
    topic = await mq.topic(kafka, "ledger")
    await transaction(kafka, topic, range(3), "commit")
    await transaction(kafka, topic, range(100, 102), "abort")
    assert await mq.end_offsets(kafka, topic) == [7]
    assert numbers(await mq.read(kafka, topic, isolation_level="read_committed", within=20)) == [0, 1, 2]
    assert numbers(await mq.read(kafka, topic, within=20)) == [0, 1, 2, 100, 101]


async def test_read_committed_of_nothing_but_aborted_records_is_nothing(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "aborted")
    await transaction(kafka, topic, range(3), "abort")
    assert await mq.read(kafka, topic, isolation_level="read_committed", within=20) == []


async def test_read_committed_ends_before_an_open_transaction(kafka: mq.Kafka) -> None:
    """At the last stable offset: what is undecided is neither waited for nor shown."""
    topic = await mq.topic(kafka, "open")
    await transaction(kafka, topic, range(2), "commit")
    async with mq.producer(kafka, transactional_id=kafka.name("writer")) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"100")
        assert numbers(await mq.read(kafka, topic, isolation_level="read_committed", within=20)) == [0, 1]
        assert numbers(await mq.read(kafka, topic, within=20)) == [0, 1, 100]
        await producer.abort_transaction()


async def test_read_says_when_it_could_not_end(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "slow")
    await fill(kafka, topic, 1)
    with pytest.raises(TimeoutError):
        await mq.read(kafka, topic, within=0)


@pytest.mark.parametrize("function", [mq.read, mq.end_offsets], ids=["read", "end_offsets"])
async def test_a_topic_that_is_not_there_is_named(kafka: mq.Kafka, function: Any) -> None:
    """A misspelt name must not look like a slow broker."""
    async with asyncio.timeout(30):
        with pytest.raises((mq.BrokerError, TimeoutError), match="no-such-topic"):
            await function(kafka, "no-such-topic")


async def test_end_offsets_are_those_of_each_partition(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "ends", partitions=3)
    await fill(kafka, topic, 4, partition=2)
    await fill(kafka, topic, 1, partition=0)
    assert await mq.end_offsets(kafka, topic) == [1, 0, 4]


async def test_leaving_right_after_entering_is_quiet(
    kafka: mq.Kafka, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """aiokafka's own `stop` then raises `CancelledError`, although nobody cancelled (L12)."""
    topic = await mq.topic(kafka, "quick")
    before = asyncio.all_tasks()
    for _ in range(5):
        async with mq.consumer(kafka, topic):
            pass
        async with mq.producer(kafka):
            pass
    assert asyncio.all_tasks() <= before
    assert capfd.readouterr().err == ""
    assert [record for record in caplog.records if record.name == "asyncio" and record.levelno > logging.INFO] == []


LEAVE = """
import asyncio, contextlib, gc, sys
import mqlib as mq
from mqlib import topics

topics.STOP_SECONDS = 2  # as long as it may take; the test need not sit through ten


async def enter(kafka, topic, stack):
    if sys.argv[1] == "consumer":
        client = await stack.enter_async_context(mq.consumer(kafka, topic, group_id=kafka.name("group")))
        assert len(await mq.take(client, 1, within=20)) == 1
    else:
        client = await stack.enter_async_context(mq.producer(kafka, enable_idempotence=True))
        await client.send_and_wait(topic, b"1")
    return client


async def leave():
    with mq.kafka(private=True) as kafka:
        topic = await mq.topic(kafka, "orphaned")
        async with mq.producer(kafka) as producer:
            await producer.send_and_wait(topic, b"0")
        async with asyncio.timeout(30):
            async with contextlib.AsyncExitStack() as stack:
                client = await enter(kafka, topic, stack)
                kafka.nodes[0].kill()
                if sys.argv[1] == "producer":
                    unfinished = await client.send(topic, b"2")
        with contextlib.suppress(Exception, asyncio.CancelledError):
            if sys.argv[1] == "producer":
                await asyncio.wait_for(unfinished, 1)
        await asyncio.sleep(0)
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        print("left; pending:", [task.get_coro().__qualname__ for task in pending])
        del client, stack
        gc.collect()


asyncio.run(leave())
gc.collect()
"""


@pytest.mark.parametrize("client", ["consumer", "producer"])
def test_leaving_a_client_of_a_dead_broker_ends_and_leaves_nothing(client: str) -> None:
    """A consumer with auto-commit, whose own `stop` never returns then (B10, L13), and a producer with a record that
    is still to be sent: the block ends in bounded time, no task is pending, and nothing is written to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LEAVE), client], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "left; pending: []"


async def test_what_lingers_longer_than_a_stop_may_take_is_sent_before_the_block_ends(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "STOP_SECONDS", 2.0)
    topic = await mq.topic(kafka, "lingering")
    async with mq.producer(kafka, linger_ms=3000) as producer:
        answers = [await producer.send(topic, b"%d" % number) for number in range(3)]
    assert [answer.result().offset for answer in answers] == [0, 1, 2]
    assert [record.value for record in await mq.read(kafka, topic)] == [b"0", b"1", b"2"]


async def test_poll_is_back_in_time_although_nobody_can_end_the_rebalance() -> None:
    """aiokafka's own time limit does not hold while it waits for an assignment, as for ever from a dead broker."""
    with mq.kafka(private=True) as broker:
        topic = await mq.topic(broker, "waiting")
        await fill(broker, topic, 3)
        async with mq.consumer(broker, topic, group_id=broker.name("group"), enable_auto_commit=False) as consumer:
            assert len(await mq.take(consumer, 3, within=20)) == 3
            broker.nodes[0].kill()
            consumer._coordinator.reset_generation()  # as a heartbeat's answer does: dropped, and to join again
            await mq.until(lambda: consumer._subscription.reassignment_in_progress, within=20)
            async with asyncio.timeout(10):
                assert await topics.poll(consumer, 0.1) == {}
                assert await mq.take(consumer, 1, within=0.2) == []


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (mq.producer, {}),
        (mq.producer, {"transactional_id": "id"}),
        (mq.consumer, {}),
        (mq.consumer, {"group_id": "id"}),
    ],
    ids=["producer", "transactional", "consumer", "member"],
)
async def test_a_client_that_could_not_start_is_closed(kind: Any, options: dict[str, Any], silent: bool) -> None:
    """One that is not complains on stderr when it is collected."""
    complaints = list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1] if silent else 1
        nowhere: Any = SimpleNamespace(client={"bootstrap_servers": f"127.0.0.1:{port}"})
        with pytest.raises((KafkaConnectionError, TimeoutError)):
            async with asyncio.timeout(0.5 if silent else 30), kind(nowhere, **options):
                pass
        gc.collect()
    assert complaints == []
