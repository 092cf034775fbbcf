"""Figures that change, as a reader sees them: the lag of a real group while its cell runs, and a panel to drag."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect

import mqlib as mq
from tests.kernel import notebook_of
from tests.notebooks.browser import choose, chromium, laboratory, needs_chromium, open_notebook, screenshot_of
from tests.processes import eventually

pytestmark = [needs_chromium, pytest.mark.timeout(300)]

SETUP = """\
import asyncio, time
from pathlib import Path

from aiokafka import TopicPartition

import mqlib as mq
from mqlib import check, plots
from mqlib.live import live, what_if

kafka = mq.kafka()"""

WORK = """\
topic, group_id = await mq.topic(kafka, "orders"), kafka.name("slow")
part = TopicPartition(topic, 0)
start, times, lags, ended = time.monotonic(), [], [], Path("ended")

async def send():
    async with mq.producer(kafka) as producer:
        while not ended.exists():
            await asyncio.gather(*[producer.send_and_wait(topic, b"an order") for _ in range(20)])

async def read_slowly():
    async with mq.consumer(kafka, topic, group_id=group_id, enable_auto_commit=False) as consumer:
        while not ended.exists():
            if await mq.take(consumer, 1, within=1):
                await consumer.commit()
            lags.append((await consumer.end_offsets([part]))[part] - (await consumer.committed(part) or 0))
            times.append(time.monotonic() - start)"""

LIVE = """\
title = "How far is the slow group behind?"
async with live(plots.lines, lambda: {"lag": (times, lags)}, title=title, x="seconds", y="records") as chart:
    async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        tasks.create_task(read_slowly())
    chart.title = f"A reader that is slow is {lags[-1]:,} records behind in the end"
check("it falls behind", lags[-1] > lags[0])
check("the lag was drawn again and again", chart.frames > 2)"""

PANEL = """\
ran = Path("ran")

async def run(prefetch=7, crash=False):
    with ran.open("a") as file:
        print(prefetch, file=file)
    if crash:
        raise LookupError("no queue <b>tasks</b>")
    return plots.bars({"prefetch": prefetch, "20": 20}, f"With {prefetch} at a time", "messages")

await what_if(run, prefetch=(1, 50), crash=False)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    for name, sources in {"live": [SETUP, WORK, LIVE], "panel": [SETUP, PANEL]}.items():
        notebook = notebook_of(*sources)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}  # else the lab asks for one
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(kafka: mq.Kafka, rabbit: mq.RabbitMQ, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with laboratory(kafka, rabbit, tmp_path_factory.mktemp("settings"), folder) as address:
        yield address


@pytest.fixture
def page() -> Iterator[Page]:
    with chromium() as page:
        yield page


def source(page: Page) -> str:
    """The picture that is shown, which is the only one."""
    found = page.locator(".jp-OutputArea-output img")
    found.first.wait_for(timeout=60_000)
    assert found.count() == 1
    return found.get_attribute("src") or ""


def another(page: Page, than: str) -> str:
    """Waits until another picture is shown."""
    expect(page.locator(".jp-OutputArea-output img")).not_to_have_attribute("src", than, timeout=60_000)
    return source(page)


def no_error(page: Page) -> bool:
    return page.locator("[data-mime-type*='stderr']").count() == 0


def test_a_lag_is_redrawn_while_its_cell_runs_and_one_picture_stays(
    lab: str, page: Page, folder: Path, tmp_path: Path
) -> None:
    """The cell ends when this test says so."""
    open_notebook(page, lab, "live")
    choose(page, "Run", "Run All Cells")
    outputs = page.locator(".jp-Cell").nth(2).locator(".jp-Cell-outputArea")
    running = page.locator(".jp-InputArea-prompt", has_text="[*]")

    def changed(before: bytes) -> bool:
        return outputs.screenshot() != before

    source(page)
    for _ in range(3):
        eventually(functools.partial(changed, outputs.screenshot()), within=60)
        assert running.count() == 1
    frame = source(page)
    screenshot_of(page, "live-1", tmp_path)

    (folder / "ended").touch()
    page.get_by_text("✓ the lag was drawn again and again").wait_for(timeout=60_000)
    expect(running).to_have_count(0)
    last, shown = source(page), outputs.screenshot()
    screenshot_of(page, "live-2", tmp_path)
    assert last.startswith("data:image/png;base64,")
    assert last != frame
    assert (source(page), outputs.screenshot()) == (last, shown)
    assert no_error(page)


def test_a_slider_and_a_click_run_again(lab: str, page: Page, folder: Path, tmp_path: Path) -> None:
    """The picture is replaced where it is; an error is a line of the panel, and the picture stays."""
    open_notebook(page, lab, "panel")
    choose(page, "Run", "Run All Cells")
    first = source(page)
    button = page.get_by_role("button", name="Run", exact=True)
    page.get_by_role("slider").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".widget-readout")).to_have_text("10")
    button.click()
    second = another(page, than=first)
    screenshot_of(page, "panel-1", tmp_path)

    page.get_by_label("crash").check()
    expect(button).to_be_enabled()
    button.click()
    page.get_by_text("LookupError: no queue <b>tasks</b>").wait_for(timeout=60_000)
    screenshot_of(page, "panel-2", tmp_path)
    assert source(page) == second
    assert (folder / "ran").read_text().split() == ["7", "10", "10"]
    assert no_error(page)
