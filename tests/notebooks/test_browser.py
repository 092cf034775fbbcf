"""What a reader does: open the lab in a browser, run all cells, see every check and every figure."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
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

if CHROMIUM is None and not os.environ.get("MQLIB_EXPECT_BROWSER"):
    pytest.skip("no Chromium on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def lab(kafka: mq.Kafka, rabbit: mq.RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python3 -m mqlib lab`, on the shared brokers: its address with the token."""
    settings = tmp_path_factory.mktemp("settings")
    for name, value in SETTINGS.items():
        path = settings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    environment = {
        **os.environ, **kafka.environment, **rabbit.environment,
        "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(settings),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "mqlib", "lab", "--no-browser"],
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
    yield found[1]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed + rest


@pytest.fixture
def page() -> Iterator[Page]:
    """A browser of its own, so that no tab of an earlier test is in the way."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 1600})
        browser.close()


def claims_of(path: Path) -> list[str]:
    """The check lines that the committed notebook holds, which are what a run must print."""
    notebook = nbformat.read(path, as_version=4)
    texts = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    return [line for line in "".join(texts).splitlines() if line[:1] in "✓○"]


def figures_of(path: Path) -> int:
    notebook = nbformat.read(path, as_version=4)
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "title"), [("04-work-queue", "04 Work queue"), ("01-producer", "01 Producer")])
def test_run_all_cells_shows_every_check_and_figure(
    lab: str, page: Page, tmp_path: Path, name: str, title: str
) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    before = path.read_bytes()
    claims = claims_of(path)
    assert len(claims) > 20
    page.goto(lab.replace("/lab?", f"/lab/tree/{path.name}?reset&"))
    page.get_by_role("heading", name=title).wait_for(timeout=60_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=60_000)
    # The committed outputs go first: what is read below comes from this run.
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
    assert page.locator(".jp-OutputArea-output").count() == 0
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_text(claims[-1]).wait_for(timeout=180_000)
    outputs = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())
    assert [claim for claim in claims if claim not in outputs] == []
    assert page.locator(".jp-OutputArea-output img").count() == figures_of(path)
    assert page.locator(".jp-OutputArea-output[data-mime-type*='error'], [data-mime-type*='stderr']").count() == 0
    page.locator(".jp-OutputArea-output img").nth(2).scroll_into_view_if_needed()
    screenshot = Path(os.environ.get("MQLIB_SCREENSHOTS", tmp_path)) / f"{name}.png"
    page.screenshot(path=screenshot)
    assert screenshot.stat().st_size > 20_000
    assert path.read_bytes() == before
