"""From the plan of a step to what the model and the sampler take: host integers in, host values and one tensor out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, SamplingMetadata
from server.engine.plan import PlannedRequest, StepPlan
from server.engine.request import Request


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input. T tokens of all planned requests back to back, R of them to sample from.

    token_ids    int64 [T]
    attention    where each token stands and where its K and V lie
    last_tokens  for each planned request, the index in T of its last token
    sample_rows  the indices in T whose logits are needed, one for each planned request that samples, in plan order
    sampling     how to draw from those rows; None when no request samples
    inflight     (index in T, request id) of the tokens that are not known yet and are 0 in token_ids: the last token of
                 a planned request, which a step in flight draws
    """

    token_ids: Tensor
    attention: AttentionMetadata
    last_tokens: list[int]
    sample_rows: list[int]
    sampling: SamplingMetadata | None
    inflight: list[tuple[int, int]]


def build_batch(plan: StepPlan, block_size: int, sampling: SamplingBuilder) -> Batch:
    """Lay the planned requests out back to back, in plan order."""
    token_ids: list[int] = []
    query_lens: list[int] = []
    seq_lens: list[int] = []
    block_tables: list[Sequence[int]] = []
    last_tokens: list[int] = []
    sample_rows: list[int] = []
    inflight: list[tuple[int, int]] = []
    for planned in plan.requests:
        stop = planned.start + planned.num_new_tokens
        token_ids += planned.request.token_ids(planned.start, stop - planned.num_inflight)
        if planned.num_inflight:
            inflight.append((len(token_ids), planned.request.request_id))
            token_ids.append(0)
        query_lens.append(planned.num_new_tokens)
        seq_lens.append(stop)
        block_tables.append(planned.block_ids)
        last_tokens.append(len(token_ids) - 1)
        if planned.samples:
            sample_rows.append(len(token_ids) - 1)
    sampled = [planned for planned in plan.requests if planned.samples]
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        attention=AttentionMetadata(query_lens, seq_lens, block_tables, block_size),
        last_tokens=last_tokens,
        sample_rows=sample_rows,
        sampling=sampling.build(sampled) if sampled else None,
        inflight=inflight,
    )


def build_sampling(sampled: Sequence[PlannedRequest], eos_token_ids: Sequence[int]) -> SamplingMetadata:
    """How to draw one token for each of these planned requests, in this order."""
    params = [planned.request.params for planned in sampled]
    biases: list[tuple[int, int, float]] = []
    allowed: dict[int, Sequence[int]] = {}
    masks: dict[int, npt.NDArray[np.uint32]] = {}
    prompt_tokens: dict[int, Sequence[int]] = {}
    output_tokens: dict[int, Sequence[int]] = {}
    for row, planned in enumerate(sampled):
        request = planned.request
        biases += [(row, token_id, bias) for token_id, bias in request.params.logit_bias]
        forbidden: list[int] = []
        if planned.output_index < request.params.min_new_tokens:
            # Before the minimum, no token that would end the choice may be drawn.
            forbidden += dict.fromkeys((*eos_token_ids, *request.params.stop_token_ids))
        if request.params.bad_words:
            forbidden += sorted(request.params.banned_after(request.output_token_ids[: planned.output_index]))
        if request.params.allowed_token_ids:
            allowed[row] = request.params.allowed_token_ids
            if not set(allowed[row]).difference(forbidden):
                forbidden = []
        if request.matcher is not None:
            masks[row] = request.matcher.mask(request.output_token_ids[: planned.output_index])
            if forbidden and not _leaves_any(masks[row], forbidden):
                forbidden = []
        biases += [(row, token_id, -math.inf) for token_id in forbidden]
        if request.params.has_penalties:
            prompt_tokens[row] = request.prompt_token_ids
            output_tokens[row] = request.output_token_ids[: planned.output_index]
    return SamplingMetadata(
        seeds=[p.seed for p in params],
        positions=[planned.output_index for planned in sampled],
        choices=[planned.request.choice for planned in sampled],
        temperatures=[p.temperature for p in params],
        top_ks=[p.top_k for p in params],
        top_ps=[p.top_p for p in params],
        min_ps=[p.min_p for p in params],
        typical_ps=[p.typical_p for p in params],
        repetition_penalties=[p.repetition_penalty for p in params],
        presence_penalties=[p.presence_penalty for p in params],
        frequency_penalties=[p.frequency_penalty for p in params],
        biases=biases,
        allowed=allowed,
        masks=masks,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def _leaves_any(mask: npt.NDArray[np.uint32], forbidden: Sequence[int]) -> bool:
    left = mask.copy()
    for token_id in forbidden:
        left[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    return bool(left.any())


class SamplingBuilder:
    """`build_sampling` for one decode step after the other.

    From one step to the next the same requests decode, and of what they ask only the positions change, unless tokens so
    far matter to one of them. Then most of the arrays are those of the step before.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._requests: list[Request] = []
        self._last: SamplingMetadata | None = None  # None: made anew every time

    def build(self, sampled: Sequence[PlannedRequest]) -> SamplingMetadata:
        """Equal to build_sampling(sampled, eos_token_ids)."""
        requests = [planned.request for planned in sampled]
        # Requests compare by identity, and what they ask for never changes.
        if self._last is not None and requests == self._requests:
            return replace(self._last, positions=[planned.output_index for planned in sampled])
        metadata = build_sampling(sampled, self._eos_token_ids)
        self._requests = requests
        changes = any(
            r.params.has_penalties or r.params.min_new_tokens > 0 or r.params.needs_last_token for r in requests
        )
        self._last = None if changes else metadata
        return metadata
