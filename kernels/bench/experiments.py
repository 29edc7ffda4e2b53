"""Questions about bits that only the device can answer. In the interpreter the same code runs, and proves only that."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bench.cases import DTYPE, MODES, attention_plan, random, random_cache
from kernels.bench.workload import Sizes
from kernels.cuda import attention, linear
from kernels.cuda.common import dot
from kernels.cuda.workspace import Workspace
from kernels.int8 import quantize_rows
from kernels.ops import KVCacheSpec, QuantizedActivations

Answer = dict[str, object]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    out_ptr,  # float32 [M, N]
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of a @ b^T, its sum along K in steps of BLOCK_K whatever the tile."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + first + k[None, :])
        b = tl.load(b_ptr + n[None, :] * K + first + k[:, None])
        acc = dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


def tiled_product(a: Tensor, b: Tensor, block_m: int, block_n: int) -> tuple[Tensor, str]:
    """(a [M, K] @ b [N, K]^T in tiles, float32; the matrix instruction that the compiler chose for the tile)."""
    out = torch.full((a.shape[0], b.shape[0]), float("nan"), device=a.device)
    grid = (a.shape[0] // block_m, b.shape[0] // block_n)
    kernel = _product[grid](
        a, b, out, N=b.shape[0], K=a.shape[1], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, num_warps=4,
        num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    if kernel is None:
        return out, "interpreted"
    families = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
    return out, next((family for family in families if family in kernel.asm["ptx"]), "none")


def compared(question: str, pairs: list[tuple[Tensor, Tensor]]) -> Answer:
    """Whether all pairs are equal to the bit, and which share of the elements is not. A NaN is equal to nothing."""
    differing = sum(int((a != b).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    return {"question": question, "equal": differing == 0, "differing_share": differing / total, "elements": total}


def instruction_families(k: int, device: torch.device) -> list[Answer]:
    """On compute capability 9.0 a tile of 16 or 32 rows is multiplied by mma.sync, one of 64 or 128 by wgmma."""
    a, b = random(128, k, device=device), random(128, k, device=device)
    rows, families = {}, {}
    for block in (16, 32, 64, 128):
        rows[block], families[block] = tiled_product(a, b, block, 64)
    widths = [tiled_product(a, b, 64, block)[0] for block in (16, 64, 128)]

    def same(first: int, second: int) -> Answer:
        used = f"{families[first]} and {families[second]}"
        return compared(f"tiles of {first} and of {second} rows ({used})", [(rows[first], rows[second])])

    across = compared("tiles of 64 rows, 16, 64 and 128 columns wide", list(pairwise(widths)))
    return [same(16, 64), same(16, 32), same(64, 128), across]


def row_invariance(sizes: Sizes, device: torch.device) -> list[Answer]:
    """The real operators: the first rows alone and in the largest call; one prompt at once and token by token."""
    answers = []
    for mode in MODES:
        pairs = []
        for _, n, k in sizes.linears:
            weight = linear.prepare(random(n, k, device=device), None, mode, device, DTYPE)
            x, workspace = random(max(sizes.rows), k, device=device), Workspace(device)
            values, scales = quantize_rows(x)

            def first(rows: int) -> Tensor:
                given = QuantizedActivations(values[:rows], scales[:rows]) if mode == "w8a8" else x[:rows]  # noqa: B023
                return linear.linear(given, weight, workspace)  # noqa: B023

            whole = first(max(sizes.rows))
            pairs += [(first(rows), whole[:rows]) for rows in sizes.rows]
        answers.append(compared(f"linear {mode}: a row's bits whatever M", pairs))
    heads, length = sizes.heads[0], min(sizes.prefill)
    spec = KVCacheSpec(heads.kv, heads.dim, sizes.block_size, DTYPE)
    table = list(range(-(-length // sizes.block_size)))
    cache, workspace = random_cache(spec, len(table), device), Workspace(device)
    query, scale = random(length, heads.query, heads.dim, device=device), heads.dim**-0.5
    whole_plan = attention_plan([length], [length], [table], sizes.block_size, device)
    whole = attention.paged_attention(query, cache, whole_plan, scale, None, workspace)
    ends = sorted({1, 2, sizes.block_size + 1, length // 2, length - 1, length})
    # All these sequences are beginnings of the same one, so they share its blocks.
    plan = attention_plan([1] * len(ends), ends, [table] * len(ends), sizes.block_size, device)
    at = torch.tensor(ends, device=device) - 1
    alone = attention.paged_attention(query[at], cache, plan, scale, None, workspace)
    return [*answers, compared("attention: decode equals prefill", [(alone, whole[at])])]
