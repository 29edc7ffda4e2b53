"""`make bench`: one table for each part and one JSON line at the end. Choose parts with ARGS="engine startup http"."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from loadtests.machine import describe_machine, read_bandwidth

RESULTS = Path(__file__).resolve().parent / "results"
Rows = list[dict[str, object]]


def say(message: str) -> None:
    """Progress, on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def table(rows: Rows) -> str:
    """Rows of one part as a Markdown table."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in header) + " |" for row in rows]
    return "\n".join(lines)


def engine(rounds: int) -> Rows:
    from loadtests.engine_bench import bench_engine

    # Before and after: on a shared machine the bus itself changes.
    before = read_bandwidth()
    rows = bench_engine(before, rounds, say)
    return [
        *rows,
        {"model": "read bandwidth, GB/s: before, after", "batch": f"{before / 1e9:.1f}, {read_bandwidth() / 1e9:.1f}"},
    ]


def startup(rounds: int) -> Rows:
    from loadtests.startup_bench import bench_startup

    return bench_startup(2 * rounds + 1, say)


def http(rounds: int) -> Rows:
    from loadtests.http_bench import bench_http

    return bench_http(rounds, say)


PARTS: dict[str, Callable[[int], Rows]] = {"startup": startup, "http": http, "engine": engine}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts; all by default")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of A B B A (default 2)")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json and NAME.md")
    arguments = parser.parse_args()

    result: dict[str, object] = {
        "command": "python -m loadtests " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
    }
    text = [f"`{result['command']}`", "", *(f"- {key}: {value}" for key, value in describe_machine().items())]
    for name in arguments.parts or PARTS:
        rows = PARTS[name](arguments.rounds)
        result[name] = rows
        text += ["", f"## {name}", "", table(rows)]
    print("\n".join(text))
    print(json.dumps(result))
    if arguments.save:
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{arguments.save}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
