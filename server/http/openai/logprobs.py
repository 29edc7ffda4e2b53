"""Log-probabilities in OpenAI's two styles: chat, and the older one of completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from server.generation import Token, TokenLogprobs


class _TopToken(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class _Token(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_TopToken]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of a message's content."""

    content: list[_Token]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """Of a completion: parallel lists. Tokens that differ in bytes may have one text: the more likely one stays."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(items: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """The chat style."""
    return ChatLogprobs(
        [
            _Token(
                item.token.text,
                item.logprob,
                list(item.token.data),
                [_TopToken(token.text, logprob, list(token.data)) for token, logprob in item.top],
            )
            for item in items
        ]
    )


def text_logprobs(items: Sequence[TokenLogprobs | None], first: Token | None, offset: int) -> TextLogprobs:
    """The style of completions. None: the prompt's first token, `first`, which nothing predicts. offset: characters of
    the text before these tokens."""
    offsets: list[int] = []
    tokens = [first if item is None else item.token for item in items]
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text) if token is not None else 0
    return TextLogprobs(
        ["" if token is None else token.text for token in tokens],
        [None if item is None else item.logprob for item in items],
        [None if item is None else _top(item) for item in items],
        offsets,
    )


def _top(item: TokenLogprobs) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in item.top:
        found.setdefault(token.text, logprob)
    # As OpenAI's: the token itself is always among them.
    found.setdefault(item.token.text, item.logprob)
    return found
