"""Checks of arguments that every backend makes, with messages for a person."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, QuantizationMode, QuantizedWeight


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
