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

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cuda.common import INTERPRETED, TRITON_TYPES, dot, round_to
from kernels.cuda.compile import Variant
from kernels.cuda.kv_cache import CudaKVCache
from kernels.cuda.plan import SPLIT, CudaPlan
from kernels.cuda.workspace import Workspace

DECODE_ROWS = 64
PREFILL_ROWS = 128
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
    that takes tiles of K and V through the tensor memory accelerator, where `_by_descriptor` allows: the same bits.
    Triton encodes both descriptors for the device in each launch and passes them by value, so a graph that captured the
    prefill kernel would hold copies of them, valid as long as the cache; the engine captures decode only.

    Floors: K and V of every sequence read once over bandwidth; 4 * D * Hq operations for each pair of a query and a key
    that it sees, over peak. Not measured, on any path: no GPU was at hand.
    """
    spec = cache.spec
    dim, kv_heads = spec.head_dim, spec.num_kv_heads
    if query.dim() != 3 or query.shape[0] != plan.num_tokens or query.shape[2] != dim:
        raise ValueError(f"query must be [{plan.num_tokens}, Hq, {dim}], got {tuple(query.shape)}")
    tokens, heads = query.shape[0], query.shape[1]
    if heads % kv_heads != 0:
        raise ValueError(f"query has {heads} heads, not a multiple of the cache's {kv_heads}")
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
    no_scales = output if cache.key_scales is None or cache.value_scales is None else None
    tensors = (
        cache.key_scales if no_scales is None else no_scales,  # not read where there are none
        cache.value_scales if no_scales is None else no_scales,
        output,
        plan.query_starts,
        plan.seq_lens,
        plan.block_tables,
        plan.table_rows,
    )
    strides = (query.stride(0), cache.keys.stride(0), plan.block_tables.shape[1])
    quantized, capability = spec.dtype == torch.int8, _capability(query.device)
    shape = (dim, group, kv_heads, spec.block_size, spec.sliding_window, quantized, softcap is not None, query.dtype)
    if plan.max_query_len > 1:
        rows = plan.num_tokens * group
        # Sequence s begins at tile query_starts[s] * group // ROWS + s, which leaves no tile to two sequences.
        grid = (kv_heads, rows // PREFILL_ROWS + plan.num_sequences)
        launch = _launch(PREFILL_ROWS, *shape, capability)
        tile = launch["BLOCK_N"]
        descriptors = None
        if _by_descriptor(capability, spec.block_size, tile, dim, spec.sliding_window, query.dtype, spec.dtype):
            descriptors = _descriptors(cache, tile)
        keys, values = (cache.keys, cache.values) if descriptors is None else descriptors
        _prefill_kernel[grid](
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
        )
    if plan.max_work > 0:
        items = plan.max_work
        partials = workspace.take("attention partials", (items, kv_heads, group, dim), torch.float32)
        sums = workspace.take("attention sums", (items, kv_heads, 2, group), torch.float32)
        arrived = workspace.take("attention arrivals", (plan.num_sequences, kv_heads), torch.int32, zeroed=True)
        launch = _launch(_decode_rows(capability), *shape, capability)
        programs = min(_programs(query.device), items * kv_heads)
        _decode_kernel[(programs,)](
            query,
            cache.keys,
            cache.values,
            *tensors,
            plan.work,
            plan.work_count,
            partials,
            sums,
            arrived,
            *strides,
            factor,
            inner,
            GROUP_BLOCK=triton.next_power_of_2(group),
            **launch,
        )
    return output


@functools.lru_cache
def _programs(device: torch.device) -> int:
    """How many programs share the work of decode: enough to fill the device's multiprocessors, two on each."""
    if device.type != "cuda":
        return 4
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache
def _capability(device: torch.device) -> int:
    """Compute capability times ten; that of an H200 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _decode_rows(capability: int) -> int:
    """Rows of a decode tile. The compiler lays a tile of 64 rows out as one of 128 on compute capability 9 alone: on 8
    it spreads the keys of 64 rows over the warps, and on 10 the matrix instruction is another.
    """
    return DECODE_ROWS if capability // 10 == 9 else PREFILL_ROWS


def _by_descriptor(
    capability: int,
    block_size: int,
    tile: int,
    dim: int,
    window: int | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> bool:
    """Whether prompts read tiles of this many keys through the tensor memory accelerator.

    A tile must lie in one page, and its rows must be whole: head sizes that are no power of two have padding. int8 has
    to pass through registers on its way to the product, and so have values that are masked, which with a window they
    all are: pointers serve these as well.
    """
    whole = block_size >= tile and dim in (64, 128)
    return capability >= 90 and whole and window is None and dtype == cache_dtype and dtype.itemsize == 2


def _descriptors(cache: CudaKVCache, tile: int) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Keys and values as [blocks * Hkv * BLOCK_SIZE, DIM], in tiles of so many rows; made once for a cache. None where
    a descriptor cannot say it: rows apart in memory, or more of them than int32 counts."""
    found = cache.descriptors.get(tile)
    if found is None:
        dim = cache.spec.head_dim
        rows = cache.keys.numel() // dim
        if rows >= 1 << 31 or not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
            return None
        keys, values = (TensorDescriptor(x, [rows, dim], [dim, 1], [tile, dim]) for x in (cache.keys, cache.values))
        found = cache.descriptors[tile] = (keys, values)
    return found


@functools.lru_cache
def _launch(
    rows: int,
    dim: int,
    group: int,
    kv_heads: int,
    block_size: int,
    window: int | None,
    quantized: bool,
    softcapped: bool,
    dtype: torch.dtype,
    capability: int,
) -> dict[str, int]:
    """Constants and warps of a launch. Only ROWS and num_warps may depend on the kind of work, and only together.

    BLOCK_N and TAIL_STAGES, the stages of the loop over masked tiles (few, unless there is a window), are what the
    compiler's table shows to stay within the registers: on compute capability 8 the operands lie in registers too.
    """
    padded = max(triton.next_power_of_2(dim), 16)
    wide = padded > 128 or dtype == torch.float32 or capability // 10 != 9
    stages = 2 if padded > 128 or dtype == torch.float32 else 3
    tail_alone = window is None and (rows == PREFILL_ROWS or capability // 10 == 9)
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "DIM": dim,
        "DIM_BLOCK": padded,
        "BLOCK_SIZE": block_size,
        "WINDOW": 0 if window is None else window,
        "QUANTIZED": quantized,
        "SOFTCAPPED": softcapped,
        "ROWS": rows,
        "BLOCK_N": 32 if wide else 64,
        "SPLIT": SPLIT,
        "TAIL_STAGES": 1 if tail_alone else stages,
        "num_warps": rows // 16,
        "num_stages": stages,
    }


@triton.jit
def _operand(x, dtype: tl.constexpr):
    """x as an operand of a product: int8 and other types of the cache become that of the query."""
    if x.dtype == dtype:
        return x
    if INTERPRETED:
        return round_to(x.to(tl.float32), dtype)
    return x.to(dtype)


@triton.jit
def _merge(total, total_max, total_sum, part, part_max, part_sum):
    """Add one split's result to that of those before it. Nothing seen yet, or in the split: max is -inf, sums 0."""
    largest = tl.maximum(total_max, part_max)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total_weight = tl.exp2(total_max - shift)
    part_weight = tl.exp2(part_max - shift)
    merged_sum = tl.fma(part_sum, part_weight, total_sum * total_weight)
    merged = tl.fma(part, tl.broadcast_to(part_weight[:, None], part.shape), total * total_weight[:, None])
    return merged, largest, merged_sum


@triton.jit
def _tile(
    query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
    value_scales_ptr, of_head, block_stride, factor, inner,
    MASKED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, QUANTIZED: tl.constexpr, SOFTCAPPED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys [start, start + BLOCK_N), of which those from `end` on are not there.

    positions: of each row's token, [ROWS, 1] or one for all [1, 1]. MASKED: whether a row may not see all of the keys.
    Where all rows do, the mask changes no bit. keys_ptr, values_ptr and the scales begin at the head; BY_DESCRIPTOR:
    keys_ptr and values_ptr are descriptors of the whole cache, in which the head is `of_head` rows into a block.
    """
    dims = tl.arange(0, DIM_BLOCK)
    offset = tl.arange(0, BLOCK_N)
    keys = start + offset
    if BY_DESCRIPTOR:
        tl.static_assert(BLOCK_SIZE >= BLOCK_N and not QUANTIZED)
        row = tl.load(table_ptr + start // BLOCK_SIZE) * (KV_HEADS * BLOCK_SIZE) + of_head + start % BLOCK_SIZE
    elif BLOCK_SIZE >= BLOCK_N:  # all in one block
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        base, in_block = block * block_stride, start % BLOCK_SIZE
        keys_ptr += base + in_block * DIM
        values_ptr += base + in_block * DIM
        row = offset * DIM
        scale_row = block * (block_stride // DIM) + in_block + offset
    elif MASKED:
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0).to(tl.int64)
        row = block * block_stride + (keys % BLOCK_SIZE) * DIM
        scale_row = block * (block_stride // DIM) + keys % BLOCK_SIZE
    else:
        block = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
        row = block * block_stride + (keys % BLOCK_SIZE) * DIM
        scale_row = block * (block_stride // DIM) + keys % BLOCK_SIZE
    if BY_DESCRIPTOR:
        k, v = keys_ptr.load([row, 0]).T, values_ptr.load([row, 0])
        if MASKED:  # beyond the sequence there may be NaN, which a weight of zero would not hide
            v = tl.where(keys[:, None] < end, v, tl.zeros_like(v))
    else:
        k_ptr, v_ptr = keys_ptr + (row[None, :] + dims[:, None]), values_ptr + (row[:, None] + dims[None, :])
        if MASKED:
            k = tl.load(k_ptr, mask=(keys[None, :] < end) & (dims[:, None] < DIM), other=0)
            v = tl.load(v_ptr, mask=(keys[:, None] < end) & (dims[None, :] < DIM), other=0)
        elif DIM != DIM_BLOCK:
            k = tl.load(k_ptr, mask=dims[:, None] < DIM, other=0)
            v = tl.load(v_ptr, mask=dims[None, :] < DIM, other=0)
        else:
            k = tl.load(k_ptr)
            v = tl.load(v_ptr)
    scores = dot(query, _operand(k, query.dtype), tl.zeros([ROWS, BLOCK_N], tl.float32))
    if QUANTIZED:
        scores *= tl.load(key_scales_ptr + scale_row, mask=keys < end, other=0.0)[None, :]
    if SOFTCAPPED:
        # tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|), and the sign of x: symmetric, and never overflows.
        e = tl.exp2(-inner * tl.abs(scores))
        tanh = (1.0 - e) / (1.0 + e)
        scores = tl.where(scores < 0, -tanh, tanh)
    if MASKED:
        distance = positions - keys[None, :]
        visible = distance >= 0
        if WINDOW > 0:
            visible &= distance < WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * factor)
    # A row that has seen nothing yet has no largest score; exp2(-inf - 0) is 0 as it should be.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weight = tl.exp2(largest - shift)
    p = tl.exp2(_scaled(scores, factor, -shift))
    total = tl.fma(total, weight, tl.sum(p, 1))
    acc = acc * weight[:, None]
    if QUANTIZED:
        p *= tl.load(value_scales_ptr + scale_row, mask=keys < end, other=0.0)[None, :]
    acc = dot(round_to(p, query.dtype), _operand(v, query.dtype), acc)
    return acc, new_largest, total


@triton.jit
def _scaled(x, factor, rows):
    """x * factor + rows[:, None], rounded once."""
    return tl.fma(x, tl.full(x.shape, 0.0, tl.float32) + factor, tl.broadcast_to(rows[:, None], x.shape))


@triton.jit
def _empty(ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """The state of a softmax that has seen no key: sum of p * v [ROWS, DIM_BLOCK], largest score and sum of p [ROWS].

    Scores are in units of log2, the sums relative to exp2 of the largest."""
    acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    return acc, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _first_key(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile that a token at this position sees."""
    if WINDOW == 0:
        return position * 0
    return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit
def _store_output(output_ptr, rows, mask, acc, total, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Divide by the sum of weights and write rows (int64 [ROWS]) of DIM elements.

    + 0.0 makes zeros positive: their sign may depend on tiles of which the row saw nothing."""
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    result = acc / total[:, None] + 0.0
    ptr = output_ptr + rows[:, None] * DIM + dims
    tl.store(ptr, round_to(result, output_ptr.dtype.element_ty), mask=mask[:, None] & (dims < DIM))


@triton.jit(do_not_specialize=["table_columns", "num_sequences"])
def _prefill_kernel(
    query_ptr,  # [T, KV_HEADS * GROUP, DIM]
    keys_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, DIM], as values; BY_DESCRIPTOR: of tiles of its rows
    values_ptr,
    key_scales_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE], as value_scales
    value_scales_ptr,
    output_ptr,  # [T, KV_HEADS * GROUP * DIM]
    query_starts_ptr,  # [S + 1]
    seq_lens_ptr,  # [S]
    tables_ptr,  # [rows, table_columns]
    table_rows_ptr,  # [S]
    query_stride,  # of a token
    block_stride,  # of a block of keys, as of values
    table_columns,
    num_sequences,
    factor,
    inner,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):
    """Program (h, i): one tile of rows of one sequence and KV head, the last tiles first, since they take longest."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    low, high = 0, num_sequences - 1  # the last sequence that begins at this tile or before
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_starts_ptr + middle) * GROUP // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    sequence = low
    query_start = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - query_start
    first_row = (tile - query_start * GROUP // ROWS - sequence) * ROWS
    if query_len > 1 and first_row < query_len * GROUP:
        row = first_row + tl.arange(0, ROWS)
        mask = row < query_len * GROUP
        token = tl.minimum(row, query_len * GROUP - 1) // GROUP
        context = tl.load(seq_lens_ptr + sequence) - query_len
        query_head = head * GROUP + row % GROUP
        dims = tl.arange(0, DIM_BLOCK)[None, :]
        query_row = (query_start + token).to(tl.int64)
        query = tl.load(
            query_ptr + (query_row * query_stride + query_head * DIM)[:, None] + dims,
            mask=mask[:, None] & (dims < DIM),
            other=0,
        )
        last_token = tl.minimum(first_row + ROWS - 1, query_len * GROUP - 1) // GROUP
        begin = _first_key(context + first_row // GROUP, WINDOW, BLOCK_N)
        table_ptr = tables_ptr + tl.load(table_rows_ptr + sequence).to(tl.int64) * table_columns
        of_head = head * BLOCK_SIZE
        if not BY_DESCRIPTOR:
            keys_ptr += of_head * DIM
            values_ptr += of_head * DIM
        key_scales_ptr += of_head
        value_scales_ptr += of_head
        positions = (context + token)[:, None]
        end = context + last_token + 1
        # Up to `full` every row sees every key: there is nothing to mask.
        full = begin if WINDOW > 0 else (context + first_row // GROUP + 1) // BLOCK_N * BLOCK_N
        all_acc, all_largest, all_total = _empty(ROWS, DIM_BLOCK)
        acc, largest, total = _empty(ROWS, DIM_BLOCK)
        for start in range(begin, full, BLOCK_N):
            acc, largest, total = _tile(
                query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
                value_scales_ptr, of_head, block_stride, factor, inner,
                False, KV_HEADS, GROUP, DIM, DIM_BLOCK, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, ROWS, BLOCK_N,
                BY_DESCRIPTOR,
            )  # fmt: skip
            if (start + BLOCK_N) % SPLIT == 0:
                all_acc, all_largest, all_total = _merge(all_acc, all_largest, all_total, acc, largest, total)
                acc, largest, total = _empty(ROWS, DIM_BLOCK)
        for start in tl.range(full, end, BLOCK_N, num_stages=TAIL_STAGES):
            acc, largest, total = _tile(
                query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
                value_scales_ptr, of_head, block_stride, factor, inner,
                True, KV_HEADS, GROUP, DIM, DIM_BLOCK, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, ROWS, BLOCK_N,
                BY_DESCRIPTOR,
            )  # fmt: skip
            if (start + BLOCK_N) % SPLIT == 0:
                all_acc, all_largest, all_total = _merge(all_acc, all_largest, all_total, acc, largest, total)
                acc, largest, total = _empty(ROWS, DIM_BLOCK)
        # The split that the last tile left open; where there is none, nothing is added, which changes no bit.
        acc, largest, total = _merge(all_acc, all_largest, all_total, acc, largest, total)
        _store_output(output_ptr, query_row * (KV_HEADS * GROUP) + query_head, mask, acc, total, DIM, DIM_BLOCK)


@triton.jit(do_not_specialize=["table_columns"])
def _decode_kernel(
    query_ptr,  # as of _prefill_kernel
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    output_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    tables_ptr,
    table_rows_ptr,
    work_ptr,  # [capacity]: sequence + 65536 * code (kernels.cuda.plan)
    work_count_ptr,  # [1]
    partials_ptr,  # [capacity, KV_HEADS, GROUP, DIM]
    sums_ptr,  # [capacity, KV_HEADS, 2, GROUP]: largest scores, sums of weights
    arrived_ptr,  # [S, KV_HEADS], zero between launches
    query_stride,
    block_stride,
    table_columns,
    factor,
    inner,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """A fixed number of programs takes the work items of all KV heads in turn, so a CUDA graph need not know how long
    the sequences are. Where a sequence's splits are items of their own, the program that finishes the last one merges
    them all, in order: that saves a second launch, and happens while other programs still read.
    """
    items = tl.load(work_count_ptr) * KV_HEADS
    lane = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    mask = lane < GROUP
    tile_mask = mask[:, None] & (dims < DIM)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        index = item // KV_HEADS
        head = item % KV_HEADS
        packed = tl.load(work_ptr + index)
        sequence = packed % 65536
        split = packed // 65536 - 1  # -1: the whole sequence
        length = tl.load(seq_lens_ptr + sequence)
        first_key = _first_key(length - 1, WINDOW, BLOCK_N)
        first_split, num_splits = first_key // SPLIT, (length + SPLIT - 1) // SPLIT
        token = tl.load(query_starts_ptr + sequence).to(tl.int64)
        query_head = head * GROUP + lane
        rows = token * (KV_HEADS * GROUP) + query_head
        here = index.to(tl.int64) * KV_HEADS + head
        if length == 0:  # padding gives zeros
            acc, largest, total = _empty(ROWS, DIM_BLOCK)
            _store_output(output_ptr, rows, mask, acc, total + 1.0, DIM, DIM_BLOCK)
        elif split < 0 or split >= first_split:
            query = tl.load(
                query_ptr + token * query_stride + (query_head * DIM)[:, None] + dims, mask=tile_mask, other=0
            )
            table_ptr = tables_ptr + tl.load(table_rows_ptr + sequence).to(tl.int64) * table_columns
            of_head = head * BLOCK_SIZE
            positions = tl.full([1, 1], 0, tl.int32) + length - 1
            begin_split = split if split >= 0 else first_split
            end_split = split + 1 if split >= 0 else num_splits
            # What is of use of the sum over splits: few rows, so few registers, while the loop below needs them.
            all_acc, all_largest, all_total = _empty(GROUP_BLOCK, DIM_BLOCK)
            for current in range(begin_split, end_split):
                begin = tl.maximum(first_key, current * SPLIT)
                end = tl.minimum(length, (current + 1) * SPLIT)
                full = begin if WINDOW > 0 else end // BLOCK_N * BLOCK_N
                acc, largest, total = _empty(ROWS, DIM_BLOCK)
                for start in range(begin, full, BLOCK_N):
                    acc, largest, total = _tile(
                        query, acc, largest, total, positions, start, end, table_ptr,
                        keys_ptr + of_head * DIM, values_ptr + of_head * DIM,
                        key_scales_ptr + of_head, value_scales_ptr + of_head, of_head, block_stride, factor, inner,
                        False, KV_HEADS, GROUP, DIM, DIM_BLOCK, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, ROWS,
                        BLOCK_N, False,
                    )  # fmt: skip
                for start in tl.range(full, end, BLOCK_N, num_stages=TAIL_STAGES):
                    acc, largest, total = _tile(
                        query, acc, largest, total, positions, start, end, table_ptr,
                        keys_ptr + of_head * DIM, values_ptr + of_head * DIM,
                        key_scales_ptr + of_head, value_scales_ptr + of_head, of_head, block_stride, factor, inner,
                        True, KV_HEADS, GROUP, DIM, DIM_BLOCK, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, ROWS,
                        BLOCK_N, False,
                    )  # fmt: skip
                # Through memory (the last-level cache) even where there is one split only: a second way out, from
                # the tile, makes the compiler spill registers.
                _store_partial(partials_ptr, sums_ptr, here, acc, largest, total, ROWS, GROUP, DIM, DIM_BLOCK)
                tl.debug_barrier()  # all threads have written before one of them reads, or says so
                if split < 0:
                    part, part_largest, part_total = _load_partial(
                        partials_ptr, sums_ptr, here, GROUP_BLOCK, GROUP, DIM, DIM_BLOCK
                    )
                    tl.debug_barrier()  # all have read before the next split is written there
                    all_acc, all_largest, all_total = _merge(
                        all_acc, all_largest, all_total, part, part_largest, part_total
                    )
            row = tl.arange(0, GROUP_BLOCK)
            group_rows = token * (KV_HEADS * GROUP) + head * GROUP + row
            if split < 0:
                _store_output(output_ptr, group_rows, row < GROUP, all_acc, all_total, DIM, DIM_BLOCK)
            if split >= 0:
                arrivals = arrived_ptr + sequence * KV_HEADS + head
                if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - first_split - 1:
                    tl.store(arrivals, 0)
                    # Elementwise from here on: the rows that are of use are enough, and take few registers.
                    acc, largest, total = _empty(GROUP_BLOCK, DIM_BLOCK)
                    for other in tl.range(first_split, num_splits, loop_unroll_factor=4):
                        there = here + (other - split) * KV_HEADS
                        part, part_largest, part_total = _load_partial(
                            partials_ptr, sums_ptr, there, GROUP_BLOCK, GROUP, DIM, DIM_BLOCK
                        )
                        acc, largest, total = _merge(acc, largest, total, part, part_largest, part_total)
                    row = tl.arange(0, GROUP_BLOCK)
                    _store_output(
                        output_ptr,
                        token * (KV_HEADS * GROUP) + head * GROUP + row,
                        row < GROUP,
                        acc,
                        total,
                        DIM,
                        DIM_BLOCK,
                    )


@triton.jit
def _store_partial(
    partials_ptr, sums_ptr, index, acc, largest, total, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    lane, dims = tl.arange(0, ROWS), tl.arange(0, DIM_BLOCK)[None, :]
    mask = lane < GROUP
    ptr = partials_ptr + index * (GROUP * DIM) + lane[:, None] * DIM + dims
    tl.store(ptr, acc, mask=mask[:, None] & (dims < DIM))
    tl.store(sums_ptr + index * (2 * GROUP) + lane, largest, mask=mask)
    tl.store(sums_ptr + index * (2 * GROUP) + GROUP + lane, total, mask=mask)


@triton.jit
def _load_partial(
    partials_ptr, sums_ptr, index, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr
):
    lane, dims = tl.arange(0, ROWS), tl.arange(0, DIM_BLOCK)[None, :]
    mask = lane < GROUP
    ptr = partials_ptr + index * (GROUP * DIM) + lane[:, None] * DIM + dims
    acc = tl.load(ptr, mask=mask[:, None] & (dims < DIM), other=0.0)
    largest = tl.load(sums_ptr + index * (2 * GROUP) + lane, mask=mask, other=0.0)
    total = tl.load(sums_ptr + index * (2 * GROUP) + GROUP + lane, mask=mask, other=1.0)
    return acc, largest, total


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
    rows = _decode_rows(capability) if decode else PREFILL_ROWS
    launch = dict(_launch(rows, dim, group, 8, block_size, window, quantized, softcapped, dtype, capability))
    tile, cache_dtype = launch["BLOCK_N"], torch.int8 if quantized else dtype
    if decode:
        launch["GROUP_BLOCK"] = triton.next_power_of_2(group)
    else:
        launch["BY_DESCRIPTOR"] = _by_descriptor(capability, block_size, tile, dim, window, dtype, cache_dtype)
        if launch["BY_DESCRIPTOR"]:
            signature |= dict.fromkeys(("keys_ptr", "values_ptr"), f"tensordesc<{kind}[{tile}, {dim}]>")
            aligned -= {"keys_ptr", "values_ptr"}
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    return Variant(
        name,
        _decode_kernel if decode else _prefill_kernel,
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
