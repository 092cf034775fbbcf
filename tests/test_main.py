"""The first command on a fresh machine: the environment is made once, and a failure is one message."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mqlib import __main__ as main
from mqlib import cli
from mqlib.brokers import BrokerError
from tests.conftest import ROOT

CLOSED = "http://127.0.0.1:9/simple"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without an environment, on a machine that reaches no package index."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MQLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(main, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(main, "in_virtual_environment", lambda: False)
    return tmp_path / ".venv"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mqlib", *arguments])
    return main.main()


def test_what_was_never_installed_is_outdated(tmp_path: Path) -> None:
    files = main.requirements("test")
    assert files == [ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]
    assert all(file.exists() for file in files)
    assert main.outdated(tmp_path, files) == files
    assert main.requirements("run") == main.requirements("lab") == files[:1]


def test_a_stamp_holds_until_its_file_changes(tmp_path: Path) -> None:
    """Each file has its own: a change of the tests' needs installs nothing for a user, and the other way round."""
    import hashlib

    (tmp_path / "tests").mkdir()
    user, tests = tmp_path / "requirements.txt", tmp_path / "tests" / "requirements.txt"
    for file in (user, tests):
        file.write_text("a~=1\n")
        main.stamp_of(tmp_path, file).write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    assert main.stamp_of(tmp_path, user) != main.stamp_of(tmp_path, tests)
    assert main.outdated(tmp_path, [user, tests]) == []
    tests.write_text("a~=2\n")
    assert main.outdated(tmp_path, [user, tests]) == [tests]


def test_an_environment_that_is_complete_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run: the second command starts at once."""

    def never(*_: object) -> None:
        pytest.fail("this has to be there already")

    monkeypatch.setattr(main, "run_step", never)
    monkeypatch.setattr(main, "outdated", lambda venv, files: [])
    assert main.ensure_environment("run") == main.python_of(Path(sys.prefix))


def test_a_machine_that_is_offline_gets_one_message(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From `mqlib run` on a fresh clone: exit code 1, what failed and what to do, no traceback; and again the same."""
    for _ in range(2):
        assert run_main(monkeypatch, "run", "04") == 1
        said = capsys.readouterr()
        assert said.err.startswith("mqlib: the Python packages could not be installed: ")
        assert "Is this machine online" in said.err
        assert "run the same command again" in said.err
        assert len(said.err.splitlines()) == 2
        assert "Traceback" not in said.out + said.err
        assert "Installing the Python packages" in said.out
    assert main.python_of(fresh).exists()
    assert main.outdated(fresh, main.requirements("run")) == main.requirements("run"), "nothing passes for installed"


def test_an_environment_that_was_cut_short_is_mended(fresh: Path) -> None:
    """Ctrl-C while it is made leaves an interpreter without pip: the same command, run again, goes on."""
    venv.create(fresh, with_pip=False, symlinks=True)
    with pytest.raises(main.SetupError) as error:
        main.ensure_environment("run")
    assert "No module named pip" not in str(error.value)
    assert subprocess.run([main.python_of(fresh), "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_an_environment_that_cannot_be_made_says_why(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.write_text("a file in its place")
    assert run_main(monkeypatch, "run", "04") == 1
    said = capsys.readouterr().err
    assert said.startswith("mqlib: `python -m venv` failed:")
    assert str(fresh) in said


def test_without_ensurepip_the_command_to_run_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian splits python3-venv off; who may not install it gets the command."""
    from mqlib.brokers import install

    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(install, "may_install", lambda: False)
    with pytest.raises(main.SetupError, match="sudo apt-get install -y python3-venv"):
        main.ensure_environment("run")


def test_a_python_that_is_too_old_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
        patch.setattr(sys, "version", "3.10.12 (main)")
        code = main.main()
    assert code == 2
    assert capsys.readouterr().err == "mqlib needs Python 3.11 or newer; this is 3.10.12\n"


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_what_an_old_python_reads_it_can_parse(name: str) -> None:
    """Otherwise it would say `SyntaxError` before we can say what is missing."""
    ast.parse((ROOT / "mqlib" / name).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BrokerError("no broker here"), 1, "mqlib: no broker here\n"),
        (OSError(28, "No space left on device", "/data/x"), 1, "mqlib: the disk is full (/data/x)"),
        (OSError(122, "Disk quota exceeded"), 1, "mqlib: the disk is full"),
        (KeyboardInterrupt(), 130, "\nmqlib: interrupted\n"),
    ],
    ids=["broker", "full disk", "quota", "Ctrl-C"],
)
def test_what_can_go_wrong_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def failing(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(main, "ensure_environment", lambda command: Path(sys.executable))
    monkeypatch.setattr(main, "in_virtual_environment", lambda: True)
    monkeypatch.setattr(cli, "main", failing)
    assert run_main(monkeypatch, "run", "04") == code
    assert capsys.readouterr().err.startswith(said)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(arguments: list[str]) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(main, "ensure_environment", lambda command: Path(sys.executable))
    monkeypatch.setattr(main, "in_virtual_environment", lambda: True)
    monkeypatch.setattr(cli, "main", failing)
    with pytest.raises(PermissionError):
        run_main(monkeypatch, "run", "04")


def test_a_step_returns_what_its_command_said(capsys: pytest.CaptureFixture[str]) -> None:
    done = main.run_step("Working", [sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")
    assert capsys.readouterr().out.startswith("Working …\n")
