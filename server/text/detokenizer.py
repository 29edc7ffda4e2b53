"""Token ids to text, a few at a time.

The joined pieces equal `Tokenizer.decode` of all the ids at once, byte for byte. That holds by construction for the
decoders that language models use, because their rules are applied here token by token: a table lookup, and then an
automaton that keeps only what later tokens may still change. (Decoding a sliding window and comparing lengths, the
usual way, goes wrong where bytes are invalid, where a special token is skipped before a leading space, and where
byte-fallback runs end; so does the library's own DecodeStream.)

    byte level (GPT-2, Llama 3, Qwen)          bytes; up to three wait for the rest of their character
    byte fallback (Llama 2, Gemma, Mistral)    text, and runs of byte tokens: a run waits for its end, because one bad
                                               byte turns the whole run into U+FFFD
    metaspace (T5, ALBERT)                     text; the first token loses its leading spaces
    anything else                              a sliding window; equal wherever a decoder only looks back a few tokens
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_WINDOW = 6  # tokens of context for decoders of unknown kind


class Detokenizer(Protocol):
    """The text of one choice, in pieces. Takes ids in order; unknown ids add nothing."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these ids make certain; later ids cannot change it."""
        ...

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD. Nothing may be pushed afterwards."""
        ...


DetokenizerFactory = Callable[[bool, bool], Detokenizer]


def byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in byte-level vocabularies (GPT-2's table): printable Latin-1
    characters for themselves, the other bytes in order as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))})
    return table


class ByteLevelDetokenizer:
    """Bytes, decoded as UTF-8 as far as their characters are complete. Owns at most three pending bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    def push(self, token_ids: Sequence[int]) -> str:
        # Once a token and stream: nearly all of them are whole characters, and come alone.
        data = self._token_bytes(token_ids[0]) if len(token_ids) == 1 else b"".join(map(self._token_bytes, token_ids))
        if self._pending:
            data = self._pending + data
        text, consumed = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[consumed:]
        return text

    def flush(self) -> str:
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


class ByteFallbackDetokenizer:
    """Text tokens as they are, byte tokens in runs. Owns the run that is open and the leading spaces still to strip."""

    def __init__(self, token_piece: Callable[[int], str | int | None], strip: tuple[str, int]) -> None:
        self._token_piece = token_piece
        self._strip, self._left_to_strip = strip
        self._run = bytearray()

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._token_piece(token_id)
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if self._run:
                text += self._end_run()
            text += piece
        return self._stripped(text) if self._left_to_strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        start = 0
        while start < len(text) and self._left_to_strip and text[start] == self._strip:
            start += 1
            self._left_to_strip -= 1
        if start < len(text):
            self._left_to_strip = 0
        return text[start:]


class MetaspaceDetokenizer:
    """Text tokens with a visible space; the first token of the text loses its spaces."""

    def __init__(self, token_text: Callable[[int], str | None], replacement: str, strip_first: bool) -> None:
        self._token_text = token_text
        self._replacement = replacement
        self._strip_next = strip_first

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            token = self._token_text(token_id)
            if token is None:
                continue
            text += token.replace(self._replacement, "" if self._strip_next else " ")
            self._strip_next = False
        return text

    def flush(self) -> str:
        return ""


class WindowDetokenizer:
    """For decoders of unknown kind: decodes the last tokens with and without the new ones, and emits the difference.

    Owns a window of ids. Text that ends in U+FFFD waits, for it may be an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._emitted = 0  # tokens of the window whose text is out

    def push(self, token_ids: Sequence[int]) -> str:
        return self._advance(list(token_ids), wait=True)

    def flush(self) -> str:
        return self._advance([], wait=False)

    def _advance(self, new_ids: list[int], wait: bool) -> str:
        self._ids += new_ids
        before = self._decode(self._ids[: self._emitted])
        after = self._decode(self._ids)
        if len(after) <= len(before) or (wait and after.endswith("\ufffd")):
            return ""
        self._emitted = len(self._ids)
        surplus = self._emitted - _WINDOW
        # The window keeps its first token visible, or a leading space would be stripped in the middle of the text.
        if surplus > 0 and self._decode(self._ids[surplus : surplus + 1]):
            del self._ids[:surplus]
            self._emitted -= surplus
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class _Tables:
    """What each id stands for, worked out when first seen. Shared by all detokenizers of a tokenizer; grows only."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids

    def cached(self, skip_special_tokens: bool, convert: Callable[[str], Any], nothing: Any) -> Callable[[int], Any]:
        """A lookup from id to convert(token); `nothing` for unknown ids and for special ones where they are skipped."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        id_to_token = self._tokenizer.id_to_token

        class Table(dict[int, Any]):
            def __missing__(self, token_id: int) -> Any:
                token = None if token_id in skipped or token_id < 0 else id_to_token(token_id)
                value = self[token_id] = nothing if token is None else convert(token)
                return value

        return Table().__getitem__


def detokenizer_factory(tokenizer: Tokenizer, decoder: dict[str, Any] | None) -> DetokenizerFactory:
    """What makes detokenizers for this tokenizer: factory(skip_special_tokens, continues).

    decoder    the `decoder` member of tokenizer.json
    continues  whether text precedes: then the leading space of the first token is kept
    """
    special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    tables = _Tables(tokenizer, special_ids)
    steps = decoder.get("decoders", []) if decoder and decoder.get("type") == "Sequence" else [decoder or {}]
    kinds = [step.get("type") for step in steps]

    if kinds == ["ByteLevel"]:
        alphabet = byte_level_alphabet()

        def to_bytes(token: str) -> bytes:
            return _byte_level_bytes(token, alphabet)

        bytes_of = {skip: tables.cached(skip, to_bytes, b"") for skip in (False, True)}
        return lambda skip, continues: ByteLevelDetokenizer(bytes_of[skip])

    if kinds == ["Metaspace"]:
        replacement = str(steps[0].get("replacement", "▁"))
        strips = steps[0].get("prepend_scheme", "always") != "never"
        text_of = {skip: tables.cached(skip, str, None) for skip in (False, True)}
        return lambda skip, continues: MetaspaceDetokenizer(text_of[skip], replacement, strips and not continues)

    replaces = [step for step in steps if step.get("type") == "Replace"]
    tail = kinds[len(replaces) :]
    literal = all("String" in step.get("pattern", {}) for step in replaces)
    if literal and tail in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        stripping = steps[-1] if tail[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
        if stripping["stop"] == 0:

            def to_piece(token: str) -> str | int:
                for step in replaces:
                    token = token.replace(step["pattern"]["String"], step["content"])
                byte: re.Match[str] | None = _BYTE_TOKEN.match(token)
                return int(byte[1], 16) if byte else token

            piece_of = {skip: tables.cached(skip, to_piece, None) for skip in (False, True)}
            strip = (str(stripping["content"]), int(str(stripping["start"])))
            return lambda skip, continues: ByteFallbackDetokenizer(
                piece_of[skip], (strip[0], 0) if continues else strip
            )

    return lambda skip, continues: WindowDetokenizer(tokenizer, skip)


def _byte_level_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def token_bytes_of(tokenizer: Tokenizer, decoder: dict[str, Any] | None) -> Callable[[int], bytes]:
    """A function from a token's id to the bytes that it stands for in the middle of a text; of unknown ids b"".

    Exact where one token's bytes depend on no other: byte level, and byte fallback. Elsewhere it is what the token
    decodes to behind another one.
    """
    steps = decoder.get("decoders", []) if decoder and decoder.get("type") == "Sequence" else [decoder or {}]
    kinds = [step.get("type") for step in steps]
    alphabet = byte_level_alphabet()
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}

    def convert(token: str) -> bytes:
        if kinds == ["ByteLevel"]:
            return _byte_level_bytes(token, alphabet)
        byte = _BYTE_TOKEN.match(token) if "ByteFallback" in kinds else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for step in steps:
            if step.get("type") == "Replace" and "String" in step.get("pattern", {}):
                token = token.replace(step["pattern"]["String"], step["content"])
            elif step.get("type") == "Metaspace":
                token = token.replace(str(step.get("replacement", "▁")), " ")
        return token.encode("utf-8")

    class Table(dict[int, bytes]):
        def __missing__(self, token_id: int) -> bytes:
            if token_id in added:
                value = added[token_id].encode("utf-8")
            else:
                token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
                value = b"" if token is None else convert(token)
            self[token_id] = value
            return value

    return Table().__getitem__
