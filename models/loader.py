"""Weights into a model: from safetensors shards, tensor by tensor, or from a seeded random generator.

Both go through one path: an iterator of (checkpoint name, tensor) feeds `fill`, which hands each tensor to its slot.
Importing this module does not import torch, so that a process without a model can still find and describe one; the
functions that need torch import it themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.checkpoint import (
    STORED_DTYPES,
    Checkpoint,
    load_config,
    open_checkpoint,
    used_vocabulary,
    weights_hash,
)
from models.config import ModelConfig
from models.errors import ModelError
from models.hub import resolve_model
from models.registry import model_class

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.ops import Ops, QuantizationMode
    from models.layers import DecoderModel, Slot

__all__ = [
    "LoadProgress",
    "load_config",
    "load_model",
    "random_model",
    "resolve_model",
    "save_random_checkpoint",
    "weights_hash",
]

# Tensors that old checkpoints carry and that are computed here: the rotary frequencies and the causal mask.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading has come: bytes of checkpoint tensors read, of how many, and the tensor just read."""

    loaded_bytes: int
    total_bytes: int
    tensor: str


def load_model(
    path: Path,
    ops: Ops,
    *,
    quantization: QuantizationMode = "none",
    progress: Callable[[LoadProgress], None] | None = None,
) -> DecoderModel:
    """Load the checkpoint in the folder `path` onto `ops`, its Linears in the mode `quantization`.

    All names and shapes are compared with what the model wants before the first byte of a weight is read; a missing,
    misshapen or unexpected tensor raises ModelError (unexpected ones too: a weight that would go unused means that the
    checkpoint is another computation than its config.json says). `progress` is called after each tensor.
    """
    config = load_config(path)
    checkpoint = open_checkpoint(path)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.tensors:
        # The file has a head of its own, which may differ from the embedding: what is stored is what is run.
        config = replace(config, tie_word_embeddings=False)
    model = new_model(config, ops, quantization)
    slots = model.slots()
    _check_tensors(path, checkpoint, slots)
    fill(slots, _read_tensors(checkpoint, slots, progress))
    num_tokens = used_vocabulary(path)
    if num_tokens is not None and num_tokens < config.vocab_size:
        model.mask_vocabulary(num_tokens)
    return model


def random_model(config: ModelConfig, ops: Ops, seed: int, std: float = 0.02) -> DecoderModel:
    """A model with random weights, the same for the same configuration, seed and std. Unquantized, without any file."""
    model = new_model(config, ops, "none")
    slots = model.slots()
    fill(slots, random_tensors(slots, config, seed, std))
    return model


def new_model(config: ModelConfig, ops: Ops, quantization: QuantizationMode) -> DecoderModel:
    """The model that `config` describes, its slots still empty."""
    return model_class(config.architecture)(config, ops, quantization)


def fill(slots: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Hand each tensor to the slot of its name. Raises ModelError unless exactly the slots' tensors come, each once."""
    missing = dict(slots)
    for name, tensor in tensors:
        slot = missing.pop(name, None)
        if slot is None or tuple(tensor.shape) != slot.shape:
            wanted = "no such tensor" if slot is None else f"shape {slot.shape}"
            raise ModelError(f"got tensor {name} of shape {tuple(tensor.shape)}, wanted {wanted}")
        slot.fill(tensor)
    if missing:
        raise ModelError(f"{len(missing)} tensors never came, the first being {next(iter(missing))}")


def _check_tensors(path: Path, checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    """Compare the headers of the checkpoint with what the model wants. Raises ModelError."""
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not _IGNORED.fullmatch(name)}
    advice = "check that config.json belongs to these weights, or download the model again"
    missing = [name for name in slots if name not in stored]
    if missing:
        raise ModelError(f"{path} lacks {_count(missing)}; {advice}")
    for name, slot in slots.items():
        tensor = stored[name]
        if tensor.shape != slot.shape:
            raise ModelError(
                f"{name} in {tensor.file} has shape {list(tensor.shape)}, expected {list(slot.shape)}; {advice}"
            )
        if tensor.dtype not in STORED_DTYPES:
            raise ModelError(
                f"{name} in {tensor.file} is stored as {tensor.dtype}; supported are {', '.join(STORED_DTYPES)}: "
                "use the checkpoint that this one was quantized from"
            )
    unexpected = [name for name in stored if name not in slots]
    if unexpected:
        raise ModelError(f"{path} has, beyond what its config.json describes, {_count(unexpected)}; {advice}")


def _count(names: list[str]) -> str:
    return f"tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors, the first being {names[0]}"


def _read_tensors(
    checkpoint: Checkpoint, slots: Mapping[str, Slot], progress: Callable[[LoadProgress], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors that have a slot, file by file, in the order in which they lie."""
    from safetensors import SafetensorError, safe_open

    total = sum(checkpoint.tensors[name].num_bytes for name in slots)
    loaded = 0
    for file in checkpoint.files:
        names = [name for name, tensor in checkpoint.tensors.items() if tensor.file == file and name in slots]
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                for name in names:
                    yield name, stream.get_tensor(name)
                    loaded += checkpoint.tensors[name].num_bytes
                    if progress is not None:
                        progress(LoadProgress(loaded, total, name))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}); download it again") from None


def random_tensors(
    slots: Mapping[str, Slot], config: ModelConfig, seed: int, std: float
) -> Iterator[tuple[str, Tensor]]:
    """Normal weights of standard deviation `std` in the checkpoint's dtype, drawn in the order of the slots.

    The weights of norms are around 1 instead of 0.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    for name, slot in slots.items():
        tensor = torch.randn(slot.shape, generator=generator) * std
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            tensor += 1.0
        yield name, tensor.to(dtype)


def save_random_checkpoint(hf_config: Mapping[str, Any], path: Path, seed: int, std: float = 0.02) -> None:
    """Write the weights of `random_model` as a checkpoint that other software can load too.

    hf_config: the content of its config.json. The whole model is in memory once while it is written.
    """
    import torch
    from safetensors.torch import save_file

    from kernels.reference import ReferenceOps

    config = ModelConfig.from_hf(hf_config)
    slots = new_model(config, ReferenceOps(), "none").slots()
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(hf_config), indent=2) + "\n", encoding="utf-8")
    with torch.inference_mode():
        tensors = dict(random_tensors(slots, config, seed, std))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
