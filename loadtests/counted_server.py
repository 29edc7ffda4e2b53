"""`stet`, which counts its asyncio tasks when it is asked to: SIGUSR1 adds a line to the file in STET_TASKS_FILE."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from server.cli import main


def _count(number: int, frame: object) -> None:
    try:
        count = len(asyncio.all_tasks())
    except RuntimeError:  # before the event loop, or after it
        return
    with open(os.environ["STET_TASKS_FILE"], "a") as file:
        file.write(f"{count}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _count)
    sys.exit(main())
