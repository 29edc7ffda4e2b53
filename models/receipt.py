"""The quality receipt: what `stet evaluate` found, as a JSON file beside the weights that it is about.

Importing this module does not import torch: whoever only shows a receipt needs none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ReceiptText:
    """The text that was read: where it is from (never a path), SHA-256, in how many sequences, tokens predicted."""

    source: str
    sha256: str
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ReceiptMatch:
    """One kind of held-out task: how many there were, and the share whose greedy answer is right to the letter."""

    tasks: int
    unquantized: float
    quantized: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """A model as it is served, measured against the same model unquantized. Both ran on the same operators.

    model            what it was called
    weights_hash     of the checkpoint measured, `models.checkpoint.weights_hash`; unquantized_weights_hash of the other
    quantization     none, w8a16 or w8a8;  kv_cache_dtype: what K and V were stored as, for the measured model
    dtype            of the activations;  backend, device, instruction_set, versions: what computed
    date             UTC, ISO 8601
    perplexity       exp of the mean negative log-likelihood a token, natural logarithm
    mean_kl          nats a token: the mean of KL(unquantized || quantized) over the predictions
    top1_agreement   share of predictions whose most likely token is the same
    layer_errors     one a layer: the mean over tokens of |h' - h| / |h|, h the residual stream after the layer
    exact_match      by kind of task; empty for a model that has none
    weight_bytes     as prepared, scales included
    """

    model: str
    weights_hash: str
    unquantized_weights_hash: str
    quantization: str
    kv_cache_dtype: str
    dtype: str
    backend: str
    device: str
    instruction_set: str
    versions: dict[str, str]
    date: str
    text: ReceiptText
    perplexity_unquantized: float
    perplexity: float
    mean_kl: float
    top1_agreement: float
    layer_errors: tuple[float, ...]
    exact_match: dict[str, ReceiptMatch]
    weight_bytes_unquantized: int
    weight_bytes: int
    format: int = FORMAT


def receipt_name(quantization: str, kv_cache_dtype: str) -> str:
    """The file of a mode's receipt. An int8 KV cache has one of its own, every wider one the same."""
    return f"receipt-{quantization}{'-kv-int8' if kv_cache_dtype == 'int8' else ''}.json"


def write_receipt(folder: Path, receipt: Receipt) -> Path:
    """Write the receipt into `folder`, whole or not at all; return the file. Raises ModelError."""
    file = folder / receipt_name(receipt.quantization, receipt.kv_cache_dtype)
    try:
        # In the same folder, so that the rename stays within one file system.
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.")
    except OSError as error:
        raise ModelError(
            f"the receipt cannot be written to {folder} ({error.strerror}); make the folder writable"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(receipt_json(receipt))
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp's files are for their owner alone; a server under another account reads this one too.
        os.chmod(name, 0o644)
        os.replace(name, file)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise ModelError(f"{file} cannot be written ({error.strerror}); check the space on the disk") from None
    return file


def receipt_json(receipt: Receipt) -> str:
    """The text of the file."""
    return json.dumps(dataclasses.asdict(receipt), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
