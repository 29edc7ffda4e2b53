"""python -m tests.simulation --seeds 25000: many seeds, over all processors; or --seed N: one, with its last events."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

from tests.simulation.driver import SimulationFailure, failures, run_seed
from tests.simulation.planted import BUGS

CHUNK = 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many seeds to run (500)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--seed", type=int, help="run this one only")
    parser.add_argument("--bug", choices=sorted(BUGS), help="with --seed: plant this bug first")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    arguments = parser.parse_args()

    if arguments.seed is not None:
        try:
            run_seed(arguments.seed, BUGS[arguments.bug]) if arguments.bug else run_seed(arguments.seed)
        except SimulationFailure as failure:
            print(failure)
            return 1
        print(f"seed {arguments.seed}: nothing is wrong")
        return 0

    stop = arguments.start + arguments.seeds
    chunks = [(first, min(first + CHUNK, stop)) for first in range(arguments.start, stop, CHUNK)]
    num_done = num_failed = 0
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(chunks))) as pool:
        for (first, last), messages in zip(chunks, pool.imap(failures, chunks), strict=True):
            num_done += last - first
            num_failed += len(messages)
            for message in messages:
                print(f"\n{message}\n")
            rate = num_done / (time.monotonic() - began)
            print(f"\r{num_done}/{arguments.seeds} seeds, {num_failed} failed, {rate:.0f} a second", end="", flush=True)
    print()
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
