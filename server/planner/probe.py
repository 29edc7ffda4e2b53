"""Measures the device that the engine would use: `python -m server.planner.probe`, a process of its own.

It needs torch, which the HTTP process must never import, and it loads the machine for some seconds. What it times is
what the engine runs: the device's own operators, and whole steps of small models through EngineCore. A disturbance only
ever makes something slower, so of several rounds the quickest counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from kernels.ops import (
    Activations,
    AttentionMetadata,
    KVCacheSpec,
    Ops,
    QuantizationMode,
    QuantizedWeight,
    RotaryTable,
    SamplingMetadata,
)
from models.config import ModelConfig
from models.loader import random_model
from models.rules import DTYPES
from server.engine.build import start_core
from server.engine.config import EngineConfig, StartupError
from server.engine.core import EngineCore
from server.engine.device import Device, make_device
from server.engine.dtypes import dtype_name
from server.engine.memory import MemorySettingError
from server.engine.request import Request, SamplingParams
from server.planner.rates import LinearCurve, MeasuredRates
from server.planner.sizes import Backend
from server.planner.speed import SpeedModel

# Square weights: their side, and how many. 2 million weights fit the caches of most processors, 8 million those of
# many, the others none. The sides are those of models with so many weights: out of memory, many small ones are read
# more slowly than a few large ones (pages, prefetching).
_SETS = ((512, 8), (512, 32), (1024, 32), (2048, 24))
# Rows that they are multiplied with. From _COMPUTE_ROWS on it is the arithmetic that takes the time, wherever the
# weights lie: that is measured on the first set alone.
_ALL_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FEW_ROWS = (1, 4, 16)
_COMPUTE_ROWS = _FEW_ROWS[-1]
_BANDWIDTH_BYTES = 1 << 28
_LAYERS = (2, 10)
_SEQUENCES = (1, 16)
_PROMPT_TOKENS, _NEW_TOKENS = 8, 40


def main(arguments: list[str]) -> int:
    """Print what the device is and, if asked to, how fast: one JSON object. Exit code 2 if there is no such device.

    arguments: a JSON object with device, dtype, threads (as in EngineConfig) and measure (true or false).
    """
    asked = json.loads(arguments[0])
    config = EngineConfig(device=asked["device"], dtype=asked["dtype"], threads=asked["threads"])
    try:
        device = make_device(config)
        found: dict[str, Any] = {"backend": dataclasses.asdict(describe(device)), **_machine(device)}
        if asked["measure"]:
            found["rates"] = dataclasses.asdict(measure(device, config))
    except (StartupError, MemorySettingError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


def describe(device: Device) -> Backend:
    """How this device keeps a model: asked of the device and of its operators, not assumed."""
    ops = device.ops
    weight_dtype: torch.dtype | None = getattr(ops, "weight_dtype", ops.dtype)
    team = getattr(ops, "team", None)
    return Backend(
        name=device.describe()["backend"],
        weight_dtype=None if weight_dtype is None else dtype_name(weight_dtype),
        activation_dtype=dtype_name(ops.dtype),
        kv_dtypes=_kv_dtypes(device),
        modes=tuple(_modes(ops)),
        block_size=device.block_size,
        dot_group=4 if team is None else team.group_of,
        keeps_table=_keeps_table(ops),
    )


def _machine(device: Device) -> dict[str, Any]:
    """What else the plan needs: the device in words, and what memory it has or an engine takes before it loads."""
    described = device.describe()
    on_gpu = device.ops.device.type == "cuda"
    return {
        "device": described["device"],
        "instruction_set": described["instruction_set"],
        "threads": described["threads"],
        "gpu_memory": torch.cuda.mem_get_info()[1] if on_gpu else None,
        "process_bytes": 0 if on_gpu else _own_bytes(),
    }


def _own_bytes() -> int:
    """Memory of this process that is not a file's: a file's pages count as available, they can be read again."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _kv_dtypes(device: Device) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for asked in ("auto", "bf16", "int8"):
        for stored in DTYPES:
            try:
                dtype = device.kv_cache_dtype(asked, _small_config(1, stored))
                device.ops.allocate_kv_cache(KVCacheSpec(1, 64, device.block_size, dtype), 1)
            except (StartupError, ValueError):
                continue  # this device does not have it, which is what was asked
            found.setdefault(asked, {})[stored] = dtype_name(dtype)
    return found


def _keeps_table(ops: Ops) -> bool:
    weight = torch.zeros(16, 64, dtype=torch.bfloat16)
    return ops.prepare_linear(weight, None, "none", True).nbytes > ops.prepare_linear(weight, None, "none").nbytes


def _modes(ops: Ops) -> list[QuantizationMode]:
    found: list[QuantizationMode] = []
    for mode in get_args(QuantizationMode):
        try:
            ops.prepare_linear(torch.zeros(16, 64, dtype=torch.bfloat16), None, mode)
        except ValueError:
            continue
        found.append(mode)
    return found


@torch.inference_mode()
def measure(device: Device, config: EngineConfig, now: Callable[[], float] = time.perf_counter) -> MeasuredRates:
    """Time the parts of a step. Takes some seconds, and up to 400 MB.

    now: the clock, in seconds. On a machine that others use too, time.process_time disturbs one thread less.
    """
    clock = _Clock(device.ops, now)
    linears: dict[str, tuple[LinearCurve, ...]] = {
        mode: _linears(device.ops, mode, clock) for mode in _modes(device.ops)
    }
    found = MeasuredRates(
        bandwidth=_bandwidth(device, clock),
        linears=linears,
        attention_rates=_attention(device, clock),
        elementwise_seconds=_elementwise(device, clock),
        sampling_seconds=_sampling(device.ops, clock),
        step_seconds=0.0,
        layer_seconds=0.0,
        row_seconds=0.0,
        row_layer_seconds=0.0,
    )
    step, layer, row, row_layer = _overheads(device, config, found, now)
    found = dataclasses.replace(
        found, step_seconds=step, layer_seconds=layer, row_seconds=row, row_layer_seconds=row_layer
    )
    return dataclasses.replace(found, whole_step_factor=_whole_step_factor(device, config, found, now))


class _Clock:
    """Times calls on a device that may compute beside the host."""

    def __init__(self, ops: Ops, now: Callable[[], float]) -> None:
        self._on_gpu = ops.device.type == "cuda" and torch.cuda.is_available()
        self._now = now

    def best(self, function: Callable[[], object], rounds: int = 5, at_least: float = 0.004) -> float:
        """Seconds of one call, of the quickest of `rounds` rounds of at least so many seconds each."""
        function()  # the first call may make buffers, or compile
        calls = max(1, round(at_least / max(self._timed(function, 1), 1e-7)))
        return min(self._timed(function, calls) for _ in range(rounds)) / calls

    def _timed(self, function: Callable[[], object], calls: int) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        began = self._now()
        for _ in range(calls):
            function()
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._now() - began


def _bandwidth(device: Device, clock: _Clock) -> float:
    """Bytes a second at which all threads together read a buffer far larger than the caches."""
    buffer = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device.ops.device)
    before = torch.get_num_threads()
    torch.set_num_threads(max(device.describe()["threads"], 1))
    try:
        return _BANDWIDTH_BYTES / clock.best(buffer.sum, rounds=7, at_least=0.0)
    finally:
        torch.set_num_threads(before)


def _linears(ops: Ops, mode: QuantizationMode, clock: _Clock) -> tuple[LinearCurve, ...]:
    # What a call costs that does nothing: in the engine it is part of a step's cost for each layer.
    def idle(rows: int) -> float:
        weight = ops.prepare_linear(_weight(16, mode), None, mode)
        x = _activations(ops, rows, 16, mode)
        return clock.best(lambda: ops.linear(x, weight))

    curves: list[LinearCurve] = []
    for side, count in _SETS:
        weight = _weight(side, mode)
        prepared = [ops.prepare_linear(weight, None, mode) for _ in range(count)]
        del weight
        seconds: dict[int, float] = {}
        for rows in _FEW_ROWS if curves else _ALL_ROWS:
            x = _activations(ops, rows, side, mode)

            def sweep(x: Activations = x, prepared: list[Any] = prepared) -> None:
                for each in prepared:
                    ops.linear(x, each)

            total = clock.best(sweep, rounds=5 if count * side**2 < 1 << 25 else 3)
            seconds[rows] = max(total - count * idle(rows), total / 10) / (count * side * side)
        if curves:
            scale = seconds[_COMPUTE_ROWS] / curves[0].at(_COMPUTE_ROWS)
            seconds |= {rows: scale * curves[0].at(rows) for rows in _ALL_ROWS if rows > _COMPUTE_ROWS}
        num_bytes = sum(each.nbytes for each in prepared)
        curves.append(LinearCurve(num_bytes, tuple(seconds), tuple(seconds.values())))
    return tuple(curves)


def _weight(side: int, mode: QuantizationMode) -> Tensor | QuantizedWeight:
    generator = torch.Generator().manual_seed(side)
    if mode == "none":
        return (torch.randn(side, side, generator=generator) * 0.02).to(torch.bfloat16)
    values = torch.randint(-127, 128, (side, side), generator=generator, dtype=torch.int8)
    return QuantizedWeight(values, torch.full((side,), 1e-4))


def _activations(ops: Ops, rows: int, width: int, mode: QuantizationMode) -> Activations:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(ops.device, ops.dtype)
    if mode != "w8a8":
        return x
    return ops.rms_norm(x, torch.ones(width, dtype=ops.dtype, device=ops.device), 1e-6, True)


def _attention(device: Device, clock: _Clock) -> dict[str, tuple[float, float]]:
    """Operations a second by KV dtype: eight sequences of 512 tokens that decode, and a prompt of 512 tokens."""
    ops, block_size, tokens, sequences, heads, dim = device.ops, device.block_size, 512, 8, 8, 64
    names = {name for stored in _kv_dtypes(device).values() for name in stored.values()}
    blocks = -(-tokens // block_size)
    found: dict[str, tuple[float, float]] = {}
    for name in sorted(names):
        spec = KVCacheSpec(4, dim, block_size, getattr(torch, name))
        cache = ops.allocate_kv_cache(spec, blocks * sequences)
        tables = [list(range(first * blocks, (first + 1) * blocks)) for first in range(sequences)]
        decode = ops.plan(AttentionMetadata([1] * sequences, [tokens] * sequences, tables, block_size))
        prefill = ops.plan(AttentionMetadata([tokens], [tokens], tables[:1], block_size))
        rates: list[float] = []
        for plan, rows, pairs in (
            (decode, sequences, sequences * tokens),
            (prefill, tokens, tokens * (tokens + 1) // 2),
        ):
            query = torch.randn(rows, heads, dim).to(ops.device, ops.dtype)

            def attend(query: Tensor = query, plan: Any = plan, cache: Any = cache) -> None:
                ops.paged_attention(query, cache, plan, dim**-0.5)

            rates.append(4 * pairs * heads * dim / clock.best(attend))
        found[name] = rates[0], rates[1]
    return found


def _elementwise(device: Device, clock: _Clock) -> float:
    """Seconds for each value that a layer's norms, rotation and gate produce, on 128 tokens."""
    ops, tokens, width, heads, dim = device.ops, 128, 1024, 8, 64
    kv_dtype = device.kv_cache_dtype("auto", _small_config(1, "bfloat16"))
    cache = ops.allocate_kv_cache(KVCacheSpec(heads, dim, device.block_size, kv_dtype), -(-tokens // device.block_size))
    blocks = list(range(cache.num_blocks))
    plan = ops.plan(AttentionMetadata([tokens], [tokens], [blocks], device.block_size))

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(ops.device, ops.dtype)

    x, residual, norm, gate_up = values(tokens, width), values(tokens, width), values(width), values(tokens, 4 * width)
    query, key, value = (values(tokens, heads, dim) for _ in range(3))
    angles = torch.randn(tokens, dim // 2).to(ops.device)
    rotary = RotaryTable(angles.cos(), angles.sin())

    def layer() -> None:
        ops.add_rms_norm(x, residual, norm, 1e-6)
        ops.write_kv(query, key, value, rotary, cache, plan)
        ops.add_rms_norm(x, residual, norm, 1e-6)
        ops.silu_mul(gate_up)

    return clock.best(layer) / (tokens * (2 * width + 3 * heads * dim + 2 * width))


def _sampling(ops: Ops, clock: _Clock) -> float:
    """Seconds for each logit of a greedy draw, on eight rows."""
    rows, vocabulary = 8, 32_000
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(2)).to(ops.device, ops.dtype)
    ones = [1.0] * rows
    zeros = [0.0] * rows
    metadata = SamplingMetadata(
        list(range(rows)), [0] * rows, [0] * rows, zeros, [0] * rows, ones, zeros, ones, ones, zeros, zeros
    )
    return clock.best(lambda: ops.sample(logits, metadata).token_ids.tolist()) / (rows * vocabulary)


def _small_config(layers: int, dtype: str = "bfloat16") -> ModelConfig:
    """A model whose steps are all overhead."""
    return _config(layers, hidden=64, heads=1, inner=128, vocabulary=256, dtype=dtype)


def _config(layers: int, hidden: int, heads: int, inner: int, vocabulary: int, dtype: str = "bfloat16") -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(heads // 2, 1),
            "intermediate_size": inner,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
        }
    )


def _core(device: Device, config: EngineConfig, model_config: ModelConfig) -> EngineCore:
    """An engine with random weights."""
    settings = dataclasses.replace(config, max_running=_SEQUENCES[-1], max_tokens_per_step=256)
    with torch.inference_mode(False):  # as the engine loads it
        model = random_model(model_config, device.ops, seed=0)
        core, _ = start_core(device, model, settings, device.kv_cache_dtype("auto", model_config))
    return core


def _whole_step_factor(device: Device, config: EngineConfig, found: MeasuredRates, now: Callable[[], float]) -> float:
    """How much longer the parts take in the steps of a model of 22 million parameters than they did by themselves:
    there each finds the caches full of the others' data."""
    model_config = _config(6, hidden=512, heads=8, inner=1408, vocabulary=8192)
    core = _core(device, config, model_config)
    backend = describe(device)
    speed = SpeedModel(model_config, backend, found, "none", backend.kv_dtypes["auto"][model_config.dtype])
    factors: list[float] = []
    for rows in _SEQUENCES:
        predicted = speed.decode(rows, _PROMPT_TOKENS + _NEW_TOKENS // 2)
        parts = predicted.seconds - predicted.overhead
        measured = decode_step(core, rows, _PROMPT_TOKENS, _NEW_TOKENS, now)
        factors.append((measured - predicted.overhead) / parts)
    return max(sum(factors) / len(factors), 0.5)


def _overheads(
    device: Device, config: EngineConfig, found: MeasuredRates, now: Callable[[], float]
) -> tuple[float, float, float, float]:
    """What steps of small models take beside their arithmetic: of a step, for each layer, each sequence, each pair."""
    seconds: dict[tuple[int, int], float] = {}
    for layers in _LAYERS:
        model_config = _small_config(layers)
        core = _core(device, config, model_config)
        num_weights = model_config.num_parameters
        for rows in _SEQUENCES:
            arithmetic = found.linear("none", num_weights, 0, 2 * num_weights, rows) + found.sampling(rows * 256)
            measured = decode_step(core, rows, _PROMPT_TOKENS, _NEW_TOKENS, now)
            seconds[layers, rows] = max(measured - arithmetic, 0.0)
    (few, many), (one, all_) = _LAYERS, _SEQUENCES
    row_layer = (seconds[many, all_] - seconds[many, one] - seconds[few, all_] + seconds[few, one]) / (
        (many - few) * (all_ - one)
    )
    row_layer = max(row_layer, 0.0)
    row = max((seconds[few, all_] - seconds[few, one]) / (all_ - one) - few * row_layer, 0.0)
    layer = max((seconds[many, one] - seconds[few, one]) / (many - few) - row_layer, 0.0)
    step = max(seconds[few, one] - few * layer - row - few * row_layer, 0.0)
    return step, layer, row, row_layer


def decode_step(
    core: EngineCore, rows: int, prompt_tokens: int, new_tokens: int, now: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a step in which `rows` sequences decode: the lower quartile of the quickest of three runs.

    core: an idle engine. The sequences are greedy, grow from `prompt_tokens` by `new_tokens`, and share no prefix with
    those of other runs.
    """
    quartiles: list[float] = []
    for _ in range(3):
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        first = time.monotonic_ns()  # ids that no other run has, and salts, so that no prefix is found in the cache
        requests = [
            Request(first + i, [3 + i] * prompt_tokens, params, arrival=i, cache_salt=str(first + i))
            for i in range(rows)
        ]
        for request in requests:
            core.add(request)
        steps: list[float] = []
        while core.has_work:
            decoding = all(request.output_token_ids for request in requests)
            began = now()
            core.step()
            if decoding:
                steps.append(now() - began)
        quartiles.append(sorted(steps)[len(steps) // 4])
    return min(quartiles)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
