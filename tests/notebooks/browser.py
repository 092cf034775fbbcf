"""JupyterLab in a browser, as a reader has it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

import mqlib as mq
from tests.conftest import NOTEBOOKS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    # All cells stay in the page, so that the test can read them; and nothing is written into the notebook.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("MQLIB_EXPECT_BROWSER"), reason="no Chromium on this machine"
)


@contextlib.contextmanager
def laboratory(kafka: mq.Kafka, rabbit: mq.RabbitMQ, settings: Path, notebooks: Path = NOTEBOOKS) -> Iterator[str]:
    """`python3 -m mqlib lab` on these brokers, for a folder of notebooks: its address with the token."""
    for name, value in SETTINGS.items():
        path = settings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    environment = {
        **os.environ, **kafka.environment, **rabbit.environment,
        "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(settings),
    }  # fmt: skip
    code = (
        "import pathlib, sys; from mqlib import cli; "
        f"cli.NOTEBOOKS = pathlib.Path({str(notebooks)!r}); sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, *(["-m", "mqlib"] if notebooks == NOTEBOOKS else ["-c", code]), "lab", "--no-browser"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"JupyterLab: (\S+)", line):
            break
    else:
        pytest.fail(printed)
    try:
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed + rest


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A browser of its own, so that no tab of an earlier test is in the way."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 1600})
        browser.close()


def open_notebook(page: Page, lab: str, name: str) -> None:
    """Opens a notebook of the folder and waits for its kernel."""
    page.goto(lab.replace("/lab?", f"/lab/tree/{name}.ipynb?reset&"))
    # The notebook's own sign says idle a moment too soon: whoever runs a cell then is asked for a kernel.
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)


def choose(page: Page, menu: str, item: str) -> None:
    """Clicks an item of a menu."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def screenshot_of(page: Page, name: str, folder: Path) -> Path:
    """A picture of the page, in the folder that `MQLIB_SCREENSHOTS` names, else in `folder`."""
    path = Path(os.environ.get("MQLIB_SCREENSHOTS", folder)) / f"{name}.png"
    page.screenshot(path=path)
    return path
