"""What each architecture fixes, and what it assumes where its config.json is silent. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]

SILU: Mapping[str, Activation] = {"silu": "silu", "swish": "silu"}
GELU_TANH: Mapping[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
ANY_GELU: Mapping[str, Activation] = {"gelu": "gelu", **GELU_TANH, "gelu_fast": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Names:
    """What a checkpoint calls a model's modules: those of a layer after `layer`, whose {} is its number.

    qkv, gate_up: in the order in which they are stacked. gate_up: a feed-forward layer without a gate has one module.
    attention_norm and mlp_norm come before attention and feed-forward layer; the other two after them, before what they
    made is added to the residual stream. router, expert: of a mixture of experts, whose modules gate_up and down then
    lie in `expert`, its {} being the number of the expert.
    """

    table: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    after_attention_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    after_mlp_norm: str = "post_feedforward_layernorm"
    norm: str = "model.norm"
    head: str = "lm_head"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    names          of the modules in a checkpoint
    qkv_bias, output_bias, mlp_bias   whether there are such biases, whatever config.json says
    reads_attention_bias, reads_mlp_bias   whether config.json decides
    qk_norm        "head": an RMSNorm over each head of q and k (Qwen3); "projection": over all heads (OLMo 2)
    norm           "rms", or "layer" with weight and bias;  norm_eps: the field of its epsilon
    norm_offset    what is added to the stored weight of a norm (Gemma: 1)
    norms          norms of the hidden size in a layer
    activations    the names that are known -> what they mean;  activation: the field;  its value where unsaid
    gated          whether the feed-forward layer has a gate
    tied           whether the head is the table of token vectors where config.json is silent
    rope_theta, partial_rotary   where it is silent; partial_rotary None: all of a head is rotated, whatever it says
    learned_positions   instead of rotation (GPT-2)
    kv_heads_optional   as many as query heads where it is silent;  grouped: false: always so
    longrope       whether that way of stretching frequencies is taken
    reads          fields that others refuse and that are read here
    aliases        its own names of common fields
    """

    names: Names = Names()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    norm_offset: float = 0.0
    norms: int = 2
    activations: Mapping[str, Activation] = field(default_factory=lambda: SILU)
    activation: str = "hidden_act"
    activation_unsaid: str = "silu"
    gated: bool = True
    tied: bool = False
    rope_theta: float = 10000.0
    partial_rotary: float | None = None
    learned_positions: bool = False
    longrope: bool = False
    head_dim: int | None = None
    kv_heads_optional: bool = False
    grouped: bool = True
    reads: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)


_GPT2 = Family(
    names=Names(
        table="transformer.wte",
        layer="transformer.h.{}.",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        norm="transformer.ln_f",
    ),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm="layer",
    norm_eps="layer_norm_epsilon",
    activations=ANY_GELU,
    activation="activation_function",
    activation_unsaid="gelu_new",
    gated=False,
    tied=True,
    learned_positions=True,
    grouped=False,
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
)

_GPT_NEOX = Family(
    names=Names(
        table="gpt_neox.embed_in",
        layer="gpt_neox.layers.{}.",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        norm="gpt_neox.final_layer_norm",
        head="embed_out",
    ),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    reads_attention_bias=True,
    norm="layer",
    norm_eps="layer_norm_eps",
    activations=ANY_GELU,
    activation_unsaid="gelu",
    gated=False,
    partial_rotary=0.25,
    grouped=False,
    aliases={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
)

_GEMMA_NAMES = Names(mlp_norm="pre_feedforward_layernorm")
_GEMMA2 = Family(
    names=_GEMMA_NAMES,
    reads_attention_bias=True,
    norm_offset=1.0,
    norms=4,
    activations=GELU_TANH,
    activation="hidden_activation",
    activation_unsaid="gelu_pytorch_tanh",
    tied=True,
    head_dim=256,
    reads=frozenset(
        ("hidden_act", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "layer_types")
    ),
)
_GEMMA3 = Family(
    names=_GEMMA_NAMES,
    reads_attention_bias=True,
    qk_norm="head",
    norm_offset=1.0,
    norms=4,
    activations=GELU_TANH,
    activation="hidden_activation",
    activation_unsaid="gelu_pytorch_tanh",
    tied=True,
    rope_theta=1000000.0,
    head_dim=256,
    reads=_GEMMA2.reads,
)

FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "GraniteForCausalLM": Family(
        kv_heads_optional=True,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        reads=frozenset(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")),
    ),
    "LlamaForCausalLM": Family(kv_heads_optional=True, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family(),
    "MixtralForCausalLM": Family(
        names=Names(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}.",
            gate_up=("w1", "w3"),
            down="w2",
        ),
        rope_theta=1000000.0,
        kv_heads_optional=True,
        reads=frozenset(("num_local_experts", "num_experts")),
    ),
    "Olmo2ForCausalLM": Family(
        names=Names(attention_norm="", mlp_norm=""),
        reads_attention_bias=True,
        qk_norm="projection",
        kv_heads_optional=True,
    ),
    "Phi3ForCausalLM": Family(
        names=Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
        kv_heads_optional=True,
        partial_rotary=1.0,
        longrope=True,
        reads=frozenset(("partial_rotary_factor",)),
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm="head", head_dim=128, reads_attention_bias=True),
    "Qwen3MoeForCausalLM": Family(
        names=Names(gate_up=("gate_proj", "up_proj"), down="down_proj"),
        qk_norm="head",
        reads_attention_bias=True,
        reads=frozenset(("num_local_experts", "num_experts")),
    ),
    "SmolLM3ForCausalLM": Family(tied=True, rope_theta=2000000.0, reads_attention_bias=True, reads_mlp_bias=True),
    "StableLmForCausalLM": Family(
        norm="layer",
        norm_eps="layer_norm_eps",
        partial_rotary=0.25,
        kv_heads_optional=True,
        reads=frozenset(("partial_rotary_factor",)),
    ),
}

# Older or trimmed configurations name only the model type.
MODEL_TYPES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
