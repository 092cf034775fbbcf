"""Waiting for a fact, never for a length of time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

GRACE_SECONDS = 1.0


async def until(fact: Callable[[], Any], within: float = 5.0, every: float = 0.02) -> Any:
    """Asks `fact` (a plain or an async function) every `every` seconds until what it returns is true; returns that.

    Raises `TimeoutError`, which names the last value, after `within` seconds; an async `fact` that is still being asked
    then gets `GRACE_SECONDS` to answer.
    """
    deadline = time.monotonic() + within
    value: Any = None
    while True:
        value = fact()
        if inspect.isawaitable(value):
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0) + GRACE_SECONDS) as limit:
                    value = await value
            except TimeoutError:
                if not limit.expired():
                    raise
                raise TimeoutError(f"not within {within:g} s; the last question was not answered") from None
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:g} s; the last value was {value!r}")
        await asyncio.sleep(every)
