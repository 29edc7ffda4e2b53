"""How much memory there is, and how it is shared between weights, KV cache and workspace.

Arithmetic on numbers that the callers bring, so that it can be tested without the device they stand for. No torch: the
planner (server/planner) uses it where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.engine.config import EngineConfig

# The share of the memory still free after loading that the KV cache may take unasked. The rest is for activations, the
# HTTP process, and whatever else the machine is for.
KV_SHARE_OF_FREE = 0.5

# What a captured CUDA graph takes beside the tensors that all of them share: the driver's description of some hundred
# launches. An estimate on the high side (no GPU was at hand to measure it), since the graphs are captured when the KV
# cache is there already. What they took is measured then, and told in stet_memory_bytes{kind="graphs"}.
GRAPH_BYTES = 16 << 20


class MemorySettingError(Exception):
    """The settings ask for more than the machine or the model has: one line for a person, with the numbers."""


class BlockSpec(Protocol):
    """What a layer's part of the cache is made of: a kernels.ops.KVCacheSpec, or the planner's sum of them."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block."""
        ...


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """The size of the block pool. `kv_cache_bytes` is for all layers together."""

    num_blocks: int
    max_model_len: int
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class GpuUse:
    """The GPU's memory after loading, in bytes.

    total       what the GPU has
    foreign     what is taken by others: other processes, and the driver for this one
    weights     what the model holds
    peak        the most that this process held during a worst-case step, weights included, KV cache not
    num_graphs  CUDA graphs to be captured later
    """

    total: int
    foreign: int
    weights: int
    peak: int
    num_graphs: int

    @property
    def graph_reserve(self) -> int:
        """What is kept free for the graphs: their own share, and one worst-case step's tensors once more, since they
        keep theirs in a pool of their own."""
        return self.num_graphs * GRAPH_BYTES + (self.peak - self.weights if self.num_graphs else 0)

    def kv_budget(self, fraction: float) -> int:
        """What is left for the KV cache when all together may take `fraction` of the GPU; below 0 if nothing is."""
        return int(self.total * fraction) - self.foreign - self.peak - self.graph_reserve


def decode_buckets(max_running: int) -> list[int]:
    """The numbers of rows that decode steps are padded to: 1, 2, 4, then multiples of 8, and of 64 above 512, where
    some padding is a small part of a step and every graph takes memory and time to capture."""
    buckets = [1, 2, 4]
    while buckets[-1] < max_running:
        last = buckets[-1]
        buckets.append(8 if last == 4 else last + (8 if last < 512 else 64))
    return [bucket for index, bucket in enumerate(buckets) if index == 0 or buckets[index - 1] < max_running]


def available_memory_bytes() -> int:
    """Bytes that this process may still take: of the machine, or of its control group if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(available, 0)


def plan_kv_cache(
    specs: Sequence[BlockSpec],
    config: EngineConfig,
    max_positions: int,
    free_bytes: int,
    share: float = KV_SHARE_OF_FREE,
) -> KVCachePlan:
    """Decide how many blocks to allocate.

    Unasked: enough for `max_running` sequences of full length, but at most a share of the free memory; a context that
    does not fit then is shortened. Asked for (`--kv-cache-memory`, `--max-model-len`), it must fit, else
    MemorySettingError says what would.
    """
    block_size = specs[0].block_size
    block_bytes = sum(spec.bytes_per_block for spec in specs)
    wanted_len = config.max_model_len or max_positions
    if wanted_len > max_positions:
        raise MemorySettingError(
            f"--max-model-len {wanted_len} exceeds the {max_positions} positions that the model was made for"
        )
    if config.kv_cache_bytes is not None and config.kv_cache_bytes > free_bytes:
        raise MemorySettingError(
            f"--kv-cache-memory asks for {_mib(config.kv_cache_bytes)}, but only {_mib(free_bytes)} are free"
        )
    budget = config.kv_cache_bytes if config.kv_cache_bytes is not None else int(free_bytes * share)
    budget = max(budget, 0)
    blocks_per_sequence = -(-wanted_len // block_size)
    num_blocks = budget // block_bytes
    if config.kv_cache_bytes is None:
        num_blocks = min(num_blocks, config.max_running * blocks_per_sequence)
    if num_blocks < blocks_per_sequence:
        fitting = num_blocks * block_size
        if config.max_model_len is not None or fitting < block_size:
            raise MemorySettingError(
                f"a sequence of {wanted_len} tokens needs {_mib(blocks_per_sequence * block_bytes)} of KV cache, but "
                f"{_mib(budget)} are to be had, enough for {fitting} tokens: set --max-model-len or --kv-cache-memory"
            )
        wanted_len = fitting
    return KVCachePlan(num_blocks, wanted_len, num_blocks * block_bytes)


def plan_gpu_kv_cache(specs: Sequence[BlockSpec], config: EngineConfig, max_positions: int, use: GpuUse) -> KVCachePlan:
    """`plan_kv_cache` within the engine's share of a GPU. MemorySettingError says how much is missing, and which
    settings would make room."""
    fraction = config.gpu_memory_fraction
    # What is asked for by its size may exceed the engine's share, but not the GPU.
    free = use.kv_budget(fraction if config.kv_cache_bytes is None else 1.0)
    try:
        return plan_kv_cache(specs, config, max_positions, free, share=1.0)
    except MemorySettingError as error:
        wanted_len = config.max_model_len or max_positions
        if wanted_len > max_positions:
            raise
        block_bytes, block_size = sum(spec.bytes_per_block for spec in specs), specs[0].block_size
        smallest = wanted_len if config.max_model_len is not None else block_size
        needed = config.kv_cache_bytes or -(-smallest // block_size) * block_bytes
        raise MemorySettingError(
            f"{error}. {_mib(needed - free)} are missing: of {_mib(use.total)} on the GPU, --gpu-memory-fraction "
            f"allows {_mib(int(use.total * fraction))}; others hold {_mib(use.foreign)}, the weights "
            f"{_mib(use.weights)}, a step {_mib(use.peak - use.weights)}, and {_mib(use.graph_reserve)} are kept for "
            f"graphs. What makes room: {', '.join(_ways_out(config, specs, use, needed - free))}"
        ) from None


def _ways_out(config: EngineConfig, specs: Sequence[BlockSpec], use: GpuUse, missing: int) -> list[str]:
    """Settings that would save memory, those that suffice by themselves first."""
    block_bytes = sum(spec.bytes_per_block for spec in specs)
    ways: list[tuple[bool, str]] = []
    fitting = max(use.kv_budget(config.gpu_memory_fraction), 0) // block_bytes * specs[0].block_size
    if config.max_model_len is not None and fitting:
        ways.append((True, f"--max-model-len {fitting}"))
    if config.quantization in (None, "none"):
        ways.append((use.weights * 0.45 >= missing, "--quantization w8a16"))
    if config.kv_cache_dtype != "int8":
        ways.append((False, "--kv-cache-dtype int8"))
    if config.gpu_memory_fraction < 0.95:
        ways.append((use.total * (0.95 - config.gpu_memory_fraction) >= missing, "--gpu-memory-fraction 0.95"))
    ways.append(((use.peak - use.weights) / 2 >= missing, f"--max-tokens-per-step {config.max_tokens_per_step // 2}"))
    ways.append((False, "a smaller --max-running"))
    return [way for _, way in sorted(ways, key=lambda each: not each[0])]


def check_weights(num_parameters: int, itemsize: int, config: EngineConfig, free_bytes: int) -> None:
    """MemorySettingError if a model's weights cannot fit into what is free on the GPU.

    itemsize: bytes of an unquantized parameter. Quantized ones are counted as one byte; what stays unquantized (the
    embedding table) makes the true size larger, so a model that passes may still run out of memory.
    """
    needed = num_parameters * (itemsize if config.quantization in (None, "none") else 1)
    if needed <= free_bytes:
        return
    message = (
        f"the weights of {config.model} take at least {_mib(needed)}, but {_mib(free_bytes)} are free on the GPU: "
        f"{_mib(needed - free_bytes)} are missing"
    )
    if config.quantization in (None, "none") and num_parameters <= free_bytes:
        message += f"; --quantization w8a16 would take about {_mib(num_parameters)}"
    raise MemorySettingError(message)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
