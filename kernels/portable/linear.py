"""Linear layers on oneDNN with weights packed once, in bf16 or float32.

`mkldnn._reorder_linear_weight` and `mkldnn._linear_pointwise` are private, but they are what torch.compile's freezing
pass emits for every linear layer on a CPU since torch 2.0, and the public F.linear repacks the weight in every call
(N=14336, K=4096, bf16: 6.2 ms against 5.2 at one row, 9.6 against 8.0 at sixteen, on two Zen 4 cores).

Rows. oneDNN walks K in one order whatever the number of rows, except that it may take another kernel (a matrix-vector
product) for a single row, seen with N=8192, K=2048 in bf16 and with most float32 shapes. So fewer than four rows are
computed as four, which is also faster than two (K=768, bf16, weights from memory, two Zen 4 cores: N=4096 0.30 ms
against 0.33, N=32000 2.4 against 4.0). The rest is measured, not promised by oneDNN: `prepare` therefore compares, once
per shape, the bits of rows computed in calls of different sizes, and where they differ falls back to calls of exactly
`FIXED_ROWS` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_ROWS = 4
FIXED_ROWS = 16
_CHECKED_ROWS = (4, 5, 7, 16, 33, 130)


@dataclass(frozen=True, slots=True)
class PortableLinear:
    """A packed weight [N, K], opaque to all but oneDNN, and its bias [N] or None.

    fixed_rows: whether every call must have exactly FIXED_ROWS rows to be row-invariant.
    rows: the weight as it was, for `embedding`; None where it was not asked for.
    """

    out_features: int
    in_features: int
    packed: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    fixed_rows: bool
    rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, its rows where they are kept, and the bias."""
        parts = (self.bias, self.rows)
        packed = self.out_features * self.in_features * self.dtype.itemsize
        return packed + sum(part.nbytes for part in parts if part is not None)


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, fixed_rows: bool) -> PortableLinear:
    """Convert to `dtype` and pack."""
    out_features, in_features = weight.shape
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), None)
        own_bias = None if bias is None else bias.detach().to(dtype).contiguous()
    return PortableLinear(out_features, in_features, packed, own_bias, dtype, fixed_rows)


def apply(x: Tensor, weight: PortableLinear) -> Tensor:
    """x [T, K] in the weight's dtype -> [T, N], accumulated in float32."""
    rows = x.shape[0]
    if weight.fixed_rows:
        return _apply_fixed(x, weight)
    if rows < MIN_ROWS:
        padded = x.new_empty(MIN_ROWS, x.shape[1])
        padded[:rows] = x
        padded[rows:] = x[0]
        return _call(padded, weight)[:rows]
    return _call(x, weight)


def rows_agree(weight: PortableLinear) -> bool:
    """Whether a row has the same bits in calls of 4 to 130 rows, at the start and at the end of the call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_CHECKED_ROWS), weight.in_features, generator=generator).to(weight.dtype)
    expected = _call(x, weight)
    for rows in _CHECKED_ROWS:
        if not torch.equal(_call(x[:rows], weight), expected[:rows]):
            return False
        if not torch.equal(_call(x[-rows:], weight), expected[-rows:]):
            return False
    return True


def _call(x: Tensor, weight: PortableLinear) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.packed, weight.bias, "none", [], "")
    return y


def _apply_fixed(x: Tensor, weight: PortableLinear) -> Tensor:
    """In pieces of exactly FIXED_ROWS rows, the last one padded with zeros."""
    rows = x.shape[0]
    pieces = -(-rows // FIXED_ROWS)
    padded = x.new_zeros(pieces * FIXED_ROWS, x.shape[1])
    padded[:rows] = x
    return torch.cat([_call(piece, weight) for piece in torch.split(padded, FIXED_ROWS)])[:rows]
