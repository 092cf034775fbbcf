"""A broker that cannot be used is one message, soon, that names what is wrong (B01): no traceback of a library."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from urllib.parse import quote, urlsplit

import httpx
import pytest

import mqlib as mq
from mqlib.brokers import BrokerUnavailable, external, machine, process
from mqlib.brokers.probe import hushed, probe_kafka, probe_rabbitmq, run_blocking, split_address
from mqlib.queues import management
from tests.brokers import servers
from tests.brokers.conftest import told

WITHIN = 15.0
pytestmark = pytest.mark.usefixtures("clean")


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises `BrokerUnavailable` within the time that is allowed, in a message of our own, with `words`."""
    start = time.monotonic()
    with pytest.raises(BrokerUnavailable) as failure:
        yield
    assert time.monotonic() - start < WITHIN
    text = str(failure.value)
    assert "Traceback" not in text
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None, "the library's error is not shown"
    for word in words:
        assert word in text, text


def kafka_at(address: str, **variables: str) -> mq.Kafka:
    with told(MQLIB_KAFKA_BOOTSTRAP=address, **{f"MQLIB_KAFKA_{key}": value for key, value in variables.items()}):
        return external.kafka()


def rabbit_at(url: str) -> mq.RabbitMQ:
    with told(MQLIB_RABBITMQ_URL=url):
        return external.rabbitmq()


# Where there is no broker at all.

NOBODY: list[tuple[Callable[[], AbstractContextManager[int]], str, str]] = [
    (servers.black_hole, "does not answer as Kafka", "does not answer as RabbitMQ"),
    (servers.full_backlog, "does not answer within 3 s", "does not answer within 3 s"),
    (servers.hanging_up, "does not answer as Kafka", "does not answer as RabbitMQ"),
    (servers.web_server, "does not answer as Kafka", "does not answer as RabbitMQ"),
]
EACH = pytest.mark.parametrize(
    ("server", "kafka_says", "rabbit_says"), NOBODY, ids=[each[0].__name__ for each in NOBODY]
)


@pytest.fixture
def soon(clean: pytest.MonkeyPatch) -> None:
    """Gives a server that says nothing a third of its time; `test_external` waits for all of it."""
    assert external.PROBE_SECONDS < WITHIN
    clean.setattr(external, "PROBE_SECONDS", external.PROBE_SECONDS / 3)


@EACH
def test_kafka_where_something_else_is(
    soon: None, server: Callable[[], AbstractContextManager[int]], kafka_says: str, rabbit_says: str
) -> None:
    with server() as port, refused(f"127.0.0.1:{port}", kafka_says):
        kafka_at(f"127.0.0.1:{port}")


@EACH
def test_rabbitmq_where_something_else_is(
    soon: None, server: Callable[[], AbstractContextManager[int]], kafka_says: str, rabbit_says: str
) -> None:
    with server() as port, refused(f"127.0.0.1:{port}", rabbit_says):
        rabbit_at(f"amqp://127.0.0.1:{port}/")


def test_a_port_at_which_nobody_listens() -> None:
    port = servers.closed_port()
    with refused(f"nothing listens on 127.0.0.1:{port}", "MQLIB_KAFKA_BOOTSTRAP"):
        kafka_at(f"127.0.0.1:{port}")
    with refused(f"nothing listens on 127.0.0.1:{port}", "MQLIB_RABBITMQ_URL"):
        rabbit_at(f"amqp://127.0.0.1:{port}/")


def test_a_name_that_cannot_be_resolved() -> None:
    with refused("the name kafka.invalid cannot be resolved", "MQLIB_KAFKA_BOOTSTRAP"):
        kafka_at("kafka.invalid:9092")
    with refused("the name rabbit.invalid cannot be resolved", "MQLIB_RABBITMQ_URL"):
        rabbit_at("amqp://rabbit.invalid:5672/")


@pytest.mark.parametrize("label", ["x" * 70, "a..b", "ü" * 70])
def test_a_name_that_can_be_none(label: str) -> None:
    """Names that Python refuses to encode before any resolver is asked."""
    with refused("cannot be resolved"):
        kafka_at(f"{label}.invalid:9092")
    with refused("cannot be resolved"):
        rabbit_at(f"amqp://{label}.invalid:5672/")


def test_several_dead_addresses_are_within_the_time_too() -> None:
    """Each is tried, and all of them together may take no longer than one."""
    with servers.full_backlog() as one, refused("127.0.0.1:"):
        kafka_at(",".join([f"127.0.0.1:{one}"] * 6))


@pytest.mark.parametrize(
    "address",
    [
        "localhost:kafka",
        "localhost:",
        ":9092",
        "localhost:0",
        "localhost:65536",
        "http://localhost:9092",
        "a:1,,b:2",
        "",
    ],
)
def test_a_bootstrap_that_is_not_host_and_port(address: str) -> None:
    with refused("MQLIB_KAFKA_BOOTSTRAP", "host:port"):
        probe_kafka(address, {}, WITHIN)


@pytest.mark.parametrize(
    ("address", "pair"),
    [
        ("localhost:9092", ("localhost", 9092)), ("broker", ("broker", 9092)), (" b:1 ", ("b", 1)),
        ("[::1]:9093", ("::1", 9093)),
    ],
)  # fmt: skip
def test_an_address_is_split(address: str, pair: tuple[str, int]) -> None:
    assert split_address(address, 9092, "MQLIB_KAFKA_BOOTSTRAP") == pair


@pytest.mark.parametrize(
    "url",
    [
        "localhost:5672",
        "http://localhost:15672",
        "amqp://",
        "amqp:///",
        "amqp://localhost:rabbit/",
        "amqp://h:99999/",
        "",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    with refused("MQLIB_RABBITMQ_URL is not of the form amqp://user:password@host:5672/vhost"):
        rabbit_at(url)


def test_a_message_shows_no_password() -> None:
    for port in (servers.closed_port(), 0):
        with pytest.raises(BrokerUnavailable) as failure:
            rabbit_at(f"amqp://anna:geheim@127.0.0.1:{port}/")
        assert "geheim" not in str(failure.value)


# RabbitMQ that does not let us in.


def at(rabbit: mq.RabbitMQ, user: str = "guest:guest", vhost: str = "/", scheme: str = "amqp") -> str:
    return f"{scheme}://{user}@127.0.0.1:{urlsplit(rabbit.url).port}{vhost}"


def test_a_wrong_password_and_an_unknown_user(own_rabbit: mq.RabbitMQ) -> None:
    with refused("it refuses the user 'guest' or the password", "MQLIB_RABBITMQ_URL"):
        rabbit_at(at(own_rabbit, "guest:wrong"))
    with refused("it refuses the user 'nobody' or the password"):
        rabbit_at(at(own_rabbit, "nobody:guest"))


def test_a_vhost_that_is_not_there_or_forbidden(own_rabbit: mq.RabbitMQ) -> None:
    with refused("the vhost 'missing' does not exist, or 'guest' may not use it"):
        rabbit_at(at(own_rabbit, vhost="/missing"))
    with httpx.Client(base_url=own_rabbit.management_url) as api:
        api.put("/api/users/limited", json={"password": "p", "tags": ""}).raise_for_status()
        try:
            with refused("the vhost '/' does not exist, or 'limited' may not use it"):
                rabbit_at(at(own_rabbit, "limited:p"))
        finally:
            api.delete("/api/users/limited").raise_for_status()


def test_a_user_who_may_not_declare(own_rabbit: mq.RabbitMQ) -> None:
    """Let in, but without the rights that a notebook needs: the message says that it is about rights."""
    with httpx.Client(base_url=own_rabbit.management_url) as api:
        api.put("/api/users/reader", json={"password": "p", "tags": ""}).raise_for_status()
        rights = {"configure": "^$", "write": "^$", "read": ".*"}
        api.put("/api/permissions/%2F/reader", json=rights).raise_for_status()
        try:
            with refused("'reader'", "may not"):
                rabbit_at(at(own_rabbit, "reader:p"))
        finally:
            api.delete("/api/users/reader").raise_for_status()


def test_tls_where_rabbitmq_speaks_none(own_rabbit: mq.RabbitMQ) -> None:
    with refused("does not answer as RabbitMQ", "SSL"):
        rabbit_at(at(own_rabbit, scheme="amqps"))


def test_a_password_with_signs_that_a_url_cannot_have(own_rabbit: mq.RabbitMQ) -> None:
    secret = "p@ss/w:rd#%"
    with httpx.Client(base_url=own_rabbit.management_url) as api:
        api.put("/api/users/anna", json={"password": secret, "tags": "administrator"}).raise_for_status()
        rights = {"configure": ".*", "write": ".*", "read": ".*"}
        api.put("/api/permissions/%2F/anna", json=rights).raise_for_status()
        try:
            broker = rabbit_at(at(own_rabbit, f"anna:{quote(secret, safe='')}"))
            assert broker.version == own_rabbit.version
        finally:
            api.delete("/api/users/anna").raise_for_status()


# Kafka that bootstraps and then cannot be used, or does not let us in.


@pytest.fixture(scope="module")
def listeners() -> Iterator[dict[str, int]]:
    """A Kafka with listeners of several kinds: their ports by name.

    `SASL` wants a password; `AWAY` advertises a name that is none, `HOLE` a place that never answers.
    """
    ports = machine.free_ports(7)
    client, controller, proxy, advertised, sasl, away, hole = ports
    with servers.full_backlog() as nowhere, told(MQLIB_PROVIDER="process") as patch:
        patch.setattr(process, "free_ports", lambda count: ports[:count])
        listening = {
            "PLAINTEXT": client, "CONTROLLER": controller, "PROXY": proxy, "SASL": sasl, "AWAY": away, "HOLE": hole,
        }  # fmt: skip
        told_to_clients = {
            "PLAINTEXT": client, "PROXY": advertised, "SASL": sasl, "HOLE": nowhere,
        }  # fmt: skip
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        broker = mq.kafka(
            settings={
                "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in listening.items()),
                "advertised.listeners": ",".join(
                    [f"{name}://127.0.0.1:{port}" for name, port in told_to_clients.items()]
                    + ["AWAY://kafka.invalid:9092"]
                ),
                "listener.security.protocol.map": ",".join(
                    f"{name}:{'SASL_PLAINTEXT' if name == 'SASL' else 'PLAINTEXT'}" for name in listening
                ),
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.sasl.plain.sasl.jaas.config": f'{plain} user_anna="geheim" user_broker="b";',
            }
        )
        with broker:
            yield {**listening, "PROXY advertises": advertised, "HOLE advertises": nowhere}


def test_an_advertised_address_at_which_nobody_listens(own_kafka: mq.Kafka) -> None:
    """B01: it bootstraps, and every send would fail."""
    assert own_kafka.proxy_ports is not None
    behind, advertised = own_kafka.proxy_ports
    with refused(f"127.0.0.1:{behind} answers", f"nothing listens on 127.0.0.1:{advertised}", "advertised.listeners"):
        kafka_at(f"127.0.0.1:{behind}")


def test_an_advertised_name_that_cannot_be_resolved(listeners: dict[str, int]) -> None:
    with refused("is at kafka.invalid:9092", "cannot be resolved", "advertised.listeners"):
        kafka_at(f"127.0.0.1:{listeners['AWAY']}")


def test_an_advertised_address_that_never_answers(listeners: dict[str, int]) -> None:
    with refused(f"127.0.0.1:{listeners['HOLE advertises']}", "does not answer within 3 s", "advertised.listeners"):
        kafka_at(f"127.0.0.1:{listeners['HOLE']}")


def sasl(listeners: dict[str, int], user: str, password: str, **more: str) -> mq.Kafka:
    return kafka_at(
        f"127.0.0.1:{listeners['SASL']}",
        **{"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "USERNAME": user, "PASSWORD": password, **more},
    )


async def test_credentials_that_are_right(listeners: dict[str, int]) -> None:
    """And they travel: the environment of this broker makes another process use it."""
    broker = await asyncio.to_thread(sasl, listeners, "anna", "geheim")
    with told(**broker.environment):
        again = await asyncio.to_thread(external.kafka)
    topic = await mq.topic(again, "secured")
    async with mq.producer(again) as producer:
        await producer.send_and_wait(topic, b"let in")
    assert [record.value for record in await mq.read(broker, topic)] == [b"let in"]
    again.clean_up()


@pytest.mark.parametrize(("user", "password"), [("anna", "wrong"), ("nobody", "geheim"), ("anna", "")])
def test_credentials_that_are_wrong(listeners: dict[str, int], user: str, password: str) -> None:
    with refused(f"did not let {user!r} in over SASL_PLAINTEXT", "MQLIB_KAFKA_USERNAME"):
        sasl(listeners, user, password)


def test_a_mechanism_that_the_broker_does_not_have(listeners: dict[str, int]) -> None:
    with refused("SASL_MECHANISM"):
        sasl(listeners, "anna", "geheim", SASL_MECHANISM="SCRAM-SHA-512")


@pytest.mark.parametrize("mechanism", ["NONSENSE", "plain"])
def test_a_mechanism_that_does_not_exist(listeners: dict[str, int], mechanism: str) -> None:
    with refused("MQLIB_KAFKA_SASL_MECHANISM"):
        sasl(listeners, "anna", "geheim", SASL_MECHANISM=mechanism)


def test_credentials_where_they_are_not_asked_for(own_kafka: mq.Kafka) -> None:
    with refused("SASL_PLAINTEXT"):
        kafka_at(own_kafka.bootstrap, SECURITY_PROTOCOL="SASL_PLAINTEXT", USERNAME="a", PASSWORD="b")


def test_no_credentials_where_they_are_asked_for(listeners: dict[str, int]) -> None:
    with refused("MQLIB_KAFKA_SECURITY_PROTOCOL"):
        kafka_at(f"127.0.0.1:{listeners['SASL']}")


def test_tls_where_kafka_speaks_none(own_kafka: mq.Kafka) -> None:
    with refused("does not answer as Kafka over SSL", "MQLIB_KAFKA_SECURITY_PROTOCOL"):
        kafka_at(own_kafka.bootstrap, SECURITY_PROTOCOL="SSL")


def test_settings_that_cannot_be_are_refused_before_anything_is_tried() -> None:
    nowhere = f"127.0.0.1:{servers.closed_port()}"
    with refused("MQLIB_KAFKA_SECURITY_PROTOCOL is 'TLS'", "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"):
        kafka_at(nowhere, SECURITY_PROTOCOL="tls")
    with refused("MQLIB_KAFKA_USERNAME is not set"):
        kafka_at(nowhere, SECURITY_PROTOCOL="SASL_PLAINTEXT", PASSWORD="p")
    with refused("MQLIB_KAFKA_PASSWORD is not set"):
        kafka_at(nowhere, SECURITY_PROTOCOL="SASL_SSL", USERNAME="u")
    with refused("MQLIB_KAFKA_CA is '/nonexistent'"):
        kafka_at(nowhere, SECURITY_PROTOCOL="SSL", CA="/nonexistent")
    with refused("MQLIB_KAFKA_CA is", "cannot be read as a certificate file"):
        kafka_at(nowhere, SECURITY_PROTOCOL="SSL", CA=__file__)


# What asking leaves behind: nothing.


async def test_asking_leaves_no_topic_and_no_queue(own_kafka: mq.Kafka, own_rabbit: mq.RabbitMQ) -> None:
    least = await asyncio.to_thread(probe_kafka, own_kafka.bootstrap, {}, WITHIN)
    assert (4, 0) <= least <= own_kafka.version
    assert await asyncio.to_thread(probe_rabbitmq, own_rabbit.url, {}, WITHIN) == own_rabbit.version
    async with mq.consumer(own_kafka) as consumer:
        left = await consumer.topics()
    assert [name for name in left if name.startswith("mq-ready")] == []
    there = [queue["name"] for queue in await management(own_rabbit, "/queues")]
    assert [name for name in there if name.startswith("amq.gen")] == []


def test_two_that_ask_at_once_do_not_silence_a_library_for_good() -> None:
    """Both brokers start side by side, and each hushes clients while it asks."""
    logger = logging.getLogger("mqlib.tests.hushed")
    logger.setLevel(logging.WARNING)
    first, second = hushed(logger.name), hushed(logger.name)
    first.__enter__()
    second.__enter__()
    assert not logger.isEnabledFor(logging.CRITICAL)
    first.__exit__(None, None, None)
    assert not logger.isEnabledFor(logging.CRITICAL), "the second still asks"
    second.__exit__(None, None, None)
    assert logger.level == logging.WARNING


async def test_what_fails_in_the_thread_is_raised_in_the_cell() -> None:
    async def fails() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run_blocking(fails())
