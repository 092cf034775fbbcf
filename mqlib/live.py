"""Figures that change: one is redrawn in place while its cell works, one has sliders and a button to run again.

Drawing takes a tenth of a second of a processor, which a consumer beside it would miss. So the frames are drawn by
another process, which is this module as a program: length-prefixed pickles in and out, and it ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import inspect
import os
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plots import Picture

PREFIX = 8  # bytes that say how long a pickle is


class Live:
    """A figure that is being redrawn."""

    def __init__(self, title: str) -> None:
        self.title = title
        """May be set: frames from then on have it, and so has the picture that stays."""
        self.frames = 0
        """How often it was redrawn."""
        self.picture: Picture | None = None
        """What stays, once the block has ended without an error."""


@contextlib.asynccontextmanager
async def live(
    draw: Callable[..., Picture], data: Callable[[], Any], *, title: str, every: float = 0.1, **options: Any
) -> AsyncIterator[Live]:
    """Shows `draw(data(), title=..., **options)` and redraws it every `every` seconds during the block.

    `draw` is a function of `mqlib.plots`; `data` is called in this process, and what it returns is copied at once.
    A frame is skipped while the one before it is being drawn. After the block the figure is drawn once more, with the
    title that it has by then, and stays. In plain Python nothing is shown.

    Data that cannot be drawn at the start raise what `draw` raises. Later they end the redrawing, and the block raises
    at its end what `data` raised, or `RuntimeError` with the error of the drawing; an error of the block comes first.
    """
    from . import plots

    name = getattr(draw, "__name__", "")
    if getattr(plots, name, None) is not draw:
        raise ValueError(f"live draws with a function of mqlib.plots, not with {draw!r}")
    chart = Live(title)
    show = _shown(draw(data(), title=title, **options))
    artist = subprocess.Popen(
        [sys.executable, "-m", "mqlib.live"], cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        # The interrupt of a cell goes to the kernel's process group. Not another session: its niceness would not count.
        process_group=0,
    )  # fmt: skip

    async def keep_on() -> None:
        due = time.monotonic()
        while True:
            # Copied here: the lists of the block have grown by the time that a thread would look at them.
            request = pickle.dumps((name, data(), {"title": chart.title, **options}))
            answer = await asyncio.to_thread(_ask, artist, request)
            if isinstance(answer, str):
                raise RuntimeError(f"plots.{name} cannot draw what live was given: {answer}")
            show(answer)
            chart.frames += 1
            due = max(due + every, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    drawing = asyncio.create_task(keep_on())
    try:
        yield chart
    finally:
        drawing.cancel()
        artist.kill()
        artist.communicate()  # also waits for the thread that may be reading
        [error] = await asyncio.gather(drawing, return_exceptions=True)
    if isinstance(error, Exception):
        raise error
    chart.picture = draw(data(), title=chart.title, **options)
    show(chart.picture._repr_png_())


def _send(pipe: IO[bytes], packed: bytes) -> None:
    pipe.write(len(packed).to_bytes(PREFIX, "big") + packed)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """What was sent; `EOFError` when nothing more will be."""
    return pickle.loads(pipe.read(int.from_bytes(pipe.read(PREFIX), "big")))


def _ask(artist: subprocess.Popen[bytes], request: bytes) -> bytes | str:
    """A PNG, or what went wrong."""
    assert artist.stdin is not None
    assert artist.stdout is not None
    try:
        _send(artist.stdin, request)
        answer: bytes | str = _receive(artist.stdout)
    except (OSError, EOFError):
        return f"the process that draws has ended, exit code {artist.wait()}"
    return answer


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """The other process."""
    if hasattr(os, "nice"):
        os.nice(19)
    sys.stdout = sys.stderr  # where a print would be in the way
    while True:
        try:
            name, data, options = _receive(requests)
            from . import plots  # not before it is nice: that takes half a second of a processor

            answer = getattr(plots, name)(data, **options)._repr_png_()
        except EOFError:
            return
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        _send(answers, pickle.dumps(answer))


def _in_kernel() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def _shown(picture: Picture) -> Callable[[bytes], None]:
    """Displays a picture, in a kernel; returns what puts another PNG in its place. nbval compares the text of both."""
    if not _in_kernel():
        return lambda png: None
    from IPython.display import display

    def output(png: bytes) -> dict[str, Any]:
        return {"image/png": png, "text/plain": repr(picture)}

    handle = display(output(picture._repr_png_()), raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda png: handle.update(output(png), raw=True)


async def what_if(run: Callable[..., Awaitable[Picture]], **controls: Any) -> Picture | None:
    """Awaits `run()` and shows the picture that it returns, below a panel to change its parameters and run it again.

    `controls` has for each parameter what `ipywidgets.interactive` takes: (1, 50) and (0.0, 0.5, 0.05) make sliders, a
    list a choice, True a box, or any widget with a value. They start at the defaults of `run`. An error of a later run
    is shown in the panel. In plain Python there is no panel, and the picture is returned.

    Raises `ValueError` for a parameter that `run` lacks, what makes no control, a default that the control cannot have,
    and `TypeError` when `run` returns no picture.
    """
    from ipywidgets import HTML, Button, VBox

    from .plots import Picture

    async def picture_of() -> Picture:
        picture = await run(**{name: widget.get_interact_value() for name, widget in widgets.items()})
        if not isinstance(picture, Picture):
            raise TypeError(f"{run.__name__} returns a figure of mqlib.plots for what_if to show, not {picture!r}")
        return picture

    widgets = {name: _control(run, name, abbreviation) for name, abbreviation in controls.items()}
    picture = await picture_of()
    if not _in_kernel():
        return picture
    from IPython.display import display

    button, note = Button(description="Run", button_style="primary"), HTML()
    loop = asyncio.get_running_loop()

    async def again() -> None:
        try:
            show((await picture_of())._repr_png_())
        except (Exception, asyncio.CancelledError) as error:  # aiokafka raises the latter where nobody cancelled
            note.value = html.escape(" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            button.disabled = False

    def clicked(_: Button) -> None:
        if not button.disabled:  # the second click of two may be under way already
            button.disabled, note.value = True, ""
            asyncio.run_coroutine_threadsafe(again(), loop)  # widgets may have a thread of their own

    button.on_click(clicked)
    panel = VBox([*widgets.values(), button, note])._repr_mimebundle_()
    panel["text/plain"] = f"<panel: {', '.join(widgets)}>"  # the same at every run, for nbval
    display(panel, raw=True)  # type: ignore[no-untyped-call]
    show = _shown(picture)
    return None


def _control(run: Callable[..., Any], name: str, abbreviation: Any) -> Any:
    """The widget for one parameter, at its default."""
    from ipywidgets import DOMWidget, interactive

    parameters = inspect.signature(run).parameters
    if name not in parameters:
        raise ValueError(f"{run.__name__} has no parameter {name!r}; it has {', '.join(parameters) or 'none'}")
    default = parameters[name].default
    try:
        widget = interactive.widget_from_abbrev(abbreviation, default)
        if not isinstance(widget, DOMWidget):
            raise TypeError("use (low, high), (low, high, step), a list, or a widget with a value")
        if default is not inspect.Parameter.empty:
            widget.value = default
            if widget.value != default:
                raise ValueError(f"the default {default!r} of {run.__name__} is not among it")
    except Exception as error:
        raise ValueError(f"{name}={abbreviation!r} makes no control: {error}") from None
    widget.description = widget.description or name
    widget.style.description_width = "initial"
    return widget


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
