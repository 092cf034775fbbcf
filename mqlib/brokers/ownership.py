"""The owner's side of the guardian: start child processes and name what must not outlive this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from .base import BrokerError
from .guardian import remove_docker

_GUARDIAN_SCRIPT = Path(__file__).with_name("guardian.py")


class Guardian:
    """A guardian process of this Python process; see `guardian.py` for what it promises."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        # A session of its own: Ctrl-C in the terminal, or an interrupted kernel, must not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_GUARDIAN_SCRIPT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends one request and returns its answer. Raises `BrokerError` when the guardian refuses or is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (OSError, ValueError) as error:
                raise BrokerError(f"the process that looks after the brokers is gone ({error}); start again") from None
        if not line:
            raise BrokerError("the process that looks after the brokers has ended; start the brokers again")
        answer = json.loads(line)
        if "error" in answer:
            raise BrokerError(f"cannot {do} {arguments.get('argv', [''])[0]}: {answer['error']}")
        return answer["ok"]


_guardian: Guardian | None = None
_guardian_lock = threading.Lock()


def guardian() -> Guardian:
    """The guardian of this process, started at the first call (and again in a fork, which owns nothing yet)."""
    global _guardian
    with _guardian_lock:  # brokers start side by side
        if _guardian is None or _guardian.owner != os.getpid() or _guardian._process.poll() is not None:
            _guardian = Guardian()
        return _guardian


class Estate:
    """What one broker consists of, all held by the guardian; `close` ends it at once and is safe to call twice."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.containers: list[str] = []
        self.networks: list[str] = []
        self.folders: list[str] = []
        self._guardian = guardian()

    def folder(self, prefix: str) -> Path:
        """A fresh data folder."""
        path = tempfile.mkdtemp(prefix=f"mqlib-{prefix}-")
        self._guardian.ask("keep", kind="folders", name=path)
        self.folders.append(path)
        return Path(path)

    def spawn(self, argv: list[str], env: dict[str, str], cwd: Path, log: Path) -> int:
        """Starts a child process that writes to `log`; returns its process id, which is also its process group."""
        pid: int = self._guardian.ask("spawn", argv=argv, env=env, cwd=str(cwd), log=str(log))
        self.pids.append(pid)
        return pid

    def keep(self, kind: str, name: str) -> None:
        """Names a container (`containers`) or a network (`networks`), before or right after it is made."""
        self._guardian.ask("keep", kind=kind, name=name)
        getattr(self, kind).append(name)

    def signal(self, pid: int, number: int) -> None:
        self._guardian.ask("signal", pid=pid, number=number)

    def exit_code(self, pid: int) -> int | None:
        """None while the process runs; its exit code afterwards."""
        code: int | None = self._guardian.ask("poll", pid=pid)
        return code

    def end(self, pid: int, grace: float) -> None:
        """Ends a process: SIGTERM and `grace` seconds, then SIGKILL; 0 means SIGKILL at once."""
        self._guardian.ask("stop", pid=pid, grace=grace)

    def close(self) -> None:
        if self._guardian.owner != os.getpid():
            return  # a fork's copy: the brokers belong to the parent
        try:
            self._guardian.ask(
                "release", pids=self.pids, containers=self.containers, networks=self.networks, folders=self.folders
            )
        except BrokerError:  # the guardian is gone, and its children with it
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(Exception):  # nor can an engine that has ended be told to remove anything
                remove_docker(self.containers, self.networks)
        self.pids, self.containers, self.networks, self.folders = [], [], [], []
