"""`kafka()` and `rabbitmq()`: a real broker in one line, from whichever provider this machine has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, overload

from .base import Broker, BrokerError, BrokerUnavailable, Kafka, Node, RabbitMQ, Version

__all__ = [
    "Broker", "BrokerError", "BrokerUnavailable", "Kafka", "Node", "RabbitMQ", "Version", "choose", "kafka", "rabbitmq",
]  # fmt: skip

PROVIDERS = ("external", "container", "process")
STARTED_BY = "MQLIB_STARTED_BY"
"""Set for the kernels of `mqlib lab`, `run` and `test`: who started the brokers, for the line that is printed."""
Kind = Literal["kafka", "rabbitmq"]
ADDRESS: dict[Kind, str] = {"kafka": "MQLIB_KAFKA_BOOTSTRAP", "rabbitmq": "MQLIB_RABBITMQ_URL"}

_shared: dict[str, Broker] = {}


def choose(kind: Kind, private: bool = False) -> tuple[str, str]:
    """Which provider serves `kind` here, and why: `("process", "no Docker here")`.

    External first, when its address is set; then a container, when Docker answers and has the image or can get it; then
    a process. `MQLIB_PROVIDER` forces one. A private broker is never external, since nobody may break a shared one.
    Raises `BrokerUnavailable` when what is forced cannot be.
    """
    forced = os.environ.get("MQLIB_PROVIDER", "")
    if forced and forced not in PROVIDERS:
        raise BrokerUnavailable(f"MQLIB_PROVIDER is {forced!r}; use one of {', '.join(PROVIDERS)}")
    if forced == "external" and not os.environ.get(ADDRESS[kind]):
        raise BrokerUnavailable(f"MQLIB_PROVIDER is external, but {ADDRESS[kind]} is not set")
    # Brokers that `lab`, `run` or `test` started count as chosen: what they were started by was forced then.
    if os.environ.get(ADDRESS[kind]) and not private and (forced in ("", "external") or STARTED_BY in os.environ):
        return "external", os.environ.get(STARTED_BY) or f"{ADDRESS[kind]} is set"
    if forced == "external":
        raise BrokerUnavailable(
            f"this asks for a {kind} of its own, to break or to configure, and MQLIB_PROVIDER=external allows none. "
            "Unset MQLIB_PROVIDER."
        )
    if forced == "process":
        return "process", "MQLIB_PROVIDER is process"
    from . import container

    problem = container.why_not(kind)
    if forced == "container":
        if problem:
            raise BrokerUnavailable(f"MQLIB_PROVIDER is container, but {problem}")
        return "container", "MQLIB_PROVIDER is container"
    return ("process", problem) if problem else ("container", "Docker answers")


@overload
def _broker(kind: Literal["kafka"], nodes: int, private: bool, settings: Mapping[str, str] | None) -> Kafka: ...
@overload
def _broker(kind: Literal["rabbitmq"], nodes: int, private: bool, settings: Mapping[str, str] | None) -> RabbitMQ: ...
def _broker(kind: Kind, nodes: int, private: bool, settings: Mapping[str, str] | None) -> Kafka | RabbitMQ:
    if nodes not in (1, 3):
        raise BrokerUnavailable(f"{kind}(nodes={nodes!r}): a broker has 1 node, or 3 as a cluster")
    private = private or bool(settings) or nodes > 1
    provider, why = choose(kind, private)
    key = f"{kind} {os.environ.get(ADDRESS[kind])} {provider} {os.getpid()}"
    if not private and key in _shared and _shared[key].running:
        found = _shared[key]
    else:
        found = _start(kind, provider, nodes, settings)
        found.why = found.why or why
        if not private:
            _shared[key] = found
            print(found, flush=True)
    assert isinstance(found, Kafka | RabbitMQ)
    return found


def _start(kind: Kind, provider: str, nodes: int, settings: Mapping[str, str] | None) -> Broker:
    if provider == "external":
        from . import external

        return external.kafka() if kind == "kafka" else external.rabbitmq()
    if provider == "container":
        from . import container

        return container.kafka(nodes, settings) if kind == "kafka" else container.rabbitmq(nodes, settings)
    from . import process

    return process.kafka(nodes, settings) if kind == "kafka" else process.rabbitmq(nodes, settings)


def kafka(nodes: int = 1, private: bool = False, settings: Mapping[str, str] | None = None) -> Kafka:
    """A running Apache Kafka, ready to produce to and to consume from. Prints which one in one line, once.

    The same one at every call in a process, started at the first. With `private=True` a new one that may be killed,
    paused or starved; `nodes=3` (a cluster) and `settings` (server properties, as text) imply it. End a private one by
    `with mq.kafka(private=True) as broker:` or `broker.stop()`; it also ends with the variable that holds it.
    Raises `BrokerUnavailable`, with what to do.
    """
    return _broker("kafka", nodes, private, settings)


def rabbitmq(nodes: int = 1, private: bool = False, settings: Mapping[str, str] | None = None) -> RabbitMQ:
    """A running RabbitMQ with its management plugin; otherwise as `kafka`. `settings` are keys of rabbitmq.conf."""
    return _broker("rabbitmq", nodes, private, settings)
