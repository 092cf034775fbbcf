"""Nothing survives its owner (B04): however a program or a kernel ends, 10 s later nothing of its brokers is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import psutil
import pytest
from jupyter_client.manager import KernelManager

from mqlib.brokers import ownership
from mqlib.brokers.guardian import Keeper
from tests.conftest import ROOT
from tests.processes import (
    GONE_SECONDS,
    PARALLEL_START,
    Program,
    Traces,
    clean_environment,
    descendants,
    eventually,
    is_alive,
    names,
    started_with,
)

AS_PROCESSES = {"MQLIB_PROVIDER": "process"}
BROKERS = {"java", "beam.smp", "epmd"}
OWNER = f"{PARALLEL_START}\nprint('ready')\ninput()\n"

posix = pytest.mark.skipif(os.name != "posix", reason="this way to end is POSIX's")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")


def owner(folder: Path, code: str = OWNER, **options: Any) -> Program:
    return Program(code, folder, AS_PROCESSES, **options)


def guardian_of(process: psutil.Process) -> psutil.Process:
    [found] = [child for child in process.children() if "guardian.py" in " ".join(child.cmdline())]
    return found


# A program.


def test_a_program_that_ends_by_itself(tmp_path: Path) -> None:
    with owner(tmp_path) as program:
        assert program.await_ready() >= BROKERS
        assert len(program.traces.folders()) == 2
        assert program.finish() == 0
        assert program.traces.folders() == [], "a program that ends by itself cleans up before it has ended"
        program.traces.assert_gone()


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_program_that_is_ended_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with owner(tmp_path, stderr=subprocess.DEVNULL) as program:
        assert program.await_ready() >= BROKERS
        program.process.send_signal(number)
        program.process.wait(GONE_SECONDS)
        program.traces.assert_gone()


@posix
def test_a_program_whose_terminal_is_closed(tmp_path: Path) -> None:
    """The terminal goes: the kernel sends SIGHUP to the session that it controls."""
    import pty

    master, slave = pty.openpty()
    take_the_terminal = "import os; os.open(os.ttyname(0), os.O_RDWR)\n"
    with owner(tmp_path, take_the_terminal + OWNER, stdin=slave, start_new_session=True) as program:
        os.close(slave)
        assert program.await_ready() >= BROKERS
        os.close(master)
        assert program.process.wait(GONE_SECONDS) == -signal.SIGHUP
        program.traces.assert_gone()


@posix
def test_a_program_that_dies_while_the_brokers_start(tmp_path: Path) -> None:
    """There is no moment at which a broker exists that nobody would end."""
    with owner(tmp_path) as program:
        seen = eventually(lambda: program.traces.note(program.process.pid) & {"java"}, within=60)
        assert seen
        program.process.kill()
        program.process.wait()
        program.traces.assert_gone()


@posix
def test_a_fork_that_survives_its_owner_keeps_no_broker_alive(tmp_path: Path) -> None:
    """It holds the pipe to the guardian open; the guardian looks at its parent, too."""
    fork = "import os, time\nfork = os.fork()\nif fork == 0:\n    time.sleep(600)\n    os._exit(0)\n"
    with owner(tmp_path, f"{PARALLEL_START}\n{fork}print('ready')\nprint(fork)\ninput()\n") as program:
        assert program.await_ready() >= BROKERS
        forked = psutil.Process(int(program.line()))
        program.process.kill()
        program.process.wait()
        brokers = program.traces.noted - {forked}
        eventually(lambda: not any(is_alive(each) for each in brokers), within=GONE_SECONDS)
        assert program.traces.folders() == []
        assert is_alive(forked)
        forked.kill()


@posix
def test_the_end_of_a_fork_is_not_the_end_of_the_owners_brokers(tmp_path: Path) -> None:
    """A worker of `multiprocessing`, say, runs the exit handlers that it inherited."""
    fork = "import os\nif os.fork() == 0:\n    raise SystemExit\nos.wait()\nassert kafka.running and rabbit.running\n"
    with owner(tmp_path, PARALLEL_START + fork + "print('ready')\ninput()\n") as program:
        assert program.await_ready() >= BROKERS
        assert program.finish() == 0
        program.traces.assert_gone()


@linux
def test_brokers_whose_guardian_is_killed(tmp_path: Path) -> None:
    with owner(tmp_path) as program:
        assert program.await_ready() >= BROKERS
        guardian_of(psutil.Process(program.process.pid)).kill()
        eventually(lambda: not any(is_alive(each) for each in program.traces.noted), within=GONE_SECONDS)
        assert program.finish() == 0
        program.traces.assert_gone()


def test_brokers_that_start_side_by_side_have_one_guardian(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mqlib lab` starts both in threads; each of them asks for the guardian of the process."""
    made: list[object] = []
    both_make_one = threading.Barrier(2)

    class Slow:
        owner = os.getpid()
        _process = SimpleNamespace(poll=lambda: None)

        def __init__(self) -> None:
            made.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                both_make_one.wait(1)  # meets the other thread here, if that one makes one, too

    monkeypatch.setattr(ownership, "_guardian", None)
    monkeypatch.setattr(ownership, "Guardian", Slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: ownership.guardian(), range(2)))
    assert len(made) == 1
    assert found[0] is found[1]


def test_an_engine_that_is_gone_does_not_keep_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker was stopped while a notebook was open: its containers are gone with it, the folders must go, too."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")
    keeper, folder = Keeper(), tmp_path / "mqlib-kafka-data"
    folder.mkdir()
    keeper.keep("containers", "mqlib-none")
    keeper.keep("folders", str(folder))
    with contextlib.suppress(docker.errors.DockerException):
        keeper.release_all()
    assert not folder.exists()


# A kernel.


class Kernel:
    """A real kernel of Jupyter, as a notebook has one, that starts brokers and is restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manager = KernelManager(kernel_name="python3", transport_encryption="auto")
        runtime = folder / "jupyter"
        runtime.mkdir()
        self.manager.connection_file = str(runtime / "kernel.json")
        self.manager.start_kernel(
            cwd=str(ROOT), env=clean_environment(TMPDIR=str(folder), PYTHONPATH=str(ROOT), **AS_PROCESSES)
        )
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.process.pid)

    def run(self, code: str) -> str:
        """Runs a cell; returns what it printed."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=120, output_hook=hear)
        assert reply["content"]["status"] == "ok"
        return "".join(printed)

    def restart(self, now: bool) -> None:
        self.manager.restart_kernel(now=now)
        self.client.wait_for_ready(timeout=60)

    def end(self) -> None:
        self.client.stop_channels()
        if self.manager.is_alive():
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.end()
    for process in started_with(tmp_path):
        process.kill()


@posix
def test_a_kernel_that_is_restarted_or_killed_and_runs_its_cell_again(kernel: Kernel) -> None:
    """Three runs, and after each another end: a polite restart, a restart at once, SIGKILL."""
    cell = f"{PARALLEL_START}\nprint(kafka.running, rabbit.running)"
    generations: list[Traces] = []
    for end in ("polite", "now", "kill"):
        assert kernel.run(cell).strip() == "True True", "no port is still in use, no folder in the way"
        traces = Traces(kernel.folder)
        assert traces.note(kernel.process.pid) >= BROKERS
        assert len(traces.folders()) == 2
        generations.append(traces)
        if end == "kill":
            kernel.process.kill()
        else:
            kernel.restart(now=end == "now")
            eventually(lambda: not any(is_alive(each) for each in generations[-1].noted), within=GONE_SECONDS)
            eventually(lambda: not generations[-1].folders(), within=GONE_SECONDS)
    generations[-1].assert_gone()


def test_a_cell_that_is_run_again_has_one_broker_of_each_kind(kernel: Kernel) -> None:
    """The variable is given a new broker, so the old one ends; a shared one is simply the same."""
    cell = "import mqlib as mq\nown = mq.kafka(private=True)\nshared = mq.kafka()\nprint(own.running, shared.running)"
    for _ in range(2):
        assert kernel.run(cell).splitlines()[-1] == "True True"
    serving = [each for each in descendants(kernel.process.pid) if each.name() == "java"]
    assert len(serving) == 2
    kernel.client.shutdown()
    eventually(lambda: started_with(kernel.folder) == [], within=2 * GONE_SECONDS)  # its own end takes a moment, too
    assert not list(kernel.folder.glob("mqlib-*"))


# `python3 -m mqlib run`, which has brokers, and a kernel that has one of its own.


@pytest.fixture
def running_notebook(tmp_path: Path) -> Iterator[tuple[Program, psutil.Process]]:
    """`mqlib run 04` at the moment at which the notebook's kernel has its own RabbitMQ."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    code = "import sys, runpy; sys.argv = ['mqlib', 'run', '04']; runpy.run_module('mqlib', run_name='__main__')"
    with Program(code, tmp_path, {**AS_PROCESSES, "JUPYTER_RUNTIME_DIR": str(runtime)}) as program:

        def kernel_with_a_broker() -> psutil.Process | None:
            assert program.process.poll() is None, program.process.communicate()
            for child in psutil.Process(program.process.pid).children():
                if "ipykernel" in " ".join(child.cmdline()) and "beam.smp" in names(descendants(child.pid)):
                    return child
            return None

        kernel = eventually(kernel_with_a_broker, within=120)
        program.traces.note(program.process.pid)
        yield program, kernel


@posix
def test_a_notebooks_kernel_that_is_killed_leaves_nothing_of_its_own(
    running_notebook: tuple[Program, psutil.Process],
) -> None:
    program, kernel = running_notebook
    own = [kernel, *descendants(kernel.pid)]
    kernel.kill()
    eventually(lambda: not any(is_alive(each) for each in own), within=GONE_SECONDS)
    out, _ = program.process.communicate(timeout=60)
    assert program.process.returncode == 1
    assert "the kernel died" in out
    program.traces.assert_gone()


@posix
def test_a_run_that_is_killed_leaves_nothing_not_even_the_kernel(
    running_notebook: tuple[Program, psutil.Process],
) -> None:
    program, kernel = running_notebook
    program.process.kill()
    program.process.wait()
    program.traces.assert_gone(GONE_SECONDS + 5)  # the kernel asks once a second whether its parent lives, then ends
    assert not is_alive(kernel)
