from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aio_pika.abc import AbstractIncomingMessage
from aiokafka import ConsumerRecord, TopicPartition

import mqlib as mq
from mqlib.patterns.flow import Buffer, FairQueue, Full, Limiter, Shedder, TokenBucket, deadline, reading, send_bounded
from mqlib.patterns.link import consuming, link
from mqlib.patterns.sending import NotSent, Refused, Unconfirmed, json_message

TICK = 0.0005


class Time:
    """A clock that moves only while somebody sleeps by it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


async def turns_of_the_loop(count: int = 10) -> None:
    """Lets every task that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


# The buffer.


async def test_a_buffer_pauses_at_its_high_mark_and_resumes_at_its_low_one() -> None:
    heard = list[str]()
    buffer = Buffer[int](4, 1, pause=lambda: heard.append("pause"), resume=lambda: heard.append("resume"))
    for number in range(3):
        buffer.add(number)
    assert not heard
    buffer.add(3)
    buffer.add(4)  # a source may hand over more at once
    assert (heard, len(buffer), buffer.paused) == (["pause"], 5, True)
    assert [await buffer.get() for _ in range(3)] == [0, 1, 2]
    assert buffer.paused, "two are left, and the low mark is one"
    assert await buffer.get() == 3
    assert (heard, buffer.paused, buffer.pauses, buffer.peak) == (["pause", "resume"], False, 1, 5)


async def test_a_buffer_counts_bytes_too_and_waits_until_both_are_low() -> None:
    buffer = Buffer[bytes](10, 8, high_bytes=100, size=len)
    for _ in range(2):
        buffer.add(b"x" * 50)
    assert (buffer.paused, buffer.bytes) == (True, 100)
    buffer.add(b"y")
    await buffer.get()
    assert buffer.paused, "51 bytes are above half of 100"
    await buffer.get()
    assert (buffer.paused, buffer.bytes, buffer.peak_bytes) == (False, 1, 101)


async def test_who_puts_waits_while_the_buffer_is_paused_and_goes_on_in_order() -> None:
    buffer, got = Buffer[int](3, 1), list[int]()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(buffer.put(number))
        await turns_of_the_loop()
        assert len(buffer) == 3
        while len(got) < 100:
            got.append(await buffer.get())
    assert got == list(range(100))
    assert buffer.peak == 3, "however many want to put, no more get in"


async def test_a_cancelled_put_has_put_nothing_and_a_cancelled_get_has_taken_nothing() -> None:
    buffer = Buffer[str](1, 0)
    await buffer.put("first")
    for place in (0, 1):  # the one that waits for room, and one that waits behind it
        putting = [asyncio.create_task(buffer.put(f"{place} {number}")) for number in range(2)]
        await turns_of_the_loop()
        putting[place].cancel()
        await turns_of_the_loop()
        assert putting[place].cancelled()
        await buffer.get()
        await putting[1 - place]
        assert await buffer.get() == f"{place} {1 - place}"
        await buffer.put("again")
    await buffer.get()
    getting = [asyncio.create_task(buffer.get()) for _ in range(2)]
    await turns_of_the_loop()
    getting[0].cancel()
    await buffer.put("kept")
    assert await asyncio.wait_for(getting[1], 5) == "kept"
    assert len(buffer) == 0


async def test_a_transport_is_paused_and_resumed() -> None:
    """An asyncio source in general: what the buffer does not take waits in the sockets, and the other side notices."""
    received, total = 0, 4_000_000

    class Reader(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.buffer = Buffer[bytes](
                1000, high_bytes=100_000, size=len, pause=transport.pause_reading, resume=transport.resume_reading
            )
            readers.append(self)

        def data_received(self, data: bytes) -> None:
            self.buffer.add(data)

    readers = list[Reader]()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Reader, "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x" * total)
        await mq.until(lambda: readers and readers[0].buffer.paused)
        while received < total:
            received += len(await readers[0].buffer.get())
        writer.close()
    assert readers[0].buffer.pauses > 3
    assert readers[0].buffer.peak_bytes < 100_000 + 256 * 1024 + 1, "one read of asyncio's more than the mark"


@pytest.mark.parametrize(
    "marks",
    [{"high": 0}, {"high": 5, "low": 5}, {"high": 5, "low": -1}, {"high": 5, "high_bytes": 10},
     {"high": 5, "high_bytes": 0, "size": len}],
    ids=str,
)  # fmt: skip
async def test_marks_that_make_no_sense_are_refused(marks: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the low mark is below the high one"):
        Buffer[bytes](**marks)


# The buffer, filled from Kafka.


async def topic_of(kafka: mq.Kafka, count: int, partitions: int = 1) -> str:
    topic = await mq.topic(kafka, "flow", partitions)
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, (b"%d" % number for number in range(count)))
    return topic


async def test_ten_thousand_records_through_a_small_buffer(kafka: mq.Kafka) -> None:
    """Never above the mark by more than one poll, nothing lost, nothing twice, and each partition in order."""
    topic, ledger = await topic_of(kafka, 10_000, 3), mq.Ledger()
    for number in range(10_000):
        ledger.sent(number)
    async with (
        mq.consumer(kafka, topic, group_id=kafka.name("flow"), enable_auto_commit=False) as consumer,
        reading(consumer, Buffer[ConsumerRecord](200, 100), max_records=50) as buffer,
        asyncio.timeout(30),
    ):
        for number in range(10_000):
            if number % 800 == 0 and number < 9000:
                await mq.until(lambda: buffer.paused, within=20)
            record = await buffer.get()
            ledger.received(int(record.value), partition=record.partition)
            if len(buffer) % 10 == 0:
                await asyncio.sleep(0)
        await consumer.commit()
    assert ledger.exact
    assert ledger.reordered_in_partition == 0
    assert buffer.pauses >= 12
    assert 200 <= buffer.peak < 250


async def test_a_paused_consumer_stays_in_its_group_and_pauses_what_a_rebalance_brings(kafka: mq.Kafka) -> None:
    """Two members, both stuck: longer than max.poll.interval.ms no rebalance. One leaves, and the other gets its
    partition: still nothing is fetched beyond the mark."""
    topic, group = await topic_of(kafka, 4000, 2), kafka.name("stuck")
    options: dict[str, Any] = {"group_id": group, "enable_auto_commit": False, "heartbeat_interval_ms": 100}
    options |= {"max_poll_interval_ms": 1500, "rebalance_timeout_ms": 1500, "session_timeout_ms": 6000}
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(mq.consumer(kafka, topic, **options))
        mine = await stack.enter_async_context(reading(one, Buffer[ConsumerRecord](50), max_records=10))
        async with mq.consumer(kafka, topic, **options) as other, reading(other, Buffer[ConsumerRecord](50), 10) as its:
            await mq.until(lambda: mine.paused and its.paused and len(other.assignment()) == 1, within=15)
            generation = one._coordinator.generation
            await asyncio.sleep(2.5)  # longer than a member may stay away
            assert one._coordinator.generation == generation
        await mq.until(lambda: len(one.assignment()) == 2 and one.paused() == one.assignment(), within=15)
        await asyncio.sleep(0.3)  # time for a fetch
        assert mine.peak < 60


async def test_a_pause_throws_nothing_away_that_the_client_has_fetched(
    kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All comes in one fetch. aiokafka drops the rest of it when a paused partition is polled, and fetches it again."""
    topic, fetches = await topic_of(kafka, 1000), list[str]()
    async with mq.consumer(kafka, topic) as consumer:
        send = consumer._client.send

        async def counting(node: int, request: Any, **options: Any) -> Any:
            fetches.append(type(request).__name__)
            return await send(node, request, **options)

        monkeypatch.setattr(consumer._client, "send", counting)
        async with reading(consumer, Buffer[ConsumerRecord](20, 10), max_records=10) as buffer:
            for _ in range(15):
                await mq.until(lambda: buffer.paused, every=0.001)
                await asyncio.sleep(0.03)  # time for a poll while it is paused
                while buffer.paused:
                    await buffer.get()
    assert buffer.pauses >= 15
    assert 1 <= sum(name.startswith("Fetch") for name in fetches) <= 5


async def test_a_consumer_that_commits_by_itself_is_refused(kafka: mq.Kafka) -> None:
    topic = await topic_of(kafka, 1)
    async with mq.consumer(kafka, topic, group_id=kafka.name("auto")) as consumer:
        with pytest.raises(ValueError, match="enable_auto_commit would commit what only waits in the buffer"):
            async with reading(consumer, Buffer[ConsumerRecord](10)):
                pass


async def test_what_a_poll_raises_comes_out_of_the_block(kafka: mq.Kafka) -> None:
    topic = await topic_of(kafka, 1)
    async with mq.consumer(kafka, topic, value_deserializer=lambda _: 1 // 0) as consumer:
        with pytest.raises(ZeroDivisionError):
            async with reading(consumer, Buffer[ConsumerRecord](10)) as buffer, asyncio.timeout(10):
                await buffer.get()


async def test_a_sigkill_of_kafka_while_the_buffer_is_paused_costs_nothing() -> None:
    with mq.kafka(private=True) as kafka:
        topic, ledger = await topic_of(kafka, 2000), mq.Ledger()
        for number in range(2000):
            ledger.sent(number)
        async with (
            mq.consumer(kafka, topic, max_partition_fetch_bytes=2000) as consumer,
            reading(consumer, Buffer[ConsumerRecord](200), max_records=20) as buffer,
        ):
            await mq.until(lambda: buffer.paused)
            async with mq.killed(kafka.nodes[0]):
                assert len(buffer) >= 200
            async with asyncio.timeout(30):
                for _ in range(2000):
                    ledger.received(int((await buffer.get()).value))
            assert await consumer.position(TopicPartition(topic, 0)) == 2000
        assert buffer.peak < 220
    assert ledger.exact
    assert ledger.reordered == 0


# The token bucket.


async def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    time, moments = Time(), list[float]()
    bucket = TokenBucket(50, 5, time, time.sleep)
    for _ in range(60):
        await bucket.acquire()
        moments.append(time.now - 1_000_000)
    assert moments[:5] == [0.0] * 5
    assert moments[5:] == pytest.approx([(number + 1) / 50 for number in range(55)])
    time.now += 3600
    assert sum(bucket.try_acquire() for _ in range(100)) == 5, "an hour's rest fills it, and no more"
    time.now -= 3600  # a clock that is set back gives nothing and takes nothing
    assert not bucket.try_acquire()


async def test_a_bucket_serves_in_order_and_a_large_wish_is_not_overtaken() -> None:
    time, order = Time(), list[str]()
    bucket = TokenBucket(10, 10, time, time.sleep)
    assert bucket.try_acquire(10)

    async def want(name: str, count: float) -> None:
        await bucket.acquire(count)
        order.append(name)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(want("large", 10))
        for number in range(5):
            group.create_task(want(f"small {number}", 1))
        await asyncio.sleep(0)
        time.now += 0.5  # enough for a small one
        assert not bucket.try_acquire(), "somebody waits already"
    assert order == ["large", *(f"small {number}" for number in range(5))]


async def test_a_cancelled_wish_has_taken_no_token() -> None:
    time = Time()
    gate = asyncio.Event()

    async def sleep(seconds: float) -> None:
        await gate.wait()
        await time.sleep(seconds)

    bucket = TokenBucket(1, 4, time, sleep)
    assert bucket.try_acquire(4)
    waiting = [asyncio.create_task(bucket.acquire(4)) for _ in range(3)]
    await turns_of_the_loop()
    waiting[0].cancel()  # sleeps until there are enough
    waiting[1].cancel()  # waits behind it
    await turns_of_the_loop()
    gate.set()
    await asyncio.wait_for(waiting[2], 5)
    assert time.now == 1_000_004.0
    time.now += 4
    assert bucket.try_acquire(4)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0), (float("inf"), 1), (float("nan"), 1)])
async def test_a_bucket_that_makes_no_sense_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="rate and burst are above 0 and finite"):
        TokenBucket(rate, burst)


@pytest.mark.parametrize("count", [0, -1, 6])
async def test_what_a_bucket_can_never_give_is_an_error_at_once(count: float) -> None:
    bucket = TokenBucket(1, 5)
    with pytest.raises(ValueError, match=r"tokens at once: the bucket holds its burst of 5 at most"):
        await bucket.acquire(count)
    with pytest.raises(ValueError, match="at most"):
        bucket.try_acquire(count)
    assert bucket.try_acquire(5), "and takes nothing"


# The limiter.


async def test_a_limiter_lets_in_so_many_in_the_order_in_which_they_came() -> None:
    limiter, order, now = Limiter(3), list[int](), 0

    async def work(number: int) -> None:
        nonlocal now
        async with limiter.slot():
            order.append(number)
            now += 1
            assert now <= 3
            await turns_of_the_loop(number % 4)
            now -= 1

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number in range(500):
            group.create_task(work(number))
    assert order == list(range(500))
    assert (limiter.peak, limiter.in_flight) == (3, 0)


async def test_a_limiter_is_bounded_in_who_waits_too() -> None:
    limiter, gate = Limiter(1, waiting=2), asyncio.Event()

    async def work() -> None:
        async with limiter.slot():
            await gate.wait()

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(work())
        await turns_of_the_loop()
        with pytest.raises(Full, match="1 of 1 are under way, and 2 wait already"):
            await work()
        gate.set()
    async with Limiter(1, waiting=0).slot():  # nobody may wait, and nobody has to
        pass


@pytest.mark.parametrize("when", range(12))
async def test_no_permit_leaks_however_a_turn_ends(when: int) -> None:
    """Each of the waiters is cancelled at another moment of its wait, or in its turn; one raises."""
    limiter = Limiter(2)

    async def work(fails: bool = False) -> None:
        async with limiter.slot():
            await turns_of_the_loop(2)
            if fails:
                raise RuntimeError("the handler failed")

    tasks = [asyncio.create_task(work(fails=number == 1)) for number in range(12)]
    await turns_of_the_loop(when)
    for task in tasks[2::3]:
        task.cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert isinstance(results[1], RuntimeError)
    assert [results[number] for number in (0, 3, 4, 6, 7, 9, 10)] == [None] * 7
    assert (limiter.in_flight, limiter.limit) == (0, 2)
    async with asyncio.timeout(1), limiter.slot(), limiter.slot():
        pass


async def test_a_limit_rises_slowly_while_it_is_used_and_falls_once_for_a_whole_round() -> None:
    time = Time()
    limiter = Limiter(4, least=2, most=6, errors=(TimeoutError,), clock=time)

    async def round_of(count: int, error: type[Exception] | None = None) -> None:
        async def work() -> None:
            async with limiter.slot():
                await turns_of_the_loop()
                if error:
                    raise error

        time.now += 1
        await asyncio.gather(*(work() for _ in range(count)), return_exceptions=True)

    await round_of(1)
    assert limiter.limit == 4, "one of four at work says nothing about a fifth"
    await round_of(4)
    assert 4 < limiter.limit < 5
    before = limiter.limit
    await round_of(4, ValueError)
    assert limiter.limit == before, "an error of the message is no overload"
    await round_of(4, TimeoutError)
    assert limiter.limit == pytest.approx(before * 0.7), "four that began together are one overload"
    for _ in range(10):
        await round_of(4, TimeoutError)
    assert limiter.limit == 2
    for _ in range(100):
        await round_of(6)
    assert limiter.limit == 6
    assert limiter.in_flight == 0


async def test_a_limit_finds_what_a_slow_downstream_bears() -> None:
    """Above twelve at once each takes longer than it may. The limit stays around twelve, and order is kept."""
    time, limits, order, ticks = Time(), list[float](), list[int](), asyncio.Event()
    limiter = Limiter(2, least=1, most=100, slow=0.02, clock=time)

    async def work(number: int) -> None:
        async with limiter.slot():
            order.append(number)
            took = 0.005 if limiter.in_flight <= 12 else 0.025
            for _ in range(round(took / TICK)):
                await ticks.wait()
        limits.append(limiter.limit)

    async def tick() -> None:
        while len(limits) < 1000:
            time.now += TICK
            ticks.set()
            ticks.clear()
            await turns_of_the_loop(3)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(tick())
        for number in range(1000):
            group.create_task(work(number))
    settled = limits[300:]
    assert 8 <= sum(settled) / len(settled) <= 13
    assert max(settled) < 16
    assert order == list(range(1000))


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"limit": 4, "least": 5}, {"limit": 4, "most": 3}, {"limit": 4, "least": 0},
     {"limit": 1, "backoff": 1}, {"limit": 1, "waiting": -1}, {"limit": float("nan")}],
    ids=str,
)  # fmt: skip
async def test_limits_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must hold"):
        Limiter(**options)


# Publishing within a limit.


@contextlib.asynccontextmanager
async def alarm(rabbit: mq.RabbitMQ) -> AsyncIterator[None]:
    """The broker has no memory left."""
    await asyncio.to_thread(rabbit.nodes[0].control, "set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        if rabbit.nodes[0].running:
            await asyncio.to_thread(rabbit.nodes[0].control, "set_vm_memory_high_watermark", "0.6")


async def ready(rabbit: mq.RabbitMQ, queue: str) -> int:
    return (await mq.depth(rabbit, queue, by="amqp")).ready


async def test_messages_through_a_window_into_a_queue_that_is_full_again_and_again(rabbit: mq.RabbitMQ) -> None:
    """The queue refuses what it cannot hold (nothing is taken before), and everything arrives once."""
    queue, ledger = rabbit.name("full"), mq.Ledger()
    arguments: dict[str, Any] = {"x-max-length": 30, "x-overflow": "reject-publish"}
    limiter = Limiter(10, waiting=50, least=1, most=50, backoff=0.5)
    left, refused, full = iter(range(2_000)), 0, asyncio.Event()

    async def take(message: AbstractIncomingMessage) -> None:
        await full.wait()
        ledger.received(int(message.body))

    async def offer(connection: Any) -> None:
        nonlocal refused
        for number in left:
            ledger.sent(number)
            stored = False
            while not stored:
                try:
                    await send_bounded(limiter, connection, json_message(number), queue, within=30)
                    stored = True
                except Refused:
                    refused += 1
                    full.set()
                    await asyncio.sleep(0)
            ledger.acknowledged(number)

    await mq.declare(rabbit, queue, durable=True, arguments=arguments)
    async with link(rabbit) as sending, consuming(rabbit, queue, take, prefetch=20), asyncio.timeout(60):
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(offer(sending))
        await mq.until(lambda: not ledger.missing())
    assert ledger.exact
    assert ledger.unknown == 0
    assert refused > 0
    assert (limiter.in_flight, limiter.peak <= 50) == (0, True)


async def test_who_gets_no_slot_in_time_has_sent_nothing(rabbit: mq.RabbitMQ) -> None:
    queue = rabbit.name("slot")
    await mq.declare(rabbit, queue, durable=True)
    limiter = Limiter(1)
    async with link(rabbit) as connection:
        async with limiter.slot():
            with pytest.raises(NotSent, match=r"message m to '.*slot.*': none of 1 slots was free within 0\.1 s"):
                await send_bounded(limiter, connection, json_message(1, id="m"), queue, within=0.1)
        await send_bounded(limiter, connection, json_message(2), queue)
    assert limiter.in_flight == 0
    assert await ready(rabbit, queue) == 1
    async with mq.proxy(rabbit) as gone:
        opened = link(gone)
        connection = await opened.__aenter__()
    await mq.until(lambda: connection._channel is None)
    with pytest.raises(NotSent, match="no connection within"):
        await send_bounded(limiter, connection, json_message(3), queue, within=0.1)
    await opened.__aexit__(None, None, None)
    assert limiter.in_flight == 0


async def test_a_memory_alarm_a_sigkill_while_blocked_and_no_slot_is_lost() -> None:
    """Within its limit of time each publish says what is known: what was under way is unknown, what comes after is not
    sent, both name the alarm. Consumers go on. The unknown ones come when it is over. Then the broker dies while it
    blocks: the same link and the same limiter go on when it is back."""
    with mq.rabbitmq(private=True) as rabbit:
        queue, limiter, words = rabbit.name("alarm"), Limiter(3, waiting=20), list[str]()

        async def offer(number: int, within: float) -> None:
            try:
                await send_bounded(limiter, connection, json_message(number), queue, within=within)
                words.append("confirmed")
            except Unconfirmed as error:
                words.append(f"{type(error).__name__}{' (low on memory)' * ('low on memory' in str(error))}")

        declared = link(rabbit, lambda channel: channel.declare_queue(queue, durable=True))
        async with declared as connection, mq.channel(rabbit) as consuming_one:
            await offer(0, 5)
            await asyncio.sleep(2)  # RabbitMQ answers a declaration, and then writes it down
            async with alarm(rabbit):
                async with asyncio.timeout(10), asyncio.TaskGroup() as group:
                    for number in range(1, 4):
                        group.create_task(offer(number, 1))
                assert words == ["confirmed", *["Unknown (low on memory)"] * 3]
                async with asyncio.timeout(10), asyncio.TaskGroup() as group:
                    for number in range(4, 10):
                        group.create_task(offer(number, 0.5))
                assert Counter(words[4:]).keys() <= {"NotSent (low on memory)", "NotSent"}
                assert limiter.in_flight == 0
                taken = await mq.take_messages(await consuming_one.get_queue(queue), 1)
                assert [message.body for message in taken] == [b"0"]
            found = await mq.take_messages(await consuming_one.get_queue(queue), 3, within=20)
            assert sorted(message.body for message in found) == [b"1", b"2", b"3"], "unknown was not: lost"
            async with alarm(rabbit):
                task = asyncio.create_task(offer(10, 30))
                await mq.until(lambda: limiter.in_flight == 1)
                await asyncio.to_thread(rabbit.nodes[0].kill)
                await asyncio.wait_for(task, 30)
                assert words[-1].startswith(("Unknown", "NotSent"))
            await asyncio.to_thread(rabbit.nodes[0].restart)
            await offer(11, 30)
            assert words[-1] == "confirmed"
            assert limiter.in_flight == 0


# Shedding.


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, None),
        ({"deadline": 1_000_000_100}, None),
        ({"deadline": 1_000_000_099}, "deadline"),
        ({"sent": 999_990_000}, None),
        ({"sent": 999_989_999}, "sent"),
        ({"sent": 999_989_999, "deadline": 2_000_000_000}, "sent"),
        ([("deadline", b"1000000099"), ("other", b"x")], "deadline"),
        ([("deadline", b"1000000100")], None),
    ],
    ids=str,
)
async def test_what_is_late(headers: Any, reason: str | None) -> None:
    """A tenth of a second of work, and nothing older than ten."""

    async def nothing(message: Any) -> None:
        pass

    assert Shedder(nothing, seconds=0.1, max_age=10, clock=Time()).late(headers) == reason


@pytest.mark.parametrize("value", [1.5e9, "soon", None, b"soon", b"", b"-1"], ids=repr)
async def test_a_deadline_that_is_no_integer_is_an_error_and_not_shed(value: Any) -> None:
    async def nothing(message: Any) -> None:
        raise AssertionError

    shedder = Shedder(nothing)
    with pytest.raises(ValueError, match="the header deadline is ms since 1970, an integer"):
        shedder.late({"deadline": value})
    assert not shedder.shed


async def test_the_headers_of_a_sender_are_integers_in_ms() -> None:
    assert deadline(0.25, Time()) == {"sent": 1_000_000_000, "deadline": 1_000_000_250}


async def test_ten_thousand_messages_shed_handled_and_dead_lettered_are_all_there_is(rabbit: mq.RabbitMQ) -> None:
    """A third is late, a hundredth fails, one has a header that nobody can read: each is counted once."""
    letters, queue = rabbit.name("letters"), rabbit.name("shed")
    await mq.declare(rabbit, letters, durable=True)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": letters}
    await mq.declare(rabbit, queue, durable=True, arguments=arguments)
    ledger, handled, told = mq.Ledger(), list[int](), list[tuple[int, str]]()

    async def handle(message: AbstractIncomingMessage) -> None:
        number = int(message.body)
        if number % 100 == 7:
            raise RuntimeError("the handler failed")
        handled.append(number)

    def hear(message: AbstractIncomingMessage, reason: str) -> None:
        told.append((int(message.body), reason))

    messages = [json_message(number, headers=deadline(-1 if number % 3 == 0 else 3600)) for number in range(10_000)]
    messages[1].headers["deadline"] = 1.5
    shedder = Shedder(handle, told=hear)
    async with mq.channel(rabbit) as channel:
        await mq.pump_messages(channel.default_exchange, queue, messages, ledger=ledger)
        async with consuming(rabbit, queue, shedder, prefetch=100) as consumer:
            await mq.until(lambda: len(handled) + shedder.shed.total() + consumer.errors == 10_000, within=40)
        await mq.until(lambda: dead(rabbit, letters, consumer.errors))
        dead_lettered = [
            int(m.body) for m in await mq.take_messages(await channel.get_queue(letters), 10_000, within=0)
        ]
    for number in (*handled, *(number for number, _ in told), *dead_lettered):
        ledger.received(number)
    assert ledger.exact
    assert shedder.shed == {"deadline": 3334}
    assert sorted(told) == [(number, "deadline") for number in range(0, 10_000, 3)]
    assert sorted(dead_lettered) == sorted({1, *(n for n in range(7, 10_000, 100) if n % 3)})


async def dead(rabbit: mq.RabbitMQ, queue: str, count: int) -> bool:
    return await ready(rabbit, queue) == count


# Turns for tenants.


async def test_tenants_take_turns_whatever_each_has_put_in() -> None:
    turns = FairQueue[int]()
    for number in range(100):
        turns.put("noisy", number)
    for number in range(5):
        turns.put("quiet", number)
    served = [await turns.get() for _ in range(105)]
    assert [place for place, (tenant, _) in enumerate(served, 1) if tenant == "quiet"] == [2, 4, 6, 8, 10]
    assert [number for tenant, number in served if tenant == "noisy"] == list(range(100)), "each in its order"


async def test_by_weight_and_who_was_away_has_saved_nothing_up() -> None:
    turns = FairQueue[int](1000, weights={"paying": 3})
    for number in range(300):
        turns.put("paying", number)
        turns.put("free", number)
    first = Counter([(await turns.get())[0] for _ in range(100)])
    assert first == {"paying": 75, "free": 25}
    for number in range(100):
        turns.put("late", number)
    more = Counter([(await turns.get())[0] for _ in range(100)])
    assert more["late"] == pytest.approx(20, abs=1), "a fifth, and not all that it missed"
    for _ in range(500):
        await turns.get()
    assert not turns.waiting
    assert not turns._finish, "nothing is kept of who is gone"


async def test_a_tenant_and_the_whole_are_bounded_and_the_error_says_which() -> None:
    turns = FairQueue[int](each=3, total=5)
    for number in range(3):
        turns.put("a", number)
    with pytest.raises(Full, match="3 items of tenant 'a' wait, 3 may; of all 3, 5 may"):
        turns.put("a", 3)
    turns.put("b", 0)
    turns.put("c", 0)
    with pytest.raises(Full, match="0 items of tenant 'd' wait, 3 may; of all 5, 5 may"):
        turns.put("d", 0)
    await turns.get()
    turns.put("d", 0)
    assert turns.waiting.total() == 5


async def test_a_cancelled_get_takes_nobodys_turn() -> None:
    turns = FairQueue[str]()
    getting = [asyncio.create_task(turns.get()) for _ in range(3)]
    await turns_of_the_loop()
    getting[0].cancel()
    turns.put("a", "one")
    getting[1].cancel()
    turns.put("a", "two")
    assert await asyncio.wait_for(getting[2], 5) == ("a", "one")
    assert await asyncio.wait_for(turns.get(), 5) == ("a", "two")


@pytest.mark.parametrize("options", [{"each": 0}, {"total": 0}, {"weights": {"a": 0}}, {"weights": {"a": -1}}], ids=str)
async def test_turns_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limits are at least 1, weights above 0"):
        FairQueue[int](**options)
