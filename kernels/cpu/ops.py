"""CpuOps: checks of arguments, and the backend's state. The arithmetic is in csrc/.

Activations are float32. A call is one command, carried out at once by all threads; or, while a forward pass is being
recorded, written down (`kernels.cpu.program`).
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

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
)
from kernels.cpu import linear, native
from kernels.cpu.experts import CpuExperts
from kernels.cpu.kv_cache import CpuKVCache, allocate
from kernels.cpu.linear import CpuLinear
from kernels.cpu.native import SCRATCH_FLOATS, Team
from kernels.cpu.plan import CpuPlan, make_plan
from kernels.cpu.program import Program, Recording, computing_is_an_error
from kernels.cpu.sampling import Sampler, token_weights
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
from kernels.sampling import Float32Array, Int64Array, log_probabilities, with_pending

_PART_ROWS = 24  # of csrc/attention.h


class CpuOps:
    """The operations of `kernels.ops.Ops` on the CPU, row-invariant to the bit.

    The bits do not depend on the number of threads either, nor on which of its instruction sets the library picked.
    Owns its threads and workspaces. Not thread-safe: one engine, one CpuOps.
    """

    def __init__(
        self, threads: int | None = None, dtype: torch.dtype | None = None, kernels: str | None = None
    ) -> None:
        """threads: None is torch's choice, the physical cores. dtype: what unquantized weights are stored as; None: as
        the checkpoint has them. kernels: an instruction set of `native.Team`; None is the best.

        Raises ValueError for what is not there, native.LibraryMissing where the kernels were not compiled.
        """
        if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype is {dtype}; the CPU backend stores bfloat16, float16 or float32")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 is needed")
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.weight_dtype = dtype
        self.fallbacks: Counter[str] = Counter()
        self.team = Team(threads or torch.get_num_threads(), kernels)
        self._row_dtype = torch.int8 if self.team.group_of == 4 else torch.int16
        self._recording: Recording | None = None
        self._sampler = Sampler(self.team, self.fallbacks)

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """Pack the weight into panels of 16 output features (`kernels.cpu.linear`)."""
        check_weight(weight, bias, mode)
        if mode == "w8a8" and not self.int8_is_exact:
            raise ValueError(f"mode 'w8a8': integer products of {self.team.kernels} are wrong here; use 'w8a16'")
        return linear.pack(weight, bias, mode, self.weight_dtype, self.team.group_of)

    @cached_property
    def int8_is_exact(self) -> bool:
        """Whether integer products are what they should be, looked at once: at the largest values, which are the first
        to overflow, and over more rows and features than one tile has."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(-127, 128, (40, 515), generator=generator, dtype=torch.int8)
        values[:16] = values[16:32].sign() * 127
        values[16] = 127
        weight = linear.pack(QuantizedWeight(values, torch.ones(40)), None, "w8a8", None, self.team.group_of)
        product = self.linear(QuantizedActivations(values[:19], torch.ones(19)), weight)
        return torch.equal(product.double(), values[:19].double() @ values.double().T)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> CpuKVCache:
        """Zeroed. Raises ValueError for block sizes that are no multiple of 16."""
        return allocate(spec, num_blocks)

    def plan(self, metadata: AttentionMetadata) -> CpuPlan:
        """Positions, sequences and block tables of this step. Raises ValueError that names the field of metadata."""
        return make_plan(metadata)

    def record(
        self, forward: Callable[[Tensor, AttentionPlan], Tensor], max_tokens: int, block_size: int
    ) -> Callable[[Tensor, AttentionPlan], Tensor]:
        """Call `forward` once and write down what it asks for; the result carries that out for other tokens and plans
        in a single call (see `kernels.cpu.program`). Raises RuntimeError if `forward` computes by other means.
        """
        # Two tokens, so that the distance from row to row shows in every view.
        recording = Recording(max(max_tokens, 2))
        with torch.inference_mode(False):
            token_ids = torch.zeros(recording.max_tokens, dtype=torch.int64)
            tokens, plan = token_ids[:2], make_plan(AttentionMetadata([2], [2], [[0]], block_size))
            self._recording = recording
            try:
                with torch.no_grad(), computing_is_an_error():
                    result = forward(tokens, plan)
            finally:
                self._recording = None
        return Program(self.team, recording, token_ids, result)

    def embedding(self, token_ids: Tensor, weight: LinearWeight, scale: float = 1.0) -> Tensor:
        """token_ids int64 [T], weight [V, H] -> its rows float32 [T, H], times `scale`."""
        own = _own_weight(weight)
        if token_ids.dim() != 1 or token_ids.dtype != torch.int64:
            raise ValueError(f"token_ids must be int64 [T], got {token_ids.dtype} {tuple(token_ids.shape)}")
        ids = token_ids.contiguous()
        y = self._new("embedding", ids.shape[0], (own.in_features,))
        numbers = (own.out_features, own.in_features, y.stride(0))
        self._do(native.EMBEDDING, ids.shape[0], (ids, own.packed, own.scales, y), numbers, own.type, scale)
        return y

    def add_positions(self, x: Tensor, table: Tensor, plan: CpuPlan) -> Tensor:
        """x [T, H] + the rows of table [P, H] at the tokens' positions."""
        check_positions(x, table, plan.longest)
        if len(x) != plan.num_tokens:
            raise ValueError(f"x has {len(x)} rows; the plan has {plan.num_tokens} tokens")
        x, table = _floats(x), _floats(table).contiguous()
        if self._recording is not None:
            self._recording.bound(max_positions=len(table))
        y = self._new("positioned", len(x), (x.shape[1],))
        self._do(native.ADD_POSITIONS, len(x), (x, table, y), (x.shape[1], x.stride(0), y.stride(0)), plan=plan)
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, H] -> x + residual."""
        check_residual(x, residual)
        x, residual = _floats(x), _floats(residual)
        rows, width = x.shape
        total = self._new("total", rows, (width,))  # may be the residual's, as in `_norm`
        numbers = (width, x.stride(0), residual.stride(0), total.stride(0))
        self._do(native.ADD, rows, (x, residual, total), numbers)
        return total

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, quantize: bool = False) -> Activations:
        """x [T, H] -> x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467)."""
        return self._norm(x, None, weight, eps, quantize)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (rms_norm(x + residual), x + residual)."""
        check_residual(x, residual)
        return self._norm(x, residual, weight, eps, quantize)

    def norm_query_key(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """query [T, Hq * D], key [T, Hkv * D] -> each normalized over all its heads together."""
        check_query_key(query, key, query_weight, key_weight)
        # Of the same width they would share a buffer if its name were the same.
        normed_query, _ = self._norm(query, None, query_weight, eps, False, "query norm")
        normed_key, _ = self._norm(key, None, key_weight, eps, False, "key norm")
        return normed_query, normed_key

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> Activations:
        """x [T, H] -> (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias (arXiv:1607.06450)."""
        return self._layer_norm("layer norm", x, None, weight, bias, eps, quantize)[0]

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, quantize: bool = False
    ) -> tuple[Activations, Tensor]:
        """x, residual [T, H] -> (layer_norm(x + residual), x + residual)."""
        check_residual(x, residual)
        return self._layer_norm("add layer norm", x, residual, weight, bias, eps, quantize)

    def _layer_norm(
        self,
        name: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        quantize: bool,
    ) -> tuple[Activations, Tensor]:
        check_layer_norm(x, weight, bias)
        rows, width = x.shape
        _check_width(width)
        x, weight, bias = _floats(x), _floats(weight), None if bias is None else _floats(bias)
        total, other_stride = x, 0
        if residual is not None:
            residual = _floats(residual)
            other_stride = residual.stride(0)
            total = self._new("total", rows, (width,))  # may be the residual's, as in `_norm`
        y, values, scales = self._result(name, rows, width, quantize)
        numbers = (width, x.stride(0), other_stride, total.stride(0), values.stride(0))
        self._do(native.LAYER_NORM, rows, (x, residual, weight, bias, total, values, scales), numbers, f=eps)
        return y, total

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, quantize: bool, name: str = "norm"
    ) -> tuple[Activations, Tensor]:
        if x.dim() != 2 or weight.shape != x.shape[1:]:
            raise ValueError(f"weight must be [H] for x [T, H], got {tuple(weight.shape)} and {tuple(x.shape)}")
        rows, width = x.shape
        _check_width(width)
        x, weight = _floats(x), _floats(weight)
        total, other_stride = x, 0
        if residual is not None:
            residual = _floats(residual)
            other_stride = residual.stride(0)
            # May be the buffer that `residual` is in: each element is read before it is written.
            total = self._new("total", rows, (width,))
        y, values, scales = self._result(name, rows, width, quantize)
        numbers = (width, x.stride(0), other_stride, total.stride(0), values.stride(0))
        self._do(native.NORM, rows, (x, residual, weight, total, values, scales), numbers, f=eps)
        return y, total

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> x @ W^T + bias, float32 [T, N] (w8a8: the product is exact until it is scaled)."""
        own = _own_weight(weight)
        k = own.in_features
        if isinstance(x, QuantizedActivations):
            if own.mode != "w8a8":
                raise ValueError(f"x is quantized; a weight of mode {own.mode!r} takes it unquantized")
        else:
            if x.dim() != 2 or x.shape[1] != k:
                raise ValueError(f"x must be [T, {k}] for this weight, got {tuple(x.shape)}")
            x = _floats(x)
            if own.mode == "w8a8":
                x = self.quantize(x)
        scales: Tensor | None = None
        if isinstance(x, QuantizedActivations):
            if x.values.shape[1:] != (k,) or x.scales.shape != x.values.shape[:1]:
                raise ValueError(f"x must be [T, {k}] for this weight, got {tuple(x.values.shape)}")
            rows, scales = x.values, x.scales
            width = self._padded(k)
            if rows.dtype != self._row_dtype or rows.stride(1) != 1 or rows.stride(0) < width:  # made by somebody else
                rows = torch.nn.functional.pad(rows.to(self._row_dtype), (0, width - k)).contiguous()
        else:
            rows = x
        y = self._new("linear", rows.shape[0], (own.out_features,))
        numbers = (own.out_features, k, rows.stride(0), y.stride(0))
        self._do(native.LINEAR, rows.shape[0], (rows, scales, own.packed, own.scales, own.bias, y), numbers, own.type)
        return y

    def prepare_experts(
        self, weight: Tensor | QuantizedWeight, num_experts: int, mode: QuantizationMode = "none"
    ) -> CpuExperts:
        """Pack the weights, one expert's panels after the other's."""
        check_experts(weight, num_experts)
        return CpuExperts(num_experts, _own_weight(self.prepare_linear(weight, None, mode)))

    def experts(
        self,
        x: Tensor,
        router: LinearWeight,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """x [T, H] -> [T, H]: the rows of each expert together, at places that are found when they are computed."""
        if not isinstance(gate_up, CpuExperts) or not isinstance(down, CpuExperts):
            raise ValueError("gate_up or down was not made by this backend's prepare_experts")
        check_mixture(x, router, gate_up, down, top_k)
        tokens, hidden = x.shape
        count, inner = gate_up.num_experts, down.in_features
        _check_width(8 * max(hidden, inner, count))  # as many rows of a tile are gathered
        x = _floats(x)
        logits = self.linear(x, router)
        chosen = self._new("chosen experts", tokens, (top_k,), torch.int32)
        weights = self._new("expert weights", tokens, (top_k,))
        numbers = (count, top_k, logits.stride(0))
        self._do(native.ROUTE, tokens, (logits, chosen, weights), numbers, int(normalize))
        offsets = torch.empty(count + 1, dtype=torch.int32)
        pairs = self._new("expert pairs", tokens, (top_k,), torch.int32)
        self._do(native.GROUP, tokens, (chosen, offsets, pairs), (count, top_k))

        both = self._new("expert gate and up", tokens, (top_k, 2 * inner))
        first: Activations = self.quantize(x) if gate_up.stacked.mode == "w8a8" else x
        self._expert_linear(first, gate_up, both, offsets, pairs, top_k)
        quantized = down.stacked.mode == "w8a8"
        width = self._padded(inner) if quantized else inner
        gated = self._new("expert gated", tokens, (top_k, width), self._row_dtype if quantized else torch.float32)
        scales = self._new("expert gated scales", tokens, (top_k,)) if quantized else None
        self._do(native.GATED, tokens, (both, gated, scales), (inner, 2 * inner, width), per_token=top_k)
        made = self._new("expert output", tokens, (top_k, hidden))
        second: Activations = gated.view(tokens * top_k, width)
        if scales is not None:
            second = QuantizedActivations(second, scales.view(tokens * top_k))
        self._expert_linear(second, down, made, offsets, pairs, 1)
        y = self._new("experts", tokens, (hidden,))
        self._do(native.COMBINE, tokens, (made, weights, y), (hidden, top_k, hidden, y.stride(0)))
        return y

    def _expert_linear(
        self, x: Activations, weight: CpuExperts, y: Tensor, offsets: Tensor, pairs: Tensor, divisor: int
    ) -> None:
        """x [T * k / divisor, K] -> y [T, k, N], of which each row is made by its expert."""
        rows, scales = (x.values, x.scales) if isinstance(x, QuantizedActivations) else (x, None)
        own = weight.stacked
        pointers = (rows, scales, own.packed, own.scales, y, offsets, pairs)
        numbers = (weight.out_features, own.in_features, rows.stride(0), y.stride(1), weight.num_experts, divisor)
        self._do(native.EXPERT_LINEAR, y.shape[0], pointers, numbers, own.type)

    def silu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> silu(gate) * up, [T, I] (arXiv:2002.05202)."""
        return self._gated(gate_up, 0, quantize)

    def gelu_mul(self, gate_up: Tensor, quantize: bool = False) -> Activations:
        """gate_up [T, 2*I], gate first -> gelu(gate) * up, [T, I], gelu in its tanh form (arXiv:1606.08415)."""
        return self._gated(gate_up, 1, quantize)

    def _gated(self, gate_up: Tensor, kind: int, quantize: bool) -> Activations:
        if gate_up.dim() != 2 or gate_up.shape[1] % 2 != 0:
            raise ValueError(f"gate_up must be [T, 2*I], got {tuple(gate_up.shape)}")
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        _check_width(width)
        gate_up = _floats(gate_up)
        y, values, scales = self._result("gated", rows, width, quantize)
        self._do(native.GATED, rows, (gate_up, values, scales), (width, gate_up.stride(0), values.stride(0)), kind)
        return y

    def gelu(self, x: Tensor, tanh: bool, quantize: bool = False) -> Activations:
        """x [T, I] -> gelu(x), [T, I], in its tanh form or exactly (arXiv:1606.08415)."""
        rows, width = x.shape
        _check_width(width)
        x = _floats(x)
        y, values, scales = self._result("gelu", rows, width, quantize)
        numbers = (width, x.stride(0), values.stride(0))
        self._do(native.UNGATED, rows, (x, values, scales), numbers, 0 if tanh else 1)
        return y

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """logits [R, V] -> cap * tanh(logits / cap)."""
        check_softcap(cap)
        rows, width = logits.shape
        x = _floats(logits)
        y = self._new("softcap", rows, (width,))
        self._do(native.SOFTCAP, rows, (x, y), (width, x.stride(0), y.stride(0)), f=cap)
        return y

    def write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: RotaryTable,
        kv_cache: KVCache,
        plan: CpuPlan,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Normalize (if asked) and rotate, write K and V in the cache's dtype, return the query, float32 [T, Hq, D]."""
        cache = check_cache(kv_cache, CpuKVCache, plan.block_size, plan.largest_block)
        tokens = plan.num_tokens
        check_write_kv(query, key, value, rotary, (query_norm, key_norm), cache.spec, tokens, plan.longest)
        query, key, value = (_heads(tensor) for tensor in (query, key, value))
        norms = [None if norm is None else _floats(norm) for norm in (query_norm, key_norm)]
        rotated = self._new("query", tokens, tuple(query.shape[1:]))
        if self._recording is not None:
            self._recording.bound(max_positions=rotary.cos.shape[0], num_blocks=cache.num_blocks)
            self._recording.kept.append((cache, rotary))
        self._do(
            native.WRITE_KV,
            tokens,
            (query, key, value, rotary.cos, rotary.sin, *norms, ctypes.addressof(cache.struct), rotated),
            (query.shape[1], rotary.rotary_dim // 2, query.stride(0), key.stride(0), value.stride(0)),
            f=eps,
            plan=plan,
        )
        return rotated

    def paged_attention(
        self, query: Tensor, kv_cache: KVCache, plan: CpuPlan, scale: float, softcap: float | None = None
    ) -> Tensor:
        """query [T, Hq, D] -> float32 [T, Hq * D]: causal attention, the cache read where it lies."""
        cache = check_cache(kv_cache, CpuKVCache, plan.block_size, plan.largest_block)
        spec, heads = cache.spec, query.shape[1]
        check_paged_attention(query, spec, plan.num_tokens)
        if max(heads // spec.num_kv_heads, _PART_ROWS) * (2 * spec.head_dim + 96) > SCRATCH_FLOATS:
            raise ValueError(f"query has {heads} heads over {spec.num_kv_heads}: too many for one key")
        query = _floats(query)
        if not query.is_contiguous():
            query = query.contiguous()
        y = self._new("attention", plan.num_tokens, (heads * spec.head_dim,))
        self._do(
            native.ATTENTION,
            plan.num_tokens,
            (query, ctypes.addressof(cache.struct), y),
            (heads,),
            f=scale,
            softcap=softcap or 0.0,
            plan=plan,
        )
        return y

    def sample(self, logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> SampleResult:
        """logits [R, V] -> one token a row, the same that `kernels.sampling` picks."""
        if logits.dim() != 2:
            raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")
        return self._sampler(_floats(logits), with_pending(metadata, pending))

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, count: int) -> LogProbabilities:
        """logits [R, V], token_ids int64 [R] -> log-probabilities, before any filter."""
        return log_probabilities(logits, token_ids, count)

    def token_weights(self, scaled: Float32Array, maximum: np.float32) -> Int64Array:
        """The weights that `sample` gives to a row of logits after temperature."""
        return token_weights(self.team, scaled, maximum)

    def quantize(self, x: Tensor) -> QuantizedActivations:
        """x float32 [T, K] -> integers as the kernels multiply them, with a scale for each row (`kernels.int8`)."""
        rows, width = x.shape
        y, values, scales = self._result("quantize", rows, width, True)
        self._do(native.QUANTIZE, rows, (x, values, scales), (width, x.stride(0), values.stride(0)))
        assert isinstance(y, QuantizedActivations)
        return y

    def _result(self, name: str, rows: int, width: int, quantize: bool) -> tuple[Activations, Tensor, Tensor | None]:
        """A result, its memory, and its scales if it is to be quantized: to integers as the kernels multiply them."""
        if not quantize:
            y = self._new(name, rows, (width,))
            return y, y, None
        values = self._new(f"{name} values", rows, (self._padded(width),), self._row_dtype)
        scales = self._new(f"{name} scales", rows, ())
        return QuantizedActivations(values[:, :width], scales), values, scales

    def _padded(self, features: int) -> int:
        return linear.padded(features, self.team.group_of)

    def _new(self, name: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if self._recording is not None:
            return self._recording.buffer(name, rows, shape, dtype)
        return torch.empty((rows, *shape), dtype=dtype)

    def _do(
        self,
        op: int,
        rows: int,
        pointers: Sequence[Tensor | int | None],
        numbers: Sequence[int],
        flags: int = 0,
        f: float = 0.0,
        softcap: float = 0.0,
        plan: CpuPlan | None = None,
        per_token: int = 1,
    ) -> None:
        """Carry a command out, or write it down: then for as many rows as a step will have tokens. `per_token` rows of
        the operation belong to each of `rows`."""
        recording = self._recording
        count = -per_token if recording is not None else rows * per_token
        made = native.command(op, count, pointers, numbers, flags, f)
        made.f[1] = softcap
        if recording is None:
            self.team.run(made, 1, None if plan is None else plan.struct)
        else:
            recording.commands.append(made)
            recording.kept.append(pointers)


def _own_weight(weight: LinearWeight) -> CpuLinear:
    if not isinstance(weight, CpuLinear):
        raise ValueError("weight was not made by this backend's prepare_linear")
    return weight


def _check_width(width: int) -> None:
    if width > SCRATCH_FLOATS:
        raise ValueError(f"rows of {width} elements are too long; up to {SCRATCH_FLOATS} fit")


def _floats(x: Tensor) -> Tensor:
    """As float32 with neighbouring elements side by side: without a copy if it is so."""
    x = x if x.dtype == torch.float32 else x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    """[T, heads, D] as float32 with a token's heads side by side, as in a view of a packed projection."""
    x = _floats(x)
    return x if x.stride(1) == x.shape[2] else x.contiguous()
