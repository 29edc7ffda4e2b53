"""The gated activations: against the reference, and to the bit where quantization is fused."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from kernels.cuda.activation import gated
from kernels.cuda.common import device_type
from kernels.cuda.norm import quantize
from kernels.ops import QuantizedActivations
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 100), (2, 1100), (1, 16400)])
def test_against_reference(activation: Literal["silu", "gelu"], dtype: torch.dtype, rows: int, features: int) -> None:
    gate_up = torch.randn(rows, 2 * features).mul(3).to(dtype)
    reference = ReferenceOps()
    expected = (reference.silu_mul if activation == "silu" else reference.gelu_mul)(gate_up.float())
    gate_up = gate_up.to(DEVICE)
    y = gated(gate_up, activation, False)
    # torch's gelu cancels for gates far below zero, hence the absolute part.
    torch.testing.assert_close(y.float().cpu(), expected, rtol=TOLERANCES[dtype], atol=5e-6)
    fused, unfused = gated(gate_up, activation, True), quantize(y)
    assert isinstance(fused, QuantizedActivations)
    assert torch.equal(fused.values, unfused.values)
    assert torch.equal(fused.scales, unfused.scales)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_faults_stay_in_their_row_and_rows_do_not_meet() -> None:
    gate_up = torch.randn(5, 140, device=DEVICE)
    clean, clean_int8 = gated(gate_up, "silu", False), gated(gate_up, "silu", True)
    for i in range(5):
        assert torch.equal(gated(gate_up[i : i + 1], "silu", False), clean[i : i + 1])
    gate_up[1, 69], gate_up[3, 139] = float("nan"), float("inf")
    y, fused = gated(gate_up, "silu", False), gated(gate_up, "silu", True)
    sound = [0, 2, 4]
    assert torch.equal(y[sound], clean[sound])
    assert torch.equal(fused.values[sound], clean_int8.values[sound])
    assert torch.isfinite(y).all(-1).tolist() == [True, False, True, False, True]
    assert torch.isfinite(fused.scales).tolist() == [True, False, True, False, True]


def test_errors() -> None:
    with pytest.raises(ValueError, match="gate_up"):
        gated(torch.zeros(2, 3, device=DEVICE), "silu", False)
    with pytest.raises(ValueError, match="activation"):
        gated(torch.zeros(2, 4, device=DEVICE), "relu", False)  # type: ignore[arg-type]
    assert gated(torch.zeros(0, 4, device=DEVICE), "gelu", False).shape == (0, 2)
