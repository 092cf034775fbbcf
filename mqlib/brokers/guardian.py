"""The process that outlives nobody: it owns brokers on behalf of one Python process and ends them when that one ends.

Run as a script, standard library only. The owner holds the other end of standard input. Whatever ends the owner (a
normal exit, a restarted kernel, SIGKILL, a closed terminal) closes that pipe, and the guardian then kills the child
processes, removes the containers and networks, and deletes the data folders that it was told of. It starts the child
processes itself, so that there is no moment at which a broker exists that nobody would end.

Protocol: one JSON object a line in, one JSON object a line out. See `Guardian` in `ownership.py` for the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2): should the guardian itself be killed, Linux ends its children
DEAF_TO = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C and a closed terminal reach the owner; we follow its pipe


def _prepare_child() -> None:
    """Runs in a child before its program: what we ignore it would ignore too, and a JVM then never stops politely."""
    for name in DEAF_TO:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


class Keeper:
    """What is held: child processes by id, containers, networks, folders."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.containers: list[str] = []
        self.networks: list[str] = []
        self.folders: list[str] = []

    def spawn(self, argv: list[str], env: dict[str, str], cwd: str, log: str) -> int:
        with open(log, "ab") as out:
            process = subprocess.Popen(
                argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_prepare_child if os.name == "posix" else None,
            )  # fmt: skip
        self.processes[process.pid] = process
        return process.pid

    def signal(self, pid: int, number: int) -> None:
        _signal(self.processes[pid], number)

    def poll(self, pid: int) -> int | None:
        return self.processes[pid].poll()

    def stop(self, pid: int, grace: float) -> int:
        """Ends one child: politely for `grace` seconds, then with SIGKILL."""
        process = self.processes[pid]
        if grace > 0:
            _signal(process, signal.SIGTERM)
            _signal(process, signal.SIGCONT)  # a paused process cannot hear SIGTERM
            try:
                return process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        _signal(process, signal.SIGKILL)
        return process.wait(10)

    def keep(self, kind: str, name: str) -> None:
        getattr(self, kind).append(name)

    def release(self, pids: list[int], containers: list[str], networks: list[str], folders: list[str]) -> None:
        """Ends and forgets the named things, the newest first."""
        for pid in reversed(pids):
            if pid in self.processes:
                self.stop(pid, 0)
                del self.processes[pid]
        for folder in folders:
            _remove_folder(folder)
        remove_docker(containers, networks)
        self.containers = [name for name in self.containers if name not in containers]
        self.networks = [name for name in self.networks if name not in networks]
        self.folders = [name for name in self.folders if name not in folders]

    def release_all(self) -> None:
        self.release(list(self.processes), list(self.containers), list(self.networks), list(self.folders))


def _remove_folder(folder: str) -> None:
    for _ in range(20):  # a child that is just ending may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            return
        time.sleep(0.1)


def remove_docker(containers: list[str], networks: list[str]) -> None:
    if not containers and not networks:
        return
    import docker  # only where containers were made, and then it is there

    client = docker.from_env()
    for name in containers:  # what one of them refuses must not keep the others
        with contextlib.suppress(docker.errors.DockerException):
            client.containers.get(name).remove(force=True, v=True)
    for name in networks:
        with contextlib.suppress(docker.errors.DockerException):
            client.networks.get(name).remove()


def main() -> None:
    """Serves requests until standard input closes or the owner is gone, then releases everything."""
    for name in DEAF_TO:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    keeper, owner, buffer = Keeper(), os.getppid(), b""
    try:
        while True:
            # A fork of the owner may hold the pipe open after the owner's death: look at the parent, too.
            if os.name == "posix" and not select.select([0], [], [], 1.0)[0]:
                if os.getppid() != owner:
                    return
                continue
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                request = json.loads(line)
                try:
                    answer = {"ok": getattr(keeper, request.pop("do"))(**request)}
                except Exception as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                os.write(1, json.dumps(answer).encode() + b"\n")
    finally:
        keeper.release_all()


if __name__ == "__main__":
    main()
