"""What a checkpoint's config.json says about the computation, as one frozen value. No torch here.

The field names of config.json and their defaults are those of the Hugging Face configuration classes; both of their
dialects are read, the older `rope_theta` / `rope_scaling` / `torch_dtype` and the newer `rope_parameters` / `dtype`.
A value that would change the computation in a way that is not implemented is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.compressed_tensors import StoredQuantization
from models.errors import ModelError
from models.families import FAMILIES, Activation, Names
from models.fields import Fields, token_ids
from models.registry import check_architecture
from models.rope import RopeScaling
from models.rules import (
    DtypeName,
    read_activation,
    read_architecture,
    read_attention_biases,
    read_attention_scale,
    read_dtype,
    read_embedding_scale,
    read_experts,
    read_head_dim,
    read_intermediate_size,
    read_multiplier,
    read_parallel,
    read_quantization,
    read_rope,
    read_rotary_layers,
    read_sliding,
    read_softcap,
    refuse_unsupported,
)

_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a decoder that is not a weight. Sizes count elements, positions count tokens.

    rotary_dim       elements at the start of each head that are rotated
    rope_theta, rope_scaling   the rotary embedding; sliding_rope_theta: its base in layers that slide, unscaled, if it
                     is another there (Gemma 3)
    max_position_embeddings   the longest sequence
    sliding_window   tokens (itself included) that a query sees in a sliding layer; None if no layer slides
    sliding_layers   one flag a layer: does it slide?
    rotary_layers    one flag a layer: does it rotate queries and keys? (false: NoPE, arXiv:2501.18795)
    learned_positions   a vector for each position is added to that of the token
    attention_bias   q, k and v projections have a bias;  attention_output_bias: the output projection has one
    attention_scale  of the scores;  attention_softcap, logits_softcap: cap * tanh(x / cap) of scores, of logits
    qk_norm          an RMSNorm over each head of q and k before the rotation ("head"), or over all heads ("projection")
    norm             "rms" (arXiv:1910.07467), or "layer" (arXiv:1607.06450) with a weight and a bias
    norm_eps         of every norm;  norm_offset: what is added to their stored weights
    norms            norms of the hidden size in a layer
    activation, gated   of the feed-forward layer: down(activation(gate) * up), or down(activation(up))
    parallel_residual   attention and feed-forward layer read the same stream, and are added to it together
    embedding_scale  of the token vectors; residual_scale: of what attention and feed-forward layer add to the stream;
                     logits_scale: of the logits
    num_experts      of a mixture of experts, each of intermediate_size, in place of the feed-forward layer; 0: none.
                     experts_per_token: how many a token goes through; normalize_experts: their weights sum to 1
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
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    norms: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_rope_theta: float | None
    max_position_embeddings: int
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    rotary_layers: tuple[bool, ...]
    learned_positions: bool
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    mlp_bias: bool
    activation: Activation
    gated: bool
    qk_norm: Literal["head", "projection"] | None
    parallel_residual: bool
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    num_experts: int
    experts_per_token: int
    normalize_experts: bool
    dtype: DtypeName
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: StoredQuantization | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the content of a config.json. Raises ModelError that names the field and what it should be."""
        architecture = read_architecture(config)
        check_architecture(architecture)
        family = FAMILIES[architecture]
        fields = Fields(config, aliases=family.aliases)
        refuse_unsupported(config, family)

        num_layers = fields.size("num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise ModelError(f"num_hidden_layers is {num_layers}; at most {_MAX_LAYERS} are supported")
        num_heads = fields.size("num_attention_heads")
        hidden_size = fields.size("hidden_size")
        num_kv_heads = num_heads
        if family.grouped:
            unsaid = num_heads if family.kv_heads_optional else None
            num_kv_heads = fields.size("num_key_value_heads", unsaid, num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
            )
        head_dim = read_head_dim(fields, family, hidden_size, num_heads)
        rope, sliding_rope = read_rope(fields, family, architecture, head_dim)
        sliding_window, sliding_layers = read_sliding(fields, architecture, num_layers)
        attention_bias, output_bias = read_attention_biases(fields, family, architecture)
        vocab_size, dtype = fields.size("vocab_size"), read_dtype(config)
        parallel = read_parallel(fields, architecture)
        longest = fields.size("max_position_embeddings")
        if rope.scaling is not None and rope.scaling.kind == "longrope":
            longest = min(longest, rope.scaling.original_max_position_embeddings)
        num_experts, experts_per_token = read_experts(fields, architecture)

        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=read_intermediate_size(fields, architecture, hidden_size),
            norm=family.norm,
            norm_eps=fields.positive(family.norm_eps),
            norm_offset=family.norm_offset,
            # In parallel StableLM's attention and feed-forward layer share one norm.
            norms=1 if parallel and architecture == "StableLmForCausalLM" else family.norms,
            rotary_dim=rope.rotary_dim,
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            sliding_rope_theta=sliding_rope,
            max_position_embeddings=longest,
            sliding_window=sliding_window,
            sliding_layers=sliding_layers,
            rotary_layers=read_rotary_layers(fields, family, architecture, num_layers),
            learned_positions=family.learned_positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
            attention_bias=attention_bias,
            attention_output_bias=output_bias,
            attention_scale=read_attention_scale(fields, architecture, head_dim),
            attention_softcap=read_softcap(fields, family, architecture, "attn_logit_softcapping", 50.0),
            logits_softcap=read_softcap(fields, family, architecture, "final_logit_softcapping", 30.0),
            mlp_bias=fields.flag("mlp_bias", family.mlp_bias) if family.reads_mlp_bias else family.mlp_bias,
            activation=read_activation(fields, family),
            gated=family.gated,
            qk_norm=family.qk_norm,
            parallel_residual=parallel,
            embedding_scale=read_embedding_scale(fields, architecture, hidden_size, dtype),
            residual_scale=read_multiplier(fields, architecture, "residual_multiplier"),
            logits_scale=1.0 / read_multiplier(fields, architecture, "logits_scaling"),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            normalize_experts=architecture == "MixtralForCausalLM" or fields.flag("norm_topk_prob", False),
            dtype=dtype,
            bos_token_id=next(iter(token_ids(config, "bos_token_id", vocab_size)), None),
            eos_token_ids=token_ids(config, "eos_token_id", vocab_size),
            quantization=read_quantization(config),
        )

    def layer_window(self, layer: int) -> int | None:
        """Tokens that a query sees in this layer, itself included, or None for all."""
        return self.sliding_window if self.sliding_layers[layer] else None

    @property
    def names(self) -> Names:
        """What a checkpoint calls the modules."""
        return FAMILIES[self.architecture].names

    @property
    def stream_eps(self) -> float:
        """Of the norms that read the residual stream, which is kept divided by `residual_scale`: so what is added to it
        need not be multiplied, and a norm divides it by its size in any case, but for the epsilon."""
        return self.norm_eps / self.residual_scale**2

    @property
    def rotary_tables(self) -> int:
        """How many tables of cosines and sines the layers need between them: with and without a window, and, where a
        layer does not rotate, one that rotates by nothing."""
        return len({self.rotary_kind(layer) for layer in range(self.num_layers)})

    def rotary_kind(self, layer: int) -> Literal["full", "sliding", "none"]:
        """Which table a layer rotates by."""
        if not self.rotary_layers[layer]:
            return "none"
        return "sliding" if self.sliding_rope_theta is not None and self.sliding_layers[layer] else "full"

    @property
    def norm_values(self) -> int:
        """Elements of the weights and biases of all norms."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qk = {None: 0, "head": 2 * self.head_dim, "projection": q + kv}[self.qk_norm]
        each = self.hidden_size * (2 if self.norm == "layer" else 1)
        return self.num_layers * (self.norms * each + qk) + each

    @property
    def num_parameters(self) -> int:
        """Weights and biases, a tied embedding counted once."""
        h, d = self.hidden_size, self.head_dim
        q, kv, inner = self.num_heads * d, self.num_kv_heads * d, self.intermediate_size
        up = (2 if self.gated else 1) * inner
        layer = h * (q + 2 * kv) + q * h + (up * h + h * inner) * max(self.num_experts, 1) + h * self.num_experts
        layer += (q + 2 * kv) * self.attention_bias + h * self.attention_output_bias
        layer += (up + h) * self.mlp_bias
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * h
        positions = self.max_position_embeddings * h * self.learned_positions
        return self.num_layers * layer + tables + positions + self.norm_values
