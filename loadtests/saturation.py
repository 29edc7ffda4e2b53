"""`make bench-saturation`: what becomes of throughput and latency as more and more is offered, beside llama.cpp.

For the embedded model and for the random Llama of 176M parameters, Stet and llama.cpp's `llama-server` serve the same
weights in int8, with 16 streams of 1,024 tokens and two threads each, as in the comparison over HTTP. Requests arrive
by Poisson's law at a rate that is raised step by step; everything is timed from the scheduled arrival. At each rate
the servers take turns, and the one that was first comes second at the next. A server that no longer keeps up (its
throughput is below 70 % of what was offered) is not offered more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.machine import describe_machine, read_bandwidth
from loadtests.peers import environment, servers
from loadtests.peers.checkpoints import make_checkpoint, shapes
from loadtests.peers.report import table
from loadtests.peers.stamps import up_to_date
from loadtests.processes import RunningServer, spawned
from server.bench import workload
from server.bench.client import resolve
from server.bench.command import Plan, run_plan
from server.bench.dialect import Ask, Dialect
from server.bench.discovery import discover, tokens_per_word
from server.bench.measure import Load
from server.bench.summary import Limits
from server.bench.svg import COLORS, Axis, Panel, Series, figure
from server.bench.workload import Lengths, Workload

RESULTS = Path(__file__).resolve().parent / "results"
TALES = environment.ROOT / "models" / "tales"
PROMPT, OUTPUT = Lengths(128, 0.5, low=16, high=400), Lengths(64, 0.5, low=8, high=256)
KEEPS_UP = 0.7
NAMES = {"stet": "Stet", "llama.cpp": "llama-server"}
# Requests a second, and how long each is offered, in seconds: a slow model needs longer for as many requests.
RATES: dict[str, tuple[float, ...]] = {
    "stet-tales": (2, 5, 10, 20, 30, 40),
    "llama-176m": (0.5, 1, 1.5, 2, 2.5, 3),
}
SECONDS = {"stet-tales": 10.0, "llama-176m": 25.0}


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def prepare(model: str) -> dict[str, servers.Server]:
    """Both servers of a model, its files made if they are missing."""
    folder = environment.model_folder(model)
    if model in shapes():
        make_checkpoint(shapes()[model], folder / "hf")
        environment.convert("llama.cpp", model, say)
    else:
        target = folder / "model-q8_0.gguf"
        python = str(environment.python_of_llama())
        with up_to_date(folder / "gguf-stamp", {"weights": _fingerprint(TALES), "converter": 2}) as fresh:
            if not fresh or not target.is_file():
                say(f"llama.cpp: converting {model}")
                command = [python, "-m", "loadtests.peers.convert_gguf", str(TALES), str(target)]
                environment.call(command, environment.LOGS / f"convert-llama.cpp-{model}.log")
    ours = servers.stet(TALES if model not in shapes() else folder / "hf", "w8a8")
    return {"stet": ours, "llama.cpp": servers.llama_server(environment.llama_binaries(), folder)}


def _fingerprint(folder: Path) -> str:
    from models.loader import weights_hash

    return weights_hash(folder)


@contextmanager
def started(name: str, model: str, server: servers.Server) -> Iterator[RunningServer]:
    """One server, ready, with two threads."""
    log = environment.LOGS / f"saturation-{name}-{model}.log"
    variables = servers.thread_environment() | server.environment
    with spawned(server.command, ready_path=server.ready_path, environment=variables, log=log) as running:
        running.wait_ready(server.ready_timeout)
        yield running


def make_plan(url: str, name: str) -> Plan:
    """What is measured at every rate, before it has one. Both are asked in OpenAI's shape."""

    async def look() -> Plan:
        target = await resolve(url)
        _, server, _ = await discover(target, "completions", None)
        dialect = Dialect("completions", str(server["model"]))
        ask = Ask(workload.text(200, random.Random(0)), 2)
        words = await tokens_per_word(target, dialect, ask)
        work = Workload(PROMPT, OUTPUT, words, servers.CONTEXT)
        return Plan(target, dialect, work, Load(1.0), Limits(), {"model": server["model"], "server": name})

    return asyncio.run(look())


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each cell: measured, before it, and until a request is given up."""

    seconds: float
    warmup: float
    timeout: float


def cell(plan: Plan, rate: float, seed: int, times: Times) -> dict[str, Any]:
    """One server at one rate: the result of `stet bench`."""
    arrivals = workload.arrivals("poisson", rate, times.warmup + times.seconds, random.Random(seed))
    load = Load(times.seconds, times.warmup, tuple(arrivals), timeout=times.timeout)
    work = replace(plan.workload, begin=workload.fresh_words())
    _, result = run_plan(replace(plan, load=load, workload=work, seed=seed, rate=rate))
    return result


def climb(model: str, rates: tuple[float, ...], times: Times) -> list[dict[str, Any]]:
    """All cells of a model: both servers run, and only the one that is asked computes."""
    cells: list[dict[str, Any]] = []
    made = prepare(model)
    with started("stet", model, made["stet"]) as ours, started("llama.cpp", model, made["llama.cpp"]) as theirs:
        plans = {"stet": make_plan(ours.url, "stet"), "llama.cpp": make_plan(theirs.url, "llama.cpp")}
        for plan in plans.values():
            cell(plan, rates[0], 0, Times(2.0, 0.0, times.timeout))
        for number, rate in enumerate(rates):
            for name in list(plans) if number % 2 == 0 else list(reversed(plans)):
                result = cell(plans[name], rate, number + 1, times)["result"]
                offered = offered_tokens(result)
                got = result["rates"]["output_tokens_per_s"]
                cells.append({"model": model, "server": name, "rate": rate, "offered_tokens_per_s": offered, **result})
                say(f"{model}: {name} at {rate:g} requests/s: {got:.0f} of {offered:.0f} tokens/s, {_short(result)}")
                if got < KEEPS_UP * offered:
                    plans.pop(name)
            if not plans:
                break
    return cells


def offered_tokens(result: dict[str, Any]) -> float:
    """Output tokens a second that the requests of the measured time ask for; those that failed ask for the mean."""
    mean = result["lengths"]["output_tokens"].get("mean", OUTPUT.mean)
    return float(result["rates"]["offered_requests_per_s"] * mean)


def _short(result: dict[str, Any]) -> str:
    ttft, gap = result["latency_s"]["ttft"], result["latency_s"]["inter_token"]
    if not ttft["count"]:
        return "none completed"
    return f"TTFT {1e3 * ttft['p50']:.0f}/{1e3 * ttft['p99']:.0f} ms, ITL {1e3 * gap['p50']:.1f}/{1e3 * gap['p99']:.1f}"


def row(cell: dict[str, Any]) -> dict[str, object]:
    """One line of the table."""
    latency, requests = cell["latency_s"], cell["requests"]

    def ms(name: str) -> str:
        found = latency[name]
        return f"{1e3 * found['p50']:.3g} / {1e3 * found['p99']:.3g}" if found["count"] else "–"

    return {
        "model": cell["model"],
        "requests/s": f"{cell['rate']:g}",
        "server": NAMES[cell["server"]],
        "tokens/s offered": f"{cell['offered_tokens_per_s']:.0f}",
        "tokens/s": f"{cell['rates']['output_tokens_per_s']:.0f}",
        "TTFT ms, p50 / p99": ms("ttft"),
        "inter-token ms, p50 / p99": ms("inter_token"),
        "completed": f"{requests['completed']} of {requests['due']}",
        "client": f"{cell['client']['cpu_share']:.0%}" + (" (!)" if cell["client"]["warnings"] else ""),
    }


def plot(cells: list[dict[str, Any]], notes: list[str]) -> str:
    """Three panels a model: throughput, time to first token, inter-token time, each against what is offered."""
    panels = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        of = {name: [c for c in cells if c["model"] == model and c["server"] == name] for name in NAMES}
        x = Axis("output tokens/s offered", low=0)
        most = max(c["offered_tokens_per_s"] for found in of.values() for c in found)
        rates = [Series("as much as offered", [(0, 0), (most, most)], "#999", markers=False)]
        times: dict[str, list[Series]] = {"ttft": [], "inter_token": []}
        for (name, found), color in zip(of.items(), COLORS, strict=False):
            found = sorted(found, key=lambda c: float(c["offered_tokens_per_s"]))
            points = [(c["offered_tokens_per_s"], c["rates"]["output_tokens_per_s"]) for c in found]
            rates.append(Series(f"{NAMES[name]}: throughput, median", points, color))
            for kind, series in times.items():
                full = [c for c in found if c["latency_s"][kind]["count"]]
                for share, dashed in (("p50", False), ("p99", True)):
                    label = f"{NAMES[name]}: " + ("99th percentile" if dashed else "throughput, median")
                    at = [(c["offered_tokens_per_s"], 1e3 * c["latency_s"][kind][share]) for c in full]
                    series.append(Series(label, at, color, dashed))
        panels.append(Panel(f"{model}: output tokens a second", x, Axis("tokens/s", low=0), rates))
        panels.append(Panel(f"{model}: time to first token", x, Axis("ms", log=True), times["ttft"]))
        panels.append(Panel(f"{model}: inter-token time", x, Axis("ms", log=True), times["inter_token"]))
    return figure(panels, "What becomes of throughput and latency as more is offered", 3, notes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.saturation", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seconds", type=float, help=f"of each cell (default {SECONDS})")
    parser.add_argument("--warmup", type=float, default=3.0, help="before each (default 3)")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json, NAME.md and NAME.svg")
    flags = parser.parse_args()
    environment.LOGS.mkdir(parents=True, exist_ok=True)
    environment.install("llama.cpp")
    bandwidth = [read_bandwidth()]
    seconds = {model: flags.seconds or SECONDS[model] for model in flags.models}
    cells = [
        found
        for model in flags.models
        for found in climb(model, RATES[model], Times(seconds[model], flags.warmup, 60.0))
    ]
    bandwidth.append(read_bandwidth())
    machine = describe_machine()
    result = {
        "command": "python -m loadtests.saturation " + " ".join(sys.argv[1:]),
        "machine": machine,
        "bandwidth_gb_per_s": [round(value / 1e9, 1) for value in bandwidth],
        "peer": environment.LLAMA_SOURCE,
        "lengths": {"prompt": f"{PROMPT.median:g}:{PROMPT.sigma:g}", "output": f"{OUTPUT.median:g}:{OUTPUT.sigma:g}"},
        "cells": cells,
    }
    text = [f"`{result['command']}`", "", *(f"- {key}: {value}" for key, value in machine.items())]
    text += [f"- read bandwidth, GB/s, before and after: {result['bandwidth_gb_per_s']}"]
    text += [f"- llama-server from {environment.LLAMA_SOURCE}, Q8_0; Stet w8a8; 16 streams, two threads each"]
    text += [f"- lognormal lengths, tokens, median:sigma: {result['lengths']}; seconds a cell: {seconds}"]
    text += ["- client: share of a processor that it used; (!) where it warns that others kept it waiting", ""]
    text += [table([row(found) for found in cells])]
    print("\n".join(text))
    if flags.save:
        (RESULTS / f"{flags.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{flags.save}.md").write_text("\n".join([*text, "", f"![]({flags.save}.svg)"]) + "\n")
        date = str(machine["date"])[:10]
        where = f"{machine['processor']}, {machine['cores']} cores, {date}"
        notes = [
            f"{where}; int8 weights on both sides, 16 streams, 2 threads; the client shares the machine;",
            "lognormal prompts 128:0.5 and outputs 64:0.5 tokens, Poisson arrivals, timed from the scheduled arrival",
        ]
        (RESULTS / f"{flags.save}.svg").write_text(plot(cells, notes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
