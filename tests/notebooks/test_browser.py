"""What a reader does: open the lab in a browser, run all cells, see every check and every figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page

import mqlib as mq
from tests.conftest import NOTEBOOKS
from tests.notebooks.browser import choose, chromium, laboratory, needs_chromium, open_notebook, screenshot_of

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def lab(kafka: mq.Kafka, rabbit: mq.RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with laboratory(kafka, rabbit, tmp_path_factory.mktemp("settings")) as address:
        yield address


@pytest.fixture
def page() -> Iterator[Page]:
    with chromium() as page:
        yield page


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
@pytest.mark.parametrize(
    ("name", "title"), [("05-rpc", "05 RPC"), ("13-transactional-messaging", "13 Transactional messaging")]
)
def test_run_all_cells_shows_every_check_and_figure(
    lab: str, page: Page, tmp_path: Path, name: str, title: str
) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    before = path.read_bytes()
    claims = claims_of(path)
    assert len(claims) > 20
    open_notebook(page, lab, name)
    page.get_by_role("heading", name=title).wait_for(timeout=60_000)
    # The committed outputs go first: what is read below comes from this run.
    choose(page, "Edit", "Clear Outputs of All Cells")
    assert page.locator(".jp-OutputArea-output").count() == 0
    choose(page, "Run", "Run All Cells")
    failed = page.locator("[data-mime-type='application/vnd.jupyter.stderr']")  # so JupyterLab shows an error, too
    page.get_by_text(claims[-1]).or_(failed).first.wait_for(timeout=180_000)
    assert failed.all_inner_texts() == []
    outputs = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())
    assert [claim for claim in claims if claim not in outputs] == []
    assert page.locator(".jp-OutputArea-output img").count() == figures_of(path)
    assert failed.all_inner_texts() == []
    page.locator(".jp-OutputArea-output img").nth(2).scroll_into_view_if_needed()
    assert screenshot_of(page, name, tmp_path).stat().st_size > 20_000
    assert path.read_bytes() == before
