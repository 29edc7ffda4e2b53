"""The native dialect's answers as bytes: one JSON body, or the events of a stream.

A token's event is built by one struct encoder and one concatenation, about a microsecond: no model is validated on the
way out, what goes in is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.generation import (
    ChoiceFinished,
    Completed,
    DryRun,
    ExplainedToken,
    GenerationRequest,
    Problem,
    PromptLogprobs,
    Started,
    TextDelta,
    Timings,
    TokenLogprobs,
    Usage,
)
from server.http.errors import error_object

KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"[DONE]"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Show:
    """What an answer holds beside text."""

    token_ids: bool = False
    logprobs: bool = False
    explain: bool = False

    @classmethod
    def of(cls, request: GenerationRequest) -> Show:
        """What a request asks for."""
        return cls(request.return_token_ids, request.logprobs is not None, request.explain is not None)

    @property
    def tokens(self) -> bool:
        """Whether there is something to show of a token without text."""
        return self.token_ids or self.logprobs or self.explain


class _TopToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float


class _Logprobs(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float
    top: list[_TopToken]


class _Candidate(msgspec.Struct, frozen=True):
    id: int
    text: str
    probability: float
    final_probability: float
    removed_by: str | None
    interval: tuple[int, int]


class _Explained(msgspec.Struct, frozen=True):
    id: int
    text: str
    position: int
    r: int
    K: int
    candidates: list[_Candidate]


class _Chunk(msgspec.Struct, frozen=True):
    id: str | None
    index: int
    text: str
    token_ids: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[_Logprobs] | msgspec.UnsetType = msgspec.UNSET
    explain: list[_Explained] | msgspec.UnsetType = msgspec.UNSET


class _PromptChunk(msgspec.Struct, frozen=True):
    id: str | None
    prompt_logprobs: list[_Logprobs | None]


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
    logprobs: list[_Logprobs] | msgspec.UnsetType = msgspec.UNSET
    explain: list[_Explained] | msgspec.UnsetType = msgspec.UNSET


class _Answer(msgspec.Struct, frozen=True):
    id: str
    model: str
    seed: int
    outputs: list[_Output]
    usage: _Usage
    timings: _Timings
    prompt_logprobs: list[_Logprobs | None] | msgspec.UnsetType = msgspec.UNSET


class EventWriter:
    """Turns one request's events into server-sent events, numbered from 0 across all its outputs."""

    __slots__ = ("_count", "_show", "_tokens", "id")

    def __init__(self, show: Show, id: str | None = None) -> None:
        self.id = id
        self._show = show
        self._tokens = show.tokens
        self._count = 0

    def started(self, event: Started) -> bytes:
        """Nothing of its own: the events to come carry the id."""
        self.id = event.id
        return b""

    def delta(self, event: TextDelta) -> bytes:
        """New text; empty when there is nothing to show: a token without text yet, and no ids asked for."""
        if self._tokens:
            return self._event(_encode(_Chunk(self.id, event.index, event.text, *shown(self._show, event))))
        return self._event(_encode(_Chunk(self.id, event.index, event.text))) if event.text else b""

    def prompt(self, event: PromptLogprobs) -> bytes:
        """The log-probabilities of the prompt, in an event of their own before any text."""
        return self._event(_encode(_PromptChunk(self.id, prompt_logprobs(event))))

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

    def __init__(self, show: Show) -> None:
        self.show = show
        self._tokens = show.tokens
        self._texts: dict[int, list[str]] = {}
        self._deltas: dict[int, list[TextDelta]] = {}  # where more is shown than text
        self._finished: dict[int, ChoiceFinished] = {}
        self.prompts: dict[int, PromptLogprobs] = {}

    def delta(self, event: TextDelta) -> None:
        self._texts.setdefault(event.index, []).append(event.text)
        if self._tokens:
            self._deltas.setdefault(event.index, []).append(event)

    def prompt(self, event: PromptLogprobs) -> None:
        self.prompts[event.index] = event

    def whole(self, index: int) -> TextDelta:
        """All that an output has brought as one delta; without tokens where only the text is shown."""
        deltas = self._deltas.get(index, ())
        return TextDelta(
            index,
            "".join(self._texts.get(index, ())),
            tuple(token_id for delta in deltas for token_id in delta.token_ids),
            tuple(item for delta in deltas for item in delta.logprobs),
            tuple(item for delta in deltas for item in delta.explained),
        )

    def finished(self, event: ChoiceFinished) -> None:
        self._finished[event.index] = event

    def outputs(self) -> list[_Output]:
        """Every output that has finished."""
        found = []
        for index, end in sorted(self._finished.items()):
            whole = self.whole(index)
            ids, logprobs, explain = shown(self.show, whole)
            reason = end.finish_reason.value
            found.append(_Output(index, whole.text, reason, end.stop_reason, ids, logprobs, explain))
        return found

    def answer(self, started: Started, event: Completed) -> bytes:
        """The whole body, once every output has finished."""
        prompt = self.prompts.get(0)
        answer = _Answer(
            started.id,
            started.model,
            event.seed,
            self.outputs(),
            _usage(event.usage),
            _timings(event.timings),
            msgspec.UNSET if prompt is None else prompt_logprobs(prompt),
        )
        return _encode(answer)


_Shown = tuple[
    tuple[int, ...] | msgspec.UnsetType, list[_Logprobs] | msgspec.UnsetType, list[_Explained] | msgspec.UnsetType
]


def shown(show: Show, event: TextDelta) -> _Shown:
    """The members of an output, or of a piece of one, that were asked for."""
    return (
        event.token_ids if show.token_ids else msgspec.UNSET,
        [_logprobs(item) for item in event.logprobs] if show.logprobs else msgspec.UNSET,
        [_explained(item) for item in event.explained] if show.explain else msgspec.UNSET,
    )


def _logprobs(item: TokenLogprobs) -> _Logprobs:
    top = [_TopToken(token.id, token.text, logprob) for token, logprob in item.top]
    return _Logprobs(item.token.id, item.token.text, item.logprob, top)


def prompt_logprobs(event: PromptLogprobs) -> list[_Logprobs | None]:
    """Those of a prompt in the native form."""
    return [None if item is None else _logprobs(item) for item in event.tokens]


def _explained(item: ExplainedToken) -> _Explained:
    explanation = item.explanation
    candidates = [
        _Candidate(
            token.id,
            token.text,
            each.probability,
            each.final_probability,
            each.removed_by,
            (each.start, each.end),
        )
        for token, each in zip(item.candidates, explanation.candidates, strict=True)
    ]
    return _Explained(
        item.token.id,
        item.token.text,
        explanation.position,
        explanation.random,
        explanation.total,
        candidates,
    )


def dry_run_body(run: DryRun, with_token_ids: bool) -> bytes:
    """The answer to `dry_run`, in every dialect."""
    count = len(run.prompt_token_ids)
    body: dict[str, Any] = {
        "id": run.id,
        "model": run.model,
        "dry_run": True,
        "parameters": run.parameters,
        "usage": {"prompt_tokens": count, "cached_tokens": run.cached_tokens},
    }
    if with_token_ids:
        body["prompt_token_ids"] = run.prompt_token_ids
    return _encode(body)


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
