"""Seconds until a broker of one's own takes a message, from each provider that this machine has."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from unittest.mock import patch

import mqlib as mq
from mqlib.brokers import ADDRESS, Broker, BrokerUnavailable, choose
from tests.benchmarks.core import Contender

START: dict[str, Callable[[], Broker]] = {
    "kafka": lambda: mq.kafka(private=True),
    "rabbitmq": lambda: mq.rabbitmq(private=True),
}


def start(kind: str, provider: str) -> Callable[[], Awaitable[float]]:
    async def measure() -> float:
        begun = perf_counter()
        with patch.dict(os.environ, {"MQLIB_PROVIDER": provider}), START[kind]():
            return perf_counter() - begun

    return measure


@asynccontextmanager
async def contenders(quick: bool) -> AsyncIterator[list[Contender]]:
    found = []
    for kind in ADDRESS:
        for provider in ("process", "container"):
            try:
                with patch.dict(os.environ, {"MQLIB_PROVIDER": provider}):
                    choose(kind, private=True)
            except BrokerUnavailable:
                continue
            found.append(Contender(f"mq.{kind}, {provider}", start(kind, provider), "s", rounds=3, alone=True))
    yield found
