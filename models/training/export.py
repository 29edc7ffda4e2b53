"""Writes the model as an ordinary Hugging Face folder, and its numbers into the model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from models.training import tokenizer as tokenizers_
from models.training.decoder import Decoder, Shape
from models.training.evaluate import STORIES, Numbers
from models.training.tasks import BEGIN, END, END_OF_TEXT, PAD

MAX_BYTES = 16_000_000
MARKERS = ("<!-- numbers: written by `export` -->", "<!-- end of numbers -->")
INT8_MARKERS = ("<!-- int8: written by `export` -->", "<!-- end of int8 -->")


def rounded(model: Decoder) -> Decoder:
    """The model with its weights rounded to bfloat16, as they are exported; arithmetic stays float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    return model


def export(model: Decoder, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the folder; returns the size of the weights in bytes. Raises ValueError where they exceed 16 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.get_vocab()[token] for token in (BEGIN, END_OF_TEXT, END, PAD)}
    eos = [ids[END_OF_TEXT], ids[END]]
    config = model.shape.hf_config(ids[BEGIN], eos, ids[PAD])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": ids[BEGIN],
        "eos_token_id": eos,
        "pad_token_id": ids[PAD],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 320,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizers_.save(tokenizer, folder, model.shape.max_length)
    weights = {name: weight.bfloat16().contiguous() for name, weight in model.hf_weights().items()}
    path = folder / "model.safetensors"
    save_file(weights, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files for their owner only
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}: make the shape smaller")
    return size


def load(folder: Path) -> Decoder:
    """The exported model as a trainable decoder, weights in float32."""
    shape = Shape.from_hf(json.loads((folder / "config.json").read_text()))
    return Decoder.from_hf(shape, load_file(str(folder / "model.safetensors")))


def numbers_section(numbers: Numbers, parameters: int, runs: dict[str, dict[str, float]]) -> str:
    """The part of the model card that follows from a training run, as Markdown."""
    lines = [
        f"{parameters / 1e6:.2f} million parameters. "
        + " ".join(
            f"Stage `{name}`: {run['tokens'] / 1e6:.1f} million tokens in {run['seconds'] / 60:.0f} minutes."
            for name, run in runs.items()
        ),
        "",
        f"On {numbers.documents} held-out documents ({numbers.dropped} more were dropped because their text occurs in "
        "training):",
        "",
        "| measure | value |",
        "|---|---|",
        f"| perplexity a token, plain stories | {numbers.perplexity_stories:.3f} |",
        f"| bits a byte, plain stories | {numbers.bits_per_byte_stories:.3f} |",
        f"| perplexity a token, all documents | {numbers.perplexity_all:.3f} |",
        "",
        f"Exact match of greedy answers (chat form, {numbers.per_cell} held-out tasks a cell, few-shot is 3):",
        "",
        "| task | zero-shot | one-shot | few-shot |",
        "|---|---|---|---|",
        *(
            f"| {task} | " + " | ".join(f"{100 * cells[k]:.1f} %" for k in ("zero", "one", "few")) + " |"
            for task, cells in numbers.exact.items()
        ),
        "",
        f"Of {STORIES} stories sampled at temperature 0.7 and top-p 0.9, asked for by hero and deed: "
        + ", ".join(f"{100 * share:.0f} % {name}" for name, share in numbers.stories.items())
        + ".",
        "",
        "### Samples (temperature 0.7, top-p 0.9, the first draw)",
    ]
    for prompt, text in numbers.samples:
        lines += ["", f"**{prompt}**", "", *("> " + line if line else ">" for line in text.split("\n"))]
    return "\n".join(lines)


def write_card(folder: Path, section: str, markers: tuple[str, str] = MARKERS) -> None:
    """Put `section` between the markers of the card. Raises ValueError where the card has none."""
    path = folder / "README.md"
    begin, end = markers
    before, found, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}")
