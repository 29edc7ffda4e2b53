"""What the kernels take on trust in a plan, looked at on the host: for debugging."""

from __future__ import annotations

import numpy as np

from kernels.cuda.plan import SPLIT, CudaPlan, spread


def check_on_device(plan: CudaPlan, num_blocks: int) -> None:
    """Read a plan back from the device and raise ValueError for what the kernels would follow out of the cache.

    It waits for the device. Static plans hold what `DecodeBatch.prepare` last wrote.
    """
    starts, lengths, rows = (x.cpu().numpy() for x in (plan.query_starts, plan.seq_lens, plan.table_rows))
    tables, positions, slots = (x.cpu().numpy() for x in (plan.block_tables, plan.positions, plan.slots))
    query_lens = np.diff(starts)
    if starts[0] != 0 or starts[-1] != plan.num_tokens or query_lens.min() < 1:
        raise ValueError(f"query_starts is {starts.tolist()}; it must rise from 0 to {plan.num_tokens}")
    held = tables.shape[1] * plan.block_size
    for s, (length, row) in enumerate(zip(lengths.tolist(), rows.tolist(), strict=True)):
        tokens = slice(int(starts[s]), int(starts[s + 1]))
        if length == 0:  # padding
            if (slots[tokens] != -1).any():
                raise ValueError(f"slots holds {slots[tokens].tolist()} for padding row {s}; it must be -1")
            continue
        if not query_lens[s] <= length <= held:
            raise ValueError(f"seq_lens[{s}] is {length}; it has {query_lens[s]} new tokens, block_tables hold {held}")
        if not 0 <= row < len(tables):
            raise ValueError(f"table_rows[{s}] is {row}; block_tables has {len(tables)} rows")
        used = tables[row, : -(-length // plan.block_size)]
        wrong = used[(used < 0) | (used >= num_blocks)]
        if len(wrong):
            raise ValueError(f"block_tables[{row}] holds block {wrong[0]}; kv_cache has {num_blocks} blocks")
        expected = np.arange(length - query_lens[s], length)
        if (positions[tokens] != expected).any():
            raise ValueError(f"positions of sequence {s} are {positions[tokens].tolist()}; seq_lens[{s}] is {length}")
        places = used[expected // plan.block_size] * plan.block_size + expected % plan.block_size
        if ((slots[tokens] != places) & (slots[tokens] != -1)).any():
            raise ValueError(
                f"slots of sequence {s} are {slots[tokens].tolist()}; its block table says {places.tolist()}"
            )
    _check_work(plan, query_lens, lengths)


def _check_work(plan: CudaPlan, query_lens: np.ndarray, lengths: np.ndarray) -> None:
    """Every sequence with one token is there once, or each of its splits is."""
    count = int(plan.work_count.cpu())
    if not 0 <= count <= min(plan.max_work, len(plan.work)):
        raise ValueError(f"work_count is {count}; work holds {min(plan.max_work, len(plan.work))} items")
    found = sorted(plan.work[:count].tolist())
    decode = np.flatnonzero(query_lens == 1)
    splits = np.maximum(-(-lengths[decode] // SPLIT), 1)
    each = spread(decode, splits)
    if found not in (sorted(decode.tolist()), sorted(each.tolist())):
        raise ValueError(f"work holds {found}; the sequences with one token need {sorted(each.tolist())}")
