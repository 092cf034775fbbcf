"""Processes as the operating system sees them: what a program has started, what is left of it, where it listens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import ROOT

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
GONE_SECONDS = 10.0
"""How soon nothing may be left of a program that owned brokers: the design says so."""
PARALLEL_START = """
from concurrent.futures import ThreadPoolExecutor
import mqlib as mq
with ThreadPoolExecutor() as pool:
    kafka, rabbit = (task.result() for task in [pool.submit(f, private=True) for f in (mq.kafka, mq.rabbitmq)])
"""
"""Python that starts one private broker of each kind, side by side, as `kafka` and `rabbit`."""


def eventually(fact: Callable[[], Any], within: float) -> Any:
    """Asks `fact` until what it returns is true, and returns that; `AssertionError` with the last value after that."""
    deadline = time.monotonic() + within
    while True:
        value = fact()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {within:g} s; the last value was {value!r}"
        time.sleep(0.05)


def clean_environment(**extra: str) -> dict[str, str]:
    """Our environment without what `mqlib test` or a user said about brokers, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MQLIB_") or name == "MQLIB_CACHE"}
    return kept | extra


def is_alive(process: psutil.Process) -> bool:
    """Whether that very process runs; one that has ended and that nobody has waited for does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[psutil.Process]:
    """Everything below a process now, also what has put itself into another session."""
    found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return found


def started_with(folder: Path) -> list[psutil.Process]:
    """Every living process whose folder for temporary files is `folder`, also one that has left its parents."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and is_alive(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """The addresses on which these processes accept TCP connections."""
    pids = {process.pid for process in processes}
    return {
        each.laddr.ip
        for each in psutil.net_connections("tcp")
        if each.pid in pids and each.status == psutil.CONN_LISTEN
    }


def names(processes: Iterable[psutil.Process]) -> set[str]:
    """The programs' names, without those that are just ending."""
    found = set()
    for process in processes:
        try:
            found.add(process.name())
        except psutil.NoSuchProcess:
            continue
    return found


class Traces:
    """What a program has on this machine, noted while it lives, so that afterwards we can tell what it left.

    The program runs with `folder` as its folder for temporary files: data folders lie there, and every process that it
    starts carries that name in its environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.noted: set[psutil.Process] = set()

    def note(self, pid: int) -> set[str]:
        """Takes down everything below `pid` now; returns the names of the programs."""
        below = descendants(pid)
        self.noted.update(below)
        return names(below)

    def left(self) -> list[str]:
        """The processes that are still there, and the data folders of `mqlib`."""
        processes = {process for process in self.noted if is_alive(process)} | set(started_with(self.folder))
        return sorted(f"{name} is running" for name in names(processes)) + self.folders()

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("mqlib-*"))

    def assert_gone(self, within: float = GONE_SECONDS) -> None:
        """Nothing of it is left, or soon nothing is."""
        deadline = time.monotonic() + within
        while left := self.left():
            assert time.monotonic() < deadline, f"left after {within:g} s: {left}"
            time.sleep(0.05)


class Program:
    """A Python program that owns brokers. It prints `ready` when they are, and ends when it reads a line.

    Use it as a context manager: whatever a failing test leaves of it is ended by its id.
    """

    def __init__(self, code: str, folder: Path, environment: Mapping[str, str], **options: Any) -> None:
        self.traces = Traces(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            env=clean_environment(TMPDIR=str(folder), **environment), **{"stdin": subprocess.PIPE, **options},
        )  # fmt: skip

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).rstrip("\n")

    def await_ready(self) -> set[str]:
        """Waits for its brokers, notes them, and returns the names of the programs that serve them."""
        assert self.line() == "ready"
        return self.traces.note(self.process.pid)

    def finish(self) -> int:
        """Lets it end by itself; returns its exit code."""
        self.process.communicate("\n", timeout=60)
        return int(self.process.returncode)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        for process in started_with(self.traces.folder):
            process.kill()


def python_m_mqlib(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `python3 -m mqlib …` to its end, in `environment`, which should come from `clean_environment`."""
    return subprocess.run(
        [sys.executable, "-m", "mqlib", *arguments], cwd=ROOT, env=dict(environment), text=True, capture_output=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
