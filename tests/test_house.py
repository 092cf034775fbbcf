"""The code's own rules, as tests: lint, format, types, size."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=" ".join,
)
def test_the_tools_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_stays_small() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "mqlib").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 310} == {}
    assert sum(lengths.values()) < 3500


def test_importing_the_package_is_light() -> None:
    """`import mqlib` loads no client and no plotting library, so that the command line starts at once."""
    script = "import sys, mqlib, mqlib.cli; print([m for m in ('aiokafka', 'aio_pika', 'matplotlib', 'docker') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
