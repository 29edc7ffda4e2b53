"""Functions of single elements: gelu without a gate, and the soft cap of logits.

Bound by memory: the floor is twice the bytes of the tensor over the bandwidth. Not measured: no GPU was at hand.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import round_to
from kernels.cuda.compile import Variant
from kernels.cuda.norm import check_rows

NUM_WARPS = 4
BLOCK = 1024
_FUNCTIONS = {"gelu_tanh": 0, "gelu": 1, "softcap": 2}


@triton.jit(do_not_specialize=["count"])
def _pointwise(
    x_ptr,
    out_ptr,
    count,  # elements
    cap,  # of the soft cap
    FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of the tensor, whatever its rows."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if FUNCTION == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # Both are made of 1 / (1 + exp(-z)): see kernels.cuda.activation.
        gelu: tl.constexpr = FUNCTION == 0
        z = x * tl.fma(x * x, 0.07135481282715053, 1.5957691216057308) if gelu else 2.0 * tl.div_rn(x, cap)
        e = tl.exp(-tl.abs(z))
        if gelu:
            y = tl.div_rn(x * tl.where(z < 0, e, 1.0), 1.0 + e)
        else:  # cap * tanh(z / 2)
            y = cap * tl.div_rn(tl.where(z < 0, e - 1.0, 1.0 - e), 1.0 + e)
    tl.store(out_ptr + offset, round_to(y, out_ptr.dtype.element_ty), mask=inside)


def pointwise(x: Tensor, function: Literal["gelu_tanh", "gelu", "softcap"], cap: float = 0.0) -> Tensor:
    """x [rows, columns], contiguous -> the function of each element, in float32 and rounded once.

    cap: of "softcap", which is cap * tanh(x / cap). Raises ValueError for another shape or dtype.
    Floor: two elements an element over the bandwidth.
    """
    check_rows("x", x)
    out = torch.empty_like(x)
    if x.numel():
        _pointwise[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            out,
            x.numel(),
            cap,
            FUNCTION=_FUNCTIONS[function],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def variants(capability: int) -> list[Variant]:
    """Every function."""
    return [
        Variant(
            f"{name} bf16",
            _pointwise,
            signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "count": "i32", "cap": "fp32"},
            constants={"FUNCTION": number, "BLOCK": BLOCK},
            aligned=frozenset(("x_ptr", "out_ptr")),
            num_warps=NUM_WARPS,
        )
        for name, number in _FUNCTIONS.items()
    ]
