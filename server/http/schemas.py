"""The body of `POST /generate`: its parameters, their ranges, and every problem of a body at once.

One class holds the table of docs/api.md: a test compares the two, so that the page cannot drift.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from server.generation import GenerationRequest, GrammarKind, Problem
from server.http.fields import Words, allowed_of, check, must_be, parameter, short, unknown_names

MAX_MESSAGES = 1024
MAX_SEED = 2**63 - 1
# The engine divides logits by a penalty in float32: what is less than this normal number would be 0 there.
SMALLEST_FLOAT32 = 2.0**-126
_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")

ROLES = ("system", "user", "assistant", "tool")

# They are looked for by an automaton whose making takes a microsecond a character, while everyone waits.
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_NonEmpty = Annotated[str, StringConstraints(min_length=1)]
_BadWord = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class GenerateBody(BaseModel):
    """The parameters that are carried out. None is "not given": null and leaving out are the same everywhere."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str | None = parameter("text", "exactly one of `prompt`, `prompt_token_ids`, `messages`")
    prompt_token_ids: list[_TokenId] | None = parameter(
        "one or more token ids in the vocabulary", min_length=1, fail_fast=True
    )
    messages: list[Message] | None = parameter(
        "1 to 1024 objects with `role` and `content`",
        "roles: system, user, assistant, tool; the model's chat template makes the prompt",
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
    )

    max_new_tokens: int | None = parameter(
        "an integer from 1 to the context length − the prompt", shown="min(256, room)", ge=1, lt=2**31
    )
    min_new_tokens: int | None = parameter(
        "an integer from 0 to `max_new_tokens`", "until then no end can be drawn", shown="0", ge=0, lt=2**31
    )
    temperature: float | None = parameter(
        "a number from 0 to 2", "0 is exact greedy", shown="the model's, else 1", ge=0, le=2, allow_inf_nan=False
    )
    do_sample: bool | None = parameter("true or false", "false is temperature 0", shown="true")
    top_k: int | None = parameter(
        "an integer from −1 to the vocabulary size", "0 or −1 is off", shown="the model's, else off", ge=-1, lt=2**31
    )
    top_p: float | None = parameter(
        "a number above 0, up to 1", "1 is off", shown="the model's, else 1", gt=0, le=1, allow_inf_nan=False
    )
    typical_p: float | None = parameter(
        "a number above 0, up to 1", "1 is off", shown="the model's, else 1", gt=0, le=1, allow_inf_nan=False
    )
    min_p: float | None = parameter("a number from 0 to 1", "0 is off", shown="0", ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = parameter(
        "a number above 0, up to 10",
        "1 is off; counts prompt and output",
        shown="the model's, else 1",
        ge=SMALLEST_FLOAT32,
        le=10,
        allow_inf_nan=False,
    )
    presence_penalty: float | None = parameter(
        "a number from −2 to 2", "0 is off; counts output only", shown="0", ge=-2, le=2, allow_inf_nan=False
    )
    frequency_penalty: float | None = parameter(
        "a number from −2 to 2", "0 is off; counts output only", shown="0", ge=-2, le=2, allow_inf_nan=False
    )
    logit_bias: dict[str, Any] | None = parameter(
        "an object from token ids to numbers from −100 to 100",
        "the ids are keys, so they are written as text",
        shown="{}",
    )
    seed: int | None = parameter(
        "an integer from 0 to 2^63 − 1", "drawn (below 2^53) and returned when null", ge=0, le=MAX_SEED
    )
    n: int | None = parameter(
        "an integer from 1 to 8", "that many choices of the same prompt, each drawn for itself", shown="1", ge=1, le=8
    )

    stop: Annotated[list[_Stop] | None, BeforeValidator(_one_or_many)] = parameter(
        "a string of 1 to 256 characters, or up to 16 of them", shown="[]", max_length=16, fail_fast=True
    )
    include_stop: bool | None = parameter("true or false", "keeps the matched string in the text", shown="false")
    stop_token_ids: list[_TokenId] | None = parameter(
        "up to 64 token ids in the vocabulary", shown="[]", max_length=64, fail_fast=True
    )
    ignore_eos: bool | None = parameter("true or false", shown="false")

    logprobs: int | None = parameter(
        "an integer from 0 to 20",
        "that many alternatives beside each token, all with the model's own log-probability",
        ge=0,
        le=20,
    )
    prompt_logprobs: int | None = parameter("an integer from 0 to 20", "the same of the prompt's tokens", ge=0, le=20)
    allowed_token_ids: list[_TokenId] | None = parameter(
        "one or more token ids in the vocabulary", "no others are drawn", min_length=1, fail_fast=True
    )
    bad_words: list[_BadWord] | None = parameter(
        "up to 64 strings of 1 to 256 characters",
        "their tokens, as at the begin of a text or after a space, are not drawn in a row",
        max_length=64,
        fail_fast=True,
    )
    explain: int | None = parameter(
        "an integer from 1 to 20", "that many candidates of each draw, and what became of them", ge=1, le=20
    )

    json_schema: dict[str, Any] | None = parameter(
        "an object: a JSON schema", "the text is JSON that it accepts; at most one of these four"
    )
    regex: str | None = parameter(
        "1 to 65536 characters", "a regular expression that the whole text matches", min_length=1, max_length=65536
    )
    grammar: str | None = parameter(
        "1 to 65536 characters", "a Lark grammar that the whole text matches", min_length=1, max_length=65536
    )
    choice: list[_NonEmpty] | None = parameter(
        "1 to 1024 non-empty strings", "the text is one of them", min_length=1, max_length=1024, fail_fast=True
    )

    stream: bool | None = parameter("true or false", "server-sent events instead of one answer", shown="false")
    echo: bool | None = parameter("true or false", "puts the prompt's text in front", shown="false")
    return_token_ids: bool | None = parameter("true or false", shown="false")
    skip_special_tokens: bool | None = parameter("true or false", "leaves them out of the text", shown="true")
    add_special_tokens: bool | None = parameter("true or false", "to a `prompt`", shown="true")
    truncate_prompt_tokens: int | None = parameter(
        "an integer from 1 to 2147483647",
        "keeps that many tokens of the prompt, the last ones; nothing is truncated unasked",
        ge=1,
        lt=2**31,
    )
    priority: int | None = parameter(
        "an integer from −100 to 0, with the role admin to 100",
        "higher first within one API key; aged by waiting, so that none starves",
        shown="0",
        ge=-100,
        le=100,
    )
    request_id: str | None = parameter(
        "1 to 128 printable characters",
        "becomes the `id` of the answer; need not be unique",
        min_length=1,
        max_length=128,
    )
    cache_salt: str | None = parameter(
        "up to 256 characters", "shares cached prefixes only with itself", max_length=256
    )
    deadline_ms: int | None = parameter(
        "an integer from 100 to 3600000",
        "milliseconds from arrival",
        ge=100,
        le=3_600_000,
        shown="the server's `--deadline-ms`",
    )
    dry_run: bool | None = parameter(
        "true or false", "says what the request would be, and generates nothing", shown="false"
    )


WORDS = Words(
    items={
        "prompt_token_ids": "a token id in the vocabulary, an integer from 0",
        "stop_token_ids": "a token id in the vocabulary, an integer from 0",
        "stop": "a string of 1 to 256 characters",
        "allowed_token_ids": "a token id in the vocabulary, an integer from 0",
        "choice": "a non-empty string",
        "bad_words": "a string of 1 to 256 characters",
        "messages": "an object with `role` and `content`",
    },
    members={"messages": {"role": f"one of {', '.join(ROLES)}", "content": "a string"}},
)
GRAMMARS: tuple[GrammarKind, ...] = ("json_schema", "regex", "grammar", "choice")
_PROMPTS = ("prompt", "prompt_token_ids", "messages")


class ParsedBody:
    """What a body asks for, as far as it is valid, and all that is wrong with it.

    request      with the invalid parameters left at their defaults, so that further checks can run on the others
    stream       whether an event stream was asked for
    problems     invalid parameters
    dry_run      whether it is only to be told what it would be
    unsupported  valid wishes that this version does not carry out
    """

    __slots__ = ("dry_run", "problems", "request", "stream", "unsupported")

    def __init__(
        self,
        request: GenerationRequest,
        stream: bool,
        problems: list[Problem],
        unsupported: list[Problem],
        dry_run: bool = False,
    ) -> None:
        self.request = request
        self.stream = stream
        self.dry_run = dry_run
        self.problems = problems
        self.unsupported = unsupported


def parse_generate(body: Mapping[str, Any]) -> ParsedBody:
    """Check a JSON object against the parameters. Never raises for what a client may send."""
    unknown = unknown_names(body, list(GenerateBody.model_fields))
    parsed = parse_parameters(body)
    parsed.problems[:0] = unknown
    parsed.problems += _check_prompts(body)
    return parsed


def parse_parameters(body: Mapping[str, Any]) -> ParsedBody:
    """The parameters of GenerateBody alone: whether a prompt is among them, and what else there is, is not asked."""
    checked = check(GenerateBody, body, WORDS)
    valid = checked.valid
    bias, bias_problems = _read_bias(valid.logit_bias or {})
    problems = checked.problems + bias_problems + _check_together(valid)
    return ParsedBody(_request(valid, bias), bool(valid.stream), problems, [], bool(valid.dry_run))


def _request(body: GenerateBody, bias: dict[int, float]) -> GenerationRequest:
    messages = None if body.messages is None else tuple(message.model_dump() for message in body.messages)
    return GenerationRequest(
        prompt=body.prompt,
        prompt_token_ids=None if body.prompt_token_ids is None else tuple(body.prompt_token_ids),
        messages=messages,
        n=body.n or 1,
        max_new_tokens=body.max_new_tokens,
        min_new_tokens=body.min_new_tokens or 0,
        temperature=0.0 if body.do_sample is False else body.temperature,
        top_k=0 if body.top_k == -1 else body.top_k,
        top_p=body.top_p,
        min_p=body.min_p or 0.0,
        typical_p=body.typical_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=body.seed,
        logit_bias=bias,
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=tuple(body.bad_words or ()),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        explain=body.explain,
        grammar=next(((kind, getattr(body, kind)) for kind in GRAMMARS if getattr(body, kind) is not None), None),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        deadline_ms=body.deadline_ms,
        echo=bool(body.echo),
        return_token_ids=bool(body.return_token_ids),
        skip_special_tokens=body.skip_special_tokens is not False,
        add_special_tokens=body.add_special_tokens is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        request_id=body.request_id,
    )


def _check_prompts(body: Mapping[str, Any]) -> list[Problem]:
    given = [name for name in _PROMPTS if body.get(name) is not None]
    if not given:
        return [Problem("prompt", "One of prompt, prompt_token_ids and messages is needed.", allowed="text")]
    if len(given) > 1:
        text = f"Only one of prompt, prompt_token_ids and messages may be given, not {' and '.join(given)}."
        return [Problem(given[1], text, allowed="leave it out")]
    return []


def _check_together(valid: GenerateBody) -> list[Problem]:
    """Problems between parameters, and those that no type can say."""
    problems: list[Problem] = []
    if valid.max_new_tokens is not None and (valid.min_new_tokens or 0) > valid.max_new_tokens:
        text = f"min_new_tokens must not be above max_new_tokens ({valid.max_new_tokens})."
        problems.append(Problem("min_new_tokens", text, valid.min_new_tokens, f"0 to {valid.max_new_tokens}"))
    if valid.temperature is not None and valid.do_sample is not None and valid.do_sample == (valid.temperature == 0):
        text = "do_sample contradicts temperature: false is temperature 0, true is a temperature above 0."
        problems.append(Problem("do_sample", text, valid.do_sample, "give one of the two"))
    given = [kind for kind in GRAMMARS if getattr(valid, kind) is not None]
    if len(given) > 1:
        text = f"Only one of {', '.join(GRAMMARS)} may be given, not {' and '.join(given)}."
        problems.append(Problem(given[1], text, allowed="leave it out"))
    if valid.dry_run and valid.stream:
        problems.append(Problem("dry_run", "dry_run is answered at once: stream must be false.", True, "false"))
    if valid.request_id is not None and not valid.request_id.isprintable():
        problems.append(must_be("request_id", valid.request_id, allowed_of(GenerateBody.model_fields["request_id"])))
    return problems


def _read_bias(sent: Mapping[str, Any]) -> tuple[dict[int, float], list[Problem]]:
    """logit_bias by token id. Checked here and not by a type, so that a large wrong object costs one problem."""
    bias: dict[int, float] = {}
    for key, value in sent.items():
        name = f"logit_bias[{short(key)}]"
        if not _TOKEN_KEY.fullmatch(key):
            return {}, [must_be(name, key, "a token id as key: an integer from 0, without leading zeros")]
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            return {}, [must_be(name, value, "a number from −100 to 100")]
        bias[int(key)] = float(value)
    return bias, []
