"""The text side of a model: its tokenizer, chat template and generation defaults, read from the model's folder.

Special tokens in text: in a plain `prompt` they are recognised, as every server of this kind does, because such a
prompt is the whole input and its sender could send the ids as well. In `messages` only those that the template itself
writes are recognised: a user who types `<|im_end|>` has typed ten characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.text.detokenizer import Detokenizer, detokenizer_factory, token_bytes_of
from server.text.template import ChatTemplate, TemplateError, flatten
from server.text.tools import tool_format

_DEFAULTS = ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelTextError(Exception):
    """The model's folder lacks what text needs, or it cannot be read. One line for a person."""


class ModelText:
    """Text to ids and back, for one model. Immutable after `load`; every method may be called from several threads.

    generation_defaults  what the model's generation_config.json says of the parameters that change sampling
    tool_format          how the model writes calls, None where its template knows no tools
    thinks               whether it may reason between <think> and </think> before it answers
    vocab_size           ids that the tokenizer knows, added tokens included; the model may have padded rows beyond
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        config: Mapping[str, Any] | None = None,
        template: str | None = None,
        generation_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """tokenizer_json is the file's text, `config` that of tokenizer_config.json. Raises ModelTextError."""
        config = config or {}
        spec = _object("tokenizer.json", tokenizer_json)
        self._tokenizer = _tokenizer(tokenizer_json)
        self._plain, self._plain_inner = _plain_tokenizers(tokenizer_json, spec)
        decoder = spec.get("decoder")
        self._detokenizers = detokenizer_factory(self._tokenizer, decoder)
        self._token_bytes = token_bytes_of(self._tokenizer, decoder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: (token_id, token) for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(token_id for token_id, _ in self._special.values())
        # Longest first: the alternatives of a pattern are tried in order.
        contents = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents))) if contents else None
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.generation_defaults = dict(generation_defaults or {})
        self.template: ChatTemplate | None = None
        self.tool_format = tool_format(template or "")
        self.thinks = "<think>" in (template or "")
        if template is not None:
            try:
                self.template = ChatTemplate(template, _special_tokens(config))
            except TemplateError as error:
                raise ModelTextError(str(error)) from error

    @classmethod
    def load(cls, folder: Path) -> ModelText:
        """Read a model's folder. Takes from milliseconds to a second. Raises ModelTextError."""
        tokenizer_json = _read(folder, "tokenizer.json")
        if tokenizer_json is None:
            raise ModelTextError(
                f"the model folder {folder} has no tokenizer.json: stet reads the format of Hugging Face's tokenizers"
            )
        config_json = _read(folder, "tokenizer_config.json")
        config = _object("tokenizer_config.json", config_json) if config_json is not None else {}
        generation_json = _read(folder, "generation_config.json")
        generation = _object("generation_config.json", generation_json) if generation_json is not None else {}
        # A template in its own file is the newer habit and wins, as it does in transformers.
        template = _read(folder, "chat_template.jinja")
        if template is None:
            template = _template_source(config.get("chat_template"))
        return cls(
            tokenizer_json, config=config, template=template, generation_defaults=_generation_defaults(generation)
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a plain prompt. `add_special_tokens` puts a beginning token in front where the model has one."""
        return _ids(self._tokenizer, text, add_special_tokens)

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins. Raises TemplateError.

        Equal to tokenizing the rendered template at once, except that special tokens inside the messages, and what is
        said of tools, stay text.
        """
        if self.template is None:
            raise TemplateError("the model has no chat template")
        flat = flatten(messages)
        if self._pattern is None or not any(self._pattern.search(text) for text in _texts([flat, tools])):
            return self.encode(self.template.render(flat, tools=tools), add_special_tokens=False)
        mask = _Mask(flat, tools, self._pattern)
        return self._encode_masked(self.template.render(mask.messages, tools=mask.tools), mask, self._pattern)

    def _encode_masked(self, rendered: str, mask: _Mask, pattern: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        position = 0
        while position < len(rendered):
            found = pattern.search(rendered, position)
            token_id, token = self._special[found[0]] if found is not None else (-1, None)
            text = rendered[position : found.start()] if found is not None else rendered[position:]
            if token is not None and token.lstrip:
                text = text.rstrip()
            if text:
                tokenizer = self._plain if position == 0 else self._plain_inner
                ids += _ids(tokenizer, mask.restore(text), False)
            if found is None or token is None:
                break
            ids.append(token_id)
            position = found.end()
            if token.rstrip:
                position += len(rendered) - position - len(rendered[position:].lstrip())
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all these ids at once. Ids outside the vocabulary add nothing."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token in the middle of a text; of one outside the vocabulary none."""
        return self._token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token_id in self._special_ids

    def detokenizer(self, skip_special_tokens: bool = True, continues: bool = False) -> Detokenizer:
        """A fresh incremental decoder. `continues`: text precedes, so a first leading space is part of the text."""
        return self._detokenizers(skip_special_tokens, continues)


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of a text, by the method that lets other threads run: `encode` holds them all up, half a second a MiB."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


class _Mask:
    """Messages in which special tokens are replaced by characters of private use that the template carries along.

    `restore` puts them back. Roles are not user text: they come from a fixed list.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], special: re.Pattern[str]
    ) -> None:
        used: set[str] = set().union(*_texts([messages, tools]))
        # Two planes of code points that no template strips, changes or escapes; those in the messages stay theirs.
        self._unused = (chr(point) for point in range(0xF0000, 0x10FFFE) if chr(point) not in used)
        self._stand_ins: dict[str, str] = {}
        self._special = special
        self.messages: list[dict[str, Any]] = [self._masked(message) for message in messages]
        self.tools: list[dict[str, Any]] = [self._masked(tool) for tool in tools]

    def restore(self, text: str) -> str:
        for literal, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, literal)
        return text

    def _masked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(self._stand_in, value)
        if isinstance(value, Mapping):
            return {self._masked(key): self._masked(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._masked(item) for item in value]
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[0] not in self._stand_ins:
            self._stand_ins[match[0]] = next(self._unused)
        return self._stand_ins[match[0]]


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _tokenizer(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise ModelTextError(f"tokenizer.json cannot be used: {' '.join(str(error).split())[:200]}") from error
    # The trainer's leftovers: nothing here is padded, or truncated unasked.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _plain_tokenizers(tokenizer_json: str, spec: Mapping[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    """Two tokenizers to which special tokens are plain text: for the begin of a text, and for what comes later in it.

    They differ where the model puts a space in front of a text but not in front of each piece between special tokens.
    """
    first = _tokenizer(tokenizer_json)
    first.encode_special_tokens = True
    inner_spec = _with_prepend_never(spec)
    if inner_spec == spec:
        return first, first
    inner = _tokenizer(json.dumps(inner_spec))
    inner.encode_special_tokens = True
    return first, inner


def _with_prepend_never(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.get("prepend_scheme") == "first" and value.get("type") == "Metaspace":
            return {**value, "prepend_scheme": "never"}
        return {
            key: item if key in ("model", "added_tokens") else _with_prepend_never(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_prepend_never(item) for item in value]
    return value


def _read(folder: Path, name: str) -> str | None:
    """The text of a file of the model's folder; None if there is none. Raises ModelTextError if it cannot be read."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelTextError(f"{folder / name} cannot be read: {error}") from error


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelTextError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelTextError(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value


def _template_source(value: Any) -> str | None:
    """The chat template in tokenizer_config.json: a string, or a list of named ones of which `default` is meant."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        source = named.get("default")
        if isinstance(source, str):
            return source
        return None
    raise ModelTextError("chat_template in tokenizer_config.json is neither a string nor a list of named templates")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like, as strings: each is written as a string or as an object with `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _generation_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The defaults that a model comes with. `do_sample: false` means greedy. What is no number is left out."""
    found: dict[str, float] = {}
    for name in _DEFAULTS:
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
