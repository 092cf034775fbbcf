"""A function in a Python process of its own, so that it can be killed, or kill itself, as real consumers do."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import os
import pickle
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from typing import Any

from .brokers import Kafka, RabbitMQ
from .waiting import until

KILLED = -signal.SIGKILL if hasattr(signal, "SIGKILL") else 1


def crash() -> None:
    """Ends this process at once, as SIGKILL does: nothing is closed, flushed, committed or acknowledged."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


class WorkerFailed(RuntimeError):
    """The function raised; the message is the end of its traceback."""


class Worker:
    """A function that runs in another process. What it prints is in `lines`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []
        self._errors = b""
        self._reading = [asyncio.create_task(self._read()), asyncio.create_task(self._read_errors())]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append(line.decode().rstrip("\n"))

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors = await self._process.stderr.read()

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process.returncode is None

    @property
    def crashed(self) -> bool:
        """Whether it was killed, by us or by itself."""
        return self._process.returncode == KILLED

    def kill(self) -> None:
        """SIGKILL, now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def printed(self, text: str, within: float = 10.0) -> str:
        """Waits for a line that contains `text` and returns it.

        Raises `TimeoutError` after `within` seconds, and `WorkerFailed` when the process ends without it.
        """

        def matching() -> list[str]:
            return [line for line in self.lines if text in line]

        await until(lambda: matching() or self._reading[0].done(), within)
        if not matching():
            await self.ended(within)
            raise WorkerFailed(f"the worker ended without printing {text!r}")
        return matching()[0]

    async def ended(self, within: float = 10.0) -> int:
        """Waits for its end and returns the exit code; a crash is none of its failures.

        Raises `WorkerFailed` with the function's error, and `TimeoutError` after `within` seconds.
        """
        async with asyncio.timeout(within):
            code = await self._process.wait()
            await asyncio.gather(*self._reading)
        if code not in (0, KILLED):
            raise WorkerFailed("\n".join(self._errors.decode().strip().splitlines()[-12:]))
        return code


@contextlib.asynccontextmanager
async def worker(function: Callable[..., Any], *arguments: Any) -> AsyncIterator[Worker]:
    """Runs `function(*arguments)`, plain or async, in a new Python process for the length of the block.

    Its source is what is handed over, so it may come from a cell; it must import what it uses. `mqlib` is there as
    `mq`. A broker among the arguments becomes a connection to the same one; the others are pickled. Whatever is still
    running at the end of the block is killed, and it also ends with this process. Raises `WorkerFailed` at the end of
    the block when the function raised, `ValueError` for one that uses variables of the function around it.
    """
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise ValueError(f"{function.__name__} uses {names} of the function around it: hand them over as arguments")
    environment = dict(os.environ)
    environment.pop("MQLIB_PROVIDER", None)
    for broker in arguments:
        if isinstance(broker, Kafka | RabbitMQ):
            environment |= broker.environment | {"MQLIB_NAMESPACE": broker.namespace}
    plain = [type(each).kind if isinstance(each, Kafka | RabbitMQ) else each for each in arguments]
    brokers = [place for place, each in enumerate(arguments) if isinstance(each, Kafka | RabbitMQ)]
    payload = (textwrap.dedent(inspect.getsource(function)), function.__name__, plain, brokers)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mqlib.workers", base64.b64encode(pickle.dumps(payload)).decode(), env=environment,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=1 << 24, start_new_session=True,
    )  # fmt: skip
    running = Worker(process)
    try:
        yield running
    finally:
        stopped = running.running
        running.kill()
        await process.wait()
        await asyncio.gather(*running._reading)
    if not stopped:
        await running.ended()


def _main() -> None:
    """The other process."""
    import threading

    import mqlib as mq

    def end_with_parent() -> None:
        os.read(0, 1)  # nobody writes: it returns when the other end closes
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    source, name, arguments, brokers = pickle.loads(base64.b64decode(sys.argv[1]))
    with contextlib.redirect_stdout(None):  # which broker it is, the cell has said already
        for place in brokers:
            arguments[place] = mq.kafka() if arguments[place] == Kafka.kind else mq.rabbitmq()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    names = {"mq": mq, "__name__": "worker"}
    exec(compile(source, f"<{name}>", "exec"), names)
    answer = names[name](*arguments)  # type: ignore[operator]
    if inspect.iscoroutine(answer):
        asyncio.run(answer)


if __name__ == "__main__":
    _main()
