"""Checks of arguments that every backend makes, with messages for a person."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, KVCache, KVCacheSpec, QuantizationMode, QuantizedWeight, RotaryTable

OwnCache = TypeVar("OwnCache", bound=KVCache)


def check_weight(weight: Tensor | QuantizedWeight, bias: Tensor | None, mode: QuantizationMode) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.prepare_linear`."""
    if mode not in get_args(QuantizationMode):
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(QuantizationMode))}")
    shape = tuple(weight.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"weight must be [N, K] and not empty, got {shape}")
    if isinstance(weight, QuantizedWeight):
        if mode == "none":
            raise ValueError("weight is quantized; mode must be 'w8a16' or 'w8a8'")
        if weight.values.dtype != torch.int8 or weight.scales.dtype != torch.float32:
            raise ValueError(
                f"weight must be int8 with float32 scales, got {weight.values.dtype}, {weight.scales.dtype}"
            )
        if tuple(weight.scales.shape) != shape[:1]:
            raise ValueError(f"weight.scales must be [{shape[0]}], got {tuple(weight.scales.shape)}")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"bias must be [{shape[0]}] for this weight, got {tuple(bias.shape)}")


def check_attention(metadata: AttentionMetadata) -> int:
    """Raise ValueError that names the field which is wrong; return the largest block id that is in use."""
    m = metadata
    sequences = len(m.query_lens)
    if sequences == 0:
        raise ValueError("metadata.query_lens is empty; a step needs at least one sequence")
    if len(m.seq_lens) != sequences or len(m.block_tables) != sequences:
        raise ValueError(
            f"metadata.query_lens, seq_lens and block_tables differ in length: "
            f"{sequences}, {len(m.seq_lens)}, {len(m.block_tables)}"
        )
    if m.block_size < 1:
        raise ValueError(f"metadata.block_size is {m.block_size}; it must be at least 1")
    largest = 0
    for s, (query_len, seq_len, table) in enumerate(zip(m.query_lens, m.seq_lens, m.block_tables, strict=True)):
        if not 1 <= query_len <= seq_len:
            raise ValueError(f"metadata.query_lens[{s}] is {query_len}; allowed is 1 to seq_lens[{s}] = {seq_len}")
        needed = -(-seq_len // m.block_size)
        if len(table) < needed:
            raise ValueError(f"metadata.block_tables[{s}] has {len(table)} blocks; {seq_len} tokens need {needed}")
        used = table[:needed]
        if min(used) < 0:
            raise ValueError(f"metadata.block_tables[{s}] holds a negative block id")
        largest = max(largest, max(used))
    return largest


def check_cache(cache: KVCache, kind: type[OwnCache], block_size: int, largest_block: int) -> OwnCache:
    """Return the cache if it is of the backend's own `kind` and holds a plan's blocks, else raise ValueError."""
    if not isinstance(cache, kind):
        raise ValueError("kv_cache was not allocated by this backend")
    if block_size != cache.spec.block_size:
        raise ValueError(f"plan has block size {block_size}, kv_cache {cache.spec.block_size}")
    if largest_block >= cache.num_blocks:
        raise ValueError(f"plan uses block {largest_block}, kv_cache has {cache.num_blocks} blocks")
    return cache


def check_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: RotaryTable,
    norms: tuple[Tensor | None, Tensor | None],
    spec: KVCacheSpec,
    num_tokens: int,
    longest: int,
) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.write_kv`. norms: of query and key; longest:
    of the plan's sequences."""
    dim = spec.head_dim
    if query.dim() != 3 or query.shape[0] != num_tokens or query.shape[2] != dim:
        raise ValueError(f"query must be [{num_tokens}, Hq, {dim}], got {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape) != (num_tokens, spec.num_kv_heads, dim):
            raise ValueError(f"{name} must be [{num_tokens}, {spec.num_kv_heads}, {dim}], got {tuple(tensor.shape)}")
    if rotary.rotary_dim > dim:
        raise ValueError(f"rotary turns {rotary.rotary_dim} elements; a head has {dim}")
    if longest > rotary.cos.shape[0]:
        raise ValueError(f"rotary has {rotary.cos.shape[0]} positions; a sequence has {longest} tokens")
    query_norm, key_norm = norms
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm must be given together")
    for name, norm in (("query_norm", query_norm), ("key_norm", key_norm)):
        if norm is not None and norm.shape != (dim,):
            raise ValueError(f"{name} must be [{dim}], got {tuple(norm.shape)}")


def check_paged_attention(query: Tensor, spec: KVCacheSpec, num_tokens: int) -> None:
    """Raise ValueError that says what is wrong with the query of `Ops.paged_attention`."""
    if query.dim() != 3 or query.shape[0] != num_tokens or query.shape[2] != spec.head_dim:
        raise ValueError(f"query must be [{num_tokens}, Hq, {spec.head_dim}], got {tuple(query.shape)}")
    if query.shape[1] % spec.num_kv_heads != 0:
        raise ValueError(f"query has {query.shape[1]} heads, not a multiple of the cache's {spec.num_kv_heads}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise ValueError unless two tensors that are to be added have one shape."""
    if x.shape != residual.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x is, got {tuple(residual.shape)}")


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.layer_norm`."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if x.dim() != 2 or (tensor is not None and tensor.shape != x.shape[1:]):
            shape = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{name} must be [H] for x [T, H], got {shape} and {tuple(x.shape)}")


def check_query_key(query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.norm_query_key`."""
    for name, tensor, weight in (("query", query, query_weight), ("key", key, key_weight)):
        if tensor.dim() != 2 or weight.shape != tensor.shape[1:] or len(tensor) != len(query):
            raise ValueError(
                f"{name}_weight must be [heads * D] for {name} [T, heads * D], got {tuple(weight.shape)} and "
                f"{tuple(tensor.shape)}"
            )


def check_positions(x: Tensor, table: Tensor, longest: int) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.add_positions`. longest: of the sequences."""
    if x.dim() != 2 or table.dim() != 2 or x.shape[1] != table.shape[1]:
        raise ValueError(f"table must be [P, H] for x [T, H], got {tuple(table.shape)} and {tuple(x.shape)}")
    if longest > len(table):
        raise ValueError(f"table has {len(table)} positions; a sequence has {longest} tokens")


def check_experts(weight: Tensor | QuantizedWeight, num_experts: int) -> int:
    """Raise ValueError that says what is wrong with the arguments of `Ops.prepare_experts`; return N."""
    shape = tuple(weight.shape)
    if num_experts < 1 or len(shape) != 2 or shape[0] % (16 * num_experts):
        raise ValueError(
            f"weight must be [E * N, K] for {num_experts} experts, N a multiple of 16; got {shape}: experts of other "
            "sizes are not supported"
        )
    return shape[0] // num_experts


def check_mixture(x: Tensor, router: Any, gate_up: Any, down: Any, top_k: int) -> None:
    """Raise ValueError that says what is wrong with the arguments of `Ops.experts`. The weights: with out_features N
    (of one expert) and in_features K."""
    if x.dim() != 2 or x.shape[1] != router.in_features or router.mode != "none":
        raise ValueError(f"router must be an unquantized [E, H] for x [T, H], got x {tuple(x.shape)}")
    experts = router.out_features
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}; there are {experts} experts")
    hidden = x.shape[1]
    for name, weight, shape in (
        ("gate_up", gate_up, (2 * down.in_features, hidden)),
        ("down", down, (hidden, down.in_features)),
    ):
        if (weight.num_experts, weight.out_features, weight.in_features) != (experts, *shape):
            raise ValueError(f"{name} must hold {experts} weights {list(shape)} for this x and router")


def check_softcap(cap: float) -> None:
    """Raise ValueError for a cap that is not above zero."""
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it must be positive")


def rows_of(weight: Tensor | QuantizedWeight, rows: slice) -> Tensor | QuantizedWeight:
    """Some rows of a weight [N, K], as a view."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(weight.values[rows], weight.scales[rows])
    return weight[rows]
