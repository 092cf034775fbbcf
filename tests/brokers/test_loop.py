"""The entry points work with an event loop running and without one (B03), and nobody patches asyncio for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

import mqlib as mq
from tests.conftest import ROOT
from tests.processes import clean_environment


@pytest.fixture
def handed(own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ) -> dict[str, str]:
    return clean_environment(**own_kafka.environment, **own_rabbit.environment)


SYNC_CELL = """
import asyncio, sys
import mqlib as mq
assert asyncio.get_running_loop().is_running()
kafka, rabbit = mq.kafka(), mq.rabbitmq()
print(kafka.running, rabbit.running)
"""
AWAIT_CELL = """
topic = await mq.topic(kafka, "cell")
async with mq.producer(mq.kafka()) as producer:
    await producer.send_and_wait(topic, b"x")
print(len(await mq.read(kafka, topic)))
async with mq.channel(mq.rabbitmq()) as channel:
    queue = await channel.declare_queue(rabbit.name("cell"))
    print((await mq.depth(rabbit, queue.name)).consumers)
kafka.clean_up()
rabbit.clean_up()
"""
PRIVATE_CELL = """
own = mq.kafka(private=True)
own.nodes[0].restart()
print(own.running)
own.stop()
print(own.running)
"""
PATCHED_CELL = """
print(hasattr(asyncio, "_nest_patched"))
nothing = asyncio.sleep(0)
try:
    asyncio.run(nothing)
except RuntimeError as error:
    print(str(error))
nothing.close()
"""


def test_every_cell_of_a_real_kernel(handed: dict[str, str], tmp_path: Path) -> None:
    """A kernel runs its cells inside a loop: synchronous calls, awaited ones, and a broker of its own."""
    cells = [SYNC_CELL, AWAIT_CELL, PRIVATE_CELL, PATCHED_CELL]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source=cell) for cell in cells])
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}},
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )  # fmt: skip
    client.execute(
        env={**handed, "MQLIB_NAMESPACE": "loop", "MQLIB_PROVIDER": "", "DOCKER_HOST": "unix:///nonexistent"}
    )
    outputs = [cell.outputs for cell in notebook.cells]
    assert [output for each in outputs for output in each if output.get("name") != "stdout"] == [], (
        "not a word on stderr"
    )
    texts = ["".join(output["text"] for output in each) for each in outputs]
    assert texts[0].splitlines()[-1] == "True True"
    assert texts[1].splitlines() == ["1", "0"]
    assert texts[2].splitlines() == ["True", "False"]
    assert texts[3].splitlines() == ["False", "asyncio.run() cannot be called from a running event loop"]


def test_plain_code_and_code_inside_asyncio_run(handed: dict[str, str]) -> None:
    code = """
import asyncio, sys, warnings
warnings.simplefilter("error")
import mqlib as mq
first = mq.kafka(), mq.rabbitmq()
async def main():
    return mq.kafka(), mq.rabbitmq()
assert asyncio.run(main()) == first
mq.brokers._shared.clear()
again = asyncio.run(main())
assert again != first and all(broker.running for broker in again)
print("nest_asyncio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=handed, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "False"


async def test_other_tasks_are_not_needed_for_it(own_kafka: mq.Kafka, clean: pytest.MonkeyPatch) -> None:
    """It does not run in the caller's loop, so it cannot wait for a task that cannot run meanwhile."""
    for name, value in own_kafka.environment.items():
        clean.setenv(name, value)
    waiting = asyncio.create_task(asyncio.sleep(0))
    assert mq.kafka().running
    assert not waiting.done(), "no task of the caller's ran in between"
    await waiting
