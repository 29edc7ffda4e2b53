"""Tool calls and reasoning found in text, however it is cut into pieces; and the grammars that demand calls."""

from __future__ import annotations

import json
import random
from typing import Any

import llguidance
import pytest

from server.text.grammar import compile_grammar
from server.text.tools import CallDelta, ReasoningParser, ToolFormat, ToolParser, call_grammar, tool_format

CALL = '{"name": "get_weather", "arguments": {"city": "Łódź \\"}{\\\\", "days": [1, {"x": null}]}}'
ARGUMENTS = '{"city": "Łódź \\"}{\\\\", "days": [1, {"x": null}]}'
LLAMA = CALL.replace('"arguments"', '"parameters"')


def parse(form: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(form)
    said, news = "", list[CallDelta]()
    for piece in pieces:
        text, calls = parser.push(piece)
        said, news = said + text, news + calls
    text, calls = parser.flush()
    said, news = said + text, news + calls
    found: list[tuple[str, str]] = []
    for call in news:
        if call.name is not None:
            assert call.index == len(found)
            found.append((call.name, ""))
        found[call.index] = (found[call.index][0], found[call.index][1] + call.arguments)
    assert parser.num_calls == len(found)
    return said, found


def cuts(text: str) -> list[list[str]]:
    """The text whole, in single characters, and cut at random."""
    rng = random.Random(len(text))
    ways = [[text], list(text)]
    for _ in range(20):
        marks = sorted(rng.sample(range(len(text) + 1), min(6, len(text))))
        ways.append([text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)])
    return ways


WEATHER = ("get_weather", ARGUMENTS)


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
        ("hermes", f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", [WEATHER]),
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER, WEATHER]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [("now", "{}")]),
        ("hermes", "a < b <tool and <tool_cal", "a < b <tool and <tool_cal", []),
        ("hermes", "<tool_call>what?</tool_call> yes", "<tool_call>what?</tool_call> yes", []),
        ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
        ("hermes", f"<tool_call>\n{CALL[:60]}", "", [("get_weather", CALL[37:60])]),
        ("hermes", CALL, CALL, []),
        ("llama3", LLAMA, "", [WEATHER]),
        ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
        ("llama3", '{"type": "function", "name": "now", "parameters": {}}', "", [("now", "{}")]),
        ("llama3", f"Well: {LLAMA}", f"Well: {LLAMA}", []),
        ("llama3", '{"a": 1}', '{"a": 1}', []),
        ("llama3", "plain <|python_tag|>", "plain <|python_tag|>", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(form: Any, text: str, said: str, calls: list[Any]) -> None:
    for pieces in cuts(text):
        assert parse(form, pieces) == (said, calls), pieces


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolParser("hermes")
    news = [parser.push(character)[1] for character in f"<tool_call>{CALL}</tool_call>"]
    assert sum(len(calls) for calls in news) > 40


@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (False, "<think>\nHm < so.</think>\n\nYes.", ("\nHm < so.", "Yes.")),
        (True, "Hm.</think>Yes </think>", ("Hm.", "Yes </think>")),
        (False, "Yes. <think>no</think>", ("", "Yes. <think>no</think>")),
        (False, "<thin", ("", "<thin")),
        (True, "cut off </thi", ("cut off </thi", "")),
        (False, "", ("", "")),
    ],
)
def test_reasoning_is_told_from_the_answer(inside: bool, text: str, expected: tuple[str, str]) -> None:
    for pieces in cuts(text):
        parser = ReasoningParser(inside)
        parts = [parser.push(piece) for piece in pieces] + [parser.flush()]
        assert ("".join(r for r, _ in parts), "".join(a for _, a in parts)) == expected, pieces


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), compile_grammar("grammar", grammar))
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_grammars_demand_calls_as_they_are_declared(form: ToolFormat) -> None:
    key = "arguments" if form == "hermes" else "parameters"

    def written(*calls: tuple[str, Any]) -> str:
        made = [json.dumps({"name": name, key: arguments}) for name, arguments in calls]
        if form == "llama3":
            return "; ".join(made)
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in made)

    good, other, bad = ("get_weather", {"city": "x"}), ("now", {}), ("get_weather", {"town": "x"})
    demanded = call_grammar(form, TOOLS, parallel=True, free_text=False)
    single = call_grammar(form, TOOLS, parallel=False, free_text=False)
    free = call_grammar(form, TOOLS, parallel=True, free_text=True)
    for grammar, text, expected in (
        (demanded, written(good), True),
        (demanded, written(good, other), True),
        (demanded, written(bad), False),
        (demanded, "Hello", False),
        (single, written(other), True),
        (single, written(good, other), False),
        (free, "Hello <there>", True),
        (free, written(good, other), True),
        (free, written(bad), False),
    ):
        assert accepts(grammar, text) is expected, text
    assert parse(form, [written(good, other)])[1] == [("get_weather", '{"city": "x"}'), ("now", "{}")]


def test_the_format_is_told_by_the_template() -> None:
    assert tool_format("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_format('{{ tools }} {"name": …, "parameters": …}') == "llama3"
    assert tool_format("{{ messages }} <tool_call>") is None
