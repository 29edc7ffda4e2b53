"""A Hugging Face checkpoint as a GGUF file with Q8_0 weights, for llama.cpp. Runs where `gguf` is installed.

    PYTHON -m loadtests.peers.convert_gguf MODEL_FOLDER OUT.gguf

The format: the GGUF specification and the constants of the `gguf` package. llama.cpp's own converter refuses tokenizers
that it does not know by their hash, so the file is written here; like it does, matrices become Q8_0 and norms stay
float32. The Llama family's rotation pairs neighbouring dimensions in GGUF instead of the two halves of a head, so rows
of q and k are reordered; Qwen3's is the same in both.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One layer's tensors: their names in the checkpoint and in GGUF.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight. Raises ValueError for a tensor of another kind."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and parts[3] in _LAYER:
        return f"blk.{parts[2]}.{_LAYER[parts[3]]}.{kind}"
    raise ValueError(f"no GGUF name is known for the tensor {name}")


def interleave_heads(weight: Any, num_heads: int) -> Any:
    """Reorder the rows of q or k, [num_heads · head_dim, hidden]: dimension i of a head's first half, then i of its
    second, so that the pairs that are rotated together are neighbours."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_bfloat16(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and float32 array of each tensor of a safetensors file. NumPy has no bfloat16: its bits are the upper half
    of a float32's. Raises ValueError for another type."""
    numpy = importlib.import_module("numpy")
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r", offset=8 + header_size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is stored as {entry['dtype']}; this converter reads BF16")
        start, end = entry["data_offsets"]
        bits = data[start:end].view(numpy.uint16).astype(numpy.uint32) << 16
        yield name, bits.view(numpy.float32).reshape(entry["shape"])


def convert(folder: Path, out: Path) -> None:
    """Write `out`. Raises ValueError for another architecture than Llama or Qwen3."""
    gguf = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    if arch not in ("llama", "qwen3"):
        raise ValueError(f"model_type {arch} is not supported here: llama or qwen3")
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // num_heads)

    writer = gguf.GGUFWriter(str(out), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_tokenizer(writer, gguf, json.loads((folder / "tokenizer.json").read_text()), config)

    for name, tensor in read_bfloat16(folder / "model.safetensors"):
        if arch == "llama" and name.endswith("q_proj.weight"):
            tensor = interleave_heads(tensor, num_heads)
        if arch == "llama" and name.endswith("k_proj.weight"):
            tensor = interleave_heads(tensor, num_kv_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, gguf: Any, spec: dict[str, Any], config: dict[str, Any]) -> None:
    """The byte-level BPE of tokenizer.json, split into words as GPT-2 does."""
    vocabulary = sorted(spec["model"]["vocab"], key=lambda token: spec["model"]["vocab"][token])
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
