"""The Llama decoder (arXiv:2302.13971, arXiv:2407.21783) and the families that vary it by a few flags.

Mistral adds a sliding window, Qwen2 biases on q, k and v, Qwen3 a norm over each head of q and k, SmolLM3 layers
without rotation; SmolLM and SmolLM2 are plain Llama. All of these are read from ModelConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, KVCacheSpec, Ops, QuantizationMode, RotaryTable
from models.config import ModelConfig
from models.layers import MLP, Attention, Linear, Norm, Precision, Slot
from models.rotary import identity_table, rotary_table


class Llama:
    """A stack of pre-norm decoder layers. Implements models.layers.DecoderModel.

    Every Linear is prepared in the quantization mode given, the table of token vectors and the language-model head
    included (in a small model the head is most of the bytes that a decode step reads), but for those that `keep` names;
    norms keep `ops.dtype`. With tied embeddings the head is the table, model.embed_tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        quantization: QuantizationMode = "none",
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        """keep: which modules stay unquantized (`models.layers.Precision`). Raises ModelError if it tears apart modules
        that are computed as one weight: q, k and v of a layer, or gate and up."""
        self.config = config
        self.ops = ops
        vocab, hidden = config.vocab_size, config.hidden_size
        precision = Precision(quantization, keep)
        table, head = {"model.embed_tokens": vocab}, {"lm_head": vocab}
        self.table = Linear(ops, hidden, table, False, precision.of("", table), embedding=True)
        self.layers = [_Layer(config, ops, layer, precision) for layer in range(config.num_layers)]
        self.norm = Norm(ops, config.hidden_size)
        tied = config.tie_word_embeddings
        self.head = self.table if tied else Linear(ops, hidden, head, False, precision.of("", head))
        self.num_tokens = config.vocab_size
        rotary = rotary_table(config, ops.device)
        self.rotary_tables = [rotary] * config.num_layers
        if not all(config.rotary_layers):
            identity = identity_table(config, ops.device)
            self.rotary_tables = [rotary if rotates else identity for rotates in config.rotary_layers]

    def slots(self) -> dict[str, Slot]:
        """The names of a Hugging Face checkpoint. Per layer these are, with {} for `model.layers.<n>.`:

        {}input_layernorm                           attention_norm
        {}self_attn.q_proj, .k_proj, .v_proj        attention.qkv, stacked in this order
        {}self_attn.q_norm, .k_norm                 attention.query_norm, .key_norm (Qwen3)
        {}self_attn.o_proj                          attention.output
        {}post_attention_layernorm                  mlp_norm
        {}mlp.gate_proj, .up_proj                   mlp.gate_up, stacked in this order
        {}mlp.down_proj                             mlp.down
        """
        slots = self.table.slots("")
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            slots |= layer.attention_norm.slots(f"{prefix}input_layernorm")
            slots |= layer.attention.slots()
            slots |= layer.mlp_norm.slots(f"{prefix}post_attention_layernorm")
            slots |= layer.mlp.slots()
        slots |= self.norm.slots("model.norm")
        return slots if self.head is self.table else slots | self.head.slots("")

    def kv_cache_specs(self, block_size: int, dtype: torch.dtype) -> list[KVCacheSpec]:
        """What each layer stores of a token, one specification a layer; `dtype` is that of the cache."""
        config = self.config
        return [
            KVCacheSpec(config.num_kv_heads, config.head_dim, block_size, dtype, config.layer_window(layer))
            for layer in range(config.num_layers)
        ]

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = ops.embedding(token_ids, self.table.weight)
        first = self.layers[0]
        x = ops.rms_norm(residual, first.attention_norm.weight, eps, first.attention.qkv.quantizes_input)
        # The norm that ends a layer is the one that begins the next: so each is fused with the addition before it.
        next_norms = [(layer.attention_norm, layer.attention.qkv.quantizes_input) for layer in self.layers[1:]]
        next_norms.append((self.norm, False))  # of the last one few rows go on to the head
        for layer, rotary, cache, (next_norm, quantize) in zip(
            self.layers, self.rotary_tables, kv_caches, next_norms, strict=True
        ):
            x = layer.attention(x, rotary, cache, plan)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm.weight, eps, layer.mlp.gate_up.quantizes_input)
            x = layer.mlp(x)
            x, residual = ops.add_rms_norm(x, residual, next_norm.weight, eps, quantize)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> logits [R, V]. Ids that no token uses hold the lowest finite number: an infinity would be
        taken for a fault of the row."""
        logits = self.head(hidden)
        if self.num_tokens < self.config.vocab_size:
            logits[:, self.num_tokens :] = torch.finfo(logits.dtype).min
        return logits

    def mask_vocabulary(self, num_tokens: int) -> None:
        """Say that only the ids below `num_tokens` exist. Raises ValueError outside 1 .. vocab_size."""
        if not 1 <= num_tokens <= self.config.vocab_size:
            raise ValueError(f"num_tokens is {num_tokens}; it must be from 1 to {self.config.vocab_size}")
        self.num_tokens = num_tokens

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as prepared, rotary tables included."""
        layers = sum(layer.nbytes for layer in self.layers)
        tables: list[RotaryTable] = list({id(table): table for table in self.rotary_tables}.values())
        rotary = sum(table.cos.nbytes + table.sin.nbytes for table in tables)
        ends = sum(end.nbytes for end in {self.table, self.head})
        return ends + layers + self.norm.nbytes + rotary


class _Layer:
    """One decoder layer's parts: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision) -> None:
        self.attention_norm = Norm(ops, config.hidden_size)
        self.attention = Attention(config, ops, layer, precision, f"model.layers.{layer}.self_attn.")
        self.mlp_norm = Norm(ops, config.hidden_size)
        self.mlp = MLP(config, ops, precision, f"model.layers.{layer}.mlp.")

    @property
    def nbytes(self) -> int:
        return self.attention_norm.nbytes + self.attention.nbytes + self.mlp_norm.nbytes + self.mlp.nbytes
