"""The compose file: what it says is what the brokers module says, and a real compose tool brings it up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mqlib.brokers import container, settings, versions
from mqlib.brokers.machine import free_ports
from tests.conftest import ROOT
from tests.images import compose


@pytest.fixture(scope="module")
def tool() -> list[str]:
    """A Compose 2 program, and an engine with the images. Elsewhere than in CI a missing one is a reason to skip."""
    problem = container.why_not("kafka") or container.why_not("rabbitmq")
    if problem:
        if os.environ.get("MQLIB_EXPECT_CONTAINERS"):
            pytest.fail(problem)
        # Docker is no requirement of the project: without it these skip, but CI starts an engine, and there they fail.
        pytest.skip(problem)
    return [str(compose.fetch())]


def config(tool: list[str], *profiles: str, part: str = "services") -> Any:
    options = [option for profile in profiles for option in ("--profile", profile)]
    done = subprocess.run([*tool, *options, "config", "--format", "json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[part]


def test_images_and_settings_are_those_of_the_brokers_module(tool: list[str]) -> None:
    services = config(tool)
    assert {name: service["image"] for name, service in services.items()} == {
        "kafka": versions.KAFKA_IMAGE,
        "rabbitmq": versions.RABBITMQ_IMAGE,
    }
    wanted = {**settings.KAFKA, **settings.kafka_replication(1)}
    del wanted["default.replication.factor"]  # 1 is the default
    given = services["kafka"]["environment"]
    missing = {key: value for key, value in wanted.items() if given[f"KAFKA_{key.upper().replace('.', '_')}"] != value}
    assert missing == {}
    lines = config(tool, part="configs")["rabbitmq"]["content"].splitlines()
    assert dict(line.split(" = ") for line in lines).items() <= settings.RABBITMQ.items()
    assert {*settings.RABBITMQ} - {line.split(" = ")[0] for line in lines} == {"log.console.level"}  # its default


def test_every_port_is_published_on_loopback_only(tool: list[str]) -> None:
    services = config(tool, "cluster", "lab")
    assert set(services) == {
        "kafka", "rabbitmq", "lab", *(f"{kind}-{n}" for kind in ("kafka", "rabbitmq") for n in (1, 2, 3)),
    }  # fmt: skip
    assert {port["host_ip"] for service in services.values() for port in service["ports"]} == {"127.0.0.1"}


@pytest.fixture(scope="module")
def up(tool: list[str]) -> Iterator[dict[str, str]]:
    """The default profile, up, on free ports; the environment that makes notebooks use it."""
    kafka, amqp, management, metrics = free_ports(4)
    ports = {
        "MQLIB_KAFKA_PORT": str(kafka),
        "MQLIB_RABBITMQ_PORT": str(amqp),
        "MQLIB_RABBITMQ_MANAGEMENT_PORT": str(management),
        "MQLIB_RABBITMQ_METRICS_PORT": str(metrics),
        "COMPOSE_PROJECT_NAME": "mqlib-compose-test",
    }
    environment = {**os.environ, **ports}
    try:
        done = subprocess.run([*tool, "up", "-d", "--wait"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield {
            "MQLIB_KAFKA_BOOTSTRAP": f"127.0.0.1:{kafka}",
            "MQLIB_RABBITMQ_URL": f"amqp://guest:guest@127.0.0.1:{amqp}/",
            "MQLIB_RABBITMQ_MANAGEMENT_URL": f"http://guest:guest@127.0.0.1:{management}",
            "MQLIB_RABBITMQ_METRICS_URL": f"http://127.0.0.1:{metrics}/metrics",
        }
    finally:
        subprocess.run([*tool, "down", "-v"], cwd=ROOT, env=environment, capture_output=True, check=True)


def test_rabbitmq_tells_its_metrics(up: dict[str, str]) -> None:
    answer = httpx.get(up["MQLIB_RABBITMQ_METRICS_URL"])
    assert "rabbitmq_build_info" in answer.text


@pytest.mark.timeout(300)
def test_the_notebooks_run_against_it(up: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MQLIB_")}
    done = subprocess.run(
        [sys.executable, "-m", "mqlib", "run", "01", "04"],
        cwd=ROOT, env={**environment, **up}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "external (MQLIB_KAFKA_BOOTSTRAP is set)" in done.stdout
