"""The cross-check itself: it reads what Kafka's tools print, and an error of theirs is an error."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest
from aiokafka import TopicPartition

import mqlib as mq
from tests import kafka_tools
from tests.kafka_tools import Row, consumer_group_lag, consumer_performance, producer_performance

GONE = "Error: Executing consumer group command failed due to org.apache.kafka.common.errors.GroupIdNotFoundException"


async def test_a_group_is_told_as_the_tool_tells_it(kafka: mq.Kafka) -> None:
    """What was committed, where the log ends, and the difference; None for what is not known."""
    topic, group = await mq.topic(kafka, "orders", partitions=2), kafka.name("group")
    async with mq.producer(kafka) as producer:
        for partition in (0, 0, 0, 1):
            await producer.send_and_wait(topic, b"x", partition=partition)
    async with mq.consumer(kafka, topic, group_id=group, enable_auto_commit=False) as consumer:
        assert len(await mq.take(consumer, 4, within=20)) == 4
        await consumer.commit({TopicPartition(topic, 0): 1})
        # In a thread: the tool may have to be fetched first, and a member that is held up for ten seconds is dropped.
        found = await asyncio.to_thread(consumer_group_lag, kafka, group)
        assert found == {(topic, 0): Row(1, 3, 2), (topic, 1): Row(None, 1, None)}
    assert consumer_group_lag(kafka, group) == {(topic, 0): Row(1, 3, 2)}, "without members only what is committed"


def test_an_error_of_a_tool_is_an_error(kafka: mq.Kafka) -> None:
    """Although its exit code is 0."""
    with pytest.raises(RuntimeError, match=r"--group no-such-group: .*\n+" + GONE):
        consumer_group_lag(kafka, "no-such-group")


def test_a_tool_that_does_not_end_is_an_error(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_tools, "SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"not done after 0\.1 s"):
        consumer_group_lag(kafka, "any")


async def test_the_performance_tools_move_the_records_that_they_count(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "performance")
    assert producer_performance(kafka, topic, 2_000, 100, acks="all", batch_size=10_000) > 0
    records = await mq.read(kafka, topic)
    assert (len(records), {len(record.value) for record in records}) == (2_000, {100})
    assert producer_performance(kafka, topic, 1_000, 100, warmup=500) > 0
    assert await mq.end_offsets(kafka, topic) == [3_500]
    assert consumer_performance(kafka, topic, 2_000) > 0


@pytest.mark.parametrize(
    ("said", "measure"),
    [
        ("1 records sent, 5 records/sec (0.1 MB/sec)", producer_performance),
        ("data.consumed.in.nMsg, fetch.nMsg.sec\n1, 5.0", consumer_performance),
        ("", producer_performance),
        ("", consumer_performance),
    ],
    ids=["fewer sent", "fewer taken", "nothing sent", "nothing taken"],
)
def test_a_rate_of_fewer_records_is_refused(
    said: str, measure: Any, kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    size = (100,) if measure is producer_performance else ()
    with pytest.raises(RuntimeError, match="10 records"):
        measure(kafka, "topic", 10, *size)
