"""The training loop: it learns, it resumes to the bit, and the decoder is Hugging Face's Llama."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from models.training import export, tokenizer
from models.training.corpus import documents
from models.training.data import encode, texts
from models.training.decoder import Decoder, Shape
from models.training.evaluate import Numbers, exact_match, sample, story_checks
from models.training.tasks import ASSISTANT, BEGIN, SPECIAL, Task
from models.training.train import Recipe, Stream, train

TINY = Shape(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=96
)
QUICK = Recipe(
    peak_lr=2e-2, tokens=20 * 512, batch_tokens=512, lengths=((1.0, 64),), compile=False, bf16=False, warmup=0.1
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and waits for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return tokenizer.train(texts(1, 150), 512)


@pytest.fixture(scope="module")
def stream(small_tokenizer: Tokenizer) -> Stream:
    ids = [i for doc in documents(1, "train", 150) for i in encode(small_tokenizer, doc.pieces)[0]]
    return Stream(np.array(ids, np.uint16))


def fresh() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TINY)


def test_twenty_steps_reduce_the_loss(stream: Stream, tmp_path: Path) -> None:
    model = fresh()
    inputs, targets = stream.batch(0, 8, 64, torch.device("cpu"))
    before = model.loss(inputs, targets).item()
    result = train(model, stream, QUICK, tmp_path / "run.pt", report=lambda line: None)
    assert model.loss(inputs, targets).item() < before - 1
    assert result["tokens"] == 20 * 512


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(stream: Stream, tmp_path: Path) -> None:
    whole, first, second = fresh(), fresh(), fresh()
    lines: list[str] = []
    train(whole, stream, QUICK, tmp_path / "whole.pt", lines.append)
    train(first, stream, QUICK, tmp_path / "parts.pt", lines.append, stop_after=7)
    train(second, stream, QUICK, tmp_path / "parts.pt", lines.append)
    assert any("resumed" in line for line in lines)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_loss_of_tuning_counts_answers_only() -> None:
    stream = Stream(np.arange(10, dtype=np.uint16), np.array([0, 0, 0, 1, 1, 0, 0, 0, 1, 1], np.uint8))
    inputs, targets = stream.batch(0, 1, 9, torch.device("cpu"))
    assert inputs.tolist() == [list(range(9))]
    assert targets.tolist() == [[-100, -100, 3, 4, -100, -100, -100, 8, 9]]


def test_a_recipe_has_one_budget() -> None:
    with pytest.raises(ValueError, match="either in minutes or in tokens"):
        replace(QUICK, minutes=1.0)
    assert QUICK.lr(0.0) < QUICK.lr(0.3) == QUICK.peak_lr > QUICK.lr(0.9) > 0


def test_the_exported_folder_is_a_hugging_face_llama(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = export.rounded(fresh())
    export.export(model, small_tokenizer, tmp_path)
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(ids), oracle(ids).logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(export.load(tmp_path).logits(ids), model.logits(ids), atol=0, rtol=0)


def test_exact_match_is_what_greedy_decoding_finds(small_tokenizer: Tokenizer) -> None:
    """The one-pass rule agrees with decoding token by token, on a model that is right now and then."""
    model = fresh()
    rng = random.Random(1)
    made = [Task("sum", (), f"What is {rng.randint(0, 9)}?", "", (), True) for _ in range(4)]
    found = sample(model, small_tokenizer, [BEGIN + task.question() for task in made], 0, 0.0, limit=3)
    for task, (text, _) in zip(made, found, strict=True):
        said = replace(task, answer=text)
        # The untrained model does not end here, so the end token makes the difference between right and wrong.
        assert exact_match(model, small_tokenizer, [said]) == 0.0
    ids = small_tokenizer.encode(BEGIN + made[0].question(), add_special_tokens=False).ids
    with torch.no_grad():  # all scores equal: argmax is token 0, which is the end of a plain document
        model.norm.weight.zero_()
    assert ids[-1] == small_tokenizer.token_to_id(ASSISTANT)
    assert sample(model, small_tokenizer, [BEGIN + made[0].question()], 0, 0.0) == [("", True)]


def test_story_checks_see_a_hero_and_its_end() -> None:
    text = "Once there was a fox named Mira. She lost a kite. Tom found it. Mira was happy."
    assert all(story_checks(text, "fox", True).values())
    assert not story_checks(text, "bear", True)["is about the animal asked for"]
    assert not story_checks(text.replace("Mira was", "Tom was"), "fox", True)["keeps its hero"]


def test_the_tokenizer_keeps_any_text(small_tokenizer: Tokenizer) -> None:
    for text in (
        "Zoé said “hello” ☀️🐢",
        "日本語",
        "a\tb\r\n  c\x00\x7f",
        "𝔘𝔫𝔦",
        "  leading and trailing  ",
        "12 + 345",
    ):
        ids = small_tokenizer.encode(text).ids
        assert ids[0] == small_tokenizer.token_to_id(BEGIN)
        assert small_tokenizer.decode(ids) == text
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(20))
        assert small_tokenizer.decode(small_tokenizer.encode(text).ids) == text
    assert [small_tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert len(small_tokenizer.encode("2024", add_special_tokens=False).ids) == 4


def test_the_card_takes_the_numbers(tmp_path: Path) -> None:
    cells = {"zero": 0.5, "one": 0.25, "few": 1.0}
    numbers = Numbers(100, 1, 1.5, 1.4, 0.3, {"sum": cells}, 50, {"keeps its hero": 0.9}, [("Hi", "a\n\nb")])
    numbers.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["per_cell"] == 50
    section = export.numbers_section(Numbers.load(tmp_path / "evaluation.json"), 5_000_000, {})
    assert "| sum | 50.0 % | 25.0 % | 100.0 % |" in section
    with pytest.raises(FileNotFoundError, match="evaluate"):
        Numbers.load(tmp_path / "none.json")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        export.write_card(tmp_path, section)
    (begin, end), (int8_begin, int8_end) = export.MARKERS, export.INT8_MARKERS
    card = f"# t\n{begin}\nold\n{end}\nbetween\n{int8_begin}\nold\n{int8_end}\nend\n"
    (tmp_path / "README.md").write_text(card)
    export.write_card(tmp_path, section)
    export.write_card(tmp_path, "| new |", export.INT8_MARKERS)
    written = (tmp_path / "README.md").read_text()
    assert written == card.replace("old\n", f"\n{section}\n\n", 1).replace("old\n", "\n| new |\n\n")
