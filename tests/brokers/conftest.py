"""What the tests of the brokers share: a Kafka and a RabbitMQ as local processes, for those that do them no harm."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mqlib as mq
from mqlib import brokers
from mqlib.brokers import container

CACHED = container.why_not  # asks Docker once; a test may put something else in its place


@contextmanager
def told(**environment: str) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a user who has set these variables of `mqlib`, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MQLIB_") and name != "MQLIB_CACHE":
                patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="package")
def own_kafka() -> Iterator[mq.Kafka]:
    """A Kafka with a proxy listener, as a process; a test must leave it as it was."""
    with told(MQLIB_PROVIDER="process"):
        broker = mq.kafka(private=True)
    with broker:
        yield broker


@pytest.fixture(scope="package")
def own_rabbit() -> Iterator[mq.RabbitMQ]:
    """A RabbitMQ as a process; a test must leave it as it was."""
    with told(MQLIB_PROVIDER="process"):
        broker = mq.rabbitmq(private=True)
    with broker:
        yield broker


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No variable of `mqlib` is set, nothing is shared yet, and Docker was not asked yet."""
    for name in list(os.environ):
        if name.startswith("MQLIB_") and name != "MQLIB_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setattr(brokers, "_shared", {})
    CACHED.cache_clear()
    yield monkeypatch
    for broker in brokers._shared.values():
        broker.stop()
    CACHED.cache_clear()


@pytest.fixture
def as_processes(clean: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As `clean`, with the process provider forced."""
    clean.setenv("MQLIB_PROVIDER", "process")
    return clean


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files in which nothing else lies."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path
