"""How much memory there is, and how it is shared between weights, KV cache and workspace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.ops import KVCacheSpec
from server.engine.config import EngineConfig

# The share of the memory still free after loading that the KV cache may take unasked. The rest is for activations, the
# HTTP process, and whatever else the machine is for.
KV_SHARE_OF_FREE = 0.5


class MemorySettingError(Exception):
    """The settings ask for more than the machine or the model has: one line for a person, with the numbers."""


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """The size of the block pool. `kv_cache_bytes` is for all layers together."""

    num_blocks: int
    max_model_len: int
    kv_cache_bytes: int


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
    specs: Sequence[KVCacheSpec], config: EngineConfig, max_positions: int, free_bytes: int
) -> KVCachePlan:
    """Decide how many blocks to allocate.

    Unasked: enough for `max_running` sequences of full length, but at most a share of the free memory; a context that
    does not fit then is shortened. Asked for (`--kv-cache-memory`, `--max-model-len`), it must fit, else
    MemorySettingError says what would.
    """
    block_size = config.block_size
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
    budget = config.kv_cache_bytes if config.kv_cache_bytes is not None else int(free_bytes * KV_SHARE_OF_FREE)
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


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
