"""Message-queue patterns on real brokers: what a notebook uses. `import mqlib as mq`.

Light to import; each name loads its module at first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brokers import BrokerError, BrokerUnavailable, Kafka, RabbitMQ, kafka, rabbitmq
    from .checks import CheckFailed, check, exercise
    from .faults import Proxy, proxy
    from .ledger import Ledger
    from .queues import channel, depth, take_messages
    from .topics import consumer, end_offsets, producer, read, take, topic
    from .waiting import until

_HOME = {
    "brokers": ("BrokerError", "BrokerUnavailable", "Kafka", "RabbitMQ", "kafka", "rabbitmq"),
    "checks": ("CheckFailed", "check", "exercise"),
    "faults": ("Proxy", "proxy"),
    "ledger": ("Ledger",),
    "queues": ("channel", "depth", "take_messages"),
    "topics": ("consumer", "end_offsets", "producer", "read", "take", "topic"),
    "waiting": ("until",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BrokerError", "BrokerUnavailable", "CheckFailed", "Kafka", "Ledger", "Proxy", "RabbitMQ", "channel", "check",
    "consumer", "depth", "end_offsets", "exercise", "kafka", "producer", "proxy", "rabbitmq", "read", "take",
    "take_messages", "topic", "until",
]  # fmt: skip


if "IPython" in sys.modules:
    from .cells import show_exception_groups

    show_exception_groups()


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"mqlib has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
