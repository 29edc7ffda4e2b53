"""Grammars: which tokens may come next so that the whole output matches. By llguidance, in the engine's process.

What crosses the boundary is the specification, as llguidance writes it (`SamplingParams.grammar`); the HTTP process has
found it sound (server/text/grammar.py). Where a stream stands in its grammar follows from its output tokens alone, so
preemption, a failed step or a new engine change nothing.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from server.engine.grammar_limits import NO_SPECIAL_NAMES, grammar_limits

MAX_CACHED = 64


class GrammarError(Exception):
    """The grammar cannot be used, or has become too complex on the way: one line for the log."""


class Matcher:
    """One stream's way through its grammar. Owns how far it has come."""

    def __init__(self, fresh: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = fresh
        self._words = -(-vocab_size // 32)
        self._num_consumed = 0

    def mask(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
        """After this output, a bit for each token that may come next, as SamplingMetadata.masks has them.

        Raises GrammarError when the grammar does not go on from there, or is too complex to tell.
        """
        if len(output_token_ids) < self._num_consumed:
            self._matcher.reset()
            self._num_consumed = 0
        new = list(output_token_ids[self._num_consumed :])
        if new and not self._matcher.consume_tokens(new):
            raise GrammarError(f"the output does not match its grammar: {_one_line(self._matcher.get_error())}")
        self._num_consumed = len(output_token_ids)
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)[: self._words]
        if self._matcher.is_error():
            raise GrammarError(f"the grammar has become too complex: {_one_line(self._matcher.get_error())}")
        if not words.any():
            raise GrammarError("the grammar leaves no token to go on with")
        return words


class Grammars:
    """Makes matchers. Owns the tokenizer's table, and the compiled grammars that were asked for last."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: of the model, which may have more rows than the tokenizer has tokens. Raises GrammarError."""
        self._vocab_size = vocab_size
        try:
            self._tokenizer = llguidance.LLTokenizer(
                _without_names(tokenizer_json), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
            )
        except Exception as error:  # the library raises what it likes
            raise GrammarError(f"grammars cannot be used with this tokenizer: {_one_line(str(error))}") from error
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> Matcher:
        """At the begin of an output. Raises GrammarError."""
        fresh = self._compiled.get(grammar)
        if fresh is None:
            fresh = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=grammar_limits())
            if fresh.is_error():
                error = fresh.get_error()
                raise GrammarError(NO_SPECIAL_NAMES if "unknown special token" in error else _one_line(error))
            self._compiled[grammar] = fresh
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(grammar)
        return Matcher(fresh.deep_copy(), self._vocab_size)


def _without_names(tokenizer_json: str) -> str:
    """The tokenizer with special tokens that no text spells.

    Where a grammar leaves one text only, llguidance takes the tokens that the tokenizer makes of it. That would be the
    special token where the text is the name of one: nothing, to a reader, instead of the text that was asked for.
    """
    tokenizer: dict[str, Any] = json.loads(tokenizer_json)
    hidden = {
        token["content"]: f"\uffff{token['id']}\uffff"
        for token in tokenizer.get("added_tokens", ())
        if token.get("special")
    }
    for token in tokenizer.get("added_tokens", ()):
        token["content"] = hidden.get(token["content"], token["content"])
    model = tokenizer.get("model", {})
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(name, name): token_id for name, token_id in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of a token and its score
        model["vocab"] = [[hidden.get(name, name), score] for name, score in vocab]
    return json.dumps(tokenizer)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
