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
    count, num_tokens, longest = len(metadata.query_lens), sum(metadata.query_lens), max(metadata.seq_lens)
    stride = -(-longest // size)
    # One array for all: an address that is asked of NumPy costs two microseconds.
    ends = (count + 1, count + 1 + num_tokens, count + 1 + 2 * num_tokens)
    memory = np.zeros(ends[2] + count * stride, dtype=np.int32)
    query_starts, positions, sequences = memory[: ends[0]], memory[ends[0] : ends[1]], memory[ends[1] : ends[2]]
    tables = memory[ends[2] :].reshape(count, stride)
    seq_lens = np.array(metadata.seq_lens, dtype=np.int32)
    if num_tokens == count:  # a token each
        query_starts[:] = np.arange(count + 1)
        sequences[:] = query_starts[:-1]
        np.subtract(seq_lens, 1, out=positions)
    else:
        query_lens = np.array(metadata.query_lens, dtype=np.int32)
        np.cumsum(query_lens, out=query_starts[1:])
        sequences[:] = np.repeat(np.arange(count, dtype=np.int32), query_lens)
        positions[:] = np.arange(num_tokens, dtype=np.int32) + np.repeat(seq_lens - query_starts[1:], query_lens)
    for row, table, seq_len in zip(tables, metadata.block_tables, metadata.seq_lens, strict=True):
        used = -(-seq_len // size)
        row[:used] = table if len(table) == used else table[:used]
    first = memory.ctypes.data
    struct = Step(num_tokens, count, first, *(first + 4 * end for end in ends), stride)
    return CpuPlan(struct, num_tokens, size, largest_block, longest, query_starts, positions, sequences, tables)
