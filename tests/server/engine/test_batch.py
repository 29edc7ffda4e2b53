"""From a plan to tensors: the layout, and what the sampler is told."""

from __future__ import annotations

import math

import torch

from server.engine.batch import SamplingBuilder, build_batch
from server.engine.plan import PlannedRequest, StepPlan
from server.engine.request import Request, SamplingParams


def test_requests_lie_back_to_back_and_only_the_last_token_samples() -> None:
    prompt = Request(1, [10, 11, 12, 13, 14], SamplingParams(4, seed=5))
    stream = Request(2, [20, 21], SamplingParams(4, temperature=0.0, top_k=3), output_token_ids=[22, 23], choice=1)
    plan = StepPlan(
        7,
        (
            PlannedRequest(stream, 3, 1, (4,), samples=True, output_index=2),
            PlannedRequest(prompt, 1, 3, (9, 2), samples=False, output_index=0),
            PlannedRequest(prompt, 4, 1, (9, 2, 5), samples=True, output_index=0),
        ),
    )
    batch = build_batch(plan, block_size=2, sampling=SamplingBuilder([2]))
    assert torch.equal(batch.token_ids, torch.tensor([23, 11, 12, 13, 14]))
    assert list(batch.attention.query_lens) == [1, 3, 1]
    assert list(batch.attention.seq_lens) == [4, 4, 5]
    assert list(batch.attention.block_tables) == [(4,), (9, 2), (9, 2, 5)]
    assert batch.last_tokens == [0, 3, 4]
    assert batch.sample_rows == [0, 4]
    assert batch.sampling is not None
    assert (batch.sampling.seeds, batch.sampling.positions, batch.sampling.choices) == ([0, 5], [2, 0], [1, 0])
    assert (batch.sampling.temperatures, batch.sampling.top_ks) == ([0.0, 1.0], [3, 0])


def test_a_step_without_samples_has_no_sampling() -> None:
    planned = PlannedRequest(Request(1, [3, 4], SamplingParams(1)), 0, 1, (0,), samples=False, output_index=0)
    assert build_batch(StepPlan(0, (planned,)), 16, SamplingBuilder([])).sampling is None


def test_penalties_see_prompt_and_output_up_to_the_drawn_token() -> None:
    params = SamplingParams(9, presence_penalty=0.5, min_new_tokens=3, stop_token_ids=(8, 2), logit_bias=((8, 1.5),))
    request = Request(1, [3, 4], params, output_token_ids=[5, 6, 7])
    recompute = PlannedRequest(request, 0, 4, (0,), samples=True, output_index=2)
    sampling = build_batch(StepPlan(0, (recompute,)), 16, SamplingBuilder([2])).sampling
    assert sampling is not None
    assert sampling.prompt_tokens == {0: [3, 4]}
    assert sampling.output_tokens == {0: [5, 6]}
    assert sampling.biases == [(0, 8, 1.5), (0, 2, -math.inf), (0, 8, -math.inf)]
