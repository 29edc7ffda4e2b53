"""What some requests ask for beside tokens: log-probabilities of output and prompt, and why a token was drawn.

A step that has such requests does this work after its draw, for their rows alone. On a GPU it is queued with the step
and read when the step is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.ops import LogProbabilities, Ops, SamplingMetadata
from kernels.philox import random_31_bits
from kernels.sampling import Float32Array, filter_stages
from models.layers import DecoderModel
from server.engine.plan import PlannedRequest, StepPlan
from server.engine.scores import Candidate, Details, Explanation, TokenScore, pack_score

# A prompt's rows are turned into logits so many at a time: 64 rows of 152,000 float32 are 39 MB.
PROMPT_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A request of the plan (its place there) and its row among those sampled from."""

    place: int
    row: int


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A piece of a prompt: scores of positions first to first + len(scores) - 1."""

    place: int
    first: int
    pieces: list[LogProbabilities]


class StepDetails:
    """The details of one step, on their way. `read` once the step is over."""

    def __init__(self, plan: StepPlan, ops: Ops, sampling: SamplingMetadata | None) -> None:
        self._plan = plan
        self._ops = ops
        self._sampling = sampling
        self.scored: list[_Drawn] = []
        self.scores: LogProbabilities | None = None
        self.explained: list[_Drawn] = []
        self.logits: Tensor | None = None
        self.prompts: list[_Prompt] = []

    def read(self, token_ids: Sequence[int]) -> dict[int, Details]:
        """Details by place in the plan. token_ids: drawn, one a sampled row. The device has finished the step."""
        scores: dict[int, bytes] = {}
        if self.scores is not None:
            for index, drawn in enumerate(self.scored):
                count = self._plan.requests[drawn.place].request.params.num_logprobs or 0
                scores[drawn.place] = pack_score(_score(self.scores, index, count))
        explanations: dict[int, list[Explanation]] = {}
        if self.logits is not None:
            for logits, drawn in zip(self.logits.float().numpy(), self.explained, strict=True):
                explanations[drawn.place] = [self._explain(drawn, logits, token_ids[drawn.row])]
        prompts: dict[int, tuple[int, bytes]] = {}
        for prompt in self.prompts:
            count = self._plan.requests[prompt.place].request.params.num_prompt_logprobs or 0
            packed = [
                pack_score(_score(piece, index, count))
                for piece in prompt.pieces
                for index in range(piece.logprobs.shape[0])
            ]
            prompts[prompt.place] = (prompt.first, b"".join(packed))
        return {
            place: Details(scores.get(place, b""), explanations.get(place, []), *prompts.get(place, (0, b"")))
            for place in sorted({*scores, *explanations, *prompts})
        }

    def _explain(self, drawn: _Drawn, logits: Float32Array, token_id: int) -> Explanation:
        planned = self._plan.requests[drawn.place]
        request = planned.request
        params = request.params
        metadata = self._sampling
        if metadata is None or params.explain is None:
            raise ValueError("a row that nobody has asked to explain")
        if drawn.row in metadata.output_tokens:
            # Written before the last token was known, where steps overlap.
            output = {drawn.row: request.output_token_ids[: planned.output_index]}
            metadata = replace(metadata, output_tokens={**metadata.output_tokens, **output})
        shifted = logits.astype(np.float64) - np.float64(logits.max())
        with np.errstate(under="ignore"):
            exponentials = np.exp(shifted)
        raw = exponentials / exponentials.sum()
        best = np.lexsort((np.arange(len(logits)), -logits))[: params.explain]
        shown = best.tolist() if token_id in best else [*best.tolist(), token_id]
        removed: dict[int, str] = {}
        weights = np.zeros(len(logits), dtype=np.int64)
        for name, weights in filter_stages(logits, metadata, drawn.row, self._ops.token_weights):
            for candidate in shown:
                if not weights[candidate]:
                    removed.setdefault(
                        candidate, name if name != "allowed" else _forbidden_by(planned, metadata, drawn.row, candidate)
                    )
        ends = np.cumsum(weights)
        total = int(ends[-1])
        row = drawn.row
        random = random_31_bits([metadata.seeds[row]], [metadata.positions[row]], [metadata.choices[row]])
        candidates = [
            Candidate(
                token_id=candidate,
                probability=float(raw[candidate]),
                final_probability=int(weights[candidate]) / total if total else 0.0,
                removed_by=removed.get(candidate),
                start=int(ends[candidate] - weights[candidate]),
                end=int(ends[candidate]),
            )
            for candidate in shown
        ]
        return Explanation(token_id, planned.output_index, int(random[0]), total, candidates)


def _forbidden_by(planned: PlannedRequest, metadata: SamplingMetadata, row: int, token_id: int) -> str:
    """Which parameter has given a token the logit -inf, the first in the order in which they are looked at."""
    params = planned.request.params
    mask = metadata.masks.get(row)
    if mask is not None and not mask[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1):
        return "grammar"
    if params.allowed_token_ids and token_id not in params.allowed_token_ids:
        return "allowed_token_ids"
    if token_id in params.banned_after(planned.request.output_token_ids[: planned.output_index]):
        return "bad_words"
    return "min_new_tokens"


def _score(scores: LogProbabilities, index: int, count: int) -> TokenScore:
    return TokenScore(
        float(scores.logprobs[index]),
        tuple(scores.top_ids[index, :count].tolist()),
        tuple(scores.top_logprobs[index, :count].tolist()),
    )


def launch_details(
    plan: StepPlan,
    sampling: SamplingMetadata | None,
    *,
    model: DecoderModel,
    ops: Ops,
    hidden: Tensor | None,
    logits: Tensor | None,
    token_ids: Tensor | None,
) -> StepDetails | None:
    """Begin to find out what the plan's requests want to know; None if no one wants anything.

    hidden: [T, H] of the plan's positions, or None where no request computes more than one; logits [R, V] and drawn
    token_ids int64 [R] of the rows sampled from, None if there are none.
    """
    if not any(planned.request.params.wants_details for planned in plan.requests):
        return None
    details = StepDetails(plan, ops, sampling)
    row = position = 0
    for place, planned in enumerate(plan.requests):
        params = planned.request.params
        if hidden is not None and params.num_prompt_logprobs is not None and planned.request.choice == 0:
            prompt = _launch_prompt(planned, place, model, ops, hidden, position)
            if prompt is not None:
                details.prompts.append(prompt)
        position += planned.num_new_tokens
        if planned.samples:
            if params.num_logprobs is not None:
                details.scored.append(_Drawn(place, row))
            if params.explain is not None:
                details.explained.append(_Drawn(place, row))
            row += 1
    if logits is not None and token_ids is not None:
        if details.scored:
            rows = _on_device([drawn.row for drawn in details.scored], logits.device)
            count = max(plan.requests[drawn.place].request.params.num_logprobs or 0 for drawn in details.scored)
            found = ops.log_probabilities(logits.index_select(0, rows), token_ids.index_select(0, rows), count)
            details.scores = _to_host(found)
        if details.explained:
            rows = _on_device([drawn.row for drawn in details.explained], logits.device)
            details.logits = _copied(logits.index_select(0, rows))
    return details


def _launch_prompt(
    planned: PlannedRequest, place: int, model: DecoderModel, ops: Ops, hidden: Tensor, position: int
) -> _Prompt | None:
    """Scores of the prompt's tokens that the rows of this step predict, but for those that are known already.

    Row p predicts token p + 1. What was computed before, and is computed again, was reported then.
    """
    request = planned.request
    first = max(planned.start, request.computed_high_water)
    end = min(planned.start + planned.num_new_tokens, request.num_prompt_tokens - 1)
    if first >= end:
        return None
    pieces: list[LogProbabilities] = []
    count = request.params.num_prompt_logprobs or 0
    for start in range(first, end, PROMPT_ROWS):
        stop = min(start + PROMPT_ROWS, end)
        offset = position - planned.start
        logits = model.logits(hidden[offset + start : offset + stop])
        token_ids = _on_device(request.prompt_token_ids[start + 1 : stop + 1], logits.device)
        pieces.append(_to_host(ops.log_probabilities(logits, token_ids, count)))
    return _Prompt(place, first + 1, pieces)


def _to_host(found: LogProbabilities) -> LogProbabilities:
    return LogProbabilities(_copied(found.logprobs), _copied(found.top_ids), _copied(found.top_logprobs))


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64, without waiting for what the device has to do before: from page-locked memory."""
    on_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def _copied(tensor: Tensor) -> Tensor:
    """On the host: at once, or when the device has come to it."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
