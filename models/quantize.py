"""`quantize_checkpoint`: from an unquantized checkpoint to an int8 one, tensor by tensor.

The int8 values and scales are those that loading with the same mode would make (`kernels.int8`), so the model is the
same; only its file is half as large, and loading has less to read. The format is that of `models.compressed_tensors`,
which other servers read too.

Memory: some rows at a time, and the scales of one tensor. Disk: every byte is written once, in the order in which it is
read; where each tensor lies is known before, since its size is.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kernels.int8 import quantize_rows
from kernels.reference import ReferenceOps
from models.checkpoint import ELEMENT_BYTES, is_weights, open_checkpoint, read_config
from models.compressed_tensors import FIELD, Int8Mode, write_quantization
from models.config import ModelConfig
from models.errors import ModelError
from models.loader import LoadProgress, Source, find_sources, load_config, new_model
from models.reader import TensorReader
from models.slots import Slot

# Of one file, as transformers' save_pretrained has it.
MAX_SHARD_BYTES = 5 * 10**9
# The table of token vectors and the head, whatever an architecture calls them.
TABLE, HEAD = "model.embed_tokens", "lm_head"

# change(tensor name, some of its rows, index of the first) -> what is written, or quantized, in place of them.
Change = Callable[[str, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class _Place:
    """One tensor to be written: where its bytes begin in its file is `offset`, once the file has been laid out."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


def quantize_checkpoint(
    source: Path,
    target: Path,
    mode: Int8Mode,
    *,
    keep: Collection[str] = (),
    change: Change | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[LoadProgress], None] | None = None,
) -> int:
    """Write the checkpoint in the folder `source` to the folder `target`, its Linears in int8; return its bytes.

    target: new, or empty. What belongs to the model beside the weights (tokenizer, chat template, license, ...) is
    copied. keep: names of modules that stay as they are; with tied embeddings the table and the head are one. change:
    what to do to the tensors before, such as `models.smooth.Smoothing.apply`. `progress` is called after each tensor.
    Raises ModelError, and leaves nothing behind then.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty folder; give another one, or remove it first")
    config = load_config(source)
    if config.quantization is not None:
        raise ModelError(f"{source} is quantized already; use the checkpoint that it was quantized from")
    checkpoint = open_checkpoint(source)
    table, head = config.names.table, config.names.head
    keep = [{TABLE: table, HEAD: head}.get(module, module) for module in keep]
    if config.tie_word_embeddings and f"{head}.weight" in checkpoint.tensors:
        config = replace(config, tie_word_embeddings=False)
    # A model that is never filled, for the names and shapes of its slots. Of its rotary tables no more than a row.
    slots = new_model(replace(config, max_position_embeddings=1), ReferenceOps(), mode, _keeps(config, keep)).slots()
    if unknown := [module for module in keep if module != head and f"{module}.weight" not in slots]:
        raise ModelError(f"{unknown[0]} cannot stay unquantized: there is no such module in {source}")
    if turned := [name for name, slot in slots.items() if slot.transposed]:
        raise ModelError(
            f"{turned[0]} in {source} is stored transposed, for which there is no int8 format; serve the model as "
            f"it is with --quantization {mode}, which quantizes while it loads"
        )
    sources = find_sources(source, checkpoint, config, slots)
    writer = _Writer(target, slots, sources, change, progress, [])
    shards = writer.shards(max_shard_bytes)
    needed = sum(place.num_bytes for shard in shards for place in shard)
    kept = sorted(name.removesuffix(".weight") for name, slot in slots.items() if _is_kept_linear(name, slot))
    embedding = table not in kept
    if config.tie_word_embeddings and not embedding:
        kept.append(head)  # which has no tensor of its own, so nobody must look for its scales
    if table in kept:
        kept.remove(table)  # no group of the format has it then

    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    written = writer.written
    try:
        target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target).free
        if needed > free:
            raise ModelError(f"{target} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room")
        writer.write(shards)
        for file in sorted(source.iterdir()):
            if _is_copied(file):
                written.append(target / file.name)
                shutil.copyfile(file, written[-1])
        # Last: without it a folder is no model yet.
        written.append(target / "config.json")
        content = read_config(source) | {FIELD: write_quantization(mode, kept, embedding)}
        if not content.get("dtype") and not content.get("torch_dtype"):
            content["torch_dtype"] = config.dtype
        _write_json(written[-1], content)
    except OSError as error:
        _remove(written, created)
        where = f": {error.filename}" if error.filename else ""
        raise ModelError(
            f"{target} cannot be written ({error.strerror}{where}); check permissions and the space on the disk"
        ) from None
    except BaseException:
        _remove(written, created)
        raise
    return needed


def _keeps(config: ModelConfig, keep: Collection[str]) -> Callable[[str], bool]:
    names = set(keep)
    if config.tie_word_embeddings and config.names.head in names:
        names.add(config.names.table)
    return names.__contains__


def _is_kept_linear(name: str, slot: Slot) -> bool:
    return slot.mode == "none" and len(slot.shape) == 2


def _is_copied(file: Path) -> bool:
    """Not the weights in any format, nor what is only about them: their index, and receipts of measurements."""
    return (
        file.is_file()
        and not is_weights(file)
        and file.name != "config.json"
        and not file.name.startswith((".", "receipt-"))
        and not file.name.endswith(".index.json")
    )


def _laid_out(places: Sequence[_Place]) -> list[_Place]:
    """The same places, with their offsets behind the header.

    Larger elements come first: so every tensor begins at a multiple of its element's size.
    """
    placed, offset = [], 0
    for place in sorted(places, key=lambda place: -ELEMENT_BYTES[place.dtype]):
        placed.append(replace(place, offset=offset))
        offset += place.num_bytes
    return placed


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the files of weights. `written` has the name of each before it is made."""

    target: Path
    slots: Mapping[str, Slot]
    sources: Mapping[str, Source]
    change: Change | None
    progress: Callable[[LoadProgress], None] | None
    written: list[Path]

    def shards(self, max_bytes: int) -> list[list[_Place]]:
        """What each file will hold, tensors in the order of the slots; a weight and its scales lie in the same one."""
        shards: list[list[_Place]] = []
        size = 0
        for name, slot in self.slots.items():
            places = [_Place(name, self._kept_dtype(name), slot.shape)]
            if slot.mode != "none":
                rows, columns = slot.shape
                places = [_Place(name, "I8", slot.shape), _Place(f"{name}_scale", "F32", (rows, 1))]
            if slot.mode == "w8a16":
                places[0] = _Place(f"{name}_packed", "I32", (rows, -(-columns // 4)))
                places.append(_Place(f"{name}_shape", "I64", (2,)))
            added = sum(place.num_bytes for place in places)
            if not shards or size + added > max_bytes:
                shards.append([])
                size = 0
            shards[-1] += places
            size += added
        return [_laid_out(shard) for shard in shards]

    def _kept_dtype(self, name: str) -> str:
        # What is changed may leave the range of float16.
        dtype = self.sources[name].values.dtype
        return "F32" if dtype == "F16" and self.change is not None else dtype

    def write(self, shards: Sequence[Sequence[_Place]]) -> None:
        """The files of the shards and, of several, their index."""
        total = sum(source.num_bytes for source in self.sources.values())
        done = 0
        weight_map: dict[str, str] = {}
        with TensorReader() as reader:
            for number, shard in enumerate(shards, 1):
                several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                file = self.target / f"model{several}.safetensors"
                places = {place.name: place for place in shard}
                weight_map |= dict.fromkeys(places, file.name)
                self.written.append(file)
                with file.open("wb") as stream:
                    start = _write_header(stream, shard)
                    for name in self.slots:
                        if name not in places and f"{name}_packed" not in places:
                            continue
                        self._write_tensor(stream, start, name, places, reader)
                        done += self.sources[name].num_bytes
                        if self.progress is not None:
                            self.progress(LoadProgress(done, total, name))
        if len(shards) > 1:
            self.written.append(self.target / "model.safetensors.index.json")
            size = sum(place.num_bytes for shard in shards for place in shard)
            _write_json(self.written[-1], {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _write_tensor(
        self, stream: BinaryIO, start: int, name: str, places: Mapping[str, _Place], reader: TensorReader
    ) -> None:
        slot = self.slots[name]
        packed = f"{name}_packed" in places
        target = places[f"{name}_packed" if packed else name]
        scales = torch.empty(slot.shape[0])
        stream.seek(start + target.offset)
        for first, rows in reader.pieces(self.sources[name].values):
            if self.change is not None:
                rows = self.change(name, rows, first)
            if slot.mode != "none":
                rows, scales[first : first + rows.shape[0]] = quantize_rows(rows)
                rows = pack_rows(rows) if packed else rows
            elif target.dtype == "F32":
                rows = rows.to(torch.float32)
            stream.write(_bytes(rows))
        beside = {f"{name}_scale": scales, f"{name}_shape": torch.tensor(slot.shape)}
        for other, tensor in beside.items():
            if other in places:
                stream.seek(start + places[other].offset)
                stream.write(_bytes(tensor))


def pack_rows(values: Tensor) -> Tensor:
    """int8 [n, K] -> int32 [n, K / 4], rounded up: each number four values + 128, the first in the lowest byte."""
    count, columns = values.shape
    padded = torch.zeros((count, -(-columns // 4) * 4), dtype=torch.uint8)
    padded[:, :columns] = values.view(torch.uint8) ^ 128
    return padded.view(torch.int32)


def _write_header(stream: BinaryIO, places: Sequence[_Place]) -> int:
    """Write it, and return where the data begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for place in places:
        offsets = [place.offset, place.offset + place.num_bytes]
        header[place.name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    return 8 + len(text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove(files: Sequence[Path], folders: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    for folder in folders:
        with contextlib.suppress(OSError):  # not made yet, or somebody else has put something into it
            folder.rmdir()
