"""Weights in panels of 16 output features, as csrc/linear.h reads them.

    "none"    [N / 16][K][16] in the checkpoint's type     y is a chain of multiply-adds along k, in float32
    "w8a16"   the same in int8                             the same, times the feature's scale
    "w8a8"    [N / 16][K / g][16][g] in int8               exact integers, times the row's and the feature's scale

g is what the instruction set multiplies at once (`Team.group_of`): four 8-bit integers (AVX-512, which takes them
without a sign: they are stored 128 higher), or two of 16 bits where the instructions for 8 bits are not exact (AVX2).

A row of any of them can be read back, so that a tied head and the table of token vectors are one weight.

Floor: with few rows, the bytes of the weight over the bandwidth of the memory; with many, N * K multiply-adds a row
over the rate of the vector units (docs/cpu.md has what was measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.native import INT8_DOT, TYPES, library, zeros
from kernels.int8 import quantize_rows
from kernels.ops import QuantizationMode, QuantizedWeight

LANES = 16
MAX_DOT_FEATURES = 65_536
"""The longest row whose sum of products fits an int32 with one factor up to 255: 2^31 / (255 * 128), rounded down."""


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A packed weight [N, K]. scales: float32 [N] where it is int8; bias: float32 [N] or None; type: of csrc/step.h."""

    out_features: int
    in_features: int
    mode: QuantizationMode
    packed: Tensor
    scales: Tensor | None
    bias: Tensor | None
    type: int

    @property
    def nbytes(self) -> int:
        """Bytes of panels, scales and bias."""
        return sum(tensor.nbytes for tensor in (self.packed, self.scales, self.bias) if tensor is not None)


def pack(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    mode: QuantizationMode,
    dtype: torch.dtype | None,
    group_of: int,
) -> CpuLinear:
    """Pack a weight. dtype: what an unquantized one is stored as; None: as it is (float64 becomes float32).

    Raises ValueError for a w8a8 weight with more than MAX_DOT_FEATURES input features.
    """
    n, k = weight.shape
    own_bias = None if bias is None else bias.detach().to(torch.float32).clone()
    panels = -(-n // LANES)
    if mode == "none":
        assert isinstance(weight, Tensor)
        stored = weight.detach().to(dtype or (weight.dtype if weight.dtype in TYPES else torch.float32)).contiguous()
        packed = zeros(panels * LANES * k, stored.dtype)
        library().stet_pack(stored.data_ptr(), n, k, stored.itemsize, packed.data_ptr())
        return CpuLinear(n, k, mode, packed, None, own_bias, TYPES[stored.dtype])
    values, scales = (weight.values, weight.scales) if isinstance(weight, QuantizedWeight) else _quantize(weight)
    values, scales = values.contiguous(), scales.to(torch.float32).contiguous().clone()
    if mode == "w8a16":
        packed = zeros(panels * LANES * k, torch.int8)
        library().stet_pack(values.data_ptr(), n, k, 1, packed.data_ptr())
        return CpuLinear(n, k, mode, packed, scales, own_bias, TYPES[torch.int8])
    if k > MAX_DOT_FEATURES:
        raise ValueError(f"weight has {k} input features; the int32 sums of w8a8 hold up to {MAX_DOT_FEATURES}")
    packed = zeros(panels * LANES * padded(k, group_of), torch.int8)
    library().stet_pack_dot(values.data_ptr(), n, k, group_of, packed.data_ptr())
    return CpuLinear(n, k, mode, packed, scales, own_bias, INT8_DOT)


def padded(features: int, group_of: int) -> int:
    """How many integers a quantized row of so many features takes: whole groups."""
    return -(-features // group_of) * group_of


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, some rows at a time: the float32 copies stay small, whatever the vocabulary."""
    n, k = weight.shape
    values, scales = torch.empty((n, k), dtype=torch.int8), torch.empty(n, dtype=torch.float32)
    piece = max(1, (1 << 22) // k)
    for first in range(0, n, piece):
        rows = slice(first, first + piece)
        values[rows], scales[rows] = quantize_rows(weight[rows])
    return values, scales
