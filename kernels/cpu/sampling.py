"""The rule of `kernels.sampling` in C++ (csrc/sampling.h): the same tokens, each row by whichever thread is free.

What few requests ask for stays in NumPy: biases, allowed ids, masks and penalties are applied before; rows with
typical-p are left to `kernels.sampling`, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.cpu.native import SAMPLE, WEIGHTS, Command, Team, command, library
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

UInt8Array = npt.NDArray[np.uint8]

_CANDIDATE_BYTES = 24


@dataclass(frozen=True, slots=True)
class _Call:
    """What the parameters of R rows come to. The command names the memory of the arrays, and of `kept`.

    touched: rows whose logits are changed before. typical: rows with typical-p.
    """

    metadata: SamplingMetadata
    vocab: int
    touched: frozenset[int]
    typical: tuple[int, ...]
    random: Int64Array
    tokens: Int64Array
    adjusted: UInt8Array
    finite: UInt8Array
    command: Command
    kept: tuple[object, ...]

    def serves(self, metadata: SamplingMetadata, vocab: int) -> bool:
        """Whether only the positions differ. What is the same object holds the same: nobody changes it."""
        own = self.metadata
        return self.vocab == vocab and all(getattr(own, name) is getattr(metadata, name) for name in _PARAMETERS)


_PARAMETERS = tuple(field.name for field in fields(SamplingMetadata) if field.name != "positions")


class Sampler:
    """Draws for one team. In decode the same requests draw step after step and only their positions change: what their
    parameters came to in the call before is kept."""

    def __init__(self, team: Team, fallbacks: Counter[str]) -> None:
        """fallbacks: counts rows with typical-p."""
        self._team = team
        self._fallbacks = fallbacks
        self._workspace = Workspace()
        self._last: _Call | None = None

    def __call__(self, logits: Tensor, metadata: SamplingMetadata) -> SampleResult:
        """logits float32 [R, V] -> one token a row. Raises ValueError as `check_sampling` does."""
        rows, vocab = logits.shape
        call = self._last
        if call is None or not call.serves(metadata, vocab) or len(metadata.positions) != rows:
            check_sampling(metadata, rows, vocab)
            call = self._prepare(metadata, rows, vocab)
            self._last = None if call.touched or call.typical else call
        elif not 0 <= min(metadata.positions) <= max(metadata.positions) < 1 << 32:
            check_sampling(metadata, rows, vocab)  # says which
        call.random[:] = random_31_bits(metadata.seeds, metadata.positions, metadata.choices)
        values = self._adjusted(logits, call) if call.touched else logits
        call.command.p[0], call.command.n[1] = values.data_ptr(), values.stride(0)
        self._team.run(call.command, 1, None)
        for row in call.typical:
            if call.finite[row]:
                self._fallbacks["sample"] += 1
                kept = kept_weights(logits[row].numpy(), metadata, row, partial(token_weights, self._team))
                call.tokens[row] = draw(kept, int(call.random[row]))
        return SampleResult(torch.from_numpy(call.tokens.copy()), torch.from_numpy(call.finite.astype(bool)))

    def _prepare(self, m: SamplingMetadata, rows: int, vocab: int) -> _Call:
        # One array for what is wide: an address that is asked of NumPy costs two microseconds.
        wide = np.empty((4, rows), dtype=np.int64)
        top_ps, min_weights, random, tokens = wide
        top_ps[:] = np.rint(np.asarray(m.top_ps, dtype=np.float64) * (1 << 31))
        min_weights[:] = np.ceil(np.asarray(m.min_ps, dtype=np.float64) * (1 << WEIGHT_BITS))
        temperatures = np.array(m.temperatures, dtype=np.float32)
        top_ks = np.minimum(np.asarray(m.top_ks, dtype=np.int64), vocab).astype(np.int32)
        adjusted, finite = np.zeros((2, rows), dtype=np.uint8)
        scratch = self._workspace.take("candidates", (self._team.num_threads * vocab * _CANDIDATE_BYTES,), torch.uint8)
        first = wide.ctypes.data
        top_ps_at, min_weights_at, random_at, tokens_at = range(first, first + wide.nbytes, rows * 8)
        pointers = (
            None,  # the logits
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
        touched = {*m.allowed, *m.masks, *m.prompt_tokens, *m.output_tokens, *(row for row, _, _ in m.biases)}
        return _Call(
            metadata=m,
            vocab=vocab,
            touched=frozenset(touched),
            typical=tuple(row for row, typical_p in enumerate(m.typical_ps) if typical_p < 1.0),
            random=random,
            tokens=tokens,
            adjusted=adjusted,
            finite=finite,
            command=command(SAMPLE, rows, pointers, (vocab,)),
            kept=(wide, temperatures, top_ks, scratch),
        )

    def _adjusted(self, logits: Tensor, call: _Call) -> Tensor:
        """A copy of the logits, with biases, masks and penalties applied to the rows that have them and are finite."""
        m = call.metadata
        values = self._workspace.take("adjusted", tuple(logits.shape), torch.float32).copy_(logits)
        raw, biases = values.numpy(), biases_by_row(m)
        for row in call.touched:
            if np.isfinite(raw[row]).all():
                raw[row] = adjust_logits(raw[row], m, row, biases.get(row, ()))
                call.adjusted[row] = 1
        return values


def random_31_bits(seeds: Sequence[int], positions: Sequence[int], choices: Sequence[int]) -> Int64Array:
    """`kernels.philox.random_31_bits` in C++, a tenth of its time."""
    parts = np.array((seeds, positions, choices), dtype=np.uint64)
    rows, first = len(seeds), parts.ctypes.data
    random = np.empty(rows, dtype=np.int64)
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
