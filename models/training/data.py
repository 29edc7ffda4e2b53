"""Token files of the corpus in the scratch directory: made once, by all cores, then memory-mapped."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.training.corpus import Split, document, documents
from models.training.tasks import SPECIAL
from models.training.train import Stream

BLOCK = 2000  # documents made by one worker at a time


def texts(seed: int, count: int) -> Iterator[str]:
    """The pieces of `count` training documents without special tokens, to train a tokenizer on."""
    for i, doc in enumerate(documents(seed, "train", count)):
        for text, _ in (*doc.pieces, *document(seed, "tune", i).pieces):
            for token in SPECIAL:
                text = text.replace(token, "")
            yield text


def encode(tokenizer: Tokenizer, pieces: tuple[tuple[str, bool], ...]) -> tuple[list[int], list[bool]]:
    """Ids of a document and whether the loss counts them. Pieces are encoded apart, as the server encodes a prompt."""
    encoded = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
    ids = [i for piece in encoded for i in piece.ids]
    mask = [counts for piece, (_, counts) in zip(encoded, pieces, strict=True) for _ in piece.ids]
    return ids, mask


def _block(job: tuple[str, int, Split, int]) -> tuple[bytes, bytes, list[bytes]]:
    path, seed, split, block = job
    tokenizer = Tokenizer.from_file(path)
    ids: list[int] = []
    mask: list[bool] = []
    digests = []
    for doc in documents(seed, split, BLOCK, block * BLOCK):
        some, counts = encode(tokenizer, doc.pieces)
        ids += some
        mask += counts
        digests.append(digest(doc.text))
    return np.array(ids, np.uint16).tobytes(), np.array(mask, np.uint8).tobytes(), digests


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def build(
    folder: Path,
    tokenizer_json: Path,
    seed: int,
    split: Split,
    num_tokens: int,
    report: Callable[[str], None],
    first_block: int = 0,
    processes: int | None = None,
) -> int:
    """Write `<split>.npy`, `<split>.mask.npy` and the hashes of the texts until there are `num_tokens` tokens.

    `first_block` is the first block of documents that goes in, `processes` the number of workers (None: all cores).
    Returns the number of documents. Blocks are kept in order, so the files do not depend on the number of workers.
    """
    ids, masks, digests, total, block = [], [], [], 0, first_block
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        while total < num_tokens:
            jobs = [(str(tokenizer_json), seed, split, block + i) for i in range(8)]
            for some, mask, hashes in pool.imap(_block, jobs):
                ids.append(np.frombuffer(some, np.uint16))
                masks.append(np.frombuffer(mask, np.uint8))
                digests += hashes
                total += len(ids[-1])
            block += len(jobs)
            report(f"corpus {split}: {min(100, 100 * total // num_tokens)}%  {total / 1e6:.1f}M tokens")
    np.save(folder / f"{split}.npy", np.concatenate(ids))
    np.save(folder / f"{split}.mask.npy", np.concatenate(masks))
    np.save(folder / f"{split}.hashes.npy", np.frombuffer(b"".join(digests), np.uint64))
    return (block - first_block) * BLOCK


def load(folder: Path, split: Split, masked: bool) -> Stream:
    """Raises FileNotFoundError, with what to do, where the corpus is not built."""
    path = folder / f"{split}.npy"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m models.training corpus` first")
    mask = np.load(folder / f"{split}.mask.npy") if masked else None
    return Stream(np.load(path), mask)
