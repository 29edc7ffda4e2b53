"""Chat templates run as in transformers, in a sandbox; what goes wrong in them is one line."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from server.text.template import ChatTemplate, TemplateError, flatten, message_problems

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


def test_agrees_with_transformers() -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        (
            "{%- if messages[0].role == 'system' %}\n  {{- messages[0].content + '\\n' }}\n{%- endif %}\n"
            "{% for message in messages %}\n  {% if loop.first %}\nfirst {% endif %}\n"
            "{{ message | tojson }} {{ message.content | trim }}\n{% endfor %}\n"
            "{% generation %}{{ eos_token }}{% endgeneration %}{{ add_generation_prompt }}"
        )
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "")
    )
    messages = [{"role": "system", "content": " é & <"}, {"role": "user", "content": "x"}]
    theirs, _ = utilities.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, eos_token="E"
    )
    assert render(source, messages, eos_token="E") == theirs[0]


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
