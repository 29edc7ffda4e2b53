"""The paged KV cache of one layer (csrc/step.h draws it): keys with 16 tokens side by side, values token by token."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.native import TYPES, Cache, library, zeros
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


_POPULATED_AT_ONCE = 1 << 21  # bytes: a large page


def populate(caches: Sequence[CpuKVCache]) -> None:
    """Have the system hand out the memory of all these caches, the first blocks of each first.

    A large page that is written to for the first time takes the system up to some milliseconds (in a virtual machine
    whose host must find it first), and all layers come to their next page in the same step. To be called on a thread of
    its own, which becomes the last in the queue for a core: steps go before.
    """
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    tensors = [t for c in caches for t in (c.keys, c.values, c.key_scales, c.value_scales) if t is not None]
    for start in range(0, max((t.nbytes for t in tensors), default=0), _POPULATED_AT_ONCE):
        for tensor in tensors:
            if start < tensor.nbytes:
                library().stet_populate(tensor.data_ptr() + start, min(_POPULATED_AT_ONCE, tensor.nbytes - start))
