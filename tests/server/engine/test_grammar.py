"""Streams with a grammar, in the engine: alone, among others, preempted, resumed, in flight."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from models.loader import resolve_model
from server.engine.admission import AdmissionError
from server.engine.core import EngineCore
from server.engine.grammar import Grammars
from server.engine.request import FinishReason, Request, SamplingParams
from server.text.grammar import compile_grammar
from server.text.tokenizer import ModelText
from tests.server.engine.cores import make_core, run_all, tales_model, tokens_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["fox", "owl"]},
    },
    "required": ["name", "legs", "kind"],
    "additionalProperties": False,
}
FOX = compile_grammar("json_schema", SCHEMA)
DATE = compile_grammar("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@cache
def text() -> ModelText:
    return ModelText.load(resolve_model("stet-tales"))


def core(**settings: Any) -> EngineCore:
    made = make_core(tales_model(), **settings)
    config = tales_model().config
    tokenizer = (resolve_model("stet-tales") / "tokenizer.json").read_text()
    made.grammars = Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
    return made


def prompt(words: str) -> list[int]:
    return text().encode(words)


def written(tokens: list[int]) -> str:
    return text().decode(tokens)


def test_what_stops_parses_and_what_is_cut_is_a_begin_of_it() -> None:
    requests = [
        Request(seed, prompt("Once upon a time"), SamplingParams(80, temperature=1.4, seed=seed, grammar=grammar))
        for seed, grammar in enumerate([FOX, DATE] * 8)
    ]
    outputs = run_all(core(), requests)
    reasons = set()
    for request in requests:
        parts = outputs[request.request_id]
        reason, words = parts[-1].finish_reason, written(tokens_of(parts))
        reasons.add(reason)
        if request.params.grammar == DATE:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", words, re.ASCII)
        elif reason is FinishReason.STOP:
            animal = json.loads(words)
            assert set(animal) == {"name", "legs", "kind"}
            assert (0 <= animal["legs"] <= 9, animal["kind"] in ("fox", "owl")) == (True, True)
    assert FinishReason.STOP in reasons
    whole = next(tokens_of(outputs[r.request_id]) for r in requests if r.params.grammar == DATE)
    cut = Request(0, prompt("Once upon a time"), replace(requests[1].params, seed=1, max_new_tokens=2))
    (*_, last) = run_all(core(), [cut])[0]
    assert last.finish_reason is FinishReason.LENGTH
    assert re.match(r"[0-9-]+\Z", written(cut.output_token_ids))
    assert len(whole) > 2


def test_tokens_are_the_same_alone_preempted_resumed_and_among_others() -> None:
    params = SamplingParams(60, temperature=1.2, seed=4, grammar=FOX, frequency_penalty=0.2)
    alone = tokens_of(run_all(core(), [Request(1, prompt("A fox"), params)])[1])
    busy = core(max_tokens_per_step=16, max_running=8)
    others = [Request(i, prompt("The owl " * i), SamplingParams(30, seed=i, ignore_eos=True)) for i in range(2, 5)]
    plain = {r.request_id: tokens_of(run_all(core(), [replace_id(r)])[r.request_id]) for r in others}
    steps = iter(range(10_000))
    outputs = run_all(
        busy,
        [Request(1, prompt("A fox"), params), *others],
        between_steps=lambda: next(steps) in (9, 17) and busy.scheduler.preempt(1),
    )
    assert tokens_of(outputs[1]) == alone
    assert {i: tokens_of(outputs[i]) for i in plain} == plain
    resumed = Request(9, prompt("A fox"), params, output_token_ids=alone[:7])
    assert tokens_of(run_all(core(), [resumed])[9]) == alone[7:]


def replace_id(request: Request) -> Request:
    return Request(request.request_id, request.prompt_token_ids, request.params)


def test_a_grammar_wins_over_what_would_leave_it_nothing() -> None:
    ends = SamplingParams(40, temperature=1.0, seed=1, grammar=DATE, min_new_tokens=40)
    parts = run_all(core(), [Request(1, prompt("x"), ends)])[1]
    assert parts[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert re.match(r"\d{4}-\d\d-\d\d", written(tokens_of(parts)), re.ASCII)
    only = compile_grammar("choice", ["fox"])
    banned = SamplingParams(9, temperature=0.0, grammar=only, bad_words=((text().encode("fox")[-1],),))
    assert written(tokens_of(run_all(core(), [Request(1, prompt("x"), banned)])[1])) == "fox"
    explained = SamplingParams(1, temperature=0.0, grammar=only, explain=5)
    (output,) = run_all(core(), [Request(1, prompt("x"), explained)])[1]
    assert output.details is not None
    assert "grammar" in {c.removed_by for c in output.details.explanations[0].candidates}


@pytest.mark.parametrize("name", ["<|user|>", "<|end|>"])
def test_a_text_that_is_the_name_of_a_special_token_is_written_as_text(name: str) -> None:
    """And not as that token, which no reader sees; as `<[id]>` a grammar may have it."""
    for grammar, whole in (
        (compile_grammar("choice", [name]), name),
        (compile_grammar("json_schema", {"const": name}), f'"{name}"'),
    ):
        parts = run_all(core(), [Request(1, prompt("x"), SamplingParams(20, temperature=0.0, grammar=grammar))])[1]
        assert (written(tokens_of(parts)), parts[-1].finish_reason) == (whole, FinishReason.STOP)
    numbered = SamplingParams(1, temperature=0.0, grammar=compile_grammar("grammar", "start: <[4]>"))
    assert tokens_of(run_all(core(), [Request(1, prompt("x"), numbered)])[1]) == [4]
    with pytest.raises(AdmissionError, match="by its id"):
        core().add(Request(1, [5], SamplingParams(3, grammar=f"start: {name}")))


def test_grammars_that_cannot_be_used_are_refused() -> None:
    for grammar in ("nonsense", compile_grammar("regex", "a"), ""):
        without = make_core(tales_model())
        params = SamplingParams(3, grammar=grammar)
        if grammar:
            with pytest.raises(AdmissionError):
                without.add(Request(1, [5], params))
    with pytest.raises(AdmissionError, match="the grammar cannot be used"):
        core().add(Request(1, [5], SamplingParams(3, grammar="nonsense")))
    # What was said before does not fit: it cannot be taken up.
    with pytest.raises(AdmissionError, match="does not match"):
        core().add(Request(1, [5], SamplingParams(30, grammar=DATE), output_token_ids=prompt("fox")))
