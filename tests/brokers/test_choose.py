"""Which provider serves, in which order, and the reason that is printed; and Docker that is broken stays out of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mqlib as mq
from mqlib import brokers
from mqlib.brokers import STARTED_BY, Kind, choose, container
from tests.conftest import ROOT
from tests.processes import clean_environment

ADDRESSES: dict[Kind, tuple[str, str]] = {
    "kafka": ("MQLIB_KAFKA_BOOTSTRAP", "127.0.0.1:9092"),
    "rabbitmq": ("MQLIB_RABBITMQ_URL", "amqp://127.0.0.1/"),
}
BOTH: list[Kind] = ["kafka", "rabbitmq"]


@pytest.fixture
def docker(clean: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which Docker answers and has the images."""
    clean.setattr(container, "why_not", lambda kind: "")
    return clean


@pytest.fixture
def no_docker(clean: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which Docker is not installed."""
    clean.setattr(container, "why_not", lambda kind: "no Docker here")
    return clean


@pytest.mark.parametrize("kind", BOTH)
def test_an_address_in_the_environment_comes_first(docker: pytest.MonkeyPatch, kind: Kind) -> None:
    name, value = ADDRESSES[kind]
    docker.setenv(name, value)
    assert choose(kind) == ("external", f"{name} is set")


@pytest.mark.parametrize("kind", BOTH)
def test_then_docker(docker: pytest.MonkeyPatch, kind: Kind) -> None:
    assert choose(kind) == ("container", "Docker answers")


@pytest.mark.parametrize("kind", BOTH)
def test_then_a_process_with_the_reason_why_not_docker(no_docker: pytest.MonkeyPatch, kind: Kind) -> None:
    assert choose(kind) == ("process", "no Docker here")


def test_the_address_of_one_broker_says_nothing_about_the_other(no_docker: pytest.MonkeyPatch) -> None:
    no_docker.setenv(*ADDRESSES["kafka"])
    assert choose("kafka")[0] == "external"
    assert choose("rabbitmq")[0] == "process"


def test_an_empty_address_is_none(no_docker: pytest.MonkeyPatch) -> None:
    no_docker.setenv("MQLIB_KAFKA_BOOTSTRAP", "")
    no_docker.setenv("MQLIB_PROVIDER", "")
    assert choose("kafka") == ("process", "no Docker here")


def test_process_can_be_forced_where_docker_answers(docker: pytest.MonkeyPatch) -> None:
    docker.setenv("MQLIB_PROVIDER", "process")
    docker.setenv(*ADDRESSES["kafka"])
    assert choose("kafka") == ("process", "MQLIB_PROVIDER is process")


def test_forcing_a_process_does_not_ask_docker(clean: pytest.MonkeyPatch) -> None:
    def never(kind: str) -> str:
        raise AssertionError("asked")

    clean.setattr(container, "why_not", never)
    clean.setenv("MQLIB_PROVIDER", "process")
    assert choose("kafka")[0] == "process"


def test_container_can_be_forced_where_an_address_is_set(docker: pytest.MonkeyPatch) -> None:
    docker.setenv("MQLIB_PROVIDER", "container")
    docker.setenv(*ADDRESSES["kafka"])
    assert choose("kafka") == ("container", "MQLIB_PROVIDER is container")


def test_external_can_be_forced(docker: pytest.MonkeyPatch) -> None:
    docker.setenv("MQLIB_PROVIDER", "external")
    docker.setenv(*ADDRESSES["rabbitmq"])
    assert choose("rabbitmq") == ("external", "MQLIB_RABBITMQ_URL is set")


def test_a_container_that_is_forced_and_cannot_be_is_an_error_with_the_reason(no_docker: pytest.MonkeyPatch) -> None:
    no_docker.setenv("MQLIB_PROVIDER", "container")
    with pytest.raises(mq.BrokerUnavailable, match=r"^MQLIB_PROVIDER is container, but no Docker here$"):
        choose("kafka")


@pytest.mark.parametrize("kind", BOTH)
def test_external_that_is_forced_without_an_address_names_the_variable(clean: pytest.MonkeyPatch, kind: Kind) -> None:
    clean.setenv("MQLIB_PROVIDER", "external")
    with pytest.raises(mq.BrokerUnavailable, match=f"external, but {ADDRESSES[kind][0]} is not set"):
        choose(kind)


@pytest.mark.parametrize("word", ["docker", "Process", "none", " process"])
def test_an_unknown_provider_is_refused_with_the_known_ones(clean: pytest.MonkeyPatch, word: str) -> None:
    clean.setenv("MQLIB_PROVIDER", word)
    with pytest.raises(mq.BrokerUnavailable, match="use one of external, container, process"):
        choose("kafka")


@pytest.mark.parametrize("kind", BOTH)
def test_a_private_broker_is_never_external(no_docker: pytest.MonkeyPatch, kind: Kind) -> None:
    no_docker.setenv(*ADDRESSES[kind])
    no_docker.setenv(STARTED_BY, "started by mqlib lab; process")
    assert choose(kind, private=True)[0] == "process"


def test_a_private_broker_where_external_is_forced_says_what_to_unset(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("MQLIB_PROVIDER", "external")
    clean.setenv(*ADDRESSES["kafka"])
    with pytest.raises(mq.BrokerUnavailable, match="Unset MQLIB_PROVIDER"):
        choose("kafka", private=True)


@pytest.mark.parametrize("forced", ["", "process", "container", "external"])
def test_what_lab_started_is_used_whatever_was_forced_for_lab(docker: pytest.MonkeyPatch, forced: str) -> None:
    docker.setenv("MQLIB_PROVIDER", forced)
    docker.setenv(*ADDRESSES["kafka"])
    docker.setenv(STARTED_BY, "started by mqlib lab; process")
    assert choose("kafka") == ("external", "started by mqlib lab; process")


@pytest.mark.parametrize("nodes", [0, 2, 4, -1])
def test_a_number_of_nodes_that_makes_no_cluster_is_refused(clean: pytest.MonkeyPatch, nodes: int) -> None:
    for start in (mq.kafka, mq.rabbitmq):
        with pytest.raises(mq.BrokerUnavailable, match=r"1 node, or 3"):
            start(nodes=nodes)


def test_settings_and_several_nodes_make_a_broker_private(clean: pytest.MonkeyPatch) -> None:
    """Nobody may configure a shared broker: with external forced, both are refused."""
    clean.setenv("MQLIB_PROVIDER", "external")
    clean.setenv(*ADDRESSES["kafka"])
    with pytest.raises(mq.BrokerUnavailable, match="of its own"):
        mq.kafka(settings={"log.retention.ms": "1000"})
    with pytest.raises(mq.BrokerUnavailable, match="of its own"):
        mq.kafka(nodes=3)


# Docker is broken in several ways (B02): each time a process serves, and the reason says which Docker did not answer.


def test_a_docker_socket_that_is_not_there(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("DOCKER_HOST", "unix:///nonexistent")
    assert choose("kafka") == ("process", "no Docker engine answers at unix:///nonexistent")


def test_a_docker_socket_at_which_nobody_listens_any_more(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    clean.setenv("DOCKER_HOST", f"unix://{path}")
    assert choose("rabbitmq") == ("process", f"no Docker engine answers at unix://{path}")


def test_a_docker_socket_that_never_answers(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        clean.setattr(container, "ANSWER_SECONDS", 1)
        clean.setenv("DOCKER_HOST", f"unix://{path}")
        assert choose("kafka") == ("process", f"no Docker engine answers at unix://{path}")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "tcp://", "ssh://nobody@127.0.0.1:1"])
def test_a_docker_address_that_leads_nowhere(clean: pytest.MonkeyPatch, address: str) -> None:
    clean.setenv("DOCKER_HOST", address)
    assert choose("kafka") == ("process", f"no Docker engine answers at {address}")


def test_docker_certificates_that_are_missing(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    clean.setenv("DOCKER_TLS_VERIFY", "1")
    clean.setenv("DOCKER_CERT_PATH", str(tmp_path / "none"))
    assert choose("kafka")[0] == "process"


def test_an_engine_that_answers_is_asked_once_for_each_kind(clean: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def why_no_docker() -> str:
        asked.append("docker")
        return "asked"

    clean.setattr(container, "why_no_docker", why_no_docker)
    for _ in range(3):
        assert choose("kafka") == ("process", "asked")
    assert asked == ["docker"]


def test_without_docker_both_brokers_start_and_say_so_and_nothing_else(tmp_path: Path) -> None:
    """No exception of Docker's client reaches the caller, and no warning reaches the cell."""
    environment = clean_environment(DOCKER_HOST="unix:///nonexistent", TMPDIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", "import mqlib as mq; mq.kafka(); mq.rabbitmq(); mq.kafka(); mq.rabbitmq()"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    why = "process (no Docker engine answers at unix:///nonexistent)"
    kafka, rabbit = done.stdout.splitlines()
    assert (kafka.startswith("Kafka "), kafka.endswith(f", {why}")) == (True, True)
    assert (rabbit.startswith("RabbitMQ "), rabbit.endswith(f", {why}")) == (True, True)


def test_a_shared_broker_belongs_to_the_process_that_started_it(clean: pytest.MonkeyPatch) -> None:
    """The key of what is shared has the process id in it: a fork starts its own."""
    made: list[mq.Kafka] = []

    def start(*_: object) -> mq.Kafka:
        made.append(mq.Kafka(provider="process", version=brokers.Version((4, 3))))
        return made[-1]

    clean.setattr(brokers, "_start", start)
    clean.setattr(container, "why_not", lambda kind: "no Docker here")
    assert mq.kafka() is mq.kafka()
    clean.setattr(os, "getpid", lambda: 1)
    assert mq.kafka() is made[1]
