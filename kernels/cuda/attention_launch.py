"""How attention is launched: rows and keys of a tile, warps, stages, and whether tiles of keys come by descriptor."""

from __future__ import annotations

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cuda.kv_cache import CudaKVCache
from kernels.cuda.plan import SPLIT

DECODE_ROWS = 64
PREFILL_ROWS = 128


@functools.lru_cache
def programs(device: torch.device) -> int:
    """How many programs share the work of decode: enough to fill the device's multiprocessors, two on each."""
    if device.type != "cuda":
        return 4
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache
def capability_of(device: torch.device) -> int:
    """Compute capability times ten; that of an H200 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def decode_rows(capability: int) -> int:
    """Rows of a decode tile. The compiler lays a tile of 64 rows out as one of 128 on compute capability 9 alone: on 8
    it spreads the keys of 64 rows over the warps, and on 10 the matrix instruction is another.
    """
    return DECODE_ROWS if capability // 10 == 9 else PREFILL_ROWS


def by_descriptor(
    capability: int,
    block_size: int,
    tile: int,
    dim: int,
    window: int | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> bool:
    """Whether prompts read tiles of this many keys through the tensor memory accelerator.

    A tile must lie in one page, and its rows must be whole: head sizes that are no power of two have padding. int8 has
    to pass through registers on its way to the product, and so have values that are masked, which with a window they
    all are: pointers serve these as well.
    """
    whole = block_size >= tile and dim in (64, 128)
    return capability >= 90 and whole and window is None and dtype == cache_dtype and dtype.itemsize == 2


def descriptors(cache: CudaKVCache, tile: int) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Keys and values as [blocks * Hkv * BLOCK_SIZE, DIM], in tiles of so many rows; made once for a cache. None where
    a descriptor cannot say it: rows apart in memory, or more of them than int32 counts."""
    found = cache.descriptors.get(tile)
    if found is None:
        dim = cache.spec.head_dim
        rows = cache.keys.numel() // dim
        if rows >= 1 << 31 or not (cache.keys.is_contiguous() and cache.values.is_contiguous()):
            return None
        keys, values = (TensorDescriptor(x, [rows, dim], [dim, 1], [tile, dim]) for x in (cache.keys, cache.values))
        found = cache.descriptors[tile] = (keys, values)
    return found


@functools.lru_cache
def launch(
    rows: int,
    dim: int,
    group: int,
    kv_heads: int,
    block_size: int,
    window: int | None,
    quantized: bool,
    softcapped: bool,
    dtype: torch.dtype,
    capability: int,
) -> dict[str, int]:
    """Constants and warps of a launch. Only ROWS and num_warps may depend on the kind of work, and only together.

    BLOCK_N and TAIL_STAGES, the stages of the loop over masked tiles (few, unless there is a window), are what the
    compiler's table shows to stay within the registers: on compute capability 8 the operands lie in registers too.
    """
    padded = max(triton.next_power_of_2(dim), 16)
    wide = padded > 128 or dtype == torch.float32 or capability // 10 != 9
    stages = 2 if padded > 128 or dtype == torch.float32 else 3
    tail_alone = window is None and (rows == PREFILL_ROWS or capability // 10 == 9)
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "DIM": dim,
        "DIM_BLOCK": padded,
        "BLOCK_SIZE": block_size,
        "WINDOW": 0 if window is None else window,
        "QUANTIZED": quantized,
        "SOFTCAPPED": softcapped,
        "ROWS": rows,
        "BLOCK_N": 32 if wide else 64,
        "SPLIT": SPLIT,
        "TAIL_STAGES": 1 if tail_alone else stages,
        "num_warps": rows // 16,
        "num_stages": stages,
    }
