"""The second promise, on the embedded model as a CPU serves it: tokens depend on the request alone.

Two hundred requests with mixed parameters run alone; then among fifteen others; with the prompt in small, uneven
chunks; with forced preemptions; and once more against the warm prefix cache that those runs left behind.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest

from server.engine.core import EngineCore
from server.engine.request import Request
from tests.server.engine.cores import make_core, random_params, run_all, tales_model, tokens_of

NUM_REQUESTS = 200


def make_requests() -> list[Request]:
    """Fresh requests, the same every time. Half of the prompts start with one of four common prefixes."""
    rng = random.Random(2024)
    vocab_size = tales_model().config.vocab_size
    prefixes = [[rng.randrange(vocab_size) for _ in range(rng.randint(20, 70))] for _ in range(4)]
    requests = []
    for i in range(NUM_REQUESTS):
        prompt = list(rng.choice(prefixes)) if rng.random() < 0.5 else []
        prompt += [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
        requests.append(Request(i, prompt, random_params(rng, 20, vocab_size), arrival=i))
    return requests


@cache
def tokens_alone() -> dict[int, list[int]]:
    core = make_core(tales_model(), prefix_caching=False)
    return {request.request_id: tokens_of(run_all(core, [request])[request.request_id]) for request in make_requests()}


def batched(core: EngineCore, between_steps: Callable[[EngineCore], None] = lambda core: None) -> dict[int, list[int]]:
    outputs = run_all(core, make_requests(), lambda: between_steps(core))
    return {request_id: tokens_of(parts) for request_id, parts in outputs.items()}


def test_alone_equals_among_fifteen_others() -> None:
    assert batched(make_core(tales_model(), max_running=16, prefix_caching=False)) == tokens_alone()


@pytest.mark.parametrize("chunk", [17, 37])
def test_whole_prompts_equal_prompts_in_chunks(chunk: int) -> None:
    core = make_core(
        tales_model(), max_running=16, max_tokens_per_step=chunk, mixed_step_tokens=7, prefix_caching=False
    )
    assert batched(core) == tokens_alone()


def test_undisturbed_equals_preempted() -> None:
    rng = random.Random(7)
    preemptions = 0

    def preempt_some(core: EngineCore) -> None:
        nonlocal preemptions
        running = [request.request_id for request in core.scheduler.requests if request.block_ids]
        if running and rng.random() < 0.3:
            preemptions += core.scheduler.preempt(rng.choice(running))

    core = make_core(tales_model(), max_running=16, num_blocks=80, max_model_len=256)
    assert batched(core, preempt_some) == tokens_alone()
    assert preemptions > 20


def test_cold_equals_warm_prefix_cache() -> None:
    core = make_core(tales_model(), max_running=16, num_blocks=2048)
    assert batched(core) == tokens_alone()
    warm = make_requests()
    outputs = run_all(core, warm)
    assert {request_id: tokens_of(parts) for request_id, parts in outputs.items()} == tokens_alone()
    assert sum(request.num_cached_tokens or 0 for request in warm) > 5000


def test_taken_up_again_after_a_crash() -> None:
    """A restarted engine gets prompt and delivered tokens, and goes on to the same end."""
    rng = random.Random(3)
    resumed = []
    for request in make_requests()[:60]:
        tokens = tokens_alone()[request.request_id]
        if len(tokens) > 1:
            request.output_token_ids = tokens[: rng.randrange(1, len(tokens))]
            resumed.append((request, list(request.output_token_ids)))
    core = make_core(tales_model(), max_running=16)
    outputs = run_all(core, [request for request, _ in resumed])
    for request, delivered in resumed:
        assert delivered + tokens_of(outputs[request.request_id]) == tokens_alone()[request.request_id]
