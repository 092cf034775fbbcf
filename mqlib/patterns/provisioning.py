"""Topics declared in code: what differs on the broker, and changing that, and nothing else.

A setting is changed by itself (incrementally). Kafka's older request, which aiokafka's `alter_configs` and other old
tools still send, replaces all settings of a topic: those that it does not name fall back to the broker's, without an
error. See KIP-339, https://cwiki.apache.org/confluence/display/KAFKA/KIP-339. Topics are declared so that nothing need
make them at first use: `auto.create.topics.enable` makes a topic of every misspelt name, too.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, cast

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from ..brokers import BrokerError, Kafka
from ..brokers.base import Connectable
from ..topics import end_offsets
from ..waiting import until

T = TypeVar("T")
NO_ANSWER = {KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError.REQUEST_TIMED_OUT}
LISTS = {"cleanup.policy"}


class Refused(BrokerError):
    """Kafka does not take a declaration. The message names the topic, and what was changed before that."""


class Impossible(BrokerError):
    """A declaration that no change can reach. Nothing was changed. `changes` has them."""

    def __init__(self, changes: Sequence[Change]) -> None:
        super().__init__("nothing was changed: " + "; ".join(map(str, changes)))
        self.changes = changes


class NoAnswer(BrokerError):
    """Kafka did not answer in time: whether it did what it was asked is unknown. To apply again is safe."""


@dataclass(frozen=True)
class Topic:
    """A topic as it should be. What is not named here is left as it is. Raises `ValueError` for what cannot be one."""

    name: str
    partitions: int
    replicas: int | None = None
    """None: the broker's default where the topic is made, and as it is where it is there."""
    configs: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """By Kafka's own names, such as `retention.ms`."""

    def __post_init__(self) -> None:
        if not self.name or self.partitions < 1 or (self.replicas is not None and self.replicas < 1):
            raise ValueError(f"a topic has a name and at least one partition and replica; this is {self!r}")
        if odd := [name for name in self.configs if "_" in name]:
            raise ValueError(f"{self.name!r}: Kafka's settings have dots, such as retention.ms; this is {odd[0]!r}")

    @property
    def settings(self) -> dict[str, str]:
        """`configs` as Kafka writes them."""
        return {name: str(value).lower() if isinstance(value, bool) else str(value)
                for name, value in self.configs.items()}  # fmt: skip


class Change(NamedTuple):
    """One thing in which the broker differs from a declaration."""

    topic: str
    kind: Literal["missing", "partitions", "config", "impossible"]
    what: str
    """`topic`, `partitions`, `replicas`, or the name of a setting."""
    present: str
    wanted: str
    why: str = ""
    """Why it is impossible."""

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return f"{self.topic}: {self.what} is {self.present}, not {self.wanted}{why}"


class _Present(NamedTuple):
    partitions: int
    replicas: int
    configs: dict[str, str]


def librdkafka(kafka: Connectable) -> dict[str, Any]:
    """The settings with which confluent-kafka connects where aiokafka does with `kafka.client`.

    A context for TLS cannot be translated: the authority that it trusts is the system's, or the file that
    `MQLIB_KAFKA_CA` named.
    """
    names = {"bootstrap_servers": "bootstrap.servers", "security_protocol": "security.protocol",
             "sasl_mechanism": "sasl.mechanism", "sasl_plain_username": "sasl.username",
             "sasl_plain_password": "sasl.password"}  # fmt: skip
    found = {names[name]: value for name, value in kafka.client.items() if name in names}
    if authority := getattr(kafka, "secured_by", {}).get("MQLIB_KAFKA_CA"):
        found["ssl.ca.location"] = authority
    return found


def _code(error: Refused) -> int:
    return int(cast(KafkaException, error.__cause__).args[0].code())


class _Admin:
    """What blocks, for a thread."""

    def __init__(self, kafka: Connectable, within: float) -> None:
        self.client = AdminClient({**librdkafka(kafka), "log_level": 2})  # else its troubles go to stderr
        self.within = within
        self.done: list[Change] = []
        self.overtaken = False

    def result(self, topic: str, future: Future[T]) -> T:
        try:
            return future.result(self.within + 1)
        except (KafkaException, TimeoutError) as error:
            code = error.args[0].code() if isinstance(error, KafkaException) else KafkaError._TIMED_OUT
            words = error.args[0].str() if isinstance(error, KafkaException) else "no answer"
            after = f"; done before that: {'; '.join(map(str, self.done))}" if self.done else "; nothing was changed"
            if code in NO_ANSWER:
                raise NoAnswer(f"{topic!r}: no answer within {self.within:g} s ({words}); apply again") from None
            raise Refused(f"{topic!r}: Kafka refuses it: {words}{after}") from error

    def present(self, names: Sequence[str]) -> dict[str, _Present]:
        """Those of the topics that are there. To ask does not make one."""
        found, told = {}, self.client.describe_topics(TopicCollection([*names]), request_timeout=self.within)
        for name, future in told.items():
            try:
                parts = self.result(name, future).partitions
            except Refused as error:
                if _code(error) != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
                continue
            resource = ConfigResource(ResourceType.TOPIC, name)
            entries = self.client.describe_configs([resource], request_timeout=self.within)[resource]
            configs = {key: str(entry.value) for key, entry in self.result(name, entries).items()}
            found[name] = _Present(len(parts), len(parts[0].replicas), configs)
        return found

    def create(self, topic: Topic, validate: bool) -> bool:
        """False where somebody else has made it meanwhile."""
        new = NewTopic(topic.name, topic.partitions, topic.replicas or -1, config=topic.settings)
        made = self.client.create_topics([new], request_timeout=self.within, validate_only=validate)
        try:
            self.result(topic.name, made[topic.name])
        except Refused as error:
            if _code(error) != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            self.overtaken = True
            return False
        return True

    def grow(self, topic: Topic, validate: bool) -> bool:
        more = [NewPartitions(topic.name, topic.partitions)]
        made = self.client.create_partitions(more, request_timeout=self.within, validate_only=validate)
        self.result(topic.name, made[topic.name])
        return True

    def set(self, topic: Topic, names: Sequence[str], validate: bool) -> bool:
        """Sets these settings of a topic, together, and leaves its others."""
        entries = [ConfigEntry(name, topic.settings[name], incremental_operation=AlterConfigOpType.SET)
                   for name in names]  # fmt: skip
        resource = ConfigResource(ResourceType.TOPIC, topic.name, incremental_configs=entries)
        made = self.client.incremental_alter_configs([resource], request_timeout=self.within, validate_only=validate)
        self.result(topic.name, made[resource])
        return True

    def change(self, topics: Sequence[Topic], changes: Sequence[Change], validate: bool) -> None:
        for topic in topics:
            mine = [change for change in changes if change.topic == topic.name]
            names = [change.what for change in mine if change.kind == "config"]
            steps: dict[str, Callable[[bool], bool]] = {
                "missing": functools.partial(self.create, topic),
                "config": functools.partial(self.set, topic, names),
                "partitions": functools.partial(self.grow, topic),
            }
            for kind, step in steps.items():
                those = [change for change in mine if change.kind == kind]
                if those and step(validate) and not validate:
                    self.done += those

    def differences(self, topics: Sequence[Topic]) -> list[Change]:
        present = self.present([topic.name for topic in topics])
        return [change for topic in topics for change in _differences(topic, present.get(topic.name))]


def _same(name: str, one: str, other: str) -> bool:
    if name in LISTS:
        return {word.strip() for word in one.split(",")} == {word.strip() for word in other.split(",")}
    return one == other


def _differences(topic: Topic, present: _Present | None) -> list[Change]:
    if present is None:
        words = f"one with {topic.partitions} partitions"
        return [Change(topic.name, "missing", "topic", "missing", words)]
    found, compact = [], "compact" in topic.settings.get("cleanup.policy", present.configs["cleanup.policy"])
    if topic.partitions != present.partitions:
        why = "partitions cannot be taken away: copy it to a new topic" if topic.partitions < present.partitions else ""
        if not why and compact:
            why = "keys would move, and their old values stay: copy it to a new topic"
        found.append(Change(topic.name, "impossible" if why else "partitions", "partitions", str(present.partitions),
                            str(topic.partitions), why))  # fmt: skip
    if topic.replicas not in (None, present.replicas):
        found.append(Change(topic.name, "impossible", "replicas", str(present.replicas), str(topic.replicas),
                            "replicas are moved by a reassignment: kafka-reassign-partitions"))  # fmt: skip
    for name, wanted in topic.settings.items():
        value = present.configs.get(name, "unknown")
        if not _same(name, value, wanted):
            found.append(Change(topic.name, "config", name, value, wanted))
    return found


def _checked(topics: Sequence[Topic]) -> Sequence[Topic]:
    if twice := [name for name, count in Counter(topic.name for topic in topics).items() if count > 1]:
        raise ValueError(f"{twice[0]!r} is declared twice")
    return topics


def _plan(admin: _Admin, topics: Sequence[Topic]) -> list[Change]:
    changes = admin.differences(topics)
    admin.change(topics, changes, validate=True)
    return changes


async def plan(kafka: Connectable, topics: Sequence[Topic], within: float = 15.0) -> list[Change]:
    """In what the broker differs from the declarations, in their order; empty when it does not. Changes nothing.

    Raises `Refused` for what Kafka would not take, such as a setting that it does not know, `NoAnswer` when it does not
    answer a request within `within` seconds, `ValueError` for a topic that is declared twice.
    """
    admin = _Admin(kafka, within)
    return await asyncio.to_thread(_plan, admin, _checked(topics)) if topics else []


async def apply(kafka: Connectable, topics: Sequence[Topic], within: float = 15.0) -> list[Change]:
    """Makes the broker as declared, and returns what it changed; a second call changes nothing.

    Never deletes, and never touches what the declarations do not name. Kafka looks at all changes before the first is
    made. When it returns, every broker that it asked sees the new state, and new partitions are led. Raises as `plan`
    does, and `Impossible` for fewer partitions, other replicas, and more partitions of a compacted topic.
    """
    if not topics:
        return []
    admin = _Admin(kafka, within)
    changes = await asyncio.to_thread(_plan, admin, _checked(topics))
    if impossible := [change for change in changes if change.kind == "impossible"]:
        raise Impossible(impossible)
    await asyncio.to_thread(admin.change, topics, changes, False)
    if admin.overtaken:  # and made otherwise, perhaps
        return admin.done + await apply(kafka, topics, within)
    left: list[Change] = []

    async def reached() -> bool:
        left[:] = await asyncio.to_thread(admin.differences, topics)
        return not left

    try:
        await until(reached, within)
    except TimeoutError:
        raise BrokerError(f"applied, and yet after {within:g} s {'; '.join(map(str, left))}") from None
    for name in {change.topic for change in admin.done if change.kind != "config"}:
        await end_offsets(cast(Kafka, kafka), name)
    return admin.done


__all__ = ["Change", "Impossible", "NoAnswer", "Refused", "Topic", "apply", "librdkafka", "plan"]
