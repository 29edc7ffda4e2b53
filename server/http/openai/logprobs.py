"""Log-probabilities in OpenAI's two styles: chat, and the older one of completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from server.generation import PromptLogprobs, Token, TokenLogprobs


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


class TextOffsets:
    """Where the tokens of one choice begin in its text, in characters. Owns how far they have come.

    Special tokens that are left out of the text take no room in it, nor does what is no whole character yet.
    """

    def __init__(self, skip_special_tokens: bool) -> None:
        self._skips = skip_special_tokens
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, tokens: Sequence[Token], text: str) -> list[int]:
        """Of a prompt that is echoed as `text`: as it was sent, so it may lack tokens that were put around it."""
        offsets = []
        for token in tokens:
            offsets.append(self._at)
            new = self._decoder.decode(token.data)
            if text.startswith(new, self._at):
                self._at += len(new)
        self._decoder.reset()
        return offsets

    def of(self, tokens: Sequence[Token]) -> list[int]:
        """Of the next tokens of the output."""
        offsets = []
        for token in tokens:
            offsets.append(self._at)
            if not (self._skips and token.special):
                self._at += len(self._decoder.decode(token.data))
        return offsets


def prompt_text_logprobs(prompt: PromptLogprobs, text: str, offsets: TextOffsets) -> TextLogprobs:
    """Those of a prompt that is echoed as `text`, in the style of completions. Nothing predicts its first token."""
    tokens = [prompt.first if item is None else item.token for item in prompt.tokens]
    return _text_logprobs(tokens, prompt.tokens, offsets.of_prompt(tokens, text))


def text_logprobs(items: Sequence[TokenLogprobs], offsets: TextOffsets) -> TextLogprobs:
    """Those of the next tokens of the output, in the style of completions."""
    tokens = [item.token for item in items]
    return _text_logprobs(tokens, items, offsets.of(tokens))


def joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    """Both as one."""
    return TextLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def _text_logprobs(tokens: Sequence[Token], items: Sequence[TokenLogprobs | None], offsets: list[int]) -> TextLogprobs:
    return TextLogprobs(
        [token.text for token in tokens],
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
