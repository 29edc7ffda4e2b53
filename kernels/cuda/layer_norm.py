"""LayerNorm with the residual sum before it.

Bound by memory: the floor is the bytes that are read and written over the bandwidth. Not measured: no GPU was at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_layer_norm
from kernels.cuda.common import round_to
from kernels.cuda.compile import Variant
from kernels.cuda.norm import MAX_HIDDEN, check_rows, row_launch, sum_buffer


@triton.jit
def _layer_norm(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H] or None
    weight_ptr,  # [H]
    bias_ptr,  # [H] or None
    out_ptr,  # [T, H]
    total_ptr,  # [T, H] where residual_ptr is given
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: total = x + residual, out = (total - mean) / sqrt(variance + eps) * weight + bias."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < H
    offset = row.to(tl.int64) * H + column
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        total = round_to(x + residual, x_ptr.dtype.element_ty)
        tl.store(total_ptr + offset, total, mask=inside)
        x = total.to(tl.float32)
    # Products that meet an addition are explicit fma, so that the versions with and without residual have equal bits.
    mean = tl.fma(tl.sum(x, axis=0), 1.0 / H, 0.0)
    centred = tl.where(inside, x - mean, 0.0)
    squares = tl.fma(centred, centred, tl.zeros_like(centred))
    variance_plus_eps = tl.fma(tl.sum(squares, axis=0), 1.0 / H, eps)
    normalized = centred * tl.div_rn(1.0, tl.sqrt_rn(variance_plus_eps))
    if bias_ptr is not None:
        y = tl.fma(normalized, weight, tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32))
    else:
        y = normalized * weight
    tl.store(out_ptr + offset, round_to(y, x_ptr.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [T, H] in one dtype, contiguous -> (layer norm of x + residual, x + residual), both [T, H].

    The sum (x itself where there is no residual) is rounded to x's dtype before it is normalized; statistics are
    float32. Raises ValueError for a shape or dtype that does not fit and for H above 16384.
    Floor: T * H * 4 elements (x, residual, sum, output) over the bandwidth.
    """
    check_rows("x", x)
    check_layer_norm(x, weight, bias)
    rows, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"x has rows of {hidden} elements; LayerNorm takes up to {MAX_HIDDEN}")
    total = sum_buffer(x, residual)
    out = torch.empty_like(x)
    if rows:
        block, warps = row_launch(hidden, MAX_HIDDEN)
        _layer_norm[(rows,)](
            x, residual, weight, bias, out, total, eps, H=hidden, BLOCK=block, num_warps=warps, enable_fp_fusion=True
        )
    return out, total


def variants(capability: int) -> list[Variant]:
    """Rows of GPT-2, Pythia and StableLM, with and without residual and bias."""
    found = []
    for hidden, residual, bias in [(768, True, True), (2048, True, True), (2048, False, True), (5120, True, False)]:
        block, warps = row_launch(hidden, MAX_HIDDEN)
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr", "total_ptr"), "*bf16")
        pointers |= {"residual_ptr": "*bf16"} if residual else {}
        pointers |= {"bias_ptr": "*bf16"} if bias else {}
        constants = dict.fromkeys({"residual_ptr", "bias_ptr"} - set(pointers))
        name = f"layer_norm {'add ' if residual else ''}h{hidden} bf16{'' if bias else ' no bias'}"
        found.append(
            Variant(
                name,
                _layer_norm,
                signature={**pointers, "eps": "fp32"},
                constants={**constants, "H": hidden, "BLOCK": block},
                aligned=frozenset(pointers),
                num_warps=warps,
                same_order=f"layer_norm h{hidden}",
            )
        )
    return found
