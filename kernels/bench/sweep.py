"""Tries the tiles that `kernels.cuda.tuned` thinks worth trying, and prints the best for each shape and number of rows.

    python -m kernels.bench.sweep [--op linear_w8a16 ...] [--rounds 5] [--seconds 450] [--smoke]

Every candidate must give the bits of the chosen one. Lines come in the form of `tuned.py`, where the choice is a rule:
read them for where the rule is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from kernels.bench import report
from kernels.bench.cases import DTYPE, random
from kernels.bench.cuda import say
from kernels.bench.timing import Timer, interleaved, make_timer
from kernels.bench.workload import FULL, SMOKE, Sizes
from kernels.cuda import linear, tuned
from kernels.cuda.common import INTERPRETED
from kernels.cuda.tuned import Tile
from kernels.cuda.workspace import Workspace
from kernels.int8 import quantize_rows
from kernels.ops import QuantizationMode, QuantizedActivations

OPS: dict[str, QuantizationMode] = {"linear_none": "none", "linear_w8a16": "w8a16", "linear_w8a8": "w8a8"}
SMALL_MODEL = (("0.6B qkv", 4096, 1024), ("0.6B gate_up", 6144, 1024), ("0.6B down", 1024, 3072))
Found = dict[str, object]


@contextmanager
def forced(tile: Tile, split: bool) -> Iterator[None]:
    """Let `linear.linear` launch this tile, with a program for each segment or with one that walks them all."""
    chosen = linear.launch
    linear.launch = partial(chosen, tile=tile, split=split)  # type: ignore[assignment]
    try:
        yield
    finally:
        linear.launch = chosen


def sweep_linear(
    mode: QuantizationMode, rows: int, n: int, k: int, sizes: Sizes, timer: Timer, rounds: int
) -> list[Found]:
    """All candidates of one shape, the fastest first; the one chosen now is marked."""
    device = timer.device
    count = sizes.copies(n * k * (2 if mode == "none" else 1))
    weights = [linear.prepare(random(n, k, device=device), None, mode, device, DTYPE) for _ in range(count)]
    x = random(rows, k, device=device)
    given = QuantizedActivations(*quantize_rows(x)) if mode == "w8a8" else x
    tiles = tuned.candidates(mode, DTYPE, n, k, rows)
    splits = (True, False) if tuned.segments(mode, DTYPE, n, k)[0] > 1 else (False,)
    now = linear.launch(mode, DTYPE, n, k, rows)

    def call(weight: linear.CudaLinear, workspace: Workspace) -> Tensor:
        return linear.linear(given, weight, workspace)

    truth = call(weights[0], Workspace(device))
    samples, found = {}, {}
    for tile in tiles:
        for split in splits:
            key = f"{tile} split={split}"
            entry: Found = {
                "tile": str(tile),
                "split": split,
                "now": tile == now.tile and split == now.constants["SPLIT"],
            }
            workspace = Workspace(device)
            with forced(tile, split):
                try:
                    if not torch.equal(call(weights[0], workspace), truth):
                        entry["problem"] = "other bits than the chosen tile"
                    samples[key] = timer.prepare([partial(call, weight, workspace) for weight in weights])
                except Exception as problem:  # too much shared memory, for example: the table says so
                    entry["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
            found[key] = entry
    with_times = interleaved(samples, rounds)
    for key, spread in with_times.items():
        found[key] |= {"median_us": spread.median * 1e6, "min_us": spread.least * 1e6}
    shape = {"mode": mode, "n": n, "k": k, "rows": rows}
    order = sorted(found, key=lambda key: with_times[key].median if key in with_times else float("inf"))
    return [shape | found[key] for key in order]


def line(entry: Found) -> str:
    """One candidate in the form of `tuned.py`, with its measurement as the comment."""
    place = f"({entry['mode']!r}, {entry['n']}, {entry['k']}, {entry['rows']})"
    mark = "  <- now" if entry["now"] else ""
    measured = f"{entry['median_us']:.1f} us" if "median_us" in entry else "not timed"
    problem = f"; {entry['problem']}" if "problem" in entry else ""
    return f"{place}: {entry['tile']},  # split={entry['split']}, {measured}{problem}{mark}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, sweep, print. 1 where a candidate gave other bits."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no shape later than this (default 450)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round; runs in the interpreter too")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json and NAME.md")
    arguments = parser.parse_args(argv)
    if INTERPRETED.value and not arguments.smoke:
        parser.error("the interpreter measures nothing: pass --smoke, or run without TRITON_INTERPRET on a GPU")
    sizes = SMOKE if arguments.smoke else FULL
    timer = make_timer(INTERPRETED.value)
    begin = time.monotonic()
    torch.manual_seed(0)
    machine = timer.describe() | {"versions": report.versions(), "date": report.now()}
    text = [f"- {key}: {value}" for key, value in machine.items()]
    results: list[Found] = []
    skipped: list[str] = []
    with torch.inference_mode():
        shapes = sizes.linears if arguments.smoke else (*sizes.linears, *SMALL_MODEL)
        for mode in (OPS[name] for name in arguments.op or OPS):
            for _, n, k in shapes:
                for rows in sizes.rows:
                    if time.monotonic() - begin > arguments.seconds:
                        skipped.append(f"{mode} N={n} K={k} M={rows}: the time was over")
                        continue
                    say(f"{mode} N={n} K={k} M={rows}")
                    try:
                        found = sweep_linear(mode, rows, n, k, sizes, timer, 1 if arguments.smoke else arguments.rounds)
                        timer.release()
                    except RuntimeError as problem:  # an error on the device: what was measured before is still printed
                        skipped.append(f"{mode} N={n} K={k} M={rows}: {str(problem).splitlines()[0][:120]}")
                        continue
                    text += map(line, found)
                    results += found
    text += [f"# skipped: {name}" for name in skipped]
    print("\n".join(text))
    result: dict[str, object] = {"machine": machine, "sweep": results, "skipped": skipped}
    print(json.dumps(result))
    if arguments.save:
        report.save(arguments.save, "\n".join(text), result)
    return 1 if any(str(entry.get("problem", "")).startswith("other bits") for entry in results) else 0


if __name__ == "__main__":
    sys.exit(main())
