"""Plans of steps: positions, slots and work lists, uploaded for a mixed step and derived on the device for decode."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kernels.cuda.common import device_type
from kernels.cuda.ops import CudaOps
from kernels.cuda.plan import SPLIT, CudaPlan, DecodeBatch, make_plan, select_tokens
from kernels.cuda.plan_check import check_on_device
from kernels.cuda.upload import Upload
from kernels.ops import AttentionMetadata, KVCacheSpec, RotaryTable

DEVICE = torch.device(device_type())


def items(plan: CudaPlan) -> list[tuple[int, int]]:
    """(sequence, split) of each work item; split -1 is the whole sequence."""
    packed = plan.work[: int(plan.work_count)].tolist()
    return [(item % 65536, item // 65536 - 1) for item in packed]


def test_plan_of_a_mixed_step() -> None:
    metadata = AttentionMetadata(
        [3, 1, 20, 1, 1],
        [5, 2 * SPLIT + 1, 20, 7, SPLIT],
        [[3], list(range(40, 80)), [0, 9, 99], [5], list(range(16))],
        16,
    )
    upload = Upload(DEVICE)
    plan = make_plan(metadata, upload)
    upload.send()
    assert (plan.num_sequences, plan.num_tokens, plan.max_seq_len, plan.max_query_len) == (5, 26, 2 * SPLIT + 1, 20)
    assert plan.largest_block == 72, "blocks beyond the sequence do not count"
    assert plan.query_starts.tolist() == [0, 3, 4, 24, 25, 26]
    assert plan.positions.tolist() == [2, 3, 4, 2 * SPLIT, *range(20), 6, SPLIT - 1]
    first = [3 * 16 + 2, 3 * 16 + 3, 3 * 16 + 4, 72 * 16, *range(16), *range(144, 148), 5 * 16 + 6, 15 * 16 + 15]
    assert plan.slots.tolist() == first
    assert items(plan) == [(1, 0), (1, 1), (1, 2), (3, -1), (4, -1)]
    assert plan.max_work == 5


def test_decode_batch_says_what_a_plan_says() -> None:
    """Random steps with tables kept from step to step: the static buffers equal an uploaded plan of the same step."""
    rng = random.Random(1)
    upload = Upload(DEVICE)
    batch = DecodeBatch(20, 40, 16, DEVICE, upload)
    batch.sampled.copy_(torch.arange(20) + 1000)
    known: dict[int, list[int]] = {}
    addresses = set()
    for bucket in (1, 8, 20, 8, 20):
        rows = rng.randint(max(1, bucket - 5), bucket)
        seq_lens = [rng.choice([1, 16, SPLIT, SPLIT + 1, rng.randint(1, 640)]) for _ in range(rows)]
        table_rows = rng.sample(range(20), rows)
        updates = []
        for row, length in zip(table_rows, seq_lens, strict=True):
            table = known.setdefault(row, [])
            while len(table) < -(-length // 16):
                table.append(rng.randrange(5000))
                updates.append((row, len(table) - 1, table[-1]))
        tokens = [rng.randrange(100) for _ in range(rows)]
        sources = [rng.choice([-1, rng.randrange(20)]) for _ in range(rows)]
        batch.stage(bucket, tokens, sources, seq_lens, table_rows, updates)
        upload.put(torch.arange(3).int().numpy())
        upload.send()
        batch.apply_updates()
        for buffer in (batch._work, batch._positions, batch._slots, batch.token_ids):
            buffer.fill_(-9)
        batch.prepare(bucket)
        plan = batch.plan(bucket)
        addresses.add(plan.seq_lens.data_ptr())
        upload.send()

        other = Upload(DEVICE)
        expected = make_plan(AttentionMetadata([1] * rows, seq_lens, [known[row] for row in table_rows], 16), other)
        other.send()
        assert batch.token_ids[:rows].tolist() == [
            token if source < 0 else source + 1000 for token, source in zip(tokens, sources, strict=True)
        ]
        assert plan.positions[:rows].tolist() == expected.positions.tolist()
        assert plan.slots.tolist() == [*expected.slots.tolist(), *[-1] * (bucket - rows)]
        assert plan.seq_lens.tolist() == [*seq_lens, *[0] * (bucket - rows)]
        assert plan.table_rows[:rows].tolist() == table_rows
        assert items(plan) == [*items(expected), *[(row, -1) for row in range(rows, bucket)]]
        assert batch.token_ids[bucket:].eq(-9).all()
        assert batch._positions[bucket:].eq(-9).all()
        for row, table in known.items():
            assert batch.block_tables[row, : len(table)].tolist() == table
    assert len(addresses) == 1


def test_too_much_work_is_done_by_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cuda.plan.MAX_WORK", 6)
    upload = Upload(DEVICE)
    metadata = AttentionMetadata([1, 1, 1], [600, 600, 10], [list(range(38))] * 3, 16)
    plan = make_plan(metadata, upload)
    upload.send()
    assert items(plan) == [(0, -1), (1, -1), (2, -1)]
    batch = DecodeBatch(4, 38, 16, DEVICE, upload)
    batch.stage(4, [1, 2, 3], [-1] * 3, [600, 600, 10], [0, 1, 2], [])
    upload.send()
    batch.prepare(4)
    assert items(batch.plan(4)) == [(0, -1), (1, -1), (2, -1), (3, -1)]
    assert batch.plan(4).max_work == 6


def static(seq_lens: list[int], blocks: list[int]) -> CudaPlan:
    """A prepared static plan of four rows whose sequences have all of these blocks."""
    upload = Upload(DEVICE)
    batch = DecodeBatch(8, 40, 16, DEVICE, upload)
    rows = len(seq_lens)
    updates = [(7 - s, column, block) for s in range(rows) for column, block in enumerate(blocks)]
    batch.stage(4, [1] * rows, [-1] * rows, seq_lens, [7 - s for s in range(rows)], updates)
    upload.send()
    batch.apply_updates()
    batch.prepare(4)
    return batch.plan(4)


def test_check_on_device_names_what_is_wrong() -> None:
    lengths, blocks = [5, SPLIT + 2, 16], list(range(30))
    upload = Upload(DEVICE)
    mixed = make_plan(AttentionMetadata([1, 1, 3], lengths, [blocks] * 3, 16), upload)
    upload.send()
    fine = static(lengths, blocks)
    for plan in (mixed, fine):
        check_on_device(plan, 17)
        with pytest.raises(ValueError, match=r"block_tables\[\d\] holds block 16; kv_cache has 16 blocks"):
            check_on_device(plan, 16)
    with pytest.raises(ValueError, match=r"block_tables\[6\] holds block 99; kv_cache has 17 blocks"):
        check_on_device(static([5, 20], [3, 99]), 17)
    with pytest.raises(ValueError, match=r"block_tables\[7\] holds block -1"):
        check_on_device(static([5], [-1]), 17)

    def edited(plan: CudaPlan, name: str, index: int, value: int) -> CudaPlan:
        tensor = getattr(plan, name).clone()
        tensor[index] = value
        return replace(plan, **{name: tensor})

    for plan, name, index, value, message in [
        (fine, "seq_lens", 1, 641, r"seq_lens\[1\] is 641; it has 1 new tokens, block_tables hold 640"),
        (fine, "seq_lens", 1, -1, r"seq_lens\[1\] is -1"),
        (mixed, "seq_lens", 2, 2, r"seq_lens\[2\] is 2; it has 3 new tokens"),
        (fine, "table_rows", 0, 8, r"table_rows\[0\] is 8; block_tables has 8 rows"),
        (mixed, "query_starts", 1, 0, "query_starts is"),
        (fine, "positions", 0, 5, r"positions of sequence 0 are \[5\]; seq_lens\[0\] is 5"),
        (mixed, "slots", 3, 8000, "slots of sequence 2 are"),
        (fine, "slots", 3, 0, r"slots holds \[0\] for padding row 3"),
        (fine, "work_count", 0, 1000, "work_count is 1000"),
        (fine, "work_count", 0, 4, "work holds"),
        (fine, "work", 1, 1 + 3 * 65536, "work holds"),
        (mixed, "work", 0, 2, "work holds"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_on_device(edited(plan, name, index, value), 17)


def test_debug_mode_checks_every_call() -> None:
    plan = static([5, 20], [3, 99])
    query, key = torch.zeros(4, 2, 64, device=DEVICE), torch.zeros(4, 1, 64, device=DEVICE)
    table = RotaryTable(torch.ones(64, 32, device=DEVICE), torch.zeros(64, 32, device=DEVICE))
    ops = CudaOps(torch.float32, debug=True)
    cache = ops.allocate_kv_cache(KVCacheSpec(1, 64, 16, torch.float32), 8)
    for call in (
        lambda: ops.write_kv(query, key, key, table, cache, plan),
        lambda: ops.paged_attention(query, cache, plan, 0.125),
    ):
        with pytest.raises(ValueError, match=r"block_tables\[6\] holds block 99; kv_cache has 8 blocks"):
            call()
    plan = static([5, 20], [3, 7])
    short = RotaryTable(table.cos[:19], table.sin[:19])
    with pytest.raises(ValueError, match="rotary has 19 positions; a sequence has 20 tokens"):
        ops.write_kv(query, key, key, short, cache, plan)
    rotated = ops.write_kv(query, key, key, table, cache, plan)
    assert not ops.paged_attention(rotated, cache, plan, 0.125).any()


def test_select_tokens() -> None:
    tokens = torch.arange(300, dtype=torch.int64, device=DEVICE)
    sources = torch.full((300,), -1, dtype=torch.int32, device=DEVICE)
    sources[::7] = 2
    sampled = torch.tensor([5, 6, 1 << 40], device=DEVICE)
    expected = torch.where(sources >= 0, 1 << 40, tokens)
    assert torch.equal(select_tokens(tokens, sources, sampled), expected)
    assert torch.equal(select_tokens(tokens.int(), sources, sampled), expected)
    with pytest.raises(ValueError, match="sources must be"):
        select_tokens(tokens, sources[1:], sampled)


def test_bad_input_is_refused() -> None:
    upload = Upload(DEVICE)
    with pytest.raises(ValueError, match="max_rows is 0"):
        DecodeBatch(0, 4, 16, DEVICE, upload)
    with pytest.raises(ValueError, match="max_blocks is 0"):
        DecodeBatch(4, 0, 16, DEVICE, upload)
    batch = DecodeBatch(4, 2, 16, DEVICE, upload)
    with pytest.raises(ValueError, match="bucket is 5"):
        batch.plan(5)
    with pytest.raises(ValueError, match="tokens has 2 entries"):
        batch.stage(1, [1, 2], [-1, -1], [1, 1], [0, 1], [])
    with pytest.raises(ValueError, match="seq_lens holds 33"):
        batch.stage(1, [1], [-1], [33], [0], [])
    with pytest.raises(RuntimeError, match="no step of 2 rows"):
        batch.prepare(2)
    batch.stage(1, [1], [-1], [3], [0], [])
    with pytest.raises(RuntimeError, match="first to be put"):
        batch.stage(1, [1], [-1], [3], [0], [])
