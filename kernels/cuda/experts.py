"""A mixture of experts: the experts of each token, their linear layers as one grouped product, and the weighted sum.

A token and one of its k experts are a pair, number token * k + rank. Pairs are sorted by expert; each program takes a
tile of pairs of one expert and some output features, reads the pairs' rows where they lie and writes to the pairs'
rows. As in `kernels.cuda.linear` the weight is the first operand of the product and K is walked in one order, so a
row's bits depend neither on the tile that it lies in nor on the others.

Sorting takes a few small launches of torch's operators, without waiting for the device, at shapes that depend on the
number of tokens alone. Floor: with few rows the bytes of the experts in use over the bandwidth, with many
2 * T * k * N * K over the matrix rate. Not measured: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import TRITON_TYPES, round_to
from kernels.cuda.compile import Variant
from kernels.cuda.linear import CudaLinear, chain
from kernels.experts import StackedExperts
from kernels.ops import QuantizationMode, QuantizedActivations

BLOCK_N = 64
NUM_WARPS = 4
NUM_STAGES = 3
COMBINE_BLOCK = 1024


class CudaExperts(StackedExperts[CudaLinear]):
    """One weight, as `kernels.cuda.linear` reads it."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The pairs of a step by expert. pairs: int32 [T * k], sorted; experts, firsts, ends: int32 [tiles], of each tile
    of `block_m` pairs its expert and where among the sorted pairs it and its expert's pairs end; a tile that is not
    needed begins at its end."""

    pairs: Tensor
    experts: Tensor
    firsts: Tensor
    ends: Tensor
    block_m: int


@triton.jit
def _route(
    logits_ptr,  # float32 [T, E]
    experts_ptr,  # int32 [T, TOP_K]
    weights_ptr,  # float32 [T, TOP_K]
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One token: the TOP_K largest logits, the lower index first on a tie, and their weights. A row that is not finite
    gets the first experts, with weights that are NaN."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, E_BLOCK)
    inside = index < E
    logits = tl.load(logits_ptr + row * E + index, mask=inside, other=0.0)
    sound = tl.sum(tl.where(logits * 0.0 == 0.0, 0, 1), axis=0) == 0
    logits = tl.where(inside, tl.where(sound, logits, 0.0), float("-inf"))
    rank = tl.arange(0, K_BLOCK)
    chosen = tl.zeros([K_BLOCK], tl.int32)
    values = tl.full([K_BLOCK], float("-inf"), tl.float32)
    left = logits
    for k in tl.static_range(TOP_K):
        best = tl.max(left, axis=0)
        expert = tl.min(tl.where((left == best) & inside, index, E_BLOCK), axis=0)
        chosen = tl.where(rank == k, expert, chosen)
        values = tl.where(rank == k, best, values)
        left = tl.where(index == expert, float("-inf"), left)
    largest = tl.max(values, axis=0)
    powers = tl.exp(values - largest)
    total = tl.sum(powers, axis=0) if NORMALIZE else tl.sum(tl.exp(logits - largest), axis=0)
    weights = tl.where(sound, tl.div_rn(powers, tl.zeros_like(powers) + total), float("nan"))
    tl.store(experts_ptr + row * TOP_K + rank, chosen, mask=rank < TOP_K)
    tl.store(weights_ptr + row * TOP_K + rank, weights, mask=rank < TOP_K)


@triton.jit
def _expert_linear(
    x_ptr,  # [T * k / DIVISOR, K]
    w_ptr,  # [E * N, K]
    w_scales_ptr,  # float32 [E * N], or None
    x_scales_ptr,  # float32 [T * k / DIVISOR], or None
    out_ptr,  # [T * k, N]
    pairs_ptr,
    experts_ptr,
    firsts_ptr,
    ends_ptr,
    N,
    K,
    DIVISOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """A tile of pairs of one expert by BLOCK_N output features: out[pair] = W[expert] x[pair // DIVISOR]."""
    tile = tl.program_id(0)
    first, end = tl.load(firsts_ptr + tile), tl.load(ends_ptr + tile)
    if first < end:
        expert = tl.load(experts_ptr + tile).to(tl.int64)
        place = first + tl.arange(0, BLOCK_M)
        inside_m = place < end
        # Beyond the last pair the last is read again, and not stored.
        pair = tl.load(pairs_ptr + tl.minimum(place, end - 1)).to(tl.int64)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < N
        feature = expert * N + tl.minimum(n, N - 1)
        step = tl.arange(0, BLOCK_K)
        w_ptrs = w_ptr + feature[:, None] * K + step[None, :]
        x_ptrs = x_ptr + (pair // DIVISOR)[None, :] * K + step[:, None]
        sum_type: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
        zero = tl.zeros([BLOCK_N, BLOCK_M], sum_type)
        y = chain(zero, w_ptrs, x_ptrs, 0, K, BLOCK_K, EVEN_K).to(tl.float32)
        if x_scales_ptr is not None:
            y = y * tl.load(x_scales_ptr + pair // DIVISOR)[None, :]
        if w_scales_ptr is not None:
            y = y * tl.load(w_scales_ptr + feature)[:, None]
        out_ptrs = out_ptr + pair[None, :] * N + n[:, None]
        tl.store(out_ptrs, round_to(y, out_ptr.dtype.element_ty), mask=inside_n[:, None] & inside_m[None, :])


@triton.jit
def _combine(
    made_ptr,  # [T * TOP_K, H]
    weights_ptr,  # float32 [T, TOP_K]
    out_ptr,  # [T, H]
    H,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one row: the weighted sum from the token's first expert to its last."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        made = tl.load(made_ptr + (row * TOP_K + rank) * H + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(made, tl.zeros_like(made) + tl.load(weights_ptr + row * TOP_K + rank), total)
    tl.store(out_ptr + row * H + column, round_to(total, out_ptr.dtype.element_ty), mask=inside)


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E], contiguous -> experts int32 [T, top_k] and their weights float32 [T, top_k]."""
    rows, count = logits.shape
    experts = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    if rows:
        _route[(rows,)](
            logits,
            experts,
            weights,
            E=count,
            E_BLOCK=triton.next_power_of_2(count),
            TOP_K=top_k,
            K_BLOCK=triton.next_power_of_2(top_k),
            NORMALIZE=normalize,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return experts, weights


def group(experts: Tensor, num_experts: int) -> Groups:
    """experts int32 [T, k] -> its pairs by expert, in tiles. Nothing here waits for the device."""
    flat = experts.flatten().long()
    count = flat.numel()
    # Tiles of 16 pairs until they are full on the average; the bits of a row are the same in either.
    block_m = 16 if count <= 32 * num_experts else 64
    tiles = count // block_m + min(num_experts, count)  # at most: each expert's last tile may be partly filled
    pairs = torch.sort(flat, stable=True).indices.int()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    last = counts.cumsum(0)
    of_expert = (counts + block_m - 1) // block_m
    last_tile = of_expert.cumsum(0)
    tile = torch.arange(tiles, device=flat.device)
    expert = torch.searchsorted(last_tile, tile, right=True).clamp_(max=num_experts - 1)
    ends = last[expert]
    firsts = ends - counts[expert] + (tile - last_tile[expert] + of_expert[expert]) * block_m
    return Groups(pairs, expert.int(), firsts.int(), ends.int(), block_m)


def expert_linear(x: Tensor | QuantizedActivations, weight: CudaExperts, groups: Groups, divisor: int) -> Tensor:
    """x [T * k / divisor, K], contiguous, in the weight's dtype (w8a8: quantized) -> [T * k, N]: each pair's row by its
    expert. divisor: k where a token's pairs share a row, else 1."""
    values, scales = (x.values, x.scales) if isinstance(x, QuantizedActivations) else (x, None)
    own, n, k = weight.stacked, weight.out_features, weight.in_features
    out = torch.empty((groups.pairs.numel(), n), dtype=own.dtype, device=values.device)
    if out.numel():
        _expert_linear[(groups.experts.numel(), triton.cdiv(n, BLOCK_N))](
            values,
            own.weight,
            own.scales,
            scales,
            out,
            groups.pairs,
            groups.experts,
            groups.firsts,
            groups.ends,
            n,
            k,
            DIVISOR=divisor,
            **_tile(own.mode, own.dtype, k, groups.block_m),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            enable_fp_fusion=True,
        )
    return out


def combine(made: Tensor, weights: Tensor) -> Tensor:
    """made [T * k, H], weights float32 [T, k] -> [T, H] in made's dtype."""
    rows, top_k = weights.shape
    out = torch.empty((rows, made.shape[1]), dtype=made.dtype, device=made.device)
    if rows:
        _combine[(rows, triton.cdiv(made.shape[1], COMBINE_BLOCK))](
            made,
            weights,
            out,
            made.shape[1],
            TOP_K=top_k,
            BLOCK=COMBINE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _tile(mode: QuantizationMode, dtype: torch.dtype, k: int, block_m: int) -> dict[str, int | bool]:
    """The step along K depends on the weight alone, for it decides the bits."""
    block_k = 128 if mode == "w8a8" else 32 if dtype == torch.float32 else 64
    return {"BLOCK_N": BLOCK_N, "BLOCK_M": block_m, "BLOCK_K": block_k, "EVEN_K": k % block_k == 0}


def variants(capability: int) -> list[Variant]:
    """Qwen3-30B-A3B and Mixtral: few rows and many, in every mode."""
    found = []
    integers = dict.fromkeys(("pairs_ptr", "experts_ptr", "firsts_ptr", "ends_ptr"), "*i32")
    modes: tuple[QuantizationMode, ...] = ("none", "w8a16", "w8a8")
    for mode in modes:
        for block_m in (16, 64):
            signature = {
                "x_ptr": "*i8" if mode == "w8a8" else "*bf16",
                "w_ptr": "*bf16" if mode == "none" else "*i8",
                "out_ptr": "*bf16",
                **integers,
                "N": "i32",
                "K": "i32",
            }
            signature |= {} if mode == "none" else {"w_scales_ptr": "*fp32"}
            signature |= {"x_scales_ptr": "*fp32"} if mode == "w8a8" else {}
            tile = _tile(mode, torch.bfloat16, 2048, block_m)
            missing = dict.fromkeys({"w_scales_ptr", "x_scales_ptr"} - set(signature))
            name = f"{mode} {TRITON_TYPES[torch.bfloat16]} {BLOCK_N}x{block_m}x{tile['BLOCK_K']}"
            constants: dict[str, object] = {**missing, **tile, "DIVISOR": 8}
            found.append(
                Variant(
                    name,
                    _expert_linear,
                    signature,
                    constants,
                    aligned=frozenset(signature),
                    num_warps=NUM_WARPS,
                    num_stages=NUM_STAGES,
                    matrix=True,
                )
            )
    for count, top_k, normalize in ((128, 8, False), (8, 2, True)):
        pointers = {"logits_ptr": "*fp32", "experts_ptr": "*i32", "weights_ptr": "*fp32"}
        sizes = {"E": count, "E_BLOCK": count, "TOP_K": top_k, "K_BLOCK": top_k, "NORMALIZE": normalize}
        name = f"route {top_k} of {count}"
        found.append(Variant(name, _route, pointers, sizes, aligned=frozenset(pointers), num_warps=1))
    pointers = {"made_ptr": "*bf16", "weights_ptr": "*fp32", "out_ptr": "*bf16", "H": "i32"}
    sizes = {"TOP_K": 8, "BLOCK": COMBINE_BLOCK}
    found.append(Variant("combine 8 bf16", _combine, pointers, sizes, aligned=frozenset(pointers), num_warps=4))
    return found
