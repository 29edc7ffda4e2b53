"""ReferenceOps: every operation in readable float32 torch. The truth that the other backends are tested against.

Written for the reader, one sequence at a time, without workspaces or layouts. It is the one backend that does not
promise row invariance to the bit: its matrix products are whatever torch picks for their shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import (
    check_attention,
    check_cache,
    check_experts,
    check_layer_norm,
    check_mixture,
    check_paged_attention,
    check_positions,
    check_query_key,
    check_residual,
    check_softcap,
    check_weight,
    check_write_kv,
    rows_of,
)
from kernels.experts import SeparateExperts
from kernels.int8 import dequantize_rows, quantize_rows
from kernels.ops import (
    Activations,
    AttentionMetadata,
    AttentionPlan,
    ExpertWeight,
    KVCache,
    KVCacheSpec,
    LinearWeight,
    LogProbabilities,
    QuantizationMode,
    QuantizedActivations,
    QuantizedWeight,
    RotaryTable,
    SampleResult,
    SamplingMetadata,
)
from kernels.philox import random_31_bits
from kernels.sampling import (
    Float32Array,
    Int64Array,
    check_sampling,
    draw,
    kept_weights,
    log_probabilities,
    token_weights,
    with_pending,
)


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """weight [N, K]: float32, or int8 with scales float32 [N]; bias float32 [N] or None."""

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    mode: QuantizationMode

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias."""
        return sum(tensor.nbytes for tensor in (self.weight, self.scales, self.bias) if tensor is not None)


class ReferenceExperts(SeparateExperts[ReferenceLinear]):
    """One `ReferenceLinear` an expert."""


@dataclass(slots=True)
class ReferenceKVCache:
    """keys, values: [num_blocks, block_size, Hkv, D] in `spec.dtype`.

    key_scales, value_scales: float32 [num_blocks, block_size, Hkv]; they are used where `spec.dtype` is int8.
    """

    spec: KVCacheSpec
    num_blocks: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store float32 [T, Hkv, D] each at slots int64 [T], converted to the cache's dtype."""
        for stored, scales, new in ((self.keys, self.key_scales, key), (self.values, self.value_scales, value)):
            if self.spec.dtype == torch.int8:
                new, scales.flatten(0, 1)[slots] = quantize_rows(new)
            stored.flatten(0, 1)[slots] = new.to(self.spec.dtype)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at slots int64 [L], float32 [L, Hkv, D] each."""
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        found = [(stored.flatten(0, 1)[slots], scales.flatten(0, 1)[slots]) for stored, scales in pairs]
        if self.spec.dtype == torch.int8:
            return dequantize_rows(*found[0]), dequantize_rows(*found[1])
        return found[0][0].to(torch.float32), found[1][0].to(torch.float32)


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """Per sequence: how many tokens are new, and the slot of each of its tokens, old ones included."""

    query_lens: list[int]
    slots: list[Tensor]
    block_size: int
    largest_block: int


class ReferenceOps:
    """The operations of `kernels.ops.Ops` on the CPU, in float32."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.fallbacks: Counter[str] = Counter()

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """Convert to float32, or quantize the weight's rows to int8 (`kernels.int8`)."""
        check_weight(weight, bias, mode)
        own_bias = None if bias is None else bias.to(self.dtype)
        if isinstance(weight, QuantizedWeight):
            return ReferenceLinear(weight.values, weight.scales, own_bias, mode)
        if mode == "none":
            return ReferenceLinear(weight.to(self.dtype), None, own_bias, mode)
        return ReferenceLinear(*quantize_rows(weight), own_bias, mode)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> ReferenceKVCache:
        """Zeros, [num_blocks, block_size, Hkv, D], for keys and for values."""
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        keys, values = torch.zeros(shape, dtype=spec.dtype), torch.zeros(shape, dtype=spec.dtype)
        return ReferenceKVCache(spec, num_blocks, keys, values, torch.zeros(shape[:3]), torch.zeros(shape[:3]))

    def plan(self, metadata: AttentionMetadata) -> ReferencePlan:
        """Find the slot of every token of every sequence."""
        largest_block = check_attention(metadata)
        slots = []
        for seq_len, table in zip(metadata.seq_lens, metadata.block_tables, strict=True):
            positions = torch.arange(seq_len)
            blocks = torch.tensor(list(table))[positions // metadata.block_size]
            slots.append(blocks * metadata.block_size + positions % metadata.block_size)
        return ReferencePlan(list(metadata.query_lens), slots, metadata.block_size, largest_block)

    def embedding(self, token_ids: Tensor, weight: LinearWeight, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T], weight [V, H] -> its rows [T, H], times `scale`."""
        if not isinstance(weight, ReferenceLinear):
            raise ValueError("weight was not made by this backend's prepare_linear")
        rows = F.embedding(token_ids, weight.weight).to(self.dtype)
        return scale * (rows if weight.scales is None else rows * weight.scales[token_ids, None])

    def add_positions(self, x: Tensor, table: Tensor, plan: ReferencePlan) -> Tensor:
        """x [T, H] + the rows of table [P, H] at the tokens' positions."""
        check_positions(x, table, max(len(slots) for slots in plan.slots))
        return x.to(self.dtype) + table.to(self.dtype)[_positions(plan)]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, H] -> x + residual."""
        check_residual(x, residual)
        return x.to(self.dtype) + residual.to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, quantize: bool = False) -> Activations:
        """x [..., H] -> x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""
        x = x.to(self.dtype)
        normalized = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(self.dtype)
        return QuantizedActivations(*quantize_rows(normalized)) if quantize else normalized

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (rms_norm(x + residual), x + residual)."""
        total = self.add(x, residual)
        return self.rms_norm(total, weight, eps, quantize), total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> Activations:
        """x [T, H] -> (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (arXiv:1607.06450)."""
        check_layer_norm(x, weight, bias)
        own_bias = None if bias is None else bias.to(self.dtype)
        normalized = F.layer_norm(x.to(self.dtype), weight.shape, weight.to(self.dtype), own_bias, eps)
        return QuantizedActivations(*quantize_rows(normalized)) if quantize else normalized

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (layer_norm(x + residual), x + residual)."""
        total = self.add(x, residual)
        return self.layer_norm(total, weight, bias, eps, quantize), total

    def norm_query_key(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """query [T, Hq * D], key [T, Hkv * D] -> each normalized over all its heads together."""
        check_query_key(query, key, query_weight, key_weight)
        return self.rms_norm(query, query_weight, eps), self.rms_norm(key, key_weight, eps)

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> x @ W^T + bias, [T, N]. A product of int8 by int8 is exact until it is scaled."""
        if not isinstance(weight, ReferenceLinear):
            raise ValueError("weight was not made by this backend's prepare_linear")
        if isinstance(x, QuantizedActivations) and weight.mode != "w8a8":
            raise ValueError(f"x is quantized; a weight of mode {weight.mode!r} takes it unquantized")
        if weight.scales is None:
            return F.linear(x.to(self.dtype), weight.weight, weight.bias)
        if weight.mode == "w8a16":
            y = F.linear(x.to(self.dtype), weight.weight.to(self.dtype)) * weight.scales
        else:
            quantized = x if isinstance(x, QuantizedActivations) else QuantizedActivations(*quantize_rows(x))
            # Sums of up to 2^17 products of 8-bit integers are exact in float64.
            product = F.linear(quantized.values.to(torch.float64), weight.weight.to(torch.float64))
            y = product.to(self.dtype) * quantized.scales[:, None] * weight.scales
        return y if weight.bias is None else y + weight.bias

    def prepare_experts(
        self, weight: Tensor | QuantizedWeight, num_experts: int, mode: QuantizationMode = "none"
    ) -> ReferenceExperts:
        """A `prepare_linear` for each."""
        size = check_experts(weight, num_experts)
        each = [
            self.prepare_linear(rows_of(weight, slice(e * size, e * size + size)), None, mode)
            for e in range(num_experts)
        ]
        return ReferenceExperts([w for w in each if isinstance(w, ReferenceLinear)])

    def experts(
        self,
        x: Tensor,
        router: LinearWeight,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """x [T, H] -> [T, H]: one token after the other through its experts."""
        if not isinstance(gate_up, ReferenceExperts) or not isinstance(down, ReferenceExperts):
            raise ValueError("gate_up or down was not made by this backend's prepare_experts")
        check_mixture(x, router, gate_up, down, top_k)
        logits = self.linear(x, router)
        outputs = []
        for row, scores in zip(x, logits, strict=True):
            chosen = scores.sort(descending=True, stable=True).indices[:top_k]
            weights = scores[chosen].softmax(-1) if normalize else scores.softmax(-1)[chosen]
            total = torch.zeros_like(row, dtype=self.dtype)
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                inner = self.silu_mul(self.linear(row[None], gate_up.each[expert]))
                total = total + weight * self.linear(inner, down.each[expert])[0]
            outputs.append(total)
        return torch.stack(outputs)

    def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> silu(gate) * up, [T, I] (arXiv:2002.05202)."""
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        product = F.silu(gate) * up
        return QuantizedActivations(*quantize_rows(product)) if quantize else product

    def gelu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> gelu(gate) * up, [T, I], gelu in its tanh form (arXiv:1606.08415)."""
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        product = F.gelu(gate, approximate="tanh") * up
        return QuantizedActivations(*quantize_rows(product)) if quantize else product

    def gelu(self, x: Tensor, tanh: bool, quantize: bool = False) -> Activations:
        """x [T, I] -> gelu(x), [T, I], in its tanh form or exactly (arXiv:1606.08415)."""
        activated = F.gelu(x.to(self.dtype), approximate="tanh" if tanh else "none")
        return QuantizedActivations(*quantize_rows(activated)) if quantize else activated

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [R, V] -> cap * tanh(logits / cap)."""
        check_softcap(cap)
        return cap * torch.tanh(logits.to(self.dtype) / cap)

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: RotaryTable,
        kv_cache: KVCache,
        plan: ReferencePlan,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Normalize (if asked), rotate, write K and V to their slots; return the query, float32 [T, Hq, D]."""
        cache = check_cache(kv_cache, ReferenceKVCache, plan.block_size, plan.largest_block)
        tokens, longest = sum(plan.query_lens), max(len(s) for s in plan.slots)
        check_write_kv(query, key, value, rotary, (query_norm, key_norm), cache.spec, tokens, longest)
        query, key = query.to(self.dtype), key.to(self.dtype)
        if query_norm is not None:
            query = self.rms_norm(query, query_norm, eps)
        if key_norm is not None:
            key = self.rms_norm(key, key_norm, eps)

        pairs = list(zip(plan.query_lens, plan.slots, strict=True))
        positions = _positions(plan)
        new_slots = torch.cat([slots[len(slots) - new :] for new, slots in pairs])
        key = _rotate(key, rotary, positions)
        cache.write(new_slots, key, value.to(self.dtype))
        return _rotate(query, rotary, positions)

    def paged_attention(
        self, query: Tensor, kv_cache: KVCache, plan: ReferencePlan, scale: float, softcap: float | None = None
    ) -> Tensor:
        """query [T, Hq, D] -> [T, Hq * D]: causal attention, one sequence after the other."""
        cache = check_cache(kv_cache, ReferenceKVCache, plan.block_size, plan.largest_block)
        check_paged_attention(query, cache.spec, sum(plan.query_lens))
        heads, kv_heads = query.shape[1], cache.spec.num_kv_heads
        outputs = []
        for q, slots in zip(torch.split(query.to(self.dtype), plan.query_lens), plan.slots, strict=True):
            length, new = len(slots), len(q)
            k, v = cache.read(slots)
            k = k.repeat_interleave(heads // kv_heads, dim=1)  # [L, Hq, D]
            v = v.repeat_interleave(heads // kv_heads, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(length - new, length)[:, None] - torch.arange(length)[None, :]
            visible = distance >= 0
            if cache.spec.sliding_window is not None:
                visible &= distance < cache.spec.sliding_window
            probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", probabilities, v))
        return torch.cat(outputs).flatten(1)

    def record(
        self, forward: Callable[[Tensor, AttentionPlan], Tensor], max_tokens: int, block_size: int
    ) -> Callable[[Tensor, AttentionPlan], Tensor]:
        """`forward` itself: nothing is gained by writing it down here."""
        return forward

    def sample(self, logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> SampleResult:
        """logits [R, V] -> one token a row, by the rule of `kernels.sampling`.

        A row that is not finite, or of which every token is forbidden, gives id 0.
        """
        if logits.dim() != 2:
            raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")
        rows, vocab = logits.shape
        check_sampling(metadata, rows, vocab)
        metadata = with_pending(metadata, pending)
        finite = torch.isfinite(logits).all(-1)
        values = logits.to(torch.float32).numpy()
        random = random_31_bits(metadata.seeds, metadata.positions, metadata.choices)
        tokens = [draw(kept_weights(values[r], metadata, r), int(random[r])) for r in range(rows)]
        token_ids = torch.tensor(tokens, dtype=torch.int64)
        return SampleResult(token_ids, finite)

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
        """logits [R, V], token_ids int64 [R] -> log-probabilities, before any filter."""
        return log_probabilities(logits, token_ids, count)

    def token_weights(self, scaled: Float32Array, maximum: np.float32) -> Int64Array:
        """The weights that `sample` gives to a row of logits after temperature."""
        return token_weights(scaled, maximum)


def _positions(plan: ReferencePlan) -> Tensor:
    """Of the step's tokens in their sequences, int64 [T]."""
    pairs = zip(plan.query_lens, plan.slots, strict=True)
    return torch.cat([torch.arange(len(slots) - new, len(slots)) for new, slots in pairs])


def _rotate(x: Tensor, rotary: RotaryTable, positions: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` elements of each head of x [T, heads, D] by the angle of its position."""
    half = rotary.rotary_dim // 2
    cos, sin = rotary.cos[positions][:, None, :], rotary.sin[positions][:, None, :]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
