"""Brokers that somebody else runs: addresses, TLS and credentials from the environment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from .base import BrokerUnavailable, Kafka, RabbitMQ, Version
from .probe import hushed, probe_kafka, probe_rabbitmq, run_blocking

PROBE_SECONDS = 10.0
CLEAN_UP_SECONDS = 5.0
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


def _tls(variable: str) -> ssl.SSLContext:
    """The context for a TLS listener: the system's authorities, or the file that `variable` names."""
    path = os.environ.get(variable)
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise BrokerUnavailable(
            f"{variable} is {path!r}, which cannot be read as a certificate file: {error}"
        ) from None


def _carried(*names: str) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def kafka() -> Kafka:
    """The Kafka of `MQLIB_KAFKA_BOOTSTRAP`, tried out with one record. Raises `BrokerUnavailable`."""
    bootstrap = os.environ["MQLIB_KAFKA_BOOTSTRAP"]
    protocol = os.environ.get("MQLIB_KAFKA_SECURITY_PROTOCOL", "PLAINTEXT").upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise BrokerUnavailable(
            f"MQLIB_KAFKA_SECURITY_PROTOCOL is {protocol!r}; use PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
        )
    security: dict[str, Any] = {}
    if protocol != "PLAINTEXT":
        security["security_protocol"] = protocol
    if protocol.endswith("SSL"):
        security["ssl_context"] = _tls("MQLIB_KAFKA_CA")
    if protocol.startswith("SASL"):
        mechanism = os.environ.get("MQLIB_KAFKA_SASL_MECHANISM", "PLAIN")
        if mechanism not in MECHANISMS:
            raise BrokerUnavailable(f"MQLIB_KAFKA_SASL_MECHANISM is {mechanism!r}; use one of {', '.join(MECHANISMS)}")
        security["sasl_mechanism"] = mechanism
        for argument, name in (("username", "MQLIB_KAFKA_USERNAME"), ("password", "MQLIB_KAFKA_PASSWORD")):
            if name not in os.environ:
                raise BrokerUnavailable(f"MQLIB_KAFKA_SECURITY_PROTOCOL is {protocol}, but {name} is not set")
            security[f"sasl_plain_{argument}"] = os.environ[name]
    told = os.environ.get("MQLIB_KAFKA_VERSION", "")
    try:
        version = Version.parse(told) if told else None
    except ValueError:
        raise BrokerUnavailable(f"MQLIB_KAFKA_VERSION is {told!r}; write for example 4.3.1, or unset it") from None
    least = probe_kafka(bootstrap, security, PROBE_SECONDS)
    broker = Kafka(
        provider="external",
        version=version or least,
        bootstrap=bootstrap,
        security=security,
        secured_by=_carried(
            "MQLIB_KAFKA_SECURITY_PROTOCOL", "MQLIB_KAFKA_SASL_MECHANISM", "MQLIB_KAFKA_USERNAME",
            "MQLIB_KAFKA_PASSWORD", "MQLIB_KAFKA_CA",
        ),
    )  # fmt: skip
    broker.shared(lambda names: delete_topics(broker.client, names))
    return broker


def rabbitmq() -> RabbitMQ:
    """The RabbitMQ of `MQLIB_RABBITMQ_URL`, tried out with one message. Raises `BrokerUnavailable`."""
    url = os.environ["MQLIB_RABBITMQ_URL"]
    security: dict[str, Any] = {}
    if url.startswith("amqps:"):
        security["ssl_context"] = _tls("MQLIB_RABBITMQ_CA")
    version = probe_rabbitmq(url, security, PROBE_SECONDS)
    parts = urlsplit(url)  # for the usual places
    credentials = f"{parts.username or 'guest'}:{parts.password or 'guest'}"
    management = os.environ.get("MQLIB_RABBITMQ_MANAGEMENT_URL", f"http://{credentials}@{parts.hostname}:15672")
    metrics = os.environ.get("MQLIB_RABBITMQ_METRICS_URL", f"http://{parts.hostname}:15692/metrics")
    broker = RabbitMQ(
        provider="external",
        version=version,
        url=url,
        management_url=management.rstrip("/"),
        metrics_url=metrics.rstrip("/"),
        security=security,
        secured_by=_carried("MQLIB_RABBITMQ_CA"),
    )
    broker.shared(lambda names: delete_queues(broker.client, names))
    return broker


def delete_topics(client: dict[str, Any], names: list[str]) -> None:
    """Deletes those of `names` that are topics, as far as the broker still answers."""

    async def delete() -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(**client)
        async with asyncio.timeout(CLEAN_UP_SECONDS):
            await admin.start()
            await admin.delete_topics([name for name in await admin.list_topics() if name in set(names)])
            await admin.close()

    _best_effort(delete())


def delete_queues(client: dict[str, Any], names: list[str]) -> None:
    """Deletes those of `names` that are queues or exchanges, as far as the broker still answers."""

    async def delete() -> None:
        import aio_pika

        async with asyncio.timeout(CLEAN_UP_SECONDS), await aio_pika.connect(**client) as connection:
            channel = await connection.channel()
            for name in names:  # RabbitMQ answers as well where there is none
                await channel.queue_delete(name)
                await channel.exchange_delete(name)

    _best_effort(delete())


def _best_effort(work: Coroutine[Any, Any, None]) -> None:
    """A clean-up at the end of a process: what cannot be done must neither hold it up nor be shown as its failure."""
    with hushed("aiokafka", "aio_pika", "aiormq", "asyncio"), contextlib.suppress(Exception):
        run_blocking(work)
