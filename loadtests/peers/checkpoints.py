"""The models that are compared: two shapes with random weights, and a tokenizer of exactly their vocabulary.

Speed does not depend on what the weights say, and random ones need no download; everything is made from seeds, so two
machines compare the same computation. The tokenizer is a byte-level BPE trained on invented words: servers and
converters need one, and its merges are ASCII, so that all but 128 of the 32,000 tokens are valid text by themselves and
a server that holds incomplete UTF-8 back is not at a disadvantage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from loadtests.peers.stamps import up_to_date

VOCAB_SIZE = 32000
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SEED = 0

# The shape of Qwen3-0.6B with a smaller vocabulary: 473 million parameters.
QWEN3_473M: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes() -> dict[str, dict[str, Any]]:
    """Name of a model -> the content of its config.json."""
    from loadtests.engine_bench import LLAMA_176M

    return {"qwen3-473m": QWEN3_473M, "llama-176m": LLAMA_176M}


@cache
def words(count: int, seed: int = SEED) -> tuple[str, ...]:
    """Different invented words of one to four syllables, the same for the same seed."""
    generator = random.Random(seed)
    onsets = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl sh sl st th tr".split()
    vowels = "a e i o u ai ea ee oo ou".split()
    codas = ["", "", "", *"d g k l m n p r s t x nd ng nt st".split()]
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = generator.choices((1, 2, 3, 4), (2, 5, 4, 2))[0]
        found["".join(generator.choice(p) for _ in range(syllables) for p in (onsets, vowels, codas))] = None
    return tuple(found)


def text(num_words: int, seed: int) -> str:
    """A prompt of so many invented words with full stops, in lower case. Its tokens are about 1.3 times its words."""
    generator = random.Random(seed)
    lexicon = words(6_000)
    sentences, rest = [], num_words
    while rest > 0:
        length = min(rest, generator.randint(6, 14))
        sentences.append(" ".join(generator.choices(lexicon, k=length)) + ".")
        rest -= length
    return " ".join(sentences)


def _corpus() -> Iterator[str]:
    """Each word as often as Zipf's law says, in documents of one word many times; BPE sees words apart anyway."""
    for rank, word in enumerate(words(60_000), start=1):
        yield f" {word}" * max(2, 200_000 // rank)
        if rank <= 20_000:
            yield f"{word}. {word}."


def train_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with exactly VOCAB_SIZE ids: the special tokens, the 256 bytes, then merges.

    Raises RuntimeError if training ends with another number.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} ids instead of {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    unknown, bos, eos = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_checkpoint(shape: Mapping[str, Any], folder: Path) -> None:
    """Write the model of `shape` with its tokenizer into `folder` unless it is there: about a minute for 473M."""
    from models.loader import save_random_checkpoint

    with up_to_date(folder, {"shape": dict(shape), "seed": SEED, "tokenizer": 1}) as fresh:
        if not fresh:
            save_random_checkpoint(shape, folder, SEED)
            save_tokenizer(train_tokenizer(), folder, int(shape["max_position_embeddings"]))
