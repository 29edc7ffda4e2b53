"""The cache write in Triton: the reference's numbers, int8 to the bit, and nothing written where nothing belongs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.cuda.common import device_type
from kernels.cuda.kv_cache import CudaKVCache, allocate, write_kv
from kernels.cuda.plan import CudaPlan, make_plan
from kernels.cuda.upload import Upload
from kernels.int8 import quantize_rows
from kernels.ops import AttentionMetadata, KVCacheSpec, RotaryTable
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
METADATA = AttentionMetadata([3, 1, 5], [5, 40, 18], [[3], [7, 1, 2], [0, 9]], 16)
TOKENS, HEADS, KV_HEADS, NUM_BLOCKS = 9, 9, 3, 12
CANARY = 77.0


def planned(metadata: AttentionMetadata = METADATA) -> CudaPlan:
    upload = Upload(DEVICE)
    plan = make_plan(metadata, upload)
    upload.send()
    return plan


def projection(dim: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[Tensor]:
    """Query, key and value as views of one packed projection."""
    packed = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * dim, device=DEVICE).to(dtype)
    parts = torch.split(packed, [HEADS * dim, KV_HEADS * dim, KV_HEADS * dim], dim=-1)
    return [torch.unflatten(part, -1, (-1, dim)) for part in parts]


def rotary(dim: int, positions: int = 64) -> RotaryTable:
    angles = torch.rand(positions, dim // 2, device=DEVICE) * 6.3
    return RotaryTable(angles.cos(), angles.sin())


def cache_of(dim: int, dtype: torch.dtype) -> CudaKVCache:
    """Filled with canaries."""
    cache = allocate(KVCacheSpec(KV_HEADS, dim, 16, dtype), NUM_BLOCKS, DEVICE)
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is not None:
            assert not tensor.any()
            tensor.fill_(CANARY)
    return cache


def at_slots(stored: Tensor | None, plan: CudaPlan) -> Tensor:
    """[T, Hkv, ...] of what was written for each token; checks that every other slot holds its canary."""
    assert stored is not None
    by_slot = stored.transpose(1, 2).flatten(0, 1)
    slots = plan.slots[plan.slots >= 0].long()
    others = torch.ones(len(by_slot), dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert (by_slot[others] == CANARY).all()
    return by_slot[slots]


@pytest.mark.parametrize(
    ("dim", "rotary_dim", "norm", "dtype"),
    [(128, 128, True, torch.bfloat16), (80, 32, False, torch.float16), (96, 96, True, torch.float32)],
)
def test_numbers_are_those_of_the_reference(dim: int, rotary_dim: int, norm: bool, dtype: torch.dtype) -> None:
    query, key, value = projection(dim, dtype)
    table = rotary(rotary_dim)
    norms = [torch.randn(dim, device=DEVICE).to(dtype) for _ in range(2)] if norm else [None, None]
    cache, plan = cache_of(dim, dtype), planned()
    rotated = write_kv(query, key, value, table, cache, plan, norms[0], norms[1], 1e-5)
    ops = ReferenceOps()
    reference = ops.allocate_kv_cache(KVCacheSpec(KV_HEADS, dim, 16, torch.float32), NUM_BLOCKS)
    q, k, v = (x.float().cpu() for x in (query, key, value))
    q_norm, k_norm = (None if weight is None else weight.float().cpu() for weight in norms)
    on_host = RotaryTable(table.cos.cpu(), table.sin.cpu())
    expected = ops.write_kv(q, k, v, on_host, reference, ops.plan(METADATA), q_norm, k_norm, 1e-5)
    # One rounding to the dtype; in float32 a few roundings of the norm and the rotation.
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(rotated.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    slots = plan.slots.long().cpu()
    keys, values = at_slots(cache.keys, plan).cpu(), at_slots(cache.values, plan).cpu()
    torch.testing.assert_close(keys.float(), reference.keys.flatten(0, 1)[slots], rtol=tolerance, atol=tolerance)
    assert torch.equal(values, value.cpu())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 32)])
def test_int8_is_the_definition_to_the_bit(dim: int, rotary_dim: int) -> None:
    """Against quantize_rows of the keys as the same kernel rotates them; zeros, NaN and infinity among them."""
    query, key, value = projection(dim, torch.bfloat16)
    key[2, 0], value[3, 1] = 0.0, 0.0
    value[4, 0, 5], value[5, 2, dim - 1], key[6, 1, 3] = float("nan"), float("inf"), float("nan")
    table, plan = rotary(rotary_dim), planned()
    exact, quantized = cache_of(dim, torch.float32), cache_of(dim, torch.int8)
    first = write_kv(query, key, value, table, exact, plan, None, None, 1e-6)
    assert torch.equal(write_kv(query, key, value, table, quantized, plan, None, None, 1e-6), first)
    for numbers, stored, scales in (
        (exact.keys, quantized.keys, quantized.key_scales),
        (exact.values, quantized.values, quantized.value_scales),
    ):
        integers, of_rows = quantize_rows(at_slots(numbers, plan))
        found, found_scales = at_slots(stored, plan), at_slots(scales, plan)
        finite = torch.isfinite(of_rows)
        assert torch.equal(found[finite], integers[finite])
        assert torch.equal(found_scales[finite], of_rows[finite])
        assert not torch.isfinite(found_scales[~finite]).any()
        assert (~finite).any()


def test_a_token_alone_has_the_same_bits_and_padding_writes_nothing() -> None:
    dim = 96
    query, key, value = projection(dim, torch.bfloat16)
    weights = [torch.randn(dim, device=DEVICE) for _ in range(2)]
    table, plan = rotary(dim), planned()
    cache = cache_of(dim, torch.bfloat16)
    rotated = write_kv(query, key, value, table, cache, plan, weights[0], weights[1], 1e-6)
    keys = at_slots(cache.keys, plan)
    alone = planned(AttentionMetadata([1], [40], [[7, 1, 2]], 16))
    single = cache_of(dim, torch.bfloat16)
    part = slice(3, 4)
    again = write_kv(query[part], key[part], value[part], table, single, alone, weights[0], weights[1], 1e-6)
    assert torch.equal(again, rotated[part])
    assert torch.equal(at_slots(single.keys, alone), keys[part])

    padded = replace(plan, slots=torch.where(torch.arange(TOKENS, device=DEVICE) % 3 == 0, plan.slots, -1).int())
    sparse = cache_of(dim, torch.bfloat16)
    key[1], value[1] = float("nan"), float("nan")  # a padding token now
    write_kv(query, key, value, table, sparse, padded, weights[0], weights[1], 1e-6)
    assert torch.equal(at_slots(sparse.keys, padded), keys[::3])


def test_offsets_beyond_32_bits() -> None:
    """A slot whose element offset overflows int32, though the slot itself does not."""
    dim, block_size = 256, 256
    num_blocks = (1 << 31) // (dim * block_size) + 2
    spec = KVCacheSpec(1, dim, block_size, torch.int8)
    shape = (num_blocks, 1, block_size, dim)
    keys, values = (torch.empty(shape, dtype=torch.int8, device=DEVICE) for _ in range(2))  # untouched: no memory
    scales = [torch.empty(shape[:3], device=DEVICE) for _ in range(2)]
    cache = CudaKVCache(spec, num_blocks, keys, values, scales[0], scales[1])
    small = allocate(spec, 1, DEVICE)
    query, key, value = (torch.randn(1, 1, dim, device=DEVICE) for _ in range(3))
    for target, block in ((cache, num_blocks - 1), (small, 0)):
        plan = planned(AttentionMetadata([1], [1], [[block]], block_size))
        write_kv(query, key, value, rotary(dim), target, plan, None, None, 1e-6)
    assert torch.equal(cache.values[-1, 0, 0], small.values[0, 0, 0])
    assert small.values.any()


def test_bad_input_is_refused() -> None:
    for spec, message in [
        (KVCacheSpec(1, 64, 48, torch.float32), "block_size is 48"),
        (KVCacheSpec(1, 64, 8, torch.float32), "block_size is 8"),
        (KVCacheSpec(1, 320, 16, torch.float32), "head_dim is 320"),
        (KVCacheSpec(1, 64, 16, torch.float64), "dtype is"),
        (KVCacheSpec(1, 64, 16, torch.float32, 0), "sliding_window is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            allocate(spec, 1, DEVICE)
    query, key, value = projection(64)
    cache, plan, table = cache_of(64, torch.float32), planned(), rotary(64)
    weight = torch.ones(64, device=DEVICE)
    for arguments, message in [
        ((query[1:], key, value, table, cache, plan, None, None), "query must be"),
        ((query, key[:, :1], value, table, cache, plan, None, None), "key must be"),
        ((query, key, value.half(), table, cache, plan, None, None), "value is torch.float16"),
        ((query, key, value, rotary(64, 30), cache, plan, None, None), "rotary has 30 positions"),
        ((query, key, value, rotary(80), cache, plan, None, None), "rotary turns 80"),
        ((query, key, value, table, cache, plan, weight, None), "together"),
        ((query[..., :].transpose(0, 1).contiguous().transpose(0, 1), key, value, table, cache, plan, None, None),
         "contiguous heads"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            write_kv(*arguments, 1e-6)
