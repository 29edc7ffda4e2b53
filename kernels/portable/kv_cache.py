"""The paged KV cache of one layer on the CPU.

    data [2, num_blocks, Hkv, block_size, D]      0 = keys, 1 = values
              |           |        |
              |           |        +- one head's tokens of a block lie together: attention reads them as one row
              |           +---------- of block_size * D elements
              +---------------------- so that one gather fetches keys and values, and one scatter writes both

A block is cleared when the first of its tokens is written. So the slots beyond a sequence's end hold zeros, never the
NaN of a request that died: attention masks them, but 0 * NaN would still be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import KVCacheSpec


@dataclass(frozen=True, slots=True)
class PortableKVCache:
    """One layer's keys and values, and two views of them for gathering blocks and scattering tokens."""

    spec: KVCacheSpec
    num_blocks: int
    data: Tensor
    block_rows: Tensor  # [2 * num_blocks * Hkv, block_size * D]
    token_rows: Tensor  # [2 * num_blocks * Hkv * block_size, D]


def allocate(spec: KVCacheSpec, num_blocks: int) -> PortableKVCache:
    """A zeroed cache. Raises ValueError for a block size that does not divide attention's key tiles."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
    if spec.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"spec.dtype is {spec.dtype}; the CPU backend stores bfloat16 or float32")
    if spec.block_size < 1 or 64 % spec.block_size != 0:
        raise ValueError(f"spec.block_size is {spec.block_size}; it must divide 64, for example 16 or 32")
    shape = (2, num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    with torch.inference_mode(False):
        data = torch.zeros(shape, dtype=spec.dtype)
        block_rows = data.view(-1, spec.block_size * spec.head_dim)
        token_rows = data.view(-1, spec.head_dim)
    return PortableKVCache(spec, num_blocks, data, block_rows, token_rows)
