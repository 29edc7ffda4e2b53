"""The native dialect's answers as bytes: one JSON body, or the events of a stream.

A token's event is built by one struct encoder and one concatenation, about a microsecond: no model is validated on the
way out, what goes in is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.generation import ChoiceFinished, Completed, Problem, Started, TextDelta, Timings, Usage
from server.http.errors import error_object

KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"[DONE]"

_encode = msgspec.json.Encoder().encode


class _Chunk(msgspec.Struct, frozen=True):
    id: str | None
    index: int
    text: str
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class _LastChunk(msgspec.Struct, frozen=True):
    id: str | None
    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class _Timings(msgspec.Struct, frozen=True):
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    total_ms: float


class _Summary(msgspec.Struct, frozen=True):
    id: str | None
    seed: int
    usage: _Usage
    timings: _Timings


class _Output(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class _Answer(msgspec.Struct, frozen=True):
    id: str
    model: str
    seed: int
    outputs: list[_Output]
    usage: _Usage
    timings: _Timings


class EventWriter:
    """Turns one request's events into server-sent events, numbered from 0 across all its outputs."""

    __slots__ = ("_count", "_with_token_ids", "id")

    def __init__(self, with_token_ids: bool, id: str | None = None) -> None:
        self.id = id
        self._with_token_ids = with_token_ids
        self._count = 0

    def started(self, event: Started) -> bytes:
        """Nothing of its own: the events to come carry the id."""
        self.id = event.id
        return b""

    def delta(self, event: TextDelta) -> bytes:
        """New text; empty when there is nothing to show: a token without text yet, and no ids asked for."""
        if self._with_token_ids:
            return self._event(_encode(_Chunk(self.id, event.index, event.text, event.token_ids)))
        return self._event(_encode(_Chunk(self.id, event.index, event.text))) if event.text else b""

    def finished(self, event: ChoiceFinished) -> bytes:
        """The one terminal event of an output."""
        last = _LastChunk(self.id, event.index, "", event.finish_reason.value, event.stop_reason)
        return self._event(_encode(last))

    def completed(self, event: Completed) -> bytes:
        """Usage and timings, then the end of the stream."""
        summary = _Summary(self.id, event.seed, _usage(event.usage), _timings(event.timings))
        return self._event(_encode(summary)) + self._event(_DONE)

    def failed(self, open_outputs: Sequence[int], code: str, problems: Sequence[Problem]) -> bytes:
        """`error` on every output still open, then the error itself. No [DONE] follows."""
        ends = [self._event(_encode(_LastChunk(self.id, index, "", "error", None))) for index in open_outputs]
        return b"".join(ends) + self._event(_encode({"error": error_object(code, problems)}))

    def _event(self, data: bytes) -> bytes:
        number = self._count
        self._count = number + 1
        return b"id: %d\ndata: %b\n\n" % (number, data)


class AnswerBuilder:
    """Collects one request's events into the JSON answer. Outputs are listed by index."""

    def __init__(self, with_token_ids: bool) -> None:
        self._with_token_ids = with_token_ids
        self._texts: dict[int, list[str]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._finished: dict[int, ChoiceFinished] = {}

    def delta(self, event: TextDelta) -> None:
        self._texts.setdefault(event.index, []).append(event.text)
        if self._with_token_ids:
            self._token_ids.setdefault(event.index, []).extend(event.token_ids)

    def finished(self, event: ChoiceFinished) -> None:
        self._finished[event.index] = event

    def outputs(self) -> list[_Output]:
        """Every output that has finished."""
        return [
            _Output(
                index,
                "".join(self._texts.get(index, ())),
                end.finish_reason.value,
                end.stop_reason,
                tuple(self._token_ids.get(index, ())) if self._with_token_ids else msgspec.UNSET,
            )
            for index, end in sorted(self._finished.items())
        ]

    def answer(self, started: Started, event: Completed) -> bytes:
        """The whole body, once every output has finished."""
        answer = _Answer(
            started.id, started.model, event.seed, self.outputs(), _usage(event.usage), _timings(event.timings)
        )
        return _encode(answer)


def encode_json(value: Any) -> bytes:
    """Any of our own values as JSON."""
    return _encode(value)


def _usage(usage: Usage) -> _Usage:
    return _Usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens)


def _timings(timings: Timings) -> _Timings:
    # Three decimals are microseconds: more would be noise.
    return _Timings(
        round(timings.queue_ms, 3),
        round(timings.prefill_ms, 3),
        round(timings.decode_ms, 3),
        round(timings.total_ms, 3),
    )
