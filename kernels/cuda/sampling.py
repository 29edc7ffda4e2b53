"""From logits to tokens by the rule of `kernels.sampling`, without a sort of the vocabulary and without the host.

Sums of integer weights are exact in any order, so a row is cut in pieces for many programs and no cut, block size or
choice of path can change a token. Launches, each over all rows:

    adjust    rows with a bias, allowed ids or penalties, as float32 copies (`sampling_adjust`)
    survey    (chunk, row)  the largest logit of each group of 64 and of the chunk, its lowest id; is all finite?
    sum       (chunk, row)  the sum of the chunk's weights; only where a row without top-k is drawn
    finish    (row)         greedy: the best chunk's id. No filter but min-p: the chunk that is drawn, by the sums, is
                            scanned. Else the filters, and a scan.

The filters look at candidates. The M-th largest of the groups' maxima is a bound that at least M logits reach: with
M = k they hold all that top-k keeps; and what reaches a bound far out holds all that top-p keeps, if its weights reach
the mass. So a few hundred logits are gathered from the groups that reach the bound, in order of their ids, and all
else happens on them. Where they are too many (ties), or too few to hold the mass of top-p (a flat distribution, or
typical-p by itself), the same steps run over the whole row: slower, and the same token.

A threshold is searched on an integer key in the order of the floats: four parts a pass, each part's count or mass
summed, so at most 16 passes for 32 bits.

Floor: the logits read once (and once more where sums are needed) over the bandwidth. Not measured: no GPU was at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import sampling_adjust, sampling_logprobs, sampling_survey
from kernels.cuda.common import TRITON_TYPES
from kernels.cuda.compile import Variant
from kernels.cuda.sampling_candidates import bound_of_groups, gather_candidates, narrow
from kernels.cuda.sampling_plan import SamplingPlan, make_plan
from kernels.cuda.sampling_survey import CHUNK, GROUP, MAX_CHUNKS, MAX_GROUPS, row_summary
from kernels.cuda.sampling_weights import (
    EVERYTHING,
    LOWEST_KEY,
    distance_of,
    exponential_table,
    if_so,
    key_of,
    load_values,
    multiply_shift_ceil,
    multiply_shift_floor,
    scale,
    surprise_of,
    value_of,
    weight_of,
    weight_of_distance,
)
from kernels.cuda.workspace import Workspace
from kernels.ops import SampleResult

__all__ = ["SamplingPlan", "make_plan", "sample", "variants"]

CAPACITY = 2048  # candidates: one block of the steps that follow
TOP_P_CANDIDATES = 256  # where there is no top-k; top-p keeps fewer tokens of a text model's usual distribution
BLOCK = 1024  # 4 elements a thread: three 64-bit sums of each stay in registers
WARPS = 8

# What is searched, and what is summed.
COUNT = tl.constexpr(0)  # the logits; how many
MASS = tl.constexpr(1)  # the logits; weights of what top-k kept
TYPICAL = tl.constexpr(2)  # typicality, the negative distance; weights of what all other filters kept


@triton.jit
def _measure(
    logits_ptr, work_ptr, from_work, exponentials_ptr, temperature, maximum, index, inside,
    lowest, smallest, mean, KIND: tl.constexpr,
):  # fmt: skip
    """Key and measure of the elements at `index`: key int32, measure int64."""
    x = scale(load_values(logits_ptr, work_ptr, from_work, index, inside), temperature)
    key = key_of(x)
    if KIND == COUNT:
        return key, inside.to(tl.int64)
    distance, near = distance_of(x, maximum)
    w = weight_of_distance(distance, near, exponentials_ptr)
    w = tl.where(inside & (key >= lowest) & (w >= smallest), w, 0)
    if KIND == TYPICAL:
        key = (-tl.abs(surprise_of(distance) - mean)).to(tl.int32)
    return key, w


@triton.jit
def _search(
    logits_ptr, work_ptr, from_work, exponentials_ptr, temperature, maximum, count,
    lowest, smallest, mean, threshold, low, high, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key in low..high (int64) such that the measures of all from it upwards reach the threshold."""
    while low < high:
        span = high - low
        at_1 = (low + ((span + 3) >> 2)).to(tl.int32)
        at_2 = (low + ((2 * span + 3) >> 2)).to(tl.int32)
        at_3 = (low + ((3 * span + 3) >> 2)).to(tl.int32)
        sum_1 = tl.zeros([BLOCK], tl.int64)
        sum_2 = tl.zeros([BLOCK], tl.int64)
        sum_3 = tl.zeros([BLOCK], tl.int64)
        for first in range(0, count, BLOCK):
            index = first + tl.arange(0, BLOCK)
            key, measure = _measure(
                logits_ptr, work_ptr, from_work, exponentials_ptr, temperature, maximum, index, index < count,
                lowest, smallest, mean, KIND,
            )  # fmt: skip
            sum_1 += tl.where(key >= at_1, measure, 0)
            sum_2 += tl.where(key >= at_2, measure, 0)
            sum_3 += tl.where(key >= at_3, measure, 0)
        low, high = narrow(low, high, tl.sum(sum_1, axis=0), tl.sum(sum_2, axis=0), tl.sum(sum_3, axis=0), threshold)
    return low


@triton.jit
def _mass(
    logits_ptr, work_ptr, from_work, exponentials_ptr, temperature, maximum, count,
    lowest, smallest, nearest, mean, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of what the filters keep: sum of the weights, and of (high part, low part) of the weights times the surprise."""
    total = tl.zeros([BLOCK], tl.int64)
    high = tl.zeros([BLOCK], tl.int64)
    low = tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        x = scale(load_values(logits_ptr, work_ptr, from_work, index, index < count), temperature)
        distance, near = distance_of(x, maximum)
        surprise = surprise_of(distance)
        w = weight_of_distance(distance, near, exponentials_ptr)
        kept = (index < count) & (key_of(x) >= lowest) & (w >= smallest) & (-tl.abs(surprise - mean) >= nearest)
        w = tl.where(kept, w, 0)
        total += w
        high += (w >> 18) * surprise
        low += (w & 0x3FFFF) * surprise
    return tl.sum(total, axis=0), tl.sum(high, axis=0), tl.sum(low, axis=0)


@triton.jit(do_not_specialize=["vocab", "adjusted_start"])
def _finish(
    logits_ptr,  # [R, V]
    work_ptr,  # float32: [R, CAPACITY] candidates, then [slots, V] adjusted rows
    table_ptr,  # int64 [R, 8]
    temperatures_ptr,  # float32 [R]
    exponentials_ptr,  # int64 [512]
    maxima_ptr,  # float32 [R, MAX_GROUPS]
    best_ptr,  # float32 [R, MAX_CHUNKS]
    best_ids_ptr,  # int32 [R, MAX_CHUNKS]
    finite_ptr,  # int32 [R, MAX_CHUNKS]
    sums_ptr,  # int64 [R, MAX_CHUNKS]
    groups_ptr,  # int32 [R, MAX_GROUPS]: scratch
    ids_ptr,  # int32 [R, CAPACITY]: scratch
    tokens_ptr,  # int64 [R]
    all_finite_ptr,  # int8 [R]
    vocab,
    adjusted_start,
    logits_stride,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TOP_P_CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_maximum, token, finite = row_summary(best_ptr, best_ids_ptr, finite_ptr, row, vocab, CHUNK, MAX_CHUNKS)
    tl.store(all_finite_ptr + row, finite.to(tl.int8))
    possible = (finite != 0) & (raw_maximum > float("-inf"))
    token = tl.where(possible, token, 0)
    temperature = tl.load(temperatures_ptr + row)
    if possible & (temperature > 0):
        parameters = table_ptr + row * 8
        top_k = tl.load(parameters + 3)
        top_p = tl.load(parameters + 4)
        smallest = tl.load(parameters + 5)
        typical_p = tl.load(parameters + 6)
        slot = tl.load(parameters + 7)
        row_ptr = logits_ptr + row * logits_stride
        candidates_ptr = work_ptr + row * CAPACITY
        source_ptr = work_ptr + adjusted_start + tl.maximum(slot, 0) * vocab
        from_work = (slot >= 0).to(tl.int32)
        maximum = scale(raw_maximum, temperature)
        seed = tl.load(parameters)
        position = tl.load(parameters + 1).to(tl.uint32)
        choice = tl.load(parameters + 2).to(tl.uint32)
        zero = tl.zeros([], tl.uint32)
        word = tl.philox(seed, position, choice, zero, zero)[0]
        random = (word >> 1).to(tl.int64)

        chunk = tl.arange(0, MAX_CHUNKS)
        has_sums = if_so(chunk * CHUNK < vocab, top_k == 0)
        sums = tl.load(sums_ptr + row * MAX_CHUNKS + chunk, mask=has_sums, other=0)
        total = tl.sum(sums, axis=0)
        lowest = tl.full([], LOWEST_KEY, tl.int64)
        nearest = tl.full([], LOWEST_KEY, tl.int64)
        mean = tl.full([], 0, tl.int64)
        first_index = tl.zeros([], tl.int32)
        count = tl.zeros([], tl.int32) + vocab
        fast = tl.zeros([], tl.int32)
        target = multiply_shift_floor(random, total)
        before = tl.full([], 0, tl.int64)
        if (top_k == 0) & (top_p == EVERYTHING) & (typical_p == EVERYTHING):
            # The chunk where the draw falls, and what lies before it.
            passed = tl.cumsum(sums, axis=0) <= target
            drawn_chunk = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), (vocab - 1) // CHUNK)
            before = tl.sum(tl.where(chunk < drawn_chunk, sums, 0), axis=0)
            first_index = drawn_chunk * CHUNK
            count = tl.minimum(first_index + CHUNK, vocab)
        else:
            wanted = tl.where(top_k > 0, top_k, TOP_P_CANDIDATES)
            groups = (vocab + GROUP - 1) // GROUP
            bound = tl.full([], LOWEST_KEY, tl.int64)
            if (vocab > CAPACITY) & (wanted <= groups):
                bound = bound_of_groups(maxima_ptr + row * MAX_GROUPS, wanted, groups, raw_maximum, MAX_GROUPS)
            # Without a bound a row is its own candidates, if it is short.
            limited = (top_k > 0) | (top_p < EVERYTHING)
            if (vocab <= CAPACITY) | ((bound > LOWEST_KEY) & limited):
                gathered = gather_candidates(
                    row_ptr, source_ptr, from_work, maxima_ptr + row * MAX_GROUPS, groups_ptr + row * MAX_GROUPS,
                    candidates_ptr, ids_ptr + row * CAPACITY, bound, vocab, GROUP, MAX_GROUPS, CAPACITY, BLOCK,
                )  # fmt: skip
                fast = (gathered <= CAPACITY).to(tl.int32)
                if (fast != 0) & (top_k > 0) & (bound > LOWEST_KEY):
                    # Division by the temperature may round the logits at the bound and below it to one: then top-k,
                    # which keeps ties, may want some that were not gathered.
                    at_bound = scale(value_of(bound.to(tl.int32)), temperature)
                    fast = (scale(value_of((bound - 1).to(tl.int32)), temperature) < at_bound).to(tl.int32)
                if (fast != 0) & (top_k == 0) & (bound > LOWEST_KEY):
                    # Weights above the bound's must reach the mass: then no token below the bound can be kept.
                    floor = weight_of(scale(value_of(bound.to(tl.int32)), temperature), maximum, exponentials_ptr)
                    inner = _mass(
                        row_ptr, candidates_ptr, tl.full([], 1, tl.int32), exponentials_ptr, temperature, maximum,
                        gathered, lowest, floor + 1, nearest, mean, BLOCK,
                    )[0]  # fmt: skip
                    fast = (inner >= multiply_shift_ceil(top_p, total)).to(tl.int32)
                if fast != 0:
                    count = gathered
                    source_ptr = candidates_ptr
                    from_work = tl.full([], 1, tl.int32)

            highest = key_of(maximum).to(tl.int64)
            if top_k > 0:
                lowest = _search(
                    row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                    lowest, smallest, mean, top_k, lowest, highest, COUNT, BLOCK,
                )  # fmt: skip
            if top_p < EVERYTHING:
                nothing = tl.full([], 0, tl.int64)
                if top_k > 0:
                    total = _mass(
                        row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                        lowest, nothing, nearest, mean, BLOCK,
                    )[0]  # fmt: skip
                # Tokens with a weight lie above maximum - 26.
                low = tl.minimum(tl.maximum(lowest, key_of(maximum - 26.0).to(tl.int64)), highest)
                cut = _search(
                    row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                    lowest, nothing, mean, multiply_shift_ceil(top_p, total), low, highest, MASS, BLOCK,
                )  # fmt: skip
                last = weight_of(value_of(cut.to(tl.int32)), maximum, exponentials_ptr)
                smallest = tl.maximum(smallest, last)
            total, high, low_part = _mass(
                row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                lowest, smallest, nearest, mean, BLOCK,
            )  # fmt: skip
            if typical_p < EVERYTHING:
                # 2^18 times the high part is exact, so fused or not the sum is rounded once; then as Python's round.
                weighted = high.to(tl.float64) * 262144.0 + low_part.to(tl.float64)
                quotient = weighted / total.to(tl.float64)
                mean = ((quotient + 6755399441055744.0) - 6755399441055744.0).to(tl.int64)
                farthest = tl.full([], -(1 << 28), tl.int64)
                nearest = _search(
                    row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                    lowest, smallest, mean, multiply_shift_ceil(typical_p, total), farthest, mean * 0, TYPICAL, BLOCK,
                )  # fmt: skip
                total = _mass(
                    row_ptr, source_ptr, from_work, exponentials_ptr, temperature, maximum, count,
                    lowest, smallest, nearest, mean, BLOCK,
                )[0]  # fmt: skip
            target = multiply_shift_floor(random, total)

        # The draw: how many elements have a cumulative weight that does not exceed the target.
        passed_by = tl.zeros([], tl.int32)
        for first in range(first_index, count, BLOCK):
            index = first + tl.arange(0, BLOCK)
            x = scale(load_values(row_ptr, source_ptr, from_work, index, index < count), temperature)
            distance, near = distance_of(x, maximum)
            w = weight_of_distance(distance, near, exponentials_ptr)
            kept = (key_of(x) >= lowest) & (w >= smallest) & (-tl.abs(surprise_of(distance) - mean) >= nearest)
            cumulative = before + tl.cumsum(tl.where(kept, w, 0), axis=0)
            passed_by += tl.sum(((index < count) & (cumulative <= target)).to(tl.int32), axis=0)
            before += tl.sum(tl.where(kept, w, 0), axis=0)
        drawn = tl.minimum(first_index + passed_by, count - 1)
        if fast != 0:
            drawn = tl.load(ids_ptr + row * CAPACITY + drawn)
        token = drawn.to(tl.int64)
    tl.store(tokens_ptr + row, token)


def sample(logits: Tensor, plan: SamplingPlan, pending: Tensor | None, workspace: Workspace) -> SampleResult:
    """logits [R, V] bf16, fp16 or fp32, each row contiguous -> one token a row (`kernels.sampling`).

    pending: int64 [R] on the device, or None (`Ops.sample`). Raises ValueError for what does not fit. Reads nothing
    back to the host.
    """
    if logits.dtype not in TRITON_TYPES or not logits.dtype.is_floating_point:
        raise ValueError(f"logits have dtype {logits.dtype}; bfloat16, float16 and float32 are supported")
    if logits.shape != (plan.rows, plan.vocab):
        raise ValueError(f"logits must be [{plan.rows}, {plan.vocab}], got {tuple(logits.shape)}")
    if logits.stride(1) != 1 and plan.vocab > 1:
        raise ValueError("logits must have contiguous rows")
    if pending is not None and (pending.shape != (plan.rows,) or pending.dtype != torch.int64):
        raise ValueError(f"pending must be int64 [{plan.rows}], got {pending.dtype} {tuple(pending.shape)}")
    if pending is not None and not pending.is_contiguous():
        raise ValueError("pending must be contiguous")
    rows, vocab = plan.rows, plan.vocab
    token_ids = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    finite = torch.zeros(rows, dtype=torch.int8, device=logits.device)
    if not rows:
        return SampleResult(token_ids, finite.view(torch.bool))
    exponentials = exponential_table(logits.device)
    slots = plan.adjustments.slots if plan.adjustments is not None else 0
    adjusted_start = rows * CAPACITY
    work = workspace.take("sampling work", (adjusted_start + slots * vocab,), torch.float32)
    adjusted = work[adjusted_start:] if slots else work
    if plan.adjustments is not None:
        sampling_adjust.adjust(logits, plan.adjustments, pending, adjusted)
    found = sampling_survey.survey(logits, adjusted, plan.rows_table, "sampling", workspace)
    if plan.needs_sums:
        sampling_survey.sum_weights(logits, adjusted, plan.rows_table, plan.temperatures, exponentials, found)
    _finish[(rows,)](
        logits,
        work,
        plan.rows_table,
        plan.temperatures,
        exponentials,
        found.maxima,
        found.best,
        found.best_ids,
        found.finite,
        found.sums,
        workspace.take("sampling groups", (rows, MAX_GROUPS), torch.int32),
        workspace.take("sampling ids", (rows, CAPACITY), torch.int32),
        token_ids,
        finite,
        vocab,
        adjusted_start,
        logits.stride(0),
        num_warps=WARPS,
        enable_fp_fusion=True,
        **_constants(),
    )
    return SampleResult(token_ids, finite.view(torch.bool))  # bytes of 0 and 1


def _constants() -> dict[str, int]:
    """Of the last launch, and of its variant."""
    return {
        "CHUNK": CHUNK,
        "GROUP": GROUP,
        "MAX_CHUNKS": MAX_CHUNKS,
        "MAX_GROUPS": MAX_GROUPS,
        "CAPACITY": CAPACITY,
        "TOP_P_CANDIDATES": TOP_P_CANDIDATES,
        "BLOCK": BLOCK,
    }


def variants(capability: int) -> list[Variant]:
    """The launches of bf16 logits; the vocabulary is a run-time integer."""
    pointers = {
        "logits_ptr": "*bf16",
        "work_ptr": "*fp32",
        "table_ptr": "*i64",
        "temperatures_ptr": "*fp32",
        "exponentials_ptr": "*i64",
        "maxima_ptr": "*fp32",
        "best_ptr": "*fp32",
        "best_ids_ptr": "*i32",
        "finite_ptr": "*i32",
        "sums_ptr": "*i64",
        "groups_ptr": "*i32",
        "ids_ptr": "*i32",
        "tokens_ptr": "*i64",
        "all_finite_ptr": "*i8",
    }
    finish = Variant(
        "finish bf16",
        _finish,
        {**pointers, "vocab": "i32", "adjusted_start": "i32", "logits_stride": "i32"},
        _constants(),
        frozenset(pointers) | {"logits_stride"},
        num_warps=WARPS,
    )
    return [*sampling_survey.variants(), finish, *sampling_adjust.variants(), *sampling_logprobs.variants()]
