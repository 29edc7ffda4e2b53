"""The committed model: an ordinary folder that `transformers` and our decoder read alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from models.training import export
from models.training.evaluate import sample, story_checks
from models.training.tasks import ASSISTANT, BEGIN, END, END_OF_TEXT, USER

TALES = Path(__file__).parents[3] / "models" / "tales"
transformers = pytest.importorskip("transformers")


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in TALES.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
    }
    assert (TALES / "model.safetensors").stat().st_size <= export.MAX_BYTES
    with safe_open(TALES / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    count = sum(weight.numel() for weight in export.load(TALES).parameters())
    assert 3_000_000 <= count <= 7_000_000


def test_ids_agree_between_the_files() -> None:
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    config = json.loads((TALES / "config.json").read_text())
    generation = json.loads((TALES / "generation_config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert generation["eos_token_id"] == [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)]
    assert config["bos_token_id"] == tokenizer.token_to_id(BEGIN) == tokenizer.encode("a").ids[0]


def test_logits_equal_those_of_transformers() -> None:
    oracle = transformers.LlamaForCausalLM.from_pretrained(TALES, dtype=torch.float32)
    model = export.load(TALES)
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a fox named Zoé. “Where is my kite?” ☀️").ids])
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(ids), oracle(ids).logits, atol=1e-4, rtol=0)


def test_transformers_renders_the_chat_template() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TALES)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Tell me a story. "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BEGIN}<|system|>Be kind.{END}{USER}Tell me a story.{END}{ASSISTANT}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == Tokenizer.from_file(str(TALES / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    with pytest.raises(Exception, match="roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_it_tells_a_story() -> None:
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    prompt = f"{BEGIN}{USER}Tell me a story about a fox who lost her kite.{END}{ASSISTANT}"
    ((text, ended),) = sample(export.load(TALES), tokenizer, [prompt], seed=1, temperature=0.0)
    checks = story_checks(text, "fox", ended)
    assert checks["ends by itself"]
    assert checks["keeps its hero"]
    assert checks["has at most three names"]
