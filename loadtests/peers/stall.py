"""What a long prompt does to running streams, and what sparing them costs the prompt, as `mixed_step_tokens` varies.

    python -m loadtests.peers.stall [--model llama-176m] [--quantization w8a8] [--rounds 3] [--save NAME]

Eight streams decode undisturbed for a while; then a prompt of 2,000 tokens arrives. The time between two tokens of a
stream is taken from then until the prompt's first token: its 99th percentile, beside the median of the undisturbed
time, and the prompt's time to its first token. `auto` is what the engine chooses by itself at warm-up. Over EngineCore,
one load of the weights, rounds of A B B A over the settings; measured once the system has handed out the memory of
the KV cache: in the first seconds after a start, a step waits for it now and then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from loadtests.machine import describe_machine, read_bandwidth
from loadtests.peers import environment
from loadtests.peers.checkpoints import make_checkpoint, shapes
from loadtests.peers.compare import visits
from loadtests.peers.contestants import THREADS, random_prompts
from loadtests.peers.report import spread, table
from server.bench import svg
from server.bench.summary import percentile
from server.engine.build import build_engine
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import Scheduler

RESULTS = Path(__file__).resolve().parents[1] / "results"
STREAMS, STREAM_PROMPT = 8, 128
LONG_PROMPT = 2000
UNDISTURBED_STEPS = 48
SETTINGS = ("16", "32", "64", "128", "256", "512", "auto")
AIM = 3.0


@dataclass(slots=True)
class Stall:
    """Seconds, one entry a visit. median: between two tokens of a stream, undisturbed. p99: the same while the prompt
    is computed. first: from the prompt's arrival to its first token. tokens: the mixed_step_tokens that held."""

    tokens: int = 0
    median: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def measure(core: EngineCore, seed: int, long_prompt: int = LONG_PROMPT) -> tuple[float, float, float]:
    """(undisturbed median, 99th percentile beside the prompt, time to the prompt's first token), in seconds. Leaves the
    core without work. Raises RuntimeError if the model's context ends a stream before the prompt has its token."""
    endless = SamplingParams(max_new_tokens=core.scheduler.config.max_model_len, temperature=0.0, ignore_eos=True)
    first_id = 10 * seed + 1
    streams = [
        Request(first_id + index, ids, endless, arrival=index)
        for index, ids in enumerate(random_prompts(STREAMS, STREAM_PROMPT, seed))
    ]
    for request in streams:
        core.add(request)
    while not all(request.output_token_ids for request in streams):
        core.step()
    undisturbed = intervals(core, streams, lambda: len(streams[0].output_token_ids) > UNDISTURBED_STEPS)

    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    ids = random_prompts(1, long_prompt, seed)[0]
    prompt = Request(first_id + STREAMS, ids, params, arrival=STREAMS)
    arrived = time.perf_counter()
    core.add(prompt)
    beside = intervals(core, streams, lambda: bool(prompt.output_token_ids))
    first = time.perf_counter() - arrived
    core.abort([request.request_id for request in streams])
    return median(undisturbed), percentile(beside, 0.99), first


def intervals(core: EngineCore, streams: Sequence[Request], done: Callable[[], bool]) -> list[float]:
    """Step until `done()`; the seconds between two tokens of each stream. Raises RuntimeError if a stream ends."""
    last = dict.fromkeys((request.request_id for request in streams), time.perf_counter())
    found = []
    while not done():
        outcomes = core.step()
        now = time.perf_counter()
        for outcome in outcomes:
            for output in outcome.outputs:
                request_id = output.request.request_id
                if request_id not in last or not output.token_ids:
                    continue
                if output.finish_reason is not None:
                    raise RuntimeError(f"a stream ended ({output.finish_reason}): the model's context is too short")
                found.append(now - last[request_id])
                last[request_id] = now
    return found


def run(folder: Path, quantization: str, rounds: int, threads: int) -> tuple[dict[str, Stall], str]:
    """Measure every setting on one load of the model. Returns the stalls and what the engine says of itself."""
    settings = EngineConfig(
        model=str(folder), quantization=quantization, threads=threads, kv_cache_bytes=2 << 30, prefix_caching=False
    )
    engine = build_engine(settings)
    engine.settle()
    core, chosen = engine.core, engine.scheduler_config.mixed_step_tokens
    stalls = {setting: Stall(chosen if setting == "auto" else int(setting)) for setting in SETTINGS}
    for number, setting in enumerate(visit.name for visit in visits(SETTINGS, rounds)):
        stall = stalls[setting]
        # The core is idle: a fresh scheduler over the same pool forgets nothing that is needed.
        # As with the flag: a number that somebody chose holds all along a prompt.
        span = engine.scheduler_config.attention_span if setting == "auto" else None
        config = replace(engine.scheduler_config, mixed_step_tokens=stall.tokens, attention_span=span)
        core.scheduler = Scheduler(config)
        figures = measure(core, seed=number)
        for values, figure in zip((stall.median, stall.p99, stall.first), figures, strict=True):
            values.append(figure)
        say(
            f"visit {number + 1} of {2 * rounds * len(SETTINGS)}: {setting}: median {1000 * figures[0]:.1f} ms, "
            f"p99 {1000 * figures[1]:.1f} ms, first token of the prompt after {figures[2]:.2f} s"
        )
    identity = engine.identity
    kinds = f"{identity.quantization}, {identity.dtype}, KV cache {identity.kv_cache_dtype}"
    return stalls, f"{kinds}, {identity.backend} kernels"


def rows(stalls: dict[str, Stall]) -> list[dict[str, object]]:
    """The table: milliseconds, their ratio, and the prompt's seconds, medians over the visits with their spreads."""
    return [
        {
            "mixed_step_tokens": f"{stall.tokens} (chosen)" if setting == "auto" else setting,
            "median alone, ms": _shown(stall.median, 1000),
            "p99 beside the prompt, ms": _shown(stall.p99, 1000),
            "p99 / median": f"{median(ratios(stall)):.2f}",
            "prompt's first token, s": _shown(stall.first, 1),
        }
        for setting, stall in stalls.items()
    ]


def ratios(stall: Stall) -> list[float]:
    """p99 beside the prompt over the undisturbed median, each visit's own."""
    return [p99 / alone for p99, alone in zip(stall.p99, stall.median, strict=True)]


def _shown(seconds: Sequence[float], factor: float) -> str:
    return f"{factor * median(seconds):.3g} ± {100 * spread(seconds):.0f} %"


def plot(stalls: dict[str, Stall], model: str) -> str:
    """p99 over median against the prompt's time to its first token, one point a setting."""
    points = [
        (median(stall.first), median(ratios(stall)), setting if setting != "auto" else f"auto ({stall.tokens})")
        for setting, stall in stalls.items()
    ]
    panel = svg.Panel(
        f"{model}: {STREAMS} streams while a prompt of {LONG_PROMPT:,} tokens arrives",
        svg.Axis("the prompt's time to its first token, s", log=True),
        svg.Axis("p99 inter-token time / undisturbed median", log=True),
        [svg.Series("", [(x, y) for x, y, _ in sorted(points)], labels=[label for *_, label in sorted(points)])],
        [(AIM, f"aim: {AIM:g}")],
    )
    return svg.figure([panel], "By mixed_step_tokens")


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers.stall", description=__doc__)
    parser.add_argument("--model", choices=list(shapes()), default="llama-176m")
    parser.add_argument("--quantization", default="w8a8")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A (default 3)")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json, NAME.md and NAME.svg")
    flags = parser.parse_args()

    folder = environment.model_folder(flags.model) / "hf"
    make_checkpoint(shapes()[flags.model], folder)
    before = read_bandwidth()
    stalls, engine = run(folder, flags.quantization, flags.rounds, THREADS)
    bandwidth = [round(value / 1e9, 1) for value in (before, read_bandwidth())]
    result = {
        "command": "python -m loadtests.peers.stall " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "bandwidth_gb_per_s": bandwidth,
        "model": flags.model,
        "engine": engine,
        "rows": rows(stalls),
        "samples": {setting: asdict(stall) for setting, stall in stalls.items()},
    }
    text = [f"`{result['command']}`", "", *(f"- {key}: {value}" for key, value in describe_machine().items())]
    text += [f"- read bandwidth, GB/s, before and after: {bandwidth}", f"- {flags.model}: {engine}", ""]
    text += [table(rows(stalls))]
    print("\n".join(text))
    print(json.dumps(result))
    if flags.save:
        (RESULTS / f"{flags.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{flags.save}.md").write_text("\n".join([*text, "", f"![]({flags.save}.svg)"]) + "\n")
        (RESULTS / f"{flags.save}.svg").write_text(plot(stalls, flags.model), encoding="utf-8")


if __name__ == "__main__":
    main()
