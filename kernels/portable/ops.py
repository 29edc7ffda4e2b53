"""PortableOps: checks of arguments, and the backend's state. The arithmetic is in the modules beside this one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kernels.checks import (
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
from kernels.int8 import quantize_rows
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
from kernels.portable import attention, elementwise, experts, linear
from kernels.portable.experts import PortableExperts
from kernels.portable.kv_cache import PortableKVCache, allocate
from kernels.portable.linear import PortableLinear
from kernels.portable.plan import PortablePlan, make_plan
from kernels.portable.rotary import write_kv
from kernels.portable.sampling import sample
from kernels.portable.workspace import Workspace
from kernels.sampling import Float32Array, Int64Array, log_probabilities, token_weights, with_pending

logger = logging.getLogger(__name__)


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512_BF16, AMX or ARM's BF16) and oneDNN uses it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Both questions are private in torch, with no public form. oneDNN also says yes where it only emulates bf16
    # (AVX-512 without BF16), so an x86 processor must have the instruction.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return not x86 or bool(torch.cpu._is_avx512_bf16_supported())


class PortableOps:
    """The operations of `kernels.ops.Ops` on the CPU, row-invariant to the bit.

    Owns its scratch memory and the results of its start-up checks. Not thread-safe: one engine, one PortableOps. Call
    it under torch.inference_mode or no_grad: results are written into existing tensors, which autograd refuses.
    """

    def __init__(self, threads: int | None = None, dtype: torch.dtype | None = None) -> None:
        """threads: torch's intra-op threads, process-wide; None keeps torch's choice. dtype: None picks bfloat16
        where the processor multiplies it in hardware, else float32. Raises ValueError for other dtypes.
        """
        if dtype is None:
            dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype is {dtype}; the CPU backend computes in bfloat16 or float32")
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}; at least 1 is needed")
            torch.set_num_threads(threads)
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.fallbacks: Counter[str] = Counter()
        self._workspace = Workspace()
        self._packs: bool | None = None
        self._exact: bool | None = None
        self._rows_agree: dict[tuple[int, int, bool], bool] = {}
        self._heights_agree: dict[tuple[int, torch.dtype, int, bool], bool] = {}
        self._norms: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """Pack the weight, or keep its rows (see `.linear`); check once for each shape that rows do not depend on
        their number. Raises ValueError for w8a8 where its product is not exact."""
        check_weight(weight, bias, mode)
        if mode == "w8a8":
            if self._exact is None:
                self._exact = linear.is_exact(self._workspace)
            if not self._exact:
                raise ValueError("mode 'w8a8' needs exact sums, which this processor does not give; use 'w8a16'")
        if self._packs is None:
            self._packs = linear.packs(self.dtype)
        packed = mode == "none" and self._packs
        prepared = linear.prepare(weight, bias, mode, self.dtype, packed, embedding)
        if mode == "w8a8":
            return prepared
        shape = (prepared.out_features, prepared.in_features)
        key = (*shape, packed)
        if key not in self._rows_agree:
            self._rows_agree[key] = linear.rows_agree(prepared, self._workspace)
            if not self._rows_agree[key]:
                self._fall_back("linear", f"[N, K] = {list(shape)} one row at a time")
            elif mode == "none" and not packed:
                self._fall_back("linear", f"[N, K] = {list(shape)} in {self.dtype} by products in float32")
        return prepared if self._rows_agree[key] else replace(prepared, one_by_one=True)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> PortableKVCache:
        """[2, num_blocks, Hkv, block_size, D], zeroed; int8 has scales besides. Raises ValueError for block sizes that
        do not divide 64."""
        return allocate(spec, num_blocks)

    def plan(self, metadata: AttentionMetadata) -> PortablePlan:
        """Positions, slots and tiles of this step. Raises ValueError that names the field of metadata."""
        return make_plan(metadata)

    def embedding(self, token_ids: Tensor, weight: LinearWeight, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T], weight [V, H] -> its rows [T, H], times `scale`."""
        rows = weight.token_rows(token_ids, scale) if isinstance(weight, PortableLinear) else None
        if rows is None:
            raise ValueError("weight was not made by this backend's prepare_linear with `embedding`")
        return rows

    def add_positions(self, x: Tensor, table: Tensor, plan: PortablePlan) -> Tensor:
        """x [T, H] + the rows of table [P, H] at the tokens' positions."""
        check_positions(x, table, plan.longest)
        return x + table.index_select(0, torch.from_numpy(plan.positions))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, H] -> x + residual."""
        check_residual(x, residual)
        return x + residual

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, quantize: bool = False) -> Activations:
        """x [T, H] -> x / sqrt(mean(x^2) + eps) * weight in float32, rounded once (arXiv:1910.07467)."""
        if x.dim() != 2 or weight.shape != x.shape[1:]:
            raise ValueError(f"weight must be [H] for x [T, H], got {tuple(weight.shape)} and {tuple(x.shape)}")
        normalized = elementwise.normalize(x, eps, self._workspace)
        return _activations(torch.mul(normalized, weight, out=torch.empty(x.shape, dtype=self.dtype)), quantize)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (rms_norm(x + residual), x + residual); the sum is rounded before the norm."""
        total = self.add(x, residual)
        return self.rms_norm(total, weight, eps, quantize), total

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> Activations:
        """x [T, H] -> (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias in float32, rounded once
        (arXiv:1607.06450)."""
        check_layer_norm(x, weight, bias)
        normalized = elementwise.layer_normalize(x, eps, self._workspace).mul_(weight)
        if bias is not None:
            normalized.add_(bias)
        return _activations(normalized.to(self.dtype, copy=True), quantize)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (layer_norm(x + residual), x + residual); the sum is rounded before the norm."""
        total = self.add(x, residual)
        return self.layer_norm(total, weight, bias, eps, quantize), total

    def norm_query_key(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """query [T, Hq * D], key [T, Hkv * D] -> each normalized over all its heads together."""
        check_query_key(query, key, query_weight, key_weight)
        return self.rms_norm(query, query_weight, eps), self.rms_norm(key, key_weight, eps)

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> x @ W^T + bias, [T, N], accumulated in float32; in w8a8 from exact integers."""
        if not isinstance(weight, PortableLinear):
            raise ValueError("weight was not made by this backend's prepare_linear")
        if isinstance(x, QuantizedActivations) and weight.mode != "w8a8":
            raise ValueError(f"x is quantized; a weight of mode {weight.mode!r} takes it unquantized")
        values: Tensor = x.values if isinstance(x, QuantizedActivations) else x
        if values.dim() != 2 or values.shape[1] != weight.in_features:
            raise ValueError(f"x must be [T, {weight.in_features}] for this weight, got {tuple(values.shape)}")
        if isinstance(x, QuantizedActivations):
            return linear.apply_quantized(x, weight, self._workspace)
        if weight.mode == "w8a8":
            return linear.apply_quantized(QuantizedActivations(*quantize_rows(values)), weight, self._workspace)
        return linear.apply(values.to(self.dtype), weight, self._workspace)

    def prepare_experts(
        self, weight: Tensor | QuantizedWeight, num_experts: int, mode: QuantizationMode = "none"
    ) -> PortableExperts:
        """A `prepare_linear` for each."""
        size = check_experts(weight, num_experts)
        each = []
        for expert in range(num_experts):
            rows = rows_of(weight, slice(expert * size, expert * size + size))
            prepared = self.prepare_linear(rows, None, mode)
            assert isinstance(prepared, PortableLinear)
            each.append(prepared)
        return PortableExperts(each)

    def experts(
        self,
        x: Tensor,
        router: LinearWeight,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """x [T, H] -> [T, H]: each expert's tokens together (see `kernels.portable.experts`). The router's logits are
        rounded to the backend's dtype, as those of any linear layer."""
        if not isinstance(gate_up, PortableExperts) or not isinstance(down, PortableExperts):
            raise ValueError("gate_up or down was not made by this backend's prepare_experts")
        check_mixture(x, router, gate_up, down, top_k)
        chosen, weights = experts.route(self.linear(x, router).to(torch.float32), top_k, normalize)
        made = torch.zeros(x.shape[0], top_k, x.shape[1])
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, ranks = (chosen == expert).nonzero(as_tuple=True)
            inner = self.silu_mul(self.linear(x[tokens], gate_up.each[expert]), down.each[expert].mode == "w8a8")
            made[tokens, ranks] = self.linear(inner, down.each[expert]).to(torch.float32)
        return experts.combine(made, weights).to(self.dtype)

    def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> silu(gate) * up, [T, I] (arXiv:2002.05202)."""
        _check_gate_up(gate_up)
        return _activations(elementwise.silu_mul(gate_up, self._workspace), quantize)

    def gelu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> gelu(gate) * up, [T, I], gelu in its tanh form (arXiv:1606.08415)."""
        _check_gate_up(gate_up)
        return _activations(elementwise.gelu_mul(gate_up, self._workspace), quantize)

    def gelu(self, x: Tensor, tanh: bool, quantize: bool = False) -> Activations:
        """x [T, I] -> gelu(x), [T, I], in its tanh form or exactly (arXiv:1606.08415)."""
        return _activations(elementwise.gelu(x, tanh, self._workspace), quantize)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [R, V] -> cap * tanh(logits / cap)."""
        check_softcap(cap)
        return elementwise.softcap(logits, cap, self._workspace)

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: RotaryTable,
        kv_cache: KVCache,
        plan: PortablePlan,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Normalize (if asked) and rotate in float32, write K and V rounded to the cache's dtype, return the query."""
        cache = check_cache(kv_cache, PortableKVCache, plan.block_size, plan.largest_block)
        check_write_kv(query, key, value, rotary, (query_norm, key_norm), cache.spec, plan.num_tokens, plan.longest)
        norms = None
        if query_norm is not None and key_norm is not None:
            norms = self._head_norms(query_norm, key_norm, query.shape[1], cache.spec.num_kv_heads)
        cos, sin = plan.rotary(rotary)
        return write_kv(query, key, value, cos, sin, cache, plan, norms, eps, self._workspace)

    def paged_attention(
        self, query: Tensor, kv_cache: KVCache, plan: PortablePlan, scale: float, softcap: float | None = None
    ) -> Tensor:
        """query [T, Hq, D] -> [T, Hq * D]: causal attention in fixed tiles (see `kernels.portable.attention`)."""
        cache = check_cache(kv_cache, PortableKVCache, plan.block_size, plan.largest_block)
        spec = cache.spec
        check_paged_attention(query, spec, plan.num_tokens)
        rows = attention.decode_rows(query.shape[1] // spec.num_kv_heads)
        one_height = not self._heights(spec.head_dim, cache.dtype, rows, softcap is not None)
        own = query.to(cache.dtype).contiguous()
        output = attention.paged_attention(own, cache, plan, scale, softcap, one_height, self._workspace)
        return output.to(self.dtype)

    def record(
        self, forward: Callable[[Tensor, AttentionPlan], Tensor], max_tokens: int, block_size: int
    ) -> Callable[[Tensor, AttentionPlan], Tensor]:
        """`forward` itself: nothing is gained by writing it down here."""
        return forward

    def sample(self, logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> SampleResult:
        """logits [R, V] -> one token a row, the same that `kernels.sampling` picks."""
        if logits.dim() != 2:
            raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")
        return sample(logits, with_pending(metadata, pending), self._workspace, self.fallbacks)

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
        """logits [R, V], token_ids int64 [R] -> log-probabilities, before any filter."""
        return log_probabilities(logits, token_ids, count)

    def token_weights(self, scaled: Float32Array, maximum: np.float32) -> Int64Array:
        """The weights that `sample` gives to a row of logits after temperature."""
        return token_weights(scaled, maximum)

    def _heights(self, head_dim: int, dtype: torch.dtype, rows: int, softcap: bool) -> bool:
        """Whether prompts may use tall tiles beside decode tiles of `rows` rows; checked once."""
        if rows > attention.PROMPT_ROWS:
            return False
        key = (head_dim, dtype, rows, softcap)
        if key not in self._heights_agree:
            self._heights_agree[key] = attention.heights_agree(head_dim, dtype, rows, softcap)
            if not self._heights_agree[key]:
                self._fall_back("paged_attention", f"heads of {head_dim} with a tile for every token")
        return self._heights_agree[key]

    def _fall_back(self, op: str, how: str) -> None:
        self.fallbacks[op] += 1
        logger.warning("%s takes its slower path on this processor: %s", op, how)

    def _head_norms(self, query_norm: Tensor, key_norm: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Both per-head norms as one float32 [Hq + Hkv, D], kept for the next step."""
        key = (id(query_norm), id(key_norm), heads)
        found = self._norms.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                both = torch.cat([query_norm.expand(heads, -1), key_norm.expand(kv_heads, -1)]).float()
            found = self._norms[key] = (query_norm, key_norm, both)  # kept alive, so that ids stay their own
        return found[2]


def _activations(rounded: Tensor, quantize: bool) -> Activations:
    """Quantized values are those of the result after it is rounded to the backend's dtype."""
    return QuantizedActivations(*quantize_rows(rounded)) if quantize else rounded


def _check_gate_up(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 != 0:
        raise ValueError(f"gate_up must be [T, 2*I], got {tuple(gate_up.shape)}")
