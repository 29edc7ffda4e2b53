"""The rule of `kernels.sampling`, quickly: the same tokens with few passes over the vocabulary.

The passes are NumPy's: its float64 exp treats all elements alike (see `.elementwise`), its calls are cheap,
and a row of 32,000 float64 stays in the second-level cache. Weights are kept as float64 holding integers, whose sums
are exact below 2^53; a row that exceeds it (131,072 tokens or more, almost all equal) is left to `kernels.sampling`.
Nothing sorts the vocabulary but typical-p.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from kernels.ops import SampleResult, SamplingMetadata
from kernels.philox import random_31_bits
from kernels.portable.workspace import Workspace
from kernels.sampling import (
    FLOAT32_MAX,
    SMALLEST_TEMPERATURE,
    WEIGHT_BITS,
    Float32Array,
    Float64Array,
    Int64Array,
    adjust_logits,
    biases_by_row,
    check_sampling,
    draw,
    kept_weights,
    min_p_weight,
    multiply_shift_ceil,
    multiply_shift_floor,
    probability_31_bits,
    top_p_cutoff,
    typical_keep,
)

PIECE = 128
BINS_PER_NAT = 64.0
EXACT = float(1 << 53)


def sample(
    logits: Tensor, metadata: SamplingMetadata, workspace: Workspace, fallbacks: Counter[str] | None = None
) -> SampleResult:
    """logits [R, V] -> one token a row. Raises ValueError as `check_sampling` does. Rows that are left to
    `kernels.sampling` are counted in `fallbacks`."""
    rows, vocab = logits.shape
    check_sampling(metadata, rows, vocab)
    values = workspace.take("logits", (rows, vocab), torch.float32).copy_(logits).numpy()
    random = random_31_bits(metadata.seeds, metadata.positions, metadata.choices).tolist()
    biases = biases_by_row(metadata)
    touched = {*biases, *metadata.allowed, *metadata.masks, *metadata.prompt_tokens, *metadata.output_tokens}
    sampler = _Sampler(vocab, metadata, workspace)
    tokens, finite = [0] * rows, [False] * rows
    with np.errstate(over="ignore", under="ignore"):
        for row in range(rows):
            raw: Float32Array = values[row]
            # NaN passes through both min and max.
            finite[row] = bool(np.isfinite(raw.min()) and np.isfinite(raw.max()))
            if finite[row]:
                adjusted = raw
                if row in touched:
                    adjusted = adjust_logits(raw, metadata, row, biases.get(row, ()))
                token = sampler.pick(adjusted, row, random[row])
                if token is None:
                    if fallbacks is not None:
                        fallbacks["sample"] += 1
                    token = draw(kept_weights(raw, metadata, row), random[row])
                tokens[row] = token
    token_ids = torch.tensor(tokens, dtype=torch.int64)
    return SampleResult(token_ids, torch.tensor(finite))


class _Sampler:
    """Draws one row after the other, in buffers of a vocabulary's size that the workspace keeps."""

    def __init__(self, vocab: int, metadata: SamplingMetadata, workspace: Workspace) -> None:
        self.vocab = vocab
        self.metadata = metadata
        # Whole pieces, so that the sums over pieces need no special last one; what is beyond V stays 0.
        self.pieces = -(-vocab // PIECE)
        self._scaled: Float32Array = workspace.take("scaled", (vocab,), torch.float32).numpy()
        self._offsets: Float64Array = workspace.take("offsets", (vocab,), torch.float64).numpy()
        self._weights: Float64Array = workspace.take("weights", (self.pieces * PIECE,), torch.float64).numpy()
        self._weights[vocab:] = 0.0

    def pick(self, adjusted: Float32Array, row: int, random: int) -> int | None:
        """A finite row after bias and penalties -> its token; None if its sums could be inexact."""
        m = self.metadata
        if m.temperatures[row] < SMALLEST_TEMPERATURE:
            return int(adjusted.argmax())  # the first of equal values
        scaled = self._scaled
        np.divide(adjusted, np.float32(m.temperatures[row]), out=scaled)
        maximum = scaled.max()
        if maximum > FLOAT32_MAX:
            maximum = np.minimum(scaled, FLOAT32_MAX, out=scaled).max()
        if maximum == -np.inf:
            return 0
        if 0 < m.top_ks[row] < self.vocab:
            return self._from_candidates(top_k_ids(scaled, m.top_ks[row]), maximum, row, random)

        weights = self._weigh(scaled, maximum)
        sums = weights.reshape(self.pieces, PIECE).sum(1)
        total = float(sums.sum())
        # Partial sums of non-negative numbers do not exceed the last one, so if that is exact, all were.
        if total >= EXACT:
            return None
        top_p, min_p, typical_p = m.top_ps[row], m.min_ps[row], m.typical_ps[row]
        if top_p >= 1.0 and min_p <= 0.0 and typical_p >= 1.0:
            return self._from_pieces(weights, sums, random)

        # Both top-p and min-p keep what has at least a certain weight.
        cutoff = 1
        if top_p < 1.0:
            threshold = multiply_shift_ceil(probability_31_bits(top_p), int(total))
            cutoff = self._top_p_cutoff(weights[: self.vocab], threshold)
        if min_p > 0.0:
            cutoff = max(cutoff, min_p_weight(min_p))
        ids = np.flatnonzero(weights >= float(cutoff))
        kept = weights[ids].astype(np.int64)
        if typical_p < 1.0:
            left = typical_keep(scaled[ids], maximum, kept, probability_31_bits(typical_p))
            ids, kept = ids[left], kept[left]
        return _draw_id(ids, kept, random)

    def _weigh(self, scaled: Float32Array, maximum: np.float32) -> Float64Array:
        """`token_weights` of the whole vocabulary as float64, padded with zeros; valid until the next call."""
        np.copyto(self._offsets, scaled)
        np.subtract(self._offsets, np.float64(maximum), out=self._offsets)
        weights = self._weights[: self.vocab]
        np.exp(self._offsets, out=weights)
        np.multiply(weights, float(1 << WEIGHT_BITS), out=weights)
        np.floor(weights, out=weights)
        return self._weights

    def _from_candidates(self, ids: Int64Array, maximum: np.float32, row: int, random: int) -> int:
        """The filters after top-k, on the few tokens (ascending ids) that it left."""
        m = self.metadata
        left = self._scaled[ids]
        offsets = np.subtract(left, maximum, dtype=np.float64)
        weights = (np.exp(offsets) * float(1 << WEIGHT_BITS)).astype(np.int64)
        cutoff = min_p_weight(m.min_ps[row])
        if m.top_ps[row] < 1.0:
            threshold = multiply_shift_ceil(probability_31_bits(m.top_ps[row]), int(weights.sum()))
            cutoff = max(cutoff, top_p_cutoff(weights, threshold))
        if cutoff > 0:
            kept = weights >= cutoff
            ids, left, weights = ids[kept], left[kept], weights[kept]
        if m.typical_ps[row] < 1.0:
            kept = typical_keep(left, maximum, weights, probability_31_bits(m.typical_ps[row]))
            ids, weights = ids[kept], weights[kept]
        return _draw_id(ids, weights, random)

    def _top_p_cutoff(self, weights: Float64Array, threshold: int) -> int:
        """`top_p_cutoff` without sorting the vocabulary: bins of l first, then the one in which the sum is reached.

        Weights fall with the bin's number, so the bins before the crossing one hold only larger (or equal) weights.
        """
        # Beyond 25 nats the weight is 0: one bin takes all, -inf included.
        scaled_offsets = np.maximum(self._offsets, -25.0) * -BINS_PER_NAT
        bins = scaled_offsets.astype(np.intp)
        sums = np.cumsum(np.bincount(bins, weights=weights))
        crossing = int(np.searchsorted(sums, float(threshold)))
        before = int(sums[crossing - 1]) if crossing else 0
        return top_p_cutoff(weights[bins == crossing].astype(np.int64), threshold - before)

    def _from_pieces(self, weights: Float64Array, sums: Float64Array, random: int) -> int:
        """`kernels.sampling.draw`, by the sums of pieces first and then within one."""
        cumulative = np.cumsum(sums)
        target = multiply_shift_floor(random, int(cumulative[-1]))
        piece = int(np.searchsorted(cumulative, float(target), side="right"))
        rest = float(target) - (float(cumulative[piece - 1]) if piece else 0.0)
        inside = np.cumsum(weights[piece * PIECE : (piece + 1) * PIECE])
        return piece * PIECE + int(np.searchsorted(inside, rest, side="right"))


def top_k_ids(scaled: Float32Array, top_k: int) -> Int64Array:
    """Ids, ascending, of all values not below the k-th largest; 0 < top_k < V.

    The k-th largest of the maxima of disjoint pieces has at least k values at or above it, so it is a lower bound of
    the k-th largest value, close enough to leave few candidates.
    """
    vocab = len(scaled)
    pieces = vocab // PIECE
    if pieces <= top_k:
        return np.flatnonzero(scaled >= np.partition(scaled, vocab - top_k)[vocab - top_k])
    maxima = scaled[: pieces * PIECE].reshape(pieces, PIECE).max(1)
    ids = np.flatnonzero(scaled >= np.partition(maxima, pieces - top_k)[pieces - top_k])
    candidates = scaled[ids]
    kept: Int64Array = ids[candidates >= np.partition(candidates, len(ids) - top_k)[len(ids) - top_k]]
    return kept


def _draw_id(ids: Int64Array, weights: Int64Array, random: int) -> int:
    """`kernels.sampling.draw` over the tokens that are left."""
    cumulative = np.cumsum(weights)
    target = multiply_shift_floor(random, int(cumulative[-1]))
    return int(ids[np.searchsorted(cumulative, target, side="right")])
