"""Ready means ready: one message through the broker, or an error that names what is wrong and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from .base import BrokerUnavailable, Version

T = TypeVar("T")

CONNECT_SECONDS = 3.0
SYNC_SECONDS = 2.0


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end from synchronous code, also where an event loop is running (a notebook's cell)."""
    result: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


_hush_lock = threading.Lock()
_hushed: dict[str, tuple[int, int]] = {}  # a logger's level before, and how many keep it silent now


@contextlib.contextmanager
def hushed(*loggers: str) -> Iterator[None]:
    """Silences client libraries while we ask on purpose what may fail; our own message says it better.

    Several threads may: the first notes the level, the last restores it.
    """
    with _hush_lock:
        for name in loggers:
            logger = logging.getLogger(name)
            level, holders = _hushed.get(name, (logger.level, 0))
            _hushed[name] = level, holders + 1
            logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        with _hush_lock:
            for name in loggers:
                level, holders = _hushed.pop(name)
                if holders > 1:
                    _hushed[name] = level, holders - 1
                else:
                    logging.getLogger(name).setLevel(level)


def split_address(address: str, default_port: int, variable: str) -> tuple[str, int]:
    """`host:port` as a pair. Raises `BrokerUnavailable` that names the variable it came from."""
    host, _, port = address.strip().rpartition(":") if ":" in address else (address.strip(), "", str(default_port))
    if not host or re.search(r"[\s/@]", host) or not port.isdigit() or not 0 < int(port) < 65536:
        raise BrokerUnavailable(f"{variable} has {address!r}, which is not host:port; write for example localhost:9092")
    return host.strip("[]"), int(port)


def why_unreachable(host: str, port: int) -> str:
    """An empty text when a TCP connection can be made; otherwise why not, as the end of a sentence."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            return ""
    except (socket.gaierror, UnicodeError):  # UnicodeError: no name at all, says Python before it asks
        return f"the name {host} cannot be resolved"
    except TimeoutError:
        return f"{host}:{port} does not answer within {CONNECT_SECONDS:.0f} s"
    except ConnectionRefusedError:
        return f"nothing listens on {host}:{port}"
    except OSError as error:
        return f"{host}:{port} cannot be reached ({error.strerror or error})"


def probe_kafka(bootstrap: str, security: dict[str, Any], within: float, replication: int = 1) -> Version:
    """Sends one record and reads it back. Returns the oldest version that this broker can be.

    Every server that the broker advertises is contacted, since a client that bootstraps well still cannot send when the
    advertised address is one that it cannot reach. Raises `BrokerUnavailable`, within `within` seconds.
    """
    addresses = [split_address(address, 9092, "MQLIB_KAFKA_BOOTSTRAP") for address in bootstrap.split(",")]
    with ThreadPoolExecutor(len(addresses)) as pool:
        problems = list(pool.map(lambda address: why_unreachable(*address), addresses))
    if all(problems):
        raise BrokerUnavailable(
            f"Kafka at {bootstrap}: {problems[0]}. Is it running, and is the address right? "
            "It comes from MQLIB_KAFKA_BOOTSTRAP."
        )
    with hushed("aiokafka"):
        return run_blocking(_round_trip_kafka(bootstrap, security, within, replication))


async def _round_trip_kafka(bootstrap: str, security: dict[str, Any], within: float, replication: int) -> Version:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic
    from aiokafka.errors import KafkaError

    at = f"Kafka at {bootstrap}"
    client = {"bootstrap_servers": bootstrap, "request_timeout_ms": int(within * 1000), **security}
    admin = AIOKafkaAdminClient(**client)
    session = False
    try:
        async with asyncio.timeout(within):
            await admin.start()
            session = True
            # What the bootstrap told, before any server is talked to by its advertised address.
            servers = sorted(admin._client.cluster.brokers())
            problems = await asyncio.gather(*(asyncio.to_thread(why_unreachable, s.host, s.port) for s in servers))
            for server, problem in zip(servers, problems, strict=True):
                if problem:
                    raise BrokerUnavailable(
                        f"{at} answers, but says that its server {server.nodeId} is at "
                        f"{server.host}:{server.port}, and {problem} from here. "
                        "Set advertised.listeners on that server to an address that this machine can reach."
                    )
            if replication > 1:  # a cluster of ours: every server has to know every other one
                known = [await _servers_known_to(address, client) for address in bootstrap.split(",")]
                if len([count for count in known if count >= replication]) < replication:
                    raise BrokerUnavailable(f"{at}: its servers know {known} of {replication} servers so far")
            topic = f"mq-ready-{secrets.token_hex(4)}"
            try:
                made = await admin.create_topics([NewTopic(topic, 1, replication)])
            except AttributeError:  # aiokafka 0.14, where the metadata name no controller: just after a freeze
                raise BrokerUnavailable(f"{at}: its servers have no controller so far") from None
            code, text = made.topic_errors[0][1:3]
            if code:
                raise BrokerUnavailable(f"{at}: cannot create a topic here ({text or f'error {code}'})")
            async with AIOKafkaProducer(**client) as producer:
                await producer.send_and_wait(topic, b"ready?")
            consumer = AIOKafkaConsumer(**client)
            await consumer.start()
            try:
                consumer.assign([TopicPartition(topic, 0)])
                consumer.seek(TopicPartition(topic, 0), 0)
                await consumer.getone()
            finally:
                await consumer.stop()
            await admin.delete_topics([topic])
            # KIP-896: Kafka 4.0 dropped Fetch before version 4, a sign that any client can see.
            ranges = next(iter(admin._client._conns.values()))._versions
            return Version((4, 0)) if ranges.get(1, (0, 0))[0] >= 4 else Version((3, 0))
    except (KafkaError, TimeoutError, OSError, ValueError) as error:
        if not session:
            raise BrokerUnavailable(f"{at}: {_why_no_session(security, error)}") from None
        raise BrokerUnavailable(
            f"{at} answers, but a record could not be sent and read back within {within:.0f} s "
            f"({type(error).__name__}: {error})"
        ) from None
    finally:
        with contextlib.suppress(Exception):
            await admin.close()


async def _servers_known_to(address: str, client: dict[str, Any]) -> int:
    """How many servers the one at `address` knows; 0 when it is one that does not answer."""
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import KafkaError

    admin = AIOKafkaAdminClient(**{**client, "bootstrap_servers": address})
    try:
        await admin.start()
        return len(admin._client.cluster.brokers())
    except KafkaError:
        return 0
    finally:
        await admin.close()


def _why_no_session(security: dict[str, Any], error: BaseException) -> str:
    protocol = security.get("security_protocol", "PLAINTEXT")
    if protocol.startswith("SASL"):
        return (
            f"it did not let {security.get('sasl_plain_username', 'the user')!r} in over {protocol} "
            f"({type(error).__name__}). Check MQLIB_KAFKA_USERNAME, …_PASSWORD and …_SASL_MECHANISM."
        )
    return (
        f"it accepts connections but does not answer as Kafka over {protocol} ({type(error).__name__}). "
        "Is it Kafka? Check MQLIB_KAFKA_SECURITY_PROTOCOL."
    )


def probe_rabbitmq(url: str, security: dict[str, Any], within: float) -> Version:
    """Publishes one message with a confirm and gets it back. Returns the server's version.

    Raises `BrokerUnavailable`, within `within` seconds.
    """
    parts = urlsplit(url)
    shown = f"RabbitMQ at {parts.hostname}"
    try:
        port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
    except ValueError:
        port = 0
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or not port:
        raise BrokerUnavailable("MQLIB_RABBITMQ_URL is not of the form amqp://user:password@host:5672/vhost")
    shown += f":{port}"
    if problem := why_unreachable(parts.hostname, port):
        raise BrokerUnavailable(
            f"{shown}: {problem}. Is it running, and is the address right? It comes from MQLIB_RABBITMQ_URL."
        )
    user, vhost = unquote(parts.username or "guest"), unquote(parts.path[1:]) or "/"
    with hushed("aio_pika", "aiormq", "asyncio"):
        return run_blocking(_round_trip_rabbitmq(shown, url, security, within, user, vhost))


async def _round_trip_rabbitmq(
    shown: str, url: str, security: dict[str, Any], within: float, user: str, vhost: str
) -> Version:
    import aio_pika
    from aiormq.exceptions import (
        AMQPError,
        AuthenticationError,
        ChannelAccessRefused,
        ConnectionNotAllowed,
        InvalidFrameError,
        ProbableAuthenticationError,
    )  # fmt: skip

    session = False
    try:
        async with asyncio.timeout(within):
            async with await aio_pika.connect(url, **security) as connection:
                session = True
                properties = connection.transport.connection.server_properties
                channel = await connection.channel()
                queue = await channel.declare_queue(exclusive=True)
                await channel.default_exchange.publish(aio_pika.Message(b"ready?"), queue.name)
                await queue.get(no_ack=True)
                version = properties["version"]
                return Version.parse(version if isinstance(version, str) else version.decode())
    except (AuthenticationError, ProbableAuthenticationError):
        why = f"it refuses the user {user!r} or the password. Check MQLIB_RABBITMQ_URL."
    except (ConnectionNotAllowed, InvalidFrameError):
        # A vhost that is missing or forbidden ends the handshake in a frame that aiormq does not expect.
        why = f"the vhost {vhost!r} does not exist, or {user!r} may not use it. Check the end of MQLIB_RABBITMQ_URL."
    except ChannelAccessRefused as error:
        why = (
            f"{user!r} may not make, fill and read a queue in the vhost {vhost!r}. Give it the rights there. ({error})"
        )
    except TimeoutError:
        why = (
            f"it answers, but a message could not be sent and fetched back within {within:.0f} s."
            if session
            else f"it accepts connections but does not answer as RabbitMQ within {within:.0f} s. Is it RabbitMQ?"
        )
    except (AMQPError, OSError, EOFError) as error:
        why = f"it accepts connections but does not answer as RabbitMQ ({type(error).__name__}: {error})."
    raise BrokerUnavailable(f"{shown}: {why}")


def sync_rabbitmq(console: str) -> None:
    """Makes a server keep all that was declared on it, by one more change, of a parameter, in its management API.

    Mnesia logs a change, and in a second record that it holds; RabbitMQ, which flushes the log before it answers, may
    come in between. The second record then waits up to 2 s, or for the next flush, and a change without it is dropped
    at the next start: a durable queue that was just declared, with its confirmed messages. A server that does not
    answer is let be.
    """
    import httpx

    with contextlib.suppress(httpx.HTTPError):
        parameter = {"value": secrets.token_hex(4)}  # another one each time
        httpx.put(f"{console}/api/global-parameters/mqlib-sync", json=parameter, timeout=SYNC_SECONDS)
