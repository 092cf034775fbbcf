"""Brokers that stay up between commands: started once, used by all, and gone without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mqlib import daemon
from mqlib.brokers.machine import cache_folder
from tests.conftest import ROOT


@pytest.fixture
def cache(tmp_path: Path, no_addresses: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, hence a state of its own, with what was fetched into the usual one."""
    for entry in [*cache_folder().glob("kafka-*.classpath"), *cache_folder().glob("kafka-*-formatted-[0-9]")]:
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.setenv("MQLIB_CACHE", str(tmp_path))
    return tmp_path


def brokers(action: str) -> subprocess.CompletedProcess[str]:
    """`python -m mqlib brokers …` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mqlib", "brokers", action], cwd=ROOT, capture_output=True, text=True, timeout=200,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def family(pid: int) -> list[psutil.Process]:
    """The serving process with its guardian, its brokers and whatever they started."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


@pytest.fixture
def nothing_left(cache: Path) -> Iterator[None]:
    """However the test ends: what it started is ended, by its own ids."""
    yield
    with contextlib.suppress(FileNotFoundError, psutil.Error, ValueError, KeyError):
        for process in family(json.loads((cache / "brokers.json").read_text())["pid"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.usefixtures("nothing_left")
def test_up_status_up_down(cache: Path) -> None:
    """One story, since each start costs seconds: nothing is up; up; up again gives the same; down leaves nothing."""
    before = brokers("status")
    assert (before.returncode, before.stderr) == (1, "")
    assert before.stdout == "No brokers are up. Start them with: python3 -m mqlib brokers up\n"

    up = brokers("up")
    assert (up.returncode, up.stderr) == (0, "")
    exported = dict(re.findall(r"^export (\w+)='([^']*)'$", up.stdout, re.MULTILINE))
    for name in ("KAFKA_BOOTSTRAP", "RABBITMQ_URL", "RABBITMQ_MANAGEMENT_URL", "RABBITMQ_METRICS_URL"):
        assert re.search(r"\b(127\.0\.0\.1|localhost):\d+", exported[f"MQLIB_{name}"])

    state_file = cache / "brokers.json"
    assert state_file.stat().st_mode & 0o077 == 0, "it holds a password"
    state = json.loads(state_file.read_text())
    processes = family(state["pid"])
    assert len(processes) > 3

    for again in (brokers("status"), brokers("up")):
        assert (again.returncode, again.stderr) == (0, "")
        assert dict(re.findall(r"^export (\w+)='([^']*)'$", again.stdout, re.MULTILINE)) == exported
    assert json.loads(state_file.read_text()) == state

    used = subprocess.run(
        [sys.executable, "-c", "import mqlib as mq; print(mq.kafka().provider, mq.rabbitmq().provider)"],
        cwd=ROOT, env={**os.environ, **exported}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (used.returncode, used.stderr, used.stdout.splitlines()[-1]) == (0, "", "external external")

    folders = [process.cwd() for process in processes if "mqlib-" in process.cwd()]
    down = brokers("down")
    assert (down.returncode, down.stdout, down.stderr) == (0, "The brokers are down.\n", "")
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert folders
    assert [folder for folder in folders if os.path.exists(folder)] == []
    assert not state_file.exists()
    assert brokers("status").returncode == 1
    assert brokers("down").stdout == "No brokers are up.\n"


def write_state(cache: Path, **changes: Any) -> None:
    me = psutil.Process()
    state = {
        "pid": me.pid,
        "born": me.create_time(),
        "environment": {"MQLIB_KAFKA_BOOTSTRAP": "localhost:1"},
        **changes,
    }
    (cache / "brokers.json").write_text(json.dumps(state))


def test_a_state_is_believed_while_its_very_process_lives(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.running() is None
    write_state(cache)
    state = daemon.running()
    assert state is not None
    assert daemon.status() == 0
    assert capsys.readouterr().out.endswith("export MQLIB_KAFKA_BOOTSTRAP='localhost:1'\n")


@pytest.mark.parametrize("left", ["dead", "recycled", "garbage", "empty", "older"])
def test_what_a_killed_server_left_behind_is_not_believed(
    cache: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    """Its process is gone, or its number is somebody else's now, or the file is not what we write."""
    if left == "dead":
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        write_state(cache, pid=child.pid)
    elif left == "recycled":
        write_state(cache, born=1.0)
    else:
        (cache / "brokers.json").write_text({"garbage": "{not json", "empty": "", "older": "{}"}[left])
    assert daemon.running() is None
    assert (daemon.status(), daemon.down()) == (1, 0), "and no process of somebody else's is ended"
    assert capsys.readouterr().out.endswith("No brokers are up.\n")


def test_a_start_that_fails_shows_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of the process in the background, in the terminal in which `up` was typed."""
    monkeypatch.setenv("MQLIB_PROVIDER", "podman")
    done = brokers("up")
    assert done.returncode == 1
    assert done.stderr.startswith("mqlib: the brokers did not start:")
    assert "MQLIB_PROVIDER is 'podman'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cache / "brokers.json").exists()


def test_two_at_once_start_one_set_of_brokers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two terminals say `up` at the same time: the second waits for the first, and no set is left that nobody knows."""
    both, starts = threading.Barrier(2), []

    class Server:
        def __init__(self, *_: Any, **__: Any) -> None:
            starts.append(1)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=1.5)  # ends early when a second start is under way
            write_state(cache)

        def poll(self) -> None:
            return None

    monkeypatch.setattr(subprocess, "Popen", Server)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(daemon.up())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (codes, len(starts)) == ([0, 0], 1)


def test_leaving_takes_only_its_own_state_along(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends late must not delete what its successor wrote."""
    from mqlib import cli

    @contextlib.contextmanager
    def no_brokers(started_by: str) -> Iterator[dict[str, str]]:
        yield {}

    def replaced(event: threading.Event, timeout: float | None = None) -> bool:
        write_state(cache, pid=1, born=2.0)
        return True

    monkeypatch.setattr(cli, "shared_brokers", no_brokers)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threading.Event, "wait", replaced)
    assert daemon.serve() == 0
    assert json.loads((cache / "brokers.json").read_text())["pid"] == 1
