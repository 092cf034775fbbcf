"""Kafka's own command-line tools, to check ours against: what a group has left to read, and how fast Java does it.

They connect to a plain listener, without TLS or SASL.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import NamedTuple

import mqlib as mq
from mqlib.brokers.install import java, kafka_jars
from mqlib.brokers.versions import KAFKA_TOOLS_ARTIFACT

SECONDS = 120.0
QUICK_START = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""Halves the start of a tool; not for those that measure."""


class Row(NamedTuple):
    """One partition as `kafka-consumer-groups --describe` tells it; None is where it prints `-`."""

    current: int | None
    end: int | None
    lag: int | None


def run_tool(kafka: mq.Kafka, tool: str, *arguments: str, jvm: tuple[str, ...] = ()) -> str:
    """What a class of `org.apache.kafka.tools` prints. Raises `RuntimeError` with its output when it reports an error.

    (It may report one and still exit with 0.)
    """
    command = [str(java()), *jvm, f"org.apache.kafka.tools.{tool}", "--bootstrap-server", kafka.bootstrap, *arguments]
    path = {"CLASSPATH": os.pathsep.join(map(str, kafka_jars(KAFKA_TOOLS_ARTIFACT)))}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
            env={**os.environ, **path},
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"") + (late.stderr or b"")
        raise RuntimeError(f"{tool} {' '.join(arguments)}: not done after {SECONDS:g} s\n{said!r:.2000}") from None
    if done.returncode or re.search(r"^(Error\b|.*\bException\b)", done.stdout + done.stderr, re.MULTILINE):
        raise RuntimeError(f"{tool} {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def consumer_group_lag(kafka: mq.Kafka, group: str) -> dict[tuple[str, int], Row]:
    """`kafka-consumer-groups --describe --group …`: by topic and partition. Empty for a group that committed nothing.

    Raises `RuntimeError` with the tool's output, for example for a group that does not exist.
    """
    said = run_tool(kafka, "consumer.group.ConsumerGroupCommand", "--describe", "--group", group, jvm=QUICK_START)
    lines = [line.split() for line in said.splitlines() if line.strip()]
    rows = [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]

    def number(text: str) -> int | None:
        return None if text == "-" else int(text)

    return {
        (row["TOPIC"], int(row["PARTITION"])): Row(
            *(number(row[k]) for k in ("CURRENT-OFFSET", "LOG-END-OFFSET", "LAG"))
        )
        for row in rows
        if row["PARTITION"] != "-"  # a member without a partition
    }


def producer_performance(
    kafka: mq.Kafka, topic: str, records: int, size: int, warmup: int = 0, **props: str | int
) -> float:
    """Records a second of `kafka-producer-perf-test`: its own clock, so the JVM's start is not in it.

    Nor are the `warmup` records that it sends first, while the JVM still compiles. `props` are the producer's settings
    with underscores for dots: `batch_size=100_000`.
    """
    settings = [f"{name.replace('_', '.')}={value}" for name, value in props.items()]
    said = run_tool(
        kafka, "ProducerPerformance", "--topic", topic, "--num-records", str(warmup + records),
        "--record-size", str(size), "--throughput", "-1", *(["--warmup-records", str(warmup)] if warmup else []),
        *(["--command-property", *settings] if settings else []),
    )  # fmt: skip
    kind = "steady state records" if warmup else "records"
    rates = re.findall(rf"^{records} {kind} sent, ([\d.]+) records/sec", said, re.MULTILINE)
    if not rates:
        raise RuntimeError(f"ProducerPerformance told no rate for {records} records:\n{said}")
    return float(rates[-1])


def consumer_performance(kafka: mq.Kafka, topic: str, records: int) -> float:
    """Records a second of `kafka-consumer-perf-test`, from the start of the topic; joining its group is not in it."""
    said = run_tool(kafka, "ConsumerPerformance", "--topic", topic, "--num-records", str(records))
    lines = [[field.strip() for field in line.split(",")] for line in said.splitlines() if "," in line]
    told = dict(zip(lines[0], lines[-1], strict=True)) if len(lines) > 1 else {}
    if int(told.get("data.consumed.in.nMsg", 0)) < records:
        raise RuntimeError(f"ConsumerPerformance did not get {records} records:\n{said}")
    return float(told["fetch.nMsg.sec"])
