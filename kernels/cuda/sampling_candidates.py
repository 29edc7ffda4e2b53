"""The largest logits of a row, gathered in order of their ids."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.sampling_weights import LOWEST_KEY, key_of, load_values


@triton.jit
def narrow(low, high, sum_1, sum_2, sum_3, threshold):
    """One pass of a search for the largest key whose sum, over all from it upwards, reaches the threshold.

    low..high holds it; sum_j belongs to low + ceil(j/4 of the range). Returns the quarter that holds it.
    """
    span = high - low
    at_1 = low + ((span + 3) >> 2)
    at_2 = low + ((2 * span + 3) >> 2)
    at_3 = low + ((3 * span + 3) >> 2)
    reached_1, reached_2, reached_3 = sum_1 >= threshold, sum_2 >= threshold, sum_3 >= threshold
    new_low = tl.where(reached_3, at_3, tl.where(reached_2, at_2, tl.where(reached_1, at_1, low)))
    new_high = tl.where(reached_3, high, tl.where(reached_2, at_3 - 1, tl.where(reached_1, at_2 - 1, at_1 - 1)))
    return new_low, new_high


@triton.jit
def bound_of_groups(maxima_ptr, count, groups, maximum, MAX_GROUPS: tl.constexpr):
    """The key of the count-th largest of the maxima, int64; at least `count` logits reach it. Needs count <= groups."""
    group = tl.arange(0, MAX_GROUPS)
    inside = group < groups
    keys = key_of(tl.load(maxima_ptr + group, mask=inside, other=float("-inf")))
    low = tl.full([], LOWEST_KEY, tl.int64)
    high = key_of(maximum).to(tl.int64)
    while low < high:
        span = high - low
        sum_1 = tl.sum((inside & (keys >= low + ((span + 3) >> 2))).to(tl.int32), axis=0).to(tl.int64)
        sum_2 = tl.sum((inside & (keys >= low + ((2 * span + 3) >> 2))).to(tl.int32), axis=0).to(tl.int64)
        sum_3 = tl.sum((inside & (keys >= low + ((3 * span + 3) >> 2))).to(tl.int32), axis=0).to(tl.int64)
        low, high = narrow(low, high, sum_1, sum_2, sum_3, count)
    return low


@triton.jit
def gather_candidates(
    logits_ptr,
    work_ptr,
    from_work,
    maxima_ptr,
    groups_ptr,
    values_ptr,
    ids_ptr,
    bound,
    vocab,
    GROUP: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the logits whose key reaches the bound to values_ptr [CAPACITY], their ids to ids_ptr, in order of the ids.

    Returns how many there are, as int32; of more than CAPACITY the rest is not written.
    """
    group = tl.arange(0, MAX_GROUPS)
    maxima = tl.load(maxima_ptr + group, mask=group * GROUP < vocab, other=float("-inf"))
    reaches = (group * GROUP < vocab) & (key_of(maxima) >= bound)
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    groups = tl.sum(reaches.to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(groups_ptr + place, group, mask=reaches)
    tl.debug_barrier()  # other threads of this program read what was stored
    count = tl.zeros([], tl.int32)
    lane = tl.arange(0, BLOCK)
    for first in range(0, groups * GROUP, BLOCK):
        ordinal = (first + lane) // GROUP
        start = tl.load(groups_ptr + ordinal, mask=ordinal < groups, other=0) * GROUP
        index = start + lane % GROUP
        inside = (ordinal < groups) & (index < vocab)
        x = load_values(logits_ptr, work_ptr, from_work, index, inside)
        kept = inside & (key_of(x) >= bound)
        position = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        kept_and_fits = kept & (position < CAPACITY)
        tl.store(values_ptr + position, x, mask=kept_and_fits)
        tl.store(ids_ptr + position, index, mask=kept_and_fits)
        count += tl.sum(kept.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count
