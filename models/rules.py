"""The rules by which each architecture's config.json is read: one function for each thing that it says. No torch here.

All of them raise ModelError that names the field and what it should be.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, Literal

from models.compressed_tensors import StoredQuantization
from models.compressed_tensors import read_quantization as parse_quantization
from models.errors import ModelError
from models.families import FAMILIES, MODEL_TYPES, Activation, Family
from models.fields import Fields
from models.rope import Rope, read_rope_by_layer
from models.rope import read_rope as read_one_rope

DtypeName = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[DtypeName, ...] = ("bfloat16", "float16", "float32")
_MAX_EXPERTS = 10_000

# Fields that change the computation, with the only values that leave it as it is implemented.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_sinks": (None, False, 0),
    "clip_qkv": (None,),
    "bias": (None, False),
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "use_bidirectional_attention": (None, False),
    "qk_layernorm": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
}


def read_architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        return MODEL_TYPES.get(model_type, model_type)
    raise ModelError('architectures is missing; it must name the architecture, e.g. ["LlamaForCausalLM"]')


def refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for name, neutral in _NEUTRAL_VALUES.items():
        if name in family.reads or name not in config or config[name] in neutral:
            continue
        value = config[name]
        if isinstance(value, Mapping):
            value = value.get("quant_method", "set")
        stated = [each for each in neutral if each is not None]
        allowed = f"only {stated[0]!r} is" if stated else "only a model without it is"
        raise ModelError(f"{name} is {value!r}, which is not supported ({allowed})")


def read_activation(fields: Fields, family: Family) -> Activation:
    value = fields.get(family.activation)
    if value is None:
        value = family.activation_unsaid
    if not isinstance(value, str) or value not in family.activations:
        known = ", ".join(map(repr, family.activations))
        raise ModelError(f"{family.activation} is {value!r}, which is not supported (only {known} is)")
    return family.activations[value]


def read_head_dim(fields: Fields, family: Family, hidden_size: int, num_heads: int) -> int:
    if fields.config.get("head_dim") is not None:
        head_dim = fields.size("head_dim")
    elif family.head_dim is not None:
        head_dim = family.head_dim
    elif hidden_size % num_heads:
        raise ModelError(
            f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) "
            "where head_dim is not given"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise ModelError(f"head_dim is {head_dim}; it must be even, since its halves are rotated against each other")
    return head_dim


def read_rope(fields: Fields, family: Family, architecture: str, head_dim: int) -> tuple[Rope, float | None]:
    """Of all layers, and the base of those that slide where it is another."""
    if family.learned_positions:
        return Rope(family.rope_theta, None, head_dim), None
    if architecture == "Gemma3ForCausalLM":
        full, sliding = read_rope_by_layer(fields, head_dim, family.rope_theta, 10000.0)
        if sliding.scaling is not None:
            raise ModelError(
                f"rope_parameters.sliding_attention.rope_type is {sliding.scaling.kind!r}; only 'default' is supported"
            )
        return full, sliding.theta
    return read_one_rope(fields, head_dim, family.rope_theta, family.partial_rotary, family.longrope), None


def read_attention_biases(fields: Fields, family: Family, architecture: str) -> tuple[bool, bool]:
    """Of q, k and v, and of the output projection."""
    if architecture == "StableLmForCausalLM":
        return fields.flag("use_qkv_bias", False), False
    if family.reads_attention_bias:
        bias = fields.flag("attention_bias", family.qkv_bias)
        return bias, bias
    return family.qkv_bias, family.output_bias


def read_parallel(fields: Fields, architecture: str) -> bool:
    if architecture == "GPTNeoXForCausalLM":
        return fields.flag("use_parallel_residual", True)
    return fields.flag("use_parallel_residual", False) if architecture == "StableLmForCausalLM" else False


def read_intermediate_size(fields: Fields, architecture: str, hidden_size: int) -> int:
    if architecture == "GPT2LMHeadModel":  # null, or nothing: four times the hidden size
        return fields.size("intermediate_size", 4 * hidden_size, 4 * hidden_size)
    if architecture == "Qwen3MoeForCausalLM":
        return fields.size("moe_intermediate_size", 768)
    return fields.size("intermediate_size")


def read_attention_scale(fields: Fields, architecture: str, head_dim: int) -> float:
    if architecture in _SLIDING_PATTERN:
        return float(fields.positive("query_pre_attn_scalar", 256.0) ** -0.5)
    if architecture == "GraniteForCausalLM":
        return fields.positive("attention_multiplier", 1.0)
    return 1.0 / math.sqrt(head_dim)


def read_softcap(fields: Fields, family: Family, architecture: str, name: str, gemma2: float) -> float | None:
    """gemma2: what Gemma 2 assumes where its file does not have the field; null is no cap."""
    if name not in family.reads:
        return None
    value = fields.config.get(name, gemma2 if architecture == "Gemma2ForCausalLM" else None)
    return None if value is None else fields.positive(name, gemma2)


def read_multiplier(fields: Fields, architecture: str, name: str) -> float:
    return fields.positive(name, 1.0) if architecture == "GraniteForCausalLM" else 1.0


def read_embedding_scale(fields: Fields, architecture: str, hidden_size: int, dtype: DtypeName) -> float:
    if architecture not in _SLIDING_PATTERN:
        return read_multiplier(fields, architecture, "embedding_multiplier")
    # Gemma was trained with this factor in the type of its weights: 55.5 in bfloat16 where sqrt(3072) is 55.43.
    root = float(hidden_size**0.5)
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", root))
        return float(struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0])
    return float(struct.unpack("<e", struct.pack("<e", root))[0]) if dtype == "float16" else root


def read_experts(fields: Fields, architecture: str) -> tuple[int, int]:
    """How many there are, and how many a token goes through."""
    if architecture not in _EXPERTS:
        return 0, 0
    names, unsaid, per_token = _EXPERTS[architecture]
    name = next((name for name in names if fields.get(name) is not None), names[0])
    count = fields.size(name, unsaid)
    used = fields.size("num_experts_per_tok", per_token)
    if count > _MAX_EXPERTS:
        raise ModelError(f"{name} is {count}; at most {_MAX_EXPERTS} are supported")
    if used > count:
        raise ModelError(f"num_experts_per_tok is {used}; there are {count} experts")
    return count, used


# The names of the field for their number, and numbers where the file is silent: of experts, and of those of a token.
_EXPERTS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "MixtralForCausalLM": (("num_local_experts", "num_experts"), 8, 2),
    "Qwen3MoeForCausalLM": (("num_experts", "num_local_experts"), 128, 8),
}


# Architectures whose reference implementations know no window, whatever the file says.
_WINDOWLESS = frozenset(
    (
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "Olmo2ForCausalLM",
        "StableLmForCausalLM",
    )
)
# Those in which every layer has it -> the window where the file is silent.
_ALL_SLIDE: dict[str, int | None] = {"MistralForCausalLM": 4096, "MixtralForCausalLM": None, "Phi3ForCausalLM": None}
_SLIDING_PATTERN = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}


def read_sliding(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and the layers that have it, by the rule of each architecture."""
    config = fields.config
    none = (False,) * num_layers
    if architecture in _WINDOWLESS:
        return None, none
    if architecture in _ALL_SLIDE:  # every layer slides, unless the window is null
        unsaid = _ALL_SLIDE[architecture]
        window = config.get("sliding_window", unsaid)
        return (None, none) if window is None else (fields.size("sliding_window", unsaid), (True,) * num_layers)
    if architecture in _SLIDING_PATTERN:  # all but every second or every sixth layer
        if config.get("sliding_window", 4096) is None:
            return None, none
        layers = _layer_types(config, num_layers)
        if layers is None:
            every = fields.size("sliding_window_pattern", _SLIDING_PATTERN[architecture])
            layers = tuple((layer + 1) % every != 0 for layer in range(num_layers))
        return (fields.size("sliding_window", 4096), layers) if any(layers) else (None, none)

    # Qwen2, Qwen3, Qwen3-MoE, SmolLM3: off unless use_sliding_window; then the layers named by layer_types or, without
    # those, the layers from max_window_layers on (SmolLM3: the layers without rotation).
    if not fields.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return None, none
    named = _layer_types(config, num_layers)
    if named is not None:
        layers = named
    elif architecture == "SmolLM3ForCausalLM":
        layers = tuple(
            not rotates for rotates in read_rotary_layers(fields, FAMILIES[architecture], architecture, num_layers)
        )
    else:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"max_window_layers is {first!r}; it must be an integer of at least 0")
        layers = tuple(layer >= first for layer in range(num_layers))
    return (fields.size("sliding_window"), layers) if any(layers) else (None, none)


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...] | None:
    """Which layers slide, by `layer_types`; None if that is not given."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return None
    known = ("full_attention", "sliding_attention")
    listed = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not listed or any(kind not in known for kind in layer_types):
        raise ModelError(f"layer_types must hold {num_layers} entries, each one of {', '.join(known)}")
    return tuple(kind == "sliding_attention" for kind in layer_types)


def read_rotary_layers(fields: Fields, family: Family, architecture: str, num_layers: int) -> tuple[bool, ...]:
    if family.learned_positions:
        return (False,) * num_layers
    if architecture != "SmolLM3ForCausalLM":
        return (True,) * num_layers
    flags = fields.config.get("no_rope_layers")  # despite its name, 1 means that the layer rotates
    if flags is None:
        interval = fields.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ModelError(f"no_rope_layers must hold {num_layers} entries, each 0 or 1")
    return tuple(bool(flag) for flag in flags[:num_layers])


def read_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Of the field and of its older name."""
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            return parse_quantization(config[name])
    return None


def read_dtype(config: Mapping[str, Any]) -> DtypeName:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise ModelError(f"dtype is {value!r}; supported are {', '.join(DTYPES)}")
