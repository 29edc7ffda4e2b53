"""Weights into a model: from safetensors shards, rows by rows, or from a seeded random generator.

Each tensor goes to its slot as it is read, and is quantized there if it is to be: neither the checkpoint nor the
unquantized model is ever whole in memory. Importing this module does not import torch, so that a process without a
model can still find and describe one; the functions that need torch import it themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.checkpoint import (
    STORED_DTYPES,
    Checkpoint,
    StoredTensor,
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

    from kernels.ops import Ops, QuantizationMode, QuantizedWeight
    from models.layers import DecoderModel
    from models.reader import TensorReader
    from models.slots import Slot

__all__ = [
    "LoadProgress",
    "load_config",
    "load_model",
    "random_model",
    "resolve_mode",
    "resolve_model",
    "save_random_checkpoint",
    "weights_hash",
]

# Tensors that old checkpoints carry and that are computed here: the rotary frequencies and the causal mask.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)|.*\bh\.\d+\.attn\.bias|.*\.attention\.bias")
# What the modules of some models are under; files of a model without a head leave it out.
_PREFIX = "transformer."

_ADVICE = "check that config.json belongs to these weights, or download the model again"
_USE_ORIGINAL = "use the checkpoint that this one was quantized from"
_DISAGREE = "the quantization_config in config.json says otherwise; check that it belongs to these weights"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading has come: bytes of checkpoint tensors read, of how many, and the tensor just read."""

    loaded_bytes: int
    total_bytes: int
    tensor: str


def resolve_mode(config: ModelConfig, asked: QuantizationMode | None) -> QuantizationMode:
    """The mode to load a checkpoint in: `asked`, or, asked nothing, the checkpoint's own.

    Weights that are stored as int8 do for both int8 modes. Raises ModelError if they were to be used unquantized.
    """
    stored = config.quantization
    if stored is None:
        return asked or "none"
    if asked == "none":
        raise ModelError(
            f"the weights of this checkpoint are int8 (made for {stored.mode}) and cannot be used with quantization "
            "none; choose w8a16 or w8a8, or use the checkpoint that it was quantized from"
        )
    return asked or stored.mode


def load_model(
    path: Path,
    ops: Ops,
    *,
    quantization: QuantizationMode | None = None,
    keep: Collection[str] = (),
    progress: Callable[[LoadProgress], None] | None = None,
) -> DecoderModel:
    """Load the checkpoint in the folder `path` onto `ops`, its Linears in the mode that `resolve_mode` gives.

    keep: names of modules that stay unquantized; of an int8 checkpoint also those that it has unquantized. All names
    and shapes are compared with what the model wants before the first byte of a weight is read; a missing, misshapen or
    unexpected tensor raises ModelError (unexpected ones too: a weight that would go unused means that the checkpoint is
    another computation than its config.json says). The largest weights come first, so that what preparing one takes
    for a moment is taken when little else is there. `progress` is called after each tensor.
    """
    from models.reader import TensorReader

    config = load_config(path)
    checkpoint = open_checkpoint(path)
    head = config.names.head
    if config.tie_word_embeddings and {f"{head}.weight", f"{head}.weight_packed"} & checkpoint.tensors.keys():
        # The file has a head of its own, which may differ from the embedding: what is stored is what is run.
        config = replace(config, tie_word_embeddings=False)

    def keeps(module: str) -> bool:
        return module in keep or (config.quantization is not None and not config.quantization.covers(module))

    model = new_model(config, ops, resolve_mode(config, quantization), keeps)
    slots = model.slots()
    modules = {name.removesuffix(".weight") for name in slots}
    if unknown := [module for module in keep if module not in modules]:
        raise ModelError(f"{unknown[0]} cannot stay unquantized: there is no such module in {path}")
    sources = find_sources(path, checkpoint, config, slots)
    order = sorted(sources, key=lambda name: -slots[name].stack)  # stable: what is stacked stays together
    total = sum(source.num_bytes for source in sources.values())
    loaded = 0
    with TensorReader() as reader:
        for name in order:
            for first, rows in sources[name].pieces(reader):
                slots[name].put(first, rows)
            loaded += sources[name].num_bytes
            if progress is not None:
                progress(LoadProgress(loaded, total, name))
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


def new_model(
    config: ModelConfig, ops: Ops, quantization: QuantizationMode, keep: Callable[[str], bool] | None = None
) -> DecoderModel:
    """The model that `config` describes, its slots still empty. keep: whether a module stays unquantized."""
    return model_class(config.architecture)(config, ops, quantization, keep)


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


@dataclass(frozen=True, slots=True)
class Source:
    """Where a slot's rows come from: a tensor [N, ...], and scales [N, 1] or [N] if it holds int8 values.

    columns: how many values a row has, where four are packed into an int32; else None.
    """

    values: StoredTensor
    scales: StoredTensor | None = None
    columns: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.num_bytes + (self.scales.num_bytes if self.scales is not None else 0)

    def pieces(self, reader: TensorReader) -> Iterator[tuple[int, Tensor | QuantizedWeight]]:
        """(index of the first row, rows); the rows are gone with the next piece. Raises ModelError."""
        import torch

        from kernels.ops import QuantizedWeight

        if self.scales is None:
            yield from reader.pieces(self.values)
            return
        scales = reader.whole(self.scales).to(torch.float32).flatten()
        for first, rows in reader.pieces(self.values):
            if self.columns is not None:
                rows = rows.view(torch.uint8).bitwise_xor_(128).view(torch.int8)[:, : self.columns]
            yield first, QuantizedWeight(rows, scales[first : first + rows.shape[0]])


def find_sources(
    path: Path, checkpoint: Checkpoint, config: ModelConfig, slots: Mapping[str, Slot]
) -> dict[str, Source]:
    """The source of each slot, in the order of the slots, after comparing the checkpoint's headers with what the model
    wants. Raises ModelError."""
    from models.reader import check_size

    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not _IGNORED.fullmatch(name)}
    if config.names.table.startswith(_PREFIX) and not any(name.startswith(_PREFIX) for name in stored):
        stored = {_PREFIX + name: tensor for name, tensor in stored.items()}
    missing = list[str]()
    unused = dict(stored)

    def take(name: str, dtypes: Collection[str], shapes: Collection[tuple[int, ...]], otherwise: str) -> StoredTensor:
        tensor = unused.pop(name, None)
        if tensor is None:
            missing.append(name)
            return StoredTensor(path, "", (), 0, 0)
        if tensor.dtype not in dtypes:
            raise ModelError(
                f"{name} in {tensor.file} is stored as {tensor.dtype}; supported are {', '.join(dtypes)}: {otherwise}"
            )
        if tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{name} in {tensor.file} has shape {list(tensor.shape)}, expected {wanted}; {_ADVICE}")
        check_size(name, tensor)
        return tensor

    sources = {}
    for name, slot in slots.items():
        module, _, kind = name.rpartition(".")
        if config.quantization is None or kind != "weight" or len(slot.shape) < 2:
            sources[name] = Source(take(name, STORED_DTYPES, [slot.shape], _USE_ORIGINAL))
            continue
        if not config.quantization.covers(module):
            sources[name] = Source(take(name, STORED_DTYPES, [slot.shape], _DISAGREE))
            continue
        if slot.transposed:
            raise ModelError(f"{module} is int8 in {path} and stored transposed, which is not read; {_USE_ORIGINAL}")
        if slot.mode == "none":
            raise ModelError(f"{module} is int8 in {path}, so it cannot stay unquantized")
        rows, columns = slot.shape
        if config.quantization.packed:
            values = take(f"{module}.weight_packed", ["I32"], [(rows, -(-columns // 4))], _DISAGREE)
            unused.pop(f"{module}.weight_shape", None)  # the configuration's word counts, and the packed shape agrees
        else:
            values = take(name, ["I8"], [slot.shape], _DISAGREE)
        scales = take(f"{module}.weight_scale", STORED_DTYPES, [(rows, 1), (rows,)], "the scales are not those of int8")
        sources[name] = Source(values, scales, columns if config.quantization.packed else None)
    if missing:
        raise ModelError(f"{path} lacks {_count(missing)}; {_ADVICE}")
    if unused:
        raise ModelError(f"{path} has, beyond what its config.json describes, {_count(list(unused))}; {_ADVICE}")
    return sources


def _count(names: list[str]) -> str:
    return f"tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors, the first being {names[0]}"


def random_tensors(
    slots: Mapping[str, Slot], config: ModelConfig, seed: int, std: float
) -> Iterator[tuple[str, Tensor]]:
    """Normal weights of standard deviation `std` in the checkpoint's dtype, drawn in the order of the slots.

    The weights of norms are around 1 instead of 0, or such that they are with what is added to them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    for name, slot in slots.items():
        tensor = torch.randn(slot.shape, generator=generator) * std
        if slot.mean:
            tensor += slot.mean
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
