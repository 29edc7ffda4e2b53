"""Linear layers: x @ W^T in bf16, fp16 or fp32, with int8 weights (w8a16), and with int8 weights and rows (w8a8).

One reduction order whatever the number of rows. On a GPU the instruction that multiplies small tiles is not the one
that multiplies large tiles, and the two may round differently; so the operands are swapped: the weight is the first
operand, 64 or 128 output features wide, and the rows are the second, 16 to 256 wide. That is one family of instructions
for every number of rows (`wgmma` on compute capability 9.0), and each element of the output is one chain of sums along
K.

With few rows there are too few tiles to fill the device, so K is cut into segments, as many as the weight's shape asks
for (`tuned.segments`), and the result is ((s0 + s1) + s2) + ... in float32. Who adds depends on the number of rows:
with few, each segment has a program of its own that leaves its sum in the workspace, and the last to arrive adds them
all, in order; with many, one program walks the segments. The bits are the same.

Floor: with few rows the bytes of the weight over the bandwidth; with many 2 * T * N * K over the matrix rate. Not
measured: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_weight
from kernels.cuda import tuned
from kernels.cuda.common import INTERPRETED, TRITON_TYPES, dot, round_to
from kernels.cuda.compile import Variant
from kernels.cuda.tuned import Tile
from kernels.cuda.workspace import Workspace
from kernels.int8 import quantize_rows
from kernels.ops import QuantizationMode, QuantizedActivations, QuantizedWeight

MAX_INT8_FEATURES = 131_071
"""The longest row of which 127 * 127 * K fits an int32: 2^31 / 127^2 = 133,144, and the next lower 2^17 - 1."""


@triton.jit
def _weight_operand(w, dtype: tl.constexpr):
    """int8 -> the rows' type, exactly; other types unchanged."""
    if w.dtype != tl.int8:
        return w
    if INTERPRETED:
        return w.to(tl.float32)
    return w.to(dtype)


@triton.jit
def chain(
    acc,  # [BLOCK_N, BLOCK_M], float32, or int32 for int8 rows
    w_ptrs,  # [BLOCK_N, BLOCK_K], at first_k
    x_ptrs,  # [BLOCK_K, BLOCK_M], at first_k
    first_k,
    last_k,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """acc + W @ X^T over first_k <= k < last_k, BLOCK_K at a time."""
    step = tl.arange(0, BLOCK_K)
    for k in range(first_k, last_k, BLOCK_K):
        if EVEN_K:
            w, x = tl.load(w_ptrs), tl.load(x_ptrs)
        else:
            inside = step < last_k - k
            w = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x = tl.load(x_ptrs, mask=inside[:, None], other=0)
        if x.dtype == tl.int8:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = dot(_weight_operand(w, x.dtype), x.to(tl.float32) if INTERPRETED else x, acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _store(acc, n, m, rows, N, w_scales_ptr, x_scales_ptr, bias_ptr, out_ptr):
    """Scale, add the bias, round once, and write [BLOCK_N, BLOCK_M] to out [rows, N]."""
    inside_n, inside_m = n < N, m < rows
    y = acc.to(tl.float32)
    if x_scales_ptr is not None:
        y = y * tl.load(x_scales_ptr + m, mask=inside_m, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    if w_scales_ptr is not None:
        w_scales = tl.load(w_scales_ptr + n, mask=inside_n, other=0.0)[:, None]
        # An explicit fma, so that no variant of this kernel rounds twice where another rounds once.
        y = tl.fma(y, w_scales, bias) if bias_ptr is not None else y * w_scales
    elif bias_ptr is not None:
        y = y + bias
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptrs, round_to(y, out_ptr.dtype.element_ty), mask=inside_n[:, None] & inside_m[None, :])


@triton.jit(do_not_specialize=["rows", "segments"])
def _linear(
    x_ptr,  # [rows, K]
    w_ptr,  # [N, K]
    w_scales_ptr,  # float32 [N], or None
    x_scales_ptr,  # float32 [rows], or None
    bias_ptr,  # [N], or None
    out_ptr,  # [rows, N]
    partials_ptr,  # float32 or int32 [segments, tiles, BLOCK_N, BLOCK_M] if SPLIT, else None
    counters_ptr,  # int32 [tiles] if SPLIT, zero before and after, else None
    rows,
    N,
    K,
    segments,
    SEGMENT_K,
    SEGMENTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One tile of the output, or with SPLIT one segment of it."""
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    tiles = tiles_n * tiles_m
    tile = tl.program_id(0) % tiles
    segment = tl.program_id(0) // tiles
    # Tiles in groups of GROUP along the rows: within a group rows come first, then features.
    group = tile // (GROUP * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % group_rows
    tile_n = (tile % (GROUP * tiles_n)) // group_rows

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Beyond the last feature and row the last is read again: a mask would cost more, and nothing of it is stored.
    step = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + step[None, :]
    x_ptrs = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[None, :] * K + step[:, None]
    sum_type: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    zero = tl.zeros([BLOCK_N, BLOCK_M], sum_type)

    if SPLIT:
        first_k = segment * SEGMENT_K
        last_k = tl.minimum(first_k + SEGMENT_K, K)
        acc = chain(zero, w_ptrs + first_k, x_ptrs + first_k, first_k, last_k, BLOCK_K, EVEN_K)
        own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        own_ptrs = partials_ptr + tile.to(tl.int64) * (BLOCK_N * BLOCK_M) + own
        stride = tiles.to(tl.int64) * (BLOCK_N * BLOCK_M)
        tl.store(own_ptrs + segment * stride, acc)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == segments - 1:
            total = zero
            for first in range(0, segments, UNROLL):
                for i in tl.static_range(UNROLL):
                    # Past the L1 cache, where an earlier call's sums may still lie. Adding 0 changes no bits.
                    inside = tl.full([BLOCK_N, BLOCK_M], first + i, tl.int32) < segments
                    total += tl.load(own_ptrs + (first + i) * stride, mask=inside, other=0, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
            _store(total, n, m, rows, N, w_scales_ptr, x_scales_ptr, bias_ptr, out_ptr)
    elif SEGMENTED:
        total = zero
        for first_k in range(0, K, SEGMENT_K):
            last_k = tl.minimum(first_k + SEGMENT_K, K)
            total += chain(zero, w_ptrs + first_k, x_ptrs + first_k, first_k, last_k, BLOCK_K, EVEN_K)
        _store(total, n, m, rows, N, w_scales_ptr, x_scales_ptr, bias_ptr, out_ptr)
    else:
        acc = chain(zero, w_ptrs, x_ptrs, 0, K, BLOCK_K, EVEN_K)
        _store(acc, n, m, rows, N, w_scales_ptr, x_scales_ptr, bias_ptr, out_ptr)


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """weight [N, K]: in `dtype`, or int8 with scales float32 [N]; bias [N] in `dtype` or None. Outputs have `dtype`."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    mode: QuantizationMode
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        return sum(tensor.nbytes for tensor in (self.weight, self.scales, self.bias) if tensor is not None)


def prepare(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    mode: QuantizationMode,
    device: torch.device,
    dtype: torch.dtype,
) -> CudaLinear:
    """Move a weight [N, K] to the device, in `dtype` or quantized there.

    A weight that is there already, in `dtype` and contiguous, is shared (tied embeddings are stored once). Raises
    ValueError for another shape, an unknown mode, and for w8a8 with more than 131,071 input features.
    """
    check_weight(weight, bias, mode)
    n, k = weight.shape
    if mode == "w8a8" and k > MAX_INT8_FEATURES:
        raise ValueError(f"weight has {k} input features; the int32 sums of w8a8 hold up to {MAX_INT8_FEATURES}")
    own_bias = None if bias is None else bias.to(device, dtype).contiguous()
    if isinstance(weight, QuantizedWeight):
        return CudaLinear(weight.values.to(device).contiguous(), weight.scales.to(device), own_bias, mode, dtype)
    if mode == "none":
        return CudaLinear(weight.to(device, dtype).contiguous(), None, own_bias, mode, dtype)
    quantized = torch.empty((n, k), dtype=torch.int8, device=device)
    scales = torch.empty(n, dtype=torch.float32, device=device)
    piece = max(1, (1 << 24) // k)  # rows at a time: the float32 copies stay below 64 MB each, whatever the vocabulary
    for first in range(0, n, piece):
        rows = slice(first, first + piece)
        quantized[rows], scales[rows] = quantize_rows(weight[rows].to(device))
    return CudaLinear(quantized, scales, own_bias, mode, dtype)


def linear(
    x: Tensor | QuantizedActivations, weight: CudaLinear, workspace: Workspace, dtype: torch.dtype | None = None
) -> Tensor:
    """x [T, K], contiguous, in the weight's dtype (w8a8: `QuantizedActivations`) -> [T, N] in `dtype`; None: the
    weight's.

    y = x @ W^T, times the row's scale (w8a8) and the feature's (int8 weights), plus the bias; accumulated in float32,
    w8a8 exactly in int32; rounded once. A row whose scale is not finite gives a row that is not finite. Raises
    ValueError for another shape, dtype or kind of x.
    """
    if weight.mode == "w8a8":
        if not isinstance(x, QuantizedActivations):
            raise ValueError("x is not quantized; a weight of mode 'w8a8' takes QuantizedActivations")
        values, x_scales = x.values, x.scales
        if x_scales.shape != values.shape[:1] or x_scales.dtype != torch.float32 or not x_scales.is_contiguous():
            raise ValueError(f"x.scales must be float32 [{values.shape[0]}], got {tuple(x_scales.shape)}")
    else:
        if isinstance(x, QuantizedActivations):
            raise ValueError(f"x is quantized; a weight of mode {weight.mode!r} takes it unquantized")
        values, x_scales = x, None
    n, k = weight.weight.shape
    expected = torch.int8 if weight.mode == "w8a8" else weight.dtype
    if values.dim() != 2 or values.shape[1] != k or values.dtype != expected or not values.is_contiguous():
        raise ValueError(
            f"x must be [T, {k}] {expected}, contiguous; got {tuple(values.shape)} {values.dtype}, "
            f"strides {values.stride()}"
        )
    rows = values.shape[0]
    out = torch.empty((rows, n), dtype=dtype or weight.dtype, device=values.device)
    if rows:
        how = launch(weight.mode, weight.dtype, n, k, rows)
        partials = counters = None
        if how.constants["SPLIT"]:
            sum_type = torch.int32 if weight.mode == "w8a8" else torch.float32
            partials = workspace.take("linear partials", (how.partials,), sum_type)
            counters = workspace.take("linear counters", (how.tiles,), torch.int32, zeroed=True)
        _linear[(how.programs,)](
            values,
            weight.weight,
            weight.scales,
            x_scales,
            weight.bias,
            out,
            partials,
            counters,
            rows,
            n,
            k,
            how.segments,
            how.segment_k,
            **how.constants,
            num_warps=how.tile.num_warps,
            num_stages=how.tile.num_stages,
            enable_fp_fusion=True,
        )
    return out


@dataclass(frozen=True, slots=True)
class Launch:
    """How one call is launched. tiles: of the output; programs: the grid; partials: elements of the workspace."""

    tile: Tile
    tiles: int
    programs: int
    partials: int
    segments: int
    segment_k: int
    constants: dict[str, int | bool]


@lru_cache(maxsize=4096)
def launch(
    mode: QuantizationMode,
    dtype: torch.dtype,
    n: int,
    k: int,
    rows: int,
    tile: Tile | None = None,
    split: bool | None = None,
) -> Launch:
    """The launch for a weight [n, k] and a number of rows. tile, split: others than the chosen, in sweeps and tests."""
    tile = tile or tuned.tile(mode, dtype, n, k, rows)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(rows, tile.block_m)
    elements = tiles * tile.block_n * tile.block_m
    segments, segment_k = tuned.segments(mode, dtype, n, k)
    if split is None:
        split = elements <= tuned.MAX_SPLIT_ELEMENTS
    split = split and segments > 1
    elements_per_thread = tile.block_n * tile.block_m // (32 * tile.num_warps)
    return Launch(
        tile=tile,
        tiles=tiles,
        programs=tiles * (segments if split else 1),
        partials=elements * segments if split else 0,
        segments=segments,
        segment_k=segment_k,
        constants={
            # Integer sums are exact in any order, so who walks them all needs no second accumulator.
            "SEGMENTED": segments > 1 and mode != "w8a8",
            "SPLIT": split,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "GROUP": tile.group,
            "EVEN_K": k % tile.block_k == 0,
            # Partial sums loaded together, within 64 registers.
            "UNROLL": max(1, min(tuned.MAX_SEGMENTS, 64 // elements_per_thread)),
        },
    )


def variants(capability: int) -> list[Variant]:
    """The tile of every number of rows, split and not."""
    bf16 = torch.bfloat16
    small, middle, wide = (1024, 3072), (4096, 4096), (28672, 4096)  # [N, K]: many segments, some, one
    calls: list[tuple[QuantizationMode, tuple[int, int], int]] = [
        ("none", middle, 1),
        ("none", middle, 32),
        ("none", middle, 64),
        ("none", wide, 1),
        ("none", small, 128),
        ("none", middle, 4096),
        ("none", wide, 4096),
        ("w8a16", middle, 1),
        ("w8a16", middle, 64),
        ("w8a16", wide, 1),
        ("w8a16", middle, 4096),
        ("w8a16", wide, 4096),
        ("w8a8", middle, 1),
        ("w8a8", middle, 64),
        ("w8a8", middle, 4096),
    ]
    found = [_variant(mode, bf16, *shape, rows) for mode, shape, rows in calls]
    return [*found, _variant("none", torch.float32, *middle, 1)]


def _variant(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int, rows: int) -> Variant:
    """What `linear` compiles for this call, without bias."""
    how = launch(mode, dtype, n, k, rows)
    floating = f"*{TRITON_TYPES[dtype]}"
    signature = {
        "x_ptr": "*i8" if mode == "w8a8" else floating,
        "w_ptr": floating if mode == "none" else "*i8",
        "out_ptr": floating,
        **dict.fromkeys(("rows", "N", "K", "segments", "SEGMENT_K"), "i32"),
    }
    if mode != "none":
        signature["w_scales_ptr"] = "*fp32"
    if mode == "w8a8":
        signature["x_scales_ptr"] = "*fp32"
    if how.constants["SPLIT"]:
        signature |= {"partials_ptr": "*i32" if mode == "w8a8" else "*fp32", "counters_ptr": "*i32"}
    optional = ("w_scales_ptr", "x_scales_ptr", "bias_ptr", "partials_ptr", "counters_ptr")
    kind = "split" if how.constants["SPLIT"] else "walk" if how.constants["SEGMENTED"] else "whole"
    name = f"{mode} {TRITON_TYPES[dtype]} {how.tile.block_n}x{how.tile.block_m}x{how.tile.block_k} {kind}"
    return Variant(
        name,
        _linear,
        signature=signature,
        constants={**dict.fromkeys(p for p in optional if p not in signature), **how.constants},
        aligned=frozenset(signature) - {"rows", "segments"},
        num_warps=how.tile.num_warps,
        num_stages=how.tile.num_stages,
        hot=dtype != torch.float32,
        matrix=dtype != torch.float32 or mode == "w8a8",
    )
