"""`make bench-peers`: the engine and the server beside those that users would pick instead, in one run.

Sets up what is missing under build/peers, measures, and prints one table for each part and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from loadtests.machine import describe_machine, read_bandwidth
from loadtests.peers import compare, environment, report
from loadtests.peers.checkpoints import shapes

RESULTS = Path(__file__).resolve().parents[1] / "results"
PARTS = ("engine", "http")


def say(message: str) -> None:
    """Progress, on standard error: standard output holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    models = list(shapes())
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers", description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=environment.PEERS, default=list(environment.PEERS))
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--http-models", nargs="+", choices=models, default=models[-1:], help="default: the small one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A (default 3)")
    parser.add_argument("--quantization", default="w8a8", help="of the engine under test (default w8a8)")
    parser.add_argument("--setup-only", action="store_true", help="install, build and convert; measure nothing")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json and NAME.md")
    flags = parser.parse_args(arguments)
    if flags.rounds < 1:
        parser.error(f"--rounds {flags.rounds}: at least 1")
    return flags


def measure(flags: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The result as JSON values, and the text of the report."""
    began = time.perf_counter()
    used = dict.fromkeys([*flags.models, *(flags.http_models if "http" in flags.parts else ())])
    left_out = environment.set_up(flags.peers, list(used), say)
    peers = [peer for peer in flags.peers if peer not in left_out]
    result: dict[str, Any] = {
        "command": "python -m loadtests.peers " + " ".join(sys.argv[1:]),
        "machine": describe_machine() | {"processor_flags": processor_flags()},
        "quantization": flags.quantization,
        "left_out": left_out,
    }
    if flags.setup_only:
        return result, [f"set up: {', '.join(peers)}"]
    text = [f"`{result['command']}`", "", *(f"- {key}: {value}" for key, value in result["machine"].items())]
    bandwidth = [read_bandwidth()]
    entries: dict[str, dict[str, compare.Entry]] = {}
    http: dict[str, dict[str, compare.HttpEntry]] = {}
    if "engine" in flags.parts:
        for model in flags.models:
            entries[model] = compare.compare_engines(model, ["stet", *peers], flags.rounds, flags.quantization, say)
            bandwidth.append(read_bandwidth())
    if "http" in flags.parts:
        serving = ["stet", *(peer for peer in peers if peer in compare.SERVERS)]
        for model in flags.http_models:
            http[model] = compare.compare_servers(model, serving, flags.rounds, flags.quantization, say)
            bandwidth.append(read_bandwidth())

    result["bandwidth_gb_per_s"] = [round(value / 1e9, 1) for value in bandwidth]
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    text += [f"- read bandwidth, GB/s, before, between and after: {result['bandwidth_gb_per_s']}"]
    text += [f"- {flags.rounds} rounds of A B B A in {result['minutes']} minutes", "", "Contestants:", ""]
    text += contestants_text(entries, left_out)
    if entries:
        rows = [row for model, found in entries.items() for row in report.engine_rows(model, found)]
        text += ["", "## engine", "", report.table(rows)]
        result["engine"] = {
            "rows": rows,
            "contestants": {
                model: {
                    name: {
                        "hello": entry.hello,
                        "gate": entry.gate,
                        "left_out": entry.left_out,
                        "samples": {f"{kind} {n}": values for (kind, n), values in entry.samples.items()},
                        "host_seconds": {f"{kind} {n}": values for (kind, n), values in entry.host.items()},
                    }
                    for name, entry in found.items()
                }
                for model, found in entries.items()
            },
        }
    if http:
        rows = [row for model, found in http.items() for row in report.http_rows(model, found)]
        text += ["", "## http", "", report.table(rows)]
        text += [
            "",
            *(f"- {n}: left out, {e.left_out}" for found in http.values() for n, e in found.items() if e.left_out),
        ]
        result["http"] = {
            "rows": rows,
            "contestants": {
                model: {
                    name: {"ready": e.ready, "rates": e.rates, "first": e.first, "left_out": e.left_out}
                    for name, e in found.items()
                }
                for model, found in http.items()
            },
        }
    return result, text


def contestants_text(entries: dict[str, dict[str, compare.Entry]], left_out: dict[str, str]) -> list[str]:
    """Who ran, in which version and how, how it passed the gate; who did not, and why."""
    lines = [f"- {peer}: left out, {reason}" for peer, reason in left_out.items()]
    for model, found in entries.items():
        for name, entry in found.items():
            if entry.left_out is not None:
                lines.append(f"- {name}, {model}: left out, {entry.left_out}")
                continue
            versions = ", ".join(f"{package} {number}" for package, number in entry.hello["versions"].items())
            gate = f"{entry.gate['top_1']:.0%} of its tokens the reference's first choice"
            lines.append(f"- {name}, {model}: {versions}; {entry.hello['settings']}; {gate}")
    return lines


def processor_flags() -> str:
    """What of the vector units the processor shows: it decides which peers run, and how fast."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return " ".join(flag for flag in wanted if flag in flags) or "none of them known"


def main() -> None:
    flags = parse()
    result, text = measure(flags)
    print("\n".join(text))
    print(json.dumps(result))
    if flags.save:
        (RESULTS / f"{flags.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{flags.save}.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
