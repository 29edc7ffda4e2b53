"""From files to weights: what loads, and the one line that says why something does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_greedy import greedy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import LinearWeight, QuantizationMode, QuantizedWeight
from kernels.reference import ReferenceOps
from models import checkpoint
from models.config import ModelConfig
from models.errors import ModelError
from models.layers import DecoderModel
from models.loader import (
    LoadProgress,
    fill,
    load_config,
    load_model,
    new_model,
    random_model,
    random_tensors,
    save_random_checkpoint,
    weights_hash,
)

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEED, STD = 7, 0.2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_checkpoint(HF_CONFIG, tmp_path, SEED, STD)
    return tmp_path


def logits(model: DecoderModel) -> Tensor:
    ((_, rows),) = greedy(model, model.ops, [list(range(20))], 1)  # type: ignore[attr-defined]
    return rows


def set_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> list[Path]:
    """Split the single file into three shards and an index, the pieces of packed weights torn apart."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder / file for file in set(weight_map.values()))


def refusal(folder: Path) -> str:
    """The line that loading gives; it must be one line."""
    with pytest.raises(ModelError) as caught:
        load_model(folder, ReferenceOps())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What loads


def test_random_model_and_its_checkpoint_are_the_same_model(folder: Path) -> None:
    config = ModelConfig.from_hf(HF_CONFIG)
    expected = logits(random_model(config, ReferenceOps(), SEED, STD))
    assert torch.equal(logits(load_model(folder, ReferenceOps())), expected)
    assert not torch.equal(logits(random_model(config, ReferenceOps(), SEED + 1, STD)), expected)


def test_shards_load_like_one_file(folder: Path) -> None:
    expected = logits(load_model(folder, ReferenceOps()))
    shard(folder)
    assert torch.equal(logits(load_model(folder, ReferenceOps())), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_load(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    rounded = logits(load_model(folder, ReferenceOps()))
    edit_tensors(folder, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}))
    assert torch.equal(rounded, logits(load_model(folder, ReferenceOps())))


def test_pieces_of_different_dtypes_lose_nothing() -> None:
    """The half-precision piece of q, k and v comes first; the others must not be rounded to it."""
    config = ModelConfig.from_hf(HF_CONFIG)
    ops = ReferenceOps()
    model = new_model(config, ops, "none")
    half = "model.layers.0.self_attn.q_proj.weight"
    weights = dict(random_tensors(model.slots(), config, SEED, STD))
    fill(model.slots(), {half: weights[half].bfloat16(), **{n: t for n, t in weights.items() if n != half}}.items())
    all_wide = new_model(config, ops, "none")
    fill(all_wide.slots(), (weights | {half: weights[half].bfloat16().float()}).items())
    assert torch.equal(logits(model), logits(all_wide))


def test_fill_wants_every_tensor_once() -> None:
    config = ModelConfig.from_hf(HF_CONFIG)
    slots = new_model(config, ReferenceOps(), "none").slots()
    with pytest.raises(ModelError, match=r"27 tensors never came, the first being model\.embed_tokens\.weight"):
        fill(slots, [])
    norm = ("model.norm.weight", torch.ones(32))
    with pytest.raises(ModelError, match="wanted no such tensor"):
        fill(slots, [norm, norm])


def test_computed_tensors_of_old_checkpoints_are_ignored(folder: Path) -> None:
    expected = logits(load_model(folder, ReferenceOps()))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert torch.equal(logits(load_model(folder, ReferenceOps())), expected)


def test_a_stored_head_wins_over_the_tie(folder: Path) -> None:
    """As in transformers: tie_word_embeddings with a head of its own in the file runs that head."""
    expected = logits(load_model(folder, ReferenceOps()))
    set_config(folder, tie_word_embeddings=True)
    model = load_model(folder, ReferenceOps())
    assert torch.equal(logits(model), expected)
    assert not model.config.tie_word_embeddings

    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    tied = load_model(folder, ReferenceOps())
    assert tied.config.tie_word_embeddings
    assert not torch.equal(logits(tied), expected)


def test_vocabulary_beyond_the_tokenizer_is_masked(folder: Path) -> None:
    expected = logits(load_model(folder, ReferenceOps()))
    tokenizer = {"model": {"vocab": {f"t{i}": i for i in range(50)}}, "added_tokens": [{"id": 52, "content": "<e>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    masked = logits(load_model(folder, ReferenceOps()))
    assert torch.equal(masked[:, :53], expected[:, :53])
    assert torch.isfinite(masked).all()
    assert (masked[:, 53:] < -1e30).all()
    with pytest.raises(ValueError, match="num_tokens is 62"):
        load_model(folder, ReferenceOps()).mask_vocabulary(62)


def test_progress_ends_at_the_whole(folder: Path) -> None:
    shard(folder)
    seen: list[LoadProgress] = []
    load_model(folder, ReferenceOps(), progress=seen.append)
    total = ModelConfig.from_hf(HF_CONFIG).num_parameters * 4
    assert [p.total_bytes for p in seen] == [total] * len(seen)
    assert [p.loaded_bytes for p in seen] == sorted({p.loaded_bytes for p in seen})
    assert seen[-1].loaded_bytes == total
    assert "lm_head.weight" in {p.tensor for p in seen}


def test_weight_bytes(folder: Path) -> None:
    model = load_model(folder, ReferenceOps())
    rotary_table = 2 * 64 * 4 * 4  # cosines and sines of 64 positions, 4 frequencies, float32
    assert model.weight_bytes == model.config.num_parameters * 4 + rotary_table


class CountingOps(ReferenceOps):
    """Counts the elements that the weights given to it had, and notes their mode."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[tuple[int, ...]] = []
        self.modes: set[str] = set()

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        self.prepared.append(tuple(weight.shape))
        self.modes.add(mode)
        return super().prepare_linear(weight, bias, mode, embedding)


def test_weights_are_prepared_as_they_are_used(folder: Path) -> None:
    """q, k and v as one weight, gate and up as another, each once and in the mode asked for."""
    ops = CountingOps()
    load_model(folder, ops, quantization="w8a8")
    layer = [(64, 32), (32, 32), (96, 32), (32, 48)]
    assert sorted(ops.prepared) == sorted([*layer, *layer, (61, 32), (61, 32)])
    assert ops.modes == {"w8a8"}


def test_end_tokens_of_both_files(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 9], "top_p": 0.9}))
    assert load_config(folder).eos_token_ids == (2, 5, 9)


def test_dtype_unsaid_is_that_of_the_weights(folder: Path) -> None:
    set_config(folder, torch_dtype=None)
    assert load_config(folder).dtype == "float32"
    edit_tensors(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert load_config(folder).dtype == "bfloat16"
    (folder / "model.safetensors").unlink()
    assert load_config(folder).dtype == "float32"  # a configuration without weights can still be looked at


def test_weights_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the same weights, and another one after any change, in the sampled form too."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for limit in (checkpoint._HASH_WHOLE_FILE_BYTES, 0):
        monkeypatch.setattr(checkpoint, "_HASH_WHOLE_FILE_BYTES", limit)
        before = weights_hash(folder)
        assert len(before) == 64
        assert weights_hash(folder) == before
        for position in (10, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            file.write_bytes(changed)
            assert weights_hash(folder) != before
        file.write_bytes(content)


def test_no_torch_until_a_model_is_made(folder: Path) -> None:
    """The process that speaks HTTP reads configurations and must not pay for torch."""
    code = (
        "import sys, pathlib; from models.loader import *; path = pathlib.Path(sys.argv[1]);"
        "load_config(path); weights_hash(path); resolve_model(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


# What does not


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')
    assert "config.json is not valid JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json must hold a JSON object" in refusal(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not valid JSON" in refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    set_config(folder, architectures=["MambaForCausalLM"])
    message = refusal(folder)
    assert "MambaForCausalLM" in message
    assert "LlamaForCausalLM" in message
    assert str(folder / "config.json") in message


def test_generation_config_is_checked_too(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 61}))
    assert "eos_token_id holds 61" in refusal(folder)


def test_only_bin_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no model*.safetensors file; download" in refusal(folder)


def test_missing_shard(folder: Path) -> None:
    shards = shard(folder)
    shards[1].unlink()
    message = refusal(folder)
    assert "lacks 1 of 3 shards" in message
    assert shards[1].name in message


def test_index_that_points_elsewhere(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "must lie in the same folder" in refusal(folder)
    index.write_text(json.dumps({"weights": {}}))
    assert "has no weight_map" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(folder)
    assert str(file) in message
    assert "is truncated" in message
    assert "download it again" in message


def test_file_with_something_behind_it(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"[" * 100_000],
)
def test_damaged_header(folder: Path, header: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is not a safetensors file" in refusal(folder)


def test_header_that_promises_more_than_there_is(folder: Path) -> None:
    file = folder / "model.safetensors"
    shape, lie = b'"shape":[61,32]', b'"shape":[99,32]'
    assert shape in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(shape, lie))
    assert "has shape [99, 32], expected [61, 32]" in refusal(folder)
    set_config(folder, vocab_size=99)
    message = refusal(folder)
    assert f"{file} cannot be read" in message
    assert "download it again" in message


@pytest.mark.parametrize("tokenizer", [{"model": 3}, {"model": {"vocab": {"a": "b"}}}, {"added_tokens": [{}]}])
def test_damaged_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json is not a tokenizer that can be read" in refusal(folder)


def test_not_safetensors_at_all(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64)
    assert "is not a safetensors file" in refusal(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


def test_missing_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    assert "lacks tensor model.layers.1.self_attn.k_proj.bias;" in refusal(folder)
    set_config(folder, num_hidden_layers=3)
    message = refusal(folder)
    assert "lacks 13 tensors, the first being model.layers.1.self_attn.k_proj.bias" in message


def test_untied_head_is_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks tensor lm_head.weight" in refusal(folder)


def test_wrong_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(47, 32)}))
    message = refusal(folder)
    assert f"{name} in {folder / 'model.safetensors'} has shape [47, 32], expected [48, 32]" in message


def test_unexpected_tensors(folder: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(2)]
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    message = refusal(folder)
    assert "beyond what its config.json describes" in message
    assert f"2 tensors, the first being {names[0]}" in message


def test_quantized_weights(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(48, 32, dtype=torch.int8)}))
    assert f"{name} in {folder / 'model.safetensors'} is stored as I8; supported are BF16" in refusal(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    shards = shard(folder)
    with safe_open(shards[0], framework="pt") as first:
        name = next(iter(first.keys()))
        extra = first.get_tensor(name)
    save_file(load_file(shards[1]) | {name: extra}, shards[1])
    assert f"tensor {name} is in both" in refusal(folder)


def test_all_is_checked_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong last tensor of a large model must not cost the minutes of loading the others."""
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    seen: list[LoadProgress] = []
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load_model(folder, ReferenceOps(), progress=seen.append)
    assert not seen
