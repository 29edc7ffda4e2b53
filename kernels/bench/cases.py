"""Every operator of the CUDA backend in the shapes of the aims, the aims first in each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import peers
from kernels.bench.case import Aim, Case, Spec, difference, poisoned
from kernels.bench.timing import Call
from kernels.bench.workload import Heads, Sizes, block_tables, gathered, rotary, sampling
from kernels.cuda import activation, attention, linear, norm
from kernels.cuda import kv_cache as kv
from kernels.cuda.kv_cache import CudaKVCache
from kernels.cuda.plan import CudaPlan
from kernels.cuda.plan import make_plan as make_attention_plan
from kernels.cuda.upload import Upload
from kernels.cuda.workspace import Workspace
from kernels.int8 import quantize_rows
from kernels.ops import AttentionMetadata, KVCacheSpec, QuantizationMode, QuantizedActivations
from kernels.reference import ReferenceOps

DTYPE = torch.bfloat16
ROUNDED = 5e-3
"""Allowed error where only the result is rounded to bfloat16 (8 bits: 1.1e-3 on average) and the rest is float32."""
PRODUCTS = 1e-2
"""Where a step between is rounded to bfloat16 as well: the probabilities of attention."""
MODES: tuple[QuantizationMode, ...] = ("w8a16", "w8a8", "none")
FILTERS = {"k=50 p=0.9": (0.8, 50, 0.9), "greedy": (0.0, 0, 1.0)}


def all_specs(sizes: Sizes, device: torch.device) -> Iterator[Spec]:
    """All cases. `build` makes the tensors."""
    for heads in sizes.heads:
        for sequences, context in sizes.decode:
            for dtype, name in ((DTYPE, "bf16"), (torch.int8, "int8")):
                shape = f"{heads.model} B={sequences} L={context} KV {name}"
                yield Spec("decode", shape, partial(decode, sizes, heads, sequences, context, dtype, device))
        for length in sizes.prefill:
            build = partial(prefill, sizes, heads, length, device)
            yield Spec("prefill", f"{heads.model} S={length}", build)
    for name, n, k in sizes.linears:
        for mode in MODES:
            for rows in sizes.rows:
                shape = f"{name} M={rows} N={n} K={k}"
                yield Spec(f"linear {mode}", shape, partial(linear_case, sizes, mode, rows, n, k, device))
    for tokens in sizes.tokens:
        yield Spec("add_rms_norm", f"T={tokens} H={sizes.hidden}", partial(add_rms_norm, sizes, tokens, device))
        yield Spec("silu_mul", f"T={tokens} I={sizes.intermediate}", partial(silu_mul, sizes, tokens, device))
        for heads in sizes.heads:
            yield Spec("write_kv", f"{heads.model} T={tokens}", partial(write_kv, sizes, heads, tokens, device))
    for batch in sizes.batches:
        for name, fields in FILTERS.items():
            shape = f"{name} B={batch} V={sizes.vocab}"
            yield Spec("sample", shape, partial(sample, sizes, batch, fields, device))


def random(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers in the backend's dtype."""
    return torch.randn(shape, device=device).to(DTYPE)


def attention_plan(
    query_lens: list[int], seq_lens: list[int], tables: list[list[int]], size: int, device: torch.device
) -> CudaPlan:
    """A plan with an upload buffer of its own, which no later plan overwrites."""
    upload = Upload(device)
    plan = make_attention_plan(AttentionMetadata(query_lens, seq_lens, tables, size), upload)
    upload.send()
    return plan


def random_cache(spec: KVCacheSpec, blocks: int, device: torch.device) -> CudaKVCache:
    """A cache full of normal numbers."""
    cache = kv.allocate(spec, blocks, device)
    for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        if scales is None:
            stored.normal_()
        else:
            stored.random_(-127, 128)
            scales.uniform_(0.005, 0.02)
    return cache


def attention_truth(query: Tensor, cache: CudaKVCache, tables: list[list[int]], length: int) -> Tensor:
    """query [S * new, Hq, D] of S equal sequences -> [S * new, Hq * D]: a softmax over all scores, in float32.

    One KV head and 1,024 queries at a time: the scores of a long prompt would not fit the memory at once.
    """
    kv_heads, dim = cache.spec.num_kv_heads, cache.spec.head_dim
    results = []
    for q, table in zip(query.to(torch.float32).chunk(len(tables)), tables, strict=True):
        keys = gathered(cache.keys, cache.key_scales, table, length)
        values = gathered(cache.values, cache.value_scales, table, length)
        output = torch.empty_like(q)
        for head in range(kv_heads):
            mine = slice(head * q.shape[1] // kv_heads, (head + 1) * q.shape[1] // kv_heads)
            for first in range(0, len(q), 1024):
                rows = q[first : first + 1024, mine]
                scores = torch.einsum("qhd,kd->hqk", rows, keys[head]) * dim**-0.5
                last = torch.arange(len(rows), device=q.device) + first + length - len(q)
                hidden = torch.arange(length, device=q.device) > last[:, None]
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                output[first : first + 1024, mine] = torch.einsum("hqk,kd->qhd", weights, values[head])
        results.append(output.flatten(1))
    return torch.cat(results)


def decode(sizes: Sizes, heads: Heads, sequences: int, context: int, dtype: torch.dtype, device: torch.device) -> Case:
    """One token a sequence over a paged cache."""
    spec = KVCacheSpec(heads.kv, heads.dim, sizes.block_size, dtype)
    tables = block_tables(sequences, context, sizes.block_size)
    blocks = sum(len(table) for table in tables)
    num_bytes = blocks * spec.bytes_per_block
    caches = [random_cache(spec, blocks, device) for _ in range(sizes.copies(num_bytes))]
    plan = attention_plan([1] * sequences, [context] * sequences, tables, sizes.block_size, device)
    query, workspace = random(sequences, heads.query, heads.dim, device=device), Workspace(device)

    def call(cache: CudaKVCache) -> Tensor:
        return attention.paged_attention(query, cache, plan, heads.dim**-0.5, None, workspace)

    others: peers.Peers = {}
    if dtype == DTYPE:
        # Contiguous K and V, the same bytes: what a server without paging would read.
        shape = (sequences, heads.kv, context, heads.dim)
        pairs = [(random(*shape, device=device), random(*shape, device=device)) for _ in caches]
        pages = [(cache.keys, cache.values) for cache in caches]
        others = {
            **peers.sdpa(query[:, :, None], pairs, causal=False),
            "flashinfer": peers.flashinfer_decode(query, pages, tables, context),
        }
    aims: tuple[Aim, ...] = ()
    if num_bytes >= 256 << 20:
        aims = (Aim("share", 0.85),)
    elif sequences == 1 and context == 4096:
        aims = (Aim("microseconds", 10.0),)
    return Case(
        num_bytes=num_bytes,
        operations=4 * heads.dim * heads.query * sequences * context,
        ours=[partial(call, cache) for cache in caches],
        error=lambda: difference(
            poisoned(partial(call, caches[0])), attention_truth(query, caches[0], tables, context)
        ),
        tolerance=PRODUCTS,
        peers=others,
        aims=aims,
    )


def prefill(sizes: Sizes, heads: Heads, length: int, device: torch.device) -> Case:
    """A whole prompt. K and V fit the last cache for any length here, so two copies are enough."""
    spec = KVCacheSpec(heads.kv, heads.dim, sizes.block_size, DTYPE)
    tables = block_tables(1, length, sizes.block_size)
    caches = [random_cache(spec, len(tables[0]), device) for _ in range(2)]
    plan = attention_plan([length], [length], tables, sizes.block_size, device)
    query, workspace = random(length, heads.query, heads.dim, device=device), Workspace(device)

    def call(cache: CudaKVCache) -> Tensor:
        return attention.paged_attention(query, cache, plan, heads.dim**-0.5, None, workspace)

    shape = (1, heads.kv, length, heads.dim)
    pairs = [(random(*shape, device=device), random(*shape, device=device)) for _ in caches]
    batched = query.transpose(0, 1)[None].contiguous()
    return Case(
        num_bytes=2 * query.nbytes + len(tables[0]) * spec.bytes_per_block,
        operations=4 * heads.dim * heads.query * (length * (length + 1) // 2),
        ours=[partial(call, cache) for cache in caches],
        error=lambda: difference(poisoned(partial(call, caches[0])), attention_truth(query, caches[0], tables, length)),
        tolerance=PRODUCTS,
        peers={**peers.sdpa(batched, pairs, causal=True), "flashinfer": peers.flashinfer_prefill(query, pairs)},
        aims=(Aim("ratio", 0.8, "sdpa cudnn"), Aim("ratio", 1.3, "sdpa default")),
    )


def linear_case(sizes: Sizes, mode: QuantizationMode, rows: int, n: int, k: int, device: torch.device) -> Case:
    """x @ W^T; the activations of w8a8 are quantized already, as the norm before leaves them."""
    size = 2 if mode == "none" else 1
    originals = [(torch.randn(n, k, device=device) * k**-0.5).to(DTYPE) for _ in range(sizes.copies(n * k * size))]
    weights = [linear.prepare(weight, None, mode, device, DTYPE) for weight in originals]
    x, workspace = random(rows, k, device=device), Workspace(device)
    given = QuantizedActivations(*quantize_rows(x)) if mode == "w8a8" else x

    def call(weight: linear.CudaLinear) -> Tensor:
        return linear.linear(given, weight, workspace)

    def error() -> float:
        weight = weights[0].weight.to(torch.float32)
        if weights[0].scales is not None:
            weight = weight * weights[0].scales[:, None]
        rows_used = x if isinstance(given, Tensor) else given.values.to(torch.float32) * given.scales[:, None]
        return difference(poisoned(partial(call, weights[0])), F.linear(rows_used.to(torch.float32), weight))

    aims: tuple[Aim, ...] = ()
    if mode == "w8a16" and (rows <= 16 or rows >= 128):
        aims = (Aim("ratio", 1.6 if rows <= 16 else 0.95, "cublas"),)
    elif mode == "w8a8" and rows >= 128:
        aims = (Aim("ratio", 1.5, "cublas"),)
    return Case(
        num_bytes=n * k * size + rows * (k * (1 if mode == "w8a8" else 2) + n * 2),
        operations=2 * rows * n * k,
        ours=[partial(call, weight) for weight in weights],
        error=error,
        tolerance=ROUNDED,
        peers=peers.linears(x, originals, int8=mode == "w8a16"),
        aims=aims,
        rate_factor=2.0 if mode == "w8a8" else 1.0,  # integer tensor cores: nominally twice the rate of bf16
    )


def add_rms_norm(sizes: Sizes, tokens: int, device: torch.device) -> Case:
    """The sum and its norm in one pass."""
    pairs = [
        (random(tokens, sizes.hidden, device=device), random(tokens, sizes.hidden, device=device))
        for _ in range(_activation_copies(sizes, tokens * sizes.hidden * 8))
    ]
    weight = random(sizes.hidden, device=device)

    def call(x: Tensor, residual: Tensor) -> tuple[object, Tensor]:
        return norm.rms_norm(x, residual, weight, 1e-6, False)

    def error() -> float:
        x, residual = pairs[0]
        found, total = (poisoned(lambda i=i: torch.as_tensor(call(x, residual)[i])) for i in (0, 1))  # type: ignore[misc]
        truth = ReferenceOps().rms_norm(total, weight, 1e-6)
        return max(difference(total, x.float() + residual.float()), difference(found, truth))

    return Case(
        num_bytes=4 * tokens * sizes.hidden * 2,
        operations=0,
        ours=[partial(call, *pair) for pair in pairs],
        error=error,
        tolerance=ROUNDED,
        peers={
            "torch": [
                lambda x=x, r=r: F.rms_norm(x + r, (sizes.hidden,), weight, 1e-6)  # type: ignore[misc]
                for x, r in pairs
            ]
        },
        aims=_row_aims(tokens, 4.0),
    )


def silu_mul(sizes: Sizes, tokens: int, device: torch.device) -> Case:
    """silu(gate) * up."""
    width = sizes.intermediate
    copies = _activation_copies(sizes, 6 * tokens * width)
    gate_ups = [random(tokens, 2 * width, device=device) for _ in range(copies)]

    def call(gate_up: Tensor) -> Tensor:
        return torch.as_tensor(activation.gated(gate_up, "silu", False))

    return Case(
        num_bytes=3 * tokens * width * 2,
        operations=0,
        ours=[partial(call, gate_up) for gate_up in gate_ups],
        error=lambda: difference(
            poisoned(partial(call, gate_ups[0])), torch.as_tensor(ReferenceOps().silu_mul(gate_ups[0]))
        ),
        tolerance=ROUNDED,
        peers={"torch": [lambda g=g: F.silu(g[:, :width]) * g[:, width:] for g in gate_ups]},  # type: ignore[misc]
        aims=_row_aims(tokens, None),
    )


def write_kv(sizes: Sizes, heads: Heads, tokens: int, device: torch.device) -> Case:
    """QK norm, rotation and the cache write. Many tokens are one prompt, few are one token of many sequences."""
    prompt = tokens >= 1024
    query_lens, seq_lens = ([tokens], [tokens]) if prompt else ([1] * tokens, [17] * tokens)
    tables = block_tables(len(seq_lens), seq_lens[0], sizes.block_size)
    plan = attention_plan(query_lens, seq_lens, tables, sizes.block_size, device)
    table = rotary(max(seq_lens), heads.dim, device)
    weights = [random(heads.dim, device=device) for _ in range(2)]
    spec = KVCacheSpec(heads.kv, heads.dim, sizes.block_size, DTYPE)
    width = (heads.query + 2 * heads.kv) * heads.dim
    num_bytes = 2 * tokens * width * 2
    parts = [heads.query, heads.kv, heads.kv]
    # The caches may be large beside what is written of them: two are enough, as the places written are not read again.
    caches = [kv.allocate(spec, sum(len(t) for t in tables), device) for _ in range(2)]
    inputs = [random(tokens, width, device=device) for _ in range(_activation_copies(sizes, num_bytes))]

    def call(packed: Tensor, cache: CudaKVCache) -> Tensor:
        query, key, value = packed.view(tokens, -1, heads.dim).split(parts, 1)  # type: ignore[no-untyped-call]
        return kv.write_kv(query, key, value, table, cache, plan, weights[0], weights[1], 1e-6)

    def error() -> float:
        caches[0].keys.fill_(float("nan"))
        caches[0].values.fill_(float("nan"))
        found = poisoned(partial(call, inputs[0], caches[0]))
        query, key, value = inputs[0].float().view(tokens, -1, heads.dim).split(parts, 1)  # type: ignore[no-untyped-call]
        positions = torch.arange(tokens) if prompt else torch.full((tokens,), seq_lens[0] - 1)
        cos, sin = (t[positions.to(device)][:, None] for t in (table.cos, table.sin))
        turned = []
        for x, weight in zip((query, key), weights, strict=True):
            first, second = torch.as_tensor(ReferenceOps().rms_norm(x, weight, 1e-6)).chunk(2, -1)
            turned.append(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
        blocks = [
            tables[0][p // spec.block_size] if prompt else tables[i][p // spec.block_size]
            for i, p in enumerate(positions.tolist())
        ]
        at = (torch.tensor(blocks, device=device), slice(None), positions.to(device) % spec.block_size)
        stored = [pages[at] for pages in (caches[0].keys, caches[0].values)]
        pairs = zip((found, *stored), (turned[0], turned[1], value), strict=True)
        return max(difference(ours, truth) for ours, truth in pairs)

    return Case(
        num_bytes=num_bytes,
        operations=0,
        ours=[partial(call, packed, caches[i % 2]) for i, packed in enumerate(inputs)],
        error=error,
        tolerance=ROUNDED,
        peers={},
        aims=_row_aims(tokens, 4.0),
    )


def sample(sizes: Sizes, batch: int, fields: tuple[float, int, float], device: torch.device) -> Case:
    """Logits to tokens, on the device alone: the parameters are uploaded before."""
    from kernels.cuda import sampling as kernels

    num_bytes = batch * sizes.vocab * 2
    logits = [random(batch, sizes.vocab, device=device) * 3 for _ in range(sizes.copies(num_bytes))]
    metadata, upload, workspace = sampling(batch, *fields), Upload(device), Workspace(device)
    plan = kernels.make_plan(metadata, batch, sizes.vocab, upload)
    upload.send()

    def call(x: Tensor) -> Tensor:
        return torch.as_tensor(kernels.sample(x, plan, None, workspace).token_ids)

    def error() -> float:
        """The share of rows, among the first eight, that draw another token than the reference."""
        found, rows = call(logits[0])[:8].cpu(), min(batch, 8)
        truth = ReferenceOps().sample(logits[0][:rows].cpu(), sampling(rows, *fields)).token_ids
        return float((found != truth).float().mean())

    others: dict[str, Sequence[Call] | str] = {"torch": [peers.stock_sampling(x, *fields) for x in logits]}
    if fields[0] > 0:
        others["flashinfer"] = peers.flashinfer_sampling(logits, *fields)
    return Case(
        num_bytes=num_bytes,
        operations=0,
        ours=[partial(call, x) for x in logits],
        error=error,
        # Two ways of computing exp may differ in a weight, and so, rarely, in a token; never in an argmax.
        tolerance=0.0 if fields[0] == 0 else 1 / 8,
        peers=others,
        aims=(Aim("microseconds", 200.0),) if batch == 128 else (),
    )


def _activation_copies(sizes: Sizes, num_bytes: int) -> int:
    """In decode a kernel finds its input in the last cache, where the one before left it: then nothing rotates."""
    return 1 if num_bytes < 8 << 20 else sizes.copies(num_bytes)


def _row_aims(tokens: int, decode_microseconds: float | None) -> tuple[Aim, ...]:
    if tokens == 8192:
        return (Aim("share", 0.85),)
    return () if decode_microseconds is None else (Aim("microseconds", decode_microseconds),)
