"""EngineCore on a real, tiny model: what one step does, and what it does not do to the neighbours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.grammar import GrammarError
from server.engine.plan import NOT_FINITE
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.scheduler import AdmissionError
from tests.server.engine.cores import make_core, random_params, run_all, tiny_model, tokens_of

POISON = 13
RAISED = {"raise": RuntimeError("planted"), "grammar": GrammarError("the grammar has become too complex")}
SAID = {
    "raise": "the forward pass raised RuntimeError",
    "grammar": "the grammar has become too complex",
    "nan": NOT_FINITE,
}


def requests(count: int, seed: int = 0, max_new_tokens: int = 12) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            request_id=i,
            prompt_token_ids=[rng.randrange(20, 199) for _ in range(rng.randint(1, 60))],
            params=random_params(rng, max_new_tokens, 199),
            arrival=i,
        )
        for i in range(count)
    ]


@contextmanager
def poisoned(core: Any, poison: str) -> Iterator[None]:
    """While inside, a forward pass that sees the token POISON raises, or makes that token's row NaN."""
    runner = core._runner
    whole = {name: getattr(runner, name) for name in ("_forward", "_decode")}

    def poisoned_part(name: str, token_ids: Tensor, plan: Any) -> Tensor:
        rows: Tensor = whole[name](token_ids, plan)
        if poison in RAISED and (token_ids == POISON).any():
            raise RAISED[poison]
        bad = torch.where(token_ids == POISON, torch.nan, 0.0)[:, None]
        return rows + bad.to(rows.dtype)

    for name in whole:
        setattr(runner, name, partial(poisoned_part, name))
    try:
        yield
    finally:
        for name, part in whole.items():
            setattr(runner, name, part)


def alone(request: Request) -> list[int]:
    core = make_core(tiny_model())
    fresh = Request(0, list(request.prompt_token_ids), request.params)
    return tokens_of(run_all(core, [fresh])[0])


@pytest.mark.parametrize("poison", SAID)
def test_a_poisonous_request_ends_with_error_and_harms_nobody(poison: str) -> None:
    core = make_core(tiny_model())
    batch = requests(7)
    batch[3].prompt_token_ids[-1] = POISON
    with poisoned(core, poison):
        outputs = run_all(core, batch)
    for request in batch:
        last = outputs[request.request_id][-1]
        if request.request_id == 3:
            assert (last.finish_reason, last.error) == (FinishReason.ERROR, SAID[poison])
            assert tokens_of(outputs[3]) == []
        else:
            assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert tokens_of(outputs[request.request_id]) == alone(request)
    assert core.scheduler.pool.num_used == 0


def test_poison_in_decode_ends_that_request_alone() -> None:
    core = make_core(tiny_model())
    batch = requests(3, seed=2)
    for request in batch:
        core.add(request)
    while not all(request.output_token_ids for request in batch):
        core.step()
    batch[1].output_token_ids[-1] = POISON  # what the next step computes
    with poisoned(core, "nan"):
        outcomes = core.step()
    told = {output.request.request_id: output for outcome in outcomes for output in outcome.outputs}
    assert (told[1].finish_reason, told[1].error) == (FinishReason.ERROR, NOT_FINITE)
    assert [told[i].error for i in (0, 2)] == [None, None]


def test_what_a_poisonous_request_computed_is_not_found_again() -> None:
    core = make_core(tiny_model())
    prompt = [*range(20, 90), POISON]
    with poisoned(core, "nan"):
        run_all(core, [Request(1, list(prompt), SamplingParams(4, temperature=0.0))])
    after = Request(2, list(prompt), SamplingParams(4, temperature=0.0))
    outputs = run_all(core, [after])
    assert after.num_cached_tokens == 0
    assert tokens_of(outputs[2]) == alone(after)


def test_the_end_of_a_request_is_told_once_with_its_reason() -> None:
    core = make_core(tiny_model())
    for outputs in run_all(core, requests(12, seed=5)).values():
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_an_aborted_request_says_nothing_more_and_frees_its_blocks() -> None:
    core = make_core(tiny_model(), prefix_caching=False)
    core.add(Request(1, [30] * 40, SamplingParams(50, temperature=0.0, ignore_eos=True)))
    core.step()
    used = core.scheduler.pool.num_used
    core.abort([1, 99])
    assert used == 3
    assert core.scheduler.pool.num_used == 0
    assert not core.has_work
    assert core.step() == []


def test_min_new_tokens_forbids_what_would_end_the_choice() -> None:
    core = make_core(tiny_model())
    end = (2, 50, 51, 52)
    bias = tuple((token, 50.0) for token in end)  # without the minimum, one of these would be drawn at once
    params = SamplingParams(20, min_new_tokens=6, stop_token_ids=end[1:], logit_bias=bias)
    outputs = run_all(core, [Request(1, [30, 31], params)])[1]
    tokens = tokens_of(outputs)
    assert len(tokens) == 7
    assert not set(tokens[:6]) & set(end)
    assert outputs[-1].stop_token_id == tokens[-1]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    core = make_core(tiny_model(), num_blocks=4, max_model_len=100)
    with pytest.raises(AdmissionError, match=r"100"):
        core.add(Request(1, [30] * 100, SamplingParams(1)))
    assert not core.has_work


def test_timelines_tell_queue_and_prefill_apart() -> None:
    core = make_core(tiny_model(), max_running=1)
    first, second = requests(2, seed=3)
    core.add(first)
    core.add(second)
    seen: dict[int, Any] = {}
    while core.has_work:
        for outcome in core.step():
            seen |= outcome.first_tokens
    assert sorted(seen) == [0, 1]
    assert seen[0].added <= seen[0].scheduled <= seen[0].first_token <= seen[1].scheduled < seen[1].first_token
