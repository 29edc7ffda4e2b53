"""Paged attention: prompts, chunks, mixed batches and decode in one order of arithmetic.

A token's output must have the same bits however it was computed, so all that touches a reduction is the same for
a prompt of thousands of tokens and for one new token:

- The query heads of one KV head are packed as rows of a tile, one row for a token and head. A tile has 64 rows for
  every 4 warps, and warps lie along the rows only, so that the same matrix instruction and the same layout reduce each
  row whether a tile has 64 rows (decode) or 128 (prompts).
- Keys come in tiles of BLOCK_N tokens at absolute positions. The online softmax (arXiv:2205.14135) starts anew at every
  multiple of SPLIT tokens, and the results of the splits are merged from the first to the last with explicit fma: in
  registers where one program has them all, through float32 partials in memory where decode spreads them over programs.
- A tile or split of which a row sees nothing changes no bit of that row, so whether it was skipped (by the window,
  or because other rows of the tile need it) does not matter.

Decode pads its rows to 64: with 4 heads a group 15 rows of 16 are of no use. A tile of 64 keys of 128 elements in
bfloat16 takes a multiprocessor of an H200 about 1,700 cycles to read at its share of the bandwidth; the 4,096 exp2 of
the padded tile take 256 of the 16 a cycle, its products 512 at half rate. Memory-bound work can afford that.

A mask of a row's own sequence is by position alone; memory beyond a sequence is not read, except by the tensor memory
accelerator, which brings whole tiles of a page: what lies there beyond the sequence is masked like any other key, and
its values are set to zero.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.checks import check_paged_attention
from kernels.cuda import attention_launch
from kernels.cuda.attention_decode import decode_kernel
from kernels.cuda.attention_launch import (
    DECODE_ROWS,
    PREFILL_ROWS,
    by_descriptor,
    capability_of,
    decode_rows,
    programs,
)
from kernels.cuda.attention_prefill import prefill_kernel
from kernels.cuda.common import TRITON_TYPES
from kernels.cuda.compile import Variant
from kernels.cuda.kv_cache import CudaKVCache
from kernels.cuda.plan import CudaPlan
from kernels.cuda.workspace import Workspace

_LOG2_E = 1.4426950408889634


def paged_attention(
    query: Tensor,
    cache: CudaKVCache,
    plan: CudaPlan,
    scale: float,
    softcap: float | None,
    workspace: Workspace,
) -> Tensor:
    """query [T, Hq, D] -> [T, Hq * D]: causal attention of each token over its own sequence (see `Ops`).

    query: float32, float16 or bfloat16 with contiguous heads; the cache in any of its dtypes, converted to the query's
    after it is read. At most 64 query heads a KV head. Rows of padding (length 0) give zeros. Raises ValueError for
    what does not fit.

    Sequences with one token take the decode kernel, longer ones the prefill kernel. On compute capability 9 and later
    that takes tiles of K and V through the tensor memory accelerator, where `by_descriptor` allows: the same bits.
    Triton encodes both descriptors for the device in each launch and passes them by value, so a graph that captured the
    prefill kernel would hold copies of them, valid as long as the cache; the engine captures decode only.

    Floors: K and V of every sequence read once over bandwidth; 4 * D * Hq operations for each pair of a query and a key
    that it sees, over peak. Not measured, on any path: no GPU was at hand.
    """
    spec, tokens = cache.spec, plan.num_tokens
    dim, kv_heads = spec.head_dim, spec.num_kv_heads
    check_paged_attention(query, spec, tokens)
    heads = query.shape[1]
    group = heads // kv_heads
    if group > DECODE_ROWS:
        raise ValueError(f"query has {group} heads for each KV head; at most {DECODE_ROWS} are supported")
    if query.stride(2) != 1 or query.stride(1) != dim:
        raise ValueError(f"query must have contiguous heads, got strides {query.stride()}")
    if scale <= 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    output = torch.empty((tokens, heads * dim), dtype=query.dtype, device=query.device)
    # exp2(factor * score - max): with a soft cap the score is tanh(inner * q.k), in units of the cap.
    factor = (scale if softcap is None else softcap) * _LOG2_E
    inner = 0.0 if softcap is None else 2.0 * scale / softcap * _LOG2_E
    tensors = (
        output if cache.key_scales is None else cache.key_scales,  # not read where there are none
        output if cache.value_scales is None else cache.value_scales,
        output,
        plan.query_starts,
        plan.seq_lens,
        plan.block_tables,
        plan.table_rows,
    )
    strides = (query.stride(0), cache.keys.stride(0), plan.block_tables.shape[1])
    quantized, capability = spec.dtype == torch.int8, capability_of(query.device)
    shape = (dim, group, kv_heads, spec.block_size, spec.sliding_window, quantized, softcap is not None, query.dtype)
    if plan.max_query_len > 1:
        # Sequence s begins at tile query_starts[s] * group // ROWS + s, which leaves no tile to two sequences.
        grid = (kv_heads, tokens * group // PREFILL_ROWS + plan.num_sequences)
        launch = attention_launch.launch(PREFILL_ROWS, *shape, capability)
        tile = launch["BLOCK_N"]
        descriptors = None
        if by_descriptor(capability, spec.block_size, tile, dim, spec.sliding_window, query.dtype, spec.dtype):
            descriptors = attention_launch.descriptors(cache, tile)
        keys, values = (cache.keys, cache.values) if descriptors is None else descriptors
        prefill_kernel[grid](
            query,
            keys,
            values,
            *tensors,
            *strides,
            plan.num_sequences,
            factor,
            inner,
            BY_DESCRIPTOR=descriptors is not None,
            **launch,
            enable_fp_fusion=True,
        )
    if plan.max_work > 0:
        items = plan.max_work
        launch = attention_launch.launch(decode_rows(capability), *shape, capability)
        decode_kernel[(min(programs(query.device), items * kv_heads),)](
            query,
            cache.keys,
            cache.values,
            *tensors,
            plan.work,
            plan.work_count,
            workspace.take("attention partials", (items, kv_heads, group, dim), torch.float32),
            workspace.take("attention sums", (items, kv_heads, 2, group), torch.float32),
            workspace.take("attention arrivals", (plan.num_sequences, kv_heads), torch.int32, zeroed=True),
            *strides,
            factor,
            inner,
            GROUP_BLOCK=triton.next_power_of_2(group),
            **launch,
            enable_fp_fusion=True,
        )
    return output


def _variant(
    capability: int,
    name: str,
    decode: bool,
    dim: int,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    quantized: bool = False,
    block_size: int = 64,
    window: int | None = None,
    softcapped: bool = False,
    hot: bool = True,
) -> Variant:
    kind, cache_kind = TRITON_TYPES[dtype], "i8" if quantized else TRITON_TYPES[dtype]
    scale_kind = "fp32" if quantized else kind
    pointers = {"query": kind, "keys": cache_kind, "values": cache_kind, "output": kind}
    pointers |= {"key_scales": scale_kind, "value_scales": scale_kind}
    pointers |= dict.fromkeys(("query_starts", "seq_lens", "tables", "table_rows"), "i32")
    if decode:
        pointers |= {"work": "i32", "work_count": "i32", "partials": "fp32", "sums": "fp32", "arrived": "i32"}
    signature = {f"{pointer}_ptr": f"*{element}" for pointer, element in pointers.items()}
    signature |= {"query_stride": "i32", "block_stride": "i32"}
    aligned = frozenset(signature)
    signature |= {"table_columns": "i32", "factor": "fp32", "inner": "fp32"}
    if not decode:
        signature |= {"num_sequences": "i32"}
    rows = decode_rows(capability) if decode else PREFILL_ROWS
    launch = dict(
        attention_launch.launch(rows, dim, group, 8, block_size, window, quantized, softcapped, dtype, capability)
    )
    tile, cache_dtype = launch["BLOCK_N"], torch.int8 if quantized else dtype
    if decode:
        launch["GROUP_BLOCK"] = triton.next_power_of_2(group)
    else:
        launch["BY_DESCRIPTOR"] = by_descriptor(capability, block_size, tile, dim, window, dtype, cache_dtype)
        if launch["BY_DESCRIPTOR"]:
            signature |= dict.fromkeys(("keys_ptr", "values_ptr"), f"tensordesc<{kind}[{tile}, {dim}]>")
            aligned -= {"keys_ptr", "values_ptr"}
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    return Variant(
        name,
        decode_kernel if decode else prefill_kernel,
        signature,
        constants=launch,
        aligned=aligned,
        num_warps=num_warps,
        num_stages=num_stages,
        hot=hot,
        matrix=dtype != torch.float32,
        same_order=f"d{dim} {cache_kind} {softcapped} {window}",  # whatever the pages, and however they are read
    )


def variants(capability: int) -> list[Variant]:
    """Llama-3.1-8B (group 4) and Qwen3-0.6B (group 2), Llama-3.2-1B, int8, and what is rare: other head sizes, windows.

    Heads of 256 are compiled for capability 9.0 only, to see that they do: their accumulators fill the registers of a
    thread, so they spill on every device.
    """
    found = []
    for kind, decode in (("decode", True), ("prefill", False)):
        found += [
            _variant(capability, f"{kind} d128 bf16", decode, 128, 4, hot=decode or capability >= 90),
            _variant(capability, f"{kind} d128 int8", decode, 128, 4, quantized=True),
            _variant(capability, f"{kind} d64 bf16", decode, 64, 4),
            _variant(
                capability, f"{kind} d80 bf16 softcap window pages of 16", decode, 80, 1, block_size=16, window=1024,
                softcapped=True, hot=False,
            ),
        ]  # fmt: skip
        if capability == 90:
            found.append(
                _variant(capability, f"{kind} d128 bf16 pages of 16", decode, 128, 4, block_size=16, hot=False)
            )
            found.append(_variant(capability, f"{kind} d256 bf16", decode, 256, 2, hot=False))
    return found
