"""Runs the benchmarks that are named: what `python3 -m mqlib bench` calls when the brokers are there."""

from __future__ import annotations

import argparse
import asyncio
import sys
from importlib import import_module
from pathlib import Path

from mqlib.brokers import BrokerError
from tests.benchmarks import core


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.benchmarks")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    judged = not options.quick
    found: list[core.Row] = []
    for name in options.names:
        print(f"{name} …", flush=True)
        try:
            found += asyncio.run(core.run(name, import_module(f"tests.benchmarks.{name}"), options.quick))
        except BrokerError as error:
            print(f"mqlib: {name}: {error}", file=sys.stderr)
            return 1
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.md").write_text(core.markdown(found, judged))
    (options.out / "benchmarks.png").write_bytes(core.figure(found, judged)._repr_png_())
    print("", *core.table(found, judged), "", f"The same in {options.out}: benchmarks.md, benchmarks.png", sep="\n")
    missed = [row.missed() for row in found if not row.held]
    if options.quick:
        print("A quick run: everything ran, and no ratio was judged.")
        return 0
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


sys.exit(main())
