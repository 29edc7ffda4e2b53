"""Times every operator of a backend beside its floor and its peers.

    python -m kernels.bench [--device cpu|cuda] [--only NAME] [--rounds N] [--save NAME]

On a GPU one call probes the device and checks every operator before it times it. --smoke rehearses the same code on
tiny shapes; with TRITON_INTERPRET=1 no GPU is needed for that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags and dispatch. The exit code is 1 where an operator failed its gate."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU, or with --smoke")
    parser.add_argument("--rounds", type=int, help="alternating rounds a case (default 30 on the CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help="cpu: torch threads (default: torch's choice)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="cuda: operators whose names contain it, or experiments; repeatable",
    )
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="cuda: begin no case later than this (default 450)"
    )
    parser.add_argument("--smoke", action="store_true", help="cuda: tiny shapes, one round")
    parser.add_argument("--save", metavar="NAME", help="cuda: also write loadtests/results/NAME.json and NAME.md")
    arguments = parser.parse_args(argv)

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() or arguments.smoke else "cpu")
    if device == "cpu":
        if arguments.only or arguments.smoke or arguments.save:
            parser.error("--only, --smoke and --save go with --device cuda")
        from kernels.bench import cpu

        cpu.run(arguments.rounds or 30, arguments.threads)
        return 0
    from kernels.bench import cuda

    return cuda.run(arguments.rounds or 20, arguments.seconds, tuple(arguments.only), arguments.smoke, arguments.save)


if __name__ == "__main__":
    sys.exit(main())
