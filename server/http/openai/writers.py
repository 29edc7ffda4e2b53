"""Answers and chunks in OpenAI's shapes: what the official clients parse, and nothing that they would stumble over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from server.engine.request import FinishReason
from server.generation import (
    ChoiceFinished,
    Completed,
    Problem,
    PromptLogprobs,
    Started,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from server.http.errors import error_object
from server.http.openai.logprobs import (
    ChatLogprobs,
    TextLogprobs,
    TextOffsets,
    chat_logprobs,
    joined,
    prompt_text_logprobs,
    text_logprobs,
)
from server.http.sse import AnswerBuilder, Show, prompt_logprobs, shown

_TOOL_CALLS = "tool_calls"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request's answer looks like.

    num_choices   of all prompts; choices_per_prompt: of each
    show, echo    what there is beside text, and whether the text begins with the prompt
    skips_special whether special tokens are left out of the text
    own_id        the request's own id, which is not given a prefix
    """

    chat: bool
    fingerprint: str
    num_choices: int
    choices_per_prompt: int
    include_usage: bool
    show: Show
    echo: bool
    own_id: bool
    skips_special: bool = True
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


class _Function(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class _Call(msgspec.Struct, frozen=True):
    function: _Function
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class _Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[_Call] | UnsetType = UNSET


class _ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    explain: Any = UNSET
    prompt_logprobs: Any = UNSET


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[_Call] | UnsetType = UNSET


class _ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | UnsetType
    explain: Any = UNSET
    prompt_logprobs: Any = UNSET


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: tuple[int, ...] | UnsetType = UNSET
    explain: Any = UNSET
    prompt_logprobs: Any = UNSET


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
        self._offsets: dict[int, TextOffsets] = {}  # of each choice that has begun
        self._prompts: dict[int, PromptLogprobs] = {}

    def started(self, event: Started) -> bytes:
        """In a chat, the role of every choice."""
        self._id, self._model = self._shape.id_of(event), event.model
        if not self._shape.chat:
            return b""
        roles = (_ChatChunkChoice(index, _Delta("assistant", "")) for index in range(self._shape.num_choices))
        return b"".join(self._chunk(role) for role in roles)

    def delta(self, event: TextDelta) -> bytes:
        """New text; empty when there is nothing to show."""
        show = self._shape.show
        spoken = b""
        if event.reasoning or event.calls:
            calls = [_call(call) for call in event.calls] or UNSET
            delta = _Delta(reasoning_content=event.reasoning or UNSET, tool_calls=calls)
            spoken = self._chunk(_ChatChunkChoice(event.index, delta))
        return spoken + self._said(show, event)

    def _said(self, show: Show, event: TextDelta) -> bytes:
        if not show.tokens:
            if not event.text:
                return b""
            if self._shape.chat:
                return self._chunk(_ChatChunkChoice(event.index, _Delta(content=event.text)))
            return self._chunk(_TextChoice(event.index, event.text))
        ids, _, explain = shown(show, event)
        if self._shape.chat:
            chat = chat_logprobs(event.logprobs) if show.logprobs else None
            choice: Any = _ChatChunkChoice(
                event.index, _Delta(content=event.text), chat, token_ids=ids, explain=explain
            )
            return self._chunk(choice)
        logprobs = None
        if show.logprobs:
            prompt = self._prompts.get(event.index - event.index % self._shape.choices_per_prompt)
            offsets = self._offsets.get(event.index)
            begins = offsets is None
            if offsets is None:
                offsets = self._offsets[event.index] = TextOffsets(self._shape.skips_special)
            # The prompt's text comes once, before everything else of the choice.
            if begins and prompt is not None:
                logprobs = prompt_text_logprobs(prompt, event.text, offsets)
            else:
                logprobs = text_logprobs(event.logprobs, offsets)
        return self._chunk(_TextChoice(event.index, event.text, logprobs, token_ids=ids, explain=explain))

    def prompt(self, event: PromptLogprobs) -> bytes:
        """The prompt's log-probabilities: a chunk of their own, unless they are part of the echoed text."""
        if self._shape.echo and self._shape.show.logprobs:
            self._prompts[event.index] = event
            return b""
        found = prompt_logprobs(event)
        if self._shape.chat:
            return self._chunk(_ChatChunkChoice(event.index, _Delta(), prompt_logprobs=found))
        return self._chunk(_TextChoice(event.index, "", prompt_logprobs=found))

    def finished(self, event: ChoiceFinished) -> bytes:
        """The end of a choice."""
        reason = _reason(event)
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
        super().__init__(shape.show)
        self._shape = shape
        self._reasoning: dict[int, str] = {}
        self._calls: dict[int, dict[int, _Call]] = {}
        self._called: set[int] = set()

    def delta(self, event: TextDelta) -> None:
        """New text, and what was thought and called beside it."""
        super().delta(event)
        if event.reasoning:
            self._reasoning[event.index] = self._reasoning.get(event.index, "") + event.reasoning
        calls = self._calls.setdefault(event.index, {}) if event.calls else {}
        for news in event.calls:
            before = calls.get(news.index)
            if before is None:
                calls[news.index] = _call(news)
            else:
                function = _Function(before.function.arguments + news.arguments, before.function.name)
                calls[news.index] = _Call(function, UNSET, before.id, before.type)

    def finished(self, event: ChoiceFinished) -> None:
        super().finished(event)
        if event.called:
            self._called.add(event.index)

    def answer(self, started: Started, event: Completed) -> bytes:
        """The body, once every choice has finished."""
        shape = self._shape
        choices: list[Any] = []
        for output in self.outputs():
            items = self.whole(output.index).logprobs
            prompt = self.prompts.get(output.index - output.index % shape.choices_per_prompt)
            reason = output.finish_reason
            if reason == FinishReason.STOP.value and output.index in self._called:
                reason = _TOOL_CALLS
            rest = (reason, output.stop_reason, output.token_ids, output.explain)
            found = UNSET if prompt is None or output.index != prompt.index else prompt_logprobs(prompt)
            if shape.chat:
                chat = chat_logprobs(items) if shape.show.logprobs else None
                calls = [msgspec.structs.replace(c, index=UNSET) for c in self._calls.get(output.index, {}).values()]
                message = _Message(
                    "assistant",
                    output.text or (None if calls else ""),
                    reasoning_content=self._reasoning.get(output.index, UNSET),
                    tool_calls=calls or UNSET,
                )
                choices.append(_ChatChoice(output.index, message, chat, *rest, found))
                continue
            logprobs = None
            if shape.show.logprobs:
                offsets = TextOffsets(shape.skips_special)
                echoed = prompt_text_logprobs(prompt, output.text, offsets) if shape.echo and prompt else None
                logprobs = text_logprobs(items, offsets)
                logprobs = joined(echoed, logprobs) if echoed is not None else logprobs
            found = UNSET if shape.echo and shape.show.logprobs else found
            choices.append(_TextChoice(output.index, output.text, logprobs, *rest, found))
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


def _call(news: ToolCallDelta) -> _Call:
    if news.name is None or news.id is None:
        return _Call(_Function(news.arguments), news.index)
    return _Call(_Function(news.arguments, news.name), news.index, news.id, "function")


def _reason(event: ChoiceFinished) -> str:
    """The finish reason as OpenAI's clients expect it: a choice that stopped after it had called says so."""
    if event.called and event.finish_reason is FinishReason.STOP:
        return _TOOL_CALLS
    return event.finish_reason.value


def _usage(usage: Usage) -> _Usage:
    return _Usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, _Cached(usage.cached_tokens))
