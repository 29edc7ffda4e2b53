"""The bodies of `/v1/chat/completions` and `/v1/completions`: what is theirs alone, and how the rest is native.

A parameter that means the same on /generate is checked there, by the same table. What is named differently is given to
that table under its native name, and problems are told in the words that were sent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from server.generation import GenerationRequest, Problem
from server.http import schemas as native
from server.http.fields import Words, check, must_be, not_yet, parameter, unknown_names

MAX_PROMPTS = 64
MAX_SHARED_BIAS = 1024

# Parameters of /generate that are taken over as they are; the second group is not OpenAI's.
SHARED = (
    *("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stream"),
    *("min_new_tokens", "top_k", "min_p", "typical_p", "repetition_penalty", "include_stop", "stop_token_ids"),
    *("ignore_eos", "return_token_ids", "skip_special_tokens", "priority", "request_id", "cache_salt"),
    *("prompt_logprobs", "allowed_token_ids", "bad_words", "explain", "truncate_prompt_tokens", "deadline_ms"),
    *("dry_run", "json_schema", "regex", "grammar", "choice"),
)
COMPLETION_SHARED = (*SHARED, "logprobs", "echo", "add_special_tokens")

_NATIVE_NAMES = {"max_new_tokens": "max_tokens", "prompt_token_ids": "prompt", "min_tokens": "min_new_tokens"}
_TEXT = "a string, or a list of text parts"
_TOKEN_LIMIT = "an integer from 1 to the context length − the prompt"


def _text_content(value: Any) -> Any:
    """A string, or parts of text. One error for the whole of it."""
    parts = [] if isinstance(value, str) else value
    if not isinstance(parts, list) or (parts == [] and parts is value) or not all(map(_is_text_part, parts)):
        raise PydanticCustomError("content", "no text")
    return value


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


class CalledFunction(BaseModel):
    """A function as it was called: its arguments are JSON."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str


class MadeCall(BaseModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(BaseModel):
    """A function that may be called; `parameters` is a JSON schema."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Annotated[str | None, Field(max_length=4096)] = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """What a model may call."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """One message of a chat, as the official clients send it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_text_content)]
    name: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    tool_calls: Annotated[list[MadeCall] | None, Field(max_length=128)] = None
    tool_call_id: Annotated[str | None, Field(max_length=128)] = None
    reasoning_content: str | None = None


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool | None = None


class JsonSchema(BaseModel):
    """A named schema. It is kept to whether or not `strict` says so."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the text must be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = parameter(
        "the name of the served model", "left out, it is that one", shown="the served model", max_length=256
    )
    max_tokens: int | None = parameter(_TOKEN_LIMIT, shown="min(256, room)", ge=1, lt=2**31)
    stream_options: StreamOptions | None = parameter(
        "an object with `include_usage`", "with `stream` only: true adds a last chunk with the usage"
    )
    response_format: ResponseFormat | None = parameter(
        "an object with `type`: text, json_object or json_schema", "the last with `json_schema`: `name` and `schema`"
    )
    user: str | None = parameter("up to 256 characters", "changes nothing", max_length=256)


class ChatBody(_Body):
    """What /v1/chat/completions has beside the shared parameters."""

    messages: list[ChatMessage] | None = parameter(
        "1 to 1024 objects with `role` and `content`",
        "roles: system, developer, user, assistant, tool; content: a string or a list of text parts; `name` goes to "
        "the template",
        shown="required",
        min_length=1,
        max_length=native.MAX_MESSAGES,
        fail_fast=True,
    )
    max_completion_tokens: int | None = parameter(
        _TOKEN_LIMIT, "the newer name of `max_tokens`", shown="min(256, room)", ge=1, lt=2**31
    )
    logprobs: bool | None = parameter("true or false", "the log-probability of each token", shown="false")
    top_logprobs: int | None = parameter(
        "an integer from 0 to 20", "with `logprobs` only: that many alternatives beside each token", ge=0, le=20
    )
    tools: list[Tool] | None = parameter(
        "up to 128 functions, each an object with `type` and `function`", shown="[]", max_length=128, fail_fast=True
    )
    tool_choice: Any = parameter(
        'one of "none", "auto", "required", or an object that names a function', shown='"auto" with tools'
    )
    parallel_tool_calls: bool | None = parameter("true or false", "whether one answer may call several", shown="true")


class CompletionBody(_Body):
    """What /v1/completions has beside the shared parameters."""

    prompt: Any = parameter(
        f"text, a list of texts, a list of token ids, or a list of such lists; up to {MAX_PROMPTS} prompts",
        "the choices of the first prompt come first",
        shown="required",
    )


# What each route knows by name and does not carry out, with the one value that asks for nothing.
CHAT_UNSUPPORTED: Mapping[str, Any] = {
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "reasoning_effort": None,
    "verbosity": None,
    "web_search_options": None,
    "service_tier": "auto",
    "store": False,
    "metadata": {},
    "prompt_cache_key": None,
    "safety_identifier": None,
}
COMPLETION_UNSUPPORTED: Mapping[str, Any] = {"best_of": 1, "suffix": None}

# Members of messages: clients send an earlier answer back as they got it, nulls included.
_MESSAGE_UNSUPPORTED: Mapping[str, Any] = {
    "function_call": None,
    "refusal": None,
    "audio": None,
    "annotations": [],
}

MESSAGE_MEMBERS = {
    "role": "one of system, developer, user, assistant, tool",
    "content": _TEXT,
    "name": "1 to 64 characters",
    "tool_calls": "up to 128 calls, each an object with `id`, `type` and `function`",
    "tool_calls.id": "up to 128 characters",
    "tool_calls.type": '"function"',
    "tool_calls.function": "an object with `name` and `arguments`",
    "tool_calls.function.name": "1 to 64 characters",
    "tool_calls.function.arguments": "a string: JSON",
    "tool_call_id": "up to 128 characters",
    "reasoning_content": "a string",
}
FORMAT_MEMBERS = {
    "type": "one of text, json_object, json_schema",
    "json_schema": "an object with `name` and `schema`, and perhaps `description` and `strict`",
    "json_schema.name": "1 to 64 characters",
    "json_schema.description": "a string",
    "json_schema.schema": "an object: a JSON schema",
    "json_schema.strict": "true or false",
}
WORDS = Words(
    items={
        "messages": "an object with `role` and `content`",
        "tools": "an object with `type` and `function`",
    },
    members={
        "messages": MESSAGE_MEMBERS,
        "stream_options": {"include_usage": "true or false"},
        "response_format": FORMAT_MEMBERS,
        "tools": {
            "type": '"function"',
            "function": "an object with `name`, and perhaps `description`, `parameters`",
            "function.name": "1 to 64 letters, digits, dots, dashes and underscores",
            "function.description": "up to 4096 characters",
            "function.parameters": "an object: a JSON schema",
            "function.strict": "true or false",
        },
    },
)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """What an OpenAI-shaped body asks for, and all that is wrong with it: see server.http.schemas.ParsedBody.

    requests  one for each prompt, at least one
    respell   a problem in native names in the names of this route
    """

    requests: list[GenerationRequest]
    stream: bool
    dry_run: bool
    include_usage: bool
    model: str | None
    problems: list[Problem]
    unsupported: list[Problem]
    respell: Callable[[Problem], Problem]


def parse_chat(body: Mapping[str, Any]) -> ParsedCall:
    """Check a JSON object against the parameters of /v1/chat/completions."""
    known = (*ChatBody.model_fields, *SHARED, *CHAT_UNSUPPORTED)
    messages, unsupported = plain_messages(body.get("messages"))
    checked = check(ChatBody, {**body, "messages": messages}, WORDS)
    valid = checked.valid
    own = unknown_names(body, known, _NATIVE_NAMES) + checked.problems + _check_stream_options(valid, body)
    if body.get("messages") is None:
        own.append(Problem("messages", "messages is missing.", None, "one or more messages"))
    limit, name = valid.max_completion_tokens, "max_completion_tokens"
    if limit is None and body.get("max_tokens") is not None:
        limit, name = valid.max_tokens, "max_tokens"
    elif valid.max_tokens is not None and limit is not None and valid.max_tokens != limit:
        text = "max_tokens contradicts max_completion_tokens: it is the older name of the same."
        own.append(Problem("max_tokens", text, valid.max_tokens, "give one of the two"))
    respell = _respeller({"max_new_tokens": name} | _format_name(valid))
    parsed = native.parse_parameters(_shared(body, SHARED, limit))
    if valid.top_logprobs is not None and not valid.logprobs:
        own.append(Problem("top_logprobs", "top_logprobs needs logprobs to be true.", valid.top_logprobs, "null"))
    request = dataclasses.replace(
        parsed.request,
        messages=None if valid.messages is None else messages_of(valid.messages),
        logprobs=(valid.top_logprobs or 0) if valid.logprobs else None,
        chat=True,
    )
    request, of_format = with_format(request, valid.response_format)
    request, of_tools = with_tools(request, valid)
    own += of_format + of_tools
    return ParsedCall(
        [request],
        parsed.stream,
        parsed.dry_run,
        valid.stream_options is not None and valid.stream_options.include_usage is True,
        valid.model,
        own + [respell(problem) for problem in parsed.problems],
        unsupported + not_yet(body, CHAT_UNSUPPORTED),
        respell,
    )


def parse_completion(body: Mapping[str, Any]) -> ParsedCall:
    """Check a JSON object against the parameters of /v1/completions."""
    known = (*CompletionBody.model_fields, *COMPLETION_SHARED, *COMPLETION_UNSUPPORTED)
    checked = check(CompletionBody, body, WORDS)
    valid = checked.valid
    own = unknown_names(body, known, _NATIVE_NAMES) + checked.problems + _check_stream_options(valid, body)
    prompts, problem = _prompts(body.get("prompt"))
    if problem is not None:
        own.append(problem)
    respell = _respeller({"max_new_tokens": "max_tokens", "prompt_token_ids": "prompt"} | _format_name(valid))
    parsed = native.parse_parameters(_shared(body, COMPLETION_SHARED, valid.max_tokens))
    if len(prompts) > 1 and len(parsed.request.logit_bias) > MAX_SHARED_BIAS:
        # Every prompt carries it to the engine: one body would be a second of work otherwise.
        allowed = f"an object of up to {MAX_SHARED_BIAS} token ids when there are several prompts"
        own.append(must_be("logit_bias", body["logit_bias"], allowed))
    if parsed.dry_run and len(prompts) > 1:
        own.append(Problem("dry_run", "dry_run is of one prompt.", True, "false, or one prompt"))
    asked = parsed.request
    if asked.echo and asked.logprobs is not None and asked.prompt_logprobs is None:
        # The text then begins with the prompt, and so do the log-probabilities.
        asked = dataclasses.replace(asked, prompt_logprobs=asked.logprobs)
    asked, of_format = with_format(asked, valid.response_format)
    own += of_format
    return ParsedCall(
        [dataclasses.replace(asked, **prompt) for prompt in prompts],
        parsed.stream,
        parsed.dry_run,
        valid.stream_options is not None and valid.stream_options.include_usage is True,
        valid.model,
        own + [respell(problem) for problem in parsed.problems],
        not_yet(body, COMPLETION_UNSUPPORTED),
        respell,
    )


def plain_messages(sent: Any) -> tuple[Any, list[Problem]]:
    """Messages without the members that hold nothing, and a problem for each of those that we know but do not use."""
    if not isinstance(sent, list):
        return sent, []
    plain: list[Any] = []
    problems: list[Problem] = []
    for position, message in enumerate(sent):
        if not isinstance(message, dict):
            plain.append(message)
            continue
        problems += not_yet(message, _MESSAGE_UNSUPPORTED, f"messages[{position}].")
        kept = {name: value for name, value in message.items() if name not in _MESSAGE_UNSUPPORTED}
        if kept.get("tool_calls") == []:
            del kept["tool_calls"]
        if kept.get("tool_calls") and kept.get("content") is None:
            kept["content"] = ""  # it called and said nothing
        plain.append(kept)
    return plain, problems


def messages_of(messages: list[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """What the chat template gets."""
    return tuple(message.model_dump(exclude_none=True) for message in messages)


def with_format(request: GenerationRequest, wanted: ResponseFormat | None) -> tuple[GenerationRequest, list[Problem]]:
    """The request with the grammar of its `response_format`."""
    if wanted is None:
        return request, []
    if wanted.json_schema is not None and wanted.type != "json_schema":
        text = f"response_format.json_schema needs the type json_schema, not {wanted.type}."
        return request, [Problem("response_format.json_schema", text, None, "leave it out")]
    if wanted.type == "text":
        return request, []
    if request.grammar is not None:
        text = f"response_format cannot be combined with {request.grammar[0]}."
        return request, [Problem("response_format", text, None, "leave it out")]
    schema: dict[str, Any] | None = {"type": "object"}
    if wanted.type == "json_schema":
        schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
        if schema is None:
            text = "response_format.json_schema.schema is missing."
            return request, [Problem("response_format.json_schema", text, None, "an object: a JSON schema")]
    return dataclasses.replace(request, grammar=("json_schema", schema)), []


def with_tools(request: GenerationRequest, valid: ChatBody) -> tuple[GenerationRequest, list[Problem]]:
    """The request with its tools and how they are to be used."""
    choice, tools = valid.tool_choice, tuple(tool.model_dump(exclude_none=True) for tool in valid.tools or ())
    names = [tool["function"]["name"] for tool in tools]
    allowed = 'one of "none", "auto", "required", or {"type": "function", "function": {"name": one of the tools}}'
    named = None
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else None
        if choice != {"type": "function", "function": {"name": named}} or named not in names:
            return request, [must_be("tool_choice", choice, allowed)]
    elif choice not in (None, "none", "auto", "required"):
        return request, [must_be("tool_choice", choice, allowed)]
    problems = []
    if len(set(names)) < len(names):
        problems.append(Problem("tools", "tools must have different names.", None, "each name once"))
    if choice == "required" and not tools:
        problems.append(Problem("tool_choice", "tool_choice required needs tools.", choice, "none"))
    if not tools or choice == "none":
        return request, problems
    if request.grammar is not None:
        problems.append(Problem("tools", "tools cannot be combined with a grammar or response_format.", None, "[]"))
    made = dataclasses.replace(
        request,
        tools=tools,
        tool_choice=f"function:{named}" if named else (choice or "auto"),
        parallel_tool_calls=valid.parallel_tool_calls is not False,
    )
    return made, problems


def _format_name(valid: _Body) -> dict[str, str]:
    """Problems of the schema are told of where it stood."""
    wanted = valid.response_format
    return {"json_schema": "response_format"} if wanted is not None and wanted.type != "text" else {}


def _shared(body: Mapping[str, Any], names: tuple[str, ...], max_new_tokens: int | None) -> dict[str, Any]:
    return {name: body[name] for name in names if name in body} | {"max_new_tokens": max_new_tokens}


def _check_stream_options(valid: _Body, body: Mapping[str, Any]) -> list[Problem]:
    if valid.stream_options is None or body.get("stream") is True:
        return []
    return [Problem("stream_options", "stream_options needs stream to be true.", None, "leave it out")]


def _prompts(sent: Any) -> tuple[list[dict[str, Any]], Problem | None]:
    """The prompts as parameters of requests. With a problem there is one without any prompt."""
    if isinstance(sent, str):
        return [{"prompt": sent}], None
    nothing: list[dict[str, Any]] = [{}]
    allowed = f"text, a list of texts, a list of token ids, or a list of such lists; up to {MAX_PROMPTS} prompts"
    if sent is None:
        return nothing, Problem("prompt", "prompt is missing.", None, allowed)
    if not isinstance(sent, list) or not sent:
        return nothing, must_be("prompt", sent, allowed)
    if type(sent[0]) is int:
        wrong = _no_token_id(sent)
        if wrong is not None:
            return nothing, must_be(f"prompt[{wrong}]", sent[wrong], "a token id in the vocabulary, an integer from 0")
        return [{"prompt_token_ids": tuple(sent)}], None
    if len(sent) > MAX_PROMPTS:
        return nothing, must_be("prompt", sent, f"up to {MAX_PROMPTS} prompts")
    texts = isinstance(sent[0], str)
    kind = str if texts else list
    for position, prompt in enumerate(sent):
        if not isinstance(prompt, kind) or prompt == []:
            what = "text, like the first" if texts else "a list of token ids that is not empty, like the first"
            return nothing, must_be(f"prompt[{position}]", prompt, what if position else allowed)
        wrong = None if isinstance(prompt, str) else _no_token_id(prompt)
        if wrong is not None:
            where = f"prompt[{position}][{wrong}]"
            return nothing, must_be(where, prompt[wrong], "a token id in the vocabulary, an integer from 0")
    if texts:
        return [{"prompt": prompt} for prompt in sent], None
    return [{"prompt_token_ids": tuple(prompt)} for prompt in sent], None


def _no_token_id(values: list[Any]) -> int | None:
    """Where the first value is that can be no token id."""
    return next((i for i, value in enumerate(values) if type(value) is not int or not 0 <= value < 2**31), None)


def _respeller(names: Mapping[str, str]) -> Callable[[Problem], Problem]:
    pattern = re.compile(rf"\b({'|'.join(names)})\b")

    def respelled(text: str | None) -> str | None:
        return None if text is None else pattern.sub(lambda match: names[match[0]], text)

    def respell(problem: Problem) -> Problem:
        message = respelled(problem.message) or problem.message
        return Problem(respelled(problem.param), message, problem.value, respelled(problem.allowed))

    return respell
