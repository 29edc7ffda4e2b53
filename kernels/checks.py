"""Checks of arguments that every backend makes, with messages for a person."""

from __future__ import annotations

from typing import get_args

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
