"""The official images in containers, held to the same contract as the processes.

Skipped, with the reason, where no Docker engine answers or has the images. With MQLIB_EXPECT_CONTAINERS set, it fails.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

import mqlib as mq
from mqlib.brokers import container
from mqlib.brokers.versions import KAFKA_VERSION
from tests.brokers import contract
from tests.brokers.conftest import CACHED, told
from tests.processes import GONE_SECONDS, PARALLEL_START, Program, eventually

Start = Callable[..., mq.Kafka | mq.RabbitMQ]
KINDS = pytest.mark.parametrize("start", [mq.kafka, mq.rabbitmq], ids=["kafka", "rabbitmq"])
NO_IMAGE = "127.0.0.1:1/mqlib/none:1"
"""An image of a registry at which nobody listens: it is not here, and cannot be pulled."""


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[Any]:
    """A client of the engine; without one, and without the images, these tests have nothing to ask."""
    CACHED.cache_clear()
    problem = CACHED("kafka") or CACHED("rabbitmq")
    if problem:
        # Docker is no requirement of the project: without it these skip, but CI starts an engine, and there they fail.
        (pytest.fail if os.environ.get("MQLIB_EXPECT_CONTAINERS") else pytest.skip)(problem)
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def in_containers(clean: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    clean.setenv("MQLIB_PROVIDER", "container")
    return clean


@pytest.fixture(scope="module")
def kafka() -> Iterator[mq.Kafka]:
    with told(MQLIB_PROVIDER="container"):
        broker = mq.kafka(settings={"log.retention.ms": "123456", "message.max.bytes": "2000"})
    with broker:
        yield broker


@pytest.fixture(scope="module")
def rabbit() -> Iterator[mq.RabbitMQ]:
    with told(MQLIB_PROVIDER="container"):
        broker = mq.rabbitmq(settings={"consumer_timeout": "1500"})
    with broker:
        yield broker


def containers(engine: Any, *brokers: mq.Kafka | mq.RabbitMQ) -> list[Any]:
    """The engine's own view of the servers."""
    return [engine.containers.get(node.name) for broker in brokers for node in broker.nodes]


def left(engine: Any, names: set[str]) -> set[str]:
    """Which of these containers, or of the networks that clusters of them had, the engine still has."""
    found = {each.name for each in engine.containers.list(all=True, ignore_removed=True)}
    networks = {each.name for each in engine.networks.list()}
    return (found & names) | (networks & {name.rpartition("-")[0] for name in names})


# Brokers that nothing is done to.


async def test_kafka_is_ready_when_it_is_there(kafka: mq.Kafka) -> None:
    assert kafka.provider == "container"
    assert str(kafka.version) == KAFKA_VERSION
    await contract.first_record(kafka)


async def test_rabbitmq_is_ready_when_it_is_there_and_is_a_new_one(rabbit: mq.RabbitMQ) -> None:
    assert rabbit.provider == "container"
    assert rabbit.version >= (4, 0)
    await contract.metrics_are_told(rabbit)
    await contract.first_message(rabbit)


def test_ports_are_published_on_loopback_only(engine: Any, kafka: mq.Kafka, rabbit: mq.RabbitMQ) -> None:
    for each in containers(engine, kafka, rabbit):
        published = [address["HostIp"] for several in each.ports.values() for address in several or []]
        assert published
        assert set(published) == {"127.0.0.1"}


async def test_a_proxy_reaches_kafka_in_its_container(kafka: mq.Kafka) -> None:
    topic = await mq.topic(kafka, "proxied")
    async with mq.proxy(kafka) as proxy, mq.producer(proxy) as producer:
        await producer.send_and_wait(topic, b"through")
        assert proxy.up > 0
    assert await contract.values(kafka, topic) == [b"through"]


async def test_settings_of_kafka_are_applied_and_listed(kafka: mq.Kafka) -> None:
    await contract.settings_are_what_is_said(kafka, log_retention_ms="123456", message_max_bytes="2000")


async def test_settings_of_rabbitmq_are_applied_and_listed(rabbit: mq.RabbitMQ) -> None:
    await contract.acknowledgement_times_out(rabbit)


async def test_kafka_survives_faults(kafka: mq.Kafka) -> None:
    await contract.topic_survives_faults(kafka)


async def test_rabbitmq_survives_faults(rabbit: mq.RabbitMQ) -> None:
    await contract.queue_survives_faults(rabbit)


def test_a_node_shows_its_own_log(kafka: mq.Kafka, rabbit: mq.RabbitMQ) -> None:
    assert len(kafka.nodes[0].log(3).splitlines()) == 3
    assert "rabbit" in rabbit.nodes[0].log(50).lower()


# Clusters.


async def test_a_kafka_cluster_loses_a_server_and_goes_on(engine: Any, in_containers: pytest.MonkeyPatch) -> None:
    with mq.kafka(nodes=3) as cluster:
        names = {node.name for node in cluster.nodes}
        await contract.cluster_survives_a_server(cluster, 0)
        assert len(left(engine, names)) == 4, "three servers and their network"
    assert left(engine, names) == set()


async def test_a_rabbitmq_cluster_loses_a_server_and_goes_on(engine: Any, in_containers: pytest.MonkeyPatch) -> None:
    with mq.rabbitmq(nodes=3) as cluster:
        names = {node.name for node in cluster.nodes}
        await contract.quorum_survives_a_server(cluster, 2)
        assert len(left(engine, names)) == 4
    assert left(engine, names) == set()


# The end.


@KINDS
def test_stop_leaves_no_container_and_it_ends_with_its_variable(
    engine: Any, in_containers: pytest.MonkeyPatch, start: Start
) -> None:
    broker = start(private=True)
    names = {node.name for node in broker.nodes}
    assert left(engine, names) == names
    broker.stop()
    assert left(engine, names) == set()
    assert broker.running is False
    broker.stop()


def test_it_ends_with_the_variable_that_holds_it(engine: Any, in_containers: pytest.MonkeyPatch) -> None:
    broker = mq.rabbitmq(private=True)
    names = {node.name for node in broker.nodes}
    del broker
    gc.collect()
    assert left(engine, names) == set()


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_program_that_is_killed_leaves_no_container_and_no_network(engine: Any, tmp_path: Path, nodes: int) -> None:
    code = f"""
import mqlib as mq
kafka, rabbit = mq.kafka(nodes={nodes}, private=True), mq.rabbitmq(private=True)
print("ready")
print(*[node.name for broker in (kafka, rabbit) for node in broker.nodes])
input()
"""
    with Program(code, tmp_path, {"MQLIB_PROVIDER": "container"}) as program:
        program.await_ready()
        names = set(program.line().split())
        assert left(engine, names) >= names
        program.process.send_signal(signal.SIGKILL)
        program.process.wait()
        eventually(lambda: not left(engine, names), within=GONE_SECONDS)
        program.traces.assert_gone()


def test_a_program_that_is_killed_while_its_containers_start(engine: Any, tmp_path: Path) -> None:
    """There is no moment at which a container exists that nobody would remove."""
    before = {each.name for each in engine.containers.list(all=True, ignore_removed=True)}

    def fresh() -> set[str]:
        every = {each.name for each in engine.containers.list(all=True, ignore_removed=True)}
        return {name for name in every - before if name.startswith("mqlib-")}

    with Program(f"{PARALLEL_START}\nprint('ready')\n", tmp_path, {"MQLIB_PROVIDER": "container"}) as program:
        names = eventually(fresh, within=60)
        program.process.kill()
        program.process.wait()
        eventually(lambda: not left(engine, names | fresh()), within=GONE_SECONDS)
        program.traces.assert_gone()


def test_containers_whose_guardian_was_killed_go_with_their_owner(engine: Any, tmp_path: Path) -> None:
    """Nobody ends them at once, since a container is no child; but a program that ends by itself removes them."""
    code = """
import mqlib as mq
rabbit = mq.rabbitmq(private=True)
print("ready")
print(rabbit.nodes[0].name)
input()
"""
    with Program(code, tmp_path, {"MQLIB_PROVIDER": "container"}) as program:
        program.await_ready()
        name = program.line()
        [guardian] = [each for each in program.traces.noted if "guardian.py" in " ".join(each.cmdline())]
        guardian.kill()
        assert program.finish() == 0
        try:
            assert left(engine, {name}) == set()
        finally:
            for each in left(engine, {name}):
                engine.containers.get(each).remove(force=True, v=True)


# Starts that fail.


@pytest.mark.parametrize(
    ("start", "settings", "words"),
    [
        (mq.kafka, {"log.retention.ms": "nonsense"}, "nonsense"),
        (mq.rabbitmq, {"no.such.key": "1"}, "no.such.key"),
    ],
    ids=["kafka", "rabbitmq"],
)
def test_a_start_that_fails_shows_the_brokers_own_words_and_leaves_nothing(
    engine: Any, in_containers: pytest.MonkeyPatch, start: Start, settings: dict[str, str], words: str
) -> None:
    kept: list[str] = []
    launch = container._launch

    def noting(estate: Any, name: str, made: Any) -> Any:
        kept.append(name)
        return launch(estate, name, made)

    in_containers.setattr(container, "_launch", noting)
    with pytest.raises(mq.BrokerUnavailable) as failure:
        start(settings=settings)
    assert words in str(failure.value)
    assert kept
    assert left(engine, set(kept)) == set()


@pytest.fixture
def no_image(clean: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    clean.setattr(container, "IMAGES", {"kafka": NO_IMAGE, "rabbitmq": NO_IMAGE})
    return clean


def test_an_image_that_cannot_be_had_is_a_reason_for_a_process(
    no_image: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kafka = mq.kafka()
    assert kafka.provider == "process"
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Kafka {KAFKA_VERSION}, process (Docker answers, but {NO_IMAGE} is not here and cannot be")
    assert kafka.running


@KINDS
def test_an_image_that_cannot_be_had_where_containers_are_forced(no_image: pytest.MonkeyPatch, start: Start) -> None:
    no_image.setenv("MQLIB_PROVIDER", "container")
    with pytest.raises(mq.BrokerUnavailable, match=f"MQLIB_PROVIDER is container, but .*{NO_IMAGE} is not here"):
        start()
