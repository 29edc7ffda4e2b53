"""The attention kernel of decode: sequences with one new token, whose splits are spread over programs.

The result of a split goes through memory as float32, the rows that are of use alone, and is merged from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.attention_softmax import empty, first_key_of, merge, softmax_tile, store_output


@triton.jit(do_not_specialize=["table_columns"])
def decode_kernel(
    query_ptr,  # as of prefill_kernel
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
        first_key = first_key_of(length - 1, WINDOW, BLOCK_N)
        first_split, num_splits = first_key // SPLIT, (length + SPLIT - 1) // SPLIT
        token = tl.load(query_starts_ptr + sequence).to(tl.int64)
        query_head = head * GROUP + lane
        rows = token * (KV_HEADS * GROUP) + query_head
        here = index.to(tl.int64) * KV_HEADS + head
        if length == 0:  # padding gives zeros
            acc, largest, total = empty(ROWS, DIM_BLOCK)
            store_output(output_ptr, rows, mask, acc, total + 1.0, DIM, DIM_BLOCK)
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
            all_acc, all_largest, all_total = empty(GROUP_BLOCK, DIM_BLOCK)
            for current in range(begin_split, end_split):
                begin = tl.maximum(first_key, current * SPLIT)
                end = tl.minimum(length, (current + 1) * SPLIT)
                full = begin if WINDOW > 0 else end // BLOCK_N * BLOCK_N
                acc, largest, total = empty(ROWS, DIM_BLOCK)
                for start in range(begin, full, BLOCK_N):
                    acc, largest, total = softmax_tile(
                        query, acc, largest, total, positions, start, end, table_ptr,
                        keys_ptr + of_head * DIM, values_ptr + of_head * DIM,
                        key_scales_ptr + of_head, value_scales_ptr + of_head, of_head, block_stride, factor, inner,
                        False, KV_HEADS, DIM, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, BLOCK_N, False,
                    )  # fmt: skip
                for start in tl.range(full, end, BLOCK_N, num_stages=TAIL_STAGES):
                    acc, largest, total = softmax_tile(
                        query, acc, largest, total, positions, start, end, table_ptr,
                        keys_ptr + of_head * DIM, values_ptr + of_head * DIM,
                        key_scales_ptr + of_head, value_scales_ptr + of_head, of_head, block_stride, factor, inner,
                        True, KV_HEADS, DIM, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, BLOCK_N, False,
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
                    all_acc, all_largest, all_total = merge(
                        all_acc, all_largest, all_total, part, part_largest, part_total
                    )
            row = tl.arange(0, GROUP_BLOCK)
            group_rows = token * (KV_HEADS * GROUP) + head * GROUP + row
            if split < 0:
                store_output(output_ptr, group_rows, row < GROUP, all_acc, all_total, DIM, DIM_BLOCK)
            if split >= 0:
                arrivals = arrived_ptr + sequence * KV_HEADS + head
                if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - first_split - 1:
                    tl.store(arrivals, 0)
                    # Elementwise from here on: the rows that are of use are enough, and take few registers.
                    acc, largest, total = empty(GROUP_BLOCK, DIM_BLOCK)
                    for other in tl.range(first_split, num_splits, loop_unroll_factor=4):
                        there = here + (other - split) * KV_HEADS
                        part, part_largest, part_total = _load_partial(
                            partials_ptr, sums_ptr, there, GROUP_BLOCK, GROUP, DIM, DIM_BLOCK
                        )
                        acc, largest, total = merge(acc, largest, total, part, part_largest, part_total)
                    store_output(output_ptr, group_rows, row < GROUP, acc, total, DIM, DIM_BLOCK)


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
