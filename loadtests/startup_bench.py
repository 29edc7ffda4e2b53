"""From the command to readiness: what a person waits for, with the packages installed and the files in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable

from loadtests.machine import median_and_spread
from loadtests.processes import running_server


def bench_startup(rounds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Seconds from the spawn of `stet serve` to /readyz 200, and what the engine says it spent them on."""
    seconds: list[float] = []
    parts: dict[str, float] = {}
    for _ in range(rounds):
        with running_server() as server:
            seconds.append(server.wait_ready())
            parts = json.loads(server.get("/info")[1]).get("startup_seconds", {})
    median, spread = median_and_spread(seconds)
    say(f"ready after {median:.2f} s")
    rounded = {name: round(value, 2) for name, value in parts.items()}
    return [{"ready_s": round(median, 2), "spread": round(spread, 3), "engine_parts_s": rounded}]
