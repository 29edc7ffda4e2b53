"""The attention kernel of prompts and chunks: sequences with more than one new token.

A program has all splits of its rows, and merges them in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.attention_softmax import empty, first_key_of, merge, softmax_tile, store_output


@triton.jit(do_not_specialize=["table_columns", "num_sequences"])
def prefill_kernel(
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
        begin = first_key_of(context + first_row // GROUP, WINDOW, BLOCK_N)
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
        all_acc, all_largest, all_total = empty(ROWS, DIM_BLOCK)
        acc, largest, total = empty(ROWS, DIM_BLOCK)
        for start in range(begin, full, BLOCK_N):
            acc, largest, total = softmax_tile(
                query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
                value_scales_ptr, of_head, block_stride, factor, inner,
                False, KV_HEADS, DIM, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, BLOCK_N, BY_DESCRIPTOR,
            )  # fmt: skip
            if (start + BLOCK_N) % SPLIT == 0:
                all_acc, all_largest, all_total = merge(all_acc, all_largest, all_total, acc, largest, total)
                acc, largest, total = empty(ROWS, DIM_BLOCK)
        for start in tl.range(full, end, BLOCK_N, num_stages=TAIL_STAGES):
            acc, largest, total = softmax_tile(
                query, acc, largest, total, positions, start, end, table_ptr, keys_ptr, values_ptr, key_scales_ptr,
                value_scales_ptr, of_head, block_stride, factor, inner,
                True, KV_HEADS, DIM, BLOCK_SIZE, WINDOW, QUANTIZED, SOFTCAPPED, BLOCK_N, BY_DESCRIPTOR,
            )  # fmt: skip
            if (start + BLOCK_N) % SPLIT == 0:
                all_acc, all_largest, all_total = merge(all_acc, all_largest, all_total, acc, largest, total)
                acc, largest, total = empty(ROWS, DIM_BLOCK)
        # The split that the last tile left open; where there is none, nothing is added, which changes no bit.
        acc, largest, total = merge(all_acc, all_largest, all_total, acc, largest, total)
        store_output(output_ptr, query_row * (KV_HEADS * GROUP) + query_head, mask, acc, total, DIM, DIM_BLOCK)
