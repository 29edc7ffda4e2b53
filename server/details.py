"""Log-probabilities and explanations of one request: from the engine's packed numbers to tokens that can be shown."""

from __future__ import annotations

from server.client import Arrival
from server.engine.request import SamplingParams
from server.engine.scores import TokenScore, score_bytes, unpack_scores
from server.generation import ExplainedToken, PromptLogprobs, Token, TokenLogprobs
from server.text.tokenizer import ModelText

_Delivered = tuple[tuple[int, ...], tuple[TokenLogprobs, ...], tuple[ExplainedToken, ...]]


class DetailReader:
    """Owns what has arrived of the prompt's scores. The engine sends each position once, and all of them again if it
    crashed before the first token: they are the same."""

    def __init__(self, text: ModelText, params: SamplingParams, prompt_ids: list[int]) -> None:
        self._text = text
        self._params = params
        self._prompt_ids = prompt_ids
        self._prompt: list[TokenScore | None] = [None] * len(prompt_ids)

    def of(self, arrival: Arrival, used: int) -> _Delivered:
        """The first `used` tokens of an arrival: ids, log-probabilities, explanations, as TextDelta takes them."""
        token_ids = arrival.token_ids[:used]
        logprobs: tuple[TokenLogprobs, ...] = ()
        count = self._params.num_logprobs
        if count is not None:
            scores = unpack_scores(arrival.scores[: used * score_bytes(count)], count)
            logprobs = tuple(map(self._scored, token_ids, scores))
        explained = tuple(
            ExplainedToken(
                self._token(explanation.token_id),
                explanation,
                tuple(self._token(candidate.token_id) for candidate in explanation.candidates),
            )
            for explanation in arrival.explanations[:used]
        )
        return tuple(token_ids), logprobs, explained

    def append_prompt(self, arrival: Arrival) -> None:
        """Keep the pieces of the prompt's scores that have arrived."""
        count = self._params.num_prompt_logprobs or 0
        for start, packed in arrival.prompt_scores:
            scores = unpack_scores(packed, count)
            self._prompt[start : start + len(scores)] = scores

    def prompt(self) -> PromptLogprobs | None:
        """All of the prompt, if it was asked for."""
        if self._params.num_prompt_logprobs is None:
            return None
        pairs = zip(self._prompt_ids, self._prompt, strict=True)
        first = self._token(self._prompt_ids[0])
        return PromptLogprobs(0, first, tuple(None if score is None else self._scored(i, score) for i, score in pairs))

    def _scored(self, token_id: int, score: TokenScore) -> TokenLogprobs:
        top = zip(map(self._token, score.top_ids), score.top_logprobs, strict=True)
        return TokenLogprobs(self._token(token_id), score.logprob, tuple(top))

    def _token(self, token_id: int) -> Token:
        data = self._text.token_bytes(token_id)
        return Token(token_id, data.decode("utf-8", "replace"), data, self._text.is_special(token_id))
