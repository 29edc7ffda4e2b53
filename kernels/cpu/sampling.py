"""The rule of `kernels.sampling` in C++ (csrc/sampling.h): the same tokens, each row by whichever thread is free.

What few requests ask for stays in NumPy: biases, allowed ids, masks and penalties are applied before; rows with
typical-p are left to `kernels.sampling`, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.native import SAMPLE, WEIGHTS, Team, command, library
from kernels.ops import SampleResult, SamplingMetadata
from kernels.portable.workspace import Workspace
from kernels.sampling import (
    WEIGHT_BITS,
    Float32Array,
    Int64Array,
    adjust_logits,
    biases_by_row,
    check_sampling,
    draw,
    kept_weights,
)

_CANDIDATE_BYTES = 24


def sample(
    team: Team, logits: Tensor, metadata: SamplingMetadata, workspace: Workspace, fallbacks: Counter[str]
) -> SampleResult:
    """logits float32 [R, V] -> one token a row. Raises ValueError as `check_sampling` does."""
    rows, vocab = logits.shape
    check_sampling(metadata, rows, vocab)
    m = metadata
    # One array for what is wide: an address that is asked of NumPy costs two microseconds.
    wide = np.empty((4, rows), dtype=np.int64)
    top_ps, min_weights, random, tokens = wide
    random[:] = random_31_bits(m.seeds, m.positions, m.choices)
    adjusted = np.zeros(rows, dtype=np.uint8)
    touched = {*m.allowed, *m.masks, *m.prompt_tokens, *m.output_tokens, *(row for row, _, _ in m.biases)}
    values = logits
    if touched:
        values = workspace.take("adjusted", (rows, vocab), torch.float32).copy_(logits)
        raw, biases = values.numpy(), biases_by_row(m)
        for row in touched:
            if np.isfinite(raw[row]).all():
                raw[row] = adjust_logits(raw[row], m, row, biases.get(row, ()))
                adjusted[row] = 1
    temperatures = np.asarray(m.temperatures, dtype=np.float32)
    top_ks = np.minimum(np.asarray(m.top_ks, dtype=np.int64), vocab).astype(np.int32)
    top_ps[:] = np.rint(np.asarray(m.top_ps, dtype=np.float64) * (1 << 31))
    min_weights[:] = np.ceil(np.asarray(m.min_ps, dtype=np.float64) * (1 << WEIGHT_BITS))
    finite = np.empty(rows, dtype=np.uint8)
    scratch = workspace.take("candidates", (team.num_threads * vocab * _CANDIDATE_BYTES,), torch.uint8)
    first = wide.ctypes.data
    top_ps_at, min_weights_at, random_at, tokens_at = range(first, first + wide.nbytes, rows * 8)
    pointers = (
        values,
        temperatures.ctypes.data,
        top_ks.ctypes.data,
        top_ps_at,
        min_weights_at,
        random_at,
        adjusted.ctypes.data,
        tokens_at,
        finite.ctypes.data,
        scratch,
    )
    team.run(command(SAMPLE, rows, pointers, (vocab, values.stride(0))), 1, None)
    for row, typical_p in enumerate(m.typical_ps):
        if typical_p < 1.0 and finite[row]:
            fallbacks["sample"] += 1
            kept = kept_weights(logits[row].numpy(), m, row, partial(token_weights, team))
            tokens[row] = draw(kept, int(random[row]))
    token_ids = torch.from_numpy(tokens)
    return SampleResult(token_ids, torch.from_numpy(finite.astype(bool)))


def random_31_bits(seeds: Sequence[int], positions: Sequence[int], choices: Sequence[int]) -> Int64Array:
    """`kernels.philox.random_31_bits` in C++, a tenth of its time."""
    rows = len(seeds)
    parts = np.array((seeds, positions, choices), dtype=np.uint64)
    random = np.empty(rows, dtype=np.int64)
    first = parts.ctypes.data
    library().stet_random_31_bits(first, first + 8 * rows, first + 16 * rows, rows, random.ctypes.data)
    return random


def token_weights(team: Team, scaled: Float32Array, maximum: np.float32) -> Int64Array:
    """`Ops.token_weights`: what csrc/sampling.h computes. Its exp differs from NumPy's by a unit here and there."""
    values = np.ascontiguousarray(scaled, dtype=np.float32)
    maxima = np.asarray([maximum], dtype=np.float32)
    weights = np.empty(len(values), dtype=np.int64)
    pointers = (values.ctypes.data, maxima.ctypes.data, weights.ctypes.data)
    team.run(command(WEIGHTS, 1, pointers, (len(values),)), 1, None)
    return weights
