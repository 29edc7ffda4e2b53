"""The parts that decoders are built of, over an Ops object that is passed in. Nothing here is trained.

A layer is made empty. `slots()` says which checkpoint tensors it wants; the last rows of the last slot of a weight
make it ready. Shapes use the letters of kernels/ops.py: T tokens, H hidden size, Hq and Hkv heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.int8 import quantize_rows
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
from models.errors import ModelError

# Elements that are quantized at a time: 256 KiB in float32. What `quantize_rows` makes of them stays in the processor's
# cache and is nothing beside the weights. Pieces four times as large took three quarters of the time (500 MB of
# bfloat16 on one core: 0.67 s, not 0.93), but the holes that they left in glibc's heap took a fifth of the model.
_QUANTIZED_AT_A_TIME = 1 << 16


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
        """hidden [R, H] -> logits [R, V]; rows of the vocabulary that no token uses hold a hugely negative number."""
        ...

    def mask_vocabulary(self, num_tokens: int) -> None:
        """Say that only the ids below `num_tokens` exist, for vocabularies padded beyond their tokenizer."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as prepared, rotary tables included."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one checkpoint tensor, which may arrive in pieces of rows.

    shape   what the tensor must have
    put     put(first row, rows): takes [n, ...], a copy of it. Where `mode` quantizes, the rows may be float, and are
            quantized here, or a QuantizedWeight.
    mode    of the Linear whose weight this is; "none" for everything else
    stack   elements of the weight that the tensor becomes a part of: pieces of one weight belong together
    """

    shape: tuple[int, ...]
    put: Callable[[int, Tensor | QuantizedWeight], None]
    stack: int
    mode: QuantizationMode = "none"

    def fill(self, tensor: Tensor) -> None:
        """Take the whole tensor."""
        self.put(0, tensor)


@dataclass(frozen=True, slots=True)
class Precision:
    """The mode in which a model's Linears are prepared, but for the modules that stay unquantized.

    keep: whether a module does, by its name in the checkpoint ("lm_head", "model.layers.3.mlp.down_proj"); None: no one
    """

    mode: QuantizationMode = "none"
    keep: Callable[[str], bool] | None = None

    def of(self, prefix: str, parts: Collection[str]) -> QuantizationMode:
        """The mode of one Linear that is made of the modules `prefix` + part. Raises ModelError if they differ."""
        modules = [prefix + part for part in parts]
        kept = [module for module in modules if self.keep is not None and self.keep(module)]
        if not kept or self.mode == "none":
            return self.mode
        if others := [module for module in modules if module not in kept]:
            raise ModelError(
                f"{kept[0]} is unquantized and {others[0]} is int8; they are computed as one weight, for which a "
                "mixture is not supported: use a checkpoint with all or none of them quantized"
            )
        return "none"


class Norm:
    """The weight [size] of an RMSNorm."""

    def __init__(self, ops: Ops, size: int) -> None:
        self.ops = ops
        self.size = size
        self.weight: Tensor

    def slots(self, name: str) -> dict[str, Slot]:
        """The slot of the weight, under the checkpoint name `name`.weight."""
        rows = _Rows((self.size,))

        def put(start: int, piece: Tensor | QuantizedWeight) -> None:
            rows.put(start, piece)
            if rows.complete:
                self.weight = rows.take().to(self.ops.device, self.ops.dtype)

        return {f"{name}.weight": Slot((self.size,), put, self.size)}

    @property
    def nbytes(self) -> int:
        return self.size * self.ops.dtype.itemsize


class Linear:
    """One weight [N, K], which may be several checkpoint tensors stacked along N (`parts`: name -> rows).

    The pieces are copied into one buffer as they arrive, quantized if the mode says so; with the last, the buffer goes
    to `ops.prepare_linear` and is dropped. So a checkpoint is never in memory twice: at most one weight is. And an
    unquantized weight that is to be int8 never is, but for some of its rows.
    """

    def __init__(
        self,
        ops: Ops,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        mode: QuantizationMode,
        embedding: bool = False,
    ) -> None:
        """embedding: whether the weight is a table of token vectors too, read by rows through `ops.embedding`."""
        self.ops = ops
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.parts = dict(parts)
        self.has_bias = bias
        self.mode = mode
        self.embedding = embedding
        self.weight: LinearWeight
        shape = (self.out_features, in_features)
        self._weight_rows = _Rows(shape) if mode == "none" else _Int8Rows(shape, ops.device)
        self._bias_rows = _Rows((self.out_features,))

    def slots(self, prefix: str) -> dict[str, Slot]:
        """The slots of every part, under the checkpoint names `prefix` + part + .weight (and .bias)."""
        slots: dict[str, Slot] = {}
        start = 0
        for part, rows in self.parts.items():
            slots[f"{prefix}{part}.weight"] = self._slot(self._weight_rows, start, (rows, self.in_features), self.mode)
            if self.has_bias:
                slots[f"{prefix}{part}.bias"] = self._slot(self._bias_rows, start, (rows,), "none")
            start += rows
        return slots

    def _slot(self, rows: _Rows | _Int8Rows, start: int, shape: tuple[int, ...], mode: QuantizationMode) -> Slot:
        def put(first: int, piece: Tensor | QuantizedWeight) -> None:
            rows.put(start + first, piece)
            self._prepare_if_complete()

        return Slot(shape, put, self.out_features * self.in_features, mode)

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


class _Rows:
    """A tensor that arrives in pieces along its first dimension."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.missing = shape[0]
        self.buffer: Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def put(self, start: int, piece: Tensor | QuantizedWeight) -> None:
        """Copy a piece to the rows from `start` on."""
        if isinstance(piece, QuantizedWeight):
            raise ValueError("piece is quantized; this tensor takes unquantized rows")
        if self.buffer is None:
            self.buffer = torch.empty(self.shape, dtype=piece.dtype)
        elif self.buffer.dtype != piece.dtype:
            self.buffer = self.buffer.to(torch.promote_types(self.buffer.dtype, piece.dtype))
        self.buffer[start : start + piece.shape[0]].copy_(piece)
        self.missing -= piece.shape[0]

    def take(self) -> Tensor:
        """Hand out the whole tensor and forget it. Raises RuntimeError if nothing has arrived."""
        if self.buffer is None:
            raise RuntimeError("a weight was taken before it arrived")
        buffer, self.buffer = self.buffer, None
        self.missing = self.shape[0]
        return buffer


class _Int8Rows:
    """A weight [N, K] that arrives in pieces of rows and is kept as int8, on the device that it is for.

    Quantized by rows, so that the result is the same however they are cut.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.missing = shape[0]
        self.weight: QuantizedWeight | None = None

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def put(self, start: int, piece: Tensor | QuantizedWeight) -> None:
        """Quantize a piece into the rows from `start` on, or copy it if it is quantized."""
        if self.weight is None:
            values = torch.empty(self.shape, dtype=torch.int8, device=self.device)
            self.weight = QuantizedWeight(values, torch.empty(self.shape[0], device=self.device))
        values, scales = self.weight.values, self.weight.scales
        count = piece.shape[0]
        if isinstance(piece, QuantizedWeight):
            values[start : start + count].copy_(piece.values)
            scales[start : start + count].copy_(piece.scales)
        else:
            step = max(1, _QUANTIZED_AT_A_TIME // self.shape[1])
            for first in range(0, count, step):
                rows = piece[first : first + step].to(self.device)
                target = slice(start + first, start + first + rows.shape[0])
                values[target], scales[target] = quantize_rows(rows)
        self.missing -= count

    def take(self) -> QuantizedWeight:
        """Hand out the whole weight and forget it. Raises RuntimeError if nothing has arrived."""
        if self.weight is None:
            raise RuntimeError("a weight was taken before it arrived")
        weight, self.weight = self.weight, None
        self.missing = self.shape[0]
        return weight


class Attention:
    """Causal self-attention with grouped queries (arXiv:2305.13245) over one layer's paged KV cache."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, precision: Precision, prefix: str) -> None:
        """prefix: of the projections' names in a checkpoint."""
        self.ops = ops
        self.prefix = prefix
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window = config.layer_window(layer)
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.eps = config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv, output = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, {"o_proj": config.hidden_size}
        self.qkv = Linear(ops, config.hidden_size, qkv, config.attention_bias, precision.of(prefix, qkv))
        self.output = Linear(ops, q_size, output, config.attention_output_bias, precision.of(prefix, output))
        self.query_norm = Norm(ops, config.head_dim) if config.qk_norm else None
        self.key_norm = Norm(ops, config.head_dim) if config.qk_norm else None

    def slots(self) -> dict[str, Slot]:
        """The slots of the projections and, if any, of the norms of q and k."""
        prefix = self.prefix
        slots = self.qkv.slots(prefix) | self.output.slots(prefix)
        if self.query_norm is not None and self.key_norm is not None:
            slots |= self.query_norm.slots(f"{prefix}q_norm") | self.key_norm.slots(f"{prefix}k_norm")
        return slots

    def __call__(self, x: Activations, rotary: RotaryTable, kv_cache: KVCache, plan: AttentionPlan) -> Tensor:
        """x [T, H] -> [T, H]; writes the K and V of the T tokens to `kv_cache`."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        packed = self.qkv(x)
        num_tokens = packed.shape[0]
        query, key, value = torch.split(packed, [q_size, kv_size, kv_size], dim=1)  # views [T, heads * D]
        query = self.ops.write_kv(
            query.view(num_tokens, self.num_heads, self.head_dim),
            key.view(num_tokens, self.num_kv_heads, self.head_dim),
            value.view(num_tokens, self.num_kv_heads, self.head_dim),
            rotary,
            kv_cache,
            plan,
            None if self.query_norm is None else self.query_norm.weight,
            None if self.key_norm is None else self.key_norm.weight,
            self.eps,
        )
        return self.output(self.ops.paged_attention(query, kv_cache, plan, self.scale))

    @property
    def nbytes(self) -> int:
        norms = [norm.nbytes for norm in (self.query_norm, self.key_norm) if norm is not None]
        return self.qkv.nbytes + self.output.nbytes + sum(norms)


class MLP:
    """The gated feed-forward layer: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, ops: Ops, precision: Precision, prefix: str) -> None:
        """prefix: of the projections' names in a checkpoint."""
        self.ops = ops
        self.prefix = prefix
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        gate_up, down = {"gate_proj": inner, "up_proj": inner}, {"down_proj": hidden}
        self.gate_up = Linear(ops, hidden, gate_up, bias, precision.of(prefix, gate_up))
        self.down = Linear(ops, inner, down, bias, precision.of(prefix, down))

    def slots(self) -> dict[str, Slot]:
        """The slots of the three projections."""
        return self.gate_up.slots(self.prefix) | self.down.slots(self.prefix)

    def __call__(self, x: Activations) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.down(self.ops.silu_mul(self.gate_up(x), self.down.quantizes_input))

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes
