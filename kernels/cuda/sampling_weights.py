"""Integer weights, keys and sums of logits: what the sampling kernels share.

A weight is trunc(exp(l - max) * 2^36) (`kernels.sampling`), here in fixed point: float64 is slow on many GPUs, and an
exp made of integers has the same bits on all of them. The distance D = max - l is taken without rounding error (the
sum of two float32) in units of 2^-44, divided into steps of ln 2 / 512, of which a table holds the exponentials, and a
rest below one step, for which three terms of the series suffice. A weight differs from NumPy's by one unit at most,
where the exponential lies close to an integer: about one weight in a hundred (`tests/kernels/cuda/test_sampling.py`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
FARTHEST = tl.constexpr(25.0)  # exp(-25) * 2^36 < 1: weights from here on are 0
UNITS = tl.constexpr(17592186044416.0)  # 2^44: what D is counted in
STEPS_PER_UNIT = tl.constexpr(1549082004)  # floor(512 / ln 2 * 2^21)
STEP = tl.constexpr(1524246769571)  # floor(ln 2 / 512 * 2^50)
SIXTH = tl.constexpr(715827882)  # floor(2^32 / 6)
LOWEST_KEY = tl.constexpr(-(1 << 31))
EVERYTHING = tl.constexpr(1 << 31)  # probability 1 in units of 2^-31
LOW_31 = tl.constexpr((1 << 31) - 1)


@functools.cache
def exponential_table(device: torch.device) -> Tensor:
    """exp(-j * ln 2 / 512) * 2^42 for j in 0 .. 511, int64."""
    exponents = torch.arange(512, dtype=torch.float64) / -512
    return torch.exp2(exponents).mul(2.0**42).round().to(torch.int64).to(device)


@triton.jit
def scale(x, temperature):
    """x / temperature in float32, at most the largest float32."""
    return tl.minimum(tl.div_rn(x, temperature), FLOAT32_MAX)


@triton.jit
def key_of(x):
    """float32 without NaN -> int32 in the same order; -0 and 0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def distance_of(x, maximum):
    """x <= maximum, float32 -> (maximum - x in units of 2^-44 as int64, whether it is below 25); 0 where it is not."""
    near = maximum - x < FARTHEST
    x = tl.where(near, x, maximum)
    # Knuth's exact sum: difference + error is maximum - x.
    difference = maximum - x
    subtracted = maximum - difference
    error = (maximum - (difference + subtracted)) + (subtracted - x)
    return (difference * UNITS).to(tl.int64) + (error * UNITS).to(tl.int64), near


@triton.jit
def weight_of_distance(distance, near, table_ptr):
    """trunc(exp(-distance) * 2^36) as int64, 0 where not near. Never grows with the distance."""
    # 2^-26 units times 2^21 per unit: the number of whole steps, or one less where it is on the border.
    steps = ((distance >> 18) * STEPS_PER_UNIT) >> 47
    rest = (((distance << 6) - steps * STEP) >> 9).to(tl.uint32)  # in 2^-41; below 2^32
    # 1 - exp(-x) = x * (1 - x * (1/2 - x/6)), each bracket a fraction of 2^32.
    half = 0x80000000 - (tl.umulhi(rest, tl.full(rest.shape, SIXTH, tl.uint32)) >> 9)
    bracket = 0xFFFFFFFF - (tl.umulhi(rest, half.to(tl.uint32)) >> 9)
    lost = tl.umulhi(rest, bracket.to(tl.uint32)).to(tl.int64)
    start = tl.load(table_ptr + (steps & 511))
    value = start - (((start >> 11) * lost) >> 30)
    return tl.where(near, value >> (6 + (steps >> 9)), 0)


@triton.jit
def weight_of(x, maximum, table_ptr):
    """float32 logits after temperature, and their maximum -> int64 weights."""
    distance, near = distance_of(x, maximum)
    return weight_of_distance(distance, near, table_ptr)


@triton.jit
def surprise_of(distance):
    """rint(distance * 2^22), halves to even, for a distance in units of 2^-44: typical-p's measure, unsigned."""
    whole = distance >> 22
    part = distance & 0x3FFFFF
    up = (part > 0x200000) | ((part == 0x200000) & ((whole & 1) == 1))
    return whole + up.to(tl.int64)


@triton.jit
def multiply_shift_floor(fraction, total):
    """floor(fraction * total / 2^31), as `kernels.sampling` computes it: int64, no term above 2^62."""
    return fraction * (total >> 31) + ((fraction * (total & LOW_31)) >> 31)


@triton.jit
def multiply_shift_ceil(fraction, total):
    """ceil(fraction * total / 2^31), at least 1."""
    exact = fraction * (total >> 31) + ((fraction * (total & LOW_31) + LOW_31) >> 31)
    return tl.maximum(exact, 1)


@triton.jit
def if_so(mask, condition):
    """The mask where the scalar condition holds, else all false. (The interpreter makes no mask of a scalar's.)"""
    return mask & ((tl.zeros(mask.shape, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def load_values(logits_ptr, work_ptr, from_work, index, inside):
    """Logits of one row, as they came or (from_work) from its float32 copy; -inf outside. -> float32."""
    raw = tl.load(logits_ptr + index, mask=if_so(inside, from_work == 0), other=0.0).to(tl.float32)
    work = tl.load(work_ptr + index, mask=if_so(inside, from_work != 0), other=0.0)
    return tl.where(inside, tl.where(from_work != 0, work, raw), float("-inf"))


@triton.jit(do_not_specialize=["vocab"])
def _weights(scaled_ptr, weights_ptr, exponentials_ptr, maximum, vocab, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab
    x = tl.load(scaled_ptr + index, mask=inside, other=float("-inf"))
    tl.store(weights_ptr + index, weight_of(x, maximum, exponentials_ptr), mask=inside)


def token_weights(scaled: Tensor, maximum: float) -> Tensor:
    """float32 logits [V] after temperature -> int64 weights [V], as the sampler computes them."""
    weights = torch.zeros(scaled.shape, dtype=torch.int64, device=scaled.device)
    grid = (triton.cdiv(len(scaled), 4096),)
    table = exponential_table(scaled.device)
    _weights[grid](scaled, weights, table, maximum, len(scaled), BLOCK=4096, enable_fp_fusion=True)
    return weights
