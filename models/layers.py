"""The layers that decoders are made of, over an Ops object that is passed in.

A layer owns prepared weights and says, through `slots`, which checkpoint tensors they come from. Nothing here knows a
device: `ops` is a kernels.ops.Ops, and the KV cache and the plan are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import (
    Activations,
    AttentionPlan,
    KVCache,
    KVCacheSpec,
    LinearWeight,
    Ops,
    QuantizationMode,
    QuantizedWeight,
    RotaryTable,
)
from models.config import ModelConfig
from models.slots import Columns, Int8Rows, Precision, Rows, Slot


class DecoderModel(Protocol):
    """A decoder with its weights loaded. It keeps no state between calls: that is all in the KV caches."""

    config: ModelConfig

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor name -> where it goes, in the order of the computation."""
        ...

    def kv_cache_specs(self, block_size: int, dtype: torch.dtype) -> list[KVCacheSpec]:
        """What each layer stores of a token, one specification a layer; `dtype` is that of the cache."""
        ...

    def forward(self, token_ids: Tensor, kv_caches: Sequence[KVCache], plan: AttentionPlan) -> Tensor:
        """token_ids int64 [T] on the device -> hidden states after the last norm, [T, H]. Writes the K and V of
        the T tokens into `kv_caches` (one a layer). The result may lie in a workspace: use it before the next call.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> logits [R, V]; rows of the vocabulary that no token uses hold a hugely negative number.

        finish_logits(raw_logits(hidden)): the first part asks only for operations of `Ops`, so it can be recorded.
        """
        ...

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """The head's products, [R, V]."""
        ...

    def finish_logits(self, logits: Tensor) -> Tensor:
        """The rest, which may overwrite them."""
        ...

    def mask_vocabulary(self, num_tokens: int) -> None:
        """Say that only the ids below `num_tokens` exist, for vocabularies padded beyond their tokenizer."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as prepared, rotary tables included."""
        ...


class Norm:
    """An RMSNorm, or a LayerNorm with its bias, over rows of `size`."""

    def __init__(self, config: ModelConfig, ops: Ops, size: int, of_heads: bool = False) -> None:
        """of_heads: of q or k, which is an RMSNorm whatever the norms of the residual stream are."""
        self.ops = ops
        self.size = size
        self.eps = config.norm_eps if of_heads else config.stream_eps
        self.offset = config.norm_offset
        # An offset needs the digits that the stored weight has beside 1.
        self.dtype = torch.float32 if self.offset else ops.dtype
        self.has_bias = config.norm == "layer" and not of_heads
        self.weight: Tensor
        self.bias: Tensor | None = None

    def slots(self, name: str) -> dict[str, Slot]:
        """The slots of the weight and the bias, under the checkpoint names `name`.weight and `name`.bias."""
        weight, bias = Rows((self.size,)), Rows((self.size,))

        def put_weight(start: int, piece: Tensor | QuantizedWeight) -> None:
            weight.put(start, piece)
            if weight.complete:
                self.weight = (weight.take().to(self.ops.device, torch.float32) + self.offset).to(self.dtype)

        def put_bias(start: int, piece: Tensor | QuantizedWeight) -> None:
            bias.put(start, piece)
            if bias.complete:
                self.bias = bias.take().to(self.ops.device, self.dtype)

        slots = {f"{name}.weight": Slot((self.size,), put_weight, self.size, mean=1.0 - self.offset)}
        return slots | {f"{name}.bias": Slot((self.size,), put_bias, self.size)} if self.has_bias else slots

    def __call__(self, x: Tensor, quantize: bool = False) -> Activations:
        """x [T, size] -> normalized."""
        if self.has_bias:
            return self.ops.layer_norm(x, self.weight, self.bias, self.eps, quantize)
        return self.ops.rms_norm(x, self.weight, self.eps, quantize)

    def add(self, x: Tensor, residual: Tensor, quantize: bool = False) -> tuple[Activations, Tensor]:
        """x, residual [T, size] -> (their sum normalized, their sum)."""
        if self.has_bias:
            return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, quantize)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, quantize)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize * (2 if self.has_bias else 1)


class Linear:
    """One weight [N, K], which may be several checkpoint tensors stacked along N (`parts`: name -> rows).

    The pieces are copied into one buffer as they arrive, quantized if the mode says so; with the last, the buffer goes
    to `ops.prepare_linear` and is dropped. So a checkpoint is never in memory twice: at most one weight is. And an
    unquantized weight that is to be int8 never is, but for some of its rows, unless it comes transposed.
    """

    def __init__(
        self,
        ops: Ops,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        mode: QuantizationMode,
        embedding: bool = False,
        order: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        """embedding: whether the weight is a table of token vectors too, read by rows through `ops.embedding`.
        order: where each row of the checkpoint has its place, int64 [N]; None: as they come. transposed: the
        checkpoint has it as [K, N]; of one part, and in the order in which it comes."""
        self.ops = ops
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.parts = dict(parts)
        self.has_bias = bias
        self.mode = mode
        self.embedding = embedding
        self.weight: LinearWeight
        shape = (self.out_features, in_features)
        self.transposed = transposed
        self._weight_rows: Rows | Int8Rows
        if transposed:
            self._weight_rows = Columns(shape)
        else:
            self._weight_rows = Rows(shape, order) if mode == "none" else Int8Rows(shape, ops.device, order)
        self._bias_rows = Rows((self.out_features,), order)

    def slots(self, prefix: str) -> dict[str, Slot]:
        """The slots of every part, under the checkpoint names `prefix` + part + .weight (and .bias)."""
        slots: dict[str, Slot] = {}
        start = 0
        for part, rows in self.parts.items():
            shape = (self.in_features, rows) if self.transposed else (rows, self.in_features)
            slots[f"{prefix}{part}.weight"] = self._slot(self._weight_rows, start, shape, self.mode)
            if self.has_bias:
                slots[f"{prefix}{part}.bias"] = self._slot(self._bias_rows, start, (rows,), "none")
            start += rows
        return slots

    def _slot(self, rows: Rows | Int8Rows, start: int, shape: tuple[int, ...], mode: QuantizationMode) -> Slot:
        def put(first: int, piece: Tensor | QuantizedWeight) -> None:
            rows.put(start + first, piece)
            self._prepare_if_complete()

        transposed = self.transposed and rows is self._weight_rows
        return Slot(shape, put, self.out_features * self.in_features, mode, transposed=transposed)

    def _prepare_if_complete(self) -> None:
        weight, bias = self._weight_rows, self._bias_rows
        if weight.complete and (bias.complete or not self.has_bias):
            self.prepare(weight.take(), bias.take() if self.has_bias else None)

    def prepare(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> None:
        """Take the whole weight [N, K] and bias [N] at once, instead of through the slots."""
        self.weight = self.ops.prepare_linear(weight, bias, self.mode, self.embedding)

    def __call__(self, x: Activations) -> Tensor:
        """x [T, K] -> [T, N]."""
        return self.ops.linear(x, self.weight)

    @property
    def quantizes_input(self) -> bool:
        """Whether what comes before should hand over quantized activations, so that this layer need not make them."""
        return self.mode == "w8a8"

    @property
    def nbytes(self) -> int:
        """Bytes as prepared."""
        return self.weight.nbytes


class Attention:
    """Causal self-attention with grouped queries (arXiv:2305.13245) over one layer's paged KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        layer: int,
        precision: Precision,
        order: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        """order, transposed: of the projections in the checkpoint, as in `Linear`; order: of q, k and v together."""
        names = config.names
        self.ops = ops
        self.names = names
        self.prefix = names.layer.format(layer)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.layer_window(layer)
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.eps = config.norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = (q_size, kv_size, kv_size) if len(names.qkv) == 3 else (q_size + 2 * kv_size,)
        qkv, output = dict(zip(names.qkv, sizes, strict=True)), {names.output: config.hidden_size}
        mode = precision.of(self.prefix, qkv)
        bias = config.attention_bias
        self.qkv = Linear(ops, config.hidden_size, qkv, bias, mode, order=order, transposed=transposed)
        mode, bias = precision.of(self.prefix, output), config.attention_output_bias
        self.output = Linear(ops, q_size, output, bias, mode, transposed=transposed)
        self.norms_heads = config.qk_norm == "head"
        self.query_norm = self.key_norm = None
        if config.qk_norm is not None:
            self.query_norm = Norm(config, ops, config.head_dim if self.norms_heads else q_size, of_heads=True)
            self.key_norm = Norm(config, ops, config.head_dim if self.norms_heads else kv_size, of_heads=True)

    def slots(self) -> dict[str, Slot]:
        """The slots of the projections and, if any, of the norms of q and k."""
        prefix = self.prefix
        slots = self.qkv.slots(prefix) | self.output.slots(prefix)
        if self.query_norm is not None and self.key_norm is not None:
            slots |= self.query_norm.slots(prefix + self.names.query_norm)
            slots |= self.key_norm.slots(prefix + self.names.key_norm)
        return slots

    def __call__(self, x: Activations, rotary: RotaryTable, kv_cache: KVCache, plan: AttentionPlan) -> Tensor:
        """x [T, H] -> [T, H]; writes the K and V of the T tokens to `kv_cache`."""
        return self.attend(self.qkv(x), rotary, kv_cache, plan)

    def attend(self, packed: Tensor, rotary: RotaryTable, kv_cache: KVCache, plan: AttentionPlan) -> Tensor:
        """packed [T, (Hq + 2 Hkv) * D], what `qkv` made of x -> [T, H]."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        num_tokens = packed.shape[0]
        query, key, value = torch.split(packed, [q_size, kv_size, kv_size], dim=1)  # views [T, heads * D]
        head_norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.query_norm is not None and self.key_norm is not None:
            weights = self.query_norm.weight, self.key_norm.weight
            if self.norms_heads:
                head_norms = weights
            else:
                query, key = self.ops.norm_query_key(query, key, *weights, self.eps)
        query = self.ops.write_kv(
            query.view(num_tokens, self.num_heads, self.head_dim),
            key.view(num_tokens, self.num_kv_heads, self.head_dim),
            value.view(num_tokens, self.num_kv_heads, self.head_dim),
            rotary,
            kv_cache,
            plan,
            *head_norms,
            self.eps,
        )
        return self.output(self.ops.paged_attention(query, kv_cache, plan, self.scale, self.softcap))

    @property
    def nbytes(self) -> int:
        norms = [norm.nbytes for norm in (self.query_norm, self.key_norm) if norm is not None]
        return self.qkv.nbytes + self.output.nbytes + sum(norms)


class MLP:
    """The feed-forward layer: down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or down(activation(up(x)))."""

    def __init__(
        self, config: ModelConfig, ops: Ops, layer: int, precision: Precision, transposed: bool = False
    ) -> None:
        """transposed: the checkpoint has the weights as [K, N]."""
        names = config.names
        self.ops = ops
        self.prefix = names.layer.format(layer)
        self.activation, self.gated = config.activation, config.gated
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        # Gate and up are two tensors in most checkpoints, and one in Phi-3's.
        rows = (2 * inner if config.gated else inner) // len(names.gate_up)
        gate_up, down = dict.fromkeys(names.gate_up, rows), {names.down: hidden}
        mode = precision.of(self.prefix, gate_up)
        self.gate_up = Linear(ops, hidden, gate_up, bias, mode, transposed=transposed)
        self.down = Linear(ops, inner, down, bias, precision.of(self.prefix, down), transposed=transposed)

    def slots(self) -> dict[str, Slot]:
        """The slots of the projections."""
        return self.gate_up.slots(self.prefix) | self.down.slots(self.prefix)

    def __call__(self, x: Activations) -> Tensor:
        """x [T, H] -> [T, H]."""
        inner, quantize = self.gate_up(x), self.down.quantizes_input
        if not self.gated:
            return self.down(self.ops.gelu(inner, self.activation == "gelu_tanh", quantize))
        return self.down((self.ops.silu_mul if self.activation == "silu" else self.ops.gelu_mul)(inner, quantize))

    @property
    def quantizes_input(self) -> bool:
        """Whether what comes before should hand over quantized activations."""
        return self.gate_up.quantizes_input

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes
