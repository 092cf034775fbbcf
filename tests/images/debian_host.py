"""What the other files here need from a Debian host: its packages, its mirror, a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

TRIXIE = "trixie"  # the release whose packages the images and Compose are taken from
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # a user's own often lacks the folders of daemons


def require(program: str, package: str) -> str:
    """Path of `program`; its Debian package is installed first if the program is missing (which needs root)."""
    if found := shutil.which(program, path=PATH):
        return found
    if not shutil.which("apt-get"):
        raise SystemExit(f"{program} is missing and there is no apt-get to install the package {package} with")
    print(f"installing {package} ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
        done = subprocess.run(
            ["apt-get", *arguments],
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"apt-get {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    if found := shutil.which(program, path=PATH):
        return found
    raise SystemExit(f"{package} is installed, yet {program} is not there")


def mirror() -> str:
    """The mirror of this host's own apt sources: some networks only reach that one."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]
    targets = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    if not targets.strip():  # a fresh host has no package lists yet
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        targets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in targets.splitlines():
        label, _, uri = line.partition(" ")
        if label == "Debian":
            return uri
    raise SystemExit("this host's apt sources name no Debian mirror")


def cache() -> Path:
    """Folder for what takes long to make and can be made again."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "mqlib-images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
