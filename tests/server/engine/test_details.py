"""Log-probabilities, explanations, allowed ids and bad words: what a request asks for beside or of its tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest

from kernels.philox import random_31_bits
from server.engine.plan import RequestOutput
from server.engine.request import Request, SamplingParams
from server.engine.scores import Explanation, TokenScore, unpack_scores
from tests.server.engine.cores import make_core, run_all, tiny_model, tokens_of

PROMPT = [5, 9, 17, 33, 60, 7, 11, 90, 150, 44, 8, 21, 100, 3, 77, 12, 6, 5, 198, 31]
DRAWN = SamplingParams(12, temperature=1.3, top_k=30, seed=11, ignore_eos=True, repetition_penalty=1.2, num_logprobs=3)


def scores_of(outputs: list[RequestOutput], count: int) -> list[TokenScore]:
    return [s for o in outputs if o.details is not None for s in unpack_scores(o.details.scores, count)]


def prompt_scores_of(outputs: list[RequestOutput], length: int, count: int) -> list[TokenScore | None]:
    found: list[TokenScore | None] = [None] * length
    for output in outputs:
        if output.details is not None and output.details.prompt_scores:
            scores = unpack_scores(output.details.prompt_scores, count)
            start = output.details.prompt_start
            assert not any(found[start : start + len(scores)]), "a position was reported twice"
            found[start : start + len(scores)] = scores
    return found


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_step": 7, "max_running": 4}, {"prefix_caching": False}])
def test_output_and_prompt_logprobs_are_the_same_distribution(settings: dict[str, int]) -> None:
    """What a stream says of its tokens, a prompt that holds them says too, to the bit: raw, however it was drawn."""
    core = make_core(tiny_model(), **settings)
    outputs = run_all(core, [Request(1, PROMPT, DRAWN), Request(2, PROMPT[:9], replace(DRAWN, num_logprobs=None))])
    drawn = tokens_of(outputs[1])
    assert len(scores_of(outputs[1], 3)) == len(drawn) == 12
    assert not any(output.details for output in outputs[2])

    whole = PROMPT + drawn
    asked = SamplingParams(1, temperature=0.0, num_prompt_logprobs=3)
    again = run_all(core, [Request(3, whole, asked), Request(4, whole, asked, choice=1), Request(5, PROMPT, DRAWN)])
    prompt = prompt_scores_of(again[3], len(whole), 3)
    assert prompt[0] is None
    assert all(prompt[1:])
    assert prompt[len(PROMPT) :] == scores_of(outputs[1], 3)
    assert not any(output.details for output in again[4]), "the prompt is reported once"
    assert scores_of(again[5], 3) == scores_of(outputs[1], 3)
    for score in scores_of(outputs[1], 3):
        assert score.top_logprobs == tuple(sorted(score.top_logprobs, reverse=True))
        assert sum(np.exp(score.top_logprobs)) <= 1.0 + 1e-6
        assert score.logprob <= score.top_logprobs[0]


def test_prompt_logprobs_survive_preemption_and_resumption() -> None:
    asked = SamplingParams(6, temperature=0.0, num_prompt_logprobs=2, num_logprobs=0, ignore_eos=True)
    whole = make_core(tiny_model())
    expected = run_all(whole, [Request(1, PROMPT, asked)])[1]
    core = make_core(tiny_model(), max_tokens_per_step=6, max_running=2)
    request = Request(1, PROMPT, asked)
    steps = count()
    outputs = run_all(core, [request], between_steps=lambda: next(steps) in (1, 3, 9) and core.scheduler.preempt(1))[1]
    assert request.num_preemptions == 3
    assert prompt_scores_of(outputs, len(PROMPT), 2) == prompt_scores_of(expected, len(PROMPT), 2)
    assert scores_of(outputs, 0) == scores_of(expected, 0)
    # Taken up after a crash: the prompt was reported before the first token.
    resumed = run_all(core, [Request(2, PROMPT, asked, output_token_ids=tokens_of(expected)[:3])])[2]
    assert prompt_scores_of(resumed, len(PROMPT), 2) == [None] * len(PROMPT)
    assert scores_of(resumed, 0) == scores_of(expected, 0)[3:]


def check(explanation: Explanation, params: SamplingParams, position: int, choice: int = 0) -> None:
    """The choice from the explanation alone, in integers."""
    assert explanation.position == position
    assert explanation.random == int(random_31_bits([params.seed], [position], [choice])[0])
    target = explanation.random * explanation.total >> 31
    chosen = [c for c in explanation.candidates if c.start <= target < c.end]
    assert [c.token_id for c in chosen] == [explanation.token_id]
    for candidate in explanation.candidates:
        assert (candidate.removed_by is None) == (candidate.end > candidate.start)
        assert candidate.final_probability == (candidate.end - candidate.start) / explanation.total
    kept = sorted((c for c in explanation.candidates if c.removed_by is None), key=lambda c: c.token_id)
    assert all(before.end <= after.start for before, after in pairwise(kept))


def test_explanations_tell_what_each_filter_removed() -> None:
    params = SamplingParams(
        10,
        temperature=1.1,
        top_k=8,
        top_p=0.9,
        seed=3,
        min_new_tokens=10,
        explain=20,
        allowed_token_ids=tuple(range(150)),
    )
    outputs = run_all(make_core(tiny_model()), [Request(1, PROMPT, params)])[1]
    explanations = [e for output in outputs if output.details for e in output.details.explanations]
    assert [e.token_id for e in explanations] == tokens_of(outputs)
    plain = run_all(make_core(tiny_model()), [Request(1, PROMPT, replace(params, explain=None))])[1]
    assert tokens_of(plain) == tokens_of(outputs)
    for position, explanation in enumerate(explanations):
        check(explanation, params, position)
        assert len(explanation.candidates) in (20, 21)
        kept = [c for c in explanation.candidates if c.removed_by is None]
        assert 1 <= len(kept) <= 8
        for candidate in explanation.candidates:
            assert (candidate.removed_by == "allowed_token_ids") == (candidate.token_id >= 150)
    reasons = {c.removed_by for e in explanations for c in e.candidates}
    assert reasons == {None, "allowed_token_ids", "min_new_tokens", "top_k", "top_p"}
    every = SamplingParams(1, seed=3, min_new_tokens=1, explain=199)
    (output,) = run_all(make_core(tiny_model()), [Request(1, PROMPT, every)])[1]
    assert output.details is not None
    (explanation,) = output.details.explanations
    assert {c.token_id: c.removed_by for c in explanation.candidates}[2] == "min_new_tokens"
    assert sum(c.end - c.start for c in explanation.candidates) == explanation.total
    greedy = SamplingParams(1, temperature=0.0, explain=2)
    (output,) = run_all(make_core(tiny_model()), [Request(1, PROMPT, greedy)])[1]
    assert output.details is not None
    assert [c.removed_by for c in output.details.explanations[0].candidates] == [None, "temperature"]


def test_allowed_ids_and_bad_words() -> None:
    allowed = SamplingParams(30, temperature=1.5, seed=1, allowed_token_ids=(4, 5, 6), ignore_eos=True)
    tokens = tokens_of(run_all(make_core(tiny_model()), [Request(1, PROMPT, allowed)])[1])
    assert set(tokens) == {4, 5, 6}
    pairs = {*pairwise(tokens)}
    word = next(pair for pair in pairwise(tokens) if pair[0] != pair[1])
    cleaned = replace(allowed, bad_words=(word, (5, 5, 5)))
    tokens = tokens_of(run_all(make_core(tiny_model()), [Request(1, PROMPT, cleaned)])[1])
    assert word in pairs
    assert word not in {*pairwise(tokens)}
    assert (5, 5, 5) not in {*zip(tokens, tokens[1:], tokens[2:], strict=False)}
    # A resumed stream knows what it has said.
    resumed = Request(2, PROMPT, cleaned, output_token_ids=tokens[:7])
    assert tokens_of(run_all(make_core(tiny_model()), [resumed])[2]) == tokens[7:]
    # Where nothing else is left, bad words yield.
    only = replace(allowed, allowed_token_ids=(4,), bad_words=((4, 4),))
    assert tokens_of(run_all(make_core(tiny_model()), [Request(1, PROMPT, only)])[1]) == [4] * 30


def test_what_depends_on_the_last_token_is_not_launched_before_it_is_known() -> None:
    core = make_core(tiny_model(), pipeline_depth=2)
    word = SamplingParams(5, bad_words=((4, 5),), ignore_eos=True)
    scheduler = core.scheduler
    scheduler.add(Request(1, PROMPT, word))
    scheduler.add(Request(2, PROMPT[:5], replace(word, bad_words=((4,),))))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert [p.request.request_id for p in first.requests] == [1, 2]
    assert [p.request.request_id for p in second.requests] == [2]
