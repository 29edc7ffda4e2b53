"""Linear layers on oneDNN's float32 and bf16 products, from weights packed once or kept as rows.

    packed   the weight in oneDNN's own layout, in the dtype of the activations: float32, and bf16 where oneDNN has it
    rows     [N, K] in int8 (w8a16, w8a8), or in bf16 where oneDNN has none (x86 without AVX-512): each call turns a few
             output features at a time to float32, multiplies in float32, and scales and rounds what comes out

`mkldnn._reorder_linear_weight` and `mkldnn._linear_pointwise` are private, but they are what torch.compile's freezing
pass emits for every linear layer on a CPU since torch 2.0, and the public F.linear repacks the weight in every call
(N=14336, K=4096, bf16: 6.2 ms against 5.2 at one row, 9.6 against 8.0 at sixteen, on two Zen 4 cores).

Rows. oneDNN walks K in one order whatever the number of rows, except that it may take another kernel (a matrix-vector
product) for a single row, seen with N=8192, K=2048 in bf16 and with most float32 shapes. So fewer than four rows are
computed as four, which is also faster than two (K=768, bf16, weights from memory, two Zen 4 cores: N=4096 0.30 ms
against 0.33, N=32000 2.4 against 4.0). The rest is measured, not promised by oneDNN: `rows_agree` compares, once for
each shape, the bits of rows computed in calls of different sizes, and where they differ each row gets a call of its
own, always of the same shape and at the same place in it.

w8a8 needs no such check. Its product is exact: float32 holds every integer up to 2^24, and so every sum of up to
EXACT_FEATURES products of 8-bit integers, in whatever order; longer sums are added up in int32. oneDNN's own integer
product (`onednn.qlinear_pointwise`) is not used: without VNNI it adds pairs of products in 16 bits, which saturate, and
`torch._int_mm` is exact but takes 75 ms where this takes 5 (16 rows, N=3072, K=1024, one Zen 4 core with AVX2).
`is_exact` multiplies the largest numbers once, and w8a8 is refused where a library should compute otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.int8 import LARGEST, quantize_rows
from kernels.ops import QuantizationMode, QuantizedActivations, QuantizedWeight
from kernels.portable.workspace import Workspace

MIN_ROWS = 4
_CHECKED_ROWS = (4, 5, 7, 16, 33, 130)
EXACT_FEATURES = (1 << 24) // LARGEST**2
MAX_DOT_FEATURES = ((1 << 31) - 1) // LARGEST**2
BLOCK_VALUES = 1 << 20
"""Values of a weight that are float32 at a time: 4 MiB, which the last-level cache holds until they are multiplied."""


@dataclass(frozen=True, slots=True)
class PortableLinear:
    """A weight [N, K] as prepared.

    dtype: that of the activations and of the result. weight: rows [N, K] in int8 or `dtype`, or, if `packed`, opaque
    to all but oneDNN. scales: float32 [N] for int8. bias: [N] in `dtype`, or None. one_by_one: whether every row needs
    a call of its own to be row-invariant. table: rows for `embedding`, where they are kept beside a packed weight.
    """

    out_features: int
    in_features: int
    mode: QuantizationMode
    dtype: torch.dtype
    weight: Tensor
    packed: bool
    scales: Tensor | None
    bias: Tensor | None
    one_by_one: bool = False
    table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales, the bias, and the rows where they are kept besides."""
        itemsize = self.dtype.itemsize if self.mode == "none" else 1
        parts = (self.scales, self.bias, self.table)
        return self.out_features * self.in_features * itemsize + sum(part.nbytes for part in parts if part is not None)

    def token_rows(self, token_ids: Tensor, scale: float) -> Tensor | None:
        """Rows of the weight times `scale`, [T, K] in `dtype`; None if it was packed without keeping them."""
        rows = self.table if self.packed else self.weight
        if rows is None:
            return None
        found = rows.index_select(0, token_ids)
        if self.scales is not None:
            found = found * self.scales.index_select(0, token_ids)[:, None]
        # A number times a bfloat16 tensor would first be rounded to bfloat16 itself.
        return (found if scale == 1.0 else found.to(torch.float32) * scale).to(self.dtype)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs and multiplies this dtype on this processor, found by doing it."""
    if dtype == torch.float32:
        return True
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
        _call(torch.zeros(MIN_ROWS, 16, dtype=dtype), packed, None)
    except RuntimeError:
        return False
    return True


def prepare(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    mode: QuantizationMode,
    dtype: torch.dtype,
    packed: bool,
    table: bool,
) -> PortableLinear:
    """Quantize, or convert to `dtype` and, if `packed`, pack. Raises ValueError for more features than a sum holds."""
    out_features, in_features = weight.shape
    if mode == "w8a8" and in_features > MAX_DOT_FEATURES:
        raise ValueError(
            f"weight has {in_features} input features; the int32 sums of w8a8 hold up to {MAX_DOT_FEATURES}"
        )
    with torch.inference_mode(False), torch.no_grad():
        own_bias = None if bias is None else bias.detach().to(dtype, copy=True).contiguous()
        if isinstance(weight, QuantizedWeight):
            values, scales = weight.values.detach().contiguous(), weight.scales.detach().contiguous()
            return PortableLinear(out_features, in_features, mode, dtype, values, False, scales, own_bias)
        if mode != "none":
            values, scales = quantize_rows(weight.detach())
            return PortableLinear(out_features, in_features, mode, dtype, values, False, scales, own_bias)
        rows = weight.detach().to(dtype, copy=table or not packed).contiguous()
        whole = PortableLinear(out_features, in_features, mode, dtype, rows, False, None, own_bias)
        if not packed:
            return whole
        opaque = torch.ops.mkldnn._reorder_linear_weight(rows, None)
        return replace(whole, weight=opaque, packed=True, table=rows if table else None)


def apply(x: Tensor, weight: PortableLinear, workspace: Workspace) -> Tensor:
    """x [T, K] in the weight's dtype -> [T, N], accumulated in float32; not for w8a8."""
    if weight.packed:
        return _rows(x, weight.weight, weight.bias, weight.one_by_one)
    x = x.to(torch.float32)
    y = torch.empty(x.shape[0], weight.out_features)
    for features in _blocks(weight.out_features, weight.in_features):
        y[:, features] = _rows(x, _float32(weight, features, slice(None), workspace), None, weight.one_by_one)
    return _finish(y, weight)


def apply_quantized(x: QuantizedActivations, weight: PortableLinear, workspace: Workspace) -> Tensor:
    """The same for w8a8: exact integers, times the row's scale, times the feature's."""
    y = integer_product(x.values, weight, workspace).to(torch.float32)
    return _finish(y.mul_(x.scales[:, None]), weight)


def integer_product(values: Tensor, weight: PortableLinear, workspace: Workspace) -> Tensor:
    """values int8 [T, K] times an int8 weight, unscaled: int32 [T, N]."""
    values = values.to(torch.float32)
    total = torch.zeros(values.shape[0], weight.out_features, dtype=torch.int32)
    pieces = [slice(k, k + EXACT_FEATURES) for k in range(0, weight.in_features, EXACT_FEATURES)]
    for features in _blocks(weight.out_features, min(weight.in_features, EXACT_FEATURES)):
        for piece in pieces:
            some = _call(values[:, piece].contiguous(), _float32(weight, features, piece, workspace), None)
            total[:, features] += some.to(torch.int32)
    return total


def rows_agree(weight: PortableLinear, workspace: Workspace) -> bool:
    """Whether a row has the same bits in calls of 4 to 130 rows, at the start and at the end of the call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_CHECKED_ROWS), weight.in_features, generator=generator).to(weight.dtype)
    expected = apply(x, weight, workspace)
    for rows in _CHECKED_ROWS:
        if not torch.equal(apply(x[:rows], weight, workspace), expected[:rows]):
            return False
        if not torch.equal(apply(x[-rows:], weight, workspace), expected[-rows:]):
            return False
    return True


def is_exact(workspace: Workspace) -> bool:
    """Whether w8a8 gives the integers that it should: the largest sums of both signs, and random ones, over pieces."""
    generator = torch.Generator().manual_seed(0)
    features = 2 * EXACT_FEATURES + 7
    x = torch.randint(-LARGEST, LARGEST + 1, (7, features), dtype=torch.int8, generator=generator)
    values = torch.randint(-LARGEST, LARGEST + 1, (33, features), dtype=torch.int8, generator=generator)
    x[0], values[0], values[1] = LARGEST, LARGEST, -LARGEST
    weight = prepare(QuantizedWeight(values, torch.ones(33)), None, "w8a8", torch.float32, packed=False, table=False)
    return torch.equal(integer_product(x, weight, workspace).long(), x.long() @ values.long().T)


def _blocks(out_features: int, in_features: int) -> Iterator[slice]:
    """Output features in blocks of about BLOCK_VALUES values: the same for every call."""
    size = max(1, BLOCK_VALUES // in_features)
    for first in range(0, out_features, size):
        yield slice(first, min(first + size, out_features))


def _float32(weight: PortableLinear, features: slice, piece: slice, workspace: Workspace) -> Tensor:
    """Some output and input features of a weight kept as rows; valid until the next call."""
    part = weight.weight[features, piece]
    return workspace.take("weight", tuple(part.shape), torch.float32).copy_(part)


def _finish(y: Tensor, weight: PortableLinear) -> Tensor:
    """Scale the features of float32 y, add the bias, round once."""
    if weight.scales is not None:
        y.mul_(weight.scales)
    if weight.bias is not None:
        y.add_(weight.bias)
    return y.to(weight.dtype)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, one_by_one: bool) -> Tensor:
    """x @ weight^T + bias in calls in which a row's bits do not depend on the others."""
    rows = x.shape[0]
    if one_by_one:
        # Every call has the same shape, and the row stands first in it.
        padded = x.new_zeros(MIN_ROWS, x.shape[1])
        results = []
        for row in x:
            padded[0] = row
            results.append(_call(padded, weight, bias)[:1])
        return torch.cat(results)
    if rows < MIN_ROWS:
        padded = x.new_empty(MIN_ROWS, x.shape[1])
        padded[:rows] = x
        padded[rows:] = x[0]
        return _call(padded, weight, bias)[:rows]
    return _call(x, weight, bias)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
