"""Biases, allowed ids, masks and penalties: the logits of the rows that have any, as float32 copies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.compile import Variant
from kernels.cuda.sampling_plan import Adjustments
from kernels.cuda.sampling_weights import FLOAT32_MAX, if_so

BLOCK = 2048  # 8 elements a thread of 256: 16-byte loads of bf16
ENTRIES = 1024
WARPS = 8


@triton.jit(do_not_specialize=["vocab"])
def _copy_rows(
    logits_ptr,  # [R, V]
    slots_ptr,  # int64 [slots, 5]
    out_ptr,  # float32 [slots, V]
    vocab,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """Program (chunk, slot): a piece of a row, as it is; -inf where only some ids are allowed."""
    slot = tl.program_id(1).to(tl.int64)
    row = tl.load(slots_ptr + slot * 5)
    restricted = tl.load(slots_ptr + slot * 5 + 3)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab
    x = tl.load(logits_ptr + row * logits_stride + index, mask=if_so(inside, restricted == 0), other=0.0).to(tl.float32)
    tl.store(out_ptr + slot * vocab + index, tl.where(restricted != 0, float("-inf"), x), mask=inside)


@triton.jit
def _adjusted(value, forbidden, seen, repetition, penalty):
    """One float32 operation after the other, each rounded: fma with 0 keeps the product from the subtraction."""
    value = tl.where(forbidden, float("-inf"), value)
    multiplied = tl.fma(value, repetition, 0.0)
    penalized = tl.where(value < 0, multiplied, tl.div_rn(value, repetition))
    value = tl.where(seen, penalized, value)
    return tl.minimum(value - penalty, FLOAT32_MAX)


@triton.jit(do_not_specialize=["vocab", "entries", "depth"])
def _adjust(
    logits_ptr,  # [R, V]
    slots_ptr,  # int64 [slots, 5]
    factors_ptr,  # float32 [slots, 2]
    tokens_ptr,  # int32 [E]
    flags_ptr,  # int32 [E]
    penalties_ptr,  # float32 [2, E]
    biases_ptr,  # float32 [depth, E]
    pending_ptr,  # int64 [R] or None
    out_ptr,  # float32 [slots, V]
    vocab,
    entries,
    depth,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """Program (slot): computes the final logit of each of its entries from the logit as it came."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(slots_ptr + slot * 5)
    first = tl.load(slots_ptr + slot * 5 + 1).to(tl.int32)
    end = tl.load(slots_ptr + slot * 5 + 2).to(tl.int32)
    restricted = tl.load(slots_ptr + slot * 5 + 3)
    repetition = tl.load(factors_ptr + slot * 2)
    row_ptr = logits_ptr + row * logits_stride
    copy_ptr = out_ptr + slot * vocab
    pending = tl.full([], -1, tl.int64)
    if pending_ptr is not None:
        takes_pending = tl.load(slots_ptr + slot * 5 + 4)
        pending = tl.load(pending_ptr + row)
        # An id outside the vocabulary could only come from a row that was not finite: it counts as none.
        pending = tl.where((takes_pending != 0) & (pending < vocab), pending, -1)
    found = tl.zeros([], tl.int32)
    for start in range(first, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < end
        token = tl.load(tokens_ptr + entry, mask=inside, other=-2)
        flags = tl.load(flags_ptr + entry, mask=inside, other=0)
        is_pending = token == pending
        found += tl.sum(is_pending.to(tl.int32), axis=0)
        penalty_ptr = penalties_ptr + entry + tl.where(is_pending, entries, 0)
        penalty = tl.load(penalty_ptr, mask=inside, other=0.0)
        value = tl.load(row_ptr + token, mask=inside, other=0.0).to(tl.float32)
        for order in range(depth):
            value += tl.load(biases_ptr + order * entries + entry, mask=inside, other=0.0)
        forbidden = if_so((flags & 2) == 0, restricted != 0)
        seen = ((flags & 1) != 0) | is_pending
        tl.store(copy_ptr + token, _adjusted(value, forbidden, seen, repetition, penalty), mask=inside)
    if pending_ptr is not None:  # decided when the kernel is compiled, hence # noqa: SIM102
        if (pending >= 0) & (found == 0):
            # Seen for the first time; not among the allowed ids, if there are any.
            value = tl.load(row_ptr + pending).to(tl.float32)
            penalty = tl.load(factors_ptr + slot * 2 + 1)
            value = _adjusted(value, restricted != 0, True, repetition, penalty)
            tl.store(copy_ptr + pending, value)


@triton.jit(do_not_specialize=["vocab", "words"])
def _mask(
    masks_ptr,  # int32 [M, words]
    mask_slots_ptr,  # int32 [M]
    out_ptr,  # float32 [slots, V]
    vocab,
    words,
    BLOCK: tl.constexpr,
):
    """Program (chunk, mask): -inf where the bit of an id is 0."""
    which = tl.program_id(1).to(tl.int64)
    slot = tl.load(mask_slots_ptr + which).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab
    word = tl.load(masks_ptr + which * words + (index >> 5), mask=inside, other=-1)
    forbidden = ((word >> (index & 31)) & 1) == 0
    tl.store(out_ptr + slot * vocab + index, float("-inf"), mask=inside & forbidden)


def adjust(logits: Tensor, adjustments: Adjustments, pending: Tensor | None, out: Tensor) -> None:
    """logits [R, V] -> out float32 [slots, V]: the rows of the slots with everything that precedes the temperature.

    Floor: the rows' bytes read, and twice as many (four) written for bf16 (float32), over the bandwidth.
    """
    a = adjustments
    vocab = logits.shape[1]
    _copy_rows[(triton.cdiv(vocab, BLOCK), a.slots)](
        logits, a.slots_table, out, vocab, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
    )
    _adjust[(a.slots,)](
        logits,
        a.slots_table,
        a.factors,
        a.tokens,
        a.flags,
        a.penalties,
        a.biases,
        pending,
        out,
        vocab,
        a.tokens.shape[0],
        a.biases.shape[0],
        logits.stride(0),
        BLOCK=ENTRIES,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    if a.masks is not None and a.mask_slots is not None:
        _mask[(triton.cdiv(vocab, BLOCK), a.masks.shape[0])](
            a.masks, a.mask_slots, out, vocab, a.masks.shape[1], BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
        )


def variants() -> list[Variant]:
    """bf16 logits, with and without pending tokens; masks."""
    masked = {"masks_ptr": "*i32", "mask_slots_ptr": "*i32", "out_ptr": "*fp32"}
    copied = {"logits_ptr": "*bf16", "slots_ptr": "*i64", "out_ptr": "*fp32"}
    pointers = {
        **copied,
        "factors_ptr": "*fp32",
        "tokens_ptr": "*i32",
        "flags_ptr": "*i32",
        "penalties_ptr": "*fp32",
        "biases_ptr": "*fp32",
    }
    integers = {"vocab": "i32", "entries": "i32", "depth": "i32", "logits_stride": "i32"}
    return [
        Variant(
            "copy rows bf16",
            _copy_rows,
            {**copied, "vocab": "i32", "logits_stride": "i32"},
            {"BLOCK": BLOCK},
            frozenset(copied) | {"logits_stride"},
            num_warps=WARPS,
        ),
        Variant(
            "adjust bf16 pending",
            _adjust,
            {**pointers, "pending_ptr": "*i64", **integers},
            {"BLOCK": ENTRIES},
            frozenset(pointers) | {"pending_ptr", "logits_stride"},
            num_warps=WARPS,
        ),
        Variant(
            "adjust bf16",
            _adjust,
            {**pointers, **integers},
            {"BLOCK": ENTRIES, "pending_ptr": None},
            frozenset(pointers) | {"logits_stride"},
            num_warps=WARPS,
        ),
        Variant(
            "mask",
            _mask,
            {**masked, "vocab": "i32", "words": "i32"},
            {"BLOCK": BLOCK},
            frozenset(masked),
            num_warps=WARPS,
        ),
    ]
