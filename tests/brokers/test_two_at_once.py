"""Two people on one machine, or two terminals of one: neither is in the other's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.processes import Traces, clean_environment


def start_run(folder: Path) -> subprocess.Popen[str]:
    """`mqlib run 05`, started, with a folder of its own for temporary files."""
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "mqlib", "run", "05"], cwd=ROOT, text=True,
        env=clean_environment(TMPDIR=str(folder), MQLIB_PROVIDER="process"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_runs_at_the_same_time_both_succeed(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = [start_run(folder) for folder in folders]
    results = [(run.communicate(timeout=280), run.returncode) for run in runs]
    for (out, err), code in results:
        assert (code, err) == (0, ""), out
        assert out.splitlines()[-1] == "1 notebooks passed, 0 failed"
    for folder in folders:
        Traces(folder).assert_gone()
