"""The command line: what it accepts, what it refuses in one line, and what it says to programs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mqlib as mq
from mqlib import cli
from mqlib.brokers import BrokerError
from tests.conftest import NOTEBOOKS, ROOT

COMMANDS = ("lab", "run", "test", "bench", "catalog", "doctor", "brokers", "new")


def mqlib(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m mqlib …` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mqlib", *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lab"], {"command": "lab", "no_browser": False, "port": 8888}),
        (["lab", "--no-browser", "--port", "9"], {"command": "lab", "no_browser": True, "port": 9}),
        (["run", "04", "all"], {"command": "run", "names": ["04", "all"], "html": None, "save": False}),
        (["run", "04", "--html", "x", "--save"], {"command": "run", "names": ["04"], "html": Path("x"), "save": True}),
        (["test"], {"command": "test", "rest": []}),
        (["test", "tests", "-k", "x"], {"command": "test", "rest": ["tests", "-k", "x"]}),
        (["catalog", "--check"], {"command": "catalog", "check": True, "write": False}),
        (["bench"], {"command": "bench", "names": [], "out": ROOT / "bench", "quick": False}),
        (["bench", "ledger", "--quick", "--out", "x"],
         {"command": "bench", "names": ["ledger"], "out": Path("x"), "quick": True}),
        (["doctor", "--json"], {"command": "doctor", "json": True}),
        (["brokers", "up"], {"command": "brokers", "action": "up"}),
        (["new", "27-claim-check"], {"command": "new", "name": "27-claim-check"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_parser_understands(arguments: list[str], expected: dict[str, Any]) -> None:
    assert vars(cli.parser().parse_args(arguments)) == expected


@pytest.mark.parametrize(
    "arguments", [["runn"], ["run"], ["new"], ["brokers"], ["brokers", "away"], ["lab", "--port", "x"], ["doctor", "x"]]
)
def test_the_parser_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2 and the usage, as every command line does."""
    with pytest.raises(SystemExit) as error:
        cli.parser().parse_args(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python3 -m mqlib")


@pytest.mark.parametrize("arguments", [["help"], [], ["--help"]], ids=["help", "nothing", "--help"])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    done = mqlib(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python3 -m mqlib {command}")


def test_an_unknown_notebook_is_one_line_and_no_traceback() -> None:
    """Exit code 1 before any broker is started: the line names the notebooks there are."""
    done = mqlib("run", "99", MQLIB_KAFKA_BOOTSTRAP="", MQLIB_RABBITMQ_URL="")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("mqlib: there is no notebook '99'. There are: ")
    assert all(path.stem in line for path in NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))


def test_an_unknown_benchmark_is_one_line_and_no_traceback() -> None:
    """Before any broker is started; the line names the benchmarks there are."""
    done = mqlib("bench", "ledger", "kafka_sent", MQLIB_KAFKA_BOOTSTRAP="", MQLIB_RABBITMQ_URL="")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line == f"mqlib: there is no benchmark 'kafka_sent'. There are: {', '.join(cli.BENCHMARKS)}"
    assert {"kafka_send", "rabbit_publish", "ledger", "startup"} <= set(cli.BENCHMARKS)


def test_an_address_where_nobody_listens_is_one_line_and_no_traceback() -> None:
    done = mqlib("run", "04", MQLIB_KAFKA_BOOTSTRAP="127.0.0.1:9", MQLIB_RABBITMQ_URL="amqp://127.0.0.1:9",
                 MQLIB_PROVIDER="external")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("mqlib: ")
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", ["claim-check", "4-x", "27", "27-Claim", "27_x", "../27-x", "27-x.ipynb", "", "04-other"]
)
def test_new_refuses_what_cannot_be_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that shows what a name looks like, or who has the number; nothing is written."""
    (tmp_path / "04-work-queue.ipynb").write_text("{}")
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path)
    with pytest.raises(BrokerError, match=r"NN-kebab-name|04 is taken by 04-work-queue"):
        cli.main(["new", name])
    assert [path.name for path in tmp_path.iterdir()] == ["04-work-queue.ipynb"]


def test_new_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catalogue.tsv").write_bytes((NOTEBOOKS / "catalogue.tsv").read_bytes())
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main(["new", "97-claim-check"]) == 0
    said = capsys.readouterr().out
    assert said == "97-claim-check.ipynb: fill it in, then run: python3 -m mqlib run 97 --save\n"
    assert (tmp_path / "97-claim-check.ipynb").exists()


def test_new_on_the_command_line_is_one_line_and_no_traceback() -> None:
    done = mqlib("new", "Claim Check")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mqlib: 'Claim Check' is not of the form NN-kebab-name")


def test_the_catalog_says_what_is_missing_by_its_exit_code_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("catalogue.tsv", "04-work-queue.ipynb"):
        (tmp_path / name).write_bytes((NOTEBOOKS / name).read_bytes())
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path)
    assert cli.main(["catalog", "--check", "--write"]) == 0
    assert capsys.readouterr().out.endswith("15 of 341 techniques are executed and checked.\n")
    assert "[04-work-queue](04-work-queue.ipynb)" in (tmp_path / "README.md").read_text()
    broken = (tmp_path / "04-work-queue.ipynb").read_text().replace("technique:T047", "technique:T999")
    (tmp_path / "04-work-queue.ipynb").write_text(broken)
    assert cli.main(["catalog"]) == 0
    assert cli.main(["catalog", "--check"]) == 1
    assert "T047" in capsys.readouterr().out


def test_the_doctor_tells_programs(kafka: mq.Kafka, rabbit: mq.RabbitMQ) -> None:
    """Valid JSON and nothing else; the exit code says the same as `can_run`."""
    done = mqlib("doctor", "--json", **kafka.environment, **rabbit.environment)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["can_run"] else 1)
    assert report["can_run"] is True
    assert {kind: told["provider"] for kind, told in report["providers"].items()} == {
        "kafka": "external", "rabbitmq": "external",
    }  # fmt: skip
    assert all(set(fact) == {"mark", "name", "found", "remedy"} for fact in report["facts"])


def test_the_doctor_says_when_a_broker_is_not_there() -> None:
    done = mqlib("doctor", "--json", MQLIB_KAFKA_BOOTSTRAP="127.0.0.1:9", MQLIB_PROVIDER="external")
    report = json.loads(done.stdout)
    assert (done.returncode, report["can_run"]) == (1, False)
    [fact] = [fact for fact in report["facts"] if fact["name"] == "→ kafka"]
    assert fact["mark"] == "✗"
    assert "127.0.0.1:9" in fact["found"]


def test_brokers_of_the_environment_are_handed_on_and_left_running(
    kafka: mq.Kafka, rabbit: mq.RabbitMQ, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is started with the yielded variables meets the same brokers; they outlive the block."""
    told = {**kafka.environment, **rabbit.environment}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MQLIB_STARTED_BY", "started by a test; process")
    with cli.shared_brokers("test") as environment:
        assert {name: environment[name] for name in told} == told
        assert environment["MQLIB_STARTED_BY"] == "started by mqlib test; external"
    assert "Both brokers are ready" in capsys.readouterr().out
    assert mq.kafka().running
    assert mq.rabbitmq().running


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[str], Any, dict[str, str]]]]:
    """What a command starts, instead of starting it: arguments, folder, environment. The exit code is 5."""
    calls: list[tuple[list[str], Any, dict[str, str]]] = []

    def call(command: list[str], cwd: Any, env: dict[str, str]) -> int:
        calls.append((command, cwd, env))
        return 5

    monkeypatch.setattr(cli, "shared_brokers", lambda name: contextlib.nullcontext({"MQLIB_ADDRESS": name}))
    monkeypatch.setattr(subprocess, "call", call)
    before = signal.getsignal(signal.SIGTERM)
    yield calls
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "rest", [[], ["tests/test_cli.py", "-x"], ["-k", "ledger"], ["-x", "--lf"]], ids=lambda rest: " ".join(rest) or "-"
)
def test_tests_run_in_the_project_with_the_brokers_addresses(started: list[Any], rest: list[str]) -> None:
    """`test` hands pytest its arguments, whatever they begin with, and the addresses; and returns its exit code."""
    assert cli.main(["test", *rest]) == 5
    [(command, cwd, environment)] = started
    assert command[1:] == ["-m", "pytest", *rest]
    assert (cwd, environment["MQLIB_ADDRESS"]) == (ROOT, "test")


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        ([], [*cli.BENCHMARKS, "--out", str(ROOT / "bench")]),
        (["ledger", "--quick", "--out", "there"], ["ledger", "--out", str(Path("there").resolve()), "--quick"]),
    ],
    ids=["all", "one"],
)
def test_benchmarks_run_in_the_project_with_the_brokers_addresses(
    started: list[Any], arguments: list[str], handed_on: list[str]
) -> None:
    """All of them unless told; the exit code is theirs."""
    assert cli.main(["bench", *arguments]) == 5
    [(command, cwd, environment)] = started
    assert command[1:] == ["-m", "tests.benchmarks", *handed_on]
    assert (cwd, environment["MQLIB_ADDRESS"]) == (ROOT, "bench")
