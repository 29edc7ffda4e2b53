"""config.json of well-known models, as they are published, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from typing import Any

import pytest

from models.config import ModelConfig
from models.errors import ModelError
from models.rope import RopeScaling

# The fields of the published files, in full where they bear on the computation.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    },
}

OTHER_FIELDS = {"rope_parameters", "layer_types", "dtype", "partial_rotary_factor", "quantization_config"}
FIELDS = sorted({field for file in PUBLISHED.values() for field in file} | OTHER_FIELDS)
SCALING_FIELDS = [
    "factor",
    "rope_theta",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
]
ANYTHING: list[Any] = [None, True, False, 0, 1, -1, 3, 10**30, 10**400, 0.0, 1e-300, 1e300, float("nan"), float("inf")]
ANYTHING += ["", "yarn", [], [0], [None], [[]], [{}], {}, {"a": 1}, {"a": {}}, {"rope_type": []}]

# num_parameters, head_dim, rope_theta, rope scaling factor, window, qkv bias, QK norm, dtype, end tokens
EXPECTED: dict[str, tuple[Any, ...]] = {
    "Llama-2-7B": (6_738_415_616, 128, 1e4, None, None, False, False, "float16", (2,)),
    "Llama-3.1-8B": (8_030_261_248, 128, 5e5, 8.0, None, False, False, "bfloat16", (128001, 128008, 128009)),
    "Llama-3.2-1B": (1_235_814_400, 64, 5e5, 32.0, None, False, False, "bfloat16", (128001,)),
    "Mistral-7B-v0.1": (7_241_732_096, 128, 1e4, None, 4096, False, False, "bfloat16", (2,)),
    "Mistral-7B-v0.3": (7_248_023_552, 128, 1e6, None, None, False, False, "bfloat16", (2,)),
    "Qwen2.5-0.5B": (494_032_768, 64, 1e6, None, None, True, False, "bfloat16", (151643,)),
    "Qwen3-0.6B": (596_049_920, 128, 1e6, None, None, False, True, "bfloat16", (151645,)),
    "SmolLM2-135M": (134_515_008, 64, 1e5, None, None, False, False, "bfloat16", (0,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    """The published numbers of parameters are a check of every size and of each bias and tie."""
    file = PUBLISHED[name]
    config = ModelConfig.from_hf(file)
    factor = config.rope_scaling.factor if config.rope_scaling else None
    assert EXPECTED[name] == (
        config.num_parameters,
        config.head_dim,
        config.rope_theta,
        factor,
        config.layer_window(0),
        config.attention_bias,
        bool(config.qk_norm),
        config.dtype,
        config.eos_token_ids,
    )
    assert config.architecture == file["architectures"][0]
    assert config.vocab_size == file["vocab_size"]
    assert config.hidden_size == file["hidden_size"]
    assert config.num_layers == file["num_hidden_layers"]
    assert config.num_heads == file["num_attention_heads"]
    assert config.num_kv_heads == file["num_key_value_heads"]
    assert config.intermediate_size == file["intermediate_size"]
    assert config.max_position_embeddings == file["max_position_embeddings"]
    assert config.norm_eps == file["rms_norm_eps"]
    assert config.bos_token_id == file["bos_token_id"]
    assert config.tie_word_embeddings == file["tie_word_embeddings"]
    assert not config.attention_output_bias
    assert not config.mlp_bias


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_newer_dialect_means_the_same(name: str) -> None:
    """transformers 5 writes rope_parameters and dtype; read back, that is the same configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about deprecations of its own
        import transformers
    file = PUBLISHED[name]
    rewritten = getattr(transformers, file["architectures"][0].replace("ForCausalLM", "Config")).from_dict(file)
    newer = json.loads(rewritten.to_json_string())
    assert "rope_parameters" in newer
    assert "rope_theta" not in newer
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(file)


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """A published file with some fields set; `...` removes one."""
    return {key: value for key, value in (PUBLISHED[name] | fields).items() if value is not ...}


def test_llama3_scaling_is_read_whole() -> None:
    config = ModelConfig.from_hf(PUBLISHED["Llama-3.1-8B"])
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)


def test_yarn() -> None:
    """As the model cards of Qwen2.5 and Qwen3 advise for long texts."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaling = ModelConfig.from_hf(changed("Qwen3-0.6B", rope_scaling=yarn)).rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, 32768, attention_factor=0.1 * math.log(4.0) + 1.0)
    scaling = ModelConfig.from_hf(changed("Qwen3-0.6B", rope_scaling=yarn | {"attention_factor": 0.5})).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == 0.5


def test_older_key_of_the_scaling_type() -> None:
    config = ModelConfig.from_hf(changed("Llama-2-7B", rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("name", "fields", "window", "layers"),
    [
        ("Mistral-7B-v0.1", {"sliding_window": ...}, 4096, range(32)),
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "max_window_layers": 20}, 32768, range(20, 24)),
        ("Qwen2.5-0.5B", {"use_sliding_window": True}, None, range(0)),
        (
            "Qwen3-0.6B",
            {
                "use_sliding_window": True,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 14,
            },
            128,
            range(0, 28, 2),
        ),
        ("Llama-2-7B", {"sliding_window": 256}, None, range(0)),  # the reference implementation knows none
    ],
)
def test_sliding_layers(name: str, fields: dict[str, Any], window: int | None, layers: range) -> None:
    config = ModelConfig.from_hf(changed(name, **fields))
    assert config.sliding_window == window
    assert [layer for layer in range(config.num_layers) if config.layer_window(layer)] == list(layers)


def test_smollm3_leaves_every_fourth_layer_without_rotation() -> None:
    base = changed("Llama-2-7B", architectures=["SmolLM3ForCausalLM"], num_hidden_layers=8, rope_theta=...)
    assert ModelConfig.from_hf(base).rotary_layers == (True, True, True, False) * 2
    assert ModelConfig.from_hf(base).rope_theta == 2e6
    listed = ModelConfig.from_hf(base | {"no_rope_layers": [0, 1] * 4})
    assert listed.rotary_layers == (False, True) * 4


def test_model_type_stands_in_for_architectures() -> None:
    assert ModelConfig.from_hf(changed("Qwen3-0.6B", architectures=...)).qk_norm


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["BloomForCausalLM"]}, ["BloomForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": ..., "model_type": ...}, ["architectures is missing"]),
        ({"architectures": ..., "model_type": "bloom"}, ["bloom", "LlamaForCausalLM"]),
        ({"hidden_size": ...}, ["hidden_size is missing"]),
        ({"hidden_size": -4096}, ["hidden_size is -4096", "positive integer"]),
        ({"hidden_size": 4096.0}, ["hidden_size is 4096.0", "positive integer"]),
        ({"hidden_size": 10**20}, ["hidden_size is 1000", "up to 2147483647"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers is 10000000", "at most 10000"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is True"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads (32)", "num_key_value_heads (5)"]),
        ({"num_attention_heads": 30, "num_key_value_heads": 30}, ["hidden_size (4096)", "num_attention_heads (30)"]),
        ({"head_dim": 63}, ["head_dim is 63", "even"]),
        ({"intermediate_size": "11008"}, ["intermediate_size is '11008'"]),
        ({"rms_norm_eps": ...}, ["rms_norm_eps is missing"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps is 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({"max_position_embeddings": ...}, ["max_position_embeddings is missing"]),
        ({"rope_theta": -1}, ["rope_theta is -1"]),
        ({"rope_theta": 1}, ["rope_theta is 1.0", "above 1"]),
        ({"rope_theta": float("inf")}, ["rope_theta is inf"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ["rope_scaling.rope_type is 'longrope'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ["'dynamic'", "llama3"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_scaling.factor is 0"]),
        ({"rope_scaling": "linear"}, ["rope_scaling is 'linear'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["rope_scaling.low_freq_factor is missing"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters", "full_attention"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor is 0.25"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
        ({"attention_sinks": True}, ["attention_sinks is True"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings is 'yes'"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["dtype is 'float8_e4m3fn'", "bfloat16"]),
        ({"eos_token_id": 32000}, ["eos_token_id holds 32000", "31999"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id holds 'x'"]),
        ({"bos_token_id": -1}, ["bos_token_id holds -1"]),
    ],
)
def test_refused_by_name(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(changed("Llama-2-7B", **fields))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_whatever_a_field_holds_is_read_or_refused(name: str) -> None:
    """No value of any kind in any field, nor in any field of the scaling, raises anything but ModelError."""
    base = PUBLISHED[name] | {"use_sliding_window": True, "sliding_window": 8}
    scalings = [{"rope_type": kind} | dict.fromkeys(SCALING_FIELDS, 2.0) for kind in ("linear", "llama3", "yarn")]
    for value in ANYTHING:
        for field in FIELDS:
            with contextlib.suppress(ModelError):
                ModelConfig.from_hf(base | {field: value})
        for field in [*SCALING_FIELDS, "rope_type"]:
            for scaling in scalings:
                with contextlib.suppress(ModelError):
                    ModelConfig.from_hf(base | {"rope_scaling": scaling | {field: value}})


def test_refused_in_other_families() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads is missing"):
        ModelConfig.from_hf(changed("Qwen3-0.6B", num_key_value_heads=...))
    with pytest.raises(ModelError, match="layer_types must hold 28 entries"):
        ModelConfig.from_hf(
            changed("Qwen3-0.6B", use_sliding_window=True, sliding_window=8, layer_types=["full_attention"])
        )
    with pytest.raises(ModelError, match="no_rope_layers must hold 32 entries"):
        ModelConfig.from_hf(changed("Llama-2-7B", architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1]))
