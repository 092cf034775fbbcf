"""The commands behind `python3 -m mqlib`. Only what a command needs is imported, when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .brokers.base import Broker, BrokerError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BENCHMARKS = sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("[a-z]*.py") if path.stem != "core")


def parser() -> argparse.ArgumentParser:
    """The command line; `--help` of each command says what it does."""
    top = argparse.ArgumentParser(prog="python3 -m mqlib", description="Message-queue patterns on real brokers.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    lab = commands.add_parser("lab", help="start the brokers and open the notebooks in JupyterLab")
    lab.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")
    lab.add_argument("--port", type=int, default=8888, help="JupyterLab's port, if it is free (8888)")

    run = commands.add_parser("run", help="execute notebooks without a browser")
    run.add_argument("names", nargs="+", metavar="NAME", help="a number (04), a name (04-work-queue), or all")
    run.add_argument("--html", type=Path, metavar="DIR", help="write them as HTML there, with an index page")
    run.add_argument("--save", action="store_true", help="keep the outputs in the notebooks (for maintainers)")

    test = commands.add_parser("test", help="run the tests on real brokers; what follows goes to pytest")
    test.add_argument("rest", nargs=argparse.REMAINDER, help="arguments for pytest")

    bench = commands.add_parser("bench", help="measure mqlib, the raw clients and Kafka's own tools side by side")
    bench.add_argument("names", nargs="*", metavar="NAME", help=f"which ({', '.join(BENCHMARKS)}); all unless told")
    bench.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "bench",
                       help="where the table (Markdown) and the figure (PNG) go: bench")  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="once, with few records, and nothing is judged")

    catalog = commands.add_parser("catalog", help="which techniques are executed and checked, and which are planned")
    catalog.add_argument("--check", action="store_true", help="exit code 1 when a notebook lacks one of its techniques")
    catalog.add_argument("--write", action="store_true", help="write notebooks/README.md (for maintainers)")

    doctor = commands.add_parser("doctor", help="what is on this machine, and what is missing")
    doctor.add_argument("--json", action="store_true", help="the same for programs")

    brokers = commands.add_parser("brokers", help="brokers that stay up between commands")
    brokers.add_argument("action", choices=["up", "down", "status", "serve"])

    new = commands.add_parser("new", help="a new notebook from the template")
    new.add_argument("name", help="NN-kebab-name, for example 27-claim-check")
    return top


@contextlib.contextmanager
def shared_brokers(started_by: str) -> Iterator[dict[str, str]]:
    """Both brokers, started side by side; yields the environment that hands them to other processes.

    Brokers that the environment already names are used as they are. Raises `BrokerUnavailable`.
    """
    from .brokers import STARTED_BY, kafka, rabbitmq

    start = time.monotonic()
    print("Starting the brokers …", flush=True)
    running: list[Broker] = []
    try:
        with ThreadPoolExecutor() as pool:
            starts: list[Callable[[], Broker]] = [kafka, rabbitmq]
            tasks = [pool.submit(start_one) for start_one in starts]
        for task in tasks:  # each is waited for, so that a failure of one does not orphan the other
            if not task.exception():
                running.append(task.result())
        for task in tasks:
            task.result()
        print(f"Both brokers are ready ({time.monotonic() - start:.0f} s).", flush=True)
        told = {name: value for broker in running for name, value in broker.environment.items()}
        providers = sorted({broker.provider for broker in running})
        yield {**told, STARTED_BY: f"started by mqlib {started_by}; {', '.join(providers)}"}
    finally:
        for broker in running:
            broker.stop()


def lab(no_browser: bool, port: int) -> int:
    """JupyterLab with both brokers, until Ctrl-C."""
    from .brokers.machine import HOST, free_ports, is_free
    from .brokers.ownership import Estate

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with shared_brokers("lab") as told:
        port = port if is_free(port) else free_ports(1)[0]
        token = secrets.token_hex(16)
        estate = Estate()
        log = estate.folder("lab") / "jupyter.log"
        argv = [
            sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.ip={HOST}", f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0", f"--ServerApp.root_dir={NOTEBOOKS}", "--ServerApp.answer_yes=True",
            "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        ]  # fmt: skip
        try:
            # The guardian starts it, so that it ends with us however we end.
            pid = estate.spawn(argv, {**os.environ, **told, "JUPYTER_TOKEN": token}, NOTEBOOKS, log)
            address = f"http://{HOST}:{port}"
            while not _answers(f"{address}/api/status?token={token}"):
                if estate.exit_code(pid) is not None:
                    raise BrokerError("JupyterLab ended while starting:\n" + log.read_text()[-2000:])
                time.sleep(0.1)
            print(f"\nJupyterLab: {address}/lab?token={token}\nStop everything with Ctrl-C.", flush=True)
            if not no_browser:
                import webbrowser

                webbrowser.open(f"{address}/lab?token={token}")
            while estate.exit_code(pid) is None:
                time.sleep(0.5)
            print("JupyterLab has ended.")
        except KeyboardInterrupt:
            print("\nStopping JupyterLab, its kernels and the brokers …", flush=True)
            estate.end(pid, 10)
        finally:
            estate.close()
    return 0


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except OSError:
        return False


def run(names: list[str], html: Path | None, save: bool) -> int:
    """Executes notebooks; exit code 1 when a claim in one of them did not hold."""
    from .execute import execute_all, find

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = find(names, NOTEBOOKS)
    with shared_brokers("run") as told:
        os.environ.update(told)
        return execute_all(found, html, save)


def test(rest: list[str]) -> int:
    """The tests, with brokers started once for all of them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with shared_brokers("test") as told:
        return subprocess.call([sys.executable, "-m", "pytest", *rest], cwd=ROOT, env={**os.environ, **told})


def bench(names: list[str], out: Path, quick: bool) -> int:
    """The benchmarks; exit code 1 when a promised ratio is missed. Raises `BrokerError` for a name that is none."""
    for name in names:
        if name not in BENCHMARKS:
            raise BrokerError(f"there is no benchmark {name!r}. There are: {', '.join(BENCHMARKS)}")
    command = [sys.executable, "-m", "tests.benchmarks", *(names or BENCHMARKS), "--out", str(out.resolve())]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with shared_brokers("bench") as told:
        return subprocess.call(command + ["--quick"] * quick, cwd=ROOT, env={**os.environ, **told})


def new(name: str) -> int:
    """A notebook from the template, with every heading that the house style asks for."""
    from .skeleton import write_new

    print(
        f"{write_new(name, NOTEBOOKS).relative_to(ROOT)}: fill it in, then run: python3 -m mqlib run {name[:2]} --save"
    )
    return 0


def catalog(check: bool, write: bool) -> int:
    """What is executed and checked; with `check` the exit code says whether every notebook here is complete."""
    from .catalog import page, summary, techniques

    rows = techniques(NOTEBOOKS)
    text, complete = summary(rows)
    print(text)
    if write:
        (NOTEBOOKS / "README.md").write_text(page(rows), encoding="utf-8")
    return 0 if complete or not check else 1


def doctor(as_json: bool) -> int:
    """What is here; the exit code says whether notebooks can run."""
    from .doctor import examine

    report = examine(ROOT)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for fact in report["facts"]:
            print(f"{fact['mark']} {fact['name']:16} {fact['found']}")
            if fact["remedy"]:
                print(f"{'':18} → {fact['remedy']}")
        print(report["verdict"])
    return 0 if report["can_run"] else 1


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    chosen = parser()
    if arguments[:1] == ["test"] and arguments[1:2] not in (["-h"], ["--help"]):
        return test(arguments[1:])  # argparse would take the first of pytest's options for one of ours
    options = chosen.parse_args([] if arguments[:1] == ["help"] else arguments)
    match options.command:
        case "lab":
            return lab(options.no_browser, options.port)
        case "run":
            return run(options.names, options.html, options.save)
        case "test":
            return test(options.rest)
        case "bench":
            return bench(options.names, options.out, options.quick)
        case "catalog":
            return catalog(options.check, options.write)
        case "doctor":
            return doctor(options.json)
        case "brokers":
            from .daemon import ACTIONS

            return ACTIONS[options.action]()
        case "new":
            return new(options.name)
    chosen.print_help()
    return 0
