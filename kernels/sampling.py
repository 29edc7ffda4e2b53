"""The rule that turns a row of logits into a token, in integers: shared by every backend that runs on the host.

A token's weight is w = trunc(exp(l - max) * 2^36), an int64. Sums of integers are exact in any order, so two programs
that agree on the weights agree on every filter and on the drawn token. Filters, in order, each over what the earlier
ones left; l is the float32 logit after bias, penalties and temperature:

    top-k      keep l >= the k-th largest l
    top-p      keep a token if the sum of all strictly larger weights is below ceil(p * T)
    min-p      keep w >= ceil(min_p * 2^36): the largest weight, that of the best token, is 2^36
    typical-p  keep a token if the sum of the weights of all strictly more typical tokens is below ceil(p * T)

T is the sum of the weights left so far; p is rounded to a multiple of 2^-31, and ceil(p * T) is at least 1. Ties are
kept, so at least one token always is. Typicality is the distance from the entropy of the distribution
(arXiv:2202.00666): with q = rint((l - max) * 2^22) and A the weighted mean of q, it is |q - A|, again an integer.

The draw: r is a random integer of 31 bits, K the sum of the kept weights; the token is the first, in order of ids,
whose cumulative kept weight exceeds floor(r * K / 2^31).

This module computes one row at a time and favours clarity. A faster backend must give the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.ops import LogProbabilities, SamplingMetadata

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Weigh = Callable[[Float32Array, np.float32], Int64Array]

FilterName = Literal["allowed", "temperature", "weight", "top_k", "top_p", "min_p", "typical_p"]

WEIGHT_BITS = 36
SURPRISE_BITS = 22
RANDOM_BITS = 31
FLOAT32_MAX = np.float32(np.finfo(np.float32).max)
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Temperatures below this (the smallest normal float32, 1.2e-38) count as 0."""

_LOW_31 = (1 << RANDOM_BITS) - 1


def multiply_shift_floor(fraction: int, total: int) -> int:
    """floor(fraction * total / 2^31) for 0 <= fraction <= 2^31, 0 <= total < 2^62 / 2^8.

    Written in two halves, as a device without 128-bit integers must compute it: no term exceeds 2^62.
    """
    high, low = total >> RANDOM_BITS, total & _LOW_31
    return fraction * high + ((fraction * low) >> RANDOM_BITS)


def multiply_shift_ceil(fraction: int, total: int) -> int:
    """ceil(fraction * total / 2^31), but at least 1: the threshold of top-p and typical-p."""
    high, low = total >> RANDOM_BITS, total & _LOW_31
    return max(1, fraction * high + ((fraction * low + _LOW_31) >> RANDOM_BITS))


def probability_31_bits(probability: float) -> int:
    """A probability as a multiple of 2^-31, rounded to nearest."""
    return round(probability * (1 << RANDOM_BITS))


def min_p_weight(min_p: float) -> int:
    """The smallest weight that min-p keeps. Scaling by a power of two is exact."""
    return math.ceil(min_p * (1 << WEIGHT_BITS))


def check_sampling(metadata: SamplingMetadata, rows: int, vocab: int) -> None:
    """Raise ValueError that names the field which does not fit `rows` rows of `vocab` logits, or is out of range."""
    m = metadata
    for name in (
        "seeds",
        "positions",
        "choices",
        "temperatures",
        "top_ks",
        "top_ps",
        "min_ps",
        "typical_ps",
        "repetition_penalties",
        "presence_penalties",
        "frequency_penalties",
    ):
        length = len(getattr(m, name))
        if length != rows:
            raise ValueError(f"metadata.{name} has {length} entries for {rows} rows of logits")
    for name, values, low, high in (
        ("seeds", m.seeds, 0, (1 << 64) - 1),
        ("positions", m.positions, 0, (1 << 32) - 1),
        ("choices", m.choices, 0, (1 << 32) - 1),
        ("temperatures", m.temperatures, 0.0, float(FLOAT32_MAX)),
        ("top_ks", m.top_ks, 0, math.inf),
        ("top_ps", m.top_ps, 0.0, 1.0),
        ("min_ps", m.min_ps, 0.0, 1.0),
        ("typical_ps", m.typical_ps, 0.0, 1.0),
        ("repetition_penalties", m.repetition_penalties, SMALLEST_TEMPERATURE, float(FLOAT32_MAX)),
        ("presence_penalties", m.presence_penalties, -float(FLOAT32_MAX), float(FLOAT32_MAX)),
        ("frequency_penalties", m.frequency_penalties, -float(FLOAT32_MAX), float(FLOAT32_MAX)),
    ):
        for value in values:
            if not low <= value <= high:  # also false for NaN
                raise ValueError(f"metadata.{name} holds {value}; allowed is {low} to {high}")
    for row, token, bias in m.biases:
        if not (0 <= row < rows and 0 <= token < vocab):
            raise ValueError(f"metadata.biases names row {row}, token {token}; there are {rows} x {vocab}")
        if math.isnan(bias) or bias == math.inf:
            raise ValueError(f"metadata.biases holds {bias} for token {token}; finite values and -inf are allowed")
    for name, table in (
        ("allowed", m.allowed),
        ("prompt_tokens", m.prompt_tokens),
        ("output_tokens", m.output_tokens),
    ):
        for row, tokens in table.items():
            if not 0 <= row < rows:
                raise ValueError(f"metadata.{name} names row {row}; there are {rows} rows of logits")
            if len(tokens) and not (min(tokens) >= 0 and max(tokens) < vocab):
                raise ValueError(f"metadata.{name}[{row}] holds a token id outside 0 to {vocab - 1}")
            if name == "allowed" and not len(tokens):
                raise ValueError(f"metadata.allowed[{row}] is empty: no token could be drawn")
    for row, mask in m.masks.items():
        if not 0 <= row < rows:
            raise ValueError(f"metadata.masks names row {row}; there are {rows} rows of logits")
        if mask.dtype != np.uint32 or mask.shape != (num_mask_words(vocab),):
            raise ValueError(
                f"metadata.masks[{row}] is {mask.dtype} {mask.shape}; uint32 [{num_mask_words(vocab)}] is needed"
            )


def with_pending(metadata: SamplingMetadata, pending: Tensor | None) -> SamplingMetadata:
    """The metadata with each row's pending token (int64 [R], -1: none) as the last of its output tokens."""
    if pending is None:
        return metadata
    output_tokens = {
        row: (*tokens, token) if (token := int(pending[row])) >= 0 else tokens
        for row, tokens in metadata.output_tokens.items()
    }
    return dataclasses.replace(metadata, output_tokens=output_tokens)


def check_log_probabilities(logits: Tensor, token_ids: Tensor, count: int, most: int | None = None) -> None:
    """Raise ValueError for what `Ops.log_probabilities` cannot be asked for; most: of `count`, beside V."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")
    rows, vocab = logits.shape
    if token_ids.shape != (rows,) or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [{rows}], got {token_ids.dtype} {tuple(token_ids.shape)}")
    limit = vocab if most is None else min(vocab, most)
    if not 0 <= count <= limit:
        raise ValueError(f"count is {count}; allowed is 0 to {limit}")


def log_probabilities(logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
    """`Ops.log_probabilities` on the host: in float64, rounded once to float32, each row by itself.

    A row that is not finite gets zeros. Raises ValueError as `check_log_probabilities` does.
    """
    check_log_probabilities(logits, token_ids, count)
    rows, vocab = logits.shape
    values: Float32Array = logits.to(torch.float32).numpy()
    ids = token_ids.tolist()
    chosen = np.zeros(rows, dtype=np.float32)
    top_ids = np.zeros((rows, count), dtype=np.int64)
    top = np.zeros((rows, count), dtype=np.float32)
    for row in range(rows):
        raw = values[row]
        if not np.isfinite(raw).all():
            continue
        shifted = raw.astype(np.float64) - np.float64(raw.max())
        with np.errstate(under="ignore"):
            log_sum = np.log(np.exp(shifted).sum())
        chosen[row] = shifted[ids[row]] - log_sum
        if count:
            best = np.flatnonzero(raw >= np.partition(raw, vocab - count)[vocab - count])
            best = best[np.argsort(-raw[best], kind="stable")][:count]
            top_ids[row] = best
            top[row] = shifted[best] - log_sum
    return LogProbabilities(torch.from_numpy(chosen), torch.from_numpy(top_ids), torch.from_numpy(top))


def num_mask_words(vocab: int) -> int:
    """Words of 32 bits that a mask over the vocabulary has."""
    return -(-vocab // 32)


def allowed_by_mask(mask: npt.NDArray[np.uint32], vocab: int) -> BoolArray:
    """bool [V] of a packed mask."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab).view(np.bool_)


def adjust_logits(
    logits: Float32Array, metadata: SamplingMetadata, row: int, biases: Sequence[tuple[int, float]]
) -> Float32Array:
    """Bias, allowed ids, mask and penalties of one row, each a float32 operation rounded once. Returns a new array [V].

    biases: those of this row, as (token id, bias).

    The repetition penalty (arXiv:1909.05858) divides positive and multiplies negative logits of every token in the
    prompt or the output. Then frequency * count + presence, over the output only, computed in float64 and rounded to
    float32, is subtracted. Values above the largest float32 become it; -inf marks a forbidden token.
    """
    adjusted = logits.astype(np.float32, copy=True)
    with np.errstate(over="ignore"):
        for token, bias in biases:
            adjusted[token] += np.float32(bias)
        if row in metadata.allowed:
            allowed = np.asarray(metadata.allowed[row], dtype=np.int64)
            kept = adjusted[allowed]
            adjusted[:] = -np.inf
            adjusted[allowed] = kept
        if row in metadata.masks:
            adjusted[~allowed_by_mask(metadata.masks[row], len(adjusted))] = -np.inf

        prompt: Sequence[int] = metadata.prompt_tokens.get(row, ())
        output: Sequence[int] = metadata.output_tokens.get(row, ())
        repetition = np.float32(metadata.repetition_penalties[row])
        if repetition != 1.0:
            seen = np.asarray(sorted({*prompt, *output}), dtype=np.int64)
            values = adjusted[seen]
            adjusted[seen] = np.where(values < 0, values * repetition, values / repetition)
        presence, frequency = metadata.presence_penalties[row], metadata.frequency_penalties[row]
        if presence != 0.0 or frequency != 0.0:
            for token, count in Counter(output).items():
                adjusted[token] -= np.float32(frequency * count + presence)
        return np.minimum(adjusted, FLOAT32_MAX)


def scale_by_temperature(adjusted: Float32Array, temperature: float) -> Float32Array:
    """l / temperature, one float32 division; what overflows upwards becomes the largest float32."""
    with np.errstate(over="ignore"):
        scaled: Float32Array = np.minimum(adjusted / np.float32(temperature), FLOAT32_MAX)
    return scaled


def token_weights(scaled: Float32Array, maximum: np.float32) -> Int64Array:
    """w = trunc(exp(l - max) * 2^36) for float32 logits of any shape.

    NumPy's float64 exp gives an element the same bits wherever it stands: its vector loops mask their tails instead of
    calling another function for them. torch.exp does not promise that.
    """
    with np.errstate(under="ignore"):
        exponentials = np.exp(np.subtract(scaled, maximum, dtype=np.float64))
        return (exponentials * float(1 << WEIGHT_BITS)).astype(np.int64)


def top_p_cutoff(weights: Int64Array, threshold: int) -> int:
    """The smallest weight that top-p keeps: the largest of which all weights from it upwards reach `threshold`."""
    descending = np.sort(weights)[::-1]
    last = int(np.searchsorted(np.cumsum(descending), threshold))
    return int(descending[min(last, len(descending) - 1)])


def typical_keep(scaled: Float32Array, maximum: np.float32, weights: Int64Array, p31: int) -> BoolArray:
    """Which tokens typical-p keeps, of those with a weight above 0.

    Every sum is one of integers below 2^63 (vocabularies up to 2^18), every other operation is rounded once, so
    that any order of evaluation gives the same result.
    """
    total = int(weights.sum())
    present = weights > 0
    offsets = np.where(present, np.subtract(scaled, maximum, dtype=np.float64), 0.0)
    surprise = np.rint(offsets * float(1 << SURPRISE_BITS)).astype(np.int64)
    high = int(((weights >> 18) * surprise).sum())
    low = int(((weights & ((1 << 18) - 1)) * surprise).sum())
    mean = round((float(high) * float(1 << 18) + float(low)) / float(total))
    distance = np.abs(surprise - mean)
    order = np.argsort(distance, kind="stable")
    cumulative = np.cumsum(weights[order])
    # Where the running sum reaches the threshold the kept set ends, with all the ties of that distance.
    last = int(np.searchsorted(cumulative, multiply_shift_ceil(p31, total)))
    kept: BoolArray = present & (distance <= distance[order[min(last, len(order) - 1)]])
    return kept


def biases_by_row(metadata: SamplingMetadata) -> dict[int, list[tuple[int, float]]]:
    """metadata.biases as row -> [(token id, bias), ...], in their order."""
    rows: dict[int, list[tuple[int, float]]] = {}
    for row, token, bias in metadata.biases:
        rows.setdefault(row, []).append((token, bias))
    return rows


def kept_weights(
    logits: Float32Array, metadata: SamplingMetadata, row: int, weigh: Weigh = token_weights
) -> Int64Array:
    """Integer weights int64 [V] of the tokens that `row` may draw, 0 for all others.

    `weights / weights.sum()` is the filtered distribution. Greedy rows have a single nonzero weight. All zeros if
    every token was forbidden or the logits are not finite.
    """
    *_, (_, weights) = filter_stages(logits, metadata, row, weigh)
    return weights


def filter_stages(
    logits: Float32Array, metadata: SamplingMetadata, row: int, weigh: Weigh = token_weights
) -> Iterator[tuple[FilterName, Int64Array]]:
    """The weights int64 [V] of `row` after each filter that is on, by its name and in order; the last are final.

    "allowed" comes first: what biases of -inf, allowed ids and masks leave. Then "weight": what has a weight at all.
    Each array is the same one, changed by the next filter. weigh: a backend's own `Ops.token_weights`.
    """
    weights = np.zeros(logits.shape, dtype=np.int64)
    if not np.isfinite(logits).all():
        yield "allowed", weights
        return
    adjusted = adjust_logits(logits, metadata, row, biases_by_row(metadata).get(row, ()))
    weights[adjusted > -np.inf] = 1
    yield "allowed", weights
    if adjusted.max() == -np.inf:
        return
    if metadata.temperatures[row] < SMALLEST_TEMPERATURE:
        weights[:] = 0
        weights[adjusted.argmax()] = 1 << WEIGHT_BITS
        yield "temperature", weights
        return

    scaled = scale_by_temperature(adjusted, metadata.temperatures[row])
    maximum = scaled.max()
    weights[:] = weigh(scaled, maximum)
    yield "weight", weights
    top_k, top_p = metadata.top_ks[row], metadata.top_ps[row]
    if 0 < top_k < len(scaled):
        weights[scaled < np.partition(scaled, -top_k)[-top_k]] = 0
        yield "top_k", weights
    if top_p < 1.0:
        threshold = multiply_shift_ceil(probability_31_bits(top_p), int(weights.sum()))
        weights[weights < top_p_cutoff(weights, threshold)] = 0
        yield "top_p", weights
    if metadata.min_ps[row] > 0.0:
        weights[weights < min_p_weight(metadata.min_ps[row])] = 0
        yield "min_p", weights
    if metadata.typical_ps[row] < 1.0:
        p31 = probability_31_bits(metadata.typical_ps[row])
        weights[~typical_keep(scaled, maximum, weights, p31)] = 0
        yield "typical_p", weights


def draw(weights: Int64Array, random: int) -> int:
    """The first id whose cumulative weight exceeds floor(random * K / 2^31); 0 if no weight is left."""
    cumulative = np.cumsum(weights)
    total = int(cumulative[-1])
    if total == 0:
        return 0
    return int(np.searchsorted(cumulative, multiply_shift_floor(random, total), side="right"))
