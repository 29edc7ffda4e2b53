"""The paged KV cache of one layer on the CPU.

    data [2, num_blocks, Hkv, block_size, D]      0 = keys, 1 = values
              |           |        |
              |           |        +- one head's tokens of a block lie together: attention reads them as one row
              |           +---------- of block_size * D elements
              +---------------------- so that one gather fetches keys and values, and one scatter writes both

In int8 there is a float32 scale for each token and head (`kernels.int8`), laid out likewise without the last axis;
attention computes in float32 from values * scales.

A block is cleared when the first of its tokens is written. So the slots beyond a sequence's end hold zeros, never the
NaN of a request that died (in int8: of its scales): attention masks them, but 0 * NaN would still be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int8 import quantize_rows
from kernels.ops import KVCacheSpec
from kernels.portable.workspace import Workspace


@dataclass(frozen=True, slots=True)
class PortableKVCache:
    """One layer's keys and values, and two views of them for gathering blocks and scattering tokens.

    scales: float32 [2, num_blocks, Hkv, block_size] for int8, else None.
    """

    spec: KVCacheSpec
    num_blocks: int
    data: Tensor
    block_rows: Tensor  # [2 * num_blocks * Hkv, block_size * D]
    token_rows: Tensor  # [2 * num_blocks * Hkv * block_size, D]
    scales: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in: the type that is stored, float32 for int8."""
        return torch.float32 if self.scales is not None else self.spec.dtype

    def clear(self, blocks: Tensor) -> None:
        """Zero these blocks, ids int64 [n]."""
        self.data.index_fill_(1, blocks, 0)
        if self.scales is not None:
            self.scales.index_fill_(1, blocks, 0)

    def write(self, rows: Tensor, index: Tensor) -> None:
        """Store rows [n, D], in `dtype`, at index int64 [n] into `token_rows`."""
        if self.scales is not None:
            rows, scales = quantize_rows(rows)
            self.scales.view(-1).index_copy_(0, index, scales)
        self.token_rows.index_copy_(0, index, rows)

    def gather(self, index: Tensor, out: Tensor, workspace: Workspace) -> None:
        """Blocks at index int64 [n] into `block_rows` -> out [n, block_size * D], in `dtype`."""
        if self.scales is None:
            torch.index_select(self.block_rows, 0, index, out=out)
            return
        size, head_dim = self.spec.block_size, self.spec.head_dim
        stored = workspace.take("gathered int8", tuple(out.shape), torch.int8)
        scales = workspace.take("gathered scales", (len(index), size), torch.float32)
        torch.index_select(self.block_rows, 0, index, out=stored)
        torch.index_select(self.scales.view(-1, size), 0, index, out=scales)
        torch.mul(stored.view(-1, size, head_dim), scales[..., None], out=out.view(-1, size, head_dim))


def allocate(spec: KVCacheSpec, num_blocks: int) -> PortableKVCache:
    """A zeroed cache. Raises ValueError for a block size that does not divide attention's key tiles."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
    if spec.dtype not in (torch.bfloat16, torch.float32, torch.int8):
        raise ValueError(f"spec.dtype is {spec.dtype}; the CPU backend stores bfloat16, float32 or int8")
    if spec.block_size < 1 or 64 % spec.block_size != 0:
        raise ValueError(f"spec.block_size is {spec.block_size}; it must divide 64, for example 16 or 32")
    shape = (2, num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    with torch.inference_mode(False):
        data = torch.zeros(shape, dtype=spec.dtype)
        block_rows = data.view(-1, spec.block_size * spec.head_dim)
        token_rows = data.view(-1, spec.head_dim)
        scales = torch.zeros(shape[:-1]) if spec.dtype == torch.int8 else None
    return PortableKVCache(spec, num_blocks, data, block_rows, token_rows, scales)
