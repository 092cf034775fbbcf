"""The Java virtual machine that Kafka runs in: its options, the data folder it wants, and classes that load fast."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .base import BrokerUnavailable
from .install import java
from .machine import alone, cache_folder, say
from .versions import KAFKA_VERSION

CLUSTER_ID = "bXEtbGliLWNsdXN0ZXItMQ"  # any 16 bytes in base 64; the data folder is ours alone

LOG4J = """\
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c)%n
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""


QUICK_START = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""Kafka is short-lived here: what makes it start fast counts, and not what makes it fast in an hour."""


def command(option: str, logging: Path, jars: Sequence[Path]) -> list[str]:
    """Java with its options, up to the name of the class that it is to run."""
    return [
        str(java()), "-Xmx512m", *QUICK_START, "-XX:-UsePerfData", f"-Djava.io.tmpdir={logging.parent}", option,
        f"-Dlog4j2.configurationFile={logging}", "-cp", os.pathsep.join(map(str, jars)),
    ]  # fmt: skip


def prepared_classes(train: Callable[[str], None]) -> str:
    """The option with which Kafka finds its classes loaded and linked, in an ahead-of-time cache (JEP 483, JEP 514):
    that halves its start. The cache is made once, from a run that `train` does with the option it is handed, and is
    kept beside the Java that it is valid for. Java does without a cache that it cannot use."""
    kept = java().parent.parent / f"kafka-{KAFKA_VERSION}.aot"
    with contextlib.suppress(OSError), alone("kafka-classes"):  # this Python's folder may be another user's
        if not kept.exists():
            say("Preparing Kafka's classes (10 s, once) …")
            fresh = kept.with_suffix(".new")
            fresh.touch()
            train(f"-XX:AOTCacheOutput={fresh}")
            fresh.rename(kept)
    return f"-XX:AOTCache={kept}"


def format_data(node: int, data: Path, properties: Path, virtual_machine: Sequence[str]) -> None:
    """Formats a data folder, as KRaft demands before the first start; keeps a copy, since each costs a JVM's start."""
    kept = cache_folder() / f"kafka-{KAFKA_VERSION}-formatted-{node}"
    if not kept.exists():
        command = ["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties)]
        done = subprocess.run([*virtual_machine, *command], capture_output=True, text=True, cwd=properties.parent)
        if done.returncode:
            raise BrokerUnavailable(
                f"Kafka could not format its data folder:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
            )
        fresh = Path(tempfile.mkdtemp(prefix=kept.name, dir=kept.parent))
        shutil.copytree(data, fresh, dirs_exist_ok=True)
        try:
            fresh.rename(kept)
        except OSError:  # another process was first
            shutil.rmtree(fresh)
        return
    shutil.copytree(kept, data)
