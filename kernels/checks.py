"""Checks of a step's metadata that every backend makes, with messages for a person."""

from __future__ import annotations

from kernels.ops import AttentionMetadata


def check_attention(metadata: AttentionMetadata) -> int:
    """Raise ValueError that names the field which is wrong; return the largest block id that is in use."""
    m = metadata
    sequences = len(m.query_lens)
    if sequences == 0:
        raise ValueError("metadata.query_lens is empty; a step needs at least one sequence")
    if len(m.seq_lens) != sequences or len(m.block_tables) != sequences:
        raise ValueError(
            f"metadata.query_lens, seq_lens and block_tables differ in length: "
            f"{sequences}, {len(m.seq_lens)}, {len(m.block_tables)}"
        )
    if m.block_size < 1:
        raise ValueError(f"metadata.block_size is {m.block_size}; it must be at least 1")
    largest = 0
    for s, (query_len, seq_len, table) in enumerate(zip(m.query_lens, m.seq_lens, m.block_tables, strict=True)):
        if not 1 <= query_len <= seq_len:
            raise ValueError(f"metadata.query_lens[{s}] is {query_len}; allowed is 1 to seq_lens[{s}] = {seq_len}")
        needed = -(-seq_len // m.block_size)
        if len(table) < needed:
            raise ValueError(f"metadata.block_tables[{s}] has {len(table)} blocks; {seq_len} tokens need {needed}")
        used = table[:needed]
        if min(used) < 0:
            raise ValueError(f"metadata.block_tables[{s}] holds a negative block id")
        largest = max(largest, max(used))
    return largest
