"""The words that the HTTP dialects and the service share: a request, its events, and its refusals.

Both dialects (native, OpenAI-shaped) turn their bodies into a `GenerationRequest`, hand it to `Service.generate`, and
write the events that come back. No pydantic, no HTTP: status codes are chosen by `http/errors.py` from `Refusal.code`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from server.engine.request import FinishReason
from server.engine.scores import Explanation

GrammarKind = Literal["json_schema", "regex", "grammar", "choice"]
ErrorCode = Literal[
    "invalid_request",
    "context_length_exceeded",
    "queue_full",
    "loading",
    "draining",
    "engine_restarting",
    "unsupported",
    "unsupported_grammar",
    "deadline",
    "internal",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one parameter: its name, what was sent, and what is allowed, for a person to act on."""

    param: str | None
    message: str
    value: Any = None
    allowed: str | None = None


class Refusal(Exception):
    """The request will not be carried out. Raised before its first event.

    code         becomes the HTTP status and the `code` of the answer
    problems     one or more; the first is the answer's message and `param`, all are its `details`
    retry_after  seconds after which to try again, when waiting helps
    """

    def __init__(self, code: ErrorCode, problems: list[Problem], retry_after: int | None = None) -> None:
        super().__init__(problems[0].message)
        self.code: ErrorCode = code
        self.problems = problems
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request whose form is valid. None stands for "the model's default"; the service resolves it.

    Exactly one of prompt, prompt_token_ids, messages is given. The names, ranges and defaults are those of
    docs/api.md; `n` choices are drawn for one prompt; `grammar` is its kind and what was sent; `tools` are as
    OpenAI's chat has them; `tool_choice` is "auto", "required", or "function:" and a name; `chat` tells reasoning and
    calls from text. `tenant` is who asks (an API key's name, or ""); `traceparent` is its trace's (W3C), or "".
    """

    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None

    n: int = 1
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    explain: int | None = None
    truncate_prompt_tokens: int | None = None
    deadline_ms: int | None = None
    echo: bool = False
    grammar: tuple[GrammarKind, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    chat: bool = False

    return_token_ids: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    request_id: str | None = None
    tenant: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The first event, before any text: the request was admitted and its first token is there.

    id is what the answer carries (`gen-…`, or the caller's request_id); seed is the one used, drawn if none was sent.
    """

    id: str
    model: str
    seed: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token by itself: its id, its bytes and, of those that are no whole characters, U+FFFD as text.

    special: a token of the model's own, which `skip_special_tokens` leaves out of the text.
    """

    id: int
    text: str
    data: bytes
    special: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's raw log-probability (natural logarithm), and the most likely tokens with theirs."""

    token: Token
    logprob: float
    top: tuple[tuple[Token, float], ...]


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A draw, and its candidates with their tokens, in the order of `explanation.candidates`."""

    token: Token
    explanation: Explanation
    candidates: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens, None for the first; after Started, where they were asked for.

    index: of the first choice of that prompt; first: its first token.
    """

    index: int
    first: Token
    tokens: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """News of a tool call: the first has its id and name, the others pieces of its arguments, which are JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice, never empty unless `token_ids` are (a token may add no text yet).

    token_ids: the tokens delivered with this event, whether or not their text is complete; logprobs and explained: of
    each of them, where they were asked for. The text of the prompt (`echo`) comes without tokens. reasoning and calls:
    where the request is a chat, what was thought and called instead of said.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    explained: tuple[ExplainedToken, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The one terminal event of a choice.

    stop_reason: the stop string, or the id of the stop or end-of-sequence token, when finish_reason is STOP; else None.
    error: what to tell the client when finish_reason is ERROR; it never holds a path, a traceback or an address.
    called: whether it has called a tool.
    """

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None
    called: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; the prompt counts once. completion_tokens counts through the token that completed the text."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds on this server's clock: waiting, until the first token, from there to the last, and all of it."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a request would be: nothing was generated. `parameters` by their names in requests, every one resolved."""

    id: str
    model: str
    parameters: dict[str, Any]
    prompt_token_ids: tuple[int, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The last event, when every choice has finished."""

    seed: int
    usage: Usage
    timings: Timings


Event = Started | PromptLogprobs | TextDelta | ChoiceFinished | Completed
