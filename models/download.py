"""A download from the Hugging Face Hub, watched: how many bytes are there, twice a second, to whoever asked.

The Hub's client keeps every file that is whole, and resumes one whose connection broke at the byte where it broke; a
file that was cut off because the process ended begins anew.
"""

from __future__ import annotations

import contextvars
import importlib
import io
import threading
from collections.abc import Callable
from typing import Any

from models.errors import ModelError

SECONDS_BETWEEN_LINES = 0.5


def download(fetch: Callable[[type], str], what: str, progress: Callable[[str], None]) -> str:
    """Call `fetch` with a class for the client's progress bars; return its result, or raise what it raises.

    `progress` gets lines like "Downloading NAME: 1.2 of 3.4 GB", in the thread of the caller.
    """
    meter = _Meter()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((fetch(meter.bar_class()), None))
        except BaseException as error:  # whatever it is, it belongs to the caller
            outcome.append((None, error))

    # In the context of the caller, where logging and tracing may have put something. A daemon: who is interrupted
    # while it waits must be able to leave.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True, name="download")
    thread.start()
    shown = ""
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_LINES)
        line = meter.line(what)
        if line is not None and line != shown:
            progress(line)
            shown = line
    if not outcome:
        raise ModelError(f"the download of {what} ended without a result; try again")
    result, error = outcome[0]
    if error is not None:
        raise error
    return str(result)


class _Meter:
    """Adds up what the client's bars are told. They are told from several threads."""

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def bar_class(self) -> type:
        """A class of bars that show nothing and count here."""
        tqdm: Any = importlib.import_module("tqdm.std").tqdm

        def start(bar: Any, *arguments: Any, **options: Any) -> None:
            tqdm.__init__(bar, *arguments, **{**options, "file": io.StringIO(), "disable": False})
            if options.get("unit") == "B":
                self._bars.append(bar)

        return type("Bar", (tqdm,), {"__init__": start})

    def line(self, what: str) -> str | None:
        """None while nothing is known."""
        # One bar counts what is received, another what is written; with some transports only one of them moves.
        done, total = max(((bar.n or 0, bar.total or 0) for bar in self._bars), default=(0, 0))
        if not total:
            return None
        unit, divisor = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
        return f"Downloading {what}: {min(done, total) / divisor:,.1f} of {total / divisor:,.1f} {unit}"
