"""The command line: `stet serve [MODEL]`, `stet bench URL`, `stet quantize MODEL OUT`, `stet evaluate [MODEL]` …

Each command has a file of its own, which is imported when it is asked for: a start must not wait for the others.
"""

from __future__ import annotations

# Only what is loaded anyway: a Ctrl-C while the rest is imported must not end in a traceback.
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None, *, engine_command: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for what the caller can repair.

    engine_command: another engine than this project's, for tests and measurements; see supervisor.spawn_engine.
    """
    began = time.monotonic()
    before = {number: signal.signal(number, _end_quietly) for number in _SIGNALS}
    try:
        flags = _parse(arguments)
        if flags.command == "version":
            from server.version import VERSION

            print(f"stet {VERSION}")
            return EXIT_OK
        if flags.command == "keys":
            from server.keys_command import run as run_keys

            return run_keys(flags)
        if flags.command == "plan":
            return _plan(flags)
        if flags.command == "bench":
            return _bench(flags)
        if flags.command == "evaluate":
            return _evaluate(flags)
        if flags.command == "quantize":
            # Here, because it imports torch.
            from server.quantize import run

            return run(flags)
        return _serve(flags, engine_command, began)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_quietly(number: int, frame: object) -> NoReturn:
    """Until the event loop takes the signals over there is nothing to drain, and the engine ends when its socket does.

    Nothing is raised: an exception in the middle of the import of an extension module can crash the interpreter.
    """
    os._exit(EXIT_OK)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from server.config import OneLineParser, add_flags

    parser = OneLineParser(prog="stet", description="An inference server whose tokens stand.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. A flag wins over its variable, a variable over the default.",
        allow_abbrev=False,
    )
    add_flags(serve)
    evaluate = commands.add_parser(
        "evaluate",
        help="measure what a quantization costs",
        description="Measure a model as it would be served against the same model unquantized: perplexity, divergence, "
        "agreement, error per layer; write it as a receipt into the model's folder, where /info finds it.",
        allow_abbrev=False,
    )
    _add_evaluate_flags(evaluate)
    quantize = commands.add_parser(
        "quantize",
        help="write an int8 checkpoint",
        description="Write a model's weights as int8 into a new folder, half as large and the same model as when it is "
        "quantized while it loads; tokenizer and all else that belongs to it are copied. The format is that of "
        "compressed-tensors. It is served by the folder's path alone.",
        allow_abbrev=False,
    )
    _add_quantize_flags(quantize)
    plan = commands.add_parser(
        "plan",
        help="say whether a model fits and how fast it will be",
        description="Say what a model needs and how fast it will be, from its configuration alone: bytes of weights "
        "and KV cache, the longest context and the most sequences that fit, predicted speed for every quantization, "
        "and what training it would take. The first plan measures this machine, which takes some seconds.",
        allow_abbrev=False,
    )
    given = sys.argv[1:] if arguments is None else arguments
    if "plan" in given[:1]:  # what it imports would only hold up the others
        from server.planner.command import add_flags as add_plan_flags

        add_plan_flags(plan)
    bench = commands.add_parser(
        "bench",
        help="measure a running server",
        description="Measure a running server, this one or any with OpenAI's API, as its users meet it: time to first "
        "token, inter-token time, throughput and goodput, each from the moment at which a request was due.",
        allow_abbrev=False,
    )
    if "bench" in given[:1]:
        from server.bench.command import add_flags as add_bench_flags

        add_bench_flags(bench)
    keys = commands.add_parser(
        "keys",
        help="make and list API keys",
        description="Make and list API keys. A key is revoked by deleting its entry from the file.",
        allow_abbrev=False,
    )
    if "keys" in given[:1]:
        from server.keys_command import add_flags as add_keys_flags

        add_keys_flags(keys)
    commands.add_parser("version", help="print the version", allow_abbrev=False)
    return parser.parse_args(arguments)


def _add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    from server.config import add_flags

    names = ("model", "revision", "offline", "device", "dtype", "quantization", "kv_cache_dtype", "threads")
    add_flags(parser, names)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what to read (default: held-out text of the embedded model)"
    )
    parser.add_argument(
        "--against", metavar="MODEL", help="the unquantized model (default: MODEL itself, loaded unquantized)"
    )
    parser.add_argument(
        "--max-tokens",
        type=_count_of,
        default=100_000,
        metavar="COUNT",
        help="tokens of the text at most (%(default)s)",
    )
    parser.add_argument(
        "--tasks",
        type=_count_of,
        default=100,
        metavar="COUNT",
        help="tasks of the embedded model for each kind and number of examples (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        choices=("table", "head", "both"),
        help="leave the token table, the head or both unquantized, to see what theirs costs; writes no receipt",
    )
    parser.add_argument("--json", action="store_true", help="print the receipt instead of a table")


def _add_quantize_flags(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub name, or the embedded model")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must be new or empty")
    parser.add_argument(
        "--mode",
        choices=("w8a8", "w8a16"),
        default="w8a8",
        help="what the checkpoint is for, unless stet serve is told otherwise; the weights are the same "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        choices=("table", "head", "both"),
        help="leave the token table, the head or both unquantized; other servers take few checkpoints without it "
        "(default: neither)",
    )
    parser.add_argument(
        "--smooth",
        type=Path,
        metavar="FILE",
        help="a text like those that will be served: move outliers of its activations into the weights first "
        "(SmoothQuant), which can help w8a8",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a Hub model (default: the main one)"
    )
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine; download nothing")


def _count_of(text: str) -> int:
    import argparse

    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 999999999")
    return int(text)


def _plan(flags: argparse.Namespace) -> int:
    from server.planner.command import run

    _stop_at_once()
    return run(flags)


def _bench(flags: argparse.Namespace) -> int:
    from server.bench.command import run

    _stop_at_once()
    return run(flags)


def _stop_at_once() -> None:
    """There is nothing to drain, and what was cut off has not succeeded."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _evaluate(flags: argparse.Namespace) -> int:
    from server.config import ConfigError, resolve

    try:
        settings = resolve(vars(flags), os.environ)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    _stop_at_once()
    # Here, because it imports torch.
    from server.evaluate import Measurement, run

    measurement = Measurement(flags.text, flags.max_tokens, flags.tasks, flags.against, flags.keep)
    return run(settings, measurement, flags.json)


def _serve(flags: argparse.Namespace, command: Sequence[str] | None, began: float) -> int:
    from server.config import ConfigError, resolve
    from server.serve_command import serve
    from server.supervisor import EngineFailed

    try:
        serve(resolve(vars(flags), os.environ), command, began)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except EngineFailed as error:
        return _fail(str(error), EXIT_USAGE if error.usage else EXIT_FAILED)
    return EXIT_OK


def _fail(message: str, code: int) -> int:
    print(f"stet: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
