"""`POST /tokenize` and `/detokenize`: text to ids and back, as generation would do it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from server.generation import GenerationRequest, Problem
from server.http.fields import Words, check, parameter, unknown_names
from server.http.generate import read_object
from server.http.limits import Limits
from server.http.openai.calls import ModelService, check_model
from server.http.openai.schemas import MESSAGE_MEMBERS, ChatMessage, messages_of, plain_messages
from server.http.schemas import MAX_MESSAGES
from server.http.sse import encode_json

_MODEL = ("the name of the served model", "left out, it is that one")
# More ids than this are decoded in a thread.
_INLINE_IDS = 2048


class TokenizeBody(BaseModel):
    """The parameters of /tokenize."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str | None = parameter("text", "exactly one of `prompt`, `messages`")
    messages: list[ChatMessage] | None = parameter(
        "1 to 1024 objects with `role` and `content`",
        "as in `/v1/chat/completions`: the chat template makes the prompt",
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
    )
    add_special_tokens: bool | None = parameter("true or false", "to a `prompt`", shown="true")
    model: str | None = parameter(*_MODEL, shown="the served model", max_length=256)


class DetokenizeBody(BaseModel):
    """The parameters of /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = parameter(
        "a list of token ids in the vocabulary", shown="required", fail_fast=True
    )
    skip_special_tokens: bool | None = parameter("true or false", "leaves them out of the text", shown="false")
    model: str | None = parameter(*_MODEL, shown="the served model", max_length=256)


_WORDS = Words(
    items={
        "messages": "an object with `role` and `content`",
        "tokens": "a token id in the vocabulary, an integer from 0",
    },
    members={"messages": MESSAGE_MEMBERS},
)


class TokenService(ModelService, Protocol):
    """What this module needs of server.service.Service."""

    @property
    def context_length(self) -> int: ...

    async def tokenize(self, request: GenerationRequest) -> list[int]: ...

    def detokenize(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...


async def tokenize(request: Request, service: TokenService, limits: Limits) -> bytes:
    """The answer to /tokenize. Raises HttpError, Refusal."""
    sent = await read_object(request, limits)
    messages, unsupported = plain_messages(sent.get("messages"))
    checked = check(TokenizeBody, {**sent, "messages": messages}, _WORDS)
    valid = checked.valid
    problems = unknown_names(sent, list(TokenizeBody.model_fields)) + checked.problems
    given = [name for name in ("prompt", "messages") if sent.get(name) is not None]
    if len(given) != 1:
        text = "Exactly one of prompt and messages is needed."
        problems.append(Problem("prompt", text, None, "text"))
    check_model(service, valid.model, problems, unsupported)
    wanted = GenerationRequest(
        prompt=valid.prompt,
        messages=None if valid.messages is None else messages_of(valid.messages),
        add_special_tokens=valid.add_special_tokens is not False,
    )
    ids = await service.tokenize(wanted)
    return encode_json({"count": len(ids), "max_model_len": service.context_length, "tokens": ids})


async def detokenize(request: Request, service: TokenService, limits: Limits) -> bytes:
    """The answer to /detokenize. Raises HttpError, Refusal."""
    sent = await read_object(request, limits)
    checked = check(DetokenizeBody, sent, _WORDS)
    valid = checked.valid
    problems = unknown_names(sent, list(DetokenizeBody.model_fields)) + checked.problems
    if sent.get("tokens") is None:
        problems.append(Problem("tokens", "tokens is missing.", None, "a list of token ids in the vocabulary"))
    check_model(service, valid.model, problems, [])
    ids, skip = valid.tokens or [], valid.skip_special_tokens is True
    if len(ids) <= _INLINE_IDS:
        text = service.detokenize(ids, skip)
    else:
        text = await asyncio.to_thread(service.detokenize, ids, skip)
    return encode_json({"prompt": text})
