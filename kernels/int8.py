"""Symmetric int8 quantization by rows, in float32: the one definition that every backend follows to the bit.

    scale = max|x| / 127,   q = rint(x * (127 / max|x|))  in -127 .. 127,   x is about q * scale

Each operation is rounded once, to nearest even, as IEEE 754 says. A row of zeros has scale 0. A row that holds a NaN or
an infinity has a scale that is not finite (its q are then meaningless): a fault stays visible after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (q int8 [..., K], scale float32 [...])."""
    values = x.to(torch.float32)
    largest = values.abs().amax(-1)
    # A tensor, because torch multiplies by a reciprocal, rounding twice, where one side of a division is a number.
    bound = torch.full_like(largest, LARGEST)
    inverse = torch.where(largest > 0, bound / largest, torch.zeros_like(largest))
    rounded = torch.round(values * inverse[..., None])
    # NaN has no integer; clamping also guards the one value that 127 / max * max could round above 127.
    quantized = torch.nan_to_num(rounded, nan=0.0).clamp(-LARGEST, LARGEST).to(torch.int8)
    return quantized, largest / bound


def dequantize_rows(quantized: Tensor, scales: Tensor) -> Tensor:
    """q int8 [..., K], scale float32 [...] -> float32 [..., K]."""
    return quantized.to(torch.float32) * scales[..., None]
