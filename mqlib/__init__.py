"""Message-queue patterns on real brokers: what a notebook uses. `import mqlib as mq`.

Light to import; each name loads its module at first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brokers import BrokerError, BrokerUnavailable, Kafka, RabbitMQ, kafka, rabbitmq
    from .bulk import Outcome, Undelivered, pump, pump_messages
    from .checks import CheckFailed, check, exercise
    from .faults import Proxy, killed, paused, proxy
    from .lag import LagMonitor, group_lag, monitor_lag
    from .ledger import Journal, Ledger
    from .metrics import Metrics, QueueMetrics, paced
    from .queues import DepthMonitor, channel, declare, depth, monitor_depth, take_messages
    from .topics import consumer, end_offsets, producer, read, take, topic
    from .waiting import until
    from .workers import Worker, WorkerFailed, crash, worker

_HOME = {
    "brokers": ("BrokerError", "BrokerUnavailable", "Kafka", "RabbitMQ", "kafka", "rabbitmq"),
    "checks": ("CheckFailed", "check", "exercise"),
    "bulk": ("Outcome", "Undelivered", "pump", "pump_messages"),
    "faults": ("Proxy", "killed", "paused", "proxy"),
    "lag": ("LagMonitor", "group_lag", "monitor_lag"),
    "ledger": ("Journal", "Ledger"),
    "metrics": ("Metrics", "QueueMetrics", "paced"),
    "queues": ("DepthMonitor", "channel", "declare", "depth", "monitor_depth", "take_messages"),
    "topics": ("consumer", "end_offsets", "producer", "read", "take", "topic"),
    "waiting": ("until",),
    "workers": ("Worker", "WorkerFailed", "crash", "worker"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BrokerError", "BrokerUnavailable", "CheckFailed", "DepthMonitor", "Journal", "Kafka", "LagMonitor", "Ledger",
    "Metrics", "Outcome", "Proxy", "QueueMetrics", "RabbitMQ", "Undelivered", "Worker", "WorkerFailed", "channel",
    "check", "consumer", "crash", "declare", "depth", "end_offsets", "exercise", "group_lag", "kafka", "killed",
    "monitor_depth", "monitor_lag", "paced", "paused", "producer", "proxy", "pump", "pump_messages", "rabbitmq", "read",
    "take", "take_messages", "topic", "until", "worker",
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
