"""What is missing on the machine: it is fetched or installed where we may, otherwise one message says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jgo
import pytest

import mqlib as mq
from mqlib.brokers import install, machine
from mqlib.brokers.versions import KAFKA_VERSION
from tests.conftest import ROOT
from tests.processes import clean_environment

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def without_rabbitmq(as_processes: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without RabbitMQ, and a user who may not install it."""
    as_processes.setattr(install, "find_rabbitmq", lambda: None)
    as_processes.setattr(install, "may_install", lambda: False)
    return as_processes


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["apt-get", "install", "-y", "rabbitmq-server"], "Run: sudo apt-get install -y rabbitmq-server"),
        (["brew", "install", "rabbitmq"], "Run: brew install rabbitmq"),
        ([], "Install RabbitMQ"),
    ],
)
def test_rabbitmq_is_missing_and_we_may_not_install_it(
    without_rabbitmq: pytest.MonkeyPatch, command: list[str], told: str
) -> None:
    without_rabbitmq.setattr(install, "install_command", lambda: command)
    with pytest.raises(mq.BrokerUnavailable) as failure:
        mq.rabbitmq()
    text = str(failure.value)
    assert text.startswith("RabbitMQ is not installed on this machine.")
    for way in (told, "start Docker", "MQLIB_RABBITMQ_URL"):
        assert way in text
    assert len(text.splitlines()) == 1


def test_neither_docker_nor_rabbitmq_is_one_error_with_three_ways_out(without_rabbitmq: pytest.MonkeyPatch) -> None:
    """B02: Docker does not answer and the local program is not there."""
    without_rabbitmq.delenv("MQLIB_PROVIDER")
    without_rabbitmq.setenv("DOCKER_HOST", "unix:///nonexistent")
    with pytest.raises(mq.BrokerUnavailable) as failure:
        mq.rabbitmq()
    assert failure.value.__context__ is None
    for way in ("Docker", "RabbitMQ is not installed", "MQLIB_RABBITMQ_URL"):
        assert way in str(failure.value)


def test_the_command_says_it_in_one_message_too(tmp_path: Path) -> None:
    """As a user meets it: no Docker, no RabbitMQ, not root. Kafka, which did start, ends again."""
    code = """
import sys
from mqlib.brokers import install
install.find_rabbitmq = lambda: None
install.may_install = lambda: False
from mqlib.__main__ import main
sys.argv = ["mqlib", "run", "04"]
sys.exit(main())
"""
    environment = clean_environment(DOCKER_HOST="unix:///nonexistent", TMPDIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mqlib: RabbitMQ is not installed on this machine.")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.glob("mqlib-*")) == []


def test_rabbitmq_is_installed_once_where_we_may(as_processes: pytest.MonkeyPatch) -> None:
    found: list[tuple[Path, Path]] = []
    asked: list[str] = []

    def apt_install(*packages: str) -> None:
        asked.extend(packages)
        found.append((Path("/rabbitmq-server"), Path("/epmd")))

    as_processes.setattr(install, "find_rabbitmq", lambda: found[0] if found else None)
    as_processes.setattr(install, "may_install", lambda: True)
    as_processes.setattr(install, "apt_install", apt_install)
    for _ in range(2):
        assert install.rabbitmq_server() == (Path("/rabbitmq-server"), Path("/epmd"))
    assert asked == ["rabbitmq-server"]


def test_an_installation_that_fails_shows_why_and_starts_no_service(as_processes: pytest.MonkeyPatch) -> None:
    policy = Path("/usr/sbin/policy-rc.d")
    if not install.may_install():
        # Only root may write that file, and only apt-get asks it: CI is root on Debian, where this runs.
        pytest.skip("needs root on Debian: the file that forbids services to start lies in /usr/sbin")
    there = policy.exists()
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert policy.exists(), "services are forbidden to start while packages are installed"
        commands.append(command)
        return subprocess.CompletedProcess(command, 100, "", "one\ntwo\nE: Unable to locate package x\n")

    as_processes.setattr(subprocess, "run", run)
    with pytest.raises(mq.BrokerUnavailable, match=r"apt-get install .* failed") as failure:
        install.apt_install("x")
    assert "E: Unable to locate package x" in str(failure.value)
    assert [command[1] for command in commands] == ["update", "install"]
    assert policy.exists() == there


def test_a_rabbitmq_elsewhere_can_be_named(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, mapper = tmp_path / "rabbitmq-server", tmp_path / "epmd"
    for file in (script, mapper):
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    clean.setenv("PATH", str(tmp_path))
    clean.setenv("MQLIB_RABBITMQ_SERVER", str(script))
    assert install.find_rabbitmq() == (script, mapper)
    script.unlink()
    assert install.find_rabbitmq() is None


@pytest.fixture
def empty_cache(as_processes: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The first run of a user: nothing is fetched yet."""
    as_processes.setenv("MQLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route to host\nand so on"), "ConnectionError: no route to host)"),
        (ValueError(), "no reason given"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_jars_that_cannot_be_fetched(
    empty_cache: Path, clean: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise error

    clean.setattr(jgo, "build", offline)
    clean.setattr(jgo, "resolve", offline)
    with pytest.raises(mq.BrokerUnavailable) as failure:
        mq.kafka()
    text = str(failure.value)
    assert f"Kafka {KAFKA_VERSION} could not be fetched" in text
    for word in (reason, "online", "Docker", "MQLIB_KAFKA_BOOTSTRAP"):
        assert word in text
    assert failure.value.__suppress_context__
    assert list(empty_cache.glob("*.classpath")) == [], "nothing half done is taken for done"


def test_a_class_path_that_is_known_is_used_without_the_resolver(tmp_path: Path) -> None:
    """Offline, and fast: the second start reads a list, and does not even import jgo."""
    jar = tmp_path / f"kafka_2.13-{KAFKA_VERSION}.jar"
    jar.touch()
    (tmp_path / f"kafka-{KAFKA_VERSION}.classpath").write_text(str(jar))
    code = "import sys; from mqlib.brokers import install; print(*install.kafka_jars()); print('jgo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment(MQLIB_CACHE=str(tmp_path)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(jar), "False"]


def test_a_class_path_with_a_jar_that_is_gone_is_fetched_anew(tmp_path: Path) -> None:
    listing = tmp_path / "kafka.classpath"
    jar = tmp_path / "kafka.jar"
    listing.write_text(str(jar))
    assert install.known_jars(listing) == []
    jar.touch()
    assert install.known_jars(listing) == [jar]
    assert install.known_jars(tmp_path / "none") == []
    listing.write_text("")
    assert install.known_jars(listing) == [], "an empty list is no class path"


def test_the_java_that_is_used_comes_with_the_packages() -> None:
    done = subprocess.run([str(install.java()), "-version"], capture_output=True, text=True, check=True)
    assert "25" in done.stderr.splitlines()[0]
    assert Path(sys.prefix) in install.java().parents


def test_a_cache_folder_that_cannot_be_made_names_the_variable(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    clean.setenv("MQLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(mq.BrokerUnavailable, match="set MQLIB_CACHE to another"):
        machine.cache_folder()
