"""The online softmax of attention, shared by prompts and decode: one tile of keys, and the merge of splits.

A state is (acc [ROWS, DIM_BLOCK], largest [ROWS], total [ROWS]), float32: the sum of p * v, the largest score so far in
units of log2, and the sum of p, both sums relative to exp2 of the largest. What reduces here has one layout and one
order whoever calls: `kernels.cuda.attention` says why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.common import INTERPRETED, dot, round_to


@triton.jit
def empty(ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """The state that has seen no key."""
    acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    return acc, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def softmax_tile(
    query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
    value_scales_ptr, of_head, block_stride, factor, inner,
    MASKED: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    QUANTIZED: tl.constexpr, SOFTCAPPED: tl.constexpr, BLOCK_N: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys [start, start + BLOCK_N), of which those from `end` on are not there.

    positions: of each row's token, [ROWS, 1] or one for all [1, 1]. MASKED: whether a row may not see all of the keys.
    Where all rows do, the mask changes no bit. keys_ptr, values_ptr and the scales begin at the head; BY_DESCRIPTOR:
    keys_ptr and values_ptr are descriptors of the whole cache, in which the head is `of_head` rows into a block.
    """
    ROWS: tl.constexpr = query.shape[0]
    DIM_BLOCK: tl.constexpr = query.shape[1]
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
    else:
        if MASKED:
            block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0).to(tl.int64)
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
def _operand(x, dtype: tl.constexpr):
    """x as an operand of a product: int8 and other types of the cache become that of the query."""
    if x.dtype == dtype:
        return x
    if INTERPRETED:
        return round_to(x.to(tl.float32), dtype)
    return x.to(dtype)


@triton.jit
def _scaled(x, factor, rows):
    """x * factor + rows[:, None], rounded once."""
    return tl.fma(x, tl.full(x.shape, 0.0, tl.float32) + factor, tl.broadcast_to(rows[:, None], x.shape))


@triton.jit
def merge(total, total_max, total_sum, part, part_max, part_sum):
    """Add one split's result to that of those before it. Nothing seen yet, or in the split: max is -inf, sums 0."""
    largest = tl.maximum(total_max, part_max)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total_weight = tl.exp2(total_max - shift)
    part_weight = tl.exp2(part_max - shift)
    merged_sum = tl.fma(part_sum, part_weight, total_sum * total_weight)
    merged = tl.fma(part, tl.broadcast_to(part_weight[:, None], part.shape), total * total_weight[:, None])
    return merged, largest, merged_sum


@triton.jit
def first_key_of(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile that a token at this position sees."""
    if WINDOW == 0:
        return position * 0
    return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit
def store_output(output_ptr, rows, mask, acc, total, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Divide by the sum of weights and write rows (int64 [ROWS]) of DIM elements.

    + 0.0 makes zeros positive: their sign may depend on tiles of which the row saw nothing."""
    dims = tl.arange(0, DIM_BLOCK)[None, :]
    result = acc / total[:, None] + 0.0
    ptr = output_ptr + rows[:, None] * DIM + dims
    tl.store(ptr, round_to(result, output_ptr.dtype.element_ty), mask=mask[:, None] & (dims < DIM))
