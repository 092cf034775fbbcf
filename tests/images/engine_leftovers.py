"""What a Docker engine leaves on a machine when it ends or is killed, and how to find and remove it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from tests.images import debian_host


def alive(pid: int) -> bool:
    """Whether the process still runs; a finished child that nobody waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def bridges() -> set[str]:
    return {name for _, name in socket.if_nameindex() if name == "docker0" or name.startswith("br-")}


def forward_policy() -> str:
    """What the machine does with packets that no rule decides on: the engine sets it to DROP."""
    if not (iptables := shutil.which("iptables", path=debian_host.PATH)):
        return ""
    words = subprocess.run([iptables, "-S", "FORWARD"], check=False, capture_output=True, text=True).stdout.split()
    return words[2] if words[:2] == ["-P", "FORWARD"] else ""


def end(pid: int) -> None:
    """Let dockerd finish by itself, for a while."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def kill_left(folder: Path) -> None:
    """What dockerd would have ended had it not been killed itself."""
    deadline = time.monotonic() + 10
    while (left := own_processes(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def delete_bridge(name: str) -> None:
    """Through the kernel's own calls: a small machine may lack the program `ip`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", name.encode(), 0))  # SIOCSIFFLAGS: down
        fcntl.ioctl(any_socket, 0x89A1, name.encode() + b"\0")  # SIOCBRDELBR


def own_processes(folder: Path) -> list[int]:
    """The engine's processes: dockerd, its containerd and shims by their arguments, the containers' by their group."""
    containers = [p.name for p in (folder / "data" / "containers").glob("*")]
    daemons, inside = [], []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (proc / "cmdline").read_text(errors="replace").split("\0")
            group = (proc / "cgroup").read_text()
        except OSError:
            continue
        if not alive(int(proc.name)):
            continue
        if any(container in group for container in containers):
            inside.append(int(proc.name))
        elif Path(arguments[0]).name.startswith(("dockerd", "containerd")) and any(
            f"{folder}/" in a for a in arguments
        ):
            daemons.append(int(proc.name))
    return sorted(daemons) + inside  # shims first: nobody is left to restart or report a container


def unmount(folder: Path) -> None:
    """Nothing below the folder may stay mounted when it is deleted."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def own_bridges(folder: Path) -> set[str]:
    """The bridges of the engine's networks, which its data names: another engine may have made some too."""
    try:
        data = (folder / "data" / "network" / "files" / "local-kv.db").read_bytes()
    except OSError:
        return set()
    return {bridge for bridge in bridges() if bridge == "docker0" or f'"id":"{bridge[3:]}'.encode() in data}


def is_ours(rule: str, made: set[str]) -> bool:
    """Whether a rule names the engine's chains or bridges, or lets a container reach its own published port."""
    words = rule.split()
    if "DOCKER" in rule or made & set(words):
        return True
    masquerade = "MASQUERADE" in words and "-s" in words and "-d" in words
    return masquerade and words[words.index("-s") + 1] == words[words.index("-d") + 1]


def forget_rules(tables: str, made: set[str], policy: str) -> None:
    """Drop the engine's rules from `iptables` or `ip6tables`; all others stay, and so does what was the policy."""
    if not (save := shutil.which(f"{tables}-save", path=debian_host.PATH)):
        return
    lines = subprocess.run([save], check=False, capture_output=True, text=True).stdout.splitlines()
    kept = [line for line in lines if not is_ours(line, made)]
    if kept != lines:
        if tables == "iptables" and policy:
            kept = [f":FORWARD {policy} [0:0]" if k.startswith(":FORWARD DROP") else k for k in kept]
        subprocess.run([save.replace("-save", "-restore")], input="\n".join(kept) + "\n", text=True, check=False)
