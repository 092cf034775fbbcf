"""Waiting for a fact, never for a length of time; and work beside a block that ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine
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


@contextlib.asynccontextmanager
async def beside(
    work: Coroutine[Any, Any, Any], stop: Callable[[], object] | None = None
) -> AsyncIterator[asyncio.Task[Any]]:
    """Runs `work` as a task during the block; at its end `stop()` asks it to finish (without one it is cancelled).

    The block ends when the task has ended. If the task fails first, the block is interrupted at once and the error is
    the task's: what the block waits for may never come.
    """
    block = asyncio.current_task()
    assert block is not None
    task = asyncio.create_task(work)
    interrupted = leaving = False

    def interrupt(done: asyncio.Task[Any]) -> None:
        nonlocal interrupted
        if not leaving and not done.cancelled() and done.exception() is not None:
            interrupted = True
            block.cancel()

    task.add_done_callback(interrupt)
    try:
        yield task
    except asyncio.CancelledError:
        if not interrupted or block.uncancel() > 0:
            raise
    finally:
        leaving = True  # the callback may be on its way, when both end in the same turn of the loop
        (stop or task.cancel)()
        await asyncio.wait([task])
    if not task.cancelled():
        await task
