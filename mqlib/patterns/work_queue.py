"""Tasks that several workers share, each done at least once, and set aside after so many attempts.

The broker counts the attempts, so one that ends its worker's process each time counts as well as one that raises.
After "Competing Consumers" and "Invalid Message Channel" (Hohpe and Woolf, Enterprise Integration Patterns),
https://www.rabbitmq.com/tutorials/tutorial-two-python, https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aio_pika.abc import AbstractIncomingMessage

from ..brokers.base import Connectable
from ..queues import declare
from .link import Consumer, Link, consuming, link, uncancelled
from .sending import bury, json_message, send


@dataclass(frozen=True)
class Task:
    """What a worker is given."""

    data: Any
    id: str | None
    """The message id: a second delivery of a task has the same, and so has a task that was added again with it."""
    attempt: int
    """1 at the first; more when a worker failed, crashed or lost its connection."""


Handler = Callable[[Task], Awaitable[Any]]


def dead_letters_of(queue: str) -> str:
    """The name of the queue in which the tasks end that failed at every attempt."""
    return f"{queue}.dead-letters"


class TaskQueue:
    """A connection on which tasks are added to one queue; made by `task_queue`."""

    def __init__(self, queue: str, connection: Link) -> None:
        self.queue, self.link = queue, connection


@contextlib.asynccontextmanager
async def task_queue(rabbit: Connectable, queue: str, attempts: int = 3) -> AsyncIterator[TaskQueue]:
    """A `TaskQueue` for the length of the block. The queue and that of its dead letters are made if they are not there.

    Raises `BrokerError` if they are there with another number of attempts, `ValueError` if that is less than 1.
    """
    await _declare(rabbit, queue, attempts)
    async with link(rabbit) as connection:
        yield TaskQueue(queue, connection)


async def add_task(tasks: TaskQueue, data: Any, id: str | None = None, within: float = 5.0) -> str:
    """Adds `data` (what JSON can hold) as a persistent task, and returns its id once the broker has confirmed it.

    `id` is that of a task that is added again. Raises a kind of `Unconfirmed`, as `sending.send` does, within `within`
    seconds; `TypeError` for data that is not JSON.
    """
    message = json_message(data, id)
    await send(tasks.link, message, tasks.queue, within=within)
    return message.message_id or ""


async def _declare(rabbit: Connectable, queue: str, attempts: int) -> None:
    if attempts < 1:
        raise ValueError(f"attempts counts the first one, too, and is not {attempts}")
    quorum = {"x-queue-type": "quorum"}
    await declare(rabbit, dead_letters_of(queue), durable=True, arguments=quorum)
    route = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead_letters_of(queue)}
    # At least once to the dead letters, too; and the limit is on returns, so it is one less than the attempts.
    safe = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    limit = {"x-delivery-limit": attempts - 1}
    await declare(rabbit, queue, durable=True, arguments={**quorum, **route, **safe, **limit})


class Worker:
    """A worker of one queue; made by `start_worker`. Counts of tasks, unless it says otherwise."""

    def __init__(self, queue: str, handle: Handler, attempts: int, backoff: float) -> None:
        self.done = 0
        """Handlers that finished; a task that is delivered again counts again."""
        self.failed = 0
        """Attempts that raised."""
        self.unparsable = 0
        """Bodies that are not JSON; they are dead letters at once."""
        self.dead_lettered = 0
        """Set aside by this worker. Those whose worker crashed at every attempt are set aside by the broker."""
        self.consumer: Consumer
        """What delivers. `consumer.link.error` is why the last connection was lost, such as a limit that was passed."""
        self._queue, self._handle, self._attempts, self._backoff = queue, handle, attempts, backoff

    def __str__(self) -> str:
        words = ("done", "failed", "unparsable", "dead_lettered")
        return ", ".join(f"{word.replace('_', '-')} {getattr(self, word)}" for word in words)

    async def _work(self, message: AbstractIncomingMessage) -> None:
        """Does one task. When it returns, and has not settled the message, that is acknowledged."""
        attempt = int(str(message.headers.get("x-delivery-count") or 0)) + 1
        try:
            data = json.loads(message.body)
        except (ValueError, RecursionError) as error:
            self.unparsable += 1
            await self._set_aside(message, attempt, error)
            return
        try:
            with uncancelled():
                await self._handle(Task(data, message.message_id, attempt))
        except Exception as error:
            self.failed += 1
            if attempt >= self._attempts:
                await self._set_aside(message, attempt, error)
            else:
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1))
                await message.reject(requeue=True)
        else:
            self.done += 1

    async def _set_aside(self, message: AbstractIncomingMessage, attempt: int, error: Exception) -> None:
        letters = dead_letters_of(self._queue)
        await bury(self.consumer.link, message, error, attempt, self._queue, letters)
        self.dead_lettered += 1


@contextlib.asynccontextmanager
async def start_worker(
    rabbit: Connectable, queue: str, handle: Handler, attempts: int = 3, prefetch: int = 1, backoff: float = 0.1,
    drain: float = 5.0,
) -> AsyncIterator[Worker]:  # fmt: skip
    """Runs `handle(task)` for each task of the queue during the block, at most `prefetch` at once.

    At least once: a task is acknowledged when its handler has finished. One that raises is tried again after `backoff`
    seconds, doubled each time, which its place among the `prefetch` waits; so is one whose worker crashed, at once.
    After `attempts` in all it goes to `dead_letters_of(queue)`: from here with the headers `dead-letter-error` and
    `dead-letter-attempts`, after crashes from the broker with `x-death` and the reason delivery_limit. At the end of
    the block running handlers get `drain` seconds. Raises as `task_queue` does.
    """
    await _declare(rabbit, queue, attempts)
    worker = Worker(queue, handle, attempts, backoff)
    async with consuming(rabbit, queue, worker._work, prefetch, drain=drain) as worker.consumer:
        yield worker
