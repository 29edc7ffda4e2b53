"""Chat templates run as in transformers, in a sandbox; what goes wrong in them is one line."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from server.text.template import ChatTemplate, TemplateError, flatten, message_problems
from tests.server.text.known_templates import TEMPLATES

MESSAGES = [{"role": "user", "content": "a <b> & 'c' é"}]


def render(source: str, messages: Any = MESSAGES, **special: str) -> str:
    return ChatTemplate(source, special).render(messages)


def test_blocks_are_trimmed() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_tojson_is_plain_json() -> None:
    assert render("{{ messages[0].content | tojson }}") == "\"a <b> & 'c' é\""
    assert render("{{ [1, 2] | tojson(indent=2) }}") == "[\n  1,\n  2\n]"


def test_strftime_now_and_loop_controls() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_a_template_may_refuse() -> None:
    with pytest.raises(TemplateError, match="refuses these messages: only one"):
        render("{{ raise_exception('only\none') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}{{ cycler.__init__.__globals__.os }}",
        "{{ 1 / 0 }}",
        "{{ undefined_thing.attribute }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_whatever_goes_wrong_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_a_template_cannot_change_the_messages_of_the_caller() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError):
        render("{{ messages[0].update({'role': 'system'}) }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief; é & <b> "},
    {"role": "user", "content": "What's the weather in Łódź?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nRain, 'perhaps'."},
    {"role": "user", "content": "Sure?"},
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "w", "arguments": {"city": "Łódź", "n": 1}}}
        ],
    },
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "é <x>", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_agrees_with_transformers(name: str) -> None:
    """Each template on each conversation: the same text, or the same refusal."""
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(TEMPLATES[name], special)
    outcomes = []
    for talk in (TALK, TALK[1:], TALK[1:2], TALK[1:3], CALLED, [*TALK, TALK[1]]):
        for generate in (True, False):
            for tools in (None, TOOLS):
                try:
                    rendered = utilities.render_jinja_template(
                        [talk], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=generate, **special
                    )
                    theirs = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
                except Exception:
                    with pytest.raises(TemplateError):
                        template.render(flatten(talk), generate, tools)
                    outcomes.append(None)
                    continue
                ours = template.render(flatten(talk), generate, tools)
                assert ours == theirs
                outcomes.append(ours)
    assert sum(outcome is not None for outcome in outcomes) >= 12
    assert len(set(outcomes)) >= 5


def test_arguments_of_calls_are_objects_to_templates() -> None:
    """OpenAI's clients send them back as JSON; what is none stays text."""
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    (flat,) = flatten([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert flat["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1]}}
    assert call["function"]["arguments"] == '{"a": [1]}'  # type: ignore[index]
    call["function"]["arguments"] = "{a"  # type: ignore[index]
    (flat,) = flatten([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert flat["tool_calls"][0]["function"]["arguments"] == "{a"


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "pirate", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text"}]}], "messages[0].content[1]"),
    ],
)
def test_shapes_are_checked(messages: list[dict[str, Any]], where: str) -> None:
    assert [found for found, _ in message_problems(messages)] == [where]


def test_good_shapes_pass_and_parts_join() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": ""},
    ]
    assert message_problems(messages) == []
    assert [message["content"] for message in flatten(messages)] == ["s", "ab", "", ""]
