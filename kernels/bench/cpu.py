"""Times every operation of the compiled CPU backend in the shapes of a 176M Llama: a floor, ours, and stock torch.

    python -m kernels.bench --device cpu [--rounds 30] [--threads N]

The floor is the bytes that an operation must move over a read bandwidth measured in this process; for a long prompt,
whose products are limited by arithmetic, it is only a lower bound. Ours and the peer alternate within each round; the
table shows medians and the last line repeats it as JSON. Linear layers are timed in every mode, beside torch's on
bfloat16 and on float32 weights, whichever is faster. Weights and caches rotate over several copies, larger together
than the last-level cache, since that is how a model meets them.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench.peers import stock_sampling
from kernels.bench.workload import sampling
from kernels.cpu.ops import CpuOps
from kernels.ops import AttentionMetadata, KVCacheSpec, QuantizationMode, RotaryTable

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 768, 12, 4, 64, 2048, 32000
BLOCK_SIZE, CONTEXT, COPIES = 16, 160, 6
MODES: tuple[QuantizationMode, ...] = ("none", "w8a16", "w8a8")
STEPS = {"decode 1": ([1], [CONTEXT]), "decode 16": ([1] * 16, [CONTEXT] * 16), "prefill 512": ([512], [512])}


@dataclass(frozen=True)
class Case:
    """One operation in one shape: bytes it must move, ours, and the stock peer (None: torch has no counterpart)."""

    name: str
    step: str
    num_bytes: int
    ours: Callable[[], object]
    peer: Callable[[], object] | None


def read_bandwidth() -> float:
    """Bytes a second of summing a 256 MiB tensor, the best of ten."""
    data = torch.ones(32 << 20, dtype=torch.int64)
    return data.numel() * 8 / min(seconds(lambda: data.sum()) for _ in range(10))


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rotating(copies: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next of the copies."""
    turn = itertools.cycle(copies)
    return lambda: next(turn)()


def cases(ops: CpuOps) -> Iterator[Case]:
    """All operations in all steps."""
    dtype, size = ops.dtype, ops.dtype.itemsize
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = torch.rand(1024, HEAD_DIM // 2)
    rotary = RotaryTable(angles.cos(), angles.sin())
    ones = torch.ones(HIDDEN, dtype=dtype)
    for step, (query_lens, seq_lens) in STEPS.items():
        tokens, sequences = sum(query_lens), len(query_lens)
        x, residual = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, HIDDEN).to(dtype)
        yield Case(
            "add_rms_norm",
            step,
            4 * tokens * HIDDEN * size,
            partial(ops.add_rms_norm, x, residual, ones, 1e-6),
            lambda x=x, r=residual: F.rms_norm(x + r, (HIDDEN,), ones, 1e-6),  # type: ignore[misc]
        )
        gate_up = torch.randn(tokens, 2 * INTERMEDIATE).to(dtype)
        yield Case(
            "silu_mul",
            step,
            3 * tokens * INTERMEDIATE * size,
            partial(ops.silu_mul, gate_up),
            lambda g=gate_up: F.silu(g[:, :INTERMEDIATE]) * g[:, INTERMEDIATE:],  # type: ignore[misc]
        )
        for name, n, k in (("linear gate_up", 2 * INTERMEDIATE, HIDDEN), ("linear down", HIDDEN, INTERMEDIATE)):
            y = torch.randn(tokens, k).to(dtype)
            weights = [torch.randn(n, k).bfloat16() for _ in range(COPIES)]
            for mode in MODES:
                packed = [ops.prepare_linear(w, None, mode) for w in weights]
                x_in = ops.quantize(y) if mode == "w8a8" else y
                yield Case(
                    f"{name} {mode}",
                    step,
                    packed[0].nbytes + tokens * (n + k) * size,
                    rotating([partial(ops.linear, x_in, w) for w in packed]),
                    stock_linear(y, weights),
                )

        blocks = -(-max(seq_lens) // BLOCK_SIZE)
        tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(sequences)]
        plan = ops.plan(AttentionMetadata(query_lens, seq_lens, tables, BLOCK_SIZE))
        spec = KVCacheSpec(KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype)
        caches = [ops.allocate_kv_cache(spec, sequences * blocks) for _ in range(COPIES)]
        heads = torch.randn(tokens, width).to(dtype).view(tokens, -1, HEAD_DIM)
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)  # type: ignore[no-untyped-call]
        yield Case(
            "write_kv",
            step,
            2 * tokens * width * size,
            rotating([partial(ops.write_kv, query, key, value, rotary, c, plan) for c in caches]),
            None,
        )
        rotated = query.contiguous()
        yield Case(
            "paged_attention",
            step,
            2 * (sum(seq_lens) * KV_HEADS + tokens * HEADS) * HEAD_DIM * size,
            rotating([partial(ops.paged_attention, rotated, c, plan, 0.125) for c in caches]),
            rotating(stock_attention(rotated, sequences, max(seq_lens))),
        )

    for rows in (1, 16):
        logits = torch.randn(rows, VOCAB).to(dtype)
        for name, fields in (("greedy", (0.0, 0, 1.0)), ("T=0.8", (0.8, 0, 1.0)), ("k=50 p=0.9", (0.8, 50, 0.9))):
            metadata = sampling(rows, *fields)
            yield Case(
                f"sample {name}",
                f"decode {rows}",
                rows * VOCAB * size,
                partial(ops.sample, logits, metadata),
                stock_sampling(logits, *fields),
            )


def stock_linear(x: Tensor, weights: list[Tensor]) -> Callable[[], object]:
    """torch's product with bfloat16 or with float32 weights, whichever took less time just now."""
    candidates = [
        rotating([partial(F.linear, x.to(dtype), w.to(dtype)) for w in weights])
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return min(candidates, key=lambda call: min(seconds(call) for _ in range(3)))


def stock_attention(query: Tensor, sequences: int, context: int) -> list[Callable[[], object]]:
    """torch's attention over keys that already lie in one contiguous tensor, without any paging."""
    new = query.shape[0] // sequences
    q = query.view(sequences, new, HEADS, HEAD_DIM).transpose(1, 2)
    shape = (sequences, KV_HEADS, context, HEAD_DIM)
    pairs = [(torch.randn(shape).to(q.dtype), torch.randn(shape).to(q.dtype)) for _ in range(COPIES)]

    def call(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=True)

    return [partial(call, k, v) for k, v in pairs]


def run(rounds: int = 30, num_threads: int | None = None) -> None:
    """Measure and print."""
    ops = CpuOps(num_threads)
    torch.set_num_threads(ops.team.num_threads)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    threads, kernels = ops.team.num_threads, ops.team.kernels
    print(f"{kernels}, {threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s; medians in microseconds")
    print(f"{'operation':22}{'step':14}{'floor':>9}{'ours':>9}{'best':>9}{'peer':>9}{'peer/ours':>11}")
    results = []
    with torch.inference_mode():
        for case in cases(ops):
            ours: list[float] = []
            peers: list[float] = []
            for number in range(rounds + 2):
                sys.stderr.write(f"\r{case.name}, {case.step}: round {number + 1} of {rounds + 2}   ")
                mine = seconds(case.ours)
                other = seconds(case.peer) if case.peer else 0.0
                if number >= 2:  # the first rounds fill buffers and build kernels
                    ours.append(mine)
                    peers.append(other)
            sys.stderr.write("\r" + " " * 60 + "\r")
            floor, median = case.num_bytes / bandwidth * 1e6, statistics.median(ours) * 1e6
            best, peer = min(ours) * 1e6, statistics.median(peers) * 1e6 if case.peer else None
            ratio = f"{peer:9.0f}{peer / median:11.2f}" if peer else f"{'-':>9}{'-':>11}"
            print(f"{case.name:22}{case.step:14}{floor:9.1f}{median:9.0f}{best:9.0f}{ratio}")
            results.append(
                {"op": case.name, "step": case.step, "floor_us": round(floor, 1), "ours_us": round(median, 1)}
                | {"best_us": round(best, 1), "peer_us": round(peer, 1) if peer else None}
            )
    summary = {"kernels": kernels, "threads": threads, "bandwidth_gb_s": round(bandwidth / 1e9, 1)}
    print(json.dumps(summary | {"results": results}))
