"""`stet bench URL`: its flags, and how one run goes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.bench import host, workload
from server.bench.client import Target, parse_url, resolve
from server.bench.dialect import DIALECTS, Ask, Dialect
from server.bench.discovery import BenchError, discover, tokens_per_word
from server.bench.measure import Load, Run, measure
from server.bench.plot import draw
from server.bench.summary import Limits, summarize, table
from server.bench.wire import WireError
from server.bench.workload import Job, Lengths, Workload
from server.config import choice, flag_type, integer
from server.progress import ProgressLine
from server.version import VERSION

_PROBE_WORDS = 200


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `stet bench`."""

    def flag(name: str, parse: Callable[[str], object], metavar: str, help: str, default: object = None) -> None:
        parser.add_argument(name, type=flag_type(parse), metavar=metavar, help=help, default=default)

    parser.add_argument("url", metavar="URL", type=flag_type(_url), help="the server, such as http://127.0.0.1:8000")
    flag("--api", choice("auto", *DIALECTS), "NAME", "generate, completions or chat (default: what it has)", "auto")
    parser.add_argument("--model", metavar="NAME", help="in OpenAI's shapes (default: the first of /v1/models)")
    parser.add_argument("--api-key", metavar="KEY", help="default: the variable STET_BENCH_KEY, which is seen by fewer")

    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--rate",
        type=flag_type(_positive),
        metavar="COUNT",
        help="open loop: requests a second, sent when they are due whatever has become of the earlier ones",
    )
    how.add_argument(
        "--clients",
        type=flag_type(integer(1, 10_000)),
        metavar="COUNT",
        help="closed loop: clients that each send their next request when the last one has ended (default: 4)",
    )
    flag("--arrivals", choice(*workload.ARRIVALS), "KIND", "of --rate: poisson (default) or constant", "poisson")
    flag("--duration", _some_time, "TIME", "of the measured time (default: 30s)", 30.0)
    flag("--warmup", _duration, "TIME", "before it, sent and not counted (default: 2s)", 2.0)
    flag("--timeout", _some_time, "TIME", "of one request (default: 600s)", 600.0)

    shape = "MEDIAN[:SIGMA]"
    prompt, output = workload.SHAREGPT_PROMPT, workload.SHAREGPT_OUTPUT
    flag(
        "--prompt-tokens",
        _lengths,
        shape,
        f"lognormal; without SIGMA all alike (default: {prompt.median:g}:{prompt.sigma:g}, mean {prompt.mean:.0f}, "
        "about that of ShareGPT)",
        prompt,
    )
    flag(
        "--output-tokens",
        _lengths,
        shape,
        f"likewise (default: {output.median:g}:{output.sigma:g}, mean {output.mean:.0f})",
        output,
    )
    flag("--system-tokens", integer(0, 100_000), "COUNT", "a beginning that all prompts share (default: 0)", 0)
    parser.add_argument(
        "--stop-at-eos", action="store_true", help="let the model end early; servers that refuse ignore_eos need this"
    )
    flag("--temperature", _temperature, "VALUE", "default: 0", 0.0)
    flag("--seed", integer(0, 2**31), "NUMBER", "of lengths, prompts and arrivals (default: 1)", 1)

    flag("--ttft-limit", _duration, "TIME", "goodput counts requests whose first token came within this, such as 200ms")
    flag("--itl-limit", _duration, "TIME", "and the 99th percentile of whose inter-token times is at most this")
    flag("--tpot-limit", _duration, "TIME", "and whose time per output token is at most this")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - for standard output")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a picture as SVG")


def run(flags: argparse.Namespace) -> int:
    """Measure and report. Returns the exit code: 0, 1 if no request completed, 2 for what the caller can repair."""
    progress = ProgressLine()
    try:
        plan = asyncio.run(_prepare(flags))
        found, result = run_plan(plan, progress)
    except BenchError as error:
        progress.clear()
        print(f"stet: {error}", file=sys.stderr)
        return 2
    progress.clear()
    result = {"command": f"stet {' '.join(sys.argv[1:])}", **result}
    try:
        if flags.json == "-":
            print(json.dumps(result))
        else:
            print(_heading(result) + "\n\n" + table(result["result"]))
            if flags.json:
                Path(flags.json).write_text(json.dumps(result, indent=1) + "\n")
        if flags.plot:
            notes = [_load_text(result["load"]), f"{result['date']}, {result['client']['processor']}"]
            flags.plot.write_text(draw(found, plan.limits, f"{result['server']['model']}, {flags.url}", notes))
    except OSError as error:
        print(f"stet: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0 if result["result"]["requests"]["completed"] else 1


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run needs. server: what it says of itself, for the report."""

    target: Target
    dialect: Dialect
    workload: Workload
    load: Load
    limits: Limits
    server: dict[str, Any]
    system: str = ""
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 1
    arrivals: str = "poisson"
    rate: float | None = None


def run_plan(plan: Plan, progress: ProgressLine | None = None) -> tuple[Run, dict[str, Any]]:
    """Carry a plan out on an event loop of its own: the run, and its result as JSON values."""
    import uvloop

    def make(job: Job) -> Ask:
        return Ask(job.prompt, job.max_tokens, plan.ignore_eos, plan.temperature, None, plan.system)

    def say(share: float) -> None:
        if progress is not None:
            progress.say("measuring" if share < 1 else "waiting for the last answers", share if share < 1 else None)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        jobs = plan.workload.jobs(plan.seed)
        found = runner.run(measure(plan.target, plan.dialect, jobs, plan.load, make=make, say=say))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "server": plan.server | {"api": plan.dialect.name},
        "client": {
            "processor": host.processor(),
            "cores": host.cores(),
            "python": platform.python_version(),
            "stet": VERSION,
        },
        "load": {
            "loop": "closed" if plan.load.arrivals is None else "open",
            "clients": plan.load.clients or None,
            "rate": plan.rate,
            "arrivals": plan.arrivals if plan.rate else None,
            "seconds": plan.load.seconds,
            "warmup_s": plan.load.warmup,
            "prompt_tokens": asdict(plan.workload.prompt),
            "output_tokens": asdict(plan.workload.output),
            "system_words": len(plan.system.split()),
            "ignore_eos": plan.ignore_eos,
            "temperature": plan.temperature,
            "seed": plan.seed,
        },
        "limits_s": asdict(plan.limits),
        "result": summarize(found, plan.limits),
    }
    return found, result


async def _prepare(flags: argparse.Namespace) -> Plan:
    """Look at the server. Raises BenchError."""
    rng = random.Random(flags.seed)
    try:
        target = await resolve(flags.url, flags.api_key or os.environ.get("STET_BENCH_KEY"))
        dialect, server, context = await discover(target, flags.api, flags.model)
        probe = f"{workload.fresh_words()} {workload.text(_PROBE_WORDS, rng)}"
        ask = Ask(probe, 2, not flags.stop_at_eos, flags.temperature)
        rate = await tokens_per_word(target, dialect, ask)
    except OSError as error:
        # asyncio's own words for an errno say less; a failed look-up of a name has a negative one.
        known = error.errno is not None and error.errno > 0
        raise BenchError(f"{flags.url}: {os.strerror(error.errno or 0).lower() if known else error}") from None
    except (WireError, ValueError) as error:
        raise BenchError(f"{flags.url}: {error}") from None
    system = workload.text(round(flags.system_tokens / rate), rng) if flags.system_tokens else ""
    room = None if context is None else context - round(1.1 * flags.system_tokens)
    if room is not None and room < 16:
        raise BenchError(f"--system-tokens {flags.system_tokens}: the model's context is {context} tokens")
    load = Load(flags.duration, flags.warmup, clients=flags.clients or 4, timeout=flags.timeout)
    if flags.rate is not None:
        times = workload.arrivals(flags.arrivals, flags.rate, flags.warmup + flags.duration, rng)
        load = replace(load, arrivals=tuple(times), clients=0)
    return Plan(
        target,
        dialect,
        Workload(flags.prompt_tokens, flags.output_tokens, rate, room, workload.fresh_words()),
        load,
        Limits(flags.ttft_limit, flags.itl_limit, flags.tpot_limit),
        server,
        system,
        not flags.stop_at_eos,
        flags.temperature,
        flags.seed,
        flags.arrivals,
        flags.rate,
    )


def _heading(result: dict[str, Any]) -> str:
    server = result["server"]
    more = ", ".join(str(server[name]) for name in ("dtype", "quantization", "device") if server.get(name))
    return f"{server['model']} ({more or server['api']}): {_load_text(result['load'])}"


def _load_text(load: dict[str, Any]) -> str:
    how = f"{load['clients']} clients" if load["rate"] is None else f"{load['rate']:g} requests/s, {load['arrivals']}"
    lengths = [f"{load[name]['median']:g}:{load[name]['sigma']:g}" for name in ("prompt_tokens", "output_tokens")]
    return f"{how}, {load['seconds']:g} s, prompts {lengths[0]} tokens, outputs {lengths[1]}, seed {load['seed']}"


def _url(value: str) -> str:
    parse_url(value)
    return value


def _number(value: str, allowed: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise ValueError(allowed)
    return number


def _positive(value: str) -> float:
    number = _number(value, "a number above 0")
    if number == 0:
        raise ValueError("a number above 0")
    return number


def _temperature(value: str) -> float:
    number = _number(value, "a number from 0 to 2")
    if number > 2:
        raise ValueError("a number from 0 to 2")
    return number


def _duration(value: str) -> float:
    """Seconds from 200ms, 0.2s, 5m, 1h or a bare number of seconds."""
    allowed = "a time such as 200ms, 30s, 5m or 1h"
    for unit, factor in (("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        if value.endswith(unit):
            return _number(value.removesuffix(unit), allowed) * factor
    return _number(value, allowed)


def _some_time(value: str) -> float:
    seconds = _duration(value)
    if seconds == 0:
        raise ValueError("a time above 0, such as 200ms, 30s, 5m or 1h")
    return seconds


def _lengths(value: str) -> Lengths:
    median, _, sigma = value.partition(":")
    allowed = "MEDIAN or MEDIAN:SIGMA, such as 200 or 200:0.8"
    found = Lengths(_positive(median), _number(sigma or "0", allowed))
    if found.median < 1 or found.sigma > 3:
        raise ValueError(f"{allowed}, the median from 1, the sigma to 3")
    return found
