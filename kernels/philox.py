"""Philox-4x32-10: random bits as a pure function of (seed, position, choice).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter-based generator keeps no state, so the
n-th token of a request can be drawn without the ones before it, in any batch, on any device, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = np.uint64(0x9E3779B9)
_KEY_STEP_1 = np.uint64(0xBB67AE85)
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


def philox_4x32_10(
    key: tuple[UInt64Array, UInt64Array],
    counter: tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array],
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Encrypt each counter under its key. All words are 32-bit values held in uint64 arrays of one shape."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = (product_1 >> _SHIFT_32) ^ c1 ^ k0
        c1 = product_1 & _LOW_32
        c2 = (product_0 >> _SHIFT_32) ^ c3 ^ k1
        c3 = product_0 & _LOW_32
        k0 = (k0 + _KEY_STEP_0) & _LOW_32
        k1 = (k1 + _KEY_STEP_1) & _LOW_32
    return c0, c1, c2, c3


def random_31_bits(seeds: Sequence[int], positions: Sequence[int], choices: Sequence[int]) -> npt.NDArray[np.int64]:
    """One integer 0 <= r < 2^31 a row: the first output word, without its lowest bit.

    The key is (seed low, seed high), the counter (position, choice, 0, 0). Needs 0 <= seed < 2^64 and
    0 <= position, choice < 2^32; NumPy raises OverflowError for what no uint64 can hold.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    position = np.asarray(positions, dtype=np.uint64)
    choice = np.asarray(choices, dtype=np.uint64)
    zero = np.zeros_like(seed)
    word = philox_4x32_10((seed & _LOW_32, seed >> _SHIFT_32), (position, choice, zero, zero))[0]
    return (word >> np.uint64(1)).astype(np.int64)
