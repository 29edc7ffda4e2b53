"""Chat templates: messages to the text that the model was tuned on.

A template is a small program that comes with the model, never with a request. It runs in jinja2's immutable sandbox,
with the names that Hugging Face templates expect: `messages`, `add_generation_prompt`, the special tokens, `tools`,
`raise_exception`, `strftime_now`, the `tojson` filter, `break` and `continue`, and the `generation` block, which marks
what a model is trained on and means nothing here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ("system", "developer", "user", "assistant", "tool")


class TemplateError(Exception):
    """The template refuses these messages, or fails on them. One line for a person."""


class _Raised(jinja2.TemplateError):
    """What a template itself says of the messages, for whoever sent them: `said`."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = " ".join(said.split())[:300]


def _raise_exception(message: str) -> NoReturn:
    raise _Raised(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Plain JSON: jinja2's own filter escapes &, <, > and ' for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class _GenerationBlock(Extension):
    tags: set[str] = {"generation"}  # noqa: RUF012 - declared like this in jinja2's Extension

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """One compiled template. Immutable; render may be called from several threads.

    Raises TemplateError when the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's chat template does not compile: {_one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt's text. Raises TemplateError."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                **self._special_tokens,
            )
        except _Raised as error:
            raise TemplateError(f"the model's chat template refuses these messages: {error.said}") from error
        # A template is a program of somebody else's: whatever it trips over is a problem of these messages. The words
        # of such an error are Python's, which know addresses and paths.
        except Exception as error:
            kind = type(error).__name__
            raise TemplateError(f"the model's chat template fails on these messages ({kind})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def message_problems(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What is wrong with the shape of messages: pairs of where (`messages[2].content`) and what is allowed there."""
    found: list[tuple[str, str]] = []
    if not messages:
        found.append(("messages", "at least one message"))
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if message.get("role") not in ROLES:
            found.append((f"{where}.role", "one of " + ", ".join(ROLES)))
        content = message.get("content")
        if isinstance(content, str):
            continue
        if isinstance(content, (list, tuple)):
            for index, part in enumerate(content):
                text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
                if not text:
                    found.append((f"{where}.content[{index}]", '{"type": "text", "text": "…"}'))
            continue
        if content is None and message.get("role") == "assistant" and message.get("tool_calls"):
            continue
        found.append((f"{where}.content", "a string, or a list of text parts"))
    return found


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: contents as strings, text parts joined; arguments of calls as objects."""
    flat: list[dict[str, Any]] = []
    for message in messages:
        copy = dict(message)
        content = copy.get("content")
        if isinstance(content, (list, tuple)):
            copy["content"] = "".join(part["text"] for part in content)
        elif content is None:
            copy["content"] = ""
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_with_arguments(call) for call in copy["tool_calls"]]
        flat.append(copy)
    return flat


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, as OpenAI's wire has them in JSON."""
    function = dict(call.get("function", {}))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(arguments)
    return {**call, "function": function}
