"""What every broker has, whoever provides it: a version that compares, names in a namespace, one end, one line."""

from __future__ import annotations

import gc

import pytest

import mqlib as mq
from mqlib.brokers import Version
from mqlib.brokers.base import namespace_of_environment

pytestmark = pytest.mark.usefixtures("clean")


def a_kafka(**fields: object) -> mq.Kafka:
    """A broker's outside, with nothing behind it."""
    return mq.Kafka(provider="process", version=Version((4, 3, 1)), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("4.3.1", (4, 3, 1)), ("4.0.5", (4, 0, 5)), ("3.10.8-rc.1", (3, 10, 8)), ("3.13.7+1.g1", (3, 13, 7)),
        ("4", (4,)), ("4.", (4,)), ("10.20.30.40", (10, 20, 30, 40)),
    ],
)  # fmt: skip
def test_a_version_is_the_numbers_that_its_text_begins_with(text: str, numbers: tuple[int, ...]) -> None:
    assert Version.parse(text) == numbers


@pytest.mark.parametrize("text", ["", "v4.3", "latest", ".1"])
def test_a_text_without_numbers_is_no_version(text: str) -> None:
    with pytest.raises(ValueError, match="not a version"):
        Version.parse(text)


def test_versions_compare_as_numbers_not_as_text() -> None:
    assert Version.parse("3.10.8") > Version.parse("3.9")
    assert Version.parse("3.10.8") < (4, 0) <= Version.parse("4.0.5")
    assert not Version.parse("3.10.8") >= (4, 0)
    assert min(Version.parse("4.0.5"), Version.parse("3.13")) == (3, 13)


def test_a_version_prints_as_text() -> None:
    assert str(Version.parse("3.10.8-rc.1")) == "3.10.8"
    assert f"{Version((4, 0))}" == "4.0"
    assert str(Version()) == "unknown version"


def test_names_are_fresh_and_in_the_namespace() -> None:
    broker = a_kafka(namespace="class.anna")
    made = [broker.name("orders") for _ in range(100)]
    assert len(set(made)) == 100
    assert all(name.startswith("class.anna.orders.") for name in made)


def test_a_kernel_that_was_restarted_in_the_same_namespace_makes_other_names() -> None:
    """The counter starts again with each object: names differ all the same."""
    names = {a_kafka(namespace="anna").name("orders") for _ in range(20)}
    assert len(names) == 20


@pytest.mark.parametrize("base", ["", "two words", "a/b", "a*", "größe", "a\n", "x" * 81, "a#", "a:b"])
def test_a_name_with_characters_that_a_topic_cannot_have_is_refused(base: str) -> None:
    with pytest.raises(mq.BrokerError, match="cannot be a name"):
        a_kafka().name(base)


@pytest.mark.parametrize("base", ["orders", "orders.v1", "a-b_c", "7", "x" * 80])
def test_a_name_that_kafka_and_rabbitmq_both_accept_is_kept_readable(base: str) -> None:
    name = a_kafka(namespace="n" * 80).name(base)
    assert f".{base}." in name
    assert len(name) <= 249, "Kafka's limit for a topic"


def test_without_a_namespace_each_broker_has_one_of_its_own() -> None:
    first, second = a_kafka().namespace, a_kafka().namespace
    assert first != second
    assert first.startswith("mq-")


def test_mqlib_namespace_is_honoured(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("MQLIB_NAMESPACE", "room-3.anna")
    broker = a_kafka()
    assert broker.namespace == "room-3.anna"
    assert broker.name("orders").startswith("room-3.anna.orders.")


@pytest.mark.parametrize("value", ["room 3", "a/b", "ü", "x" * 81, "a\n"])
def test_a_namespace_that_cannot_stand_in_names_is_refused(clean: pytest.MonkeyPatch, value: str) -> None:
    clean.setenv("MQLIB_NAMESPACE", value)
    with pytest.raises(mq.BrokerError, match="MQLIB_NAMESPACE is"):
        namespace_of_environment()


def test_stop_ends_a_broker_of_our_own_once() -> None:
    ended: list[str] = []
    broker = a_kafka()
    broker.own(lambda: ended.append("ended"))
    assert broker.running
    broker.stop()
    broker.stop()
    assert (ended, broker.running) == (["ended"], False)


def test_the_end_of_the_block_is_the_end_of_the_broker() -> None:
    ended: list[str] = []
    broker = a_kafka()
    broker.own(lambda: ended.append("ended"))
    with broker as same:
        assert same is broker
    assert ended == ["ended"]


def test_a_broker_that_nobody_holds_ends() -> None:
    ended: list[str] = []
    broker = a_kafka()
    broker.own(lambda: ended.append("ended"))
    broker.name("orders")
    del broker
    gc.collect()
    assert ended == ["ended"]


def test_a_shared_broker_loses_what_was_named_once_and_stays() -> None:
    deleted: list[list[str]] = []
    broker = a_kafka()
    broker.shared(deleted.append)
    topic, group = broker.name("orders"), broker.name("billing")
    broker.stop()
    broker.stop()
    assert deleted == [[topic, group]]
    assert broker.running
    later = broker.name("orders")
    broker.clean_up()
    assert deleted[1:] == [[later]]


def test_the_line_says_what_it_is_who_provides_it_and_why() -> None:
    assert repr(a_kafka()) == "Kafka 4.3.1, process"
    assert repr(a_kafka(why="no Docker here")) == "Kafka 4.3.1, process (no Docker here)"
    rabbit = mq.RabbitMQ(provider="external", version=Version((3, 10)), why="MQLIB_RABBITMQ_URL is set")
    assert str(rabbit) == "RabbitMQ 3.10, external (MQLIB_RABBITMQ_URL is set)"


def test_the_line_shows_no_credentials() -> None:
    rabbit = mq.RabbitMQ(provider="external", version=Version((3, 10)), url="amqp://anna:secret@127.0.0.1/")
    assert "secret" not in repr(rabbit)
    assert "secret" not in repr(a_kafka(security={"sasl_plain_password": "secret"}))


def test_the_clients_arguments_are_addresses_and_security() -> None:
    kafka = a_kafka(bootstrap="127.0.0.1:9092", security={"security_protocol": "SSL"})
    assert kafka.client == {"bootstrap_servers": "127.0.0.1:9092", "security_protocol": "SSL"}
    rabbit = mq.RabbitMQ(provider="process", version=Version((4, 0)), url="amqp://127.0.0.1/")
    assert rabbit.client == {"url": "amqp://127.0.0.1/"}
