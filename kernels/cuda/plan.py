"""What a step looks like to the kernels: positions, slots, block tables, and the work list of decode attention.

Two kinds of plans. `make_plan` uploads everything for one step of any shape. `DecodeBatch` keeps static device buffers
for steps in which every sequence has one new token, at the same addresses every step, so that a CUDA graph can read
them; only tokens, lengths and changes of block tables are uploaded, and one kernel in the graph derives the rest.

Attention reads the keys of a sequence in splits of SPLIT tokens. In decode an item of work is one split of one
sequence, or a whole sequence: where it has no more than one split, and where there are so many splits that there is
work for every multiprocessor anyway. An item is packed as sequence + 65536 * code, with code 0 for the whole sequence
and split + 1 for one split. The result has the same bits either way (`kernels.cuda.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.compile import Variant
from kernels.cuda.upload import Upload
from kernels.ops import AttentionMetadata

SPLIT = 256
"""Tokens of a KV split, at absolute multiples of it. At batch 1 and 4k tokens of context, 8 KV heads make 128 items:
one for each multiprocessor of an H200. The float32 partial result of a split is then 3 % of the K and V that it stands
for (4 query heads a KV head, bfloat16); half the size would double that, twice the size would leave half the
processors idle.
"""

MAX_WORK = 16_384
"""Most work items of a step, which bounds the memory of partial results (16 KB each for 32 heads of 128). Beyond it,
that is above 4 million tokens of context, whole sequences are the items."""

MAX_SEQUENCES = 65_535
_SPLIT = tl.constexpr(SPLIT)


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """One step, S sequences and T tokens, padding included. Tensors are int32 on the device.

    query_starts  [S + 1]: where the tokens of each sequence begin
    seq_lens      [S]: tokens of each sequence, new ones included; 0 for padding, a row with one token of no meaning
    block_tables  [rows, columns]: ids of blocks; table_rows [S]: the row of each sequence
    positions     [T]: index of each token in its sequence
    slots         [T]: where its K and V go, block * block_size + offset; -1: nowhere
    work          [capacity]: items of decode attention, for the sequences with one token; work_count [1]: how many

    Host values: max_query_len; max_work, the largest `work_count` can be (0: no decode); largest_block and max_seq_len,
    for checks, 0 in a static plan, whose content the host does not know.
    """

    num_sequences: int
    num_tokens: int
    block_size: int
    largest_block: int
    max_seq_len: int
    max_query_len: int
    max_work: int
    query_starts: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    table_rows: Tensor
    positions: Tensor
    slots: Tensor
    work: Tensor
    work_count: Tensor


def make_plan(metadata: AttentionMetadata, upload: Upload) -> CudaPlan:
    """Put the plan of a checked `metadata` (kernels.checks) into `upload`; valid once the caller has sent that."""
    block_size, sequences = metadata.block_size, len(metadata.query_lens)
    if sequences > MAX_SEQUENCES:
        raise ValueError(f"metadata.query_lens has {sequences} sequences; at most {MAX_SEQUENCES} fit a step")
    query_lens = np.asarray(metadata.query_lens, dtype=np.int32)
    seq_lens = np.asarray(metadata.seq_lens, dtype=np.int32)
    num_blocks = -(-seq_lens // block_size)
    tables = np.zeros((sequences, int(num_blocks.max())), dtype=np.int32)
    used = [table[:count] for table, count in zip(metadata.block_tables, num_blocks.tolist(), strict=True)]
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = np.fromiter(
        chain.from_iterable(used), np.int32, int(num_blocks.sum())
    )
    query_starts = np.zeros(sequences + 1, dtype=np.int32)
    np.cumsum(query_lens, out=query_starts[1:])
    tokens = int(query_starts[-1])
    sequence = np.repeat(np.arange(sequences), query_lens)
    positions = np.arange(tokens, dtype=np.int32) + (seq_lens - query_lens - query_starts[:-1])[sequence]
    slots = tables[sequence, positions // block_size] * block_size + positions % block_size

    decode = np.flatnonzero(query_lens == 1).astype(np.int32)
    work = _work(decode, -(-seq_lens[decode] // SPLIT))
    return CudaPlan(
        num_sequences=sequences,
        num_tokens=tokens,
        block_size=block_size,
        largest_block=int(tables.max()),
        max_seq_len=int(seq_lens.max()),
        max_query_len=int(query_lens.max()),
        max_work=len(work),
        query_starts=upload.put(query_starts),
        seq_lens=upload.put(seq_lens),
        block_tables=upload.put(tables),
        table_rows=upload.put(np.arange(sequences, dtype=np.int32)),
        positions=upload.put(positions),
        slots=upload.put(slots),
        work=upload.put(work if len(work) else np.zeros(1, dtype=np.int32)),
        work_count=upload.put(np.asarray([len(work)], dtype=np.int32)),
    )


def _work(sequences: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Work items of the given sequences, which have so many splits each: int32."""
    total = int(splits.sum())
    if total > MAX_WORK or total == len(sequences):
        return sequences
    return spread(sequences, splits)


def spread(sequences: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """An item for each split of each sequence: int32."""
    ends = np.cumsum(splits)
    code = np.arange(int(splits.sum())) - np.repeat(ends - splits, splits) + 1
    code[np.repeat(splits, splits) == 1] = 0
    return (np.repeat(sequences, splits) + 65536 * code).astype(np.int32)


class DecodeBatch:
    """Static device buffers of decode steps, in which each of up to `max_rows` sequences has one new token.

    A step: `stage` and `send` of the upload, `apply_updates`, then `prepare`, the model's forward on `token_ids` and
    `plan(bucket)`; from `prepare` on everything may be in a CUDA graph. Afterwards the caller copies the drawn tokens
    to `sampled`, from which the next step can take its inputs without knowing them on the host.

    token_ids     int64 [max_rows]: the model's input, written by `prepare`
    sampled       int64 [max_rows]: tokens drawn by the step before, in the order of its sampled rows
    block_tables  int32 [max_rows, max_blocks]: kept from step to step; `stage` is told what changes
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, device: torch.device, upload: Upload) -> None:
        """Raises ValueError for sizes that are not positive or beyond MAX_SEQUENCES rows."""
        if not 1 <= max_rows <= MAX_SEQUENCES:
            raise ValueError(f"max_rows is {max_rows}; allowed is 1 to {MAX_SEQUENCES}")
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}; at least 1 is needed")
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.block_size = block_size
        self._upload = upload
        max_splits = -(-max_blocks * block_size // SPLIT)
        self._capacity = max(min(max_rows * max_splits, MAX_WORK), max_rows)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids = zeros(max_rows, dtype=torch.int64)
        self.sampled = zeros(max_rows, dtype=torch.int64)
        self.block_tables = zeros(max_rows, max_blocks)
        self._query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._seq_lens, self._table_rows = zeros(max_rows), zeros(max_rows)
        self._positions, self._slots = zeros(max_rows), zeros(max_rows)
        self._work, self._work_count = zeros(self._capacity), zeros(1)
        self._plans: dict[int, CudaPlan] = {}
        self._staged: dict[int, Tensor] = {}
        self._updates: Tensor | None = None

    def plan(self, bucket: int) -> CudaPlan:
        """The plan of steps with `bucket` rows: views of the static buffers, made once."""
        found = self._plans.get(bucket)
        if found is None:
            self._check_bucket(bucket)
            found = self._plans[bucket] = CudaPlan(
                num_sequences=bucket,
                num_tokens=bucket,
                block_size=self.block_size,
                largest_block=0,
                max_seq_len=0,
                max_query_len=1,
                max_work=self._capacity,
                query_starts=self._query_starts[: bucket + 1],
                seq_lens=self._seq_lens[:bucket],
                block_tables=self.block_tables,
                table_rows=self._table_rows[:bucket],
                positions=self._positions[:bucket],
                slots=self._slots[:bucket],
                work=self._work,
                work_count=self._work_count,
            )
        return found

    def stage(
        self,
        bucket: int,
        tokens: Sequence[int],
        sources: Sequence[int],
        seq_lens: Sequence[int],
        table_rows: Sequence[int],
        updates: Sequence[tuple[int, int, int]],
    ) -> None:
        """Put a step's inputs into the upload, which must be empty, and the changes of block tables after them.

        Row i has token tokens[i], or sampled[sources[i]] where sources[i] >= 0; seq_lens[i] tokens, the new one
        included; and its blocks in block_tables[table_rows[i]]. updates: (row, column, block id), no place twice.
        Rows up to `bucket` are padding. Raises ValueError for what does not fit.
        """
        self._check_bucket(bucket)
        rows = len(tokens)
        if rows > bucket:
            raise ValueError(f"tokens has {rows} entries; the bucket has {bucket} rows")
        inputs = np.zeros((4, bucket), dtype=np.int32)
        inputs[1] = -1
        inputs[0, :rows], inputs[1, :rows] = tokens, sources
        inputs[2, :rows], inputs[3, :rows] = seq_lens, table_rows
        if rows and int(inputs[2].max()) > self.max_blocks * self.block_size:
            longest = int(inputs[2].max())
            raise ValueError(f"seq_lens holds {longest}; the block tables hold {self.max_blocks * self.block_size}")
        staged = self._upload.put(inputs)
        known = self._staged.setdefault(bucket, staged)
        if known.data_ptr() != staged.data_ptr():
            raise RuntimeError("the inputs of a decode step must be the first to be put into the upload")
        self._updates = self._upload.put(np.asarray(updates, dtype=np.int32)) if updates else None

    def apply_updates(self) -> None:
        """Write the staged changes into `block_tables`. After `send`, outside of the graph."""
        updates, self._updates = self._updates, None
        if updates is not None:
            count = updates.shape[0]
            grid = (triton.cdiv(count, UPDATE_BLOCK),)
            _update_kernel[grid](
                updates, self.block_tables, self.max_blocks, count, **_update_launch(), enable_fp_fusion=True
            )

    def prepare(self, bucket: int) -> None:
        """One launch: token ids, positions, slots and the work list of the staged step. May be captured."""
        staged = self._staged.get(bucket)
        if staged is None:
            raise RuntimeError(f"no step of {bucket} rows was staged")
        _prepare_kernel[(bucket,)](
            staged,
            self.sampled,
            self.block_tables,
            self.token_ids,
            self._seq_lens,
            self._table_rows,
            self._positions,
            self._slots,
            self._work,
            self._work_count,
            bucket,
            self.max_blocks,
            self._capacity,
            self.block_size,
            **_prepare_launch(self.max_rows),
            enable_fp_fusion=True,
        )

    def _check_bucket(self, bucket: int) -> None:
        if not 1 <= bucket <= self.max_rows:
            raise ValueError(f"bucket is {bucket}; allowed is 1 to {self.max_rows}")


def select_tokens(tokens: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """tokens int32 or int64 [T], sources int32 [T], sampled int64 -> int64 [T]: sampled[source] where source >= 0."""
    if tokens.shape != sources.shape or tokens.dim() != 1:
        raise ValueError(f"sources must be {tuple(tokens.shape)} as tokens is, got {tuple(sources.shape)}")
    selected = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device)
    count = tokens.shape[0]
    grid = (triton.cdiv(count, SELECT_BLOCK),)
    _select_kernel[grid](tokens, sources, sampled, selected, count, **_select_launch(), enable_fp_fusion=True)
    return selected


UPDATE_BLOCK = 128
SELECT_BLOCK = 256
_WORK_BLOCK = 64


def _update_launch() -> dict[str, int]:
    return {"BLOCK": UPDATE_BLOCK, "num_warps": 4}


def _select_launch() -> dict[str, int]:
    return {"BLOCK": SELECT_BLOCK, "num_warps": 4}


def _prepare_launch(max_rows: int) -> dict[str, int]:
    """One variant for all buckets of an engine: each program sums the splits of all rows before its own."""
    return {"ROWS": triton.next_power_of_2(max_rows), "WORK_BLOCK": _WORK_BLOCK, "num_warps": 2}


@triton.jit(do_not_specialize=["columns", "count"])
def _update_kernel(updates_ptr, tables_ptr, columns, count, BLOCK: tl.constexpr):
    """updates [count, 3] of (row, column, block id) -> tables [rows, columns]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    row = tl.load(updates_ptr + index * 3, mask=mask, other=0)
    column = tl.load(updates_ptr + index * 3 + 1, mask=mask, other=0)
    block = tl.load(updates_ptr + index * 3 + 2, mask=mask, other=0)
    tl.store(tables_ptr + row.to(tl.int64) * columns + column, block, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _select_kernel(tokens_ptr, sources_ptr, sampled_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out[i] = sampled[sources[i]] where sources[i] >= 0, else tokens[i]."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    source = tl.load(sources_ptr + index, mask=mask, other=-1)
    token = tl.load(tokens_ptr + index, mask=mask, other=0).to(tl.int64)
    drawn = tl.load(sampled_ptr + source, mask=source >= 0, other=0)
    tl.store(out_ptr + index, tl.where(source >= 0, drawn, token), mask=mask)


@triton.jit(do_not_specialize=["bucket", "columns", "capacity", "block_size"])
def _prepare_kernel(
    staged_ptr,  # [4, bucket]: tokens, sources, sequence lengths, rows of the block tables
    sampled_ptr,
    tables_ptr,  # [rows, columns]
    token_ids_ptr,
    seq_lens_ptr,
    table_rows_ptr,
    positions_ptr,
    slots_ptr,
    work_ptr,
    work_count_ptr,
    bucket,
    columns,
    capacity,
    block_size,
    ROWS: tl.constexpr,
    WORK_BLOCK: tl.constexpr,
):
    """Program b writes everything of row b; the number of work items is written by the first.

    A padding row (length 0) is one work item, a whole sequence of nothing, whose output is zeros.
    """
    b = tl.program_id(0)
    token = tl.load(staged_ptr + b).to(tl.int64)
    source = tl.load(staged_ptr + bucket + b)
    drawn = tl.load(sampled_ptr + source, mask=source >= 0, other=0)
    tl.store(token_ids_ptr + b, tl.where(source >= 0, drawn, token))

    length = tl.load(staged_ptr + 2 * bucket + b)
    table_row = tl.load(staged_ptr + 3 * bucket + b)
    tl.store(seq_lens_ptr + b, length)
    tl.store(table_rows_ptr + b, table_row)
    position = tl.maximum(length - 1, 0)
    tl.store(positions_ptr + b, position)
    place = tables_ptr + table_row.to(tl.int64) * columns + position // block_size
    block = tl.load(place, mask=length > 0, other=0)
    tl.store(slots_ptr + b, tl.where(length > 0, block * block_size + position % block_size, -1))

    rows = tl.arange(0, ROWS)
    lengths = tl.load(staged_ptr + 2 * bucket + rows, mask=rows < bucket, other=0)
    splits = tl.where(rows < bucket, tl.maximum((lengths + _SPLIT - 1) // _SPLIT, 1), 0)
    total = tl.sum(splits, 0)
    if total > capacity:  # there are rows enough to keep every multiprocessor busy
        splits = tl.where(rows < bucket, 1, 0)
        total = bucket
    first = tl.sum(tl.where(rows < b, splits, 0), 0)
    own = tl.sum(tl.where(rows == b, splits, 0), 0)
    for start in range(0, own, WORK_BLOCK):
        split = start + tl.arange(0, WORK_BLOCK)
        code = tl.where(own == 1, 0, split + 1)
        tl.store(work_ptr + first + split, b + 65536 * code, mask=split < own)
    if b == 0:
        tl.store(work_count_ptr, total)


def variants(capability: int) -> list[Variant]:
    """The launches of decode and mixed steps, for an engine of up to 64 rows."""
    prepare = _prepare_launch(64)
    update, select = _update_launch(), _select_launch()
    pointers = ("seq_lens", "table_rows", "positions", "slots", "work", "work_count", "staged", "tables")
    integers = dict.fromkeys(("bucket", "columns", "capacity", "block_size"), "i32")
    prepare_signature = {f"{name}_ptr": "*i32" for name in pointers} | integers
    prepare_signature |= {"sampled_ptr": "*i64", "token_ids_ptr": "*i64"}
    return [
        Variant(
            "prepare",
            _prepare_kernel,
            prepare_signature,
            constants={name: value for name, value in prepare.items() if name != "num_warps"},
            aligned=frozenset(name for name in prepare_signature if name.endswith("_ptr")),
            num_warps=prepare["num_warps"],
        ),
        Variant(
            "update",
            _update_kernel,
            {"updates_ptr": "*i32", "tables_ptr": "*i32", "columns": "i32", "count": "i32"},
            constants={"BLOCK": update["BLOCK"]},
            aligned=frozenset({"updates_ptr", "tables_ptr"}),
            num_warps=update["num_warps"],
        ),
        Variant(
            "select",
            _select_kernel,
            {"tokens_ptr": "*i64", "sources_ptr": "*i32", "sampled_ptr": "*i64", "out_ptr": "*i64", "count": "i32"},
            constants={"BLOCK": select["BLOCK"]},
            aligned=frozenset({"tokens_ptr", "sources_ptr", "sampled_ptr", "out_ptr"}),
            num_warps=select["num_warps"],
        ),
    ]
