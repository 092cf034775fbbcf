"""Brokers of somebody else: addresses travel by the environment, leaving deletes what was named and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

import mqlib as mq
from mqlib.brokers import STARTED_BY, external
from mqlib.queues import management
from tests.brokers import contract, servers
from tests.brokers.conftest import told
from tests.conftest import ROOT
from tests.processes import clean_environment, python_m_mqlib

WITHIN = 15.0
NAMESPACE = "class.anna"


def in_another_process(code: str, environment: dict[str, str]) -> str:
    """Runs a program with these variables; returns what it printed. It must be silent on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment(**environment), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def both(own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ, clean: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that hands both brokers to another process; it is set in this one, too."""
    environment = {**own_kafka.environment, **own_rabbit.environment, "MQLIB_NAMESPACE": NAMESPACE}
    for name, value in environment.items():
        clean.setenv(name, value)
    return environment


async def topics(kafka: mq.Kafka) -> set[str]:
    async with mq.consumer(kafka) as consumer:
        return {name for name in await consumer.topics() if not name.startswith("__")}


async def queues_and_exchanges(rabbit: mq.RabbitMQ) -> set[str]:
    found = [*await management(rabbit, "/queues"), *await management(rabbit, "/exchanges")]
    return {each["name"] for each in found}


# The way there.


async def test_the_environment_of_a_broker_makes_another_process_use_it(
    both: dict[str, str], own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ
) -> None:
    topic, queue = await mq.topic(own_kafka, "handed"), own_rabbit.name("handed")
    async with mq.channel(own_rabbit) as channel:
        await contract.declare(channel, queue)
    code = f"""
import asyncio, json, mqlib as mq
kafka, rabbit = mq.kafka(), mq.rabbitmq()
async def main():
    async with mq.producer(kafka) as producer:
        await producer.send_and_wait({topic!r}, b"from the other")
    async with mq.channel(rabbit) as channel:
        await channel.default_exchange.publish(__import__("aio_pika").Message(b"from the other"), {queue!r})
    return (await mq.depth(rabbit, {queue!r})).consumers
consumers = asyncio.run(main())
print(json.dumps([str(kafka.version), str(rabbit.version), kafka.environment | rabbit.environment, consumers]))
"""
    *lines, last = in_another_process(code, both).splitlines()
    kafka_version, rabbit_version, environment, consumers = json.loads(last)
    assert lines == [
        f"Kafka {own_kafka.version}, external (MQLIB_KAFKA_BOOTSTRAP is set)",
        f"RabbitMQ {own_rabbit.version}, external (MQLIB_RABBITMQ_URL is set)",
    ]
    assert (kafka_version, rabbit_version, consumers) == (str(own_kafka.version), str(own_rabbit.version), 0)
    assert environment == {name: value for name, value in both.items() if name != "MQLIB_NAMESPACE"}, "and hands it on"
    assert await contract.values(own_kafka, topic) == [b"from the other"]
    assert await contract.bodies(own_rabbit, queue) == [b"from the other"]


async def test_an_external_broker_is_not_ours_to_break(both: dict[str, str]) -> None:
    kafka, rabbit = mq.kafka(), mq.rabbitmq()
    assert (kafka.provider, rabbit.provider) == ("external", "external")
    for broker in (kafka, rabbit):
        assert broker.settings == {}
        assert list(broker.nodes) == []
        assert broker.running
    with pytest.raises(mq.BrokerError, match=r"mq\.kafka\(private=True\)"):
        async with mq.proxy(kafka):
            pass


def test_the_version_of_kafka_is_what_was_told_or_the_least_that_it_can_be(
    both: dict[str, str], clean: pytest.MonkeyPatch, own_kafka: mq.Kafka
) -> None:
    assert mq.kafka().version == own_kafka.version
    clean.setattr(mq.brokers, "_shared", {})
    clean.delenv("MQLIB_KAFKA_VERSION")
    assert (4, 0) <= mq.kafka().version <= own_kafka.version


@pytest.mark.parametrize("text", ["newest", "v4"])
def test_a_version_that_is_none_names_the_variable(both: dict[str, str], clean: pytest.MonkeyPatch, text: str) -> None:
    clean.setenv("MQLIB_KAFKA_VERSION", text)
    with pytest.raises(mq.BrokerUnavailable, match="MQLIB_KAFKA_VERSION"):
        mq.kafka()


def test_another_address_is_another_broker(both: dict[str, str], clean: pytest.MonkeyPatch) -> None:
    first = mq.kafka()
    assert mq.kafka() is first
    clean.setenv("MQLIB_KAFKA_BOOTSTRAP", f"127.0.0.1:{servers.closed_port()}")
    with pytest.raises(mq.BrokerUnavailable, match="nothing listens"):
        mq.kafka()


async def test_a_management_api_that_is_elsewhere(
    both: dict[str, str], clean: pytest.MonkeyPatch, own_rabbit: mq.RabbitMQ
) -> None:
    """By default it is looked for at RabbitMQ's usual port; where it is not, the message names the variable."""
    queue = own_rabbit.name("watched")
    async with mq.channel(own_rabbit) as channel:
        await contract.declare(channel, queue)
    assert (await mq.depth(mq.rabbitmq(), queue)).ready == 0
    clean.setattr(mq.brokers, "_shared", {})
    clean.delenv("MQLIB_RABBITMQ_MANAGEMENT_URL")
    clean.delenv("MQLIB_RABBITMQ_METRICS_URL")
    rabbit = mq.rabbitmq()
    assert rabbit.management_url == "http://guest:guest@127.0.0.1:15672"
    assert rabbit.metrics_url == "http://127.0.0.1:15692/metrics"
    rabbit.management_url = (
        f"http://guest:guest@127.0.0.1:{servers.closed_port()}"  # as if nothing were there, for sure
    )
    with pytest.raises(mq.BrokerError, match="MQLIB_RABBITMQ_MANAGEMENT_URL"):
        await mq.depth(rabbit, queue)


async def test_a_management_api_with_a_slash_at_the_end(
    both: dict[str, str], clean: pytest.MonkeyPatch, own_rabbit: mq.RabbitMQ
) -> None:
    clean.setenv("MQLIB_RABBITMQ_MANAGEMENT_URL", f"{own_rabbit.management_url}/")
    assert await contract.running_servers(mq.rabbitmq()) == 1


# The way out.


async def test_leaving_kafka_deletes_what_was_named_and_nothing_else(both: dict[str, str], own_kafka: mq.Kafka) -> None:
    others = await mq.topic(own_kafka, "others")
    before = await topics(own_kafka)
    kafka = mq.kafka()
    named = [await mq.topic(kafka, "mine"), await mq.topic(kafka, "mine")]
    kafka.name("a-group-not-a-topic")
    assert all(name.startswith(f"{NAMESPACE}.mine.") for name in named)
    assert await topics(own_kafka) == before | set(named)
    kafka.stop()
    await mq.until(lambda: topics_are(own_kafka, before), within=10)
    assert others in before
    assert kafka.running, "the broker stays"
    await contract.first_record(kafka)
    kafka.clean_up()
    await mq.until(lambda: topics_are(own_kafka, before), within=10)


async def topics_are(kafka: mq.Kafka, wanted: set[str]) -> bool:
    return await topics(kafka) == wanted


async def test_leaving_rabbitmq_deletes_what_was_named_and_nothing_else(
    both: dict[str, str], own_rabbit: mq.RabbitMQ
) -> None:
    async with mq.channel(own_rabbit) as channel:
        await contract.declare(channel, own_rabbit.name("others"))
    before = await queues_and_exchanges(own_rabbit)
    rabbit = mq.rabbitmq()
    queue, exchange = rabbit.name("mine"), rabbit.name("mine")
    rabbit.name("never-made")
    async with mq.channel(rabbit) as channel:
        await contract.declare(channel, queue, **contract.QUORUM)
        await channel.declare_exchange(exchange, durable=True)
    assert await queues_and_exchanges(own_rabbit) == before | {queue, exchange}
    rabbit.stop()
    assert await queues_and_exchanges(own_rabbit) == before


async def test_a_process_that_just_ends_leaves_nothing_on_a_shared_broker(
    both: dict[str, str], own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ
) -> None:
    before = await topics(own_kafka), await queues_and_exchanges(own_rabbit)
    code = """
import asyncio, mqlib as mq
kafka, rabbit = mq.kafka(), mq.rabbitmq()
async def main():
    name = await mq.topic(kafka, "left")
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("left"), durable=True)
        exchange = await channel.declare_exchange(rabbit.name("left"), durable=True)
    print(name, queue.name, exchange.name)
asyncio.run(main())
"""
    made = in_another_process(code, both).splitlines()[-1].split()
    assert len(made) == 3
    assert all(name.startswith(f"{NAMESPACE}.left.") for name in made)
    await mq.until(lambda: topics_are(own_kafka, before[0]), within=10)
    assert await queues_and_exchanges(own_rabbit) == before[1]


def test_leaving_a_broker_that_is_gone_neither_fails_nor_takes_long(
    both: dict[str, str], clean: pytest.MonkeyPatch
) -> None:
    """A server that went away while a notebook was open must not hold up the end of its kernel."""
    assert 2 * external.CLEAN_UP_SECONDS < WITHIN
    clean.setattr(external, "CLEAN_UP_SECONDS", 1.0)
    with servers.black_hole() as hole:
        kafka, rabbit = mq.kafka(), mq.rabbitmq()
        kafka.name("orders"), rabbit.name("orders")
        kafka.bootstrap = f"127.0.0.1:{hole}"
        rabbit.url = f"amqp://127.0.0.1:{hole}/"
        start = time.monotonic()
        kafka.stop()
        rabbit.stop()
        assert time.monotonic() - start < WITHIN


# The commands: one message, soon, on stderr.


def command_fails(environment: dict[str, str], *words: str) -> None:
    start = time.monotonic()
    done = python_m_mqlib("run", "04", environment=clean_environment(**environment))
    assert time.monotonic() - start < WITHIN
    assert done.returncode == 1
    assert done.stdout.startswith("Starting the brokers …\n")
    assert "are ready" not in done.stdout
    assert done.stderr.startswith("mqlib: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_command_without_kafka(both: dict[str, str]) -> None:
    address = f"127.0.0.1:{servers.closed_port()}"
    command_fails({**both, "MQLIB_KAFKA_BOOTSTRAP": address}, f"nothing listens on {address}", "MQLIB_KAFKA_BOOTSTRAP")


def test_a_command_with_a_kafka_that_advertises_an_address_that_is_dead(
    both: dict[str, str], own_kafka: mq.Kafka
) -> None:
    assert own_kafka.proxy_ports is not None
    behind, advertised = own_kafka.proxy_ports
    command_fails({**both, "MQLIB_KAFKA_BOOTSTRAP": f"127.0.0.1:{behind}"}, f"127.0.0.1:{advertised}")


def test_a_command_whose_kafka_never_answers(both: dict[str, str]) -> None:
    with servers.black_hole() as hole:
        command_fails({**both, "MQLIB_KAFKA_BOOTSTRAP": f"127.0.0.1:{hole}"}, "does not answer as Kafka")


def test_a_command_with_a_wrong_password(both: dict[str, str], own_rabbit: mq.RabbitMQ) -> None:
    url = f"amqp://guest:wrong@127.0.0.1:{urlsplit(own_rabbit.url).port}/"
    command_fails({**both, "MQLIB_RABBITMQ_URL": url}, "it refuses the user 'guest'", "MQLIB_RABBITMQ_URL")


def test_a_command_with_a_namespace_that_cannot_be(both: dict[str, str]) -> None:
    command_fails({**both, "MQLIB_NAMESPACE": "room 3"}, "MQLIB_NAMESPACE is 'room 3'")


def test_what_lab_started_is_named_in_the_line(both: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with told(**both, **{STARTED_BY: "started by mqlib lab; process"}):
        kafka = mq.kafka()
    assert capsys.readouterr().out == f"Kafka {kafka.version}, external (started by mqlib lab; process)\n"
    assert STARTED_BY not in os.environ
