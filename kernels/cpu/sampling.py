"""The rule of `kernels.sampling`, quickly: the same tokens with few passes over the vocabulary.

The passes are NumPy's: its float64 exp treats all elements alike (see `kernels.cpu.elementwise`), its calls are cheap,
and a row of 32,000 float64 stays in the second-level cache. After top-k only the candidates are looked at; what remains
of the vocabulary is never sorted unless top-p or typical-p has to look at all of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.ops import SampleResult, SamplingMetadata
from kernels.philox import random_31_bits
from kernels.sampling import (
    SMALLEST_TEMPERATURE,
    WEIGHT_BITS,
    Float32Array,
    Float64Array,
    Int64Array,
    adjust_logits,
    biases_by_row,
    check_sampling,
    min_p_weight,
    multiply_shift_ceil,
    multiply_shift_floor,
    probability_31_bits,
    scale_by_temperature,
    token_weights,
    top_p_cutoff,
    typical_keep,
)

PIECE = 128


def sample(logits: Tensor, metadata: SamplingMetadata) -> SampleResult:
    """logits [R, V] -> one token a row. Raises ValueError as `check_sampling` does."""
    rows, vocab = logits.shape
    check_sampling(metadata, rows, vocab)
    largest, smallest = logits.amax(-1), logits.amin(-1)
    finite = torch.isfinite(largest) & torch.isfinite(smallest)  # NaN passes through both
    values = logits.to(torch.float32).numpy()
    random = random_31_bits(metadata.seeds, metadata.positions, metadata.choices).tolist()
    biases = biases_by_row(metadata)
    touched = {*biases, *metadata.allowed, *metadata.prompt_tokens, *metadata.output_tokens}
    scratch = _Scratch(vocab)
    tokens = [0] * rows
    for row, usable in enumerate(finite.tolist()):
        if usable:
            adjusted = values[row]
            if row in touched:
                adjusted = adjust_logits(adjusted, metadata, row, biases.get(row, ()))
            tokens[row] = _pick(adjusted, metadata, row, random[row], scratch)
    return SampleResult(torch.tensor(tokens, dtype=torch.int64), finite)


class _Scratch:
    """Two buffers of a vocabulary's size, shared by the rows of a call, made when the first row needs them."""

    def __init__(self, vocab: int) -> None:
        # Padded to whole pieces, so that the sums over pieces need no special last one; the padding stays 0.
        self.vocab = vocab
        self._exponentials: Float64Array | None = None
        self._weights: Int64Array | None = None

    def weights(self, scaled: Float32Array, maximum: np.float32) -> Int64Array:
        """`token_weights` of the whole vocabulary, [pieces, PIECE]; valid until the next call."""
        if self._exponentials is None or self._weights is None:
            self._exponentials = np.empty(self.vocab, dtype=np.float64)
            self._weights = np.zeros((-(-self.vocab // PIECE), PIECE), dtype=np.int64)
        with np.errstate(under="ignore"):
            np.subtract(scaled, maximum, out=self._exponentials, dtype=np.float64)
            np.exp(self._exponentials, out=self._exponentials)
            flat = self._weights.reshape(-1)[: self.vocab]
            np.multiply(self._exponentials, float(1 << WEIGHT_BITS), out=flat, casting="unsafe")
        return self._weights


def _pick(adjusted: Float32Array, metadata: SamplingMetadata, row: int, random: int, scratch: _Scratch) -> int:
    """One finite row, after bias and penalties -> its token."""
    temperature = metadata.temperatures[row]
    if temperature < SMALLEST_TEMPERATURE:
        return int(adjusted.argmax())  # the first of equal values
    scaled = adjusted if temperature == 1.0 else scale_by_temperature(adjusted, temperature)
    maximum = scaled.max()
    if maximum == -np.inf:
        return 0

    vocab = len(scaled)
    top_k, top_p = metadata.top_ks[row], metadata.top_ps[row]
    min_p, typical_p = metadata.min_ps[row], metadata.typical_ps[row]
    if 0 < top_k < vocab:
        ids = _top_k(scaled, top_k)
        left = scaled[ids]
        weights = token_weights(left, maximum)
    else:
        pieces = scratch.weights(scaled, maximum)
        if top_p >= 1.0 and min_p <= 0.0 and typical_p >= 1.0:
            return _draw_from_pieces(pieces, random)
        flat = pieces.reshape(-1)[:vocab]
        ids = np.flatnonzero(flat)
        left, weights = scaled[ids], flat[ids]

    if top_p < 1.0:
        threshold = multiply_shift_ceil(probability_31_bits(top_p), int(weights.sum()))
        kept = weights >= top_p_cutoff(weights, threshold)
        ids, left, weights = ids[kept], left[kept], weights[kept]
    if min_p > 0.0:
        kept = weights >= min_p_weight(min_p)
        ids, left, weights = ids[kept], left[kept], weights[kept]
    if typical_p < 1.0:
        kept = typical_keep(left, maximum, weights, probability_31_bits(typical_p))
        ids, weights = ids[kept], weights[kept]
    cumulative = np.cumsum(weights)
    target = multiply_shift_floor(random, int(cumulative[-1]))
    return int(ids[np.searchsorted(cumulative, target, side="right")])


def _top_k(scaled: Float32Array, top_k: int) -> Int64Array:
    """Ids, ascending, of all values not below the k-th largest.

    The k-th largest of the maxima of disjoint pieces has at least k values at or above it, so it is a lower bound of
    the k-th largest value, close enough to leave few candidates.
    """
    vocab = len(scaled)
    pieces = vocab // PIECE
    if pieces > top_k:
        maxima = scaled[: pieces * PIECE].reshape(pieces, PIECE).max(1)
        bound = np.partition(maxima, pieces - top_k)[pieces - top_k]
        ids = np.flatnonzero(scaled >= bound)
        candidates = scaled[ids]
        kept: Int64Array = ids[candidates >= np.partition(candidates, len(ids) - top_k)[len(ids) - top_k]]
        return kept
    return np.flatnonzero(scaled >= np.partition(scaled, vocab - top_k)[vocab - top_k])


def _draw_from_pieces(pieces: Int64Array, random: int) -> int:
    """`kernels.sampling.draw` on weights [pieces, PIECE]: sums of pieces first, then within one. Sums are exact."""
    cumulative = np.cumsum(pieces.sum(1))
    target = multiply_shift_floor(random, int(cumulative[-1]))
    piece = int(np.searchsorted(cumulative, target, side="right"))
    before = int(cumulative[piece - 1]) if piece else 0
    inside = int(np.searchsorted(np.cumsum(pieces[piece]), target - before, side="right"))
    return piece * PIECE + inside
