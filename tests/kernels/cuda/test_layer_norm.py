"""LayerNorm and the functions of single elements: against the reference, and rows that do not meet."""

from __future__ import annotations

import pytest
import torch

from kernels.cuda.common import device_type
from kernels.cuda.ops import CudaOps
from kernels.ops import AttentionMetadata, QuantizedActivations
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
REFERENCE = ReferenceOps()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("rows", "hidden"), [(1, 2), (3, 100), (2, 1100)])
def test_against_reference(dtype: torch.dtype, rows: int, hidden: int) -> None:
    ops, tolerance = CudaOps(dtype), TOLERANCES[dtype]

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float().cpu(), expected, rtol=tolerance, atol=tolerance * 4)

    x, residual = (torch.randn(rows, hidden).mul(2).add(1).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(hidden).to(dtype) for _ in range(2))
    on = [tensor.to(DEVICE) for tensor in (x, residual, weight, bias)]
    for own_bias, device_bias in ((bias, on[3]), (None, None)):
        y = ops.layer_norm(on[0], on[2], device_bias, 1e-5)
        close(y, REFERENCE.layer_norm(x, weight, own_bias, 1e-5))
        fused, total = ops.add_layer_norm(on[0], on[1], on[2], device_bias, 1e-5)
        assert torch.equal(total, on[0] + on[1])
        assert torch.equal(fused, ops.layer_norm(total, on[2], device_bias, 1e-5))
    quantized = ops.layer_norm(on[0], on[2], on[3], 1e-5, quantize=True)
    assert isinstance(quantized, QuantizedActivations)
    for tanh in (True, False):
        close(ops.gelu(on[0], tanh), REFERENCE.gelu(x, tanh))
    close(ops.softcap(on[0] * 9, 30.0), REFERENCE.softcap(x * 9, 30.0))
    half = hidden // 2
    parts = (slice(half), slice(half, None))
    normed = ops.norm_query_key(*(on[0][:, part] for part in parts), *(on[2][part] for part in parts), 1e-5)
    for part, y in zip(parts, normed, strict=True):
        close(y, REFERENCE.rms_norm(x[:, part], weight[part], 1e-5))
    metadata, table = AttentionMetadata([rows], [rows + 3], [[0]], 16), torch.randn(9, hidden).to(dtype)
    y = ops.add_positions(on[0], table.to(DEVICE), ops.plan(metadata))
    close(y, REFERENCE.add_positions(x, table, REFERENCE.plan(metadata)))
    scaled = ops.embedding(torch.tensor([1, 0], device=DEVICE), ops.prepare_linear(table, embedding=True), 55.5)
    close(scaled, table[[1, 0]].float() * 55.5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_faults_stay_in_their_row_and_rows_do_not_meet() -> None:
    ops = CudaOps(torch.float32)
    x, weight = torch.randn(5, 140, device=DEVICE), torch.ones(140, device=DEVICE)
    clean = ops.layer_norm(x, weight, weight, 1e-5)
    for i in range(5):
        assert torch.equal(ops.layer_norm(x[i : i + 1], weight, weight, 1e-5), clean[i : i + 1])
    x[1, 69], x[3, 139] = float("nan"), float("inf")
    y = ops.layer_norm(x, weight, weight, 1e-5)
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert torch.isfinite(y).all(-1).tolist() == [True, False, True, False, True]
    assert torch.isfinite(ops.gelu(x, False)).all(-1).tolist() == [True, False, True, False, True]
