"""The doctor names what is in the way and what mends it, on machines of every kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import mqlib as mq
from mqlib import cli, doctor
from mqlib.brokers import container, install, machine
from tests.conftest import ROOT

Usage = namedtuple("Usage", "total used free")
APT = ["apt-get", "install", "-y", "--no-install-recommends", "rabbitmq-server"]


@pytest.fixture(autouse=True)
def bare_machine(no_addresses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No addresses, no Docker, RabbitMQ installed, room on the disk: each test takes something away."""
    monkeypatch.setattr(container, "why_no_docker", lambda: "no Docker here")
    monkeypatch.setattr(container, "why_not", lambda kind: "no Docker here")
    monkeypatch.setattr(install, "find_rabbitmq", lambda: (Path("/somewhere/rabbitmq-server"), Path("/somewhere/epmd")))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))


def facts(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {fact["name"]: fact for fact in report["facts"]}


def blockers(report: dict[str, Any]) -> list[str]:
    return [fact["name"] for fact in report["facts"] if fact["mark"] == "✗"]


def test_a_machine_with_everything_can_run() -> None:
    report = doctor.examine(ROOT)
    assert (report["can_run"], blockers(report)) == (True, [])
    assert report["verdict"] == "Notebooks can run here."
    assert report["providers"] == {
        kind: {"provider": "process", "why": "no Docker here"} for kind in ("kafka", "rabbitmq")
    }
    assert all(fact["mark"] in "✓○✗" for fact in report["facts"])
    json.dumps(report)


def test_a_full_disk_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is free, where, and what to do."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 123_000_000))
    report = doctor.examine(ROOT)
    assert (report["can_run"], blockers(report)) == (False, ["disk"])
    assert "0.1 GB free in " in facts(report)["disk"]["found"]
    assert "TMPDIR" in facts(report)["disk"]["remedy"]
    assert "✗" in report["verdict"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [(APT, f"sudo {' '.join(APT)}"), (["brew", "install", "rabbitmq"], "brew install rabbitmq")],
    ids=["Debian", "macOS"],
)
def test_rabbitmq_missing_where_we_may_not_install_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, command: list[str], shown: str
) -> None:
    """The line that is in the way has the one command to run, and so has nothing else."""
    monkeypatch.setattr(install, "find_rabbitmq", lambda: None)
    monkeypatch.setattr(install, "may_install", lambda: False)
    monkeypatch.setattr(install, "install_command", lambda: command)
    report = doctor.examine(ROOT)
    assert (report["can_run"], blockers(report)) == (False, ["→ rabbitmq"])
    line = facts(report)["→ rabbitmq"]
    assert shown in f"{line['found']} {line['remedy']}"
    assert shown in facts(report)["RabbitMQ"]["remedy"]
    assert "rabbitmq" not in report["providers"]


def test_rabbitmq_missing_where_no_command_is_known_still_has_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither apt nor brew: an empty remedy would leave the reader alone."""
    monkeypatch.setattr(install, "find_rabbitmq", lambda: None)
    monkeypatch.setattr(install, "may_install", lambda: False)
    monkeypatch.setattr(install, "install_command", list)
    report = doctor.examine(ROOT)
    assert not report["can_run"]
    assert facts(report)["RabbitMQ"]["remedy"].strip() not in ("", "sudo")


def test_rabbitmq_missing_where_we_may_install_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_rabbitmq", lambda: None)
    monkeypatch.setattr(install, "may_install", lambda: True)
    monkeypatch.setattr(install, "install_command", lambda: APT)
    report = doctor.examine(ROOT)
    assert report["can_run"]
    line = facts(report)["RabbitMQ"]
    assert (line["mark"], line["found"]) == ("○", "not installed")
    assert line["remedy"].startswith(" ".join(APT))
    assert "by itself" in line["remedy"]


def test_kafka_not_fetched_yet_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MQLIB_CACHE", str(tmp_path))
    report = doctor.examine(ROOT)
    assert facts(report)["Kafka"]["mark"] == "○"
    assert "45 MB" in facts(report)["Kafka"]["remedy"]
    assert report["can_run"]


def test_a_docker_engine_that_does_not_answer_is_named_and_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "why_no_docker", lambda: "no Docker engine answers at unix:///nowhere")
    report = doctor.examine(ROOT)
    line = facts(report)["Docker"]
    assert (line["mark"], line["found"]) == ("○", "no Docker engine answers at unix:///nowhere")
    assert "start Docker" in line["remedy"]
    assert report["can_run"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MQLIB_PROVIDER", "podman", "external, container, process"),
        ("MQLIB_PROVIDER", "container", "no Docker here"),
        ("MQLIB_PROVIDER", "external", "MQLIB_KAFKA_BOOTSTRAP is not set"),
        ("MQLIB_KAFKA_BOOTSTRAP", "127.0.0.1:9", "127.0.0.1:9"),
        ("MQLIB_KAFKA_BOOTSTRAP", "nonsense:", "host:port"),
    ],
)
def test_a_setting_that_cannot_work_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    report = doctor.examine(ROOT)
    assert "→ kafka" in blockers(report)
    assert words in facts(report)["→ kafka"]["found"]


def test_brokers_that_answer_are_external(
    monkeypatch: pytest.MonkeyPatch, kafka: mq.Kafka, rabbit: mq.RabbitMQ
) -> None:
    """Tried out, not believed; RabbitMQ need not be installed then."""
    monkeypatch.setattr(install, "find_rabbitmq", lambda: None)
    monkeypatch.setattr(install, "may_install", lambda: False)
    for variable, value in {**kafka.environment, **rabbit.environment}.items():
        monkeypatch.setenv(variable, value)
    report = doctor.examine(ROOT)
    assert report["can_run"]
    assert {kind: told["provider"] for kind, told in report["providers"].items()} == {
        "kafka": "external", "rabbitmq": "external",
    }  # fmt: skip


def test_for_people_each_remedy_stands_below_its_fact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 5))
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    [index] = [index for index, line in enumerate(lines) if line.startswith("✗ disk ")]
    assert lines[index + 1].strip().startswith("→ make room")
    assert lines[-1] == "Something is in the way: see the lines marked ✗."


def test_it_works_before_there_is_an_environment(tmp_path: Path) -> None:
    """On a fresh clone, with nothing but Python's own library: valid JSON, and what will be done."""
    shutil.copytree(ROOT / "mqlib", tmp_path / "mqlib", ignore=shutil.ignore_patterns("__pycache__"))
    base = Path(sys.base_prefix, "bin", "python3")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MQLIB", "PYTHON"))}
    done = subprocess.run(
        [str(base), "-S", "-m", "mqlib", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True,
        env={**environment, "MQLIB_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert facts(report)["Python packages"]["mark"] == "○"
    assert done.returncode == (0 if report["can_run"] else 1)
    assert not (tmp_path / ".venv").exists(), "asking makes nothing"


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MQLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(mq.BrokerUnavailable, match="MQLIB_CACHE"):
        machine.cache_folder()
