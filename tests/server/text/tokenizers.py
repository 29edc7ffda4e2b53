"""Small tokenizers of every kind that language models use, built here."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Once upon a time, in a small house by the sea.",
    "naïve café – 你好世界 🙂👩‍🚀 żółć",
    "STOP END the stop string",
] * 4


def byte_level() -> Tokenizer:
    """GPT-2's kind: few merges, so most characters beyond ASCII are cut across tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("né", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", pair="$A $B", special_tokens=[("<|end|>", 0)]
    )
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """Llama 2's kind: pieces with a visible space, and a token for each byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in [*"▁abcdehlnorstw", "▁▁", "▁a", "▁the", "he", "llo", "▁hello", "▁world", "é", "你", "a▁b", "<0xG0>"]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace(prepend_scheme: str = "always") -> Tokenizer:
    """T5's kind."""
    vocabulary: dict[str, int] = {}
    for piece in ["<unk>", "</s>", *"▁abcdehlnorstw", "▁▁", "▁a", "▁the", "he", "llo", "▁hello", "é", "a▁b", "<x>"]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<unk>", "</s>", "<x>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: its decoder is none of those that are understood token by token."""
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "the", "cat", "##s", "sat", "!", ",", "a"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return tokenizer


def decoder_of(tokenizer: Tokenizer) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"]
    return spec
