"""Documents of the corpus as a function of (seed, split, index), and their token files.

The split is decided by what a document is about: the hash of a story's skeleton, of a phrase or of a sum says to which
split it belongs, and a generator draws again until it has one of the wanted split. So no held-out document can occur in
training; equal texts from different skeletons (rare, in brief stories) are dropped besides.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from models.training.tasks import BEGIN, END_OF_TEXT, SHOTS, TASKS, Key, Task, a_story, talk, task

Split = Literal["train", "tune", "heldout"]
HELDOUT_SHARE = 20  # one skeleton in twenty


def is_heldout(key: Key) -> bool:
    """Whether a skeleton belongs to the held-out split."""
    digest = hashlib.blake2b("\x1f".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELDOUT_SHARE == 0


@dataclass(frozen=True)
class Document:
    """A document: `pieces` are (text, does the loss of instruction tuning count); `keys` what it is about."""

    kind: str
    pieces: tuple[tuple[str, bool], ...]
    keys: tuple[Key, ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def generator(seed: int, split: Split, index: int) -> random.Random:
    return random.Random(f"{seed}/{split}/{index}")


def wants(split: Split, key: Key) -> bool:
    return is_heldout(key) == (split == "heldout")


def plain_story(rng: random.Random, split: Split) -> Document:
    """A story as plain text, sometimes under a title with the hero's picture and the weather's."""
    story = a_story(rng, lambda key: wants(split, key), rng.random() < 0.1)
    text = story.text
    shape = rng.random()
    if shape < 0.12:
        text = f"{story.title}\n\n{text}"
    elif shape < 0.2 and story.hero.kind.emoji:
        text = f"{story.hero.kind.emoji} {story.title}\n\n{text} {'😊' if story.mood == 'happy' else '😢'}"
    elif shape < 0.24:
        text = f"{story.weather.emoji} It was a {story.weather.word} day. {text}" if "day" not in text[:60] else text
    return Document("story", ((BEGIN, False), (text + END_OF_TEXT, True)), (story.key,))


def from_task(made: Task) -> Document:
    return Document(made.name, ((BEGIN, False), *made.pieces()), made.keys)


# Shares of the documents, not of the tokens: few-shot documents are longer than others.
MIX = {"tell": 5, "continue": 2, "summary": 4, "question": 5, "mood": 2, "translate": 6, "sum": 6}


def document(seed: int, split: Split, index: int) -> Document:
    """Document `index` of a split; the same on every machine.

    `train` is mostly plain stories, `tune` mostly instructions in chat form, `heldout` a mix of both.
    """
    rng = generator(seed, split, index)
    stories = {"train": 0.5, "tune": 0.12, "heldout": 0.5}[split]
    if rng.random() < stories:
        return plain_story(rng, split)
    if split != "heldout" and rng.random() < 0.03:
        return from_task(talk(rng))
    name = rng.choices(TASKS, [MIX[t] for t in TASKS])[0]
    shots = 0 if name in ("tell", "continue") else rng.choices((0, 1, 2, 3, 4), (5, 2, 1, 2, 1))[0]
    chat = True if name == "tell" else rng.random() < (0.8 if split == "tune" else 0.6)
    return from_task(task(rng, name, shots, lambda key: wants(split, key), chat))


def documents(seed: int, split: Split, count: int, start: int = 0) -> Iterator[Document]:
    return (document(seed, split, i) for i in range(start, start + count))


def heldout_tasks(seed: int, name: str, shots: str, count: int, chat: bool = True) -> list[Task]:
    """`count` held-out tasks for the evaluation, with `shots` ("zero", "one", "few") examples."""
    rng = random.Random(f"{seed}/evaluate/{name}/{shots}")
    return [task(rng, name, SHOTS[shots], lambda key: wants("heldout", key), chat) for _ in range(count)]
