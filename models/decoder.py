"""What every decoder here has: a table of token vectors, layers, a last norm and a head. A family is a subclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, KVCacheSpec, Ops, QuantizationMode, RotaryTable
from models.config import ModelConfig
from models.layers import MLP, Attention, Linear, Norm
from models.rotary import layer_tables
from models.slots import Precision, Slot


class Layer(Protocol):
    """One decoder layer's parts. What they do with each other is the family's forward pass."""

    def slots(self, prefix: str) -> dict[str, Slot]:
        """Of all parts. prefix: of their names in a checkpoint."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as prepared."""
        ...


class PreNormLayer:
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision) -> None:
        self.names = config.names
        self.attention_norm = Norm(config, ops, config.hidden_size)
        self.attention = Attention(config, ops, layer, precision)
        self.mlp_norm = Norm(config, ops, config.hidden_size)
        self.mlp = MLP(config, ops, layer, precision)

    def slots(self, prefix: str) -> dict[str, Slot]:
        """The names of `models.families.Names`, in the order of the computation."""
        slots = self.attention_norm.slots(prefix + self.names.attention_norm) | self.attention.slots()
        return slots | self.mlp_norm.slots(prefix + self.names.mlp_norm) | self.mlp.slots()

    @property
    def nbytes(self) -> int:
        return self.attention_norm.nbytes + self.attention.nbytes + self.mlp_norm.nbytes + self.mlp.nbytes


AnyLayer = TypeVar("AnyLayer", bound=Layer)
AnyPreNormLayer = TypeVar("AnyPreNormLayer", bound=PreNormLayer)


class Decoder(Generic[AnyLayer]):
    """Base of the families: implements models.layers.DecoderModel but for `layer` and `forward`.

    Every Linear is prepared in the quantization mode given, the table of token vectors and the language-model head
    included (in a small model the head is most of the bytes that a decode step reads), but for those that `keep` names;
    norms keep `ops.dtype`. With tied embeddings the head is the table.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        quantization: QuantizationMode = "none",
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        """keep: which modules stay unquantized (`models.slots.Precision`). Raises ModelError if it tears apart modules
        that are computed as one weight: q, k and v of a layer, or gate and up."""
        self.config = config
        self.ops = ops
        vocab, hidden = config.vocab_size, config.hidden_size
        precision = Precision(quantization, keep)
        table, head = {config.names.table: vocab}, {config.names.head: vocab}
        self.table = Linear(ops, hidden, table, False, precision.of("", table), embedding=True)
        self.layers = [self.layer(layer, precision) for layer in range(config.num_layers)]
        self.norm = Norm(config, ops, hidden)
        tied = config.tie_word_embeddings
        self.head = self.table if tied else Linear(ops, hidden, head, False, precision.of("", head))
        self.num_tokens = vocab
        self.rotary_tables = layer_tables(config, ops.device)

    def layer(self, number: int, precision: Precision) -> AnyLayer:
        """Make one layer."""
        raise NotImplementedError

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        raise NotImplementedError

    def slots(self) -> dict[str, Slot]:
        """The names of a Hugging Face checkpoint: those of `models.families.Names`."""
        slots = self.table.slots("")
        for index, layer in enumerate(self.layers):
            slots |= layer.slots(self.config.names.layer.format(index))
        slots |= self.norm.slots(self.config.names.norm)
        return slots if self.head is self.table else slots | self.head.slots("")

    def kv_cache_specs(self, block_size: int, dtype: torch.dtype) -> list[KVCacheSpec]:
        """What each layer stores of a token, one specification a layer; `dtype` is that of the cache."""
        config = self.config
        return [
            KVCacheSpec(config.num_kv_heads, config.head_dim, block_size, dtype, config.layer_window(layer))
            for layer in range(config.num_layers)
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> the residual stream before the first layer, [T, H]; see `ModelConfig.stream_eps`."""
        config = self.config
        return self.ops.embedding(token_ids, self.table.weight, config.embedding_scale / config.residual_scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> logits [R, V]; see models.layers.DecoderModel."""
        return self.finish_logits(self.raw_logits(hidden))

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> what the head gives for it, [R, V]."""
        return self.head(hidden)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """raw_logits [R, V], which are overwritten -> logits [R, V]. Ids that no token uses hold the lowest finite
        number: an infinity would be taken for a fault of the row."""
        if self.config.logits_scale != 1.0:
            logits *= self.config.logits_scale
        if self.config.logits_softcap is not None:
            logits = self.ops.softcap(logits, self.config.logits_softcap)
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


class PreNormDecoder(Decoder[AnyPreNormLayer]):
    """Layers in sequence: each adds its attention to the residual stream, then its feed-forward layer."""

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] -> hidden states after the last norm, [T, H]; see models.layers.DecoderModel."""
        return self.through_layers(self.embed(token_ids), kv_caches, plan)

    def through_layers(self, residual: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """The residual stream [T, H] before the first layer -> hidden states after the last norm, [T, H]."""
        first = self.layers[0]
        x = first.attention_norm(residual, first.attention.qkv.quantizes_input)
        # The norm that ends a layer is the one that begins the next: so each is fused with the addition before it.
        next_norms = [(layer.attention_norm, layer.attention.qkv.quantizes_input) for layer in self.layers[1:]]
        next_norms.append((self.norm, False))  # of the last one few rows go on to the head
        for layer, rotary, cache, (next_norm, quantize) in zip(
            self.layers, self.rotary_tables, kv_caches, next_norms, strict=True
        ):
            x = layer.attention(x, rotary, cache, plan)
            x, residual = layer.mlp_norm.add(x, residual, layer.mlp.quantizes_input)
            x = layer.mlp(x)
            x, residual = next_norm.add(x, residual, quantize)
        return x
