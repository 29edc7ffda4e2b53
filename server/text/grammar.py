"""What the output must look like, from a request's words to a grammar that the engine can use, or what is wrong.

Four kinds: a JSON schema, a regular expression, a grammar in llguidance's dialect of Lark, a list of choices. Nothing
of the model is needed to tell whether one is sound.
"""

from __future__ import annotations

import json
import re
from typing import Any

import llguidance

from server.engine.grammar_limits import NO_SPECIAL_NAMES, grammar_limits
from server.generation import GrammarKind

MAX_CHARACTERS = 64 * 1024
# Between the parts of JSON: one space, or a line end and what indents the next line. So a model may write as it is used
# to; with more freedom, one that does not know where to go on writes spaces.
_WHITESPACE = r"( |\n {0,12})?"
# Whatever a schema says about these ("x-guidance"), it is so.
SCHEMA_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
_UNSUPPORTED = re.compile(
    r"Unimplemented keys: (?P<keys>\[.*?\])|(?P<format>Unknown format: \S+)|(?P<oneof>oneOf constraints)"
    r"|(?P<look>look-around|lookarounds)|(?P<reference>is not present in a registry)"
    r"|(?P<complex>too many expressions|row has \d+ items)"
)


class GrammarProblem(Exception):
    """What is wrong with a grammar, for a person. unsupported: it may be right, and is not carried out here."""

    def __init__(self, message: str, unsupported: bool) -> None:
        super().__init__(message)
        self.unsupported = unsupported


def compile_grammar(kind: GrammarKind, value: Any) -> str:
    """The grammar in llguidance's own words. Bounded in time, by the length of the text: 0.2 s. Raises GrammarProblem.

    value: a schema as an object, a text, or a list of texts. May be called from several threads.
    """
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > MAX_CHARACTERS:
            raise GrammarProblem(f"{kind} has {size} characters; up to {MAX_CHARACTERS} are compiled.", True)
        made = _make(kind, value)
    except (ValueError, RecursionError) as error:
        raise GrammarProblem(f"{kind} cannot be used: {_one_line(str(error))}", False) from error
    limits = grammar_limits()
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(made, limits=limits)
    if failed:
        raise _problem(kind, messages[0] if messages else "it is not valid")
    _check_begin(kind, made, limits)
    return made


def _make(kind: GrammarKind, value: Any) -> str:
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=SCHEMA_OPTIONS)  # type: ignore[arg-type]
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if kind == "grammar":
        return llguidance.LLMatcher.grammar_from_lark(value)
    alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
    return llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}")


def _check_begin(kind: GrammarKind, made: str, limits: llguidance.LLParserLimits) -> None:
    """Refuse what no text at all matches, as far as its first byte shows, and what costs too much to begin with."""
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), made, log_level=0, limits=limits)
    allowed = matcher.compute_bitmask()
    if matcher.is_error() and "special_token" not in matcher.get_error():
        raise _problem(kind, matcher.get_error())
    first = next(
        (position * 8 + (bits & -bits).bit_length() - 1 for position, bits in enumerate(allowed) if bits), None
    )
    if first is None:
        raise GrammarProblem(f"{kind} matches no text.", False)
    # Having spent all that it may, it says so only when it is asked to go on.
    if not matcher.consume_token(first):
        raise _problem(kind, matcher.get_error())


def _problem(kind: GrammarKind, message: str) -> GrammarProblem:
    found = _UNSUPPORTED.search(message)
    if "unknown special token" in message:
        return GrammarProblem(f"{kind} is not valid: {NO_SPECIAL_NAMES}.", False)
    if "NoExtensionBias" in message:
        return GrammarProblem(f"{kind} matches no text.", False)
    if found is None:
        return GrammarProblem(f"{kind} is not valid: {_reason(message)}", False)
    if found["keys"]:
        names = ", ".join(json.loads(found["keys"]))
        return GrammarProblem(f"{kind} uses what is not supported: {names}.", True)
    if found["oneof"]:
        return GrammarProblem(f"{kind} uses what is not supported: oneOf with alternatives that may overlap.", True)
    if found["look"]:
        return GrammarProblem(f"{kind} uses what is not supported: look-around.", True)
    if found["reference"]:
        return GrammarProblem(f"{kind} uses what is not supported: another document, by $ref or $schema.", True)
    if found["complex"]:
        return GrammarProblem(
            f"{kind} is too complex: with fewer repetitions or alternatives it may be supported.", True
        )
    return GrammarProblem(f"{kind} uses what is not supported: {_one_line(message)}.", True)


def _reason(message: str) -> str:
    """What llguidance says was wrong, and in which line and column; not the text that it repeats around that."""
    inner = re.search(r"^error: (.+)$", message, re.MULTILINE)
    first = re.match(r"(?:at )?(?P<line>\d+)\((?P<column>\d+)\): (?P<what>.+)", message)
    if inner is not None:
        return f"{_one_line(inner[1])}."
    if first is not None:
        return f"line {first['line']}, column {first['column']}: {_one_line(first['what'])}."
    return _one_line(message)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
