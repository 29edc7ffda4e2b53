"""What was measured, as a table for a person and as JSON."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kernels.bench.case import Row

RESULTS = Path(__file__).resolve().parents[2] / "loadtests" / "results"
PACKAGES = ("torch", "triton", "numpy", "torchao", "flashinfer-python", "gemlite")


def versions() -> dict[str, str]:
    """Of ours and of the peers; a peer that is missing is named."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def short(row: Row) -> dict[str, str]:
    """One line of the table."""
    line = {"op": row.op, "shape": row.shape}
    if row.failure:
        return line | {"floor": "", "min": "", "median": "FAIL", "aims": row.failure}
    numbers = {"floor": row.floor_us, "min": row.min_us, "median": row.median_us, "p90": row.p90_us}
    line |= {name: f"{value:.1f}" for name, value in numbers.items()}
    # How many times as fast as the peer ours is.
    found = [
        f"{name} {row.median_us and us / row.median_us:.2f}x"
        for name, us in row.peers.items()
        if not isinstance(us, str)
    ]
    absent = [f"{name}: {why}" for name, why in row.peers.items() if isinstance(why, str)]
    absent += [f"{name}: timed without a graph" for name in row.ungraphed]
    words = {True: "met", False: "MISSED", None: "no peer"}
    aims = [f"{aim['aim']}: {aim['value']}, {words[aim['met']]}" for aim in row.aims]  # type: ignore[index]
    return line | {"share": f"{row.share:.2f}", "peer/ours": ", ".join(found + absent), "aims": "; ".join(aims)}


COLUMNS = ("op", "shape", "floor", "min", "median", "p90", "share", "peer/ours", "aims")


def table(rows: list[Row]) -> str:
    """Microseconds; `share` is the floor over the median, `peer/ours` the peer's median over ours. Markdown."""
    cells = [COLUMNS, *(tuple(short(row).get(name, "") for name in COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def save(name: str, text: str, result: dict[str, object], folder: Path = RESULTS) -> None:
    """Both forms, beside the results of the load tests."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
