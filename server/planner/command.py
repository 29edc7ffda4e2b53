"""`stet plan`: its flags, and what they come to."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from server.config import choice, flag_type, integer, parse_bytes
from server.engine.memory import available_memory_bytes
from server.planner import plan as planning
from server.planner import words
from server.planner.device import LocalDevice, PlannedDevice, card
from server.planner.report import as_dict, as_text
from server.planner.subject import find_subject
from server.planner.words import CARD_NAMES, KV_DTYPES, MODES, PlanError

_LOCAL = ("auto", "cpu", "cuda")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `stet plan`."""

    def flag(name: str, parse: Callable[[str], object], metavar: str, help: str, **more: object) -> None:
        parser.add_argument(name, type=flag_type(parse), metavar=metavar, help=help, **more)  # type: ignore[arg-type]

    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=planning.ENGINE.model,
        help="a Hub name (only its configuration is downloaded), a folder, the embedded model (default), or a number "
        "of parameters such as 70b or 600M",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    flag(
        "--device",
        choice(*_LOCAL, *CARD_NAMES),
        "DEVICE",
        f"auto, cpu or cuda of this machine, or a card by published figures: {', '.join(CARD_NAMES)} (default: auto)",
        default="auto",
    )
    flag("--memory", parse_bytes, "SIZE", "memory to plan for, such as 24GiB (default: what the device has free)")
    flag("--quantization", choice(*MODES), "MODE", "one mode (default: all, side by side)")
    flag("--kv-cache-dtype", choice(*KV_DTYPES), "DTYPE", "what the KV cache holds", default="auto")
    flag("--dtype", choice("auto", "bfloat16", "float16", "float32"), "DTYPE", "as stet serve takes it", default="auto")
    flag("--threads", integer(1, 1024), "COUNT", "CPU threads (default: the physical cores)")
    flag(
        "--context",
        integer(1, words.MAX_CONTEXT),
        "TOKENS",
        f"of one sequence (default: all that the model was made for; speeds at {words.DEFAULT_CONTEXT})",
    )
    flag(
        "--concurrency",
        integer(1, words.MAX_CONCURRENCY),
        "COUNT",
        f"sequences at once (default: {planning.ENGINE.max_running}, as stet serve; speeds of "
        f"{words.DEFAULT_CONCURRENCY})",
    )
    flag(
        "--max-tokens-per-step",
        integer(1, words.MAX_TOKENS_PER_STEP),
        "TOKENS",
        "as stet serve takes it",
        default=planning.ENGINE.max_tokens_per_step,
    )
    flag("--train-devices", integer(1, words.MAX_DEVICES), "COUNT", "devices to train on (default: 1)", default=1)
    flag("--train-batch", integer(1, words.MAX_BATCH), "COUNT", "sequences on each of them (default: 1)", default=1)
    flag("--train-context", integer(1, words.MAX_CONTEXT), "TOKENS", "tokens of each (default: the context)")
    parser.add_argument("--measure", action="store_true", help="measure this machine even if it was measured before")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(flags: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code: 0, or 2 with one line on standard error."""
    try:
        print(_plan(flags), end="")
    except PlanError as error:
        print(f"stet: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(flags: argparse.Namespace) -> str:
    def say(message: str) -> None:
        print(f"stet: {message}", file=sys.stderr, flush=True)

    # First what takes no time and can be wrong.
    subject = find_subject(flags.model, flags.revision, offline=flags.offline, progress=say)
    device: PlannedDevice
    if flags.device in _LOCAL:
        local = LocalDevice(flags.device, flags.dtype, flags.threads)
        device = local.load(measure=True, again=flags.measure, say=say)
    else:
        device = card(flags.device)
    request = planning.PlanRequest(
        memory=flags.memory,
        quantization=flags.quantization,
        kv_cache_dtype=flags.kv_cache_dtype,
        context=flags.context,
        concurrency=flags.concurrency,
        max_tokens_per_step=flags.max_tokens_per_step,
        train_devices=flags.train_devices,
        train_batch=flags.train_batch,
        train_context=flags.train_context,
    )
    plan = planning.make_plan(subject, device, request, available_memory_bytes())
    return json.dumps(as_dict(plan), indent=2) + "\n" if flags.json else as_text(plan)
