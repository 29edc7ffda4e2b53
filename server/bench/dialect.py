"""The three ways of asking a server for a stream, and what each event of the answer says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIALECTS = ("generate", "completions", "chat")
PATHS = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked for: a prompt, how many tokens at most, and whether the end of sequence is ignored. system: a text
    before the prompt, as a system message in a chat and as the prompt's beginning elsewhere."""

    prompt: str
    max_tokens: int
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int | None = None
    system: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    """name: one of DIALECTS. model: what the OpenAI shapes call it; not needed by `generate`."""

    name: str
    model: str = ""

    @property
    def path(self) -> str:
        return PATHS[self.name]

    def body(self, ask: Ask, stream: bool = True) -> bytes:
        """The request as JSON. `ignore_eos` is an extension of OpenAI's shapes that the servers compared here share; it
        goes out only where it is asked for."""
        body: dict[str, Any] = {"temperature": ask.temperature, "stream": stream}
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.ignore_eos:
            body["ignore_eos"] = True
        joined = f"{ask.system} {ask.prompt}" if ask.system else ask.prompt
        if self.name == "generate":
            body |= {"prompt": joined, "max_new_tokens": ask.max_tokens}
        else:
            body |= {"model": self.model, "max_tokens": ask.max_tokens}
            if stream:
                body["stream_options"] = {"include_usage": True}
            if self.name == "completions":
                body["prompt"] = joined
            else:
                system = [{"role": "system", "content": ask.system}] if ask.system else []
                body["messages"] = [*system, {"role": "user", "content": ask.prompt}]
        return json.dumps(body).encode()


@dataclass(slots=True)
class Usage:
    """Tokens as the server counts them. cached_tokens: of the prompt, those found in a prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Event:
    """What one event says: whether it brings text, the usage, why it ended, what went wrong; done is `[DONE]`."""

    has_text: bool = False
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None
    done: bool = False


def read_event(data: bytes) -> Event:
    """One event of any of the dialects. Raises ValueError if it is neither [DONE] nor a JSON object."""
    if data == b"[DONE]":
        return Event(done=True)
    # Decoded here: json.loads takes longer to guess the encoding of bytes than to read so short a text.
    message, _ = _DECODER.raw_decode(data.decode())
    if not isinstance(message, dict):
        raise ValueError("an event that is no object")
    if "error" in message:
        return Event(error=error_of(message))
    event = Event(has_text=bool(message.get("text")), finish_reason=message.get("finish_reason"))
    for choice in message.get("choices") or ():
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")
        event.has_text |= bool(text)
        event.finish_reason = choice.get("finish_reason") or event.finish_reason
    usage = message.get("usage")
    if usage:
        event.usage = usage_of(usage)
    return event


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """The native `cached_tokens`, and OpenAI's `prompt_tokens_details`."""
    details = usage.get("prompt_tokens_details") or {}
    cached = usage.get("cached_tokens", details.get("cached_tokens", 0))
    return Usage(int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)), int(cached or 0))


def error_of(message: Mapping[str, Any]) -> str:
    """What an error body or event says, in a line."""
    error = message.get("error")
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:200]
