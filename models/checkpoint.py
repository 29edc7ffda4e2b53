"""A checkpoint as files: where it is, what its headers say, whether it is whole. No torch here, and no weights read.

The layout is that of the Hugging Face Hub: config.json, tokenizer.json and either model.safetensors or several shards
with model.safetensors.index.json. The safetensors format (https://huggingface.co/docs/safetensors): 8 bytes, the
header's length N, little endian; N bytes of JSON, tensor name -> dtype, shape, offsets; then the data, without gaps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.errors import ModelError
from models.fields import token_ids

# The floating-point formats of safetensors that are read, and the names that config.json has for them.
STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Bytes of one element, of the formats that weights and what belongs to them come in.
ELEMENT_BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1}

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_MAX_HEADER_BYTES = 100_000_000  # the limit that the format itself sets
_HASH_WHOLE_FILE_BYTES = 256 * 2**20
_HASH_REGION_BYTES = 64 * 2**10
_HASH_REGIONS = 256


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a header describes it. offset: of its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weight files of a folder, each seen to be complete, and their tensors, in the order in which they lie."""

    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def load_config(path: Path) -> ModelConfig:
    """Read config.json in the folder `path`, with the end tokens of generation_config.json added.

    Where config.json names no dtype it is that of the stored weights. Raises ModelError.
    """
    config = read_config(path)
    if not config.get("dtype") and not config.get("torch_dtype"):
        config = config | _stored_dtype(path)
    generation_file = path / "generation_config.json"
    try:
        model_config = ModelConfig.from_hf(config)
        if generation_file.is_file():
            generation = _read_json(generation_file, "")
            ids = token_ids(generation, "eos_token_id", model_config.vocab_size)
            eos = list(dict.fromkeys(model_config.eos_token_ids + ids))
            model_config = ModelConfig.from_hf(config | {"eos_token_id": eos})
    except ModelError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from None
    return model_config


def read_config(path: Path) -> dict[str, Any]:
    """The content of config.json in the folder `path`. Raises ModelError if it is not there or no JSON object."""
    return _read_json(path / "config.json", f"{path} has no config.json; give a folder in the Hugging Face layout")


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, by its name, in any format that models come in."""
    return file.suffix == ".safetensors" or file.suffix in _OTHER_WEIGHTS


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the weight files of the folder `path` and read their headers.

    Raises ModelError if there are none, if a shard is missing, or if a file is truncated or not a safetensors file.
    """
    files = _weight_files(path)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = _read_header(file)
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
        for name, tensor in header.items():
            if name in tensors:
                raise ModelError(f"tensor {name} is in both {tensors[name].file.name} and {file.name} of {path}")
            tensors[name] = tensor
    return Checkpoint(files, tensors)


def used_vocabulary(path: Path) -> int | None:
    """One more than the largest token id of tokenizer.json in the folder `path`; None if there is no such file."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = _read_json(file, "")
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        largest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1)
        added = [token["id"] for token in tokenizer.get("added_tokens") or []]
        return int(max([largest, *added])) + 1 or None
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ModelError(f"{file} is not a tokenizer that can be read; download it again") from None


def weights_hash(path: Path) -> str:
    """A SHA-256 (hexadecimal) that identifies the weights in the folder `path`, whatever the files are called.

    It covers every file's length and content; of a file above 256 MiB the header, the last 64 KiB and 256 regions of
    64 KiB, evenly spaced. So it tells models apart in a fraction of a second; it is no proof against tampering.
    """
    digest = hashlib.sha256()
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            if size <= _HASH_WHOLE_FILE_BYTES:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
                continue
            data_start = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            digest.update(stream.read(data_start))
            last = size - _HASH_REGION_BYTES
            for region in range(_HASH_REGIONS + 1):
                stream.seek(data_start + (last - data_start) * region // _HASH_REGIONS)
                digest.update(stream.read(_HASH_REGION_BYTES))
    return digest.hexdigest()


def _read_json(file: Path, if_missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(if_missing)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON ({error}); download or write it again") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def _stored_dtype(path: Path) -> dict[str, str]:
    try:
        tensors = open_checkpoint(path).tensors
    except ModelError:  # a configuration may be read before its weights are there; loading them will say so
        return {}
    # Of an int8 checkpoint the dtype of what is not int8; scales may be in a wider one.
    for name, tensor in tensors.items():
        if tensor.dtype in STORED_DTYPES and not name.endswith("_scale"):
            return {"dtype": STORED_DTYPES[tensor.dtype]}
    return {}


def _weight_files(path: Path) -> tuple[Path, ...]:
    """model.safetensors, or the shards of the index, or, failing both, every model*.safetensors there is."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        weight_map = _read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no weight_map; download it again")
        names = sorted(set(weight_map.values()))
        # The index is data from elsewhere: a name with a folder in it could point anywhere.
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index} names {outside[0]!r}; a shard must lie in the same folder")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(names)} shards that its index names, the first being "
                f"{missing[0]}; download the model again"
            )
        return tuple(path / name for name in names)
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; give a folder with config.json and *.safetensors")
    others = sorted(file for file in path.iterdir() if file.suffix in _OTHER_WEIGHTS)
    files = sorted(path.glob("model*.safetensors"))
    if files:
        return tuple(files)
    if others:
        raise ModelError(
            f"{path} has weights only as {others[0].name}, which is not read; convert them to safetensors with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(f"{path} has no model*.safetensors file; download the weights, or give another folder")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their data; ModelError if the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if len(start) < 8 or (length <= _MAX_HEADER_BYTES and size < 8 + length):
            raise ModelError(f"{file} is truncated: it ends after {size} bytes, within its header; download it again")
        if length > _MAX_HEADER_BYTES:
            raise ModelError(f"{file} is not a safetensors file; download it again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {name: _stored_tensor(file, 8 + length, entry) for name, entry in entries}
        data_bytes = max((int(entry["data_offsets"][1]) for _, entry in entries), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{file} is not a safetensors file: its header is damaged; download it again") from None
    if size != 8 + length + data_bytes:
        what = "truncated" if size < 8 + length + data_bytes else "damaged"
        raise ModelError(
            f"{file} is {what}: it has {size} bytes and its header asks for {8 + length + data_bytes}; "
            "download it again"
        )
    return tensors


def _stored_tensor(file: Path, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = map(int, entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError("offsets run backwards")
    return StoredTensor(file, str(entry["dtype"]), tuple(map(int, entry["shape"])), end - begin, data_start + begin)
