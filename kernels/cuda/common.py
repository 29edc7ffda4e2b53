"""What every Triton kernel here uses: matrix products and roundings that mean the same on a GPU and in the interpreter.

With TRITON_INTERPRET=1 Triton runs kernels in NumPy, on CPU tensors: for tests, and for a reader with a debugger. NumPy
has no bfloat16, and there the interpreter multiplies bit patterns and truncates where a GPU rounds. So no kernel here
does arithmetic in bfloat16: what is loaded is converted with `.to(tl.float32)` (exact), products of matrices go
through `dot`, and what is stored through `round_to`.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32. a [M, K], b [K, N] of one floating type, acc float32 [M, N].

    float32 operands are multiplied as float32, not as tf32.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x float32 -> `dtype`, rounded to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, quiet_nan, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def round_half_even(x):
    """x float32, |x| < 2^22 -> the nearest integer as float32, halves to even: adding 1.5 * 2^23 leaves no fraction."""
    magic = 12582912.0
    return (x + magic) - magic


def device_type() -> str:
    """Where the tensors of these kernels live: "cuda", or "cpu" in the interpreter."""
    return "cpu" if INTERPRETED.value else "cuda"
