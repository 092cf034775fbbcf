"""Messages that are sent when they are due, from a timer table: a compacted topic, and a heap in memory built from it.

A schedule is a record of the timer topic, by the id of its job. A tombstone cancels it, and a job that was sent is
retired by one, too. The log is the state: it is read again at a start, and each partition has one owner, a member of a
group. Nothing is written again before it is due. For delays on RabbitMQ see `delays`.
See https://kafka.apache.org/documentation/#compaction and the punctuators of Kafka Streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest

from ..brokers import BrokerError
from ..brokers.base import Connectable
from ..topics import consumer, poll
from ..waiting import beside
from .firing import RETRY_SECONDS, Report, Shard
from .timers import TIMER_TOPIC, cancel_message, schedule_message

POLL_SECONDS = 0.1
ASKED = 10
"""How often a broker must have said that there is no such topic: a new one is not known everywhere at once."""


class Scheduler(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of the group of schedulers of one timer topic, at work; made by `start_scheduler`."""

    def __init__(
        self, kafka: Connectable, timers: str, group: str, exactly_once: bool, dead_letters: str | None, grace: int,
        clock: Callable[[], int], drain: float, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.report, self.started = Report(), asyncio.Event()
        self.kafka, self.group, self.exactly_once, self.dead_letters = kafka, group, exactly_once, dead_letters
        self.grace, self.clock = grace, clock
        self.topics: set[str] = set()
        self.consumer: AIOKafkaConsumer
        self._timers, self._drain, self._options = timers, drain, options
        self._shards: dict[TopicPartition, Shard] = {}
        self._running: dict[TopicPartition, asyncio.Task[None]] = {}
        self._asking: dict[str, asyncio.Task[bool]] = {}
        self._stopping = False
        self._tasks: asyncio.TaskGroup

    @property
    def waiting(self) -> int:
        """Jobs in memory that are not due."""
        return sum(len(shard.table.jobs) for shard in self._shards.values())

    @property
    def ready(self) -> bool:
        """Whether it owns a partition, and has read all there is in its own."""
        return bool(self._shards) and all(shard.loaded.is_set() for shard in self._shards.values())

    def stop(self) -> None:
        """Asks it to finish what is under way."""
        self._stopping = True

    async def run(self) -> None:
        """Works until `stop`. Raises `BrokerError` for a topic that is not fit for timers."""
        patience = int((self._drain + 5) * 1000)
        options = {"enable_auto_commit": False, "group_id": self.group, "rebalance_timeout_ms": patience}
        options |= {"isolation_level": "read_committed", "fetch_max_wait_ms": 100} | self._options
        async with consumer(self.kafka, **options) as self.consumer:
            await self._check()
            async with asyncio.TaskGroup() as self._tasks:
                self.consumer.subscribe(topics=[self._timers], listener=self)
                self.started.set()
                try:
                    while not self._stopping:
                        await self._poll()
                finally:
                    await self.on_partitions_revoked(list(self._shards))
                    for task in list(self._asking.values()):
                        task.cancel()

    async def _poll(self) -> None:
        for part, records in (await poll(self.consumer, POLL_SECONDS)).items():
            for record in records if part in self._shards else ():
                self._shards[part].apply(record)
        for part, shard in list(self._shards.items()):
            if shard.end is not None and not shard.loaded.is_set():
                with contextlib.suppress(IllegalStateError, TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS):
                        if await self.consumer.position(part) >= shard.end:
                            shard.loaded.set()

    async def end_of(self, part: TopicPartition) -> int:
        """What must have been read before anything of this partition is sent."""
        return int((await self.consumer.end_offsets([part]))[part])

    async def _ask(self, request: Any) -> Any:
        client = self.consumer._client
        return await client.send(client.get_random_node(), request)

    async def _check(self) -> None:
        for topic in filter(None, (self._timers, self.dead_letters)):
            if not await self._exists(topic):
                raise BrokerError(f"Kafka has no topic {topic!r}")
        answer = await self._ask(DescribeConfigsRequest([(2, self._timers, ["cleanup.policy"])], False))
        policy = answer.resources[0][4][0][1]
        if policy != "compact":
            raise BrokerError(
                f"the topic {self._timers!r} has cleanup.policy={policy}, which deletes schedules that are still to "
                f"come; make one with {TIMER_TOPIC}"
            )

    async def _exists(self, topic: str) -> bool:
        """Only the broker's own answer is a no; one that does not answer is asked again."""
        for _ in range(ASKED):
            answered = False
            while not answered:
                with contextlib.suppress(KafkaError):
                    answer = await self._ask(MetadataRequest([topic], allow_auto_topic_creation=False))
                    if not answer.to_object()["topics"][0]["error_code"]:
                        self.topics.add(topic)
                        return True
                    answered = True
                await asyncio.sleep(RETRY_SECONDS / 4)
        return False

    def look_up(self, topic: str) -> asyncio.Task[bool]:
        """Asks, once at a time, whether the topic is there."""
        if topic not in self._asking:
            task = self._asking[topic] = self._tasks.create_task(self._exists(topic))
            task.add_done_callback(lambda _: self._asking.pop(topic))
        return self._asking[topic]

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Called by aiokafka before these partitions may go to another member."""
        parts = [part for part in revoked if part in self._shards]
        for part in parts:
            self._shards.pop(part).stop()
        if tasks := [self._running.pop(part) for part in parts]:
            _, slow = await asyncio.wait(tasks, timeout=self._drain)
            for task in slow:
                task.cancel()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance: each partition is read from its beginning."""
        for part in assigned:
            self.consumer.seek(part, 0)
            shard = self._shards[part] = Shard(self, part)
            self._running[part] = self._tasks.create_task(shard.run())


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@contextlib.asynccontextmanager
async def start_scheduler(
    kafka: Connectable, timers: str, group: str | None = None, exactly_once: bool = False,
    dead_letters: str | None = None, grace: int = 1000, clock: Callable[[], int] = now_ms, drain: float = 5.0,
    **options: Any,
) -> AsyncIterator[Scheduler]:  # fmt: skip
    """Sends what is scheduled in the topic `timers` when it is due, for the length of the block.

    At least once: a crash between a message and the tombstone that retires its job means that it is sent again, with
    the same headers `schedule-job` and `schedule-due`. With `exactly_once` both are one transaction, for consumers that
    read what is committed. Several schedulers of one group share the partitions, and take over from each other. A tick
    that is more than `grace` milliseconds late is a misfire. What cannot be sent goes to the topic `dead_letters`, or
    is counted. `clock` tells milliseconds since 1970; `options` go to the consumer. Raises `BrokerError` for a timer
    topic that is not compacted, or not there.
    """
    made = Scheduler(
        kafka, timers, group or f"{timers}-scheduler", exactly_once, dead_letters, grace, clock, drain, options
    )
    async with beside(made.run(), made.stop):
        await made.started.wait()
        yield made


__all__ = ["TIMER_TOPIC", "Report", "Scheduler", "cancel_message", "now_ms", "schedule_message", "start_scheduler"]
