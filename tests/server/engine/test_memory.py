"""How big the block pool becomes, and what is said when it cannot be."""

from __future__ import annotations

import pytest
import torch

from kernels.ops import KVCacheSpec
from models.config import ModelConfig
from server.engine.build import check_length
from server.engine.config import EngineConfig, StartupError
from server.engine.memory import (
    GRAPH_BYTES,
    GpuUse,
    MemorySettingError,
    available_memory_bytes,
    check_weights,
    plan_gpu_kv_cache,
    plan_kv_cache,
)

SPECS = [KVCacheSpec(num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16)] * 3
BLOCK = 3 * 2 * 16 * 2 * 64 * 2  # layers, K and V, tokens, heads, head size, bytes


def test_unasked_it_is_what_the_running_requests_can_fill() -> None:
    plan = plan_kv_cache(SPECS, EngineConfig(max_running=4), max_positions=1000, free_bytes=1 << 40)
    assert (plan.num_blocks, plan.max_model_len) == (4 * 63, 1000)
    assert plan.kv_cache_bytes == plan.num_blocks * BLOCK


def test_longrope_beyond_its_first_length_is_refused_by_name() -> None:
    """Its config.json promises more positions than are served, so the usual message would be of no help."""
    phi3 = {
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    }
    model = ModelConfig.from_hf(phi3)
    check_length(EngineConfig(max_model_len=4096), model)
    with pytest.raises(StartupError, match=r"--max-model-len 4097 is not supported.*longrope.*beyond 4096 tokens"):
        check_length(EngineConfig(max_model_len=4097), model)


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


GIB = 1 << 30
LARGE = [KVCacheSpec(num_kv_heads=8, head_dim=128, block_size=64, dtype=torch.bfloat16)] * 32
LARGE_BLOCK = 32 * 2 * 64 * 8 * 128 * 2


def use(weights: int = 16 * GIB, total: int = 24 * GIB) -> GpuUse:
    return GpuUse(total=total, foreign=GIB // 2, weights=weights, peak=weights + GIB // 4, num_graphs=11)


def test_the_gpu_is_shared_out_to_the_last_byte() -> None:
    room = use()
    taken = room.foreign + room.peak + room.graph_reserve + room.kv_budget(0.9)
    assert taken == int(0.9 * room.total)
    assert room.graph_reserve == 11 * GRAPH_BYTES + GIB // 4
    many = EngineConfig(max_running=4096)
    plan = plan_gpu_kv_cache(SPECS, many, 131072, room)
    assert room.kv_budget(0.9) - BLOCK < plan.kv_cache_bytes <= room.kv_budget(0.9)
    less = plan_gpu_kv_cache(SPECS, EngineConfig(max_running=4096, gpu_memory_fraction=0.8), 131072, room)
    assert less.kv_cache_bytes < plan.kv_cache_bytes
    asked = plan_gpu_kv_cache(SPECS, EngineConfig(kv_cache_bytes=GIB), 131072, room)
    assert asked.kv_cache_bytes <= GIB


def test_a_full_gpu_says_what_is_missing_and_what_would_make_room() -> None:
    config = EngineConfig(max_model_len=100_000)
    full = use()
    with pytest.raises(MemorySettingError) as caught:
        plan_gpu_kv_cache(LARGE, config, 131072, full)
    message = str(caught.value)
    needed = -(-100_000 // 64) * LARGE_BLOCK
    assert f"{(needed - full.kv_budget(0.9)) / 2**20:,.0f} MiB are missing" in message
    assert "\n" not in message
    ways = message.partition("What makes room: ")[2].split(", ")
    assert ways[0].startswith("--max-model-len")
    fitting = int(ways[0].split()[1])
    assert plan_gpu_kv_cache(LARGE, EngineConfig(max_model_len=fitting), 131072, full).max_model_len == fitting
    assert "--quantization w8a16" in ways
    assert "--kv-cache-dtype int8" in ways
    with pytest.raises(MemorySettingError, match="What makes room: ") as caught:
        plan_gpu_kv_cache(LARGE, EngineConfig(quantization="w8a16", kv_cache_dtype="int8"), 131072, use(22 * GIB))
    assert "w8a16" not in str(caught.value)
    with pytest.raises(MemorySettingError, match=r"the model was made for$"):
        plan_gpu_kv_cache(SPECS, EngineConfig(max_model_len=131073), 131072, use())


def test_weights_that_cannot_fit_are_refused_before_they_are_loaded() -> None:
    check_weights(8 * 10**9, 2, EngineConfig(), 17 * GIB)
    with pytest.raises(MemorySettingError, match=r"are missing; --quantization w8a16 would take about 7,629 MiB"):
        check_weights(8 * 10**9, 2, EngineConfig(), 10 * GIB)
    check_weights(8 * 10**9, 2, EngineConfig(quantization="w8a8"), 10 * GIB)
    with pytest.raises(MemorySettingError, match=r"are missing$"):
        check_weights(8 * 10**9, 2, EngineConfig(), 5 * GIB)
