"""Finds Docker Compose 2, or takes it out of a Debian package where the host's own release has only version 1.

    python3 tests/images/compose.py           # prints the path of a program that understands `config`, `up`, `down`

The program also runs as `docker compose` if it is linked into ~/.docker/cli-plugins. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, Python looks only beside it
from tests.images import debian_host


def is_version_2(program: str | Path) -> bool:
    if not os.access(program, os.X_OK):
        return False
    done = subprocess.run([program, "version", "--short"], check=False, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip().removeprefix("v").split(".")[0] not in ("", "1")


def installed() -> Path | None:
    """An installed Compose 2: a program of its own, or the plug-in of `docker compose`, which runs alone as well."""
    folders = [Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "cli-plugins"]
    folders += [Path(f"{p}/docker/cli-plugins") for p in ("/usr/local/lib", "/usr/local/libexec", "/usr/lib")]
    folders += [Path("/usr/libexec/docker/cli-plugins")]
    found = shutil.which("docker-compose")
    candidates = [*([Path(found)] if found else []), *(folder / "docker-compose" for folder in folders)]
    return next((c for c in candidates if is_version_2(c)), None)


def fetch() -> Path:
    """The path of a Compose 2 program. A second call takes it from the cache."""
    if program := installed():
        return program
    kept = debian_host.cache() / "docker-compose"
    if is_version_2(kept):
        return kept
    with tempfile.TemporaryDirectory(prefix="mqlib-compose-") as name:
        folder = Path(name)
        package = download("docker-compose", folder)
        subprocess.run(["dpkg-deb", "--extract", package, folder / "package"], check=True)
        found = [p for p in (folder / "package").rglob("docker-compose") if p.is_file() and os.access(p, os.X_OK)]
        if not found:
            raise SystemExit(f"{package.name} holds no docker-compose")
        partial = kept.with_suffix(".partial")
        shutil.copy2(found[0], partial)
        partial.rename(kept)
    if not is_version_2(kept):
        raise SystemExit(f"{kept} is not Compose 2, or does not run here")
    return kept


def download(package: str, folder: Path) -> Path:
    """The package from the release that has Compose 2, checked by apt as usual; the host's own lists stay as is."""
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(
        f"deb [signed-by={debian_host.KEYRING}] {debian_host.mirror()} {debian_host.TRIXIE} main\n"
    )
    options = {
        "Dir::State::Lists": folder / "lists",
        "Dir::State::Status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    for action in (["update"], ["download", package]):
        done = subprocess.run([*apt, *action], cwd=folder, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"apt-get {' '.join(action)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return next(folder.glob("*.deb"))


if __name__ == "__main__":
    print(fetch())
