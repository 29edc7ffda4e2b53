"""What loading, int8 checkpoints, evaluation and smoothing make of families other than Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_greedy import greedy
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.ops import QuantizationMode
from kernels.reference import ReferenceOps
from models import reader
from models.compressed_tensors import Int8Mode
from models.config import ModelConfig
from models.errors import ModelError
from models.evaluate import ObservedOps, Reader, compare
from models.layers import DecoderModel
from models.loader import fill, load_model, new_model, random_tensors, save_random_checkpoint
from models.quantize import HEAD, TABLE, quantize_checkpoint
from models.registry import supported_architectures
from models.smooth import calibrate

BASE: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
FIELDS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "layer_norm_epsilon": 1e-5},
    "GPTNeoXForCausalLM": {"hidden_act": "gelu"},
    "Gemma2ForCausalLM": {"head_dim": 16},
    "Gemma3ForCausalLM": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "MixtralForCausalLM": {"num_local_experts": 5},
    "Qwen3MoeForCausalLM": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "StableLmForCausalLM": {"use_parallel_residual": True},
}
EVERY = supported_architectures()


def fields(architecture: str) -> dict[str, Any]:
    return BASE | {"architectures": [architecture]} | FIELDS.get(architecture, {})


def make(folder: Path, architecture: str, **more: Any) -> Path:
    save_random_checkpoint(fields(architecture) | more, folder, 7, 0.2)
    return folder


def logits(model: DecoderModel) -> Tensor:
    ((_, rows),) = greedy(model, model.ops, [list(range(20))], 1)  # type: ignore[attr-defined]
    return rows


@pytest.mark.parametrize("mode", ["w8a16", "w8a8"])
@pytest.mark.parametrize("architecture", [name for name in EVERY if name != "GPT2LMHeadModel"])
def test_int8_checkpoints_are_the_models_that_loading_quantizes(
    tmp_path: Path, architecture: str, mode: Int8Mode
) -> None:
    source, target = make(tmp_path / "source", architecture), tmp_path / "target"
    quantize_checkpoint(source, target, mode)
    expected = logits(load_model(source, ReferenceOps(), quantization=mode))
    assert torch.equal(logits(load_model(target, ReferenceOps())), expected)
    assert not torch.equal(logits(load_model(source, ReferenceOps())), expected)
    names = load_file(target / "model.safetensors").keys()
    assert not any("gate.weight_" in name and "expert" not in name for name in names)  # routers stay as they are
    kept = tmp_path / "kept"
    quantize_checkpoint(source, kept, mode, keep=(TABLE, HEAD))
    model = load_model(kept, ReferenceOps())
    assert model.table.mode == model.head.mode == "none"  # type: ignore[attr-defined]


def test_gpt2_is_quantized_while_it_loads_and_in_no_file(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "GPT2LMHeadModel")
    with pytest.raises(ModelError, match=r"c_attn\.weight in .* is stored transposed"):
        quantize_checkpoint(source, tmp_path / "target", "w8a8")
    plain, quantized = (logits(load_model(source, ReferenceOps(), quantization=mode)) for mode in ("none", "w8a8"))
    assert 0 < (plain - quantized).norm() / plain.norm() < 0.1


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("mode", ["none", "w8a8"])
def test_pieces_find_their_places(
    tmp_path: Path, architecture: str, mode: QuantizationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are transposed, whose rows have an order of their own, or that are one expert's part of a weight."""
    folder = make(tmp_path / "source", architecture)
    expected = logits(load_model(folder, ReferenceOps(), quantization=mode))
    monkeypatch.setattr(reader, "PIECE_BYTES", 3000)
    assert torch.equal(logits(load_model(folder, ReferenceOps(), quantization=mode)), expected)


def test_names_as_older_files_have_them(tmp_path: Path) -> None:
    """GPT-2's without a prefix and with causal masks; GPT-NeoX's with masks and frequencies."""
    for architecture, masks in [
        ("GPT2LMHeadModel", ["h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("GPTNeoXForCausalLM", [f"gpt_neox.layers.1.attention.{n}" for n in ("bias", "rotary_emb.inv_freq")]),
    ]:
        folder = make(tmp_path / architecture, architecture)
        expected = logits(load_model(folder, ReferenceOps()))
        file = folder / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors | {mask: torch.ones(1, 1, 4, 4) for mask in masks}, file, metadata={"format": "pt"})
        assert torch.equal(logits(load_model(folder, ReferenceOps())), expected)


@pytest.mark.parametrize("architecture", EVERY)
def test_the_residual_stream_of_every_family_can_be_watched(architecture: str) -> None:
    config, ops = ModelConfig.from_hf(fields(architecture)), ObservedOps(ReferenceOps())
    readers = []
    for mode in ("none", "w8a8"):
        model = new_model(config, ops.as_ops(), mode, None)  # type: ignore[arg-type]
        slots = model.slots()
        fill(slots, random_tensors(slots, config, 3, 0.1))
        readers.append(Reader(model, ops, torch.float32))
    found = compare(*readers, [list(range(40)), list(range(90, 110))])
    assert len(found.layer_errors) == 2
    assert all(0 < error < 0.2 for error in found.layer_errors)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GraniteForCausalLM"])
def test_smoothing_moves_only_powers_of_two(architecture: str) -> None:
    """The unquantized model keeps its bits."""
    config, ops = ModelConfig.from_hf(fields(architecture)), ReferenceOps()
    weights = dict(random_tensors(new_model(config, ops, "none", None).slots(), config, 3, 0.1))

    def model(ops: Any, tensors: dict[str, Tensor]) -> DecoderModel:
        made = new_model(config, ops, "none", None)
        fill(made.slots(), tensors.items())
        return made

    smoothing = calibrate(lambda ops: model(ops, weights), ops, [list(range(100))])
    moved = {name: smoothing.apply(name, tensor) for name, tensor in weights.items()}
    assert any(not torch.equal(moved[name], weights[name]) for name in weights)
    assert torch.equal(logits(model(ops, moved)), logits(model(ops, weights)))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MixtralForCausalLM", "Olmo2ForCausalLM"])
def test_smoothing_refuses_what_it_does_not_know(architecture: str) -> None:
    config = ModelConfig.from_hf(fields(architecture))

    def load(ops: Any) -> DecoderModel:
        model = new_model(config, ops, "none", None)
        slots = model.slots()
        fill(slots, random_tensors(slots, config, 3, 0.1))
        return model

    with pytest.raises(ModelError, match=f"{architecture} cannot be smoothed"):
        calibrate(load, ReferenceOps(), [[1, 2, 3]])
