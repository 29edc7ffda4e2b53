"""Log-probabilities of given tokens and of the most likely ones, from the logits as they came.

ln p = (l - max) - ln(sum of weights / 2^36): the sum is one of integers, so it has no order. What each weight loses
below 2^-36 makes an error of at most 2^-36 a token of the vocabulary, 2e-6 for 131,072 tokens.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import sampling_survey
from kernels.cuda.compile import Variant
from kernels.cuda.sampling_candidates import bound_of_groups, gather_candidates
from kernels.cuda.sampling_survey import CHUNK, GROUP, MAX_CHUNKS, MAX_GROUPS, row_summary
from kernels.cuda.sampling_weights import exponential_table, if_so, key_of, load_values
from kernels.cuda.workspace import Workspace
from kernels.ops import LogProbabilities
from kernels.sampling import check_log_probabilities

MAX_LOGPROBS = 1024
CAPACITY = 2048
BLOCK = 1024
WARPS = 8


@triton.jit(do_not_specialize=["vocab", "top"])
def _logprobs(
    logits_ptr,  # [R, V]
    tokens_ptr,  # int64 [R]
    maxima_ptr,  # float32 [R, MAX_GROUPS]
    best_ptr,  # float32 [R, MAX_CHUNKS]
    best_ids_ptr,
    finite_ptr,
    sums_ptr,  # int64 [R, MAX_CHUNKS]
    groups_ptr,  # int32 [R, MAX_GROUPS]: scratch
    values_ptr,  # float32 [R, CAPACITY]: scratch
    ids_ptr,  # int32 [R, CAPACITY]: scratch
    logprobs_ptr,  # float32 [R]
    top_ids_ptr,  # int64 [R, top]
    top_logprobs_ptr,  # float32 [R, top]
    vocab,
    top,
    logits_stride,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the top tokens one by one, each the largest (logit, -id) below the one before."""
    row = tl.program_id(0).to(tl.int64)
    maximum, _, finite = row_summary(best_ptr, best_ids_ptr, finite_ptr, row, vocab, CHUNK, MAX_CHUNKS)
    if finite != 0:
        chunk = tl.arange(0, MAX_CHUNKS)
        sums = tl.load(sums_ptr + row * MAX_CHUNKS + chunk, mask=chunk * CHUNK < vocab, other=0)
        log_sum = tl.log(tl.sum(sums, axis=0).to(tl.float32) * 1.4551915228366852e-11)
        row_ptr = logits_ptr + row * logits_stride
        token = tl.load(tokens_ptr + row)
        tl.store(logprobs_ptr + row, (tl.load(row_ptr + token).to(tl.float32) - maximum) - log_sum)

        row_values_ptr = values_ptr + row * CAPACITY
        row_ids_ptr = ids_ptr + row * CAPACITY
        count = tl.zeros([], tl.int32) + vocab
        fast = tl.zeros([], tl.int32)
        groups = (vocab + GROUP - 1) // GROUP
        if (top > 0) & (top <= groups):
            bound = bound_of_groups(maxima_ptr + row * MAX_GROUPS, top.to(tl.int64), groups, maximum, MAX_GROUPS)
            gathered = gather_candidates(
                row_ptr, values_ptr, tl.zeros([], tl.int32), maxima_ptr + row * MAX_GROUPS,
                groups_ptr + row * MAX_GROUPS, row_values_ptr, row_ids_ptr, bound, vocab,
                GROUP, MAX_GROUPS, CAPACITY, BLOCK,
            )  # fmt: skip
            if gathered <= CAPACITY:
                count = gathered
                fast = tl.full([], 1, tl.int32)
        previous = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for place in range(top):
            best = tl.full([BLOCK], -0x7FFFFFFFFFFFFFFF, tl.int64)
            for first in range(0, count, BLOCK):
                index = first + tl.arange(0, BLOCK)
                inside = index < count
                x = load_values(row_ptr, row_values_ptr, fast, index, inside)
                token_id = tl.where(
                    fast != 0, tl.load(row_ids_ptr + index, mask=if_so(inside, fast != 0), other=0), index
                )
                packed = (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - token_id).to(tl.int64)
                best = tl.where(inside & (packed < previous) & (packed > best), packed, best)
            previous = tl.max(best, axis=0)
            top_id = 0x7FFFFFFF - (previous & 0x7FFFFFFF)
            tl.store(top_ids_ptr + row * top + place, top_id)
            tl.store(
                top_logprobs_ptr + row * top + place, (tl.load(row_ptr + top_id).to(tl.float32) - maximum) - log_sum
            )


def log_probabilities(logits: Tensor, token_ids: Tensor, top: int, workspace: Workspace) -> LogProbabilities:
    """logits [R, V] bf16, fp16 or fp32, rows contiguous; token_ids int64 [R] on the device: `Ops.log_probabilities`.

    Raises ValueError as `check_log_probabilities` does. Reads nothing back to the host.
    """
    check_log_probabilities(logits, token_ids, top, MAX_LOGPROBS)
    rows, vocab = logits.shape
    logprobs = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    top_ids = torch.zeros((rows, top), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.zeros((rows, top), dtype=torch.float32, device=logits.device)
    if rows:
        values = workspace.take("logprob values", (rows, CAPACITY), torch.float32)
        found = sampling_survey.survey(logits, values, None, "logprob", workspace)
        # Without a table there are no temperatures: the pointer is one that is not read.
        sampling_survey.sum_weights(logits, values, None, values, exponential_table(logits.device), found)
        _logprobs[(rows,)](
            logits,
            token_ids,
            found.maxima,
            found.best,
            found.best_ids,
            found.finite,
            found.sums,
            workspace.take("logprob groups", (rows, MAX_GROUPS), torch.int32),
            values,
            workspace.take("logprob ids", (rows, CAPACITY), torch.int32),
            logprobs,
            top_ids,
            top_logprobs,
            vocab,
            top,
            logits.stride(0),
            num_warps=WARPS,
            enable_fp_fusion=True,
            **_constants(),
        )
    return LogProbabilities(logprobs, top_ids, top_logprobs)


def _constants() -> dict[str, int]:
    """Of the launch, and of its variant."""
    return {
        "CHUNK": CHUNK,
        "GROUP": GROUP,
        "MAX_CHUNKS": MAX_CHUNKS,
        "MAX_GROUPS": MAX_GROUPS,
        "CAPACITY": CAPACITY,
        "BLOCK": BLOCK,
    }


def variants() -> list[Variant]:
    """bf16 logits."""
    pointers = {
        "logits_ptr": "*bf16",
        "tokens_ptr": "*i64",
        "maxima_ptr": "*fp32",
        "best_ptr": "*fp32",
        "best_ids_ptr": "*i32",
        "finite_ptr": "*i32",
        "sums_ptr": "*i64",
        "groups_ptr": "*i32",
        "values_ptr": "*fp32",
        "ids_ptr": "*i32",
        "logprobs_ptr": "*fp32",
        "top_ids_ptr": "*i64",
        "top_logprobs_ptr": "*fp32",
    }
    integers = {"vocab": "i32", "top": "i32", "logits_stride": "i32"}
    aligned = frozenset(pointers) | {"logits_stride"}
    launch = Variant("log-probabilities bf16", _logprobs, {**pointers, **integers}, _constants(), aligned, WARPS)
    # Two to four registers more than ptxas wants to give; only requests that ask for log-probabilities come here.
    return [dataclasses.replace(launch, hot=False)]
