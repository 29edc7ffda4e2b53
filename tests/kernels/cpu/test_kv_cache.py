"""The memory of the KV cache: asked for at once, handed out when it is written to or by `populate`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from kernels.cpu.kv_cache import allocate, populate
from kernels.ops import KVCacheSpec


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_populate_hands_out_all_of_it_and_changes_nothing(dtype: torch.dtype) -> None:
    spec = KVCacheSpec(num_kv_heads=8, head_dim=64, block_size=16, dtype=dtype)
    before = resident_bytes()
    caches = [allocate(spec, 1000) for _ in range(2)]
    size = sum(t.nbytes for c in caches for t in (c.keys, c.values, c.key_scales, c.value_scales) if t is not None)
    assert size > 30 << 20
    caches[1].keys[12345] = 7
    assert resident_bytes() - before < 0.2 * size  # a large page or so for what was written
    thread = threading.Thread(target=populate, args=(caches,))
    thread.start()
    thread.join()
    assert resident_bytes() - before > 0.95 * size
    assert caches[1].keys[12345] == 7
    assert sum(int(t.count_nonzero()) for c in caches for t in (c.keys, c.values)) == 1
