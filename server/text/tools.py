"""Tool calls in a model's own words: how they are written, found in text that arrives in pieces, and made obligatory.

hermes (Qwen, Hermes)   <tool_call>{"name": "f", "arguments": {…}}</tool_call>, as many as it likes, after any text
llama3 (Llama 3.1 on)   {"name": "f", "parameters": {…}} as the whole answer, several joined by "; "
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.text.grammar import SCHEMA_OPTIONS

ToolFormat = Literal["hermes", "llama3"]

_OPEN, _CLOSE, _PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"
_ARGUMENTS: dict[ToolFormat, str] = {"hermes": "arguments", "llama3": "parameters"}
_NAME = re.compile(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(,|\})')
_KEY = re.compile(r'\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')


def tool_format(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls; None if the template knows nothing of tools."""
    if "tools" not in template:
        return None
    if _OPEN in template:
        return "hermes"
    return "llama3" if '"parameters"' in template or "python_tag" in template else None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of one call: its name comes first and once, then its arguments, JSON in pieces."""

    index: int
    name: str | None
    arguments: str


class ToolParser:
    """Splits the text of one choice into what is said and what is called. Owns the text that may still become either.

    What looked like a call and is none is given back as text, so that nothing is lost. `num_calls`: begun so far.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.num_calls = 0
        self._form = form
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._depth = 0
        self._quoted = self._escaped = False
        self._at_start = True

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """What of the text so far is certain to be said, and the calls that have come forward."""
        self._held += text
        said: list[str] = []
        calls: list[CallDelta] = []
        while self._step(said, calls):
            pass
        return "".join(said), calls

    def flush(self) -> tuple[str, list[CallDelta]]:
        """The rest, once no text will follow."""
        held, self._held = self._held, ""
        if self._state in ("arguments", "tail"):
            return "", []
        opened = _OPEN if self._state == "head" and self._form == "hermes" else ""
        return (opened + held if self._form == "hermes" or held.strip() else held), []

    def _step(self, said: list[str], calls: list[CallDelta]) -> bool:
        """One move of the automaton; False when it needs more text."""
        if self._state == "text":
            return self._hermes_text(said) if self._form == "hermes" else self._llama_text(said)
        if self._state == "head":
            return self._head(said, calls)
        if self._state == "arguments":
            return self._arguments(calls)
        return self._tail()

    def _hermes_text(self, said: list[str]) -> bool:
        at = self._held.find(_OPEN)
        before = self._held if at < 0 else self._held[:at]
        # Line ends before a call, and between two, are part of how it is written.
        blank = self._at_start and not before.strip()
        if at >= 0:
            said.append("" if blank else before)
            self._held, self._state, self._at_start = self._held[at + len(_OPEN) :], "head", False
            return True
        if blank:
            return False
        self._at_start = False
        keep = next(size for size in range(min(len(before), len(_OPEN) - 1), -1, -1) if self._ends_like(size))
        if not before[: len(before) - keep].strip() and not said and keep:
            self._at_start = True
            return False
        said.append(before[: len(before) - keep])
        self._held = before[len(before) - keep :]
        return False

    def _ends_like(self, size: int) -> bool:
        return size == 0 or _OPEN.startswith(self._held[-size:])

    def _llama_text(self, said: list[str]) -> bool:
        """Only what begins the answer can be a call."""
        start = self._held.lstrip()
        if self._at_start:
            if not start or (_PYTHON.startswith(start) and start != _PYTHON):
                return False
            if start.startswith(_PYTHON):
                self._held = start[len(_PYTHON) :]
                return True
            if start.startswith("{"):
                self._held, self._state = start, "head"
                return True
            self._at_start = False
        said.append(self._held)
        self._held = ""
        return False

    def _head(self, said: list[str], calls: list[CallDelta]) -> bool:
        """Up to where the arguments begin."""
        body = self._held.lstrip()
        found = _NAME.match(body)
        if found is not None and found[2] == "}":  # a call without arguments
            self._begin(json.loads(found[1]), calls)
            calls.append(CallDelta(self.num_calls - 1, None, "{}"))
            self._held, self._state = body[found.end() :], "tail"
            return True
        key = _KEY.match(body, found.end()) if found is not None else None
        if found is not None and key is not None:
            self._begin(json.loads(found[1]), calls)
            self._held, self._state = body[key.end() :], "arguments"
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if len(body) > 1024 or (body and not body.startswith("{")) or _CLOSE in body:
            # No call of this form: it is text after all.
            said.append((_OPEN if self._form == "hermes" else "") + self._held)
            self._held, self._state, self._at_start = "", "text", False
        return False

    def _begin(self, name: str, calls: list[CallDelta]) -> None:
        calls.append(CallDelta(self.num_calls, name, ""))
        self.num_calls += 1

    def _arguments(self, calls: list[CallDelta]) -> bool:
        """Characters of one JSON value, passed on as they are."""
        for position, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            ended = self._depth < 0 or (self._depth == 0 and not self._quoted and character in '}]"')
            if ended:
                stop = position + (self._depth == 0)
                if stop:
                    calls.append(CallDelta(self.num_calls - 1, None, self._held[:stop]))
                self._held, self._state = self._held[stop:], "tail"
                return True
        if self._held:
            calls.append(CallDelta(self.num_calls - 1, None, self._held))
            self._held = ""
        return False

    def _tail(self) -> bool:
        """What closes a call, up to where another one may begin."""
        if self._form == "hermes":
            at = self._held.find(_CLOSE)
            if at < 0:
                return False
            self._held, self._state, self._at_start = self._held[at + len(_CLOSE) :], "text", True
            return True
        rest = self._held.lstrip(" \n}")
        if not rest.startswith(";"):
            return False
        rest = rest[1:].lstrip()
        if not rest.startswith("{"):
            return False
        self._held, self._state = rest, "head"
        return True


def call_grammar(form: ToolFormat, tools: Sequence[Mapping[str, Any]], parallel: bool, free_text: bool) -> str:
    """A grammar (server.text.grammar, kind "grammar") of answers that call these functions as they are declared.

    free_text: whether the answer may be, or begin with, plain text; else it is one call, or several where parallel.
    """
    calls = [_call_schema(form, tool) for tool in tools]
    schema = json.dumps({"anyOf": calls, "x-guidance": SCHEMA_OPTIONS})
    if form == "hermes":
        call = f'call: "{_OPEN}\\n" %json {schema} "\\n{_CLOSE}"'
        many = 'call ("\\n" call)*' if parallel else "call"
        text = f"TEXT: /(?s:.*)/ & ~/(?s:.*){_OPEN}(?s:.*)/"
        return f"start: TEXT | TEXT {many}\n{call}\n{text}\n" if free_text else f"start: {many}\n{call}\n"
    many = 'call ("; " call)*' if parallel else "call"
    start = f"start: TEXT | {many}\nTEXT: /[^{{\\s](?s:.*)/\n" if free_text else f"start: {many}\n"
    return f"{start}call: %json {schema}\n"


def _call_schema(form: ToolFormat, tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    key = _ARGUMENTS[form]
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: function.get("parameters") or {"type": "object"}},
        "required": ["name", key],
        "additionalProperties": False,
    }


class ReasoningParser:
    """Splits text into what stands between <think> and </think>, at its very begin, and what follows."""

    _OPEN, _CLOSE = "<think>", "</think>"

    def __init__(self, inside: bool) -> None:
        """inside: whether the prompt has opened it already."""
        self._state: Literal["start", "inside", "after", "outside"] = "inside" if inside else "start"
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that are certain by now."""
        if self._state == "outside":
            return "", text
        self._held += text
        reasoning = ""
        if self._state == "start":
            start = self._held.lstrip()
            if self._OPEN.startswith(start) and start != self._OPEN:
                return "", ""
            if not start.startswith(self._OPEN):
                self._state = "outside"
                return "", self._take()
            self._held, self._state = start[len(self._OPEN) :], "inside"
        if self._state == "inside":
            at = self._held.find(self._CLOSE)
            if at < 0:
                keep = next(n for n in range(min(len(self._held), 7), -1, -1) if self._ends_like(n))
                reasoning = self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                return reasoning, ""
            reasoning = self._held[:at]
            self._held, self._state = self._held[at + len(self._CLOSE) :], "after"
        # The line ends between both belong to neither.
        answer = self._held.lstrip("\n")
        if answer:
            self._state, self._held = "outside", ""
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """The rest, once no text will follow."""
        return (self._take(), "") if self._state == "inside" else ("", self._take() if self._state == "start" else "")

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held

    def _ends_like(self, size: int) -> bool:
        return size == 0 or self._CLOSE.startswith(self._held[-size:])
