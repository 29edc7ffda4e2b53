"""RMSNorm with the residual sum before it and the int8 quantization after it, and quantization by itself.

All of it is bound by memory: the floor is the bytes that are read and written over the bandwidth. Not measured: no GPU
was at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import round_half_even, round_to
from kernels.cuda.compile import Variant
from kernels.ops import Activations, QuantizedActivations

MAX_HIDDEN = 16384
"""The longest row that one program normalizes: it holds the row in registers."""

MAX_QUANTIZE_BLOCK = 8192
"""The longest piece of a row that one program quantizes at a time."""


@triton.jit
def largest_magnitude_bits(x):
    """x float32 [BLOCK] -> the bits of max|x| as int32, those of a NaN if there is one.

    Without their sign the bits of floats are ordered as integers, infinities above numbers and NaN above both; a
    maximum of floats would lose the NaN.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)


@triton.jit
def inverse_scale(largest):
    """max|x| -> 127 / max|x|, 0 for a row of zeros."""
    # A row of zeros divides by 1 instead: it has no warning in the interpreter and no other effect.
    return tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)


@triton.jit
def quantize_values(x, inverse):
    """rint(x * inverse) in -127 .. 127 as int8, 0 for NaN (`kernels.int8`).

    The product is written as an fma with 0, so that no compiler fuses it with the addition that rounds it to an
    integer: that would round once where the definition rounds twice.
    """
    product = tl.fma(x, inverse, tl.zeros_like(x))
    product = tl.where(product == product, product, 0.0)
    # Clamped before it is rounded: the same, the bounds being integers, and an infinity (127 / max|x| overflows for
    # the smallest of numbers) never meets the rounding.
    product = tl.minimum(tl.maximum(product, -127.0), 127.0)
    return round_half_even(product).to(tl.int8)


@triton.jit
def _rms_norm(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H] or None
    weight_ptr,  # [H]
    out_ptr,  # [T, H]; int8 if scales_ptr is given
    total_ptr,  # [T, H] where residual_ptr is given
    scales_ptr,  # float32 [T] or None
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: total = x + residual, out = total / sqrt(mean(total^2) + eps) * weight, quantized if asked for."""
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
    # Every product that meets an addition is an explicit fma: the versions of this kernel (with and without residual
    # and quantization) then have the same bits, whatever their compiler would have fused.
    squares = tl.fma(x, x, tl.zeros_like(x))
    mean_plus_eps = tl.fma(tl.sum(squares, axis=0), 1.0 / H, eps)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean_plus_eps)) * weight
    rounded_y = round_to(y, x_ptr.dtype.element_ty)
    if scales_ptr is not None:
        y = rounded_y.to(tl.float32)  # what the unfused operations would read back
        largest = largest_magnitude_bits(y).to(tl.float32, bitcast=True)
        tl.store(scales_ptr + row, tl.div_rn(largest, 127.0))
        # Triton deals out a row to its threads by the widest access, and with it the order of the sum above. Writing
        # bytes in no longer runs than x is read in leaves that order as it is without quantization.
        run: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        runs = tl.max_contiguous(tl.arange(0, BLOCK), run)
        tl.store(out_ptr + row.to(tl.int64) * H + runs, quantize_values(y, inverse_scale(largest)), mask=inside)
    else:
        tl.store(out_ptr + offset, rounded_y, mask=inside)


@triton.jit
def _quantize(
    x_ptr,  # [T, K]
    out_ptr,  # int8 [T, K]
    scales_ptr,  # float32 [T]
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, read twice: for its largest magnitude (a maximum has no order), then to be quantized."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * K
    column = tl.arange(0, BLOCK)
    bits = tl.zeros([], tl.int32)
    for first in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + first + column, mask=first + column < K, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, largest_magnitude_bits(x))
    largest = bits.to(tl.float32, bitcast=True)
    tl.store(scales_ptr + row, tl.div_rn(largest, 127.0))
    inverse = inverse_scale(largest)
    for first in range(0, K, BLOCK):
        inside = first + column < K
        x = tl.load(x_ptr + start + first + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + first + column, quantize_values(x, inverse), mask=inside)


def sum_buffer(x: Tensor, residual: Tensor | None) -> Tensor:
    """Where x + residual goes: x itself without one. Raises ValueError for a residual that is not as x is."""
    if residual is None:
        return x
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual must be {tuple(x.shape)} {x.dtype}, contiguous, as x is; got {tuple(residual.shape)} "
            f"{residual.dtype}"
        )
    return torch.empty_like(x)


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quantize: bool
) -> tuple[Activations, Tensor]:
    """(x + residual) / sqrt(mean((x + residual)^2) + eps) * weight, and x + residual (arXiv:1910.07467).

    x, residual [T, H] in one dtype, contiguous; weight [H]. Returns the normalized rows, [T, H] in x's dtype or as
    `QuantizedActivations`, and the sum, [T, H] (x itself where there is no residual). The sum is rounded to x's dtype
    before it is normalized; statistics are float32; the quantized values are those of the normalized row after it is
    rounded to x's dtype, as if the two were separate operations.

    Raises ValueError for a shape or dtype that does not fit and for H above 16384.
    Floor: T * H * 4 elements (x, residual, sum, output) over the bandwidth.
    """
    check_rows("x", x)
    rows, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"x has rows of {hidden} elements; RMSNorm takes up to {MAX_HIDDEN}")
    if weight.shape != (hidden,) or not weight.is_contiguous():
        raise ValueError(f"weight must be [{hidden}], contiguous, got {tuple(weight.shape)}")
    total = sum_buffer(x, residual)
    out = torch.empty_like(x, dtype=torch.int8) if quantize else torch.empty_like(x)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device) if quantize else None
    if rows:
        block, warps = row_launch(hidden, MAX_HIDDEN)
        _rms_norm[(rows,)](
            x, residual, weight, out, total, scales, eps, H=hidden, BLOCK=block, num_warps=warps, enable_fp_fusion=True
        )
    return (out if scales is None else QuantizedActivations(out, scales)), total


def quantize(x: Tensor) -> QuantizedActivations:
    """x [T, K], contiguous -> int8 rows with one scale each, the bits of `kernels.int8`.

    Raises ValueError for another shape or dtype. Floor: 3 bytes an element (x is read again from the cache).
    """
    check_rows("x", x)
    rows, features = x.shape
    out = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block, warps = row_launch(features, MAX_QUANTIZE_BLOCK)
        _quantize[(rows,)](x, out, scales, K=features, BLOCK=block, num_warps=warps, enable_fp_fusion=True)
    return QuantizedActivations(out, scales)


def check_rows(name: str, x: Tensor) -> None:
    """Refuse what is not a contiguous matrix of floats."""
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be a contiguous matrix, got {tuple(x.shape)} with strides {x.stride()}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} has dtype {x.dtype}; bfloat16, float16 and float32 are supported")


def row_launch(length: int, longest: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a program that takes a row of `length`, at most `longest` elements at a time.

    Fixed by the length alone, for they decide the order of a sum. 16 elements a thread: two 16-byte loads of bf16 in
    flight each, and rows of 1024 to 8192 fill 2 to 16 warps. Not measured.
    """
    block = min(triton.next_power_of_2(length), longest)
    return block, max(1, min(16, block // 512))


def variants(capability: int) -> list[Variant]:
    """Rows of the usual hidden sizes, with and without residual and quantization."""
    found = []
    for hidden, residual, quantized in [
        (4096, True, False),
        (4096, True, True),
        (1024, True, False),
        (1024, False, False),
        (2048, True, False),
    ]:
        block, warps = row_launch(hidden, MAX_HIDDEN)
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr", "total_ptr"), "*bf16")
        constants: dict[str, object] = {"H": hidden, "BLOCK": block}
        if residual:
            pointers["residual_ptr"] = "*bf16"
        else:
            constants["residual_ptr"] = None
        if quantized:
            pointers |= {"out_ptr": "*i8", "scales_ptr": "*fp32"}
        else:
            constants["scales_ptr"] = None
        name = f"rms_norm {'add ' if residual else ''}h{hidden} bf16{' int8' if quantized else ''}"
        found.append(
            Variant(
                name,
                _rms_norm,
                signature={**pointers, "eps": "fp32"},
                constants=constants,
                aligned=frozenset(pointers),
                num_warps=warps,
                same_order=f"rms_norm h{hidden}",
            )
        )
    block, warps = row_launch(4096, MAX_QUANTIZE_BLOCK)
    pointers = {"x_ptr": "*bf16", "out_ptr": "*i8", "scales_ptr": "*fp32"}
    constants = {"K": 4096, "BLOCK": block}
    found.append(Variant("quantize k4096 bf16", _quantize, pointers, constants, frozenset(pointers), warps))
    return found
