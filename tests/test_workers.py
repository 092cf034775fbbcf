"""A function in a process of its own: it reports, fails, crashes and ends as said."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import mqlib as mq
from tests.conftest import ROOT
from tests.kernel import run_cells


async def consume(kafka: Any, topic: str, group: str, count: int, crash_at: int) -> None:
    """Handles records, and crashes at one: handled, and not committed."""
    from aiokafka import TopicPartition

    import mqlib

    async with mqlib.consumer(
        kafka, topic, group_id=group, enable_auto_commit=False, session_timeout_ms=1000, heartbeat_interval_ms=300
    ) as consumer:
        for record in await mqlib.take(consumer, count, within=30):
            print("handled", record.offset)
            if record.offset == crash_at:
                mqlib.crash()
            await consumer.commit({TopicPartition(topic, 0): record.offset + 1})


def forever() -> None:
    import time

    print("here")
    time.sleep(600)


def wrong(text: str) -> None:
    raise KeyError(text)


async def test_a_consumer_crashes_at_the_chosen_point(kafka: mq.Kafka) -> None:
    """What it had printed is there, nothing after; the next member gets what it had not committed again."""
    topic, group = await mq.topic(kafka, "crash"), kafka.name("crash")
    async with mq.producer(kafka) as producer:
        await mq.pump(producer, topic, [b"%d" % number for number in range(10)])
    async with mq.worker(consume, kafka, topic, group, 10, 4) as worker:
        assert await worker.printed("handled 2", within=30) == "handled 2"
        await worker.ended(within=30)
        assert worker.crashed
        assert not worker.running
        assert worker.lines == [f"handled {offset}" for offset in range(5)]
    assert (await mq.group_lag(kafka, group)).total == 6, "offsets 4 to 9 were not committed"
    async with mq.worker(consume, kafka, topic, group, 6, -1) as worker:
        await worker.printed("handled 9", within=60)  # the crashed member must be missed first
        assert worker.lines == [f"handled {offset}" for offset in range(4, 10)]


async def test_rabbitmq_gets_back_what_a_crashed_process_held(rabbit: mq.RabbitMQ) -> None:
    """Unacknowledged messages of a killed consumer return to the queue, marked as redelivered."""
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("held"))
        await mq.pump_messages(channel.default_exchange, queue.name, [b"a", b"b"])

        async with mq.worker(hold, rabbit, queue.name) as worker:
            await worker.printed("holding 2")
            assert await mq.take_messages(queue, 2, within=0) == []
            worker.kill()
            again = await mq.take_messages(queue, 2)
        assert [(message.body, message.redelivered) for message in again] == [(b"a", True), (b"b", True)]


async def hold(rabbit: Any, name: str) -> None:
    import asyncio

    import mqlib

    async with mqlib.channel(rabbit) as channel:
        queue = await channel.get_queue(name)
        print("holding", len(await mqlib.take_messages(queue, 2, ack=False)))
        await asyncio.sleep(600)


async def test_its_error_is_the_error_of_the_block() -> None:
    """With the end of its traceback; in whatever way the block waits for it."""
    with pytest.raises(mq.WorkerFailed, match="KeyError: 'ö'"):
        async with mq.worker(wrong, "ö") as worker:
            await worker.ended()
    with pytest.raises(mq.WorkerFailed, match="KeyError"):
        async with mq.worker(wrong, "x") as worker:
            await worker.printed("anything")
    with pytest.raises(mq.WorkerFailed, match="KeyError"):
        async with mq.worker(wrong, "x") as worker:
            await mq.until(lambda: not worker.running)
    async with mq.worker(quick) as worker:
        with pytest.raises(mq.WorkerFailed, match="without printing 'never'"):
            await worker.printed("never")
        assert await worker.ended() == 0


def quick() -> None:
    print("done")


async def test_whatever_still_runs_is_killed_at_the_end_of_the_block() -> None:
    tasks = asyncio.all_tasks()
    with contextlib.suppress(ZeroDivisionError):
        async with mq.worker(forever) as worker:
            await worker.printed("here")
            raise ZeroDivisionError
    assert not worker.running
    async with mq.worker(forever) as worker:
        with pytest.raises(TimeoutError):
            await worker.printed("nothing", within=0.1)
        with pytest.raises(TimeoutError):
            await worker.ended(within=0.1)
    assert worker.crashed
    assert asyncio.all_tasks() == tasks


async def test_it_ends_with_the_process_that_started_it() -> None:
    """Also when that one is killed with SIGKILL."""
    script = (
        "import asyncio\nimport mqlib as mq\nfrom tests.test_workers import forever\n"
        "async def main():\n"
        "    async with mq.worker(forever) as worker:\n"
        "        await worker.printed('here')\n"
        "        print(worker._process.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    worker = psutil.Process(int(owner.stdout.readline()))
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    await mq.until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, within=10)


async def test_variables_of_the_function_around_are_refused() -> None:
    number = 1

    def closure() -> None:
        print(number)

    with pytest.raises(ValueError, match="closure uses number of the function around it: hand them over"):
        async with mq.worker(closure):
            pytest.fail("it cannot run")


def test_a_function_of_a_cell_runs(tmp_path: Path) -> None:
    """Its source comes from the notebook, and what it prints comes back."""
    cell = """\
import mqlib as mq

def double(number):
    print(2 * number)

async with mq.worker(double, 21) as worker:
    await worker.ended()
print(worker.lines)"""
    [[output]] = run_cells(tmp_path, cell)
    assert output.get("text") == "['42']\n", output
