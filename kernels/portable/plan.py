"""What a step's metadata becomes once, for all layers: positions, slots and attention's work in fixed shapes.

A query at position p reads the keys [start, start + extent). start is the first key that it may see, rounded down to
a multiple of 128; extent covers the rest in steps of 64 up to 256, of 128 up to 512, then of 256: fine steps waste few
keys, coarse ones gather more sequences in one call. Both depend on p and the layer's window alone. So every token meets
the same key tiles whether it comes in a prompt, a chunk or a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.checks import check_attention
from kernels.ops import AttentionMetadata, RotaryTable
from kernels.portable.kv_cache import PortableKVCache

Int64Array = npt.NDArray[np.int64]

START_STEP = 128
KEY_STEPS = ((256, 64), (512, 128))
LONG_KEY_STEP = 256


@dataclass(slots=True)
class Work:
    """Queries of equal key extent that are computed together.

    decode: one query of each of several sequences; `rows` are their token indices, blocks is [W, extent / block_size],
    starts and positions are [W]. prompt: a run of queries of one sequence, token indices rows[0] to rows[-1]; blocks
    is [1, ...], starts [1], positions [W].
    """

    decode: bool
    rows: Int64Array
    extent: int
    positions: Int64Array
    starts: Int64Array
    blocks: Int64Array
    every_row: bool
    row_index: Tensor
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    prepared: dict[tuple[int, ...], Any] = field(default_factory=dict)
    gathers: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def gather_index(self, cache: PortableKVCache) -> Tensor:
        """Rows of `cache.block_rows`: [2, sequences, Hkv, extent / block_size], the same for all equal layers."""
        heads = cache.spec.num_kv_heads
        key = (heads, cache.num_blocks)
        index = self.gathers.get(key)
        if index is None:
            kinds = np.arange(2)[:, None, None, None] * cache.num_blocks
            rows = (kinds + self.blocks[None, :, None, :]) * heads + np.arange(heads)[None, None, :, None]
            index = self.gathers[key] = torch.from_numpy(np.ascontiguousarray(rows))
        return index


@dataclass(slots=True)
class PortablePlan:
    """Positions [T], each new token's slot as (block, offset), blocks to clear; and what the layers keep in it."""

    num_tokens: int
    block_size: int
    largest_block: int
    longest: int
    query_lens: Int64Array
    seq_lens: Int64Array
    tables: Int64Array
    positions: Int64Array
    new_blocks: Int64Array
    new_offsets: Int64Array
    fresh_blocks: Tensor | None
    _rotary: dict[int, tuple[RotaryTable, Tensor, Tensor]] = field(default_factory=dict)
    _write: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _work: dict[tuple[int | None, bool], list[Work]] = field(default_factory=dict)

    def rotary(self, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin) of this step's positions, float32 [T, 1, rotary_dim]."""
        found = self._rotary.get(id(table))
        if found is None:
            positions = torch.from_numpy(self.positions)
            cos, sin = table.cos[positions], table.sin[positions]
            both = (torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([-sin, sin], -1).unsqueeze(1))
            found = self._rotary[id(table)] = (table, *both)  # keeps the table alive, so that its id stays its own
        return found[1], found[2]

    def write_index(self, cache: PortableKVCache) -> Tensor:
        """Rows of `cache.token_rows` for keys, then values: [2 * T * Hkv]."""
        heads, size = cache.spec.num_kv_heads, cache.spec.block_size
        key = (heads, cache.num_blocks)
        index = self._write.get(key)
        if index is None:
            blocks = np.arange(2)[:, None, None] * cache.num_blocks + self.new_blocks[None, :, None]
            rows = (blocks * heads + np.arange(heads)[None, None, :]) * size + self.new_offsets[None, :, None]
            index = self._write[key] = torch.from_numpy(rows.reshape(-1))
        return index

    def work(self, window: int | None, one_height: bool) -> list[Work]:
        """The step's attention in groups of equal shape. `one_height`: treat prompt tokens like decode tokens."""
        key = (window, one_height)
        found = self._work.get(key)
        if found is None:
            found = self._work[key] = list(self._build_work(window, one_height))
        return found

    def _build_work(self, window: int | None, one_height: bool) -> Iterator[Work]:
        starts, extents = key_range(self.positions, window)
        sequences = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        single = np.ones(self.num_tokens, dtype=bool) if one_height else self.query_lens[sequences] == 1

        for extent in np.unique(extents[single]).tolist():
            rows = np.flatnonzero(single & (extents == extent))
            yield self._make(True, rows, extent, starts[rows], sequences[rows], window)

        # Runs of prompt tokens: a new one begins where the sequence, the first key or the extent changes.
        prompt = np.flatnonzero(~single)
        if len(prompt):
            keys = np.stack([sequences[prompt], starts[prompt], extents[prompt]])
            borders = np.flatnonzero((np.diff(keys) != 0).any(0)) + 1
            for rows in np.split(prompt, borders):
                first = rows[:1]
                yield self._make(False, rows, int(extents[first[0]]), starts[first], sequences[first], window)

    def _make(
        self, decode: bool, rows: Int64Array, extent: int, starts: Int64Array, sequences: Int64Array, window: int | None
    ) -> Work:
        """Look up the blocks of these queries (decode: each has its own; prompt: those of the first one's sequence).

        A tile may begin before the window and end after the sequence. Blocks there may belong to someone else by now,
        NaN included, so the sequence's last block stands in for them; they are masked either way.
        """
        columns = starts[:, None] // self.block_size + np.arange(extent // self.block_size)[None, :]
        last = (self.seq_lens[sequences] - 1)[:, None] // self.block_size
        needed = columns <= last
        if window is not None:
            first_keys = np.maximum(self.positions[rows[: len(sequences)]] - window + 1, 0)
            needed &= columns >= first_keys[:, None] // self.block_size
        blocks = self.tables[sequences[:, None], np.where(needed, columns, last)]
        every_row = len(rows) == self.num_tokens
        index = torch.from_numpy(rows)
        return Work(decode, rows, extent, self.positions[rows], starts, blocks, every_row, index)


def key_range(positions: Int64Array, window: int | None) -> tuple[Int64Array, Int64Array]:
    """First key (a multiple of 128) and number of keys (a multiple of 64) that a query at each position reads."""
    if window is None:
        starts = np.zeros_like(positions)
    else:
        starts = np.maximum(positions - window + 1, 0) // START_STEP * START_STEP
    visible = positions + 1 - starts
    extents = -(-visible // LONG_KEY_STEP) * LONG_KEY_STEP
    for limit, step in reversed(KEY_STEPS):
        extents = np.where(visible <= limit, -(-visible // step) * step, extents)
    return starts, extents


def make_plan(metadata: AttentionMetadata) -> PortablePlan:
    """Check the metadata (ValueError names the field) and lay it out in arrays."""
    largest_block = check_attention(metadata)
    size = metadata.block_size
    query_lens = np.asarray(metadata.query_lens, dtype=np.int64)
    seq_lens = np.asarray(metadata.seq_lens, dtype=np.int64)
    used = -(-seq_lens // size)
    tables = np.zeros((len(seq_lens), int(used.max())), dtype=np.int64)
    for row, (table, count) in enumerate(zip(metadata.block_tables, used.tolist(), strict=True)):
        tables[row, :count] = table[:count]

    first_positions = seq_lens - query_lens
    ends = np.cumsum(query_lens)
    num_tokens = int(ends[-1])
    positions = np.arange(num_tokens) + np.repeat(first_positions - (ends - query_lens), query_lens)
    new_blocks = tables[np.repeat(np.arange(len(seq_lens)), query_lens), positions // size]
    # Only a last block can stay partly filled, and it is new if its first token is.
    begun = (seq_lens % size != 0) & ((used - 1) * size >= first_positions)
    fresh = tables[np.flatnonzero(begun), used[begun] - 1]
    return PortablePlan(
        num_tokens=num_tokens,
        block_size=size,
        largest_block=largest_block,
        longest=int(seq_lens.max()),
        query_lens=query_lens,
        seq_lens=seq_lens,
        tables=tables,
        positions=positions,
        new_blocks=new_blocks,
        new_offsets=positions % size,
        fresh_blocks=torch.from_numpy(fresh) if len(fresh) else None,
    )
