"""`mqlib brokers up | down | status`: brokers that stay up between commands, in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .brokers.base import BrokerError
from .brokers.machine import alone, cache_folder

START_SECONDS = 180


def state_file() -> Path:
    return cache_folder() / "brokers.json"


def running() -> dict[str, Any] | None:
    """What the serving process wrote down, if that very process is still alive."""
    import psutil

    try:
        state: dict[str, Any] = json.loads(state_file().read_text())
        alive = psutil.Process(state["pid"]).create_time() == state["born"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return None
    return state if alive else None


def show(state: dict[str, Any]) -> None:
    """The lines that make other commands use these brokers."""
    print("The brokers are up. To use them from a shell:")
    for name, value in state["environment"].items():
        print(f"export {name}='{value}'")


def up() -> int:
    """Starts the brokers in the background, once, also when two ask for it at the same time."""
    with alone("brokers"):
        return _up()


def _up() -> int:
    state = running()
    if state is None:
        log = cache_folder() / "brokers.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "mqlib", "brokers", "serve"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        print("Starting the brokers in the background …", flush=True)
        deadline = time.monotonic() + START_SECONDS
        while state is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BrokerError(f"the brokers did not start:\n{log.read_text().strip()[-2000:]}")
            time.sleep(0.1)
            state = running()
    show(state)
    return 0


def down() -> int:
    """Ends what `up` started, and waits until it is gone."""
    import psutil

    state = running()
    if state is None:
        print("No brokers are up.")
        return 0
    process = psutil.Process(state["pid"])
    process.terminate()
    process.wait(60)
    print("The brokers are down.")
    return 0


def status() -> int:
    """Says what is up; exit code 1 when nothing is."""
    state = running()
    if state is None:
        print("No brokers are up. Start them with: python3 -m mqlib brokers up")
        return 1
    show(state)
    return 0


def serve() -> int:
    """Holds the brokers until SIGTERM; what `up` runs in the background."""
    import psutil

    from .cli import shared_brokers

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    file = state_file()
    try:
        with shared_brokers("brokers up") as told:
            state = {"pid": os.getpid(), "born": psutil.Process().create_time(), "environment": told}
            fresh = file.with_suffix(".new")
            fresh.write_text(json.dumps(state))
            fresh.chmod(0o600)  # it holds a password
            fresh.replace(file)
            ended.wait()
    finally:
        if (running() or {}).get("pid") == os.getpid():  # else it is another's by now
            file.unlink(missing_ok=True)
    return 0


ACTIONS = {"up": up, "down": down, "status": status, "serve": serve}
