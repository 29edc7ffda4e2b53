"""Fake quantization: in training, float32 arithmetic sees weights and activations as an int8 server will round them.

The rule is the server's own (`kernels.int8`), for weights by output channel and for activations by token, so the
forward pass has the integers that will be served. No scale is learned: each is tracked, that is, computed anew from the
largest magnitude that its row has in this step, just as the server does when it loads a weight or sees a token. (A
learned step, as in LSQ, arXiv:1902.08153, pays where clipping does. With 8 bits it does not: `compare` measures it,
and the model card has the numbers.)

Backward, rounding counts as the identity (the straight-through estimator: Bengio et al. 2013, arXiv:1308.3432; for
integer inference Jacob et al. 2018, arXiv:1712.05877), and the scale as a constant. A gradient would be zero where a
value is clipped; with the scale at the row's largest magnitude no value is, so every gradient passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8 import dequantize_rows, quantize_rows
from kernels.ops import QuantizationMode


class _StraightThrough(torch.autograd.Function):
    """Forward: what is left of the rows of x [..., K] after int8. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: bool) -> Tensor:
        return dequantize_rows(*quantize_rows(x.bfloat16() if stored else x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(x: Tensor) -> Tensor:
    """Activations float32 [..., K] -> the same after int8, one scale a row."""
    return _StraightThrough.apply(x, False)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """A weight float32 [N, K] -> the same as it will be served: rounded to bfloat16, as it is exported, then int8.

    Through bfloat16, so that the integers of the exported file are those of the training to the bit. The weight itself
    stays float32, or small updates would be lost.
    """
    return _StraightThrough.apply(weight, True)  # type: ignore[no-untyped-call, no-any-return]


def linear(x: Tensor, weight: Tensor, mode: QuantizationMode) -> Tensor:
    """x [..., K], weight [N, K] -> x @ weight^T [..., N], as a server in `mode` computes it, but for the order of sums.

    "none" takes both as they are, "w8a16" quantizes the weight, "w8a8" the rows of x too.
    """
    if mode == "none":
        return F.linear(x, weight)
    return F.linear(fake_quantize(x) if mode == "w8a8" else x, fake_quantize_weight(weight))


def embedding(ids: Tensor, table: Tensor, mode: QuantizationMode) -> Tensor:
    """ids int64 [...], table [V, H] -> its rows [..., H], as a server in `mode` reads them."""
    rows = F.embedding(ids, table)
    return rows if mode == "none" else fake_quantize_weight(rows)
