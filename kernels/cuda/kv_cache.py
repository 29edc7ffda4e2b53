"""The paged KV cache of one layer, and the kernel that fills it.

    keys, values            [num_blocks, Hkv, block_size, D]
    key_scales, value_scales  float32 [num_blocks, Hkv, block_size], for int8

The tokens of one head in one block are contiguous, since attention reads them so: block_size * D elements in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_write_kv
from kernels.cuda.common import TRITON_TYPES, round_half_even, round_to
from kernels.cuda.compile import Variant
from kernels.cuda.plan import CudaPlan
from kernels.ops import KVCacheSpec, RotaryTable

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256
_HEADS = 8  # of a program: with 128 elements and 64 threads, a thread loads 16 bytes at a time


@dataclass(frozen=True, slots=True)
class CudaKVCache:
    """One layer's K and V; the scales are None unless `spec.dtype` is int8.

    descriptors: of keys and values in tiles of so many rows, kept by attention for as long as the cache lives.
    """

    spec: KVCacheSpec
    num_blocks: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    descriptors: dict[int, tuple[Any, Any]] = field(init=False, default_factory=dict, repr=False, compare=False)


def allocate(spec: KVCacheSpec, num_blocks: int, device: torch.device) -> CudaKVCache:
    """Zeroed. Raises ValueError for a dtype, block size or head size that the kernels do not have."""
    if spec.dtype not in DTYPES:
        raise ValueError(f"spec.dtype is {spec.dtype}; the cache holds bfloat16, float16, float32 or int8")
    if spec.block_size not in BLOCK_SIZES:
        raise ValueError(f"spec.block_size is {spec.block_size}; allowed are {BLOCK_SIZES}")
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"spec.head_dim is {spec.head_dim}; allowed is 1 to {MAX_HEAD_DIM}")
    if spec.sliding_window is not None and spec.sliding_window < 1:
        raise ValueError(f"spec.sliding_window is {spec.sliding_window}; it must be at least 1, or None")
    shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    keys, values = (torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(2))
    if spec.dtype != torch.int8:
        return CudaKVCache(spec, num_blocks, keys, values, None, None)
    key_scales, value_scales = (torch.zeros(shape[:3], device=device) for _ in range(2))
    return CudaKVCache(spec, num_blocks, keys, values, key_scales, value_scales)


def write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: RotaryTable,
    cache: CudaKVCache,
    plan: CudaPlan,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Per-head RMSNorm of query and key (if asked), rotation, K and V to their slots: one launch. Returns the query.

    query [T, Hq, D], key and value [T, Hkv, D] of one dtype, heads contiguous, tokens at any stride; the returned query
    is new and contiguous. All arithmetic is in float32, rounded once; int8 follows `kernels.int8` to the bit. A token
    whose slot is -1 writes nothing to the cache. Raises ValueError for shapes that do not fit.

    Floor: query, key and value read once, query, key and value written once, over bandwidth. Not measured: no GPU was
    at hand.
    """
    tokens, spec = plan.num_tokens, cache.spec
    dim = spec.head_dim
    check_write_kv(query, key, value, rotary, (query_norm, key_norm), spec, tokens, plan.max_seq_len)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(2) != 1 or tensor.stride(1) != dim:
            raise ValueError(f"{name} must have contiguous heads, got strides {tensor.stride()}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, query {query.dtype}")
    heads = query.shape[1]
    rotated = torch.empty((tokens, heads, dim), dtype=query.dtype, device=query.device)
    chunks = triton.cdiv(heads, _HEADS) + 2 * triton.cdiv(spec.num_kv_heads, _HEADS)
    launch = _launch(
        dim,
        rotary.rotary_dim,
        heads,
        spec.num_kv_heads,
        spec.block_size,
        query_norm is not None,
        spec.dtype == torch.int8,
    )
    _write_kernel[(tokens, chunks)](
        query,
        key,
        value,
        rotated,
        cache.keys,
        cache.values,
        rotated if cache.key_scales is None else cache.key_scales,  # not read where there are none
        rotated if cache.value_scales is None else cache.value_scales,
        rotary.cos,
        rotary.sin,
        rotated if query_norm is None else query_norm,
        rotated if key_norm is None else key_norm,
        plan.positions,
        plan.slots,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        rotary.cos.stride(0),
        eps,
        **launch,
        enable_fp_fusion=True,
    )
    return rotated


def _launch(
    dim: int, rotary_dim: int, heads: int, kv_heads: int, block_size: int, norm: bool, quantize: bool
) -> dict[str, int]:
    """Constants of the kernel. The sums of the norm have one order, whatever the number of tokens."""
    return {
        "HEADS": _HEADS,
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "DIM": dim,
        "HALF": rotary_dim // 2,
        "HALF_BLOCK": triton.next_power_of_2(rotary_dim // 2),
        "REST_BLOCK": triton.next_power_of_2(max(dim - rotary_dim, 1)),
        "NORM": norm,
        "QUANTIZE": quantize,
        "num_warps": 2,
    }


@triton.jit
def _quantized(x, inverse):
    """x * inverse to the nearest integer, halves to even, as `kernels.int8` has it; NaN, which has no integer, to 0.

    The product is an explicit fma with 0: left alone it would be contracted with the addition that rounds it.
    """
    rounded = round_half_even(tl.fma(x, inverse, tl.zeros_like(x)))
    rounded = tl.where(rounded == rounded, rounded, 0.0)
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


@triton.jit
def _store_rows(
    target_ptr, scales_ptr, rows, mask, first, second, rest, DIM: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Write rows of DIM elements at element offset rows * DIM, quantized or rounded; `rows` int64 [HEADS]."""
    half, tail = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    ptr = target_ptr + rows[:, None] * DIM
    half_mask = mask[:, None] & (half < HALF)
    tail_mask = mask[:, None] & (tail < DIM - 2 * HALF)
    if QUANTIZE:
        # NaN must reach the scale, so no maximum may drop it.
        largest = tl.maximum(_largest(first), _largest(second), propagate_nan=tl.PropagateNan.ALL)
        if DIM > 2 * HALF:
            largest = tl.maximum(largest, _largest(rest), propagate_nan=tl.PropagateNan.ALL)
        inverse = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)[:, None]
        tl.store(scales_ptr + rows, tl.div_rn(largest, 127.0), mask=mask)
        tl.store(ptr + half, _quantized(first, inverse), mask=half_mask)
        tl.store(ptr + HALF + half, _quantized(second, inverse), mask=half_mask)
        if DIM > 2 * HALF:
            tl.store(ptr + 2 * HALF + tail, _quantized(rest, inverse), mask=tail_mask)
    else:
        dtype = target_ptr.dtype.element_ty
        tl.store(ptr + half, round_to(first, dtype), mask=half_mask)
        tl.store(ptr + HALF + half, round_to(second, dtype), mask=half_mask)
        if DIM > 2 * HALF:
            tl.store(ptr + 2 * HALF + tail, round_to(rest, dtype), mask=tail_mask)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    """max|x| of each row; NaN if the row holds one."""
    return tl.reduce(tl.abs(x), 1, _larger)


@triton.jit
def _load_rows(
    base_ptr, heads, mask, DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr
):
    """The halves that are rotated against each other, and the rest, of some heads of one token: float32."""
    half, tail = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    ptr = base_ptr + heads[:, None] * DIM
    half_mask = mask[:, None] & (half < HALF)
    first = tl.load(ptr + half, mask=half_mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF + half, mask=half_mask, other=0.0).to(tl.float32)
    rest = tl.load(ptr + 2 * HALF + tail, mask=mask[:, None] & (tail < DIM - 2 * HALF), other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def _normalized(
    first, second, rest, weight_ptr, eps, DIM: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight of each row. The sums of squares have one order for every row."""
    half, tail = tl.arange(0, HALF_BLOCK)[None, :], tl.arange(0, REST_BLOCK)[None, :]
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if DIM > 2 * HALF:
        squares += tl.sum(rest * rest, 1)
    inverse = tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(squares / DIM + eps))[:, None]
    first_weight = tl.load(weight_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    rest_weight = tl.load(weight_ptr + 2 * HALF + tail, mask=tail < DIM - 2 * HALF, other=0.0).to(tl.float32)
    return first * inverse * first_weight, second * inverse * second_weight, rest * inverse * rest_weight


@triton.jit
def _turned(first, second, cos, sin):
    """(first * cos - second * sin, second * cos + first * sin). Explicit fma: one rounding order, whatever is fused."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def _write_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    rotated_ptr,  # [T, NUM_HEADS, DIM]
    keys_ptr,  # [blocks, NUM_KV_HEADS, BLOCK_SIZE, DIM], as values
    values_ptr,
    key_scales_ptr,  # [blocks, NUM_KV_HEADS, BLOCK_SIZE], as value_scales
    value_scales_ptr,
    cos_ptr,  # [positions, HALF], as sin
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    positions_ptr,
    slots_ptr,
    query_stride,  # of a token, as the others
    key_stride,
    value_stride,
    rotary_stride,
    eps,
    HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Program (t, c): HEADS heads of token t, first those of the query, then of key and value."""
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    query_chunks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_chunks: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    half = tl.arange(0, HALF_BLOCK)[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * rotary_stride + half, mask=half < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * rotary_stride + half, mask=half < HALF, other=0.0)
    if chunk < query_chunks:
        heads = chunk * HEADS + tl.arange(0, HEADS)
        mask = heads < NUM_HEADS
        first, second, rest = _load_rows(
            query_ptr + token * query_stride, heads, mask, DIM, HALF, HALF_BLOCK, REST_BLOCK
        )
        if NORM:
            first, second, rest = _normalized(
                first, second, rest, query_norm_ptr, eps, DIM, HALF, HALF_BLOCK, REST_BLOCK
            )
        first, second = _turned(first, second, cos, sin)
        _store_rows(
            rotated_ptr, rotated_ptr, token * NUM_HEADS + heads, mask, first, second, rest,
            DIM, HALF, HALF_BLOCK, REST_BLOCK, False,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        block = slot // BLOCK_SIZE
        is_key = chunk < query_chunks + kv_chunks
        heads = (chunk - query_chunks - tl.where(is_key, 0, kv_chunks)) * HEADS + tl.arange(0, HEADS)
        mask = heads < tl.where(slot >= 0, NUM_KV_HEADS, 0)
        rows = (block * NUM_KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        if is_key:
            first, second, rest = _load_rows(
                key_ptr + token * key_stride, heads, mask, DIM, HALF, HALF_BLOCK, REST_BLOCK
            )
            if NORM:
                first, second, rest = _normalized(
                    first, second, rest, key_norm_ptr, eps, DIM, HALF, HALF_BLOCK, REST_BLOCK
                )
            first, second = _turned(first, second, cos, sin)
            _store_rows(
                keys_ptr, key_scales_ptr, rows, mask, first, second, rest,
                DIM, HALF, HALF_BLOCK, REST_BLOCK, QUANTIZE,
            )  # fmt: skip
        else:
            first, second, rest = _load_rows(
                value_ptr + token * value_stride, heads, mask, DIM, HALF, HALF_BLOCK, REST_BLOCK
            )
            _store_rows(
                values_ptr, value_scales_ptr, rows, mask, first, second, rest,
                DIM, HALF, HALF_BLOCK, REST_BLOCK, QUANTIZE,
            )  # fmt: skip


def _variant(name: str, dim: int, rotary_dim: int, heads: int, dtype: str, norm: bool, quantize: bool) -> Variant:
    cache_dtype = "i8" if quantize else dtype
    signature = {f"{part}_ptr": f"*{dtype}" for part in ("query", "key", "value", "rotated", "query_norm", "key_norm")}
    signature |= {f"{part}_ptr": f"*{cache_dtype}" for part in ("keys", "values")}
    signature |= {f"{part}_scales_ptr": "*fp32" if quantize else f"*{dtype}" for part in ("key", "value")}
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": "*i32"}
    signature |= {f"{part}_stride": "i32" for part in ("query", "key", "value", "rotary")}
    launch = _launch(dim, rotary_dim, heads, 8, 64, norm, quantize)
    num_warps = launch.pop("num_warps")
    aligned = frozenset(signature)
    return Variant(
        name, _write_kernel, signature | {"eps": "fp32"}, constants=launch, aligned=aligned, num_warps=num_warps
    )


def variants(capability: int) -> list[Variant]:
    """The launches of Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B, and one with partial rotation of an odd head size."""
    return [
        _variant("qwen3 d128 bf16", 128, 128, 16, TRITON_TYPES[torch.bfloat16], True, False),
        _variant("llama d64 bf16", 64, 64, 32, TRITON_TYPES[torch.bfloat16], False, False),
        _variant("llama d128 bf16", 128, 128, 32, TRITON_TYPES[torch.bfloat16], False, False),
        _variant("qwen3 d128 int8", 128, 128, 16, TRITON_TYPES[torch.bfloat16], True, True),
        _variant("partial d80 bf16", 80, 32, 32, TRITON_TYPES[torch.bfloat16], False, False),
    ]
