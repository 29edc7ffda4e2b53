"""Each operation of PortableOps gives what ReferenceOps gives, over odd shapes, in bf16, float32 and int8."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.int8 import quantize_rows
from kernels.ops import Activations, AttentionMetadata, QuantizationMode, QuantizedActivations, QuantizedWeight
from kernels.portable import PortableOps, attention, linear
from kernels.reference import ReferenceOps
from tests.kernels.cases import DTYPES, Layer, attention_step, block_table, poison, stored

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
REFERENCE = ReferenceOps()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of `dtype`, relative to the largest value."""
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(expected.abs().max())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 768), (3, 77), (16, 768), (70, 129), (5, 4096)])
def test_norms_and_activation(dtype: torch.dtype, rows: int, width: int) -> None:
    ops = PortableOps(dtype=dtype)
    x, residual = torch.randn(rows, width).to(dtype) * 3, torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    close(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5), dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    close(normed, REFERENCE.rms_norm(total, weight, 1e-5), dtype)
    gate_up = torch.randn(rows, 2 * width).to(dtype) * 20
    close(ops.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), dtype)
    close(ops.gelu_mul(gate_up), REFERENCE.gelu_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (1, 768), (3, 77), (70, 129)])
def test_what_other_families_do_to_rows(dtype: torch.dtype, rows: int, width: int) -> None:
    ops = PortableOps(dtype=dtype)
    x, residual = torch.randn(rows, width).to(dtype) * 3 + 5, torch.randn(rows, width).to(dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for own_bias in (bias, None):
        expected = REFERENCE.layer_norm(x, weight, own_bias, 1e-5)
        close(ops.layer_norm(x, weight, own_bias, 1e-5), expected, dtype)
    normed, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, ops.add(x, residual))
    assert torch.equal(normed, ops.layer_norm(total, weight, bias, 1e-5))
    for tanh in (True, False):
        close(ops.gelu(x - 5, tanh), REFERENCE.gelu(x - 5, tanh), dtype)
    close(ops.softcap(x * 9, 30.0), REFERENCE.softcap(x * 9, 30.0), dtype)
    half = width // 2
    got = ops.norm_query_key(x[:, :half], x[:, half:], weight[:half], weight[half:], 1e-5)
    for own, part in zip(got, (slice(half), slice(half, None)), strict=True):
        close(own, REFERENCE.rms_norm(x[:, part], weight[part], 1e-5), dtype)
    plan = AttentionMetadata([rows], [rows + 3], [list(range(6))], 16)
    expected = REFERENCE.add_positions(x, residual.repeat(80, 1), REFERENCE.plan(plan))
    close(ops.add_positions(x, residual.repeat(80, 1), ops.plan(plan)), expected, dtype)


def test_silu_at_the_ends() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.9, 0.0, 88.9, 1e30]])
    ops = PortableOps(dtype=torch.float32)
    actual = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate), atol=1e-36, rtol=1e-6)


def slower(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a path that this processor may not need."""
    if way == "one by one":
        monkeypatch.setattr(linear, "rows_agree", lambda weight, workspace: False)
    elif way == "bf16 as rows":
        monkeypatch.setattr(linear, "packs", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (7, 33), (96, 80), (1280, 768), (250, 1003), (33, 11008)]
)
@pytest.mark.parametrize("way", ["fast", "one by one", "bf16 as rows"])
def test_linear(
    dtype: torch.dtype, out_features: int, in_features: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower(way, monkeypatch)
    monkeypatch.setattr(linear, "BLOCK_VALUES", 1 << 18)
    ops = PortableOps(dtype=dtype)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    for bias in (None, torch.randn(out_features)):
        prepared = ops.prepare_linear(weight, bias)
        assert (prepared.out_features, prepared.in_features) == (out_features, in_features)
        expected = REFERENCE.prepare_linear(weight.to(dtype), None if bias is None else bias.to(dtype))
        for rows in (1, 2, 5, 16, 37):
            x = torch.randn(rows, in_features).to(dtype)
            close(ops.linear(x, prepared), REFERENCE.linear(x, expected), dtype)
    strided = torch.randn(4, 2 * in_features).to(dtype)[:, ::2]
    close(ops.linear(strided, prepared), REFERENCE.linear(strided, expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (7, 33), (96, 80), (250, 1003), (33, 11008), (700, 1041)]
)
@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
def test_int8_linear(
    dtype: torch.dtype, out_features: int, in_features: int, mode: QuantizationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w8a8 to the bit: exact integers, then the reference's multiplications. Among them are the largest sums, and one
    that is as large half way and small in the end, where a lost unit shows."""
    monkeypatch.setattr(linear, "BLOCK_VALUES", 1 << 18)  # several blocks of features
    ops = PortableOps(dtype=dtype)
    weight, x = torch.randn(out_features, in_features), torch.randn(37, in_features).to(dtype)
    weight[0], x[0] = 3.0, -2.0
    if out_features > 1:
        weight[1] = torch.where(torch.arange(in_features) < in_features // 2, 3.0, -3.0)
    for bias in (None, torch.randn(out_features).to(dtype)):
        prepared = ops.prepare_linear(weight, bias, mode)
        parts = out_features * in_features + 4 * out_features + (0 if bias is None else bias.nbytes)
        assert prepared.nbytes == parts
        expected = REFERENCE.linear(x, REFERENCE.prepare_linear(weight, bias, mode))
        same = ops.prepare_linear(QuantizedWeight(*quantize_rows(weight)), bias, mode)
        for rows in (1, 5, 37):
            output = ops.linear(x[:rows], prepared).clone()
            assert torch.equal(output, ops.linear(x[:rows], same))
            close(output, expected[:rows], dtype)
            if mode == "w8a8":
                assert torch.equal(output, expected[:rows].to(dtype))
                quantized = QuantizedActivations(*quantize_rows(x[:rows]))
                assert torch.equal(output, ops.linear(quantized, prepared))
    assert not ops.fallbacks


def test_a_fault_shows_in_its_row_alone() -> None:
    x = torch.randn(6, 40)
    x[1, 3], x[4, 39] = float("nan"), float("-inf")
    for mode in ("none", "w8a16", "w8a8"):
        ops = PortableOps(dtype=torch.float32)
        output = ops.linear(x, ops.prepare_linear(torch.randn(9, 40), None, mode))
        assert torch.isfinite(output).all(-1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_results_are_those_of_the_plain_ones(dtype: torch.dtype) -> None:
    ops, weight = PortableOps(dtype=dtype), torch.rand(96).to(dtype)
    x, residual, gate_up = (torch.randn(5, width).to(dtype) * 3 for width in (96, 96, 192))
    pairs: list[tuple[Activations, Activations]] = [
        (ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, quantize=True)),
        (ops.add_rms_norm(x, residual, weight, 1e-5)[0], ops.add_rms_norm(x, residual, weight, 1e-5, True)[0]),
        (ops.silu_mul(gate_up), ops.silu_mul(gate_up, True)),
        (ops.gelu_mul(gate_up), ops.gelu_mul(gate_up, True)),
    ]
    for plain, quantized in pairs:
        values, scales = quantize_rows(plain)
        assert torch.equal(quantized.values, values)
        assert torch.equal(quantized.scales, scales)


def test_linear_on_a_processor_without_avx512() -> None:
    """Some tests of linear layers once more, with every library held to AVX2: no VNNI, no bf16."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    names = "test_int8_linear or test_linear and fast-250"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__]
    result = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(50, 12), torch.tensor([3, 0, 49, 3])
    ops = PortableOps(dtype=dtype)
    close(ops.embedding(ids, ops.prepare_linear(weight, embedding=True)), weight[ids], dtype)
    for mode in ("w8a16", "w8a8"):
        expected = REFERENCE.embedding(ids, REFERENCE.prepare_linear(weight, None, mode, embedding=True))
        assert torch.equal(ops.embedding(ids, ops.prepare_linear(weight, None, mode, True)), expected.to(dtype))


LAYERS = [
    Layer(12, 4, 64),
    Layer(4, 4, 64, block_size=32),
    Layer(8, 1, 80, rotary_dim=40),
    Layer(8, 4, 96, window=33),
    Layer(4, 1, 128, softcap=20.0),
    Layer(6, 2, 256, block_size=32, window=150, softcap=30.0),
    Layer(2, 1, 64, block_size=1),
    Layer(80, 2, 64),  # 40 heads share a KV head: more than a prompt tile has rows
]
# Steps as (query_len, seq_len) of each sequence. A sequence stands at the same place in both steps.
STEPS = [
    [[(1, 1), (15, 15), (16, 16), (17, 17), (300, 300)], [(1, 2), (1, 16), (40, 56), (1, 18), (90, 390)]],
    [[(130, 130), (3, 3)], [(1, 131), (2, 5)]],
    [[(700, 700)], [(1, 701)]],
]


@pytest.mark.parametrize("kv_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("one_height", [False, True])
def test_attention(kv_dtype: torch.dtype, layer: Layer, one_height: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if one_height:
        monkeypatch.setattr(attention, "heights_agree", lambda *args: False)
    steps_run = STEPS[:2] if one_height or kv_dtype == torch.int8 else STEPS
    dtype = torch.float32 if kv_dtype == torch.int8 else kv_dtype
    ops = PortableOps(dtype=dtype)
    rotary = layer.rotary(1024)
    for case, steps in enumerate(steps_run):
        ends = [seq_len for _, seq_len in steps[-1]]
        free = random.Random(case).sample(range(800), 800)
        tables = [block_table(end, layer.block_size, free) for end in ends]
        cache = ops.allocate_kv_cache(layer.spec(kv_dtype), 800)
        expected_cache = REFERENCE.allocate_kv_cache(layer.spec(kv_dtype), 800)
        poison(cache)
        for number, step in enumerate(steps):
            metadata = AttentionMetadata([q for q, _ in step], [n for _, n in step], tables, layer.block_size)
            packed = layer.packed(sum(metadata.query_lens), dtype, seed=number)
            query, output, plan = attention_step(ops, layer, cache, metadata, packed, rotary)
            expected_plan = REFERENCE.plan(metadata)
            expected_query = REFERENCE.write_kv(*layer.split(packed), rotary, expected_cache, expected_plan)
            assert torch.equal(query, expected_query.to(dtype))
            slots = torch.cat([s[len(s) - q :] for q, s in zip(metadata.query_lens, expected_plan.slots, strict=True)])
            assert torch.equal(stored(cache, plan).float(), torch.stack(expected_cache.read(slots)))
            expected = REFERENCE.paged_attention(
                query, expected_cache, expected_plan, layer.head_dim**-0.5, layer.softcap
            )
            close(output, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_and_key_norm(dtype: torch.dtype) -> None:
    layer = Layer(6, 2, 80)
    ops, rotary = PortableOps(dtype=dtype), layer.rotary(64)
    norms = torch.rand(80) + 0.5, torch.rand(80) + 0.5
    metadata = AttentionMetadata([5], [5], [[2]], 16)
    packed = layer.packed(5, dtype, seed=0)
    cache, expected_cache = (o.allocate_kv_cache(layer.spec(dtype), 4) for o in (ops, REFERENCE))
    plan, expected_plan = ops.plan(metadata), REFERENCE.plan(metadata)
    # Not views of one tensor here: the path that must join query and key first.
    parts = [part.clone() for part in layer.split(packed)]
    query = ops.write_kv(*parts, rotary, cache, plan, *norms, eps=1e-5)
    expected = REFERENCE.write_kv(*parts, rotary, expected_cache, expected_plan, *norms, eps=1e-5)
    close(query, expected, dtype)
    close(stored(cache, plan)[0], expected_cache.keys[2, :5].float(), dtype)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_other_cache_under_bf16_activations(kv_dtype: torch.dtype) -> None:
    layer = Layer(4, 2, 64)
    ops = PortableOps(dtype=torch.bfloat16)
    cache = ops.allocate_kv_cache(layer.spec(kv_dtype), 4)
    metadata = AttentionMetadata([9], [9], [[1]], 16)
    packed = layer.packed(9, torch.bfloat16, seed=0)
    _, output, _ = attention_step(ops, layer, cache, metadata, packed, layer.rotary(16))
    expected_cache = REFERENCE.allocate_kv_cache(layer.spec(kv_dtype), 4)
    _, expected, _ = attention_step(REFERENCE, layer, expected_cache, metadata, packed, layer.rotary(16))
    close(output, expected, torch.bfloat16)


def test_long_work_is_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits give the same bits: pieces of sequences, heads and tiles, masks made anew for each."""
    layer, dtype = Layer(6, 2, 64, window=400), torch.float32
    metadata = AttentionMetadata(
        [500, 1, 1, 1], [500, 300, 300, 40], [list(range(s, s + 32)) for s in (0, 32, 64, 96)], 16
    )
    packed, rotary = layer.packed(503, dtype, seed=0), layer.rotary(512)

    def run() -> Tensor:
        ops = PortableOps(dtype=dtype)
        return attention_step(ops, layer, ops.allocate_kv_cache(layer.spec(dtype), 128), metadata, packed, rotary)[1]

    whole = run()
    monkeypatch.setattr(attention, "MAX_MASK_BYTES", 100_000)
    monkeypatch.setattr(attention, "MAX_CACHED_MASK_BYTES", 0)
    for limit in (1, 600_000):
        monkeypatch.setattr(attention, "MAX_GATHER_BYTES", limit)
        assert torch.equal(run(), whole)


def test_workspaces_survive_leaving_inference_mode() -> None:
    ops = PortableOps(dtype=torch.float32)
    with torch.inference_mode():
        ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
    with torch.no_grad():
        ops.rms_norm(torch.ones(2, 8), torch.nn.Parameter(torch.ones(8)), 1e-6)
