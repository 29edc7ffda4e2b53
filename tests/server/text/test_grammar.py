"""Grammars as they are sent: which are sound, and what is said of the others."""

from __future__ import annotations

import json
import time
from typing import Any

import llguidance
import numpy as np
import pytest

from server.engine.grammar import GrammarError, Grammars
from server.text.grammar import SCHEMA_OPTIONS, GrammarProblem, compile_grammar
from tests.server.text.tokenizers import byte_level


def accepts(grammar: str, text: str) -> bool:
    """Whether a whole text matches, byte by byte."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("kind", "value", "inside", "outside"),
    [
        ("regex", "a+b?", ["a", "aab"], ["", "b", "abb"]),
        ("choice", ['say "hi"\n', "é 🦊\\", "{x}"], ['say "hi"\n', "é 🦊\\", "{x}"], ["say", "x", ""]),
        ("grammar", 'start: "a" start "b" | "c"', ["c", "aacbb"], ["", "acbb", "ab"]),
        (
            "json_schema",
            {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            ["[]", "[1, 2]"],
            ["[1,2,3]", "1"],
        ),
        ("json_schema", {}, ['{"a": [null]}', "3"], ["", "{a}"]),
        (
            "json_schema",
            {"x-guidance": {"lenient": True, "whitespace_flexible": False}, "type": "object"},
            ["{}", '{ "a" : 1 }', '{\n  "a": 1\n}'],
            ["[]", '{  "a": 1}', "{\n\n}"],
        ),
    ],
)
def test_what_matches(kind: Any, value: Any, inside: list[str], outside: list[str]) -> None:
    grammar = compile_grammar(kind, value)
    assert [text for text in inside if not accepts(grammar, text)] == []
    assert [text for text in outside if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("kind", "value", "unsupported", "said"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, True, "uniqueItems"),
        ("json_schema", {"if": {}, "then": {}}, True, "if, then"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {"type": "null"}}, True, "not"),
        ("json_schema", {"oneOf": [{"type": "object"}, {"type": "object"}]}, True, "oneOf"),
        ("json_schema", {"$ref": "http://127.0.0.1:1/x"}, True, r"\$ref"),
        ("json_schema", {"type": "string", "format": "horoscope"}, True, "horoscope"),
        ("json_schema", {"type": "string", "pattern": "a(?=b)"}, True, "look-around"),
        ("json_schema", {"type": "nothing"}, False, "nothing"),
        ("json_schema", {"$ref": "#/absent"}, False, "absent"),
        ("regex", "(a", False, r"is not valid: unclosed group\.$"),
        ("regex", r"a\b", True, "look-around"),
        ("regex", r"[^\x00-\U0010ffff]", False, "matches no text"),
        ("regex", "(a{1000}){1000}", True, "too complex"),
        ("json_schema", {"$schema": "http://127.0.0.1:1/x"}, True, r"\$schema"),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1900)}}, True, "too complex"),
        ("grammar", "start: start", False, "matches no text"),
        ("grammar", "start: <|end_of_text|>", False, "by its id"),
        ("grammar", "start: nowhere", False, r"is not valid: line 1, column 8: unknown name: \"nowhere\"\.$"),
        ("grammar", "((", False, "not valid"),
        ("regex", "a" * 65_537, True, "65537 characters"),
        ("json_schema", {"enum": ["x" * 100] * 700}, True, "characters"),
    ],
)
def test_what_is_refused_is_named(kind: Any, value: Any, unsupported: bool, said: str) -> None:
    with pytest.raises(GrammarProblem, match=said) as caught:
        compile_grammar(kind, value)
    assert caught.value.unsupported is unsupported
    assert str(caught.value).startswith(kind)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "((a{1,1000}){1,1000}){1,1000}"),
        ("regex", "(a|b)*a(a|b){200}"),
        ("regex", "(" + "|".join("a" * i + "b" for i in range(350)) + ")*c"),
        ("grammar", 'start: start start | "a" | start "b" start'),
        ("json_schema", {"type": "string", "maxLength": 10**7}),
        ("json_schema", {"type": "string", "pattern": "^(.{0,200}x){50}$"}),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(480)}}),
    ],
)
def test_hostile_grammars_cost_little(kind: Any, value: Any) -> None:
    """Far above what was measured (0.15 s), far below what would be felt: nothing grows without bound."""
    began = time.monotonic()
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), compile_grammar(kind, value))
    for _ in range(50):
        ids = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_error() or not len(ids):
            break
        matcher.consume_token(int(ids[0]))
    assert time.monotonic() - began < 3


def test_both_processes_have_the_same_limits() -> None:
    """2,000 arrays of different lengths: far below the length of a text that is compiled, and seconds of work."""
    schema = {"anyOf": [{"type": "array", "maxItems": size} for size in range(1, 1700)]}
    began = time.perf_counter()
    with pytest.raises(GrammarProblem, match="too big"):
        compile_grammar("json_schema", schema)
    assert time.perf_counter() - began < 1
    made = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SCHEMA_OPTIONS)  # type: ignore[arg-type]
    began = time.perf_counter()
    with pytest.raises(GrammarError, match="too big"):
        Grammars(byte_level().to_str(), 362, [0]).matcher(made)
    assert time.perf_counter() - began < 1
