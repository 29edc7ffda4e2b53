"""How far a long command is, on standard error."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """On a terminal one line that is rewritten; elsewhere a line whenever something else begins."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._what = ""
        self._shown = 0.0

    def say(self, what: str, share: float | None) -> None:
        """What is being done now, and the share of it that is done, if that can be told."""
        if self._terminal:
            now = time.monotonic()
            if what != self._what or now - self._shown > 0.1:
                self._shown = now
                done = "" if share is None else f" {share:4.0%}"
                print(f"\r\x1b[K{what}{done}", end="", file=sys.stderr, flush=True)
        elif what != self._what:
            print(what, file=sys.stderr, flush=True)
        self._what = what

    def clear(self) -> None:
        """Take the line away, before something else is printed."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
