"""What every broker looks like, whoever provides it: addresses, version, nodes, settings, namespace, and an end."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self


class BrokerError(Exception):
    """Something about a broker did not work. The message names it and says what to do."""


class BrokerUnavailable(BrokerError):
    """No broker can be had: not reachable, not startable, or not installed."""


class Version(tuple[int, ...]):
    """A version that compares as numbers and prints as text: `version >= (4, 0)`, `str(version) == "4.0.5"`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        """Reads the leading numbers of `text`: "3.10.8-rc.1" is 3.10.8. Raises `ValueError` where there is none."""
        match = re.match(r"\d+(\.\d+)*", text)
        if not match:
            raise ValueError(f"not a version: {text!r}")
        return cls(int(part) for part in match[0].split("."))

    def __str__(self) -> str:
        return ".".join(map(str, self)) or "unknown version"


class Connectable(Protocol):
    """What a client can connect to: a broker, or a proxy in front of one."""

    @property
    def client(self) -> dict[str, Any]: ...


class Node(ABC):
    """One server of a broker. The faults are real: `kill` is SIGKILL, `pause` is SIGSTOP (or the container's twins)."""

    name: str
    wait_until_ready: Callable[[], object]
    """Returns when the broker answers again, as `restart` does by itself."""
    sync: Callable[[], object]
    """Has it write down what was declared on it: see `probe.sync_rabbitmq`."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once, as a power cut would; its data stays.

        What was declared on a RabbitMQ is written down before: it is the messages that are at stake. (A quorum queue,
        whose members have a store of their own, must be two seconds old for that.)
        """

    @abstractmethod
    def pause(self) -> None:
        """Freezes it: connections stay open and nothing answers."""

    @abstractmethod
    def resume(self) -> None:
        """Undoes `pause`."""

    @abstractmethod
    def restart(self, graceful: bool = True) -> None:
        """Stops it (politely, or as `kill` does) and starts it again on its data; returns when it is ready."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether the server exists (a paused one does)."""

    @abstractmethod
    def log(self, lines: int = 20) -> str:
        """The last lines of its own log."""

    def control(self, *arguments: str) -> str:
        """Runs `rabbitmqctl` with these arguments on this node and returns what it prints; it takes a second or two.

        `node.control("set_vm_memory_high_watermark", "0")`. Raises `BrokerError` with its words when it fails, and on a
        node of Kafka, which has no such tool.
        """
        raise BrokerError(f"{self.name} has no rabbitmqctl")

    def __repr__(self) -> str:
        return f"<node {self.name}>"


def namespace_of_environment() -> str:
    """`MQLIB_NAMESPACE` as it may stand in names, or a random one.

    Raises `BrokerError` for characters that a Kafka topic cannot have.
    """
    wanted = os.environ.get("MQLIB_NAMESPACE", "")
    if not wanted:
        return f"mq-{secrets.token_hex(3)}"
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,80}", wanted):
        raise BrokerError(f"MQLIB_NAMESPACE is {wanted!r}; use 1 to 80 letters, digits, dots, hyphens, underscores")
    return wanted


@dataclass(eq=False)
class Broker(ABC):
    """A running broker. Use it as a context manager, or `stop()` it, or leave it: it ends with this process."""

    provider: str
    version: Version
    nodes: Sequence[Node] = ()
    settings: dict[str, str] = field(default_factory=dict)
    """What differs from the broker's defaults, so that lessons are short; empty where it is not ours."""
    why: str = ""
    """Why this provider was chosen, in a few words."""
    namespace: str = field(default_factory=namespace_of_environment)

    kind = "broker"

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        # Fresh for each object: a kernel that was restarted never meets what the one before it left behind.
        self._salt = secrets.token_hex(2)
        self._names: list[str] = []
        self._delete: Callable[[list[str]], None] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    @property
    @abstractmethod
    def client(self) -> dict[str, Any]:
        """The keyword arguments with which a client connects: addresses, and security where there is any."""

    @property
    @abstractmethod
    def environment(self) -> dict[str, str]:
        """The variables that make another process use this broker through the `external` provider."""

    def name(self, base: str) -> str:
        """A fresh name for a topic, group, queue or exchange, in the namespace: no two calls give the same.

        So a cell can be run again without meeting what its last run left. What bears such a name is deleted by
        `clean_up`. Raises `BrokerError` when `base` has characters that a name cannot have.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,80}", base):
            raise BrokerError(f"{base!r} cannot be a name: use 1 to 80 letters, digits, dots, hyphens, underscores")
        full = f"{self.namespace}.{base}.{self._salt}{next(self._numbers)}"
        self._names.append(full)
        return full

    def own(self, end: Callable[[], None]) -> None:
        """Makes `end` what `stop` runs, and what runs when this object is collected or the process ends."""
        self._end = weakref.finalize(self, end)

    def shared(self, delete: Callable[[list[str]], None]) -> None:
        """Makes this a broker that others use, too: what we named on it is deleted with `delete`, at the latest when
        this process ends, and the broker stays."""
        self._delete = delete
        atexit.register(self.clean_up)

    def clean_up(self) -> None:
        """Deletes the topics, queues and exchanges that this process named on a shared broker.

        (A consumer group goes with its topics' offsets. On a broker of our own there is nothing to do: it goes whole.)
        """
        names, self._names = self._names, []
        if self._delete is not None and names:
            self._delete(names)

    def stop(self) -> None:
        """Leaves a shared broker as it was found; ends one of our own with its data. Safe to call twice."""
        if self._end is not None:
            self._end()
        self.clean_up()

    @property
    def running(self) -> bool:
        """False once it was stopped, or when a server of ours is gone."""
        return (self._end is None or self._end.alive) and all(node.running for node in self.nodes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        reason = f" ({self.why})" if self.why else ""
        servers = f", {len(self.nodes)} nodes" if len(self.nodes) > 1 else ""
        return f"{self.kind} {self.version}, {self.provider}{reason}{servers}"


@dataclass(eq=False, repr=False)
class Kafka(Broker):
    """Apache Kafka. `AIOKafkaProducer(**kafka.client)` connects."""

    bootstrap: str = ""
    """`host:port`, several joined by commas."""
    security: dict[str, Any] = field(default_factory=dict)
    """aiokafka's security arguments; empty for a plain listener."""
    secured_by: dict[str, str] = field(default_factory=dict)
    """The `MQLIB_KAFKA_…` variables that `security` came from."""
    proxy_ports: tuple[int, int] | None = None
    """The extra listener's port, and the port it advertises, where a TCP proxy may listen. None where it is shared."""

    kind = "Kafka"

    @property
    def client(self) -> dict[str, Any]:
        return {"bootstrap_servers": self.bootstrap, **self.security}

    @property
    def environment(self) -> dict[str, str]:
        return {"MQLIB_KAFKA_BOOTSTRAP": self.bootstrap, "MQLIB_KAFKA_VERSION": str(self.version), **self.secured_by}


@dataclass(eq=False, repr=False)
class RabbitMQ(Broker):
    """RabbitMQ. `aio_pika.connect(**rabbit.client)` connects."""

    url: str = ""
    """`amqp://user:password@host:port/vhost`."""
    management_url: str = ""
    """The management API's address with its credentials, without a slash at the end; empty where there is none."""
    metrics_url: str = ""
    """Where the first node tells its metrics to Prometheus, without a slash at the end."""
    security: dict[str, Any] = field(default_factory=dict)
    """aio-pika's TLS arguments; empty for a plain listener."""
    secured_by: dict[str, str] = field(default_factory=dict)
    """The `MQLIB_RABBITMQ_…` variables that `security` came from."""

    addresses: tuple[tuple[str, str], ...] = ()
    """`url` and `management_url` of each node, where the nodes are ours."""

    kind = "RabbitMQ"

    @property
    def address(self) -> tuple[str, str]:
        """`url` and `management_url` of a node that lives: those of the first, if it does."""
        living = (each for each, node in zip(self.addresses, self.nodes, strict=True) if node.running)
        return next(living, (self.url, self.management_url))

    @property
    def client(self) -> dict[str, Any]:
        return {"url": self.address[0], **self.security}

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MQLIB_RABBITMQ_URL": self.url,
            "MQLIB_RABBITMQ_MANAGEMENT_URL": self.management_url,
            "MQLIB_RABBITMQ_METRICS_URL": self.metrics_url,
            **self.secured_by,
        }
