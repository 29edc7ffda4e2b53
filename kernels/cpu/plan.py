"""What a step's metadata becomes once, for all layers: the arrays of `csrc/step.h`'s Step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.checks import check_attention
from kernels.cpu.native import Step
from kernels.ops import AttentionMetadata

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A Step, the arrays that it points to, and what the calls check: the block size, the largest block id in use and
    the longest sequence."""

    struct: Step
    num_tokens: int
    block_size: int
    largest_block: int
    longest: int
    query_starts: Int32Array
    positions: Int32Array
    sequences: Int32Array
    block_tables: Int32Array


def make_plan(metadata: AttentionMetadata) -> CpuPlan:
    """Check the metadata (ValueError names the field) and lay it out."""
    largest_block = check_attention(metadata)
    size = metadata.block_size
    count = len(metadata.query_lens)
    query_lens = np.asarray(metadata.query_lens, dtype=np.int32)
    seq_lens = np.asarray(metadata.seq_lens, dtype=np.int32)
    query_starts = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(query_lens, out=query_starts[1:])
    num_tokens = int(query_starts[-1])
    longest = int(seq_lens.max())
    if num_tokens == count:  # a token each
        sequences = np.arange(count, dtype=np.int32)
        positions = seq_lens - 1
    else:
        sequences = np.repeat(np.arange(count, dtype=np.int32), query_lens)
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(seq_lens - query_starts[1:], query_lens)
    stride = -(-longest // size)
    tables = np.zeros((count, stride), dtype=np.int32)
    for row, table, seq_len in zip(tables, metadata.block_tables, metadata.seq_lens, strict=True):
        used = -(-seq_len // size)
        row[:used] = table if len(table) == used else table[:used]
    struct = Step(
        num_tokens,
        count,
        query_starts.ctypes.data,
        positions.ctypes.data,
        sequences.ctypes.data,
        tables.ctypes.data,
        stride,
    )
    return CpuPlan(struct, num_tokens, size, largest_block, longest, query_starts, positions, sequences, tables)
