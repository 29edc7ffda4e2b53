"""The memory of the KV cache: asked for at once, handed out when it is written to or by `populate`."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading

import pytest
import torch
from torch import Tensor

from kernels.cpu.kv_cache import CpuKVCache, allocate, populate
from kernels.ops import KVCacheSpec


def resident(tensor: Tensor) -> float:
    """The part of a tensor's pages that the system has handed out (mincore(2)).

    Of these pages alone: the process's whole resident size also falls when anything else is freed meanwhile.
    """
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - first
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), pages)
    assert not failed, ctypes.get_errno()
    return sum(page & 1 for page in pages) / len(pages)


def parts(cache: CpuKVCache) -> list[Tensor]:
    return [t for t in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if t is not None]


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is Linux's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_populate_hands_out_all_of_it_and_changes_nothing(dtype: torch.dtype) -> None:
    spec = KVCacheSpec(num_kv_heads=8, head_dim=64, block_size=16, dtype=dtype)
    caches = [allocate(spec, 2000) for _ in range(2)]
    caches[1].keys[12345] = 7
    large = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
    assert all(tensor.nbytes > 16_000_000 for tensor in large)
    assert all(resident(tensor) < 0.2 for tensor in large)  # a large page or so for what was written
    thread = threading.Thread(target=populate, args=(caches,))
    thread.start()
    thread.join()
    assert all(resident(tensor) == 1 for cache in caches for tensor in parts(cache))
    assert caches[1].keys[12345] == 7
    assert sum(int(t.count_nonzero()) for c in caches for t in (c.keys, c.values)) == 1
