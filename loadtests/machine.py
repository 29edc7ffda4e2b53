"""What the numbers were measured on: the processor, the versions, and how fast it reads memory right now."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, versions and the time: enough to tell two results apart."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("stet", "torch", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(num_bytes: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes a second at which all cores together read a buffer far larger than the caches; the best of `rounds`.

    A reduction over float32 is bound by the reads alone; the best round is the one that was disturbed least. An engine
    in this process may have left torch one thread: it gets that back.
    """
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        return num_bytes / min(timed(buffer.sum) for _ in range(rounds))
    finally:
        torch.set_num_threads(threads)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """The median, and half the distance between the extremes as a share of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / 2 / median
