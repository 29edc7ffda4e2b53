"""SmoothQuant: the unquantized model stays what it is, to the bit, and planted outliers stop hurting w8a8."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.ops import Ops, QuantizationMode
from kernels.reference import ReferenceOps
from models import evaluate
from models.config import ModelConfig
from models.evaluate import ObservedOps, Reader, compare
from models.layers import DecoderModel
from models.loader import fill, load_model, new_model, random_tensors, resolve_model
from models.smooth import Smoothing, calibrate

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OUTLIER = 96.0


def model_of(ops: Ops, tensors: dict[str, Tensor], mode: QuantizationMode, tied: bool = False) -> DecoderModel:
    model = new_model(ModelConfig.from_hf(HF_CONFIG | {"tie_word_embeddings": tied}), ops, mode)
    fill(model.slots(), tensors.items())
    return model


def random_weights(tied: bool = False) -> dict[str, Tensor]:
    config = ModelConfig.from_hf(HF_CONFIG | {"tie_word_embeddings": tied})
    slots = new_model(config, ReferenceOps(), "none").slots()
    return dict(random_tensors(slots, config, seed=5, std=0.2))


def plant_outliers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale a few channels up before each linear, and its columns down: the same function, with outliers inside."""
    planted = {name: tensor.clone() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(8)

    def plant(up: list[str], down: list[str]) -> None:
        size = planted[down[0]].shape[1]
        channels = torch.randperm(size, generator=generator)[:4]
        for name in up:
            planted[name][channels] *= OUTLIER
        for name in down:
            planted[name][:, channels] /= OUTLIER

    for layer in range(3):
        at = f"model.layers.{layer}."
        plant([f"{at}input_layernorm.weight"], [f"{at}self_attn.{p}_proj.weight" for p in "qkv"])
        plant([f"{at}post_attention_layernorm.weight"], [f"{at}mlp.{p}_proj.weight" for p in ("gate", "up")])
        plant([f"{at}mlp.up_proj.weight", f"{at}mlp.up_proj.bias"], [f"{at}mlp.down_proj.weight"])
    plant(["model.norm.weight"], ["lm_head.weight"])
    return planted


def smoothed(tensors: dict[str, Tensor], smoothing: Smoothing) -> dict[str, Tensor]:
    """In pieces of 7 rows, as a loader that streams would do it."""
    return {
        name: torch.cat([smoothing.apply(name, rows, first * 7) for first, rows in enumerate(tensor.split(7))])
        for name, tensor in tensors.items()
    }


def texts(seed: int, vocab: int = 199) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in (90, 60, 150)]


def kl_of_w8a8(base: dict[str, Tensor], quantized: dict[str, Tensor]) -> float:
    ops = ObservedOps(ReferenceOps())
    models = model_of(ops.as_ops(), base, "none"), model_of(ops.as_ops(), quantized, "w8a8")
    readers = [Reader(model, ops, torch.float32) for model in models]
    return compare(*readers, texts(2)).mean_kl


def test_it_helps_where_outliers_are_planted() -> None:
    """Calibrated on one text, measured on another."""
    plain = random_weights()
    planted = plant_outliers(plain)
    smoothing = calibrate(lambda ops: model_of(ops, planted, "none"), ReferenceOps(), texts(1))
    costs = [kl_of_w8a8(planted, weights) for weights in (plain, planted, smoothed(planted, smoothing))]
    assert costs[1] > 8 * costs[0], "the planted outliers must hurt, or nothing is shown"
    assert costs[2] < costs[1] / 8
    assert costs[2] < 2 * costs[0], "as good as before they were planted"


@pytest.mark.parametrize("tied", [False, True])
def test_the_unquantized_model_keeps_its_bits(tied: bool) -> None:
    weights = random_weights(tied)
    planted = weights if tied else plant_outliers(weights)
    load = functools.partial(model_of, tensors=planted, mode="none", tied=tied)
    smoothing = calibrate(load, ReferenceOps(), texts(1))
    after = smoothed(planted, smoothing)
    changed = {name for name in planted if not torch.equal(planted[name], after[name])}
    assert all(after[name].dtype == planted[name].dtype for name in planted)
    kinds = {name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for name in changed}
    ends = set() if tied else {"norm", "lm_head"}
    layers = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds == layers | {"input_layernorm", "post_attention_layernorm"} | ends
    ops = ObservedOps(ReferenceOps())
    logits = []
    for tensors in (planted, after):
        model = model_of(ops.as_ops(), tensors, "none", tied)
        hidden = Reader(model, ops, torch.float32).hidden(texts(2))
        logits.append(model.logits(hidden))
    assert torch.equal(*logits)


def test_factors_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a direct computation for one layer, up to the rounding to powers of two; calibrated in several steps."""
    weights = plant_outliers(random_weights())
    seen: list[Tensor] = []

    class Inputs(ObservedOps):
        def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Any:
            seen.append(self._ops.silu_mul(gate_up, quantize).clone())
            return seen[-1]

    ops = Inputs(ReferenceOps())
    Reader(model_of(ops.as_ops(), weights, "none"), ops, torch.float32).hidden(texts(1))
    monkeypatch.setattr(evaluate, "STEP_TOKENS", 100)
    for strength in (0.25, 0.5, 1.0):
        load = functools.partial(model_of, tensors=weights, mode="none")
        smoothing = calibrate(load, ReferenceOps(), texts(1), strength)
        name = "model.layers.1.mlp.down_proj.weight"
        inputs, columns = seen[1].abs().amax(0), weights[name].float().abs().amax(0)
        exact = inputs**strength / columns ** (1 - strength)
        got = smoothing.columns[name]
        assert torch.equal(torch.frexp(got).mantissa, torch.full_like(got, 0.5))
        assert ((got / exact).log2().abs() <= 0.5001).all()
        assert torch.equal(smoothing.rows["model.layers.1.mlp.up_proj.bias"], 1 / got)


def test_dead_channels_and_half_precision() -> None:
    weights = random_weights()
    weights["model.layers.0.input_layernorm.weight"][3] = 0
    weights["model.layers.1.mlp.down_proj.weight"][:, 5] = 0
    smoothing = calibrate(lambda ops: model_of(ops, weights, "none"), ReferenceOps(), texts(1))
    assert smoothing.columns["model.layers.0.self_attn.q_proj.weight"][3] == 1
    assert smoothing.rows["model.layers.1.mlp.up_proj.weight"][5] == 1
    after = smoothed(weights, smoothing)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    name = "model.layers.0.mlp.up_proj.weight"
    assert smoothing.apply(name, weights[name].half()).dtype == torch.float32
    untouched = weights["model.layers.0.self_attn.o_proj.weight"]
    assert smoothing.apply("model.layers.0.self_attn.o_proj.weight", untouched) is untouched


def test_what_is_refused() -> None:
    weights = random_weights()
    load = functools.partial(model_of, tensors=weights, mode="none")
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        calibrate(load, ReferenceOps(), texts(1), 1.5)
    with pytest.raises(ValueError, match="no token"):
        calibrate(load, ReferenceOps(), [])


def test_the_embedded_model(tmp_path: Path) -> None:
    """Real weights, bfloat16, tied: still the same bits, on a text of its own kind."""
    folder = resolve_model("stet-tales")
    tensors = load_file(folder / "model.safetensors")
    rows = texts(3, 3000)
    smoothing = calibrate(lambda ops: load_model(folder, ops), ReferenceOps(), rows)
    ops = ObservedOps(ReferenceOps())
    hidden = []
    for weights in (tensors, smoothed(tensors, smoothing)):
        model = new_model(load_model(folder, ops.as_ops()).config, ops.as_ops(), "none")
        fill(model.slots(), weights.items())
        hidden.append(Reader(model, ops, torch.float32).hidden(rows))
    assert torch.equal(*hidden)
