"""Quantization by rows, and what the reference backend makes of it: the oracle of every int8 kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.int8 import dequantize_rows, quantize_rows
from kernels.ops import AttentionMetadata, KVCacheSpec, QuantizedActivations
from kernels.reference import ReferenceOps
from tests.kernels.cases import Layer, attention_step

floats = st.floats(-(2.0**60), 2.0**60, width=32)


@given(st.lists(floats, min_size=1, max_size=40))
def test_rows_quantize_as_in_numpy(row: list[float]) -> None:
    """The rule of kernels.int8, written once more in NumPy float32; each value is off by at most half a step."""
    x = np.asarray(row, dtype=np.float32)
    quantized, scale = quantize_rows(torch.from_numpy(x)[None])
    largest = np.abs(x).max()
    assert float(scale) == largest / np.float32(127)
    if largest > 1e-36:  # below, 127 / largest is an infinity: only the signs are left
        assert quantized[0].tolist() == np.rint(x * (np.float32(127) / largest)).tolist()
        error = (dequantize_rows(quantized, scale)[0] - torch.from_numpy(x)).abs().max()
        assert float(error) <= 0.5001 * float(scale)


def test_zeros_and_faults() -> None:
    x = torch.randn(4, 9)
    x[0] = 0.0
    x[2, 4], x[3, 8] = float("nan"), float("-inf")
    quantized, scales = quantize_rows(x)
    assert scales[0] == 0
    assert quantized[0].eq(0).all()
    assert torch.isfinite(scales).tolist() == [True, True, False, False]


@pytest.mark.parametrize("bias", [False, True])
def test_linear_modes(bias: bool) -> None:
    """w8a16 is the product with the weight that was stored; w8a8 also with the activations as quantized."""
    ops = ReferenceOps()
    x, weight = torch.randn(5, 64), torch.randn(24, 64)
    b = torch.randn(24) if bias else None
    stored = dequantize_rows(*quantize_rows(weight))
    torch.testing.assert_close(ops.linear(x, ops.prepare_linear(weight, b, "w8a16")), F.linear(x, stored, b))
    quantized = QuantizedActivations(*quantize_rows(x))
    expected = F.linear(dequantize_rows(quantized.values, quantized.scales), stored, b)
    w8a8 = ops.prepare_linear(weight, b, "w8a8")
    torch.testing.assert_close(ops.linear(quantized, w8a8), expected)
    assert torch.equal(ops.linear(x, w8a8), ops.linear(quantized, w8a8))
    # About as near to the exact product as 8 bits allow: an error of a fraction of a percent of the row.
    exact = F.linear(x, weight, b)
    assert (expected - exact).norm() / exact.norm() < 0.02
    with pytest.raises(ValueError, match="x is quantized"):
        ops.linear(quantized, ops.prepare_linear(weight, b))
    x[1, 3] = float("nan")
    assert torch.isfinite(ops.linear(x, w8a8)).all(-1).tolist() == [True, False, True, True, True]


def test_fused_quantization_is_that_of_the_result() -> None:
    ops, weight = ReferenceOps(), torch.rand(16)
    x, residual, gate_up = torch.randn(3, 16), torch.randn(3, 16), torch.randn(3, 32)
    pairs = [
        (ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, quantize=True)),
        (ops.add_rms_norm(x, residual, weight, 1e-5)[0], ops.add_rms_norm(x, residual, weight, 1e-5, True)[0]),
        (ops.silu_mul(gate_up), ops.silu_mul(gate_up, True)),
        (ops.gelu_mul(gate_up), ops.gelu_mul(gate_up, True)),
    ]
    for plain, quantized in pairs:
        values, scales = quantize_rows(plain)
        assert torch.equal(values, quantized.values)
        assert torch.equal(scales, quantized.scales)


def test_int8_cache_is_near_the_float_one() -> None:
    layer = Layer(heads=4, kv_heads=2, head_dim=32)
    metadata = AttentionMetadata([7], [7], [[1]], 16)
    packed, rotary = layer.packed(7, torch.float32, 5), layer.rotary(16)
    ops = ReferenceOps()
    outputs = []
    for dtype in (torch.float32, torch.int8):
        cache = ops.allocate_kv_cache(layer.spec(dtype), 2)
        outputs.append(attention_step(ops, layer, cache, metadata, packed, rotary)[1])
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.02
    spec = KVCacheSpec(2, 32, 16, torch.int8)
    assert spec.bytes_per_block == 2 * 16 * 2 * (32 + 4)
