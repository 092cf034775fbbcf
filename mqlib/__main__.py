"""`python3 -m mqlib …`: makes the Python environment when it is missing, then hands over to `cli`.

Standard library only: this is the first thing that runs on a fresh machine.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
WITHOUT_ENVIRONMENT = ("doctor", "help", "-h", "--help")
TESTING = ("test", "bench")


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def in_virtual_environment() -> bool:
    return sys.prefix != sys.base_prefix


def run_step(title: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command, showing `title` and the seconds that it takes."""
    start = time.monotonic()
    live = sys.stdout.isatty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    print(f"{title} …", end="" if live else "\n", flush=True)
    while True:
        try:
            out, err = process.communicate(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            if live:
                print(f"\r{title} … {time.monotonic() - start:.0f} s", end="", flush=True)
    if live or time.monotonic() - start > 2:
        print(f"{chr(13) if live else ''}{title} … {time.monotonic() - start:.0f} s", flush=True)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def requirements(command: str) -> list[Path]:
    """The requirement files that a command needs."""
    return [ROOT / "requirements.txt", *([ROOT / "tests" / "requirements.txt"] if command in TESTING else [])]


def stamp_of(venv: Path, file: Path) -> Path:
    return venv / f"mqlib-{file.parent.name if file.parent != ROOT else 'user'}.sha256"


def outdated(venv: Path, files: list[Path]) -> list[Path]:
    """Those of `files` that changed since they were installed into `venv`."""

    def digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    return [
        file for file in files if not stamp_of(venv, file).exists() or stamp_of(venv, file).read_text() != digest(file)
    ]


def has_pip(python: Path) -> bool:
    return python.exists() and not subprocess.run([str(python), "-m", "pip", "-V"], capture_output=True).returncode


def make_venv() -> None:
    """Makes `.venv`. As root on Debian it first installs python3-venv, which Debian splits off."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        from .brokers.install import apt_install, may_install

        if not may_install():
            raise SetupError(
                "this Python cannot make virtual environments. Run: sudo apt-get install -y python3-venv"
            ) from None
        apt_install("python3-venv")
    done = run_step("Making a Python environment in .venv", [sys.executable, "-m", "venv", str(VENV)])
    if done.returncode:
        raise SetupError(f"`python -m venv` failed:\n{(done.stderr or done.stdout).strip()}")


def install(python: Path, venv: Path, files: list[Path]) -> None:
    """Installs requirement files and makes this project importable from anywhere in the environment."""
    arguments = [argument for file in files for argument in ("-r", str(file))]
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2", "--quiet", *arguments]
    done = run_step("Installing the Python packages (once, a minute or two)", pip)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No space left" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()[-500:]
        if "connection" in done.stderr.lower():  # then pip's last line blames the package
            reason = "the package index cannot be reached. Is this machine online?"
        raise SetupError(
            f"the Python packages could not be installed: {reason}\nNothing is lost: run the same command again."
        )
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    Path(site.stdout.strip(), "mqlib.pth").write_text(f"{ROOT}\n")
    for file in files:
        stamp_of(venv, file).write_text(hashlib.sha256(file.read_bytes()).hexdigest())


def ensure_environment(command: str) -> Path:
    """The interpreter of an environment that has what `command` needs; makes and fills it when it does not."""
    from .brokers.machine import alone

    venv = Path(sys.prefix) if in_virtual_environment() else VENV
    python = python_of(venv)
    files = requirements(command)
    if python.exists() and not outdated(venv, files):
        return python
    with alone("environment"):
        if not has_pip(python):  # also where Ctrl-C ended us while the environment was being made
            make_venv()
        stale = outdated(venv, files)
        if stale:
            install(python, venv, stale)
    return python


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  (this file must say so itself, on a Python that is too old)
        print(f"mqlib needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    from .brokers.base import BrokerError

    command = sys.argv[1] if len(sys.argv) > 1 else "help"
    try:
        python = python_of(VENV) if command in WITHOUT_ENVIRONMENT else ensure_environment(command)
        if not in_virtual_environment() and python.exists():
            os.environ["PYTHONPATH"] = str(ROOT)
            os.execv(python, [str(python), "-m", "mqlib", *sys.argv[1:]])
        from .cli import main as cli

        return cli(sys.argv[1:])
    except (SetupError, BrokerError) as error:
        print(f"mqlib: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            print(f"mqlib: the disk is full ({error.filename or error}). Make room and run it again.", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt:
        print("\nmqlib: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
