"""RMSNorm and quantization: against the reference, and to the bit where the operations are fused."""

from __future__ import annotations

import pytest
import torch

from kernels.cuda.common import device_type
from kernels.cuda.norm import MAX_HIDDEN, quantize, rms_norm
from kernels.int8 import quantize_rows
from kernels.ops import QuantizedActivations
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
# One rounding to the dtype, of a float32 value that is good to some units in its last place.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 80), (5, 1000), (2, 8192)])
def test_against_reference(dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((rows, hidden), (rows, hidden), (hidden,)))
    total = x + residual  # torch rounds the sum of two once, as the kernel does
    expected = ReferenceOps().rms_norm(total.float(), weight.float(), 1e-5)
    x, residual, weight, total = (t.to(DEVICE) for t in (x, residual, weight, total))
    y, got_total = rms_norm(x, residual, weight, 1e-5, False)
    assert torch.equal(got_total, total)
    torch.testing.assert_close(y.float().cpu(), expected, rtol=TOLERANCES[dtype], atol=1e-6)
    plain, same = rms_norm(total, None, weight, 1e-5, False)
    assert same is total
    assert torch.equal(plain, y)
    fused, _ = rms_norm(x, residual, weight, 1e-5, True)
    unfused = quantize(y)
    assert isinstance(fused, QuantizedActivations)
    assert torch.equal(fused.values, unfused.values)
    assert torch.equal(fused.scales, unfused.scales)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("rows", "features"), [(40, 130), (2, 8200)])
def test_quantization_is_that_of_the_definition(dtype: torch.dtype, rows: int, features: int) -> None:
    x = torch.randn(rows, features).mul(torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    x[0] = 0
    values, scales = quantize_rows(x)
    got = quantize(x.to(DEVICE))
    assert torch.equal(got.values.cpu(), values)
    assert torch.equal(got.scales.cpu(), scales)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_faults_stay_in_their_row_and_rows_do_not_meet() -> None:
    x, residual, weight = torch.randn(6, 96), torch.randn(6, 96), torch.randn(96)
    x, residual, weight = x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE)
    clean, _ = rms_norm(x, residual, weight, 1e-6, False)
    clean_int8, _ = rms_norm(x, residual, weight, 1e-6, True)
    for i in range(6):
        assert torch.equal(rms_norm(x[i : i + 1], residual[i : i + 1], weight, 1e-6, False)[0], clean[i : i + 1])
    x[1, 95], x[4, 0] = float("nan"), float("inf")
    y, _ = rms_norm(x, residual, weight, 1e-6, False)
    fused, _ = rms_norm(x, residual, weight, 1e-6, True)
    sound = [0, 2, 3, 5]
    assert torch.equal(y[sound], clean[sound])
    assert torch.equal(fused.values[sound], clean_int8.values[sound])
    assert torch.isnan(y[[1, 4]]).any(-1).all()
    assert torch.isfinite(fused.scales).tolist() == [True, False, True, True, False, True]
    assert torch.isfinite(quantize(x).scales).tolist() == [True, False, True, True, False, True]


def test_errors() -> None:
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert rms_norm(x[:0], None, weight, 1e-6, False)[0].shape == (0, 8)
    for argument, bad in (
        ("weight", (x, None, weight[:4])),
        ("residual", (x, x[:1], weight)),
        ("x", (x.T, None, weight)),
        ("x", (x.double(), None, weight)),
        ("x", (torch.zeros(1, MAX_HIDDEN + 1, device=DEVICE), None, weight)),
    ):
        with pytest.raises(ValueError, match=argument):
            rms_norm(*bad, 1e-6, False)
