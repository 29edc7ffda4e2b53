"""Per-head norm, rotation and the cache write: what happens to query, key and value before attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.portable.elementwise import normalize
from kernels.portable.kv_cache import PortableKVCache
from kernels.portable.plan import PortablePlan
from kernels.portable.workspace import Workspace


def write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: PortableKVCache,
    plan: PortablePlan,
    norms: Tensor | None,
    eps: float,
    workspace: Workspace,
) -> Tensor:
    """Rotate query and key in float32, write key and value, return the query in its own dtype, [T, Hq, D].

    cos, sin: float32 [T, 1, rotary_dim], as `PortablePlan.rotary` gives them. norms: None or the per-head norms'
    weights, float32 [Hq + Hkv, D].
    """
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    rows = workspace.take("new_kv", (2, tokens, kv_heads, head_dim), cache.dtype)
    both = _side_by_side(query, key)
    if norms is None:
        both = workspace.take("both", tuple(both.shape), torch.float32).copy_(both)
    else:
        both = normalize(both, eps, workspace).mul_(norms)

    rotary_dim = cos.shape[2]
    turning = both if rotary_dim == head_dim else both[..., :rotary_dim]
    crossed = torch.roll(turning, rotary_dim // 2, -1).mul_(sin)  # (second half, first half)
    turning.mul_(cos).add_(crossed)
    rows[0] = both[:, heads:]
    rows[1] = value
    new_query = torch.empty(query.shape, dtype=query.dtype).copy_(both[:, :heads])

    if plan.fresh_blocks is not None:
        cache.clear(plan.fresh_blocks)
    cache.write(rows.view(-1, head_dim), plan.write_index(cache))
    return new_query


def _side_by_side(query: Tensor, key: Tensor) -> Tensor:
    """query and key as one [T, Hq + Hkv, D]: without a copy if they are views of one packed projection."""
    tokens, heads, head_dim = query.shape
    if (
        query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        and query.stride() == key.stride()
        and query.stride()[1:] == (head_dim, 1)
        and key.storage_offset() == query.storage_offset() + heads * head_dim
        and query.dtype == key.dtype
    ):
        return query.as_strided((tokens, heads + key.shape[1], head_dim), query.stride())
    return torch.cat([query, key], 1)
