"""What a kernel lacks for our notebooks."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any


def show_exception_groups() -> None:
    """Makes an error in an `asyncio.TaskGroup` the error of its cell.

    IPython 9 prints exception groups to stderr. ipykernel 7 then sends no error output (so that nbval passes a cell
    whose outputs are not compared), and, where it is the first error of the kernel, no answer at all: the cell hangs.
    """
    shell = sys.modules["IPython"].get_ipython()
    if shell is not None and not shell.custom_exceptions:

        def show(shell: Any, kind: type[BaseException], error: BaseException, at: TracebackType, **_: Any) -> list[str]:
            lines = "".join(traceback.format_exception(kind, error, at)).splitlines()
            shell._showtraceback(kind, error, lines)
            return lines

        shell.set_custom_exc((BaseExceptionGroup,), show)
