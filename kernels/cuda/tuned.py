"""Tuned constants of the linear kernels. Not measured yet: no GPU was at hand; chosen for the reasons given here.

What decides the bits of a result (the step along K, the number of segments) depends on the weight alone. What depends on
the number of rows (the tile, and who adds the segments) does not change the bits: every element of the output is the
same chain of sums along K, whichever tile it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.ops import QuantizationMode

ROW_BUCKETS = (8, 16, 32, 64, 128)
"""Widths of a tile. A call with more rows than the last has several tiles of that width."""

MIN_SEGMENT = 256
MAX_SEGMENTS = 8
SPLIT_PROGRAMS = 256
"""With few rows there is one program for 64 output features: 16 for N = 1024, on a device of 108 (A100) to 148 (B200)
multiprocessors. Cutting K into segments gives about two programs a multiprocessor, but none with less than 256 of K,
where starting costs more than loading, and no more segments than one wave of loads can bring together again."""

MAX_SPLIT_ELEMENTS = 1 << 20
"""With more output than this (64 tiles of 128 x 128) one program walks all segments of its tile: there are programs
enough, and the partial sums (4 bytes an element and segment, written and read) would outgrow the L2 cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes, and with what.

    block_n output features by block_m rows, block_k of K at a time. Programs are numbered so that `group` tiles along
    the rows come before the next features: what runs together then shares its operands in the L2 cache.
    """

    block_n: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


def block_k(mode: QuantizationMode, dtype: torch.dtype) -> int:
    """The step along K: a line of 128 bytes of each row of the weight. Never depends on the number of rows."""
    if mode != "none":
        return 128
    return 32 if dtype == torch.float32 else 64


def segments(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int) -> tuple[int, int]:
    """(how many pieces K is cut into, length of a piece): a function of the weight alone. The last may be shorter."""
    step = block_k(mode, dtype)
    wanted = max(1, min(-(-SPLIT_PROGRAMS // -(-n // 64)), k // MIN_SEGMENT, MAX_SEGMENTS))
    length = -(-k // (wanted * step)) * step
    return -(-k // length), length


def tile(mode: QuantizationMode, dtype: torch.dtype, rows: int) -> Tile:
    """The tile for a number of rows."""
    return candidates(mode, dtype, rows)[0]


def candidates(mode: QuantizationMode, dtype: torch.dtype, rows: int) -> list[Tile]:
    """Tiles worth trying in a sweep, the chosen one first. All of them give the same bits."""
    step = block_k(mode, dtype)
    block_m = next((bucket for bucket in ROW_BUCKETS if rows <= bucket), ROW_BUCKETS[-1])
    if dtype == torch.float32 and mode != "w8a8":
        # For exactness, not for speed: float32 is multiplied without tensor cores.
        return [Tile(64, min(block_m, 32), step, 4, 2)]
    if block_m <= 32:
        # Bound by the bandwidth: many bytes of the weight in flight, 64 features of 128 bytes in each of 5 stages ahead,
        # and two or more such programs a multiprocessor.
        return [Tile(64, block_m, step, 4, stages) for stages in (6, 4, 8)] + [Tile(128, block_m, step, 4, 4)]
    if block_m == 64:
        return [Tile(64, 64, step, 4, 4), Tile(128, 64, step, 4, 4), Tile(128, 64, step, 8, 4)]
    return [Tile(128, 128, step, 8, stages) for stages in (3, 4)] + [Tile(128, 64, step, 4, 4)]
