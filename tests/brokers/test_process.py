"""The brokers as local processes: ready, on loopback, configured, breakable, and gone when they are to be gone."""

from __future__ import annotations

import contextlib
import gc
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import mqlib as mq
from mqlib import brokers
from mqlib.brokers import install, machine, ownership, process, starting
from mqlib.brokers.base import Node, Version
from mqlib.brokers.versions import KAFKA_VERSION
from tests.brokers import contract
from tests.brokers.conftest import told
from tests.processes import LOOPBACK, descendants, eventually, is_alive, listening, names

Start = Callable[..., mq.Kafka | mq.RabbitMQ]
KINDS = pytest.mark.parametrize("start", [mq.kafka, mq.rabbitmq], ids=["kafka", "rabbitmq"])


def servers() -> set[psutil.Process]:
    """The processes that this one's guardian has started."""
    return set(psutil.Process(ownership.guardian()._process.pid).children())


def ours(before: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """Every process that this one's guardian looks after; without those of the servers that ran `before`, since each
    RabbitMQ starts an Erlang of its own once a minute, for half a second, to see whether epmd is there."""
    found = []
    for server in servers() - set(before):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [server, *descendants(server.pid)]
    return found


# Brokers that nothing is done to.


async def test_kafka_is_ready_when_it_is_there(own_kafka: mq.Kafka) -> None:
    assert own_kafka.provider == "process"
    assert str(own_kafka.version) == KAFKA_VERSION
    await contract.first_record(own_kafka)


async def test_what_kafka_unpacks_for_its_codecs_lies_in_the_folder_that_is_deleted(own_kafka: mq.Kafka) -> None:
    """A JVM that is killed cannot delete it, and a broker is."""
    topic = await mq.topic(own_kafka, "compressed")
    for codec in ("lz4", "snappy", "zstd"):
        async with mq.producer(own_kafka, compression_type=codec) as producer:
            await producer.send_and_wait(topic, b"x" * 1000)
    [node] = own_kafka.nodes
    assert isinstance(node, process.ProcessNode)
    mapped = {each.path for each in psutil.Process(node.pid).memory_maps() if re.search("lz4-|snappy-", each.path)}
    assert len(mapped) == 2
    assert {Path(path).parent for path in mapped} == {node._folder}


async def test_rabbitmq_is_ready_when_it_is_there(own_rabbit: mq.RabbitMQ) -> None:
    assert own_rabbit.provider == "process"
    assert own_rabbit.version >= (3, 8)
    await contract.metrics_are_told(own_rabbit)
    await contract.first_message(own_rabbit)


def test_everything_listens_on_loopback_only(own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ) -> None:
    serving = ours()
    assert {"java", "beam.smp", "epmd"} <= names(serving)
    found = listening(serving)
    assert found
    assert found <= LOOPBACK


async def test_each_setting_that_kafka_says_it_has_it_has(own_kafka: mq.Kafka) -> None:
    await contract.settings_are_what_is_said(own_kafka, auto_create_topics_enable="false")


def test_all_jars_of_kafka_have_one_version(own_kafka: mq.Kafka) -> None:
    """A resolver that mixes versions of `kafka-clients` gives a broker that fails when it is used."""
    jars = [jar.name for jar in install.kafka_jars() if jar.name.startswith("kafka")]
    assert len(jars) > 3
    assert {name.removesuffix(".jar").rpartition("-")[2] for name in jars} == {KAFKA_VERSION}
    assert len(set(jars)) == len(jars)


def test_a_data_folder_is_readable_by_its_owner_only(own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ) -> None:
    for broker in (own_kafka, own_rabbit):
        [node] = broker.nodes
        assert isinstance(node, process.ProcessNode)
        folder = next(path for path in [node._folder, *node._folder.parents] if path.name.startswith("mqlib-"))
        assert folder.stat().st_mode & 0o077 == 0


def test_the_users_own_settings_do_not_leak_in(as_processes: pytest.MonkeyPatch) -> None:
    """`KAFKA_…`, `RABBITMQ_…` and Java's variables of the user would change what a lesson shows, or break the start."""
    for name in ("KAFKA_OPTS", "JAVA_TOOL_OPTIONS", "RABBITMQ_NODE_PORT", "RABBITMQ_CONFIG_FILE", "ERL_FLAGS"):
        as_processes.setenv(name, "nonsense")
    environment = process._environment(Path("/x"))
    assert set(environment) <= {"PATH", "LANG", "TMPDIR", "TZ", "HOME"}


# Sharing.


def test_a_shared_broker_is_one_and_is_printed_once(
    as_processes: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = mq.kafka()
    assert mq.kafka() is first
    assert capsys.readouterr().out == f"Kafka {KAFKA_VERSION}, process (MQLIB_PROVIDER is process)\n"
    first.nodes[0].kill()
    second = mq.kafka()
    assert second is not first, "a dead one is replaced"
    assert second.running
    assert mq.kafka() is second
    second.stop()
    assert second.running is False, "so a stopped one is replaced, too"


async def test_private_brokers_do_not_collide_and_nothing_is_shared_between_them(
    as_processes: pytest.MonkeyPatch, own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ
) -> None:
    with mq.kafka(private=True) as kafka, mq.rabbitmq(private=True) as rabbit:
        assert kafka is not own_kafka
        assert set(kafka.bootstrap.split(",")).isdisjoint(own_kafka.bootstrap.split(","))
        topic = await mq.topic(own_kafka, "here")
        await contract.first_record(kafka)
        await contract.first_message(rabbit)
        with pytest.raises(mq.BrokerError, match="has no topic"):
            await mq.end_offsets(kafka, topic)
        assert await contract.running_servers(rabbit) == 1
    assert own_kafka.running
    assert own_rabbit.running
    await contract.first_record(own_kafka)
    await contract.first_message(own_rabbit)


async def test_a_port_that_somebody_took_meanwhile_is_exchanged(
    as_processes: pytest.MonkeyPatch, temporary: Path
) -> None:
    """Between choosing a port and binding it another program may take it."""
    real = machine.free_ports
    with socket.socket() as occupant:
        occupant.bind((machine.HOST, 0))
        taken = iter([occupant.getsockname()[1]])
        as_processes.setattr(
            process, "free_ports", lambda count: [*(port for port in taken), *real(count)][:count]
        )  # only the first choice meets it
        with mq.kafka(private=True) as broker:
            await contract.first_record(broker)
            assert len(list(temporary.glob("mqlib-*"))) == 1, "nothing is left of the first attempt"


async def test_a_port_at_which_another_kafka_answers_is_exchanged_too(
    as_processes: pytest.MonkeyPatch, own_kafka: mq.Kafka
) -> None:
    """Two notebooks may choose the same port at the same moment: the second must not take the first's broker for its
    own."""
    real = machine.free_ports
    taken = iter([int(own_kafka.bootstrap.rpartition(":")[2])])
    as_processes.setattr(process, "free_ports", lambda count: [*(port for port in taken), *real(count)][:count])
    with mq.kafka(private=True) as broker:
        assert broker.bootstrap != own_kafka.bootstrap
        assert broker.running


# Settings and faults.


@pytest.fixture(scope="module")
def breakable_kafka() -> Iterator[mq.Kafka]:
    with told(MQLIB_PROVIDER="process"):
        broker = mq.kafka(settings={"log.retention.ms": "123456", "message.max.bytes": "2000"})
    with broker:
        yield broker


@pytest.fixture(scope="module")
def breakable_rabbit() -> Iterator[mq.RabbitMQ]:
    with told(MQLIB_PROVIDER="process"):
        broker = mq.rabbitmq(settings={"consumer_timeout": "1500"})
    with broker:
        yield broker


async def test_settings_of_kafka_are_applied_and_listed(breakable_kafka: mq.Kafka) -> None:
    await contract.settings_are_what_is_said(breakable_kafka, log_retention_ms="123456", message_max_bytes="2000")


async def test_settings_of_rabbitmq_are_applied_and_listed(breakable_rabbit: mq.RabbitMQ) -> None:
    await contract.acknowledgement_times_out(breakable_rabbit)


async def test_kafka_survives_faults(breakable_kafka: mq.Kafka) -> None:
    await contract.topic_survives_faults(breakable_kafka)


async def test_rabbitmq_survives_faults(breakable_rabbit: mq.RabbitMQ) -> None:
    await contract.queue_survives_faults(breakable_rabbit)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux says which thread has stopped")
def test_a_paused_server_has_stopped_with_all_its_threads(tmp_path: Path) -> None:
    """The signal is only the beginning: on a busy machine a thread may answer a client for a while after it."""
    work = "import threading as t\ndef on():\n while True: pass\nfor _ in range(8): t.Thread(target=on).start()"
    estate = ownership.Estate()
    node = process.ProcessNode("busy", estate, [sys.executable, "-c", work], {}, tmp_path, 0)
    node.start()
    try:
        threads = Path(f"/proc/{node.pid}/task")
        eventually(lambda: len(list(threads.iterdir())) == 9, within=20)
        for _ in range(20):
            node.pause()
            states = [file.read_text().rpartition(")")[2].split()[0] for file in threads.glob("*/stat")]
            node.resume()
            assert states == ["T"] * 9
    finally:
        estate.close()


def test_a_node_shows_its_own_log(breakable_kafka: mq.Kafka, breakable_rabbit: mq.RabbitMQ) -> None:
    assert "kafka.server" in breakable_kafka.nodes[0].log(50)
    assert "rabbit" in breakable_rabbit.nodes[0].log(50).lower()
    assert "\x1b" not in breakable_rabbit.nodes[0].log(1000), "no colours of a terminal in what a cell prints"
    assert len(breakable_kafka.nodes[0].log(3).splitlines()) == 3
    assert repr(breakable_kafka.nodes[0]) == "<node kafka-1>"


# Clusters.


@pytest.fixture(scope="module")
def kafka_cluster() -> Iterator[mq.Kafka]:
    with told(MQLIB_PROVIDER="process"):
        broker = mq.kafka(nodes=3)
    with broker:
        yield broker


@pytest.fixture(scope="module")
def rabbit_cluster() -> Iterator[mq.RabbitMQ]:
    with told(MQLIB_PROVIDER="process"):
        broker = mq.rabbitmq(nodes=3)
    with broker:
        yield broker


async def test_a_kafka_cluster_loses_a_server_and_goes_on(kafka_cluster: mq.Kafka) -> None:
    await contract.cluster_survives_a_server(kafka_cluster, 0)


async def test_a_kafka_cluster_loses_two_servers_and_both_come_back(kafka_cluster: mq.Kafka) -> None:
    """The first is ready while the second is still dead: two of three are a quorum."""
    first, second = kafka_cluster.nodes[1:]
    first.kill()
    second.kill()
    first.restart()
    second.restart()
    await contract.first_record(kafka_cluster)
    assert kafka_cluster.running


async def test_a_rabbitmq_cluster_loses_a_server_and_goes_on(rabbit_cluster: mq.RabbitMQ) -> None:
    await contract.quorum_survives_a_server(rabbit_cluster, 2)


async def test_a_rabbitmq_cluster_that_lost_its_first_server_still_answers(rabbit_cluster: mq.RabbitMQ) -> None:
    """A client that is given the whole cluster finds a server that lives."""
    rabbit_cluster.nodes[0].kill()
    try:
        await contract.first_message(rabbit_cluster)
    finally:
        rabbit_cluster.nodes[0].restart()
    assert rabbit_cluster.running


def test_clusters_listen_on_loopback_only(kafka_cluster: mq.Kafka, rabbit_cluster: mq.RabbitMQ) -> None:
    assert len(set(kafka_cluster.bootstrap.split(","))) == 3
    assert listening(ours()) <= LOOPBACK
    assert repr(kafka_cluster).endswith(", 3 nodes")


# The end, and starts that fail.


@KINDS
def test_stop_leaves_no_process_and_no_folder(as_processes: pytest.MonkeyPatch, temporary: Path, start: Start) -> None:
    before = servers()
    broker = start(private=True)
    serving = ours(before)
    assert serving
    assert list(temporary.glob("mqlib-*"))
    broker.stop()
    assert [each for each in serving if is_alive(each)] == []
    assert list(temporary.iterdir()) == []
    assert broker.running is False
    broker.stop()


def test_it_ends_with_the_variable_that_holds_it(as_processes: pytest.MonkeyPatch, temporary: Path) -> None:
    before = servers()
    broker = mq.kafka(private=True)
    serving = ours(before)
    assert serving
    del broker
    gc.collect()
    assert [each for each in serving if is_alive(each)] == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("start", "settings", "words"),
    [
        (mq.kafka, {"log.retention.ms": "nonsense"}, "nonsense"),
        (mq.rabbitmq, {"no.such.key": "1"}, "no.such.key"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or str(value),
)
def test_a_start_that_fails_shows_the_brokers_own_words_and_leaves_nothing(
    as_processes: pytest.MonkeyPatch, temporary: Path, start: Start, settings: dict[str, str], words: str
) -> None:
    before, begin = servers(), time.monotonic()
    with pytest.raises(mq.BrokerUnavailable) as failure:
        start(settings=settings)
    assert time.monotonic() - begin < 60
    assert words in str(failure.value)
    assert [each for each in ours(before) if is_alive(each)] == []
    assert list(temporary.iterdir()) == []


class Stub(Node):
    """A server that is there, and has written one line."""

    name = "stub-1"

    def kill(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def restart(self, graceful: bool = True) -> None: ...

    @property
    def running(self) -> bool:
        return True

    def log(self, lines: int = 20) -> str:
        return "I am waiting for something"


def test_a_start_that_never_gets_ready_says_what_was_tried_and_what_the_broker_wrote() -> None:
    def probe() -> Version:
        raise mq.BrokerUnavailable("nothing listens on 127.0.0.1:1")

    with pytest.raises(mq.BrokerUnavailable, match="stub-1 was not ready within 0 s") as failure:
        starting.await_ready([Stub()], probe, within=0.2)
    assert "nothing listens on 127.0.0.1:1" in str(failure.value)
    assert "I am waiting for something" in str(failure.value)


@KINDS
def test_a_disk_that_is_nearly_full_is_refused_at_once(
    as_processes: pytest.MonkeyPatch, temporary: Path, start: Start
) -> None:
    as_processes.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000_000))
    with pytest.raises(mq.BrokerUnavailable, match=r"only 100 MB are free in .* set TMPDIR"):
        start(private=True)
    assert list(temporary.iterdir()) == []


def test_a_broker_whose_guardian_was_killed_says_so_and_the_next_one_starts(as_processes: pytest.MonkeyPatch) -> None:
    """Its servers end with it (Linux), so what is shared must be started anew."""
    as_processes.setattr(ownership, "_guardian", None)  # one of its own: the others' must live
    broker = mq.kafka()
    guardian = psutil.Process(ownership.guardian()._process.pid)
    assert names(descendants(guardian.pid)) == {"java"}
    guardian.kill()
    guardian.wait(10)
    again = mq.kafka()
    assert again is not broker
    assert again.running
    assert re.match("Kafka", repr(again))
    broker.stop()
    assert brokers._shared
