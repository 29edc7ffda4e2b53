"""The passes over all logits: maxima of their groups, and sums of their weights, in pieces of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.compile import Variant
from kernels.cuda.sampling_weights import if_so, load_values, scale, weight_of
from kernels.cuda.workspace import Workspace

GROUP = 64  # logits a group: 131,072 logits give 2,048 maxima, which one program holds in registers
CHUNK = 4096  # logits a program: 16 a thread of 256
MAX_CHUNKS = 64  # of a vocabulary of 2^18
MAX_GROUPS = 4096
WARPS = 8


@dataclass(frozen=True, slots=True)
class Surveyed:
    """maxima float32 [R, MAX_GROUPS], best float32, best_ids int32, finite int32, sums int64 [R, MAX_CHUNKS].

    Only what belongs to the vocabulary is written.
    """

    maxima: Tensor
    best: Tensor
    best_ids: Tensor
    finite: Tensor
    sums: Tensor


@triton.jit(do_not_specialize=["vocab"])
def _survey(
    logits_ptr,  # [R, V]
    work_ptr,  # float32 [slots, V]
    table_ptr,  # int64 [R, 8], or None: the logits as they came
    maxima_ptr,  # float32 [R, MAX_GROUPS]
    best_ptr,  # float32 [R, MAX_CHUNKS]
    best_ids_ptr,  # int32 [R, MAX_CHUNKS]
    finite_ptr,  # int32 [R, MAX_CHUNKS]
    vocab,
    logits_stride,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    group = tl.arange(0, CHUNK // GROUP)
    index = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = index < vocab
    raw = tl.load(logits_ptr + row * logits_stride + index, mask=inside, other=0.0).to(tl.float32)
    finite = tl.min(tl.min((tl.abs(raw) < float("inf")).to(tl.int32), axis=1), axis=0)
    x = tl.where(inside, raw, float("-inf"))
    if table_ptr is not None:
        slot = tl.load(table_ptr + row * 8 + 7)
        copy_ptr = work_ptr + tl.maximum(slot, 0) * vocab
        from_copy = if_so(inside, slot >= 0)
        x = tl.where(from_copy, tl.load(copy_ptr + index, mask=from_copy, other=0.0), x)
    maxima = tl.max(x, axis=1)
    first = chunk * (CHUNK // GROUP) + group
    tl.store(maxima_ptr + row * MAX_GROUPS + first, maxima, mask=first * GROUP < vocab)
    best = tl.max(maxima, axis=0)
    best_id = tl.min(tl.min(tl.where(x == best, index, 0x7FFFFFFF), axis=1), axis=0)
    tl.store(best_ptr + row * MAX_CHUNKS + chunk, best)
    tl.store(best_ids_ptr + row * MAX_CHUNKS + chunk, best_id)
    tl.store(finite_ptr + row * MAX_CHUNKS + chunk, finite)


@triton.jit
def row_summary(best_ptr, best_ids_ptr, finite_ptr, row, vocab, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """(maximum, its lowest id as int64, 1 if all logits are finite) of a row, from its chunks."""
    chunk = tl.arange(0, MAX_CHUNKS)
    inside = chunk * CHUNK < vocab
    best = tl.load(best_ptr + row * MAX_CHUNKS + chunk, mask=inside, other=float("-inf"))
    ids = tl.load(best_ids_ptr + row * MAX_CHUNKS + chunk, mask=inside, other=0x7FFFFFFF)
    finite = tl.min(tl.load(finite_ptr + row * MAX_CHUNKS + chunk, mask=inside, other=1), axis=0)
    maximum = tl.max(best, axis=0)
    return maximum, tl.min(tl.where(best == maximum, ids, 0x7FFFFFFF), axis=0).to(tl.int64), finite


@triton.jit(do_not_specialize=["vocab"])
def _sum(
    logits_ptr,  # [R, V]
    work_ptr,  # float32 [slots, V]
    table_ptr,  # int64 [R, 8], or None: all weights of the logits as they came
    temperatures_ptr,  # float32 [R]
    exponentials_ptr,  # int64 [512]
    best_ptr,
    best_ids_ptr,
    finite_ptr,
    sums_ptr,  # int64 [R, MAX_CHUNKS]
    vocab,
    logits_stride,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Sum of a chunk's weights; of those that min-p keeps where no other filter follows. Greedy and top-k: nothing."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    maximum, _, finite = row_summary(best_ptr, best_ids_ptr, finite_ptr, row, vocab, CHUNK, MAX_CHUNKS)
    temperature = 1.0
    slot = tl.full([], -1, tl.int64)
    smallest = tl.full([], 0, tl.int64)
    needed = (finite != 0) & (maximum > float("-inf"))
    if table_ptr is not None:
        parameters = table_ptr + row * 8
        slot = tl.load(parameters + 7)
        temperature = tl.load(temperatures_ptr + row)
        needed = needed & (temperature > 0) & (tl.load(parameters + 3) == 0)
        unfiltered = (tl.load(parameters + 4) >= 1 << 31) & (tl.load(parameters + 6) >= 1 << 31)
        smallest = tl.where(unfiltered, tl.load(parameters + 5), 0)
    if needed:
        index = chunk * CHUNK + tl.arange(0, CHUNK)
        row_ptr = logits_ptr + row * logits_stride
        copy_ptr = work_ptr + tl.maximum(slot, 0) * vocab
        x = load_values(row_ptr, copy_ptr, slot >= 0, index, index < vocab)
        w = weight_of(scale(x, temperature), scale(maximum, temperature), exponentials_ptr)
        tl.store(sums_ptr + row * MAX_CHUNKS + chunk, tl.sum(tl.where(w >= smallest, w, 0), axis=0))


def survey(logits: Tensor, work: Tensor, table: Tensor | None, name: str, workspace: Workspace) -> Surveyed:
    """Maxima of logits [R, V], of the copies in `work` where the table has a slot. `name`: of the buffers."""
    rows, vocab = logits.shape
    found = Surveyed(
        maxima=workspace.take(f"{name} maxima", (rows, MAX_GROUPS), torch.float32),
        best=workspace.take(f"{name} best", (rows, MAX_CHUNKS), torch.float32),
        best_ids=workspace.take(f"{name} best ids", (rows, MAX_CHUNKS), torch.int32),
        finite=workspace.take(f"{name} finite", (rows, MAX_CHUNKS), torch.int32),
        sums=workspace.take(f"{name} sums", (rows, MAX_CHUNKS), torch.int64),
    )
    _survey[(triton.cdiv(vocab, CHUNK), rows)](
        logits,
        work,
        table,
        found.maxima,
        found.best,
        found.best_ids,
        found.finite,
        vocab,
        logits.stride(0),
        CHUNK=CHUNK,
        GROUP=GROUP,
        MAX_CHUNKS=MAX_CHUNKS,
        MAX_GROUPS=MAX_GROUPS,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return found


def sum_weights(
    logits: Tensor, work: Tensor, table: Tensor | None, temperatures: Tensor, exponentials: Tensor, found: Surveyed
) -> None:
    """Fill `found.sums`."""
    rows, vocab = logits.shape
    _sum[(triton.cdiv(vocab, CHUNK), rows)](
        logits,
        work,
        table,
        temperatures,
        exponentials,
        found.best,
        found.best_ids,
        found.finite,
        found.sums,
        vocab,
        logits.stride(0),
        CHUNK=CHUNK,
        MAX_CHUNKS=MAX_CHUNKS,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def variants() -> list[Variant]:
    """bf16 logits; for the tokens, and for log-probabilities (without a table)."""
    found = []
    sizes = {"CHUNK": CHUNK, "MAX_CHUNKS": MAX_CHUNKS}
    integers = {"vocab": "i32", "logits_stride": "i32"}
    chunks = {"best_ptr": "*fp32", "best_ids_ptr": "*i32", "finite_ptr": "*i32"}
    for suffix, table, no_table in (("", {"table_ptr": "*i64"}, {}), (" raw", {}, {"table_ptr": None})):
        pointers = {"logits_ptr": "*bf16", "work_ptr": "*fp32", **table, **chunks}
        survey_pointers = {**pointers, "maxima_ptr": "*fp32"}
        sum_pointers = {
            **pointers,
            "temperatures_ptr": "*fp32",
            "exponentials_ptr": "*i64",
            "sums_ptr": "*i64",
        }
        for name, fn, names, extra in (
            ("survey", _survey, survey_pointers, {"GROUP": GROUP, "MAX_GROUPS": MAX_GROUPS}),
            ("sum", _sum, sum_pointers, {}),
        ):
            found.append(
                Variant(
                    f"{name} bf16{suffix}",
                    fn,
                    {**names, **integers},
                    {**sizes, **extra, **no_table},
                    frozenset(names) | {"logits_stride"},
                    num_warps=WARPS,
                )
            )
    return found
