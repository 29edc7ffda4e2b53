"""How many bytes things take, as arithmetic without torch, so that a process without it can plan with the same rule."""

from __future__ import annotations

SCALE_BYTES = 4
"""An int8 number's scale is a float32."""


def kv_bytes_per_block(num_kv_heads: int, head_dim: int, block_size: int, itemsize: int, quantized: bool) -> int:
    """Bytes of one block (`block_size` tokens) of one layer's K and V, in elements of `itemsize` bytes.

    quantized: each token and head has a scale besides, for K and for V.
    """
    scale_bytes = SCALE_BYTES if quantized else 0
    return 2 * block_size * num_kv_heads * (head_dim * itemsize + scale_bytes)
