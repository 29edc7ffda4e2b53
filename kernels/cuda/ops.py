"""CudaOps: checks of arguments, and the backend's state. The kernels are in the modules beside this one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import (
    check_attention,
    check_cache,
    check_experts,
    check_mixture,
    check_positions,
    check_query_key,
    check_residual,
    check_softcap,
)
from kernels.cuda import (
    activation,
    attention,
    experts,
    layer_norm,
    linear,
    norm,
    pointwise,
    sampling,
    sampling_logprobs,
)
from kernels.cuda import kv_cache as kv_cache_module
from kernels.cuda.common import device_type
from kernels.cuda.experts import CudaExperts
from kernels.cuda.kv_cache import CudaKVCache
from kernels.cuda.linear import CudaLinear
from kernels.cuda.plan import CudaPlan, make_plan
from kernels.cuda.plan_check import check_on_device
from kernels.cuda.sampling_weights import token_weights
from kernels.cuda.upload import Upload
from kernels.cuda.workspace import Workspace
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
from kernels.sampling import Float32Array, Int64Array

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CudaOps:
    """The operations of `kernels.ops.Ops` in Triton, row-invariant to the bit.

    On one NVIDIA GPU of compute capability 8.0 or later; with TRITON_INTERPRET=1 on CPU tensors, in Triton's
    interpreter. Owns its workspaces and the upload buffer. Everything runs on the current stream. Not thread-safe: one
    engine, one CudaOps.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, deterministic: bool = True, debug: bool = False) -> None:
        """deterministic: False lets cuBLAS compute unquantized linears, whose bits vary with the number of rows.
        debug: check on the host, in every call, what the kernels take on trust: that plans stay within the cache and
        the rotary table. That waits for the device, so calls captured in a CUDA graph are not checked. Raises
        ValueError for other dtypes, RuntimeError without a GPU.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; the CUDA backend computes in bfloat16, float16 or float32")
        self.device = torch.device(device_type())
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.deterministic = deterministic
        self.debug = debug
        self.fallbacks: Counter[str] = Counter()
        self.upload = Upload(self.device)
        self._workspace = Workspace(self.device)

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """Move the weight to the device, in the backend's dtype or as int8 with a scale for each row."""
        return linear.prepare(weight, bias, mode, self.device, self.dtype)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> CudaKVCache:
        """[num_blocks, Hkv, block_size, D] each for K and V, zeroed, and their scales if they are int8."""
        return kv_cache_module.allocate(spec, num_blocks, self.device)

    def plan(self, metadata: AttentionMetadata) -> CudaPlan:
        """Positions, slots and work lists of this step, in one upload."""
        check_attention(metadata)
        plan = make_plan(metadata, self.upload)
        self.upload.send()
        return plan

    def embedding(self, token_ids: Tensor, weight: LinearWeight, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T], weight [V, H] -> its rows [T, H], times `scale`."""
        if not isinstance(weight, CudaLinear):
            raise ValueError("weight was not made by this backend's prepare_linear")
        if weight.scales is None:
            rows = F.embedding(token_ids, weight.weight)
            return rows if scale == 1.0 else (rows.to(torch.float32) * scale).to(self.dtype)
        rows = weight.weight[token_ids].to(torch.float32) * weight.scales[token_ids, None]
        return (rows * scale).to(self.dtype)

    def add_positions(self, x: Tensor, table: Tensor, plan: CudaPlan) -> Tensor:
        """x [T, H] + the rows of table [P, H] at the tokens' positions."""
        check_positions(x, table, plan.max_seq_len)
        if self._checks_on_device():
            check_positions(x, table, int(plan.seq_lens.max()))
        return x + F.embedding(plan.positions, table)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, H] -> x + residual."""
        check_residual(x, residual)
        return x + residual

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, quantize: bool = False) -> Activations:
        """x [T, H] -> x / sqrt(mean(x^2) + eps) * weight in float32, rounded once (arXiv:1910.07467)."""
        return norm.rms_norm(x, None, weight, eps, quantize)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (rms_norm(x + residual), x + residual); the sum is rounded before the norm."""
        check_residual(x, residual)
        return norm.rms_norm(x, residual, weight, eps, quantize)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> Activations:
        """x [T, H] -> (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (arXiv:1607.06450)."""
        y = layer_norm.layer_norm(x, None, weight, bias, eps)[0]
        return norm.quantize(y) if quantize else y

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (layer_norm(x + residual), x + residual); the sum is rounded before the norm."""
        check_residual(x, residual)
        y, total = layer_norm.layer_norm(x, residual, weight, bias, eps)
        return norm.quantize(y) if quantize else y, total

    def norm_query_key(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """query [T, Hq * D], key [T, Hkv * D] -> each normalized over all its heads together, after a copy."""
        check_query_key(query, key, query_weight, key_weight)
        query, key = query.contiguous(), key.contiguous()
        return self.rms_norm(query, query_weight, eps), self.rms_norm(key, key_weight, eps)

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> x @ W^T + bias, [T, N], accumulated in float32 (w8a8: in int32, exactly)."""
        if not isinstance(weight, CudaLinear):
            raise ValueError("weight was not made by this backend's prepare_linear")
        if isinstance(x, QuantizedActivations) != (weight.mode == "w8a8"):
            if isinstance(x, QuantizedActivations):
                raise ValueError(f"x is quantized; a weight of mode {weight.mode!r} takes it unquantized")
            x = norm.quantize(x)
        if weight.mode == "none" and not self.deterministic:
            return F.linear(x, weight.weight, weight.bias)
        return linear.linear(x, weight, self._workspace)

    def prepare_experts(
        self, weight: Tensor | QuantizedWeight, num_experts: int, mode: QuantizationMode = "none"
    ) -> CudaExperts:
        """Move the weights to the device as one, in the backend's dtype or as int8 with a scale for each row."""
        check_experts(weight, num_experts)
        return CudaExperts(num_experts, linear.prepare(weight, None, mode, self.device, self.dtype))

    def experts(
        self,
        x: Tensor,
        router: LinearWeight,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """x [T, H] -> [T, H] by grouped products (see `kernels.cuda.experts`)."""
        if not isinstance(gate_up, CudaExperts) or not isinstance(down, CudaExperts):
            raise ValueError("gate_up or down was not made by this backend's prepare_experts")
        check_mixture(x, router, gate_up, down, top_k)
        if not isinstance(router, CudaLinear):
            raise ValueError("router was not made by this backend's prepare_linear")
        logits = linear.linear(x, router, self._workspace, torch.float32)
        chosen, weights = experts.route(logits, top_k, normalize)
        groups = experts.group(chosen, gate_up.num_experts)
        rows = norm.quantize(x) if gate_up.stacked.mode == "w8a8" else x
        inner = self.silu_mul(experts.expert_linear(rows, gate_up, groups, top_k), down.stacked.mode == "w8a8")
        return experts.combine(experts.expert_linear(inner, down, groups, 1), weights)

    def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> silu(gate) * up, [T, I] (arXiv:2002.05202)."""
        return activation.gated(gate_up, "silu", quantize)

    def gelu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> gelu(gate) * up, [T, I], gelu in its tanh form (arXiv:1606.08415)."""
        return activation.gated(gate_up, "gelu", quantize)

    def gelu(self, x: Tensor, tanh: bool, quantize: bool = False) -> Activations:
        """x [T, I] -> gelu(x), [T, I], in its tanh form or exactly (arXiv:1606.08415)."""
        y = pointwise.pointwise(x, "gelu_tanh" if tanh else "gelu")
        return norm.quantize(y) if quantize else y

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [R, V] -> cap * tanh(logits / cap)."""
        check_softcap(cap)
        return pointwise.pointwise(logits, "softcap", cap)

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: RotaryTable,
        kv_cache: KVCache,
        plan: CudaPlan,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Normalize (if asked) and rotate in float32, write K and V rounded to the cache's dtype, return the query."""
        cache = self._own_cache(kv_cache, plan)
        if self._checks_on_device() and int(plan.seq_lens.max()) > rotary.cos.shape[0]:
            longest = int(plan.seq_lens.max())
            raise ValueError(f"rotary has {rotary.cos.shape[0]} positions; a sequence has {longest} tokens")
        return kv_cache_module.write_kv(query, key, value, rotary, cache, plan, query_norm, key_norm, eps)

    def paged_attention(
        self, query: Tensor, kv_cache: KVCache, plan: CudaPlan, scale: float, softcap: float | None = None
    ) -> Tensor:
        """query [T, Hq, D] -> [T, Hq * D] (see `kernels.cuda.attention`)."""
        cache = self._own_cache(kv_cache, plan)
        return attention.paged_attention(query, cache, plan, scale, softcap, self._workspace)

    def record(
        self, forward: Callable[[Tensor, AttentionPlan], Tensor], max_tokens: int, block_size: int
    ) -> Callable[[Tensor, AttentionPlan], Tensor]:
        """`forward` itself: nothing is gained by writing it down here."""
        return forward

    def sample(self, logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> SampleResult:
        """logits [R, V] -> one token a row (see `kernels.cuda.sampling`)."""
        if logits.dim() != 2:
            raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")
        plan = sampling.make_plan(metadata, logits.shape[0], logits.shape[1], self.upload)
        self.upload.send()
        return sampling.sample(logits, plan, pending, self._workspace)

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
        """logits [R, V], token_ids int64 [R] -> log-probabilities (see `kernels.cuda.sampling_logprobs`)."""
        return sampling_logprobs.log_probabilities(logits, token_ids, count, self._workspace)

    def token_weights(self, scaled: Float32Array, maximum: np.float32) -> Int64Array:
        """The weights that `sample` gives to a row of logits after temperature. Waits for the device."""
        return token_weights(torch.from_numpy(scaled).to(self.device), float(maximum)).cpu().numpy()

    def _own_cache(self, cache: KVCache, plan: CudaPlan) -> CudaKVCache:
        """Check that the cache is ours and fits the plan."""
        own = check_cache(cache, CudaKVCache, plan.block_size, plan.largest_block)
        if self._checks_on_device():
            check_on_device(plan, own.num_blocks)
        return own

    def _checks_on_device(self) -> bool:
        """Whether to read back what is on the device: a graph that is being captured does not allow it."""
        return self.debug and not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
