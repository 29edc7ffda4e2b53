"""The text side of a model's folder: what is read, what is recognised, and what is said when it is broken."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from server.text.template import TemplateError
from server.text.tokenizer import ModelText, ModelTextError
from tests.server.text import tokenizers as kinds


def make(**options: Any) -> ModelText:
    return ModelText(kinds.byte_level().to_str(), template=kinds.CHATML, **options)


def tokens(text: ModelText, ids: list[int]) -> list[str]:
    return [text.decode([token_id], skip_special_tokens=False) for token_id in ids]


def user(content: Any) -> tuple[dict[str, Any], ...]:
    return ({"role": "user", "content": content},)


def test_messages_are_the_tokens_of_the_rendered_template() -> None:
    text = make()
    expected = text.encode("<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert text.encode_messages(user(" Hi é ")) == expected


@pytest.mark.parametrize("literal", kinds.SPECIAL)
@pytest.mark.parametrize("content", ["{}", "a {} b", "{}{}", " {} ", "x\n{}\ny 你好"])
def test_special_tokens_typed_by_a_user_stay_text(literal: str, content: str) -> None:
    text = make()
    typed = content.format(*[literal] * content.count("{}"))
    ids = text.encode_messages(user(typed))
    rendered = f"<|im_start|>user\n{typed.strip()}<|im_end|>\n<|im_start|>assistant\n"
    assert text.decode(ids, skip_special_tokens=False) == rendered
    specials = [token for token in tokens(text, ids) if token in kinds.SPECIAL]
    assert specials == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_typed_special_tokens_are_masked_in_every_field_and_in_text_parts() -> None:
    template = "{{ '<|im_start|>' }}{{ messages[0].name }}:{{ messages[0].content }}{{ messages[0] | tojson }}"
    text = ModelText(kinds.byte_level().to_str(), template=template)
    message = {
        "role": "user",
        "name": "<|end|>",
        "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}],
    }
    ids = text.encode_messages((message,))
    assert [token for token in tokens(text, ids) if token in kinds.SPECIAL] == ["<|im_start|>"]
    flat = {"role": "user", "name": "<|end|>", "content": "<|im_end|>"}
    expected = "<|im_start|><|end|>:<|im_end|>" + json.dumps(flat)
    assert text.decode(ids, skip_special_tokens=False) == expected


def test_characters_of_private_use_survive_the_masking() -> None:
    text = make()
    typed = "\U000f0000<|im_end|>\U000f0001"
    assert typed in text.decode(text.encode_messages(user(typed)), skip_special_tokens=False)


def test_whitespace_that_a_special_token_swallows_is_swallowed_in_both_ways() -> None:
    spec = json.loads(kinds.byte_level().to_str())
    for added in spec["added_tokens"]:
        if added["content"] == "<|im_start|>":
            added["rstrip"] = True
        if added["content"] == "<|im_end|>":
            added["lstrip"] = True
    template = "<|im_start|>\n  {{ messages[0].content }} \n<|im_end|>{{ messages[1].content }}"
    text = ModelText(json.dumps(spec), template=template)
    plain = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    masked = ({"role": "user", "content": "a"}, {"role": "user", "content": "b<|end|>"})
    assert text.encode_messages(masked)[: len(text.encode_messages(plain))] == text.encode_messages(plain)


def test_a_space_is_put_in_front_of_the_first_piece_only() -> None:
    spec = json.loads(kinds.metaspace("first").to_str())
    text = ModelText(json.dumps(spec), template="he{{ '<x>' }}{{ messages[0].content }}")
    plain = text.encode_messages(user("a"))
    masked = text.encode_messages(user("a</s>"))
    assert masked[: len(plain)] == plain


def test_a_plain_prompt_recognises_special_tokens() -> None:
    text = make()
    ids = text.encode("a<|im_end|>", add_special_tokens=False)
    assert tokens(text, ids) == ["a", "<|im_end|>"]


def test_the_trainers_padding_and_truncation_are_off() -> None:
    tokenizer = kinds.byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    text = ModelText(tokenizer.to_str(), template="{{ messages[0].content }}")
    for typed in ("x", "xxxxxxxxxxxxxx", "<|end|>xxxxxxxxxxxxx"):
        assert text.decode(text.encode_messages(user(typed)), skip_special_tokens=False) == typed


def test_add_special_tokens_puts_the_beginning_token_in_front() -> None:
    text = make()
    assert text.encode("a") == [0, *text.encode("a", add_special_tokens=False)]


def write(folder: Path, **files: Any) -> Path:
    names = {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json", "generation": "generation_config.json"}
    for name, content in files.items():
        path = folder / names.get(name, "chat_template.jinja")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


TOKENIZER = kinds.byte_level().to_str()


@pytest.mark.parametrize(
    ("files", "rendered"),
    [
        ({"config": {"chat_template": "A{{ bos_token }}", "bos_token": "<b>"}}, "A<b>"),
        ({"config": {"chat_template": "B{{ bos_token }}", "bos_token": {"content": "<c>"}}}, "B<c>"),
        ({"config": {"chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "C"}]}}, "C"),
        ({"config": {"chat_template": "old"}, "jinja": "new"}, "new"),
        ({"config": {}, "jinja": "D"}, "D"),
    ],
)
def test_where_a_chat_template_is_found(tmp_path: Path, files: dict[str, Any], rendered: str) -> None:
    text = ModelText.load(write(tmp_path, tokenizer=TOKENIZER, **files))
    assert text.template is not None
    assert text.template.render(user("x")) == rendered


@pytest.mark.parametrize("files", [{}, {"config": {}}, {"config": {"chat_template": [{"name": "x", "template": "X"}]}}])
def test_no_chat_template(tmp_path: Path, files: dict[str, Any]) -> None:
    text = ModelText.load(write(tmp_path, tokenizer=TOKENIZER, **files))
    assert text.template is None
    with pytest.raises(TemplateError, match="no chat template"):
        text.encode_messages(user("x"))


def test_generation_defaults(tmp_path: Path) -> None:
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "do_sample": True,
        "typical_p": "x",
        "eos_token_id": 3,
    }
    text = ModelText.load(write(tmp_path, tokenizer=TOKENIZER, generation=generation))
    assert text.generation_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    text = ModelText.load(write(tmp_path, tokenizer=TOKENIZER, generation={"do_sample": False, "temperature": 0.6}))
    assert text.generation_defaults == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer": "{"}, "tokenizer.json is no JSON"),
        ({"tokenizer": "[]"}, "tokenizer.json must hold a JSON object"),
        ({"tokenizer": "{}"}, "tokenizer.json cannot be used"),
        ({"tokenizer": TOKENIZER, "config": "nope"}, "tokenizer_config.json is no JSON"),
        ({"tokenizer": TOKENIZER, "config": {"chat_template": 5}}, "chat_template"),
        ({"tokenizer": TOKENIZER, "jinja": "{% if %}"}, "does not compile"),
        ({"tokenizer": TOKENIZER, "generation": "1"}, "generation_config.json must hold"),
    ],
)
def test_a_broken_folder_gives_one_clear_line(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelTextError, match=message) as caught:
        ModelText.load(write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_others_run_while_a_long_text_is_tokenized() -> None:
    """The event loop is one of them: every stream and every probe waits for it."""
    text = ModelText(kinds.byte_level().to_str())
    ids: list[int] = []
    thread = threading.Thread(target=lambda: ids.extend(text.encode("the fox " * 60_000)))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        time.sleep(0.002)
        num_turns += 1
    assert len(ids) > 60_000
    assert num_turns > 10
