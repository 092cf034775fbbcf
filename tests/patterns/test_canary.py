"""Probes: on time, late, lost, unknown are four things; none is taken for a message, and no message for a probe."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aio_pika import Message
from aiokafka import ConsumerRecord

import mqlib as mq
from mqlib.patterns.canary import Canary, Probe, answer, failures, kafka_canary, rabbit_canary
from mqlib.patterns.consumer import Policy, consume
from mqlib.patterns.link import consuming
from mqlib.patterns.monitoring import Alert, State, watching
from mqlib.patterns.sending import NotSent, Unrouted


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Path:
    """A way there and back that a test is in charge of."""

    def __init__(self, **options: Any) -> None:
        self.clock, self.takes = Clock(), 0.0
        self.sent, self.returns = list[Probe](), True
        self.error: Exception | None = None
        self.canary = Canary(self.send, clock=self.clock, **{"within": 0.05, **options})

    async def send(self, probe: Probe) -> None:
        self.sent.append(probe)
        if self.error:
            raise self.error
        self.clock.now += self.takes
        if self.returns:
            self.canary.arrived(probe.id)


async def test_a_probe_that_comes_back_and_its_latency() -> None:
    metrics = mq.QueueMetrics("queue")
    path = Path(metrics=metrics, labels={"queue": "orders"})
    path.takes = 0.02
    probe = await path.canary.sample()
    assert (probe.fate, probe.seconds, probe.confirmed) == ("on time", 0.02, True)
    found = metrics.get_metrics(queue="orders")
    assert (found.produced, found.consumed, found.failed, found.max) == (1, 1, 0, 0.02)


async def test_a_probe_without_an_answer_is_unknown_and_then_late_and_never_lost() -> None:
    path = Path()
    path.returns = False
    probe = await path.canary.sample()
    assert (probe.fate, probe.seconds, str(path.canary)) == ("unknown", None, "unknown 1")
    path.clock.now = 7.0
    path.canary.arrived(probe.id)
    assert (probe.fate, probe.seconds, str(path.canary)) == ("late", 7.0, "late 1")
    found = path.canary.metrics.get_metrics()
    assert (found.produced, found.consumed, found.failed_by_reason) == (1, 1, {"unknown": 1, "late": 1})


async def test_what_is_foreign_or_comes_twice_is_ignored_and_counted() -> None:
    path = Path()
    probe = await path.canary.sample()
    for id in (probe.id, probe.id, "another's", ""):
        path.canary.arrived(id)
    assert (path.canary.duplicated, path.canary.foreign, str(path.canary)) == (2, 2, "on time 1")
    assert path.canary.metrics.get_metrics().consumed == 1


async def test_what_is_not_confirmed_raises_and_tells_nothing_of_the_path() -> None:
    path = Path()
    for path.error in (NotSent("1", "no connection"), ConnectionError("cut")):
        with pytest.raises(mq.BrokerError, match=r"not confirmed, and may be stored: (no connection|cut)"):
            await path.canary.sample()
    assert (path.canary.fates["unknown"], path.canary.open, failures(path.canary.samples)) == (2, [], 0)
    path.canary.arrived(path.sent[1].id)
    assert path.sent[1].fate == "on time", "it was stored although nobody said so"


async def test_what_the_broker_returns_is_lost() -> None:
    path = Path()
    path.error = Unrouted("1", "no queue")
    assert (await path.canary.sample()).fate == "lost"
    assert failures(path.canary.samples) == 1
    assert path.canary.metrics.get_metrics().failed_by_reason == {"lost": 1}


async def test_what_a_log_went_past_is_lost_and_only_that() -> None:
    path = Path()
    path.returns = False
    probes = [await path.canary.sample() for _ in range(3)]
    for offset, probe in enumerate(probes):
        probe.partition, probe.offset = 0, offset
    path.canary.passed(1, 100)
    path.canary.passed(0, 0)
    assert str(path.canary) == "unknown 3"
    path.canary.arrived(probes[1].id)
    path.canary.passed(0, 2)
    assert [probe.fate for probe in probes] == ["lost", "on time", "unknown"]


async def test_no_more_are_sent_while_so_many_have_no_answer() -> None:
    path = Path(most=3, patience=100, within=0.01)
    path.returns = False
    for _ in range(6):
        await path.canary.sample()
    assert len(path.sent) == len(path.canary.samples) == failures(path.canary.samples) == 3
    path.clock.now = 50
    path.canary.arrived(path.sent[0].id)
    await path.canary.sample()
    assert len(path.sent) == 4, "one came back, so there is room for one"
    path.clock.now = 101
    await path.canary.sample()
    assert len(path.sent) == 5, "patience with the others is over"


def test_failures_are_counted_in_a_row_and_by_partition() -> None:
    def probes(*fates: str, confirmed: bool = True) -> list[Any]:
        return [Probe(str(n), n, fate, None, confirmed, n % 2) for n, fate in enumerate(fates)]  # type: ignore[arg-type]

    fine = "on time"
    assert failures([]) == failures(probes(fine, fine)) == 0
    assert failures(probes(fine, "unknown", fine, "late", fine, "lost")) == 3, "partition 1, while 0 is well"
    assert failures(probes("lost", "lost", fine, fine)) == 0
    assert failures(probes("unknown", "unknown", confirmed=False)) == 0


@pytest.mark.parametrize("options", [{"within": 0}, {"within": 5, "patience": 1}, {"most": 0}])
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 < within"):
        Path(**options)
    with pytest.raises(ValueError, match="the labels of these metrics are"):
        Path(labels={"queue": "orders"}, metrics=mq.QueueMetrics())


# On real brokers


async def test_each_partition_of_a_topic_is_probed_amid_10_000_records(kafka: mq.Kafka) -> None:
    """The consumer gets each record once, and tells the probes from them."""
    topic, ledger, probes = await mq.topic(kafka, "probed", partitions=3), mq.Ledger(), list[int]()

    async def handle(record: ConsumerRecord) -> None:
        if await answer(producer, record):
            probes.append(record.partition)
        else:
            ledger.received(int(record.value))

    async with mq.producer(kafka) as producer, kafka_canary(kafka, topic) as canary:
        for number in range(10_000):
            ledger.sent(number)
            ledger.acknowledged(number)
        async with asyncio.TaskGroup() as tasks, consume(kafka, [topic], kafka.name("group"), handle) as _:
            tasks.create_task(mq.pump(producer, topic, [b"%d" % number for number in range(10_000)]))
            for _ in range(6):
                await canary.sample()
            await mq.until(lambda: ledger.exact and len(probes) == 6, within=20)
    assert str(canary) == "on time 6"
    assert sorted(probes) == [0, 0, 1, 1, 2, 2]
    assert canary.foreign == 0
    assert canary.metrics.get_metrics().consumed == 6


async def test_two_canaries_on_one_topic_do_not_mistake_each_other(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "probed")
    async with kafka_canary(kafka, topic) as one, kafka_canary(kafka, topic) as other:
        for canary in (one, other, one):
            assert (await canary.sample()).fate == "on time"
        await mq.until(lambda: one.foreign == 1 and other.foreign == 2)
    assert one.duplicated == other.duplicated == 0


async def test_a_consumer_that_hangs_makes_the_canary_of_its_topic_silent(kafka: mq.Kafka) -> None:
    """With a topic for the answers it is the consumer's path that is probed, not only the brokers'."""
    topic, replies = await mq.topic(kafka, "probed"), await mq.topic(kafka, "answers")
    works, silent = asyncio.Event(), Alert("silent", 2, 0, fires_after=0, clears_after=0, unknown_after=30)

    async def handle(record: ConsumerRecord) -> None:
        await works.wait()
        assert await answer(producer, record)

    async with (
        mq.producer(kafka) as producer,
        consume(kafka, [topic], kafka.name("group"), handle, Policy(concurrency=1)) as worker,
        kafka_canary(kafka, topic, replies, within=1.0, most=3) as canary,
    ):
        works.set()
        await mq.until(canary_answers(canary), within=15)
        async with watching(canary, {silent: failures}, every=0.01):
            await mq.until(lambda: silent.state is State.OK)
            works.clear()
            await mq.until(lambda: silent.state is State.FIRING, within=10)
            works.set()
            await mq.until(lambda: silent.state is State.OK, within=10)
    assert canary.fates["lost"] == 0
    assert canary.fates["late"] >= 1
    assert worker.report.failed == 0


def canary_answers(canary: Canary) -> Any:
    async def answers() -> bool:
        return (await canary.sample()).fate == "on time"

    return answers


async def test_a_worker_that_hangs_makes_the_canary_of_its_queue_silent(rabbit: mq.RabbitMQ) -> None:
    """Few probes pile up; the tasks are done once each, and none is a probe."""
    queue, works, ledger = rabbit.name("probed"), asyncio.Event(), mq.Ledger()
    await mq.declare(rabbit, queue, durable=True)
    silent = Alert("silent", 2, 0, fires_after=0, clears_after=0, unknown_after=30)

    async def handle(message: Any) -> None:
        await works.wait()
        if not await answer(worker.link, message):
            ledger.received(int(message.body))

    works.set()
    async with (
        consuming(rabbit, queue, handle) as worker,
        rabbit_canary(rabbit, queue, within=0.5, most=3) as canary,
        watching(canary, {silent: failures}, every=0.01),
        mq.channel(rabbit) as channel,
    ):
        await mq.until(lambda: silent.state is State.OK)
        works.clear()
        for number in range(100):
            ledger.sent(number)
            ledger.acknowledged(number)
        await mq.pump_messages(channel.default_exchange, queue, [b"%d" % number for number in range(100)])
        await mq.until(lambda: silent.state is State.FIRING, within=10)
        await mq.until(lambda: len(canary.open) == 3, within=10)
        assert (await canary.sample()).fate == "unknown"
        assert (await mq.depth(rabbit, queue, by="amqp")).ready <= 103
        works.set()
        await mq.until(lambda: silent.state is State.OK and ledger.exact, within=10)
    assert canary.fates["late"] >= 3, "these three, and on a slow machine those behind the hundred tasks"
    assert worker.errors == 0


async def test_a_queue_that_is_deleted_loses_the_probe_and_answers_to_nobody_are_no_errors(
    rabbit: mq.RabbitMQ,
) -> None:
    queue = rabbit.name("probed")
    await mq.declare(rabbit, queue, durable=True)
    async with rabbit_canary(rabbit, queue, within=0.1) as gone:
        assert (await gone.sample()).fate == "unknown", "nobody consumes"

    async def handle(message: Any) -> None:
        assert await answer(worker.link, message)

    async with consuming(rabbit, queue, handle) as worker, rabbit_canary(rabbit, queue) as canary:
        assert (await canary.sample()).fate == "on time"
        assert (worker.delivered, worker.errors) == (2, 0), "the first one's answer had nowhere to go"
        async with mq.channel(rabbit) as channel:
            await channel.queue_delete(queue)
        assert (await canary.sample()).fate == "lost"


async def test_what_comes_to_the_answers_of_a_canary_from_elsewhere_is_ignored(rabbit: mq.RabbitMQ) -> None:
    queue, replies = rabbit.name("probed"), list[str]()
    await mq.declare(rabbit, queue, durable=True)

    async def handle(message: Any) -> None:
        replies.append(message.reply_to)
        assert await answer(worker.link, message)

    async with (
        consuming(rabbit, queue, handle) as worker,
        rabbit_canary(rabbit, queue) as canary,
        mq.channel(rabbit) as channel,
    ):
        await canary.sample()
        for id in (None, "", "another's"):
            await channel.default_exchange.publish(Message(b"", correlation_id=id), replies[0])
        await mq.until(lambda: canary.foreign == 3)
        assert (await canary.sample()).fate == "on time"
    assert str(canary) == "on time 2"


async def test_a_connection_that_is_cut_and_one_that_is_a_black_hole(rabbit: mq.RabbitMQ) -> None:
    """After a cut it goes on with a new queue for the answers; in a black hole nothing is confirmed."""
    queue = rabbit.name("probed")
    await mq.declare(rabbit, queue, durable=True)

    async def handle(message: Any) -> None:
        assert await answer(worker.link, message)

    async with (
        consuming(rabbit, queue, handle) as worker,
        mq.proxy(rabbit) as proxy,
        rabbit_canary(proxy, queue, within=0.5) as canary,
    ):
        assert (await canary.sample()).fate == "on time"
        proxy.cut()
        await mq.until(again(canary), within=10)
        with proxy.swallow("up", "down"), pytest.raises(mq.BrokerError, match="may be stored"):
            await canary.sample()
        await mq.until(again(canary), within=10)
    assert canary.fates["lost"] == 0


def again(canary: Canary) -> Any:
    async def answered() -> bool:
        try:
            return (await canary.sample()).fate == "on time"
        except mq.BrokerError:
            return False

    return answered


def test_what_has_no_header_is_no_probe() -> None:
    record = ConsumerRecord("orders", 0, 0, 0, 0, None, b"order", None, 0, 0, (("trace", b"1"),))
    assert asyncio.run(answer(None, record)) is False
