"""A token's bits do not depend on how it was computed: whole, in chunks, token by token, alone or among strangers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionMetadata, QuantizationMode
from tests.kernels.cases import Layer, attention_step, block_table

LENGTH = 290
LAYERS = [
    Layer(12, 4, 64),
    Layer(4, 4, 80, block_size=32),
    Layer(8, 1, 96, window=100),
    Layer(3, 1, 128, window=40, softcap=30.0),
    Layer(28, 1, 16),
]


@pytest.mark.parametrize("mode", ["none", "w8a16", "w8a8"])
def test_rows_of_linear_stand(mode: QuantizationMode) -> None:
    ops, x = CpuOps(2), torch.randn(300, 200)
    weight = ops.prepare_linear(torch.randn(90, 200).bfloat16(), None, mode)
    expected = ops.linear(x, weight)
    for rows in (*range(1, 20), 24, 25, 97, 299):
        assert torch.equal(ops.linear(x[:rows], weight), expected[:rows])
        assert torch.equal(ops.linear(x[-rows:], weight), expected[-rows:])


def run(layer: Layer, dtype: torch.dtype, chunks: list[int], strangers: int, seed: int) -> tuple[Tensor, Tensor]:
    """(queries, outputs) of one sequence's tokens, computed in these chunks among strangers, in a cache that held
    the NaN of a dead request before."""
    ops, rng, size = CpuOps(2), random.Random(seed), layer.block_size
    num_blocks = 64 + 40 * strangers
    cache = ops.allocate_kv_cache(layer.spec(dtype), num_blocks)
    if dtype == torch.int8:
        cache.key_scales.fill_(float("nan"))  # type: ignore[union-attr]
        cache.value_scales.fill_(float("nan"))  # type: ignore[union-attr]
    else:
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    packed, rotary = layer.packed(sum(chunks), torch.float32, seed=1), layer.rotary(1024)
    free = rng.sample(range(num_blocks), num_blocks)
    own_table = block_table(sum(chunks), size, free)
    tables = [block_table(600, size, free) for _ in range(strangers)]
    others, done, results = [0] * strangers, 0, []
    for chunk in chunks:
        sequences = [(chunk, done + chunk, own_table, packed[done : done + chunk])]
        for i in range(strangers):
            new = rng.choice([1] * 12 + [2, 37, 140]) if others[i] else rng.choice([1, 5, 130])
            if others[i] + new > 600:
                others[i], new = 0, 1
            others[i] += new
            sequences.append((new, others[i], tables[i], layer.packed(new, torch.float32, rng.randrange(1 << 30))))
        place = rng.randrange(len(sequences))
        sequences[0], sequences[place] = sequences[place], sequences[0]
        first = sum(sequence[0] for sequence in sequences[:place])
        lens, seq_lens, block_tables, rows = zip(*sequences, strict=True)
        metadata = AttentionMetadata(lens, seq_lens, block_tables, size)
        query, output, _ = attention_step(ops, layer, cache, metadata, torch.cat(list(rows)), rotary)
        results.append((query[first : first + chunk].clone(), output[first : first + chunk].clone()))
        done += chunk
    queries, outputs = zip(*results, strict=True)
    return torch.cat(queries), torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_attention_stands(layer: Layer, dtype: torch.dtype) -> None:
    expected = run(layer, dtype, [LENGTH], strangers=0, seed=0)
    assert expected[1].isfinite().all()
    runs = {
        "whole among others": ([LENGTH], 3),
        "chunks alone": ([1, 3, 50, 3, 1, 100, 64, 68], 0),
        "chunks among others": ([16, 17, 100, 1, 16, 100, 40], 2),
        "prompt, then decode": ([120] + [1] * 170, 1),
    }
    for name, (chunks, strangers) in runs.items():
        for part, got, want in zip(
            ("query", "output"), run(layer, dtype, chunks, strangers, seed=len(chunks)), expected, strict=True
        ):
            assert torch.equal(got, want), f"{name}: {part}"


def test_blocks_behind_the_window_may_be_gone() -> None:
    """Their entries in the block table may name blocks of others, or of nobody."""
    layer, ops = Layer(4, 2, 64, window=40), CpuOps(2)
    packed, rotary, table = layer.packed(220, torch.float32, seed=0), layer.rotary(256), list(range(14))
    outputs = []
    for gone in (False, True):
        cache = ops.allocate_kv_cache(layer.spec(torch.float32), 16)
        attention_step(ops, layer, cache, AttentionMetadata([199], [199], [table], 16), packed[:199], rotary)
        if gone:
            behind = (199 - 40 + 1) // 16 * 2 * 16 * 64
            cache.keys[:behind] = float("nan")
            cache.values[:behind] = float("nan")
        rest = AttentionMetadata([21], [220], [table], 16)
        outputs.append(attention_step(ops, layer, cache, rest, packed[199:], rotary)[1])
    assert torch.equal(outputs[0], outputs[1])


def test_a_dead_sequence_touches_no_other() -> None:
    """A request of NaN in the same step, and then its freed, partly filled block in a new owner's hands."""
    layer, ops = Layer(6, 2, 64), CpuOps(2)
    cache, rotary = ops.allocate_kv_cache(layer.spec(torch.bfloat16), 8), layer.rotary(64)
    packed = layer.packed(10, torch.float32, seed=0)
    clean = attention_step(ops, layer, cache, AttentionMetadata([10], [10], [[1]], 16), packed, rotary)[1]
    both = torch.cat([torch.full_like(packed, float("nan")), packed])
    metadata = AttentionMetadata([10, 10], [10, 10], [[3], [1]], 16)
    output = attention_step(ops, layer, cache, metadata, both, rotary)[1]
    assert output[:10].isnan().all()
    assert torch.equal(output[10:], clean)
    reused = AttentionMetadata([3, 7], [3, 7], [[3], [5]], 16)
    assert torch.equal(attention_step(ops, layer, cache, reused, packed, rotary)[1][:3], clean[:3])
