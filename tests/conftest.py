"""What the tests share: one Kafka and one RabbitMQ for all of them, and a machine that is left as it was found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mqlib as mq

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="session")
def kafka() -> mq.Kafka:
    """The shared Kafka: the one that `mqlib test` started, or one of this session's own."""
    return mq.kafka()


@pytest.fixture(scope="session")
def rabbit() -> mq.RabbitMQ:
    """The shared RabbitMQ."""
    return mq.rabbitmq()


@pytest.fixture
def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of somebody to whom `mqlib test` handed no brokers."""
    for name in list(os.environ):
        if name.startswith(("MQLIB_KAFKA", "MQLIB_RABBITMQ", "MQLIB_STARTED_BY", "MQLIB_PROVIDER", "MQLIB_NAMESPACE")):
            monkeypatch.delenv(name)
