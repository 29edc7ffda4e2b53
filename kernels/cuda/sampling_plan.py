"""What the sampling kernels need to know of a step, packed for one upload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernels.cuda.upload import Upload
from kernels.ops import SamplingMetadata
from kernels.sampling import (
    SMALLEST_TEMPERATURE,
    biases_by_row,
    check_sampling,
    min_p_weight,
    probability_31_bits,
)

MAX_VOCAB = 1 << 18
"""Sums of weights are below 2^63 up to here (`kernels.sampling`)."""

# Columns of `SamplingPlan.rows_table`.
SEED, POSITION, CHOICE, TOP_K, TOP_P, MIN_WEIGHT, TYPICAL_P, SLOT = range(8)
COLUMNS = 8
# Columns of `Adjustments.slots_table`.
ROW, FIRST, END, RESTRICTED, TAKES_PENDING = range(5)
SLOT_COLUMNS = 5
# Bits of `Adjustments.flags`.
SEEN, ALLOWED = 1, 2


@dataclass(frozen=True, slots=True)
class Adjustments:
    """The rows with a bias, allowed ids, a mask or a penalty, one slot each, and their tokens unlike all others.

    slots_table  int64 [slots, SLOT_COLUMNS]: row, its first entry and the one after its last, whether only entries with
                 ALLOWED are allowed, whether a pending token counts
    factors      float32 [slots, 2]: repetition penalty, what is subtracted from a token that appeared once
    tokens       int32 [E]: token id of each entry
    flags        int32 [E]: SEEN in the prompt or the output, ALLOWED
    penalties    float32 [2, E]: what is subtracted, and what if the token appears once more
    biases       float32 [J, E]: added one after the other; -0.0 for none
    masks        int32 [M, ceil(V / 32)]: packed masks of the allowed ids
    mask_slots   int32 [M]: the slot of each mask; None for both where no row has one
    """

    slots: int
    slots_table: Tensor
    factors: Tensor
    tokens: Tensor
    flags: Tensor
    penalties: Tensor
    biases: Tensor
    masks: Tensor | None = None
    mask_slots: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """One step's sampling parameters on the device, valid until the upload buffer is sent again.

    rows_table    int64 [R, COLUMNS]: seed (its bits), position, choice, top-k (0: off), top-p and typical-p in units of
                  2^-31, smallest weight of min-p, slot of the adjusted copy (-1: none)
    temperatures  float32 [R], 0 for greedy rows
    needs_sums    whether any row needs the sum of all its weights
    """

    rows: int
    vocab: int
    rows_table: Tensor
    temperatures: Tensor
    needs_sums: bool
    drawn: bool
    adjustments: Adjustments | None


def make_plan(metadata: SamplingMetadata, rows: int, vocab: int, upload: Upload) -> SamplingPlan:
    """Check and pack the parameters of `rows` rows of `vocab` logits. The caller sends the upload.

    Raises ValueError as `check_sampling` does, and for a vocabulary above 2^18.
    """
    check_sampling(metadata, rows, vocab)
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"logits have {vocab} columns; allowed is 1 to {MAX_VOCAB}")
    m = metadata
    temperatures = np.array(m.temperatures, dtype=np.float64)
    temperatures[temperatures < SMALLEST_TEMPERATURE] = 0.0
    table = np.empty((rows, COLUMNS), dtype=np.int64)
    table[:, SEED] = np.array(m.seeds, dtype=np.uint64).view(np.int64)
    table[:, POSITION] = m.positions
    table[:, CHOICE] = m.choices
    table[:, TOP_K] = [k if k < vocab else 0 for k in m.top_ks]
    table[:, TOP_P] = [probability_31_bits(p) if p < 1.0 else 1 << 31 for p in m.top_ps]
    table[:, MIN_WEIGHT] = [min_p_weight(p) if p else 0 for p in m.min_ps]
    table[:, TYPICAL_P] = [probability_31_bits(p) if p < 1.0 else 1 << 31 for p in m.typical_ps]
    table[:, SLOT] = -1
    adjustments = None
    touched = adjusted_rows(m)
    if touched:
        table[touched, SLOT] = np.arange(len(touched))
        adjustments = _pack_adjustments(m, touched, upload)
    sampled = temperatures > 0
    return SamplingPlan(
        rows=rows,
        vocab=vocab,
        rows_table=upload.put(table),
        temperatures=upload.put(temperatures.astype(np.float32)),
        needs_sums=bool((sampled & (table[:, TOP_K] == 0)).any()),
        drawn=bool(sampled.any()),
        adjustments=adjustments,
    )


def adjusted_rows(metadata: SamplingMetadata) -> list[int]:
    """The rows whose logits change before the temperature, in order."""
    m = metadata
    if not (m.biases or m.allowed or m.masks or m.prompt_tokens or m.output_tokens):
        return []
    rows = {row for row, _, _ in m.biases}
    rows.update(m.allowed)
    rows.update(m.masks)
    rows.update(row for row in m.prompt_tokens if m.repetition_penalties[row] != 1.0)
    rows.update(
        row
        for row in m.output_tokens
        if m.repetition_penalties[row] != 1.0 or m.presence_penalties[row] != 0.0 or m.frequency_penalties[row] != 0.0
    )
    return sorted(rows)


def _pack_adjustments(metadata: SamplingMetadata, rows: Sequence[int], upload: Upload) -> Adjustments:
    """One slot a row, the entries of its tokens in order of their ids."""
    m = metadata
    biases = biases_by_row(m)
    slots_table = np.zeros((len(rows), SLOT_COLUMNS), dtype=np.int64)
    factors = np.zeros((len(rows), 2), dtype=np.float32)
    tokens: list[npt.NDArray[np.int64]] = []
    flags: list[npt.NDArray[np.int32]] = []
    penalties: list[npt.NDArray[np.float32]] = []
    added: list[tuple[int, int, float]] = []  # (entry, how many before it at this entry, bias)
    first = 0
    for slot, row in enumerate(rows):
        output = np.asarray(m.output_tokens.get(row, ()), dtype=np.int64)
        prompt = np.asarray(m.prompt_tokens.get(row, ()), dtype=np.int64)
        allowed = np.asarray(m.allowed.get(row, ()), dtype=np.int64)
        biased = np.asarray([token for token, _ in biases.get(row, ())], dtype=np.int64)
        ids = np.unique(np.concatenate([output, prompt, allowed, biased]))
        kind = np.zeros(len(ids), dtype=np.int32)
        kind[np.searchsorted(ids, prompt)] = SEEN
        kind[np.searchsorted(ids, output)] = SEEN
        kind[np.searchsorted(ids, allowed)] |= ALLOWED
        counts = np.bincount(np.searchsorted(ids, output), minlength=len(ids))
        frequency, presence = m.frequency_penalties[row], m.presence_penalties[row]
        with np.errstate(over="ignore"):
            once_more = (frequency * (counts + 1) + presence).astype(np.float32)
            now = np.where(counts > 0, frequency * counts + presence, 0.0).astype(np.float32)
            factors[slot] = m.repetition_penalties[row], np.float32(frequency * 1 + presence)
        before: Counter[int] = Counter()
        for token, bias in biases.get(row, ()):
            added.append((first + int(np.searchsorted(ids, token)), before[token], bias))
            before[token] += 1
        slots_table[slot] = row, first, first + len(ids), row in m.allowed, row in m.output_tokens
        first += len(ids)
        tokens.append(ids)
        flags.append(kind)
        penalties.append(np.stack([now, once_more]))
    depth = 1 + max((order for _, order, _ in added), default=-1)
    bias_table = np.full((depth, first), -0.0, dtype=np.float32)
    for entry, order, bias in added:
        with np.errstate(over="ignore"):
            bias_table[order, entry] = np.float32(bias)
    masks = mask_slots = None
    if m.masks:
        masks = upload.put(np.stack([mask.view(np.int32) for mask in m.masks.values()]))
        mask_slots = upload.put(np.asarray([rows.index(row) for row in m.masks], dtype=np.int32))
    return Adjustments(
        slots=len(rows),
        slots_table=upload.put(slots_table),
        factors=upload.put(factors),
        tokens=upload.put(np.concatenate(tokens).astype(np.int32)),
        flags=upload.put(np.concatenate(flags)),
        penalties=upload.put(np.concatenate(penalties, axis=1)),
        biases=upload.put(bias_table),
        masks=masks,
        mask_slots=mask_slots,
    )
