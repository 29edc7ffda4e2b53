"""Each operation of CpuOps gives what ReferenceOps gives, and one set of bits on every instruction set and number of
threads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import philox
from kernels.cpu.native import Team
from kernels.cpu.ops import CpuOps
from kernels.cpu.sampling import random_31_bits
from kernels.int8 import quantize_rows
from kernels.ops import AttentionMetadata, QuantizationMode, QuantizedActivations, QuantizedWeight
from kernels.reference import ReferenceOps
from tests.kernels.cases import Layer, attention_step, block_table, sampling

REFERENCE = ReferenceOps()
MODES: list[QuantizationMode] = ["none", "w8a16", "w8a8"]


def available() -> list[str]:
    """The instruction sets that this processor has, the best first."""
    best = Team(1).kernels
    return list(dict.fromkeys([best, "avx2", "generic"] if best != "generic" else [best]))


EVERY_OPS = [CpuOps(2), CpuOps(1), CpuOps(3)] + [CpuOps(2, kernels=name) for name in available()[1:]]


def same(compute: Callable[[CpuOps], Tensor]) -> Tensor:
    """The result, after seeing that all of them have the same bits."""
    first, *others = (compute(ops) for ops in EVERY_OPS)
    for ops, other in zip(EVERY_OPS[1:], others, strict=True):
        assert torch.equal(other.nan_to_num(7.0), first.nan_to_num(7.0)), (ops.team.kernels, ops.team.num_threads)
    return first


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


SHAPES = [
    *((1, 64, 64), (2, 1, 1), (3, 33, 50), (7, 100, 97), (33, 250, 130), (5, 17, 7), (130, 48, 1030)),
    *((16, 130, 65), (18, 64, 200), (20, 33, 64)),  # with AVX-512 in tiles of 8, 9 and 10 rows; those above 11 and 12
]


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_linear(rows: int, n: int, k: int, mode: QuantizationMode) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(rows, k), torch.randn(n, k)
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if mode == "none" else (torch.bfloat16,):
        for bias in (None, torch.randn(n).to(dtype)):
            stored = weight.to(dtype)
            expected = REFERENCE.linear(x, REFERENCE.prepare_linear(stored, bias, mode))

            def compute(ops: CpuOps, stored: Tensor = stored, bias: Tensor | None = bias) -> Tensor:
                return ops.linear(x, ops.prepare_linear(stored, bias, mode))

            close(same(compute), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_shows_in_its_row(mode: QuantizationMode, bad: float) -> None:
    """In decode the engine looks at the logits alone (server/engine/runner.py)."""
    x, weight = torch.randn(3, 50), torch.randn(33, 50).bfloat16()
    x[1, 7] = bad
    y = same(lambda ops: ops.linear(x, ops.prepare_linear(weight, None, mode)))
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_rows_can_be_read_back(mode: QuantizationMode) -> None:
    weight, ids = torch.randn(37, 21).bfloat16(), torch.tensor([36, 0, 5, 5, 16])
    expected = REFERENCE.embedding(ids, REFERENCE.prepare_linear(weight, None, mode))
    assert torch.equal(same(lambda ops: ops.embedding(ids, ops.prepare_linear(weight, None, mode))), expected)
    scaled = same(lambda ops: ops.embedding(ids, ops.prepare_linear(weight, None, mode), 55.5))
    assert torch.equal(scaled, expected * 55.5)


def test_int8_products_are_exact() -> None:
    """The largest integers there are, all of one sign: pairs of them exceed 16 bits."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (40, 4096), generator=rng, dtype=torch.int8)
    values[:8] = 127
    values[8:12] = -127
    weight = QuantizedWeight(values, torch.ones(40))
    rows = torch.randint(-127, 128, (9, 4096), generator=rng, dtype=torch.int8)
    rows[:3] = 127
    rows[3:5] = -127
    x = QuantizedActivations(rows, torch.ones(9))
    exact = (rows.double() @ values.double().T).float()
    assert torch.equal(same(lambda ops: ops.linear(x, ops.prepare_linear(weight, None, "w8a8"))), exact)
    # -128 is no value of this project's, but other quantizers' checkpoints hold it.
    lowest = QuantizedWeight(torch.full((16, 64), -128, dtype=torch.int8), torch.ones(16))
    x = QuantizedActivations(torch.full((2, 64), -127, dtype=torch.int8), torch.ones(2))
    result = same(lambda ops: ops.linear(x, ops.prepare_linear(lowest, None, "w8a8")))
    assert torch.equal(result, torch.full((2, 16), 128.0 * 127 * 64))


def test_inexact_integer_products_are_noticed_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor, or an emulator, whose sums saturate at 16 bits as AVX2's own product of bytes does."""
    assert all(ops.int8_is_exact for ops in EVERY_OPS)
    ops = CpuOps(1)
    exact = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, weight: exact(x, weight).clamp(max=2.0**22))
    with pytest.raises(ValueError, match="use 'w8a16'"):
        ops.prepare_linear(torch.randn(3, 4), None, "w8a8")
    ops.prepare_linear(torch.randn(3, 4), None, "w8a16")


def test_a_weight_that_is_quantized_already_is_taken_as_it_is() -> None:
    weight, x = torch.randn(33, 40), torch.randn(3, 40)
    quantized = QuantizedWeight(*quantize_rows(weight))
    for mode in MODES[1:]:
        first = same(lambda ops, mode=mode: ops.linear(x, ops.prepare_linear(weight, None, mode)))  # type: ignore[misc]
        second = same(lambda ops, mode=mode: ops.linear(x, ops.prepare_linear(quantized, None, mode)))  # type: ignore[misc]
        assert torch.equal(first, second)


@pytest.mark.parametrize("width", [1, 16, 50, 257, 768])
def test_norms(width: int) -> None:
    torch.manual_seed(width)
    x, residual, weight = torch.randn(5, width) * 3, torch.randn(5, width), torch.randn(width)
    close(same(lambda ops: ops.rms_norm(x, weight, 1e-6)), REFERENCE.rms_norm(x, weight, 1e-6))
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, 1e-6)
    close(same(lambda ops: ops.add_rms_norm(x, residual, weight, 1e-6)[0]), normed)
    assert torch.equal(same(lambda ops: ops.add_rms_norm(x, residual, weight, 1e-6)[1]), total)


@pytest.mark.parametrize("width", [1, 16, 50, 256])
def test_activations(width: int) -> None:
    torch.manual_seed(width)
    gate_up = torch.randn(4, 2 * width) * 4
    gate_up[0, : width // 2] *= 60  # where e^x leaves float32 on either side
    close(same(lambda ops: ops.silu_mul(gate_up)), REFERENCE.silu_mul(gate_up))
    close(same(lambda ops: ops.gelu_mul(gate_up)), REFERENCE.gelu_mul(gate_up))


@pytest.mark.parametrize("width", [1, 16, 50, 257, 5000])
def test_what_other_families_do_to_rows(width: int) -> None:
    torch.manual_seed(width)
    x, residual, weight, bias = torch.randn(5, width) * 3 + 5, torch.randn(5, width), *torch.randn(2, width)
    for own_bias in (bias, None):
        expected = REFERENCE.layer_norm(x, weight, own_bias, 1e-5)
        close(same(lambda ops, b=own_bias: ops.layer_norm(x, weight, b, 1e-5)), expected, 2e-5)  # type: ignore[misc]
    total = x + residual
    assert torch.equal(same(lambda ops: ops.add(x, residual)), total)
    assert torch.equal(same(lambda ops: ops.add_layer_norm(x, residual, weight, bias, 1e-5)[1]), total)
    normed = same(lambda ops: ops.add_layer_norm(x, residual, weight, bias, 1e-5)[0])
    assert torch.equal(normed, EVERY_OPS[0].layer_norm(total, weight, bias, 1e-5))
    wide = (x - 5) * 20  # where e^x leaves float32 on either side
    for tanh in (True, False):
        close(same(lambda ops, tanh=tanh: ops.gelu(wide, tanh)), REFERENCE.gelu(wide, tanh))  # type: ignore[misc]
    close(same(lambda ops: ops.softcap(wide, 30.0)), REFERENCE.softcap(wide, 30.0))
    both = torch.cat([x, x[:, : width // 2 + 1]], 1)
    query, key = both[:, :width], both[:, width:]
    for part in (0, 1):
        expected = REFERENCE.norm_query_key(query, key, weight, bias[: width // 2 + 1], 1e-5)[part]
        close(
            same(lambda ops, p=part: ops.norm_query_key(query, key, weight, bias[: width // 2 + 1], 1e-5)[p]),  # type: ignore[misc]
            expected,
        )
    metadata, table = AttentionMetadata([2, 3], [9, 3], [[0], [1]], 16), torch.randn(9, width)
    expected = REFERENCE.add_positions(x, table, REFERENCE.plan(metadata))
    assert torch.equal(same(lambda ops: ops.add_positions(x, table, ops.plan(metadata))), expected)


def test_quantized_results_are_those_of_the_rule() -> None:
    """With `quantize`, the integers that `kernels.int8` makes of the unquantized result, whatever their layout."""
    x, weight, gate_up = torch.randn(6, 50), torch.rand(50) + 0.5, torch.randn(6, 100) * 3
    x[1] = 0.0
    for ops in EVERY_OPS:
        for plain, quantized in (
            (ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6, quantize=True)),
            (ops.add_rms_norm(x, x, weight, 1e-6)[0], ops.add_rms_norm(x, x, weight, 1e-6, quantize=True)[0]),
            (ops.silu_mul(gate_up), ops.silu_mul(gate_up, quantize=True)),
            (ops.gelu_mul(gate_up), ops.gelu_mul(gate_up, quantize=True)),
            (ops.gelu(x, False), ops.gelu(x, False, quantize=True)),
            (ops.layer_norm(x, weight, weight, 1e-6), ops.layer_norm(x, weight, weight, 1e-6, quantize=True)),
            (
                ops.add_layer_norm(x, x, weight, None, 1e-6)[0],
                ops.add_layer_norm(x, x, weight, None, 1e-6, quantize=True)[0],
            ),
        ):
            values, scales = quantize_rows(plain)
            assert torch.equal(quantized.values.to(torch.int8), values)
            assert torch.equal(quantized.scales, scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_fault_stays_visible_and_alone(bad: float) -> None:
    x, weight = torch.randn(4, 50), torch.randn(20, 50)
    x[2, 49] = bad
    for mode in MODES:
        clean = CpuOps(1).linear(x[:2], CpuOps(1).prepare_linear(weight, None, mode))
        result = same(lambda ops, mode=mode: ops.linear(x, ops.prepare_linear(weight, None, mode)))  # type: ignore[misc]
        assert not result[2].isfinite().any()
        assert torch.equal(result[:2], clean)
        assert result[3].isfinite().all()


LAYERS = [
    Layer(4, 2, 64),
    Layer(12, 4, 64, block_size=32),
    Layer(3, 1, 80, window=20),
    Layer(8, 1, 20, block_size=64, window=70, softcap=5.0),
    Layer(4, 4, 128, rotary_dim=32),
    Layer(30, 1, 16),
    Layer(2, 2, 256, softcap=30.0),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_attention(layer: Layer, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    size, lengths = layer.block_size, [150, 77, 1, 64]
    free = rng.sample(range(40), 40)
    tables = [block_table(length, size, free) for length in lengths]
    metadata = AttentionMetadata(lengths, lengths, tables, size)
    packed, rotary = layer.packed(sum(lengths), torch.float32, seed=2), layer.rotary(256)
    cache = REFERENCE.allocate_kv_cache(layer.spec(dtype), 40)
    query, output, _ = attention_step(REFERENCE, layer, cache, metadata, packed, rotary)

    def run(ops: CpuOps) -> tuple[Tensor, Tensor]:
        own = ops.allocate_kv_cache(layer.spec(dtype), 40)
        return attention_step(ops, layer, own, metadata, packed, rotary)[:2]

    close(same(lambda ops: run(ops)[0]), query)
    # int8: a value that lies between two integers may be rounded to either side.
    close(same(lambda ops: run(ops)[1]), output, 3e-3 if dtype == torch.int8 else 3e-4)


def test_norms_of_heads() -> None:
    layer, metadata = Layer(4, 2, 64), AttentionMetadata([20], [20], [[3, 1]], 16)
    packed, rotary = layer.packed(20, torch.float32, seed=3), layer.rotary(32)
    query_norm, key_norm = torch.rand(64) + 0.5, torch.rand(64) + 0.5

    def run(ops: CpuOps | ReferenceOps) -> tuple[Tensor, Tensor]:
        cache, plan = ops.allocate_kv_cache(layer.spec(torch.float32), 4), ops.plan(metadata)
        query = ops.write_kv(*layer.split(packed), rotary, cache, plan, query_norm, key_norm, 1e-5)  # type: ignore[arg-type]
        return query, ops.paged_attention(query, cache, plan, 0.125)  # type: ignore[arg-type]

    for part, expected in enumerate(run(REFERENCE)):
        close(same(lambda ops, part=part: run(ops)[part]), expected, 1e-5)  # type: ignore[misc]


def test_random_bits() -> None:
    rng = random.Random(3)
    seeds = [0, 2**64 - 1, 2**32, *(rng.getrandbits(64) for _ in range(60))]
    positions = [0, 2**32 - 1, 1, *(rng.getrandbits(32) for _ in range(60))]
    choices = [2**32 - 1, 0, 1, *(rng.getrandbits(rng.choice([1, 32])) for _ in range(60))]
    expected = philox.random_31_bits(seeds, positions, choices)
    assert np.array_equal(random_31_bits(seeds, positions, choices), expected)


def test_logits_that_the_temperature_takes_below_all_numbers_weigh_nothing() -> None:
    """-3e38 / 0.5 is -inf, and the maximum is too: their distance is no number."""
    logits, lowest = torch.full((2, 300), -3e38), np.full(20, -np.inf, np.float32)
    metadata = sampling(2, temperatures=[0.5, 0.5], top_ps=[0.5, 1.0], top_ks=[0, 4])
    for ops in EVERY_OPS:
        assert not ops.token_weights(lowest, lowest[0]).any()
        result = ops.sample(logits, metadata)
        assert result.finite.all()
        assert result.token_ids.tolist() == [0, 0]


def test_what_is_kept_of_a_draw_serves_the_same_parameters_alone() -> None:
    ops, logits = CpuOps(2), torch.randn(6, 300)
    first = sampling(6, temperatures=[0.8] * 6, top_ks=[20] * 6, top_ps=[0.9] * 6)
    draws = [
        (logits, first),
        (logits, replace(first, positions=[7] * 6)),
        (logits, replace(first, seeds=[9] * 6)),
        (logits, replace(first, temperatures=[0.0] * 6)),
        (logits, replace(first, top_ks=[1, 2, 3, 4, 5, 6])),
        (logits, replace(first, biases=[(2, 5, 50.0)])),
        (logits[:, :200], first),
        (logits * 3, first),
    ]
    for values, metadata in [*draws, *reversed(draws)]:
        expected = CpuOps(1).sample(values.contiguous(), metadata).token_ids
        assert torch.equal(ops.sample(values.contiguous(), metadata).token_ids, expected)
    with pytest.raises(ValueError, match=r"positions holds -1"):
        ops.sample(logits * 3, replace(first, positions=[0, 0, -1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"positions has 5 entries"):
        ops.sample(logits * 3, replace(first, positions=[0] * 5))
    with pytest.raises(ValueError, match=r"has 6 entries for 4 rows"):
        ops.sample(logits[:4] * 3, first)
