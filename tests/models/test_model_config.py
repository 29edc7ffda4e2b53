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
from models.families import FAMILIES
from models.rope import RopeScaling
from tests.models.published_configs import PUBLISHED

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
    "GPT-2": (124_439_808, 64, 1e4, None, None, True, False, "float32", (50256,)),
    "Pythia-160M": (162_322_944, 64, 1e4, None, None, True, False, "float16", (0,)),
    "Gemma-2-2B": (2_614_341_888, 256, 1e4, None, 4096, False, False, "bfloat16", (1,)),
    "Gemma-3-1B": (999_885_952, 256, 1e6, None, 512, False, True, "bfloat16", (1, 106)),
    "Phi-3-mini-4k": (3_821_079_552, 96, 1e4, None, 2047, False, False, "bfloat16", (32000,)),
    "OLMo-2-7B": (7_298_617_344, 128, 5e5, None, None, False, True, "float32", (100257,)),
    "Granite-3.1-2B": (2_533_531_648, 64, 5e6, None, None, False, False, "bfloat16", (0,)),
    "StableLM-2-1.6B": (1_644_515_328, 64, 1e4, None, None, True, False, "float16", (100257,)),
    "Mixtral-8x7B": (46_702_792_704, 128, 1e6, None, None, False, False, "bfloat16", (2,)),
    "Qwen3-30B-A3B": (30_532_122_624, 128, 1e6, None, None, False, True, "bfloat16", (151645,)),
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
    own = FAMILIES[config.architecture].aliases

    def stated(name: str) -> Any:
        return file.get(own.get(name, name))

    assert config.hidden_size == stated("hidden_size")
    assert config.num_layers == stated("num_hidden_layers")
    assert config.num_heads == stated("num_attention_heads")
    assert config.num_kv_heads == file.get("num_key_value_heads", config.num_heads)
    inner = file.get("moe_intermediate_size") or stated("intermediate_size") or 4 * config.hidden_size
    assert config.intermediate_size == inner
    assert config.max_position_embeddings == stated("max_position_embeddings")
    assert config.norm_eps in [file[name] for name in file if name.endswith(("norm_eps", "norm_epsilon"))]
    assert config.bos_token_id == file["bos_token_id"]
    biases = config.architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM")
    tied = config.architecture in ("GPT2LMHeadModel", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
    assert config.tie_word_embeddings == file.get("tie_word_embeddings", tied)
    assert config.attention_output_bias == biases
    assert config.mlp_bias == biases


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_newer_dialect_means_the_same(name: str) -> None:
    """transformers 5 writes rope_parameters and dtype; read back, that is the same configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about deprecations of its own
        import transformers
    file = PUBLISHED[name]
    rewritten = transformers.AutoConfig.for_model(file["model_type"]).from_dict(file)
    newer = json.loads(rewritten.to_json_string())
    assert ("rope_parameters" in newer) == (file["model_type"] != "gpt2")
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


def test_what_gemma_assumes() -> None:
    """Its patterns of windows, the type of its factor, and its two rotary bases."""
    config = ModelConfig.from_hf(PUBLISHED["Gemma-2-2B"])
    assert config.sliding_layers == (True, False) * 13
    assert (config.attention_softcap, config.logits_softcap, config.norm_offset) == (50.0, 30.0, 1.0)
    assert config.embedding_scale == 48.0
    assert ModelConfig.from_hf(changed("Gemma-2-2B", hidden_size=3072)).embedding_scale == 55.5  # not 55.43
    float32 = changed("Gemma-2-2B", hidden_size=3072, torch_dtype="float32")
    assert ModelConfig.from_hf(float32).embedding_scale == 3072**0.5
    assert ModelConfig.from_hf(changed("Gemma-2-2B", final_logit_softcapping=None)).logits_softcap is None
    config = ModelConfig.from_hf(PUBLISHED["Gemma-3-1B"])
    assert config.sliding_layers == tuple((layer + 1) % 6 != 0 for layer in range(26))
    assert (config.rope_theta, config.sliding_rope_theta) == (1e6, 1e4)
    assert [config.rotary_kind(layer) for layer in (0, 5)] == ["sliding", "full"]


def test_longrope_serves_the_original_length() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [2.0] * 48}
    config = ModelConfig.from_hf(changed("Phi-3-mini-4k", max_position_embeddings=131072, rope_scaling=scaling))
    assert config.max_position_embeddings == 4096
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    scaling["short_factor"] = [1.0]
    with pytest.raises(ModelError, match="short_factor has 1 entries; it must have 48"):
        ModelConfig.from_hf(changed("Phi-3-mini-4k", rope_scaling=scaling))


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


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("GPT-2", {"n_embd": ...}, "n_embd is missing"),
        ("GPT-2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("Pythia-160M", {"rotary_pct": 0.01}, "rotary_pct is 0.01; of a head's 64 elements"),
        ("Pythia-160M", {"rotary_pct": 2.0}, "rotary_pct is 2.0"),
        ("Gemma-2-2B", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("Gemma-2-2B", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ("Gemma-3-1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Gemma-3-1B", {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ("Granite-3.1-2B", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("StableLM-2-1.6B", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("Mixtral-8x7B", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; there are 8 experts"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, "mlp_only_layers is"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("Llama-2-7B", {"num_local_experts": 8}, "num_local_experts is 8"),
    ],
)
def test_refused_by_name_in_new_families(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(changed(name, **fields))
    assert words in str(caught.value)


def test_refused_in_other_families() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads is missing"):
        ModelConfig.from_hf(changed("Qwen3-0.6B", num_key_value_heads=...))
    with pytest.raises(ModelError, match="layer_types must hold 28 entries"):
        ModelConfig.from_hf(
            changed("Qwen3-0.6B", use_sliding_window=True, sliding_window=8, layer_types=["full_attention"])
        )
    with pytest.raises(ModelError, match="no_rope_layers must hold 32 entries"):
        ModelConfig.from_hf(changed("Llama-2-7B", architectures=["SmolLM3ForCausalLM"], no_rope_layers=[1]))
