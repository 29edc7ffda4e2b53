"""What a checkpoint's config.json says about the computation, as one frozen value. No torch here.

The field names of config.json and their defaults are those of the Hugging Face configuration classes; both of their
dialects are read, the older `rope_theta` / `rope_scaling` / `torch_dtype` and the newer `rope_parameters` / `dtype`.
A value that would change the computation in a way that is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.compressed_tensors import StoredQuantization, read_quantization
from models.errors import ModelError
from models.registry import check_architecture

DtypeName = Literal["bfloat16", "float16", "float32"]
# Limits far beyond any model, so that a nonsense number is an error and not an attempt to allocate it.
_MAX_SIZE = 2**31 - 1
_MAX_NUMBER = 1e30
_MAX_LAYERS = 10_000
DTYPES: tuple[DtypeName, ...] = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length that the model was first trained on.

    kind "linear": every frequency divided by `factor` (position interpolation, arXiv:2306.15595).
    kind "llama3": only the low frequencies are, with a smooth passage between the wavelengths
        original_max_position_embeddings / low_freq_factor and ... / high_freq_factor (Llama 3.1, arXiv:2407.21783).
    kind "yarn": likewise, between beta_fast and beta_slow turns over the original length (arXiv:2309.00071).
    attention_factor multiplies cosines and sines (yarn; 1 for the others).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a decoder that is not a weight. Sizes count elements, positions count tokens.

    sliding_window   tokens (itself included) that a query sees in a sliding layer; None if no layer slides
    sliding_layers   one flag a layer: does it slide?
    rotary_layers    one flag a layer: does it rotate queries and keys? (false: NoPE, arXiv:2501.18795)
    attention_bias   q, k and v projections have a bias;  attention_output_bias: the output projection has one
    qk_norm          an RMSNorm over each head of q and k before the rotation (Qwen3)
    dtype            of the stored weights, and the one to compute in unless told otherwise
    eos_token_ids    tokens that end a generation, in the order found, without repetition
    quantization     which stored weights are int8; None: none is
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    rotary_layers: tuple[bool, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: DtypeName
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: StoredQuantization | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json. Raises ModelError that names the field and what it should be."""
        fields = _Fields(config)
        architecture = _architecture(config)
        check_architecture(architecture)
        family = _FAMILIES[architecture]
        _refuse_unsupported(config)

        num_layers = fields.size("num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise ModelError(f"num_hidden_layers is {num_layers}; at most {_MAX_LAYERS} are supported")
        num_heads = fields.size("num_attention_heads")
        hidden_size = fields.size("hidden_size")
        num_kv_heads = fields.size("num_key_value_heads", num_heads if family.kv_heads_optional else None, num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
            )
        head_dim = _head_dim(fields, family, hidden_size, num_heads)
        rope_theta, rope_scaling = _rope(config, family)
        sliding_window, sliding_layers = _sliding(fields, family, architecture, num_layers)
        has_bias = fields.flag("attention_bias", False) if family.reads_attention_bias else False
        vocab_size = fields.size("vocab_size")

        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.size("intermediate_size"),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=fields.size("max_position_embeddings"),
            sliding_window=sliding_window,
            sliding_layers=sliding_layers,
            rotary_layers=_rotary_layers(fields, architecture, num_layers),
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
            attention_bias=has_bias or family.qkv_bias,
            attention_output_bias=has_bias,
            mlp_bias=fields.flag("mlp_bias", False) if family.reads_mlp_bias else False,
            qk_norm=family.qk_norm,
            dtype=_dtype(config),
            bos_token_id=next(iter(token_ids(config, "bos_token_id", vocab_size)), None),
            eos_token_ids=token_ids(config, "eos_token_id", vocab_size),
            quantization=_quantization(config),
        )

    def layer_window(self, layer: int) -> int | None:
        """Tokens that a query sees in this layer, itself included, or None for all."""
        return self.sliding_window if self.sliding_layers[layer] else None

    @property
    def num_parameters(self) -> int:
        """Weights and biases, a tied embedding counted once."""
        h, d = self.hidden_size, self.head_dim
        q, kv, inner = self.num_heads * d, self.num_kv_heads * d, self.intermediate_size
        layer = h * (q + 2 * kv) + q * h + 3 * h * inner + 2 * h
        layer += (q + 2 * kv) * self.attention_bias + h * self.attention_output_bias
        layer += (2 * inner + h) * self.mlp_bias + 2 * d * self.qk_norm
        return self.num_layers * layer + (1 if self.tie_word_embeddings else 2) * self.vocab_size * h + h


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes, and what it assumes where config.json is silent."""

    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10000.0
    head_dim: int | None = None
    kv_heads_optional: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(kv_heads_optional=True, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(qkv_bias=True),
    "Qwen3ForCausalLM": _Family(qk_norm=True, head_dim=128, reads_attention_bias=True),
    "SmolLM3ForCausalLM": _Family(tied=True, rope_theta=2000000.0, reads_attention_bias=True, reads_mlp_bias=True),
}

# Older or trimmed configurations name only the model type.
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

# Fields that change the computation, with the only values that leave it as it is implemented.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
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
}


class _Fields:
    """Typed access to config.json; every refusal names the field (after `prefix`), what it held and what it must."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self.config = config
        self.prefix = prefix

    def size(self, name: str, missing: int | None = None, null: int | None = None) -> int:
        """A positive integer; `missing` and `null` say what an absent or null field means, if that is allowed."""
        value = self.config.get(name, missing)
        if value is None and name in self.config and null is not None:
            value = null
        if value is None:
            raise ModelError(f"{self.prefix}{name} is missing; it must be a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            raise ModelError(f"{self.prefix}{name} is {value!r}; it must be a positive integer (up to {_MAX_SIZE})")
        return value

    def positive(self, name: str) -> float:
        """A finite number above zero."""
        value = self.config.get(name)
        if value is None:
            raise ModelError(f"{self.prefix}{name} is missing; it must be a positive number")
        return _positive(f"{self.prefix}{name}", value)

    def flag(self, name: str, missing: bool) -> bool:
        """True or false; `missing` where the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return missing
        if not isinstance(value, bool):
            raise ModelError(f"{self.prefix}{name} is {value!r}; it must be true or false")
        return value


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < _MAX_NUMBER:  # a NaN compares false
        raise ModelError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def token_ids(config: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """The field `name` (an id, a list of ids, null or absent) as a tuple without repetition."""
    value = config.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ModelError(f"{name} holds {token!r}; token ids must be integers from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    model_type = config.get("model_type")
    if isinstance(model_type, str):
        return _MODEL_TYPES.get(model_type, model_type)
    raise ModelError('architectures is missing; it must name the architecture, e.g. ["LlamaForCausalLM"]')


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL_VALUES.items():
        if name not in config or config[name] in neutral:
            continue
        value = config[name]
        if isinstance(value, Mapping):
            value = value.get("quant_method", "set")
        allowed = f"only {neutral[0]!r} is" if neutral[0] is not None else "only a model without it is"
        raise ModelError(f"{name} is {value!r}, which is not supported ({allowed})")


def _head_dim(fields: _Fields, family: _Family, hidden_size: int, num_heads: int) -> int:
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


def _rope(config: Mapping[str, Any], family: _Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either dialect."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{name} is {rope!r}; it must be an object or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"{name} differs between layers ({', '.join(rope)}), which is not supported")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ModelError(f"{name}.partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")

    theta = _positive("rope_theta", rope.get("rope_theta", config.get("rope_theta") or family.rope_theta))
    if theta <= 1:
        raise ModelError(f"rope_theta is {theta!r}; it must be above 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _ROPE_SCALINGS:
        raise ModelError(f"{name}.rope_type is {kind!r}; supported are 'default', {str(list(_ROPE_SCALINGS))[1:-1]}")
    return theta, _ROPE_SCALINGS[kind](_Fields(rope, f"{name}."), config)


def _linear_scaling(rope: _Fields, config: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling("linear", rope.positive("factor"))


def _llama3_scaling(rope: _Fields, config: Mapping[str, Any]) -> RopeScaling:
    scaling = RopeScaling(
        "llama3",
        rope.positive("factor"),
        _original_length(rope, config),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError(f"{rope.prefix}low_freq_factor must be below {rope.prefix}high_freq_factor")
    return scaling


def _yarn_scaling(rope: _Fields, config: Mapping[str, Any]) -> RopeScaling:
    factor = rope.positive("factor")

    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = amplitude(1.0)
    if rope.config.get("attention_factor") is not None:
        attention_factor = rope.positive("attention_factor")
    elif rope.config.get("mscale") and rope.config.get("mscale_all_dim"):
        attention_factor = amplitude(rope.positive("mscale")) / amplitude(rope.positive("mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        _original_length(rope, config),
        beta_fast=rope.positive("beta_fast") if rope.config.get("beta_fast") else 32.0,
        beta_slow=rope.positive("beta_slow") if rope.config.get("beta_slow") else 1.0,
        truncate=rope.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _original_length(rope: _Fields, config: Mapping[str, Any]) -> int:
    """Tokens of the first training, said in the scaling, beside it (which wins), or, unsaid, the present length."""
    name = "original_max_position_embeddings"
    if config.get(name) is not None:
        return _Fields(config).size(name)
    return rope.size(name) if rope.config.get(name) is not None else _Fields(config).size("max_position_embeddings")


_ROPE_SCALINGS: dict[str, Callable[[_Fields, Mapping[str, Any]], RopeScaling]] = {
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
}


def _sliding(
    fields: _Fields, family: _Family, architecture: str, num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and the layers that have it, by the rule of each architecture."""
    config = fields.config
    none = (False,) * num_layers
    if architecture == "LlamaForCausalLM":  # its reference implementation knows no window, whatever the file says
        return None, none
    if architecture == "MistralForCausalLM":  # every layer slides, unless the window is null; 4096 where unsaid
        window = config.get("sliding_window", 4096)
        return (None, none) if window is None else (fields.size("sliding_window", 4096), (True,) * num_layers)

    # Qwen2, Qwen3, SmolLM3: off unless use_sliding_window; then the layers named by layer_types or, without those,
    # the layers from max_window_layers on (SmolLM3: the layers without rotation).
    if not fields.flag("use_sliding_window", False) or config.get("sliding_window") is None:
        return None, none
    layer_types = config.get("layer_types")
    if layer_types is not None:
        known = ("full_attention", "sliding_attention")
        listed = isinstance(layer_types, list) and len(layer_types) == num_layers
        if not listed or any(kind not in known for kind in layer_types):
            raise ModelError(f"layer_types must hold {num_layers} entries, each one of {', '.join(known)}")
        layers = tuple(kind == "sliding_attention" for kind in layer_types)
    elif architecture == "SmolLM3ForCausalLM":
        layers = tuple(not rotates for rotates in _rotary_layers(fields, architecture, num_layers))
    else:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"max_window_layers is {first!r}; it must be an integer of at least 0")
        layers = tuple(layer >= first for layer in range(num_layers))
    return (fields.size("sliding_window"), layers) if any(layers) else (None, none)


def _rotary_layers(fields: _Fields, architecture: str, num_layers: int) -> tuple[bool, ...]:
    if architecture != "SmolLM3ForCausalLM":
        return (True,) * num_layers
    flags = fields.config.get("no_rope_layers")  # despite its name, 1 means that the layer rotates
    if flags is None:
        interval = fields.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ModelError(f"no_rope_layers must hold {num_layers} entries, each 0 or 1")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Of the field and of its older name."""
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            return read_quantization(config[name])
    return None


def _dtype(config: Mapping[str, Any]) -> DtypeName:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise ModelError(f"dtype is {value!r}; supported are {', '.join(DTYPES)}")
