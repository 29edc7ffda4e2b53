"""Paged attention in Triton: the numbers of the reference, and the same bits however a token is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.cuda import attention, attention_launch
from kernels.cuda.attention import paged_attention
from kernels.cuda.common import device_type
from kernels.cuda.kv_cache import CudaKVCache, allocate
from kernels.cuda.plan import SPLIT, CudaPlan, DecodeBatch, make_plan
from kernels.cuda.upload import Upload
from kernels.cuda.workspace import Workspace
from kernels.int8 import dequantize_rows, quantize_rows
from kernels.ops import AttentionMetadata, KVCacheSpec
from kernels.reference import ReferenceOps

DEVICE = torch.device(device_type())
NUM_BLOCKS = 64


@dataclass(frozen=True)
class Case:
    """One layer; the cache holds random K and V for every slot, and NaN or huge scales where nobody may read."""

    dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None

    def cache(self) -> CudaKVCache:
        spec = KVCacheSpec(self.kv_heads, self.dim, self.block_size, self.kv_dtype, self.window)
        cache = allocate(spec, NUM_BLOCKS, DEVICE)
        for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            numbers = torch.randn(stored.shape)
            if scales is None:
                stored.copy_(numbers)
            else:
                quantized, of_rows = quantize_rows(numbers)
                stored.copy_(quantized)
                scales.copy_(of_rows)
        return cache

    def run(self, query: Tensor, cache: CudaKVCache, plan: CudaPlan) -> Tensor:
        workspace = Workspace(DEVICE)
        for name in ("attention partials", "attention sums"):
            workspace.take(name, (1 << 18,), torch.float32).fill_(float("nan"))
        output = paged_attention(query, cache, plan, self.dim**-0.5, self.softcap, workspace)
        arrived = workspace.take("attention arrivals", (plan.num_sequences, self.kv_heads), torch.int32, zeroed=True)
        assert not arrived.any(), "the counters must be left at zero"
        return output

    def expected(self, query: Tensor, cache: CudaKVCache, metadata: AttentionMetadata) -> Tensor:
        ops = ReferenceOps()
        spec = replace(cache.spec, dtype=torch.float32)
        reference = ops.allocate_kv_cache(spec, NUM_BLOCKS)
        for target, stored, scales in (
            (reference.keys, cache.keys, cache.key_scales),
            (reference.values, cache.values, cache.value_scales),
        ):
            numbers = stored.float() if scales is None else dequantize_rows(stored, scales)
            target.copy_(numbers.transpose(1, 2))
        return ops.paged_attention(query.float().cpu(), reference, ops.plan(metadata), self.dim**-0.5, self.softcap)


def planned(metadata: AttentionMetadata) -> CudaPlan:
    upload = Upload(DEVICE)
    plan = make_plan(metadata, upload)
    upload.send()
    return plan


def tables(seq_lens: list[int], block_size: int) -> list[list[int]]:
    """Shuffled blocks, none of them in two sequences."""
    free = torch.randperm(NUM_BLOCKS).tolist()
    return [[free.pop() for _ in range(-(-n // block_size))] for n in seq_lens]


CASES = [
    Case(dim=128, dtype=torch.bfloat16, kv_dtype=torch.bfloat16),
    Case(dim=80, heads=6, dtype=torch.bfloat16, kv_dtype=torch.int8),
    Case(dim=96, block_size=64, softcap=5.0),
    Case(dim=64, heads=7, kv_heads=1, window=100, dtype=torch.float16, kv_dtype=torch.float16),
    Case(dim=64, block_size=256, window=20, softcap=3.0, kv_dtype=torch.int8),
    Case(dim=256, heads=2, kv_heads=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_mixed_batch_is_that_of_the_reference(case: Case) -> None:
    """Chunks after empty and long prefixes beside single tokens, of one to three splits, at and off page borders."""
    cache = case.cache()
    seq_lens, query_lens = [5, 300, 70, 1, 256, 17], [3, 1, 70, 1, 1, 2]
    metadata = AttentionMetadata(query_lens, seq_lens, tables(seq_lens, case.block_size), case.block_size)
    query = torch.randn(sum(query_lens), case.heads, case.dim, device=DEVICE).to(case.dtype)
    output = case.run(query, cache, planned(metadata))
    # Half a unit of the output's dtype, and p rounded to it before the second product.
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[case.dtype]
    torch.testing.assert_close(
        output.float().cpu(), case.expected(query, cache, metadata), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, block_size=64, kv_dtype=torch.bfloat16, heads=2, kv_heads=1),
        Case(dtype=torch.float16, kv_dtype=torch.int8, softcap=4.0, heads=1, kv_heads=1),
        Case(block_size=256, window=20, heads=3, kv_heads=1),  # some rows of a tile see nothing of its first split
    ],
    ids=str,
)
def test_prompt_chunks_and_decode_have_the_same_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tokens of a sequence in one prompt, in chunks beside others, by token, by whole sequence."""
    cache = case.cache()
    length, stranger = 2 * SPLIT + 40, 90
    own, other = tables([length, stranger], case.block_size)
    query = torch.randn(length, case.heads, case.dim, device=DEVICE).to(case.dtype)
    noise = torch.randn(stranger, case.heads, case.dim, device=DEVICE).to(case.dtype)
    prompt = case.run(query, cache, planned(AttentionMetadata([length], [length], [own], case.block_size)))

    begin = SPLIT - 30
    chunk = AttentionMetadata([1, 47, 5], [stranger, begin + 47, stranger], [other, own, other], case.block_size)
    mixed = case.run(torch.cat([noise[:1], query[begin : begin + 47], noise[:5]]), cache, planned(chunk))
    assert torch.equal(mixed[1:48], prompt[begin : begin + 47])

    positions = [0, 15, 63, SPLIT - 1, SPLIT, 2 * SPLIT - 1, 2 * SPLIT, length - 1]
    seq_lens = [position + 1 for position in positions]
    decode = planned(AttentionMetadata([1] * len(positions), seq_lens, [own] * len(positions), case.block_size))
    assert decode.max_work == sum(-(-n // SPLIT) for n in seq_lens)
    assert torch.equal(case.run(query[positions], cache, decode), prompt[positions])

    monkeypatch.setattr("kernels.cuda.plan.MAX_WORK", 0)
    whole = planned(AttentionMetadata([1] * len(positions), seq_lens, [own] * len(positions), case.block_size))
    assert whole.max_work == len(positions)
    assert torch.equal(case.run(query[positions], cache, whole), prompt[positions])

    monkeypatch.setattr(attention, "PREFILL_ROWS", attention_launch.DECODE_ROWS)
    short = case.run(query[-150:], cache, planned(AttentionMetadata([150], [length], [own], case.block_size)))
    assert torch.equal(short, prompt[-150:])


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, block_size=64),
        Case(dim=128, heads=2, dtype=torch.float16, kv_dtype=torch.float16, block_size=256, softcap=4.0),
    ],
    ids=str,
)
def test_tiles_by_descriptor_are_those_by_pointer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages come with their stale end: NaN, which only the mask keeps out. Page 0 and the last one are in use."""
    cache = case.cache()
    seq_lens, query_lens = [SPLIT + 70, 64, 30, 5], [90, 64, 9, 2]
    own = tables(seq_lens, case.block_size)
    own[1][0], own[2][0], own[3][0] = 0, NUM_BLOCKS - 1, 0
    own[0] = [block for block in range(5, 25) if block not in own[1]][: len(own[0])]
    poison(cache, seq_lens, own)
    metadata = AttentionMetadata(query_lens, seq_lens, own, case.block_size)
    query = torch.randn(sum(query_lens), case.heads, case.dim, device=DEVICE).to(case.dtype)
    monkeypatch.setattr(attention, "by_descriptor", lambda *of_launch: False)
    pointers = case.run(query, cache, planned(metadata))
    assert not cache.descriptors
    assert not pointers.isnan().any()
    monkeypatch.undo()
    if attention_launch.capability_of(DEVICE) < 90:
        pytest.skip("no tensor memory accelerator here")
    assert torch.equal(case.run(query, cache, planned(metadata)), pointers)
    (made,) = cache.descriptors.values()
    case.run(query[:90], cache, planned(AttentionMetadata([90], seq_lens[:1], own[:1], case.block_size)))
    assert next(iter(cache.descriptors.values())) is made, "once for a cache"


def test_where_descriptors_serve() -> None:
    bf16, fp16, int8, fp32 = torch.bfloat16, torch.float16, torch.int8, torch.float32
    serves = attention_launch.by_descriptor
    assert serves(90, 64, 64, 128, None, bf16, bf16)
    assert serves(100, 256, 32, 64, None, fp16, fp16)
    assert not serves(80, 64, 64, 128, None, bf16, bf16)
    assert not serves(90, 32, 64, 128, None, bf16, bf16)
    assert not serves(90, 64, 64, 96, None, bf16, bf16)
    assert not serves(90, 64, 64, 128, 4096, bf16, bf16)
    assert not serves(90, 64, 64, 128, None, bf16, int8)
    assert not serves(90, 64, 32, 128, None, fp32, fp32)


def poison(cache: CudaKVCache, seq_lens: list[int], own: list[list[int]]) -> None:
    """NaN in every slot that no sequence owns."""
    keep = torch.zeros(cache.num_blocks, cache.spec.block_size, dtype=torch.bool, device=DEVICE)
    for length, table in zip(seq_lens, own, strict=True):
        for position in range(length):
            keep[table[position // cache.spec.block_size], position % cache.spec.block_size] = True
    for stored in (cache.keys, cache.values):
        stored.transpose(1, 2)[~keep] = float("nan")


def test_what_lies_beyond_a_sequence_is_never_read() -> None:
    """NaN in every slot that the sequences do not own, and block ids in the tables that no cache has."""
    case = Case(dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    cache = case.cache()
    seq_lens, query_lens = [37, SPLIT + 5, 20], [1, 1, 20]
    own = tables(seq_lens, case.block_size)
    metadata = AttentionMetadata(query_lens, seq_lens, own, case.block_size)
    query = torch.randn(22, case.heads, case.dim, device=DEVICE).to(case.dtype)
    expected = case.run(query, cache, planned(metadata))
    poison(cache, seq_lens, own)
    plan = planned(metadata)
    padded = torch.full((3, 99), 1 << 30, dtype=torch.int32, device=DEVICE)
    for row, (length, table) in enumerate(zip(seq_lens, own, strict=True)):
        padded[row, : -(-length // case.block_size)] = torch.tensor(table, dtype=torch.int32)
    assert torch.equal(case.run(query, cache, replace(plan, block_tables=padded)), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_nan_stays_in_its_row_and_shows() -> None:
    case = Case()
    cache = case.cache()
    own = tables([40, 300, 40], 16)
    metadata = AttentionMetadata([1, 1, 12], [40, 300, 40], own, 16)
    query = torch.randn(14, case.heads, case.dim, device=DEVICE)
    expected = case.run(query, cache, planned(metadata))
    query[1, 2, 5] = float("nan")
    query[4, 0, 0] = float("inf")
    output = case.run(query, cache, planned(metadata))
    heads, untouched = (x.view(14, case.heads, case.dim) for x in (output, expected))
    assert heads[1, 2].isnan().all()
    assert heads[4, 0].isnan().all()
    heads[1, 2] = untouched[1, 2]
    heads[4, 0] = untouched[4, 0]
    assert torch.equal(output, expected)


def test_static_plan_gives_the_same_bits_and_padding_gives_zeros() -> None:
    case = Case(dtype=torch.bfloat16, kv_dtype=torch.int8)
    cache = case.cache()
    seq_lens = [3, SPLIT + 1, 64]
    own = tables(seq_lens, 16)
    query = torch.randn(8, case.heads, case.dim, device=DEVICE).to(case.dtype)
    expected = case.run(query[:3], cache, planned(AttentionMetadata([1, 1, 1], seq_lens, own, 16)))
    upload = Upload(DEVICE)
    batch = DecodeBatch(8, 32, 16, DEVICE, upload)
    updates = [(5 - s, column, block) for s, table in enumerate(own) for column, block in enumerate(table)]
    batch.stage(8, [1, 2, 3], [-1, -1, -1], seq_lens, [5, 4, 3], updates)
    upload.send()
    batch.apply_updates()
    batch.prepare(8)
    query[3:] = float("nan")
    output = case.run(query, cache, batch.plan(8))
    assert torch.equal(output[:3], expected)
    assert torch.equal(output[3:], torch.zeros_like(output[3:]))


@pytest.mark.parametrize("block_size", [16, 64])
def test_offsets_beyond_32_bits(block_size: int) -> None:
    """A cache whose blocks lie so far apart that block * stride overflows int32; only the pages in use have memory."""
    case = Case(dim=64, heads=2, kv_heads=1)
    far = (1 << 31) // (1 << 20) + 5  # blocks of 2^20 elements: the last begins beyond 2^31
    storage = torch.empty((far + 1) << 20, device=DEVICE)  # on the CPU only pages that are written take memory
    stride = (1 << 20, block_size * 64, 64, 1)
    strided = torch.as_strided(storage, (far + 1, 1, block_size, 64), stride)
    spec = KVCacheSpec(1, 64, block_size, torch.float32)
    cache = CudaKVCache(spec, far + 1, strided, strided, None, None)
    strided[far] = torch.randn(1, block_size, 64, device=DEVICE)
    query = torch.randn(4, 2, 64, device=DEVICE)
    near = allocate(spec, 1, DEVICE)
    near.keys.copy_(strided[far])
    near.values.copy_(strided[far])
    for query_len in (1, 4):
        expected = case.run(query[:query_len], near, planned(AttentionMetadata([query_len], [9], [[0]], block_size)))
        output = case.run(query[:query_len], cache, planned(AttentionMetadata([query_len], [9], [[far]], block_size)))
        assert torch.equal(output, expected)


def test_bad_input_is_refused() -> None:
    case = Case(heads=4, kv_heads=2)
    cache, plan = case.cache(), planned(AttentionMetadata([1], [1], [[0]], 16))
    workspace = Workspace(DEVICE)
    good = torch.zeros(1, 4, 64, device=DEVICE)
    for query, scale, softcap, message in [
        (good[..., :32], 1.0, None, "query must be"),
        (good[:, :3], 1.0, None, "multiple"),
        (torch.zeros(1, 130, 64, device=DEVICE), 1.0, None, "65 heads"),
        (torch.zeros(1, 64, 4, device=DEVICE).transpose(1, 2), 1.0, None, "contiguous"),
        (good, 0.0, None, "scale is 0"),
        (good, 1.0, -1.0, "softcap is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            paged_attention(query, cache, plan, scale, softcap, workspace)
