"""int8 checkpoints as the compressed-tensors library writes them: what loads, and the one line that says why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_greedy import greedy
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.reference import ReferenceOps
from models import reader
from models.compressed_tensors import read_quantization
from models.errors import ModelError
from models.layers import DecoderModel
from models.llama import Llama
from models.loader import load_config, load_model, save_random_checkpoint

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 46,  # no multiple of four: packed rows end with a gap
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# As published: written out with every argument.
ARGUMENTS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "channel",
    "symmetric": True,
    "type": "int",
}
ACTIVATIONS = ARGUMENTS | {"dynamic": True, "observer": None, "strategy": "token"}
QUANTIZATION: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": ACTIVATIONS,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": ARGUMENTS,
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": 1.24,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "frozen",
}
LAYER = "model.layers.1."
MLP = [f"{LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")]


def changed(path: str, value: Any) -> dict[str, Any]:
    """QUANTIZATION with the value at a path like "config_groups.group_0.weights.num_bits"; ... takes it away."""
    result = copy.deepcopy(QUANTIZATION)
    *folders, name = path.split(".")
    place = result
    for folder in folders:
        place = place[folder]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return result


def write_int8(
    folder: Path,
    quantization: dict[str, Any],
    is_int8: Callable[[str], bool],
    scale: Callable[[Tensor], Tensor] = lambda scales: scales[:, None].bfloat16(),
    packed: bool = False,
) -> Path:
    """A checkpoint with int8 weights in `folder`/int8, and in `folder`/float what it stands for, in float32.

    The values use the whole range from -128 on, as that library's do.
    """
    save_random_checkpoint(HF_CONFIG, folder / "original", 7, 0.2)
    tensors = load_file(folder / "original" / "model.safetensors")
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.dim() != 2 or not is_int8(module):
            stored[name] = meant[name] = tensor
            continue
        scales = scale(tensor.float().abs().amax(1) / 127.5)
        columns = scales.float().reshape(-1, 1)
        values = (tensor.float() / columns).round().clamp(-128, 127).to(torch.int8)
        meant[name] = values.float() * columns
        stored[f"{name}_scale"] = scales
        if packed:
            stored[f"{name}_packed"] = pack(values)
            stored[f"{name}_shape"] = torch.tensor(values.shape)
        else:
            stored[name] = values
    for kind, config, content in (("int8", {"quantization_config": quantization}, stored), ("float", {}, meant)):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(HF_CONFIG | config))
        save_file(content, folder / kind / "model.safetensors")
    return folder / "int8"


def pack(values: Tensor) -> Tensor:
    """int8 [N, K] -> int32 [N, K / 4], number by number."""
    rows = []
    for row in values.tolist():
        unsigned = [value + 128 for value in row] + [0] * (-len(row) % 4)
        words = [sum(byte << 8 * i for i, byte in enumerate(unsigned[j : j + 4])) for j in range(0, len(unsigned), 4)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def logits(model: DecoderModel) -> Tensor:
    ((_, rows),) = greedy(model, model.ops, [list(range(20))], 1)  # type: ignore[attr-defined]
    return rows


def is_linear(module: str) -> bool:
    return module not in ("model.embed_tokens", "lm_head")


CASES: dict[str, tuple[dict[str, Any], Callable[[str], bool], dict[str, Any]]] = {
    "the head ignored": (QUANTIZATION, is_linear, {}),
    "scales in float32, [N]": (QUANTIZATION, is_linear, {"scale": lambda scales: scales}),
    "scales in float16": (QUANTIZATION, is_linear, {"scale": lambda scales: scales[:, None].half()}),
    "naive": (changed("format", "naive-quantized"), is_linear, {}),
    "packed": (changed("format", "pack-quantized"), is_linear, {"packed": True}),
    "nothing ignored": (changed("ignore", []), lambda module: module != "model.embed_tokens", {}),
    "the table too": (changed("config_groups.group_0.targets", ["Linear", "Embedding"]), lambda m: m != "lm_head", {}),
    "a layer's MLP ignored": (changed("ignore", ["lm_head", *MLP]), lambda m: is_linear(m) and m not in MLP, {}),
    "expressions": (
        changed("ignore", ["re:.*lm_head", r"re:model\.layers\.\d+\.self_attn"]),
        lambda module: is_linear(module) and "attn" not in module,
        {},
    ),
    "only down": (
        changed("config_groups.group_0.targets", ["re:.*down_proj$"]),
        lambda module: module.endswith("down_proj"),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loads_as_what_it_stands_for(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", 500)  # so that these small tensors come in pieces too
    quantization, is_int8, more = CASES[case]
    folder = write_int8(tmp_path, quantization, is_int8, **more)
    model = load_model(folder, ReferenceOps(), quantization="w8a16")
    expected = logits(load_model(tmp_path / "float", ReferenceOps()))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    # Unquantized are those, and only those, that the file has unquantized.
    assert isinstance(model, Llama)
    layer = model.layers[1]
    modes = {
        "model.embed_tokens": model.table.mode,
        "lm_head": model.head.mode,
        f"{LAYER}self_attn.q_proj": layer.attention.qkv.mode,
        f"{LAYER}self_attn.o_proj": layer.attention.output.mode,
        f"{LAYER}mlp.gate_proj": layer.mlp.gate_up.mode,
        f"{LAYER}mlp.down_proj": layer.mlp.down.mode,
    }
    assert modes == {module: "w8a16" if is_int8(module) else "none" for module in modes}


def test_the_mode_is_the_files_unless_asked_for_another(tmp_path: Path) -> None:
    folder = write_int8(tmp_path, QUANTIZATION, is_linear)
    own = load_model(folder, ReferenceOps())
    assert isinstance(own, Llama)
    assert own.layers[0].mlp.down.mode == "w8a8"
    assert own.head.mode == "none"
    other = load_model(folder, ReferenceOps(), quantization="w8a16")
    assert not torch.equal(logits(own), logits(other))
    with pytest.raises(ModelError, match=r"int8 \(made for w8a8\) and cannot be used with quantization none; choose"):
        load_model(folder, ReferenceOps(), quantization="none")
    weights_only = changed("config_groups.group_0.input_activations", None)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | {"quantization_config": weights_only}))
    assert torch.equal(logits(load_model(folder, ReferenceOps())), logits(other))


def test_dtype_unsaid_is_that_of_what_is_not_int8(tmp_path: Path) -> None:
    folder = write_int8(tmp_path, QUANTIZATION, is_linear, scale=lambda scales: scales)
    (folder / "config.json").write_text(
        json.dumps(HF_CONFIG | {"quantization_config": QUANTIZATION, "torch_dtype": None})
    )
    assert load_config(folder).dtype == "bfloat16"


GROUP = "config_groups.group_0."
REFUSED: list[tuple[str, Any, str]] = [
    ("quant_method", "gptq", "quant_method is 'gptq'; only 'compressed-tensors' is supported"),
    ("quant_method", "awq", "quant_method is 'awq'"),
    ("quant_method", "bitsandbytes", "quant_method is 'bitsandbytes'"),
    ("quant_method", "fp8", "quant_method is 'fp8'"),
    ("quant_method", ..., "quant_method is 'unnamed'"),
    ("format", "float-quantized", "format is 'float-quantized'"),
    ("format", "dense", "format is 'dense'"),
    ("format", "marlin-24", "format is 'marlin-24'"),
    ("format", ..., "format is None"),
    (f"{GROUP}format", "nvfp4-pack-quantized", "group_0.format is 'nvfp4-pack-quantized'"),
    (f"{GROUP}weights.num_bits", 4, "weights.num_bits is 4, which is not supported (8 is)"),
    (f"{GROUP}weights.type", "float", "weights.type is 'float'"),
    (f"{GROUP}weights.symmetric", False, "weights.symmetric is False"),
    (f"{GROUP}weights.strategy", "group", "weights.strategy is 'group', which is not supported ('channel' is)"),
    (f"{GROUP}weights.strategy", "block", "weights.strategy is 'block'"),
    (f"{GROUP}weights.strategy", "tensor", "weights.strategy is 'tensor'"),
    (f"{GROUP}weights.strategy", None, "weights.strategy is 'tensor'"),
    (f"{GROUP}weights", ARGUMENTS | {"strategy": None, "group_size": 128}, "weights.strategy is 'group'"),
    (f"{GROUP}weights.dynamic", True, "weights.dynamic is True"),
    (f"{GROUP}weights", None, "group_0.weights is None"),
    (f"{GROUP}input_activations.dynamic", False, "input_activations.dynamic is False"),
    (f"{GROUP}input_activations.dynamic", "local", "input_activations.dynamic is 'local'"),
    (f"{GROUP}input_activations.strategy", "tensor", "input_activations.strategy is 'tensor'"),
    (f"{GROUP}input_activations.strategy", "group", "input_activations.strategy is 'group'"),
    (f"{GROUP}input_activations.symmetric", False, "input_activations.symmetric is False"),
    (f"{GROUP}input_activations.num_bits", 4, "input_activations.num_bits is 4"),
    (f"{GROUP}input_activations.type", "float", "input_activations.type is 'float'"),
    (f"{GROUP}output_activations", ACTIVATIONS, "output_activations is 'set'"),
    (f"{GROUP}targets", "Linear", "targets is 'Linear'"),
    (f"{GROUP}targets", ["re:("], "valid regular expressions"),
    ("ignore", [1], "ignore is [1]"),
    ("config_groups", {}, "config_groups is {}"),
    ("config_groups", {"W8A8": ["Linear"]}, "config_groups.W8A8 is ['Linear']"),
    ("kv_cache_scheme", ARGUMENTS, "kv_cache_scheme is {"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config is {"),
    ("transform_config", {"config_groups": {"R1": 1}}, "transform_config is {"),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED)
def test_refused_by_name(path: str, value: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_quantization(changed(path, value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("use the checkpoint that this one was quantized from")


def test_mixtures_are_refused() -> None:
    groups = QUANTIZATION["config_groups"]
    other = copy.deepcopy(groups["group_0"]) | {"targets": ["re:.*down_proj"], "input_activations": None}
    with pytest.raises(ModelError, match=r"a mixture of modes \(w8a8 in config_groups.group_0, w8a16 in"):
        read_quantization(QUANTIZATION | {"config_groups": groups | {"group_1": other}})
    packed = copy.deepcopy(groups["group_0"]) | {"format": "pack-quantized"}
    with pytest.raises(ModelError, match="a mixture of packed and unpacked weights"):
        read_quantization(QUANTIZATION | {"config_groups": groups | {"group_1": packed}})
    # A table has no activations, so its group is no other mode.
    table = copy.deepcopy(other) | {"targets": ["Embedding"]}
    both = read_quantization(QUANTIZATION | {"config_groups": groups | {"group_1": table}})
    assert both.mode == "w8a8"
    assert both.covers("model.embed_tokens")
    assert not both.covers("lm_head")


@pytest.mark.parametrize(
    ("stacked", "others"), [("self_attn.k_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.gate_proj")]
)
def test_a_torn_stack_is_refused(tmp_path: Path, stacked: str, others: str) -> None:
    torn = changed("ignore", ["lm_head", LAYER + stacked])
    folder = write_int8(tmp_path, torn, lambda module: is_linear(module) and module != LAYER + stacked)
    with pytest.raises(ModelError, match=f"{LAYER}{stacked} is unquantized and {LAYER}{others} is int8; they are"):
        load_model(folder, ReferenceOps())


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> str:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(folder, ReferenceOps())
    assert "\n" not in str(caught.value)
    return str(caught.value)


DOWN = f"{LAYER}mlp.down_proj.weight"
DISAGREEMENTS: list[tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = [
    (lambda t: t.pop(f"{DOWN}_scale"), ["lacks tensor", f"{DOWN}_scale"]),
    (lambda t: t.update({f"{DOWN}_scale": torch.ones(32, 2)}), ["shape [32, 2], expected [32, 1] or [32]"]),
    (lambda t: t.update({f"{DOWN}_scale": torch.ones(32, dtype=torch.int8)}), [f"{DOWN}_scale", "stored as I8"]),
    (lambda t: t.update({DOWN: t[DOWN].bfloat16()}), [DOWN, "stored as BF16; supported are I8", "config.json says"]),
    (
        lambda t: t.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)}),
        ["lm_head.weight", "is stored as I8"],
    ),
    (lambda t: t.update({f"{DOWN}_zero_point": torch.zeros(32, 1)}), ["beyond what", f"{DOWN}_zero_point"]),
    (lambda t: t.update({f"{LAYER}mlp.down_proj.weight_g_idx": torch.zeros(46)}), ["beyond what", "weight_g_idx"]),
]


@pytest.mark.parametrize(("edit", "words"), DISAGREEMENTS)
def test_files_that_their_configuration_does_not_describe(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], words: list[str]
) -> None:
    message = edited(write_int8(tmp_path, QUANTIZATION, is_linear), edit)
    for word in words:
        assert word in message


def test_what_is_int8_cannot_stay_unquantized(tmp_path: Path) -> None:
    folder = write_int8(tmp_path, QUANTIZATION, is_linear)
    with pytest.raises(ModelError, match=r"mlp\.down_proj is int8 in .*, so it cannot stay unquantized"):
        load_model(folder, ReferenceOps(), keep=[f"{LAYER}mlp.down_proj"])
    with pytest.raises(ModelError, match=r"mlp\.dawn_proj cannot stay unquantized: there is no such module"):
        load_model(folder, ReferenceOps(), keep=[f"{LAYER}mlp.dawn_proj"])
