"""Answers and chunks in OpenAI's shapes: what the official clients parse, and nothing that they would stumble over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.generation import ChoiceFinished, Completed, Problem, Started, TextDelta, Usage
from server.http.errors import error_object
from server.http.sse import AnswerBuilder

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request's answer looks like.

    num_choices   of all prompts
    own_id        the request's own id, which is not given a prefix
    """

    chat: bool
    fingerprint: str
    num_choices: int
    include_usage: bool
    with_token_ids: bool
    own_id: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def id_of(self, started: Started) -> str:
        """The answer's id, with the prefix that clients know."""
        if self.own_id:
            return started.id
        return ("chatcmpl-" if self.chat else "cmpl-") + started.id.removeprefix("gen-")


class _Cached(msgspec.Struct, frozen=True):
    cached_tokens: int


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _Cached


class _Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class _ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Delta
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class _ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    logprobs: None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | UnsetType


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET


class _Envelope(msgspec.Struct, frozen=True):
    """An answer or a chunk; the choices are of its kind."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Any]
    usage: _Usage | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET


class ChunkWriter:
    """The chunks of a stream: `data:` lines alone, since OpenAI's have no ids."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._id = ""
        self._model = ""
        self._object = "chat.completion.chunk" if shape.chat else "text_completion"
        # Where the usage was asked for, every other chunk says that it is not the one.
        self._no_usage: UnsetType | None = None if shape.include_usage else UNSET

    def started(self, event: Started) -> bytes:
        """In a chat, the role of every choice."""
        self._id, self._model = self._shape.id_of(event), event.model
        if not self._shape.chat:
            return b""
        roles = (_ChatChunkChoice(index, _Delta("assistant", "")) for index in range(self._shape.num_choices))
        return b"".join(self._chunk(role) for role in roles)

    def delta(self, event: TextDelta) -> bytes:
        """New text; empty when there is nothing to show."""
        ids = event.token_ids if self._shape.with_token_ids else UNSET
        if not event.text and ids is UNSET:
            return b""
        if self._shape.chat:
            return self._chunk(_ChatChunkChoice(event.index, _Delta(content=event.text), token_ids=ids))
        return self._chunk(_TextChoice(event.index, event.text, token_ids=ids))

    def finished(self, event: ChoiceFinished) -> bytes:
        """The end of a choice."""
        reason = event.finish_reason.value
        if self._shape.chat:
            choice: Any = _ChatChunkChoice(event.index, _Delta(), None, reason, event.stop_reason)
        else:
            choice = _TextChoice(event.index, "", None, reason, event.stop_reason)
        return self._chunk(choice)

    def completed(self, event: Completed) -> bytes:
        """The usage if it was asked for, then the end of the stream."""
        last = b"data: [DONE]\n\n"
        if not self._shape.include_usage:
            return last
        return self._data(self._envelope([], _usage(event.usage), event.seed)) + last

    def failed(self, open_outputs: Sequence[int], code: str, problems: Sequence[Problem]) -> bytes:
        """The error, which the clients raise. No [DONE] follows."""
        return self._data({"error": error_object(code, problems)})

    def _chunk(self, choice: Any) -> bytes:
        return self._data(self._envelope([choice], self._no_usage, UNSET))

    def _envelope(self, choices: list[Any], usage: _Usage | UnsetType | None, seed: int | UnsetType) -> _Envelope:
        shape = self._shape
        return _Envelope(self._id, self._object, shape.created, self._model, shape.fingerprint, choices, usage, seed)

    @staticmethod
    def _data(value: Any) -> bytes:
        return b"data: %b\n\n" % _encode(value)


class BodyBuilder(AnswerBuilder):
    """The whole answer, in OpenAI's shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.with_token_ids)
        self._shape = shape

    def answer(self, started: Started, event: Completed) -> bytes:
        """The body, once every choice has finished."""
        shape = self._shape
        choices: list[Any] = []
        for output in self.outputs():
            end = (None, output.finish_reason, output.stop_reason, output.token_ids)
            if shape.chat:
                choices.append(_ChatChoice(output.index, _Message("assistant", output.text), *end))
            else:
                choices.append(_TextChoice(output.index, output.text, *end))
        kind = "chat.completion" if shape.chat else "text_completion"
        envelope = _Envelope(
            shape.id_of(started),
            kind,
            shape.created,
            started.model,
            shape.fingerprint,
            choices,
            _usage(event.usage),
            event.seed,
        )
        return _encode(envelope)


def _usage(usage: Usage) -> _Usage:
    return _Usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, _Cached(usage.cached_tokens))
