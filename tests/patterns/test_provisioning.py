"""Topics as they were declared: only what differs is changed, all of it or nothing, and nothing that was not named."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

import mqlib as mq
from mqlib.brokers import BrokerError
from mqlib.patterns import provisioning
from mqlib.patterns.provisioning import Change, Impossible, NoAnswer, Refused, Topic, apply, librdkafka, plan

HOUR = 3_600_000


@pytest.fixture(scope="module")
def careless() -> Iterator[mq.Kafka]:
    """A Kafka that makes topics at their first use, with a proxy in front of it."""
    with mq.kafka(settings={"auto.create.topics.enable": "true"}) as broker:
        yield broker


async def configs(kafka: mq.Kafka, topic: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    answer = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    await admin.close()
    return {entry[0]: entry[1] for entry in answer[0].resources[0][4]}


async def names(kafka: mq.Kafka) -> set[str]:
    admin = AIOKafkaAdminClient(**kafka.client)
    await admin.start()
    found = set(await admin.list_topics())
    await admin.close()
    return found


async def test_a_missing_topic_is_made_and_can_be_used_at_once(kafka: mq.Kafka) -> None:
    topic = Topic(kafka.name("orders"), 3, configs={"cleanup.policy": "compact", "delete.retention.ms": HOUR,
                                                    "unclean.leader.election.enable": False})  # fmt: skip
    missing = Change(topic.name, "missing", "topic", "missing", "one with 3 partitions")
    assert await plan(kafka, [topic]) == [missing]
    assert topic.name not in await names(kafka), "a plan changes nothing"
    assert await apply(kafka, [topic]) == [missing]
    assert await mq.end_offsets(kafka, topic.name) == [0, 0, 0]
    there = await configs(kafka, topic.name)
    assert [there[name] for name in topic.configs] == ["compact", str(HOUR), "false"]
    assert await plan(kafka, [topic]) == []
    assert await apply(kafka, [topic]) == []


async def test_only_what_is_named_and_differs_is_changed(kafka: mq.Kafka) -> None:
    name = await mq.topic(kafka, "state", cleanup_policy="compact", retention_ms=HOUR, max_message_bytes=5000)
    other = await mq.topic(kafka, "other", retention_ms=HOUR)
    before, others = await configs(kafka, name), await configs(kafka, other)
    topic = Topic(name, 1, configs={"retention.ms": 2 * HOUR, "cleanup.policy": "compact"})
    drifted = [Change(name, "config", "retention.ms", str(HOUR), str(2 * HOUR))]
    assert await plan(kafka, [topic]) == drifted
    assert await configs(kafka, name) == before, "a plan changes nothing"
    assert await apply(kafka, [topic]) == drifted
    assert await configs(kafka, name) == before | {"retention.ms": str(2 * HOUR)}
    assert await configs(kafka, other) == others
    assert await apply(kafka, [Topic(name, 1)]) == []


async def test_several_settings_and_topics_at_once_in_their_order(kafka: mq.Kafka) -> None:
    one, two = await mq.topic(kafka, "one"), await mq.topic(kafka, "two")
    new = kafka.name("new")
    topics = [
        Topic(two, 4, configs={"retention.ms": HOUR, "max.message.bytes": 7000}),
        Topic(new, 2),
        Topic(one, 1, configs={"cleanup.policy": "compact"}),
    ]
    changes = await apply(kafka, topics)
    assert [(change.topic, change.kind, change.what) for change in changes] == [
        (two, "config", "retention.ms"), (two, "config", "max.message.bytes"), (two, "partitions", "partitions"),
        (new, "missing", "topic"), (one, "config", "cleanup.policy"),
    ]  # fmt: skip
    assert len(await mq.end_offsets(kafka, two)) == 4
    assert await plan(kafka, topics) == []


@pytest.mark.parametrize("policy", ["compact,delete", "delete,compact", "delete, compact"])
async def test_the_order_of_policies_is_no_difference(kafka: mq.Kafka, policy: str) -> None:
    name = await mq.topic(kafka, "state", cleanup_policy="compact,delete")
    assert await plan(kafka, [Topic(name, 1, configs={"cleanup.policy": policy})]) == []


async def test_what_cannot_be_reached_stops_everything_before_it_begins(kafka: mq.Kafka) -> None:
    many, state = await mq.topic(kafka, "many", 3), await mq.topic(kafka, "state", cleanup_policy="compact")
    new = kafka.name("new")
    topics = [
        Topic(new, 1),
        Topic(many, 2, replicas=3, configs={"retention.ms": HOUR}),
        Topic(state, 2),
    ]
    with pytest.raises(
        Impossible, match=r"nothing was changed: .*partitions is 3, not 2 \(partitions cannot"
    ) as caught:
        await apply(kafka, topics)
    assert [(change.topic, change.what, change.present, change.wanted) for change in caught.value.changes] == [
        (many, "partitions", "3", "2"), (many, "replicas", "1", "3"), (state, "partitions", "1", "2"),
    ]  # fmt: skip
    assert "keys would move" in str(caught.value)
    assert new not in await names(kafka)
    assert (await configs(kafka, many))["retention.ms"] != str(HOUR)
    assert [len(await mq.end_offsets(kafka, name)) for name in (many, state)] == [3, 1]


async def test_a_topic_that_becomes_compacted_does_not_grow_either(kafka: mq.Kafka) -> None:
    name = await mq.topic(kafka, "state")
    with pytest.raises(Impossible, match="keys would move"):
        await apply(kafka, [Topic(name, 2, configs={"cleanup.policy": "compact"})])


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("retention", "1", "Unknown topic config name: retention"),
        ("retention.ms", "a week", "a week"),
        ("cleanup.policy", "compress", "compress"),
    ],
)
async def test_a_setting_that_kafka_does_not_know_stops_everything_before_it_begins(
    kafka: mq.Kafka, setting: str, value: str, words: str
) -> None:
    there, new, first = await mq.topic(kafka, "there"), kafka.name("new"), kafka.name("first")
    for name in (there, new):
        wrong = [Topic(first, 1), Topic(name, 1, configs={setting: value, "max.message.bytes": 7000})]
        for call in (plan, apply):
            with pytest.raises(Refused, match=f"'{name}': Kafka refuses it: .*{words}.*; nothing was changed"):
                await call(kafka, wrong)
    assert not {new, first} & await names(kafka)
    assert (await configs(kafka, there))["max.message.bytes"] != "7000"


async def test_a_name_or_a_factor_that_kafka_does_not_take(kafka: mq.Kafka) -> None:
    for topic in (Topic("no spaces", 1), Topic(kafka.name("far"), 1, replicas=9)):
        with pytest.raises(Refused, match=f"'{topic.name}': Kafka refuses it"):
            await plan(kafka, [topic])


@pytest.mark.parametrize(
    "wrong",
    [{"partitions": 0}, {"partitions": 1, "replicas": 0}, {"partitions": 1, "configs": {"retention_ms": 1}},
     {"partitions": 1, "name": ""}],
)  # fmt: skip
def test_what_is_no_topic_is_said_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a topic has|settings have dots"):
        Topic(**{"name": "orders", **wrong})


async def test_a_topic_is_declared_once(kafka: mq.Kafka) -> None:
    for call in (plan, apply):
        with pytest.raises(ValueError, match="'orders' is declared twice"):
            await call(kafka, [Topic("orders", 1), Topic("other", 1), Topic("orders", 2)])
        assert await call(kafka, []) == []


async def test_who_is_overtaken_looks_again(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another deployment makes the topic after this one has looked, and otherwise."""
    name = kafka.name("orders")
    create = provisioning._Admin.create

    def late(self: Any, topic: Topic, validate: bool) -> bool:
        if validate:
            return create(self, topic, validate)
        monkeypatch.setattr(provisioning._Admin, "create", create)
        asyncio.run(apply(kafka, [Topic(name, 1, configs={"retention.ms": HOUR, "max.message.bytes": 7000})]))
        return create(self, topic, validate)

    monkeypatch.setattr(provisioning._Admin, "create", late)
    changes = await apply(kafka, [Topic(name, 2, configs={"retention.ms": 2 * HOUR})])
    assert [(change.kind, change.present, change.wanted) for change in changes] == [
        ("config", str(HOUR), str(2 * HOUR)), ("partitions", "1", "2")]  # fmt: skip
    there = await configs(kafka, name)
    assert (there["retention.ms"], there["max.message.bytes"]) == (str(2 * HOUR), "7000")


async def test_it_waits_until_new_partitions_are_led(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def ends(_: mq.Kafka, name: str) -> list[int]:
        asked.append(name)
        return []

    monkeypatch.setattr(provisioning, "end_offsets", ends)
    new, there, other = kafka.name("new"), await mq.topic(kafka, "there"), await mq.topic(kafka, "other")
    await apply(kafka, [Topic(new, 1), Topic(there, 2), Topic(other, 1, configs={"retention.ms": HOUR})])
    assert set(asked) == {new, there}


async def test_two_deployments_at_once_both_succeed(kafka: mq.Kafka) -> None:
    topics = [Topic(kafka.name(f"t{number}"), 2, configs={"retention.ms": HOUR}) for number in range(4)]
    changes = await asyncio.gather(apply(kafka, topics), apply(kafka, topics))
    made = [change.topic for each in changes for change in each]
    assert sorted(made) == sorted(topic.name for topic in topics), "each was made by one of the two"


async def test_a_failure_on_the_way_says_what_was_done(kafka: mq.Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    there, new = await mq.topic(kafka, "there"), kafka.name("new")
    set_ = provisioning._Admin.set

    def refused(self: Any, topic: Topic, some: Any, validate: bool) -> bool:
        wrong = Topic(topic.name, 1, configs={"retention.ms": "forbidden meanwhile"})
        return set_(self, topic if validate else wrong, some, validate)

    monkeypatch.setattr(provisioning._Admin, "set", refused)
    topics = [Topic(new, 1), Topic(there, 1, configs={"retention.ms": HOUR})]
    with pytest.raises(Refused, match=f"forbidden meanwhile.*; done before that: {new}: topic is missing"):
        await apply(kafka, topics)
    monkeypatch.setattr(provisioning._Admin, "set", set_)
    assert [change.topic for change in await apply(kafka, topics)] == [there], "and it can be tried again"


async def test_a_value_that_kafka_keeps_otherwise_is_said(kafka: mq.Kafka) -> None:
    name = await mq.topic(kafka, "there")
    with pytest.raises(BrokerError, match=r"applied, and yet after 0.3 s .*retention.ms is 5, not 05|refuses"):
        await apply(kafka, [Topic(name, 1, configs={"retention.ms": "05"})], within=0.3)


async def test_to_ask_for_a_topic_does_not_make_it(careless: mq.Kafka) -> None:
    name = careless.name("ordres")
    await plan(careless, [Topic(name, 3)])
    assert name not in await names(careless)
    assert [change.kind for change in await apply(careless, [Topic(name, 3)])] == ["missing"]
    assert len(await mq.end_offsets(careless, name)) == 3


async def test_no_answer_is_no_refusal(careless: mq.Kafka, capfd: pytest.CaptureFixture[str]) -> None:
    topic = Topic(careless.name("orders"), 1)
    async with mq.proxy(careless) as network:
        with network.swallow("up", "down"):
            for call in (plan, apply):
                with pytest.raises(NoAnswer, match=r"no answer within 0\.5 s.*apply again"):
                    await call(network, [topic], within=0.5)
        network.cut()
        assert len(await apply(network, [topic])) == 1
    assert capfd.readouterr().err == "", "librdkafka writes to stderr by itself"


def test_how_librdkafka_connects() -> None:
    secured = SimpleNamespace(
        client={
            "bootstrap_servers": "a:1", "security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN",
            "sasl_plain_username": "ann", "sasl_plain_password": "secret", "ssl_context": object(),
        },
        secured_by={"MQLIB_KAFKA_CA": "/ca.pem"},
    )  # fmt: skip
    assert librdkafka(secured) == {
        "bootstrap.servers": "a:1", "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN",
        "sasl.username": "ann", "sasl.password": "secret", "ssl.ca.location": "/ca.pem",
    }  # fmt: skip
