"""Every pair of parameters at their extremes, in one batch beside a plain request whose tokens must not change."""

from __future__ import annotations

import json
from itertools import combinations, product
from typing import Any

import pytest

from models.loader import resolve_model
from server.engine.core import EngineCore
from server.engine.grammar import Grammars
from server.engine.request import FinishReason, Request, SamplingParams
from server.text.grammar import compile_grammar
from tests.server.engine.cores import make_core, run_all, tales_model, tokens_of

PLAIN = SamplingParams(6, temperature=1.0, top_p=0.95, seed=77)
PROMPT = [40, 41, 42, 300, 7, 99, 1000, 64, 65, 66, 67, 200, 201, 202, 203, 204, 205, 9]
TOKENS = 3
VOCAB = tales_model().config.vocab_size
DIGITS = compile_grammar("regex", "[0-9]{0,3}")

# parameter -> its values at the ends of its range, and beyond the usual.
EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1e-37, 2.0),
    "top_k": (1, VOCAB),
    "top_p": (1e-9,),
    "min_p": (1.0,),
    "typical_p": (1e-9,),
    "repetition_penalty": (2.0**-126, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (2**63 - 1,),
    "logit_bias": (tuple((i, -100.0) for i in range(VOCAB)), ((5, 100.0),)),
    "min_new_tokens": (TOKENS,),
    "stop_token_ids": (tuple(range(64)),),
    "ignore_eos": (True,),
    "allowed_token_ids": ((0,), (VOCAB - 1,)),
    "bad_words": (tuple((i, i + 1) for i in range(64)), ((VOCAB - 1,),)),
    "num_logprobs": (20,),
    "num_prompt_logprobs": (20,),
    "explain": (20,),
    "grammar": (DIGITS,),
}
# What a request cannot ask for at once (server/preparation.py).
APART = {"grammar": {"allowed_token_ids", "stop_token_ids", "ignore_eos"}}


def core() -> EngineCore:
    made = make_core(tales_model(), max_running=64, max_tokens_per_step=1024, num_blocks=512)
    config = tales_model().config
    tokenizer = (resolve_model("stet-tales") / "tokenizer.json").read_text()
    made.grammars = Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
    return made


def pairs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for (a, values_a), (b, values_b) in combinations(EXTREMES.items(), 2):
        if b not in APART.get(a, ()) and a not in APART.get(b, ()):
            found += [{a: x, b: y} for x, y in product(values_a, values_b)]
    return found


@pytest.fixture(scope="module")
def alone() -> list[int]:
    return tokens_of(run_all(core(), [Request(0, PROMPT, PLAIN)])[0])


def test_no_pair_of_parameters_harms_a_neighbour(alone: list[int]) -> None:
    engine, everyone = core(), pairs()
    assert len(everyone) > 360
    for start in range(0, len(everyone), 40):
        poison = everyone[start : start + 40]
        requests = [
            Request(1 + start + i, PROMPT[: 3 + i % 7], SamplingParams(TOKENS, **fields), choice=0)
            for i, fields in enumerate(poison)
        ]
        outputs = run_all(engine, [*requests[:20], Request(0, PROMPT, PLAIN), *requests[20:]])
        assert tokens_of(outputs[0]) == alone, json.dumps([sorted(fields) for fields in poison])
        # They themselves come to a good end: nothing within its range is an error.
        for request, fields in zip(requests, poison, strict=True):
            last = outputs[request.request_id][-1]
            assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), (sorted(fields), last.error)
            assert 1 <= len(tokens_of(outputs[request.request_id])) <= TOKENS
