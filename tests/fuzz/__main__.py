"""The long version: see tests/fuzz/__init__.py."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from loadtests.processes import running_server
from tests.fuzz.campaign import FLAGS, run_campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of a run to repeat (default: another each time)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"{arguments.requests} requests, seed {seed}", file=sys.stderr)
    log = Path(tempfile.mkdtemp()) / "log"
    began = time.monotonic()
    with running_server(FLAGS, log=log) as server:
        server.wait_ready()
        report = run_campaign(server, arguments.requests, seed, say=lambda text: print(text, file=sys.stderr))
    report.check_log(log.read_text())
    print(report.text())
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
