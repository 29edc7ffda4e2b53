"""One generation request as the engine sees it: token ids, sampling parameters, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class FinishReason(StrEnum):
    """Why a choice ended. The engine itself ends with STOP, LENGTH or ERROR; the others are the service's."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens and when to stop. Everything is resolved: no default is left to the engine.

    Ranges are those of the wire contract (docs/api.md). temperature 0 is exact argmax. top_k 0, top_p 1, min_p 0,
    typical_p 1, repetition_penalty 1, presence_penalty 0 and frequency_penalty 0 are off. `seed` is a 64-bit
    unsigned integer. `logit_bias` pairs a token id with what is added to its logit. `stop_token_ids` end the choice
    like the model's own end-of-sequence tokens, which `ignore_eos` disables; no stop is honoured before
    `min_new_tokens` tokens: until then, ending tokens cannot be drawn.

    allowed_token_ids    the only ones that may be drawn; empty: all
    bad_words            sequences of tokens that the output must not contain: the last token of one cannot be drawn
                         after the others. Where nothing else is left to draw, they yield
    grammar              what the output must be, in the words of server/engine/grammar.py; "": anything. Where it and
                         min_new_tokens or bad_words leave nothing to draw, the grammar wins
    num_logprobs         also the log-probability of each token, and those of so many alternatives; None: none
    num_prompt_logprobs  likewise of the prompt's tokens, for choice 0
    explain              so many candidates of each draw; None: none
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    explain: int | None = None

    @property
    def wants_details(self) -> bool:
        """Whether anything beside tokens is asked for."""
        return self.num_logprobs is not None or self.explain is not None or self.num_prompt_logprobs is not None

    @property
    def needs_last_token(self) -> bool:
        """Whether what may be drawn depends on which tokens were drawn before: the host must know them by then."""
        return bool(self.grammar) or any(len(word) > 1 for word in self.bad_words)

    def banned_after(self, output_token_ids: Sequence[int]) -> set[int]:
        """Tokens that would complete one of `bad_words` after this output."""
        banned = set()
        for word in self.bad_words:
            before = len(word) - 1
            if (
                len(output_token_ids) >= before
                and tuple(output_token_ids[len(output_token_ids) - before :]) == word[:-1]
            ):
                banned.add(word[-1])
        return banned

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the next token's logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class TokenMatcher(Protocol):
    """Knows what a grammar lets follow an output (`server.engine.grammar.Matcher`)."""

    def mask(self, output_token_ids: Sequence[int]) -> Any:
        """uint32 words with a bit for each token that may come next. Raises where there is none."""
        ...


class RequestStatus(StrEnum):
    """WAITING holds no blocks; RUNNING may hold blocks and takes part in steps; FINISHED holds none."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one request. Built by whoever adds it; from then on only the scheduler changes it.

    request_id        unique among the requests open in this engine
    output_token_ids  tokens drawn so far; not empty at the start when a restarted engine takes the request up again
    choice            index among the n choices of the request; part of the random generator's counter
    priority          higher first, within one tenant
    tenant            who shares fairly with whom (an API key)
    cache_salt        cached prefixes are shared only between equal salts of one tenant
    arrival           order of arrival, a counter (no clock): older is smaller

    num_computed_tokens  tokens whose K and V lie in `block_ids`, counted from the start of the sequence, steps in
                         flight included
    num_inflight_samples tokens that steps in flight will draw: known to exist, not yet known
    num_cached_tokens    prompt tokens taken from the prefix cache when it was first scheduled
    matcher              of its grammar, made when it is added
    computed_high_water  highest num_computed_tokens ever reached: positions below it that are computed again count as
                         recomputed
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    choice: int = 0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    arrival: int = 0

    status: RequestStatus = RequestStatus.WAITING
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_inflight_samples: int = 0
    num_cached_tokens: int | None = None
    computed_high_water: int = 0
    num_preemptions: int = 0
    matcher: TokenMatcher | None = None

    @property
    def waits_for_token(self) -> bool:
        """Whether what may be drawn next depends on a token in flight."""
        return self.num_inflight_samples > 0 and self.params.needs_last_token

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be found out: those positions must be computed."""
        return (
            self.params.num_prompt_logprobs is not None
            and self.choice == 0
            and self.computed_high_water < len(self.prompt_token_ids) - 1
        )

    def __post_init__(self) -> None:
        # A request that comes back after a crash had every token but its last one in a cache once.
        if self.output_token_ids:
            self.computed_high_water = len(self.prompt_token_ids) + len(self.output_token_ids) - 1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens whose ids are known."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those that steps in flight will draw."""
        # The sum of num_known_tokens, spelled out: asked for several times a request and step.
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_inflight_samples

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known token ids of positions start to stop - 1."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]
