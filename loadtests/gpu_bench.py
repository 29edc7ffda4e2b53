"""The engine on a GPU: decode and prefill rates, their share of the roofline, host time, and peers, in one run.

    python -m loadtests.engine_bench [--models ...] [--batches ...] [--seconds 450] [--smoke] [--save NAME]

Needs torch, triton, numpy, tokenizers, safetensors, msgspec, llguidance and transformers, and neither the server's
other packages nor a network: the models have random weights in the shapes of known ones, made on the device. For
each model the same weights go to `transformers` and to the engine. Before anything is timed, the engine's first
tokens must be (nearly) the most likely ones by the logits of `transformers`, and a request in a batch must draw
what it draws alone. A part that would begin after `--seconds`, or that does not fit into the memory, is left out
and said so.

The roofline of a decode step is what it must read (all weights but the embedding table, and the K and V of its
sequences) over the bandwidth of a copy measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kernels.ops import QuantizationMode
from models.config import ModelConfig
from models.layers import DecoderModel, Linear
from models.llama import Llama
from server.engine.build import start_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.device import Device, make_device
from server.engine.plan import PendingStep, StepPlan, StepResult, StepRunner
from server.engine.request import Request, SamplingParams

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_LEN = 128

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "head_dim": 64,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "tie_word_embeddings": False},
}
SMOKE = _LLAMA | {
    "vocab_size": 512,
    "hidden_size": 128,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 192,
    "tie_word_embeddings": False,
}

Row = dict[str, object]


class OutOfTime(Exception):
    """The next part would begin too late."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is measured: batch sizes, tokens generated, rounds, and until when."""

    batches: Sequence[int]
    new_tokens: int
    rounds: int
    deadline: float

    def check(self) -> None:
        """Raises OutOfTime."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime


class TimedRunner:
    """A StepRunner that adds up how long its caller waits for results, so that the rest is the host's own time."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.waited = 0.0

    def launch(self, plan: StepPlan) -> PendingStep:
        return TimedStep(self, self._runner.launch(plan))


@dataclass(frozen=True, slots=True)
class TimedStep:
    runner: TimedRunner
    pending: PendingStep

    def result(self) -> StepResult:
        started = time.perf_counter()
        result = self.pending.result()
        self.runner.waited += time.perf_counter() - started
        return result


def say(message: str) -> None:
    """Progress, on standard error: standard output holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written together, of the best of some copies of a buffer larger than the caches."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(12):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best


# ---- one set of weights for engine and peer ----


def make_peer(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A `transformers` model with random weights, made where it stays."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in shape.items() if key not in ("model_type", "torch_dtype")}
    config = AutoConfig.for_model(shape["model_type"], **fields)
    torch.manual_seed(0)
    with torch.device(device):
        peer = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
    return peer.eval()


@torch.inference_mode()
def take_weights(peer: Any, shape: dict[str, Any], device: Device, mode: QuantizationMode) -> DecoderModel:
    """The engine's model with the peer's weights. They never leave the device, unlike those of a checkpoint."""
    config = ModelConfig.from_hf(shape)
    model = Llama(config, device.ops, mode)
    tensors: dict[str, Tensor] = dict(peer.state_dict())

    def prepare(linear: Linear, prefix: str) -> None:
        linear.prepare(torch.cat([tensors[f"{prefix}{part}.weight"] for part in linear.parts]))

    model.norm.slots("n")["n.weight"].fill(tensors["model.norm.weight"])
    prepare(model.table, "")
    if model.head is not model.table:
        prepare(model.head, "")
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
            prepare(linear, prefix)
        norms = {"input_layernorm": layer.attention_norm, "post_attention_layernorm": layer.mlp_norm}
        norms |= {
            name: norm
            for name, norm in (
                ("self_attn.q_norm", layer.attention.query_norm),
                ("self_attn.k_norm", layer.attention.key_norm),
            )
            if norm is not None
        }
        for name, norm in norms.items():
            norm.slots("n")["n.weight"].fill(tensors[f"{prefix}{name}.weight"])
    return model


# ---- runs ----


def prompts(count: int, vocab_size: int, salt: int) -> list[list[int]]:
    """Random prompts that differ in every call."""
    generator = torch.Generator().manual_seed(1_000_003 * salt + count)
    ids: list[list[int]] = torch.randint(3, vocab_size, (count, PROMPT_LEN), generator=generator).tolist()
    return ids


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of each request; tokens a second; the host's own seconds in a decode step."""

    tokens: list[list[int]]
    prefill: float
    decode: float
    host_seconds: float


def run_engine(core: EngineCore, batch: Sequence[Sequence[int]], new_tokens: int) -> Run:
    """Greedy decoding of all prompts at once. Decode is timed from the step after which every request has a token."""
    runner = TimedRunner(core._runner)
    core._runner = runner
    params = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(index + 1, list(ids), params, arrival=index) for index, ids in enumerate(batch)]
    for request in requests:
        core.add(request)
    started = time.perf_counter()
    decode_started: float | None = None
    num_steps = first_tokens = 0
    try:
        while core.has_work:
            core.step()
            if decode_started is not None:
                num_steps += 1
            elif all(request.output_token_ids for request in requests):
                decode_started = time.perf_counter()
                first_tokens = sum(len(request.output_token_ids) for request in requests)
                runner.waited = 0.0
    finally:
        core._runner = runner._runner
    ended = time.perf_counter()
    decode_started = decode_started or ended
    seconds = max(ended - decode_started, 1e-9)
    return Run(
        tokens=[request.output_token_ids for request in requests],
        prefill=sum(map(len, batch)) / (decode_started - started),
        decode=(sum(len(request.output_token_ids) for request in requests) - first_tokens) / seconds,
        host_seconds=(seconds - runner.waited) / max(num_steps, 1),
    )


@torch.inference_mode()
def run_generate(peer: Any, batch: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Decode tokens a second of `generate`: all but the first token, whose time is that of the prompt."""
    ids = torch.tensor(batch, device=peer.device)

    def seconds(count: int) -> float:
        synchronize()
        started = time.perf_counter()
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        synchronize()
        return time.perf_counter() - started

    seconds(2)
    return len(batch) * (new_tokens - 1) / max(seconds(new_tokens) - seconds(1), 1e-9)


def run_continuous(peer: Any, batch: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Tokens a second, prompts included in the time, of `transformers`' continuous batching."""
    from transformers import GenerationConfig

    config = cast(Any, GenerationConfig)(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    peer.generate_batch(inputs=[list(ids) for ids in batch], generation_config=config)
    synchronize()
    started = time.perf_counter()
    outputs = peer.generate_batch(inputs=[list(ids) for ids in batch], generation_config=config)
    synchronize()
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return tokens / (time.perf_counter() - started)


# ---- gates ----


@torch.inference_mode()
def check_first_tokens(core: EngineCore, peer: Any, vocab_size: int, slack: float) -> float:
    """How far below the peer's best logit the engine's first tokens are at most, in standard deviations of the logits.

    Raises RuntimeError above `slack`: then it is another model, and there is nothing to compare.
    """
    batch = prompts(4, vocab_size, salt=9)
    tokens = [request[0] for request in run_engine(core, batch, 2).tokens]
    logits = peer(torch.tensor(batch, device=peer.device)).logits[:, -1].float().cpu()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    gap = float(((logits.max(dim=1).values - chosen) / logits.std(dim=1)).max())
    if not gap <= slack:
        raise RuntimeError(f"the engine's first tokens are {gap:.2f} standard deviations below those of transformers")
    return gap


def check_alone(core: EngineCore, vocab_size: int) -> None:
    """A request draws alone what it draws among others, or RuntimeError."""
    batch = prompts(5, vocab_size, salt=11)
    together = run_engine(core, batch, 12).tokens
    if run_engine(core, batch[2:3], 12).tokens[0] != together[2]:
        raise RuntimeError("a request draws other tokens alone than in a batch")


# ---- the protocol ----


def step_bytes(model: DecoderModel, device: Device, batch: int, new_tokens: int) -> float:
    """What a decode step must read: every weight but the embedding table, and the K and V so far."""
    config, dtype = model.config, device.ops.dtype
    specs = model.kv_cache_specs(device.block_size, dtype)
    kv_per_token = sum(spec.bytes_per_block for spec in specs) / device.block_size
    table = config.vocab_size * config.hidden_size * dtype.itemsize
    return model.weight_bytes - table + batch * (PROMPT_LEN + new_tokens / 2) * kv_per_token


def bench_engine_alone(
    name: str, model: DecoderModel, device: Device, core: EngineCore, bandwidth: float, limits: Limits, **labels: object
) -> list[Row]:
    """One row for each batch size."""
    rows: list[Row] = []
    for batch in limits.batches:
        limits.check()
        run_engine(core, prompts(batch, model.config.vocab_size, 0), 8)
        runs = [
            run_engine(core, prompts(batch, model.config.vocab_size, 1 + salt), limits.new_tokens)
            for salt in range(limits.rounds)
        ]
        decode = statistics.median(run.decode for run in runs)
        floor_seconds = step_bytes(model, device, batch, limits.new_tokens) / bandwidth
        rows.append(
            {
                "model": name,
                **labels,
                "batch": batch,
                "decode_tokens_per_s": round(decode, 1),
                "spread": round((max(r.decode for r in runs) - min(r.decode for r in runs)) / 2 / decode, 3),
                "share_of_roofline": round(decode / batch * floor_seconds, 3),
                "host_us_per_step": round(1e6 * statistics.median(run.host_seconds for run in runs)),
                "prefill_tokens_per_s": round(statistics.median(run.prefill for run in runs)),
            }
        )
        say(f"{name} {labels} batch {batch}: {decode:.0f} tokens/s, {rows[-1]['share_of_roofline']} of the roofline")
    return rows


def bench_peers(name: str, peer: Any, limits: Limits, vocab_size: int, on_gpu: bool) -> list[Row]:
    """`transformers`, on the same weights."""
    peers: list[tuple[str, Callable[[Any, Sequence[Sequence[int]], int], float]]] = [("generate", run_generate)]
    if on_gpu and hasattr(peer, "generate_batch"):
        peers.append(("continuous batching", run_continuous))
    rows: list[Row] = []
    for what, run in peers:
        for batch in limits.batches:
            limits.check()
            try:
                rate = run(peer, prompts(batch, vocab_size, 1), limits.new_tokens)
            except Exception as error:  # a peer that fails on this machine is no reason to lose the other numbers
                say(f"{name}: transformers {what} failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
                break
            rows.append({"model": name, "engine": f"transformers {what}", "batch": batch,
                         "decode_tokens_per_s": round(rate, 1)})  # fmt: skip
            say(f"{name} transformers {what} batch {batch}: {rate:.0f} tokens/s")
    return rows


def bench_model(
    name: str, shape: dict[str, Any], modes: Sequence[str], bandwidth: float, limits: Limits, config: EngineConfig
) -> list[Row]:
    """Engine in every mode, then the peers. Raises OutOfTime never: what there is no time for is left out."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    place = torch.device("cuda" if on_gpu else "cpu")
    rows: list[Row] = []
    say(f"{name}: making weights")
    peer = make_peer(shape, place, dtype)
    vocab_size = int(shape["vocab_size"])
    try:
        for mode, deterministic in [*((mode, True) for mode in modes), ("none", False)]:
            if not deterministic and not on_gpu:
                continue
            limits.check()
            engine_config = EngineConfig(
                device=config.device,
                dtype="auto" if on_gpu else "float32",
                max_model_len=config.max_model_len,
                max_running=config.max_running,
                max_tokens_per_step=config.max_tokens_per_step,
                prefix_caching=False,
                quantization=mode,
                deterministic=deterministic,
            )
            try:
                device = make_device(engine_config)
                model = take_weights(peer, shape, device, cast(QuantizationMode, mode))
                kv_dtype = device.kv_cache_dtype(engine_config.kv_cache_dtype, model.config)
                core, _ = start_core(device, model, engine_config, kv_dtype)
            except torch.OutOfMemoryError:
                say(f"{name} {mode}: does not fit into the memory; left out")
                continue
            gap = check_first_tokens(core, peer, vocab_size, slack=0.2 if mode == "none" else 1.0)
            if deterministic:
                check_alone(core, vocab_size)
            say(f"{name} {mode}: first tokens within {gap:.3f} standard deviations of the peer's best")
            labels = {"engine": "stet", "weights": mode, "deterministic": deterministic}
            rows += bench_engine_alone(name, model, device, core, bandwidth, limits, **labels)
            del core, model, device
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        rows += bench_peers(name, peer, limits, vocab_size, on_gpu)
    except OutOfTime:
        say(f"{name}: out of time; the rest is left out")
    del peer
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return rows


def describe() -> dict[str, object]:
    """What it was measured on."""
    versions: dict[str, str] = {}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})",
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in header) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the protocol; print one table and one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.engine_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--modes", nargs="+", choices=["none", "w8a16", "w8a8"], default=["none", "w8a16"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=450.0, help="begin nothing after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on whatever device is there")
    parser.add_argument("--save", metavar="NAME", help="also write loadtests/results/NAME.json and NAME.md")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.smoke:
        say("no GPU here: --smoke runs a tiny model, and `make bench` measures the CPU")
        return 2
    started = time.perf_counter()
    place = torch.device("cuda" if on_gpu else "cpu")
    before = copy_bandwidth(place, (1 << 30) if on_gpu else (1 << 24))
    if options.smoke:
        shapes, batches, new_tokens, rounds = {"smoke": SMOKE}, (1, 3), 6, 1
        modes = options.modes if on_gpu else ["none"]
    else:
        shapes, batches = {name: SHAPES[name] for name in options.models}, tuple(options.batches)
        new_tokens, rounds, modes = options.new_tokens, options.rounds, options.modes
    config = EngineConfig(
        device="cuda" if on_gpu else "cpu",
        max_model_len=PROMPT_LEN + max(new_tokens, 12) + 1,
        max_running=max(*batches, 5),
        max_tokens_per_step=max(8192, max(batches)) if not options.smoke else 1024,
    )
    limits = Limits(batches, new_tokens, rounds, started + options.seconds)
    rows: list[Row] = []
    for name, shape in shapes.items():
        rows += bench_model(name, shape, modes, before, limits, config)
    result: dict[str, object] = {
        "command": "python -m loadtests.engine_bench " + " ".join(arguments or sys.argv[1:]),
        "machine": describe(),
        "copy_gb_per_s": {"before": round(before / 1e9, 1)},
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    text = f"`{result['command']}`\n\n{json.dumps(result['machine'])}\n\ncopy: {before / 1e9:.0f} GB/s\n\n{table(rows)}"
    print(text)
    print(json.dumps(result))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.save}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{options.save}.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
