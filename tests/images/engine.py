"""A private Docker engine for machines that have none running, e.g. CI in a container or a small VM without systemd.

    python3 tests/images/engine.py start      # the last line is DOCKER_HOST=unix://..., to be exported
    python3 tests/images/engine.py stop       # ends it and removes all it left, from any process

Everything lives in one folder (`--folder`, by default in the system's temporary one), `state.json` included. Ports that
containers on the default network publish are bound to loopback; for those on other networks (and Compose's are) the
caller has to name 127.0.0.1. One engine at a time per machine: two would share the bridge docker0. Needs root; the
package `docker.io` is installed if `dockerd` is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, Python looks only beside it
from tests.images import debian_host
from tests.images import engine_leftovers as leftovers

# Tried in turn. Overlays and packet filters are the two things a restricted machine may refuse; without packet filters
# published ports still work through dockerd's own proxy processes.
ATTEMPTS: tuple[tuple[str, ...], ...] = (
    (),
    ("--storage-driver=vfs",),
    ("--storage-driver=vfs", "--iptables=false", "--ip6tables=false", "--ip-masq=false"),
)
ALWAYS = ("--ip=127.0.0.1", "--group=root")
USUAL = Path("/var/run/docker.sock")
KEY = Path("/etc/docker/key.json")  # the one file that dockerd makes outside its folders


class Unix(http.client.HTTPConnection):
    """HTTP over the engine's socket, so that no Docker client is needed to ask it something."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def ask(path: Path, what: str, method: str = "GET") -> Any:
    """The engine's answer to an API call, or None if it does not answer."""
    connection = Unix(path)
    try:
        connection.request(method, what)
        response = connection.getresponse()
        body = response.read()
        return json.loads(body) if response.status == 200 and body.startswith((b"{", b"[")) else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def start(folder: Path) -> str:
    """Start the engine, or find it already running, and give its DOCKER_HOST."""
    sock, state_file = folder / "docker.sock", folder / "state.json"
    if state_file.exists():
        if ask(sock, "/info"):
            return f"unix://{sock}"
        stop(folder)  # what a killed engine left
    if os.geteuid() != 0:
        raise SystemExit("starting an engine needs root")
    dockerd = debian_host.require("dockerd", "docker.io")
    if ask(USUAL, "/info"):  # a second engine would share its bridge and its packet filters
        print("this machine's own engine runs already")
        return f"unix://{USUAL}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.geteuid():  # a temporary folder is open to all
        raise SystemExit(f"{folder} belongs to somebody else")
    folder.chmod(0o700)
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    state: dict[str, Any] = {
        "bridges": sorted(leftovers.bridges()),
        "forward_policy": leftovers.forward_policy(),
        "key": KEY.exists(),
        "ip_forward": forward.read_text().strip() if forward.exists() else "",
    }
    # Erlang reserves memory for every file that it might open, so not endlessly many; some machines allow fewer still.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    log, said = folder / "dockerd.log", ""
    for attempt in ATTEMPTS:
        command = [dockerd, "--host", f"unix://{sock}", "--data-root", str(folder / "data")]
        command += ["--exec-root", str(folder / "exec"), "--pidfile", str(folder / "dockerd.pid")]
        command += [f"--default-ulimit=nofile={files}:{files}", *ALWAYS, *attempt]
        with log.open("w") as out:  # its own session: the engine outlives the command that started it
            process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, cwd=folder
            )
        state_file.write_text(json.dumps({**state, "pid": process.pid}))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if info := ask(sock, "/info"):
                print(f"Docker {info['ServerVersion']}, {info['Driver']} storage, {' '.join(attempt) or 'no fallback'}")
                return f"unix://{sock}"
            time.sleep(0.1)
        said = log.read_text()
        leftovers.end(process.pid)
        leftovers.kill_left(folder)
    stop(folder)
    raise SystemExit("dockerd did not start; the end of its log:\n" + "\n".join(said.splitlines()[-30:]))


def stop(folder: Path) -> None:
    """End the engine with its containers, and undo what it did to the machine's mounts, bridges and packet filters."""
    state_file, sock = folder / "state.json", folder / "docker.sock"
    if not state_file.exists():
        return
    state = json.loads(state_file.read_text())
    for container in ask(sock, "/containers/json") or ():  # at once, not after each one's time to stop
        ask(sock, f"/containers/{container['Id']}/kill", "POST")
    if state["pid"] in leftovers.own_processes(folder):  # otherwise the number belongs to another process by now
        leftovers.end(state["pid"])
    leftovers.kill_left(folder)
    leftovers.unmount(folder)
    made = leftovers.own_bridges(folder) - set(state["bridges"])
    for bridge in made:
        leftovers.delete_bridge(bridge)
    if "docker0" not in state["bridges"]:  # else another engine uses the same chains
        for tables in ("iptables", "ip6tables"):
            leftovers.forget_rules(tables, made | {"docker0"}, state["forward_policy"])
        if state["ip_forward"]:
            Path("/proc/sys/net/ipv4/ip_forward").write_text(state["ip_forward"])
    if not state.get("key", True):
        KEY.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mqlib-engine")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.command == "start":
        print(f"DOCKER_HOST={start(folder)}")
    else:
        stop(folder)


if __name__ == "__main__":
    main()
