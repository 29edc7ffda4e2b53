"""Shapes and inputs shared by the tests of the backends."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int8 import dequantize_rows
from kernels.ops import AttentionMetadata, KVCache, KVCacheSpec, Ops, RotaryTable, SamplingMetadata
from kernels.portable.kv_cache import PortableKVCache
from kernels.portable.plan import PortablePlan

DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Layer:
    """What the tests need to know of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    rotary_dim: int | None = None

    def spec(self, dtype: torch.dtype) -> KVCacheSpec:
        return KVCacheSpec(self.kv_heads, self.head_dim, self.block_size, dtype, self.window)

    def rotary(self, positions: int) -> RotaryTable:
        generator = torch.Generator().manual_seed(3)
        dim = self.rotary_dim or self.head_dim
        angles = torch.rand(positions, dim // 2, generator=generator) * 6.3
        return RotaryTable(angles.cos(), angles.sin())

    def packed(self, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
        """A packed projection [tokens, (Hq + 2 Hkv) * D]."""
        generator = torch.Generator().manual_seed(seed)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        return torch.randn(tokens, width, generator=generator).to(dtype)

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as views of the packed projection."""
        dim = self.head_dim
        query, key, value = packed.split([self.heads * dim, self.kv_heads * dim, self.kv_heads * dim], dim=-1)
        return query.unflatten(-1, (-1, dim)), key.unflatten(-1, (-1, dim)), value.unflatten(-1, (-1, dim))


def attention_step(
    ops: Ops, layer: Layer, cache: KVCache, metadata: AttentionMetadata, packed: Tensor, rotary: RotaryTable
) -> tuple[Tensor, Tensor, object]:
    """One layer of one step: (rotated query, attention output, plan)."""
    plan = ops.plan(metadata)
    query = ops.write_kv(*layer.split(packed), rotary, cache, plan)
    output = ops.paged_attention(query, cache, plan, layer.head_dim**-0.5, layer.softcap)
    return query, output, plan


def stored(cache: PortableKVCache, plan: PortablePlan) -> Tensor:
    """Keys and values of the step's new tokens, dequantized: [2, T, Hkv, D]."""
    index = plan.write_index(cache)
    rows = cache.token_rows.index_select(0, index)
    if cache.scales is not None:
        rows = dequantize_rows(rows, cache.scales.view(-1).index_select(0, index))
    return rows.view(2, plan.num_tokens, cache.spec.num_kv_heads, cache.spec.head_dim)


def poison(cache: PortableKVCache) -> None:
    """Fill a cache with what dead requests may have left in it: NaN, in int8 in its scales."""
    (cache.data if cache.scales is None else cache.scales).fill_(float("nan"))


def block_table(seq_len: int, block_size: int, free: list[int]) -> list[int]:
    """Take the blocks of a sequence from a shuffled free list."""
    return [free.pop() for _ in range(-(-seq_len // block_size))]


def sampling(rows: int, **fields: object) -> SamplingMetadata:
    """Sampling metadata with every filter off, except for the given fields (a value for all rows, or one a row)."""
    values: dict[str, object] = {
        "seeds": list(range(100, 100 + rows)),
        "positions": 0,
        "choices": 0,
        "temperatures": 1.0,
        "top_ks": 0,
        "top_ps": 1.0,
        "min_ps": 0.0,
        "typical_ps": 1.0,
        "repetition_penalties": 1.0,
        "presence_penalties": 0.0,
        "frequency_penalties": 0.0,
    }
    values.update(fields)
    not_by_row = {"biases", "allowed", "prompt_tokens", "output_tokens", "masks"}
    full = {k: v if k in not_by_row or isinstance(v, list) else [v] * rows for k, v in values.items()}
    return SamplingMetadata(**full)  # type: ignore[arg-type]


def random_sampling(rng: random.Random, rows: int, vocab: int) -> SamplingMetadata:
    """Every filter on or off at random, biases, allowed ids and penalties among them."""

    def each(*options: object) -> list[object]:
        return [rng.choice(options) for _ in range(rows)]

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    return sampling(
        rows,
        seeds=[rng.getrandbits(64) for _ in range(rows)],
        positions=[rng.randrange(5000) for _ in range(rows)],
        choices=[rng.randrange(4) for _ in range(rows)],
        temperatures=each(0.0, 0.3, 0.7, 1.0, 1.0, 1.7),
        top_ks=each(0, 0, 1, 5, 50, vocab, vocab + 9),
        top_ps=each(1.0, 1.0, 0.95, 0.5, 1e-3, 0.0),
        min_ps=each(0.0, 0.0, 0.05, 0.5, 1.0),
        typical_ps=each(1.0, 1.0, 0.9, 0.2, 0.0),
        repetition_penalties=each(1.0, 1.3, 0.8),
        presence_penalties=each(0.0, 0.6, -0.4),
        frequency_penalties=each(0.0, 0.3),
        biases=[
            (rng.randrange(rows), rng.randrange(vocab), rng.choice([float("-inf"), 2.5, -4.0]))
            for _ in range(rng.choice([0, 0, 8]))
        ],
        allowed={rng.randrange(rows): ids(4)} if rng.random() < 0.2 else {},
        prompt_tokens={row: ids(6) for row in range(rows)},
        output_tokens={row: ids(6) for row in range(rows)},
    )
