"""The gated activations of a feed-forward layer: silu(gate) * up and gelu(gate) * up, with optional int8 quantization.

Bound by memory: the floor is the bytes that are read and written over the bandwidth. Not measured: no GPU was at hand.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import round_to
from kernels.cuda.compile import Variant
from kernels.cuda.norm import check_rows, inverse_scale, largest_magnitude_bits, quantize_values
from kernels.ops import Activations, QuantizedActivations

NUM_WARPS = 4
BLOCK = 1024
"""Elements of one program without quantization: 8 a thread with 4 warps, one 16-byte load each of gate and up."""

MAX_ROW_BLOCK = 16384
"""The longest row whose products one program keeps in registers until their scale is known."""


@triton.jit
def _product(gate, up, GELU: tl.constexpr):
    """act(gate) * up in float32.

    Both activations are gate / (1 + exp(-z)): z = gate for silu, and z = 2 * sqrt(2 / pi) * (gate + 0.044715 gate^3)
    for gelu in its tanh form, because (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)). That keeps its relative accuracy on both
    sides, where 1 + tanh(u) cancels for negative u. For negative z it is gate * exp(z) / (1 + exp(z)), which does not
    overflow. Explicit fma and rounded division: equal bits in every kernel.
    """
    z = gate
    if GELU:
        z = gate * tl.fma(gate * gate, 0.07135481282715053, 1.5957691216057308)
    e = tl.exp(-tl.abs(z))
    return tl.div_rn(gate * tl.where(z < 0, e, 1.0), 1.0 + e) * up


@triton.jit
def _gated(
    gate_up_ptr,  # [T, 2 * I]
    out_ptr,  # [T, I]
    LENGTH,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one row. Rows are the grid's first axis, which may be long."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < LENGTH
    gate_ptr = gate_up_ptr + row * 2 * LENGTH
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + LENGTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * LENGTH + column, round_to(_product(gate, up, GELU), out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_quantized(
    gate_up_ptr,  # [T, 2 * I]
    out_ptr,  # int8 [T, I]
    scales_ptr,  # float32 [T]
    LENGTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. Where it is longer than BLOCK its products are computed twice: for the largest, then to be quantized."""
    row = tl.program_id(0)
    gate_ptr = gate_up_ptr + row.to(tl.int64) * 2 * LENGTH
    out_ptr += row.to(tl.int64) * LENGTH
    column = tl.arange(0, BLOCK)
    bits = tl.zeros([], tl.int32)
    product = tl.zeros([BLOCK], tl.float32)
    for first in tl.static_range(0, LENGTH, BLOCK):
        inside = first + column < LENGTH
        gate = tl.load(gate_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + LENGTH + first + column, mask=inside, other=0.0).to(tl.float32)
        # Rounded first, as if the two were separate operations.
        product = round_to(_product(gate, up, GELU), gate_up_ptr.dtype.element_ty).to(tl.float32)
        bits = tl.maximum(bits, largest_magnitude_bits(product))
    largest = bits.to(tl.float32, bitcast=True)
    tl.store(scales_ptr + row, tl.div_rn(largest, 127.0))
    inverse = inverse_scale(largest)
    for first in tl.static_range(0, LENGTH, BLOCK):
        inside = first + column < LENGTH
        if LENGTH > BLOCK:
            gate = tl.load(gate_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_ptr + LENGTH + first + column, mask=inside, other=0.0).to(tl.float32)
            product = round_to(_product(gate, up, GELU), gate_up_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + first + column, quantize_values(product, inverse), mask=inside)


def gated(gate_up: Tensor, activation: Literal["silu", "gelu"], quantize: bool) -> Activations:
    """gate_up [T, 2 * I], contiguous, gate first -> activation(gate) * up, [T, I] in its dtype or quantized.

    Computed in float32 and rounded once. The quantized values are those of the rounded product, as if the two were
    separate operations. Raises ValueError for another shape, dtype or activation.
    Floor: T * I * 3 elements over the bandwidth; quantized, 2 elements and a byte.
    """
    check_rows("gate_up", gate_up)
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up has rows of {width} elements; gate and up must be equally long")
    if activation not in ("silu", "gelu"):
        raise ValueError(f"activation is {activation!r}; 'silu' and 'gelu' are supported")
    gelu, half = activation == "gelu", width // 2
    if not quantize:
        out = torch.empty((rows, half), dtype=gate_up.dtype, device=gate_up.device)
        if rows and half:
            _gated[(rows, triton.cdiv(half, BLOCK))](
                gate_up, out, half, GELU=gelu, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
            )
        return out
    values = torch.empty((rows, half), dtype=torch.int8, device=gate_up.device)
    scales = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    if rows:
        block, warps = _row_launch(half)
        _gated_quantized[(rows,)](
            gate_up, values, scales, LENGTH=half, GELU=gelu, BLOCK=block, num_warps=warps, enable_fp_fusion=True
        )
    return QuantizedActivations(values, scales)


def _row_launch(length: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a program that takes a row of `length`: 32 products a thread at most. Not measured."""
    block = min(triton.next_power_of_2(length), MAX_ROW_BLOCK)
    return block, max(1, min(16, block // 512))


def variants(capability: int) -> list[Variant]:
    """Both activations in pieces; the quantized row that fits one program's registers and the one that does not."""
    pointers = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}
    found = [
        Variant(
            f"{'gelu' if gelu else 'silu'} bf16",
            _gated,
            signature={**pointers, "LENGTH": "i32"},
            constants={"GELU": gelu, "BLOCK": BLOCK},
            aligned=frozenset([*pointers, "LENGTH"]),
            num_warps=NUM_WARPS,
        )
        for gelu in (False, True)
    ]
    pointers = {"gate_up_ptr": "*bf16", "out_ptr": "*i8", "scales_ptr": "*fp32"}
    for length, hot in ((14336, True), (28672, False)):
        block, warps = _row_launch(length)
        constants = {"LENGTH": length, "GELU": False, "BLOCK": block}
        name = f"silu i{length} bf16 int8"
        found.append(
            Variant(name, _gated_quantized, pointers, constants, frozenset(pointers), num_warps=warps, hot=hot)
        )
    return found
