"""The paged KV cache of one layer (csrc/step.h draws it): keys with 16 tokens side by side, values token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.native import TYPES, Cache, zeros
from kernels.ops import KVCacheSpec

LANES = 16
MAX_HEAD_DIM = 1024
_MARGIN = 64  # elements: a load of 16 elements at the very end reads on


@dataclass(frozen=True, slots=True)
class CpuKVCache:
    """One layer's keys and values, their scales if they are int8, and their description in C."""

    spec: KVCacheSpec
    num_blocks: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    struct: Cache


def allocate(spec: KVCacheSpec, num_blocks: int) -> CpuKVCache:
    """A zeroed cache. Raises ValueError for a block size that is no multiple of 16, and for other dtypes."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
    if spec.dtype not in (torch.bfloat16, torch.float32, torch.int8):
        raise ValueError(f"spec.dtype is {spec.dtype}; the CPU backend stores bfloat16, float32 or int8")
    if spec.block_size < 1 or spec.block_size % LANES != 0:
        raise ValueError(f"spec.block_size is {spec.block_size}; it must be a multiple of {LANES}")
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"spec.head_dim is {spec.head_dim}; it must be from 1 to {MAX_HEAD_DIM}")
    slots = num_blocks * spec.num_kv_heads * spec.block_size

    keys, values = (zeros(slots * spec.head_dim + _MARGIN, spec.dtype) for _ in range(2))
    quantized = spec.dtype == torch.int8
    key_scales, value_scales = (zeros(slots, torch.float32) if quantized else None for _ in range(2))
    struct = Cache(
        keys.data_ptr(),
        values.data_ptr(),
        None if key_scales is None else key_scales.data_ptr(),
        None if value_scales is None else value_scales.data_ptr(),
        spec.num_kv_heads,
        spec.head_dim,
        spec.block_size,
        spec.sliding_window or 0,
        TYPES[spec.dtype],
    )
    return CpuKVCache(spec, num_blocks, keys, values, key_scales, value_scales, struct)
