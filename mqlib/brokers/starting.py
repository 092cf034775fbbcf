"""Starting a broker: wait until it is ready, choose other ports when one was taken, leave nothing on failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .base import BrokerUnavailable, Kafka, Node, RabbitMQ, Version
from .machine import require_disk
from .ownership import Estate

START_SECONDS = 60.0

BrokerT = TypeVar("BrokerT", Kafka, RabbitMQ)


class PortTaken(Exception):
    """Somebody took a port between our choosing it and the server's binding it: choose again."""


def await_ready(nodes: Sequence[Node], probe: Callable[[], Version], within: float = START_SECONDS) -> Version:
    """Probes until it succeeds; returns what the probe says.

    Raises `BrokerUnavailable`, with the server's own last log lines, when one of the nodes ends or `within` seconds
    pass; `PortTaken` when the log says so.
    """
    deadline = time.monotonic() + within
    problem = "it never answered"
    while time.monotonic() < deadline:
        ended = next((node for node in nodes if not node.running), None)
        if ended is not None:
            log = ended.log(60)
            if "in use" in log or "eaddrinuse" in log:
                raise PortTaken
            raise BrokerUnavailable(f"{ended.name} ended while starting. The last lines of its log:\n{ended.log(60)}")
        try:
            return probe()
        except BrokerUnavailable as error:
            problem = str(error)
        time.sleep(0.1)
    raise BrokerUnavailable(
        f"{nodes[0].name} was not ready within {within:.0f} s: {problem}\n"
        f"The last lines of its log:\n{nodes[0].log()}\nIs the machine short of memory or very busy? Try again."
    )


def started(start: Callable[[Estate], BrokerT]) -> BrokerT:
    """Runs `start` with an estate of its own; on failure nothing of it is left. Chooses new ports up to twice."""
    require_disk()
    for attempt in (1, 2, 3):
        estate = Estate()
        try:
            broker = start(estate)
            broker.own(estate.close)
            return broker
        except PortTaken:
            estate.close()
            if attempt == 3:
                raise BrokerUnavailable("three times another program took the port that we had chosen") from None
        except BaseException:
            estate.close()
            raise
    raise AssertionError("unreachable")
