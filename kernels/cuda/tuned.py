"""Tuned constants of the linear kernels. Not measured yet: no GPU was at hand; chosen for the reasons given here.

What decides the bits of a result (the step along K, the number of segments) depends on the weight alone. What depends
on the number of rows (the tile, and who adds the segments) does not change the bits: every element of the output is the
same chain of sums along K, whichever tile it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.ops import QuantizationMode

ROW_BUCKETS = (16, 32, 64)
"""Widths of the tiles for few rows. Not 8: some versions of Triton (3.6 is one) take another family of instructions for
it, and the families may round differently."""

MIN_SEGMENT = 256
MAX_SEGMENTS = 8
SPLIT_PROGRAMS = 256
"""With few rows there is one program for 64 output features: 16 for N = 1024, on a device of 108 (A100) to 148 (B200)
multiprocessors. Cutting K into segments gives about two programs a multiprocessor, but none with less than 256 of K,
where starting costs more than loading, and no more segments than one wave of loads can bring together again."""

MAX_SPLIT_ELEMENTS = 1 << 20
"""With more output than this (64 tiles of 128 x 128) one program walks all segments of its tile: there are programs
enough, and the partial sums (4 bytes an element and segment, written and read) would outgrow the L2 cache."""

MIN_LARGE_TILES = 120
"""128 x 256 tiles read the least from the L2 cache, but there must be enough of them to fill the device."""


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
    """The step along K, the same for every number of rows.

    128 bytes of each row of the weight at a time, which is a line of the cache. Of int8 weights that become bf16 64
    bytes, a burst of the memory: with twice that the large tiles would not fit the registers.
    """
    if mode == "w8a8":
        return 128
    return 32 if dtype == torch.float32 else 64


def segments(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int) -> tuple[int, int]:
    """(how many pieces K is cut into, length of a piece): a function of the weight alone. The last may be shorter."""
    step = block_k(mode, dtype)
    wanted = max(1, min(-(-SPLIT_PROGRAMS // -(-n // 64)), k // MIN_SEGMENT, MAX_SEGMENTS))
    length = -(-k // (wanted * step)) * step
    return -(-k // length), length


def tile(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int, rows: int) -> Tile:
    """The tile for a weight [n, k] and a number of rows."""
    return candidates(mode, dtype, n, k, rows)[0]


def candidates(mode: QuantizationMode, dtype: torch.dtype, n: int, k: int, rows: int) -> list[Tile]:
    """Tiles worth trying in a sweep, the chosen one first. All of them give the same bits."""
    step = block_k(mode, dtype)
    few = next((bucket for bucket in ROW_BUCKETS if rows <= bucket), None)
    if dtype == torch.float32 and mode != "w8a8":
        # For exactness, not for speed: float32 is multiplied without tensor cores.
        return [Tile(64, min(few or 32, 32), step, 4, 2)]
    if few is not None:
        # Bound by the bandwidth: about 40 KB of the weight in flight a program, and two to four programs a
        # multiprocessor. The rows take shared memory too.
        chosen = {"none": 6, "w8a16": 8, "w8a8": 6}[mode] if few <= 32 else 4
        tiles = [Tile(64, few, step, 4, stages) for stages in (chosen, chosen - 2, chosen + 2)]
        return [*tiles, Tile(128, few, step, 4, 4), Tile(128, few, step, 8, 4)]
    large = [Tile(128, 256, step, 8, 3), Tile(128, 256, step, 8, 4)]
    medium = [Tile(128, 128, step, 8, 3), Tile(128, 128, step, 8, 4), Tile(128, 64, step, 4, 4)]
    if mode == "w8a8" or segments(mode, dtype, n, k)[0] > 1:
        # The large tile would not fit the registers: not with a second accumulator for the segments, and with int8 not
        # on compute capability 8.0.
        return medium
    if -(-n // 128) * -(-rows // 256) >= MIN_LARGE_TILES:
        return large + medium
    return medium + large
