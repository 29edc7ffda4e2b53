"""How big the block pool becomes, and what is said when it cannot be."""

from __future__ import annotations

import pytest
import torch

from kernels.ops import KVCacheSpec
from server.engine.config import EngineConfig
from server.engine.memory import MemorySettingError, available_memory_bytes, plan_kv_cache

SPECS = [KVCacheSpec(num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16)] * 3
BLOCK = 3 * 2 * 16 * 2 * 64 * 2  # layers, K and V, tokens, heads, head size, bytes


def test_unasked_it_is_what_the_running_requests_can_fill() -> None:
    plan = plan_kv_cache(SPECS, EngineConfig(max_running=4), max_positions=1000, free_bytes=1 << 40)
    assert (plan.num_blocks, plan.max_model_len) == (4 * 63, 1000)
    assert plan.kv_cache_bytes == plan.num_blocks * BLOCK


def test_scarce_memory_gives_fewer_blocks_then_a_shorter_context() -> None:
    plan = plan_kv_cache(SPECS, EngineConfig(), max_positions=1000, free_bytes=200 * BLOCK)
    assert (plan.num_blocks, plan.max_model_len) == (100, 1000)
    plan = plan_kv_cache(SPECS, EngineConfig(), max_positions=1000, free_bytes=20 * BLOCK)
    assert (plan.num_blocks, plan.max_model_len) == (10, 160)


def test_what_is_asked_for_is_given_or_refused_with_the_numbers() -> None:
    plan = plan_kv_cache(SPECS, EngineConfig(kv_cache_bytes=70 * BLOCK + 5), max_positions=1000, free_bytes=1 << 40)
    assert plan.num_blocks == 70
    with pytest.raises(MemorySettingError, match="1000 positions"):
        plan_kv_cache(SPECS, EngineConfig(max_model_len=1001), max_positions=1000, free_bytes=1 << 40)
    with pytest.raises(MemorySettingError, match="only 1 MiB are free"):
        plan_kv_cache(SPECS, EngineConfig(kv_cache_bytes=1 << 30), max_positions=1000, free_bytes=1 << 20)
    with pytest.raises(MemorySettingError, match="enough for 160 tokens"):
        plan_kv_cache(SPECS, EngineConfig(max_model_len=900), max_positions=1000, free_bytes=20 * BLOCK)
    with pytest.raises(MemorySettingError, match="enough for 0 tokens"):
        plan_kv_cache(SPECS, EngineConfig(), max_positions=1000, free_bytes=BLOCK)


def test_there_is_memory() -> None:
    assert 1 << 28 < available_memory_bytes() < 1 << 50
