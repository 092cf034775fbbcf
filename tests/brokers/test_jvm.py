"""Kafka's Java: the cache of classes is valid, and is never in the way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import mqlib as mq
from mqlib.brokers import jvm
from mqlib.brokers.install import java, kafka_jars
from mqlib.brokers.versions import KAFKA_VERSION


def run(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Kafka's main class without arguments: it says how it is used. `-XX:AOTMode=on` makes a bad cache an error."""
    first, *others = jvm.command(options[0], folder / "log4j2.properties", kafka_jars())
    command = [first, *options[1:], *others, "kafka.Kafka"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def kept() -> Path:
    return java().parent.parent / f"kafka-{KAFKA_VERSION}.aot"


@pytest.fixture
def trained(as_processes: pytest.MonkeyPatch) -> None:
    mq.kafka()


@pytest.mark.usefixtures("trained")
def test_the_cache_is_one_that_java_takes(tmp_path: Path) -> None:
    done = run(f"-XX:AOTCache={kept()}", "-XX:AOTMode=on", folder=tmp_path)
    assert "USAGE" in done.stdout + done.stderr
    other = tmp_path / "broken.aot"
    other.write_bytes(b"")
    done = run(f"-XX:AOTCache={other}", "-XX:AOTMode=on", folder=tmp_path)
    assert "USAGE" not in done.stdout + done.stderr, "this test could not tell"


def test_kafka_starts_without_a_usable_cache(tmp_path: Path) -> None:
    (tmp_path / "empty.aot").touch()
    for name in ("missing.aot", "empty.aot"):
        done = run(f"-XX:AOTCache={tmp_path / name}", folder=tmp_path)
        assert "USAGE" in done.stdout + done.stderr, name


def test_it_trains_once_and_keeps_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jvm, "java", lambda: tmp_path / "bin" / "java")
    options: list[str] = []

    def train(option: str) -> None:
        options.append(option)
        Path(option.partition("=")[2]).write_text("classes")

    assert [jvm.prepared_classes(train) for _ in range(2)] == [f"-XX:AOTCache={tmp_path}/kafka-{KAFKA_VERSION}.aot"] * 2
    assert [option.partition("=")[0] for option in options] == ["-XX:AOTCacheOutput"]
    assert [file.read_text() for file in tmp_path.iterdir()] == ["classes"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jvm, "java", lambda: tmp_path / "absent" / "bin" / "java")
    assert jvm.prepared_classes(lambda _: pytest.fail("nowhere to keep it")).startswith("-XX:AOTCache=")


def test_what_fails_in_training_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jvm, "java", lambda: tmp_path / "bin" / "java")

    def train(_: str) -> None:
        raise mq.BrokerUnavailable("no room")

    with pytest.raises(mq.BrokerUnavailable, match="no room"):
        jvm.prepared_classes(train)
    assert not list(tmp_path.glob("*.aot")), "what was not made well is not kept"
