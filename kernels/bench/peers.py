"""What others offer for the same work. A peer that is not there is named with its reason, never left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.bench.timing import Call

Peers = Mapping[str, Sequence[Call] | str]
"""Calls with different inputs each, or why there are none."""

BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa default": None}


def optional(package: str, make: Callable[[Any], Sequence[Call]]) -> Sequence[Call] | str:
    """The calls of a package that need not be there. Where its interface is another by now, the error is named."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        return "not installed"
    try:
        return make(module)
    except Exception as problem:  # whatever another project raises
        return f"failed: {type(problem).__name__}: {problem}"[:80]


def sdpa(query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], causal: bool) -> Peers:
    """torch's attention over contiguous K and V, forced to each backend. query [B, Hq, S, D], K and V [B, Hkv, L, D].

    A backend that refuses grouped heads gets K and V repeated beforehand, which costs it bytes: its name says so.
    """
    return dict(_sdpa_calls(name, backend, query, pairs, causal) for name, backend in BACKENDS.items())


def _sdpa_calls(
    name: str, backend: SDPBackend | None, query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], causal: bool
) -> tuple[str, Sequence[Call] | str]:
    def call(k: Tensor, v: Tensor) -> Tensor:
        forced: AbstractContextManager[object] = nullcontext() if backend is None else sdpa_kernel([backend])
        with forced:
            return F.scaled_dot_product_attention(query, k, v, is_causal=causal, enable_gqa=k.shape[1] < query.shape[1])

    problem = ""
    for repeated in (False, True):
        used = [_repeated(query, *pair) for pair in pairs] if repeated else pairs
        try:
            call(*used[0])
        except RuntimeError as error:
            problem = f"failed: {str(error).strip().splitlines()[0]}"[:80]
        else:
            return f"{name}, repeated K and V" if repeated else name, [partial(call, *pair) for pair in used]
    return name, problem


def _repeated(query: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // k.shape[1]
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def flashinfer_decode(
    query: Tensor, pages: Sequence[tuple[Tensor, Tensor]], tables: list[list[int]], context: int
) -> Sequence[Call] | str:
    """query [S, Hq, D]; K and V pages [blocks, Hkv, block_size, D]."""

    def make(flashinfer: Any) -> Sequence[Call]:
        _, kv_heads, block_size, dim = pages[0][0].shape
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        blocks = torch.tensor([len(table) for table in tables])
        starts = F.pad(blocks.cumsum(0), (1, 0)).to(torch.int32).to(query.device)
        ids = torch.tensor([i for table in tables for i in table], dtype=torch.int32, device=query.device)
        last = torch.full((len(tables),), (context - 1) % block_size + 1, dtype=torch.int32, device=query.device)
        wrapper.plan(
            starts,
            ids,
            last,
            query.shape[1],
            kv_heads,
            dim,
            block_size,
            q_data_type=query.dtype,
            kv_data_type=pages[0][0].dtype,
        )
        return [partial(wrapper.run, query, pair) for pair in pages]

    return optional("flashinfer", make)


def flashinfer_prefill(query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Call] | str:
    """query [S, Hq, D]; K and V [1, Hkv, S, D]."""

    def make(flashinfer: Any) -> Sequence[Call]:
        run = partial(flashinfer.single_prefill_with_kv_cache, causal=True)
        return [partial(run, query, k[0].transpose(0, 1), v[0].transpose(0, 1)) for k, v in pairs]

    return optional("flashinfer", make)


def linears(x: Tensor, weights: Sequence[Tensor], int8: bool) -> Peers:
    """x [M, K], weights [N, K]: cuBLAS (on the CPU what torch calls), and for int8 weights those who have them too."""
    found: dict[str, Sequence[Call] | str] = {"cublas": [partial(F.linear, x, weight) for weight in weights]}
    if int8:
        found["torchao"] = optional("torchao.quantization", partial(_torchao, x, weights))
        found["gemlite"] = optional("gemlite.helper", partial(_gemlite, x, weights))
    return found


def _module(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _torchao(x: Tensor, weights: Sequence[Tensor], torchao: Any) -> Sequence[Call]:
    """Compiled, as its authors use it: its kernel is what the compiler makes of the product."""
    calls: list[Call] = []
    for weight in weights:
        layer = _module(weight.clone())
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        calls.append(partial(torch.compile(layer, dynamic=False), x))
    return calls


def _gemlite(x: Tensor, weights: Sequence[Tensor], gemlite: Any) -> Sequence[Call]:
    make = gemlite.A16W8(device=str(x.device), dtype=x.dtype)
    return [partial(make.from_linear(_module(weight.clone())), x) for weight in weights]


def stock_sampling(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Callable[[], object]:
    """What an engine written in plain torch does."""

    def run() -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        scaled = logits.float() / temperature
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
        if top_p < 1:
            values, order = scaled.sort(-1)
            drop = values.softmax(-1).cumsum(-1) <= 1 - top_p
            scaled = scaled.masked_fill(drop.scatter(1, order, drop), float("-inf"))
        return torch.multinomial(scaled.softmax(-1), 1)

    return run


def flashinfer_sampling(logits: Sequence[Tensor], temperature: float, top_k: int, top_p: float) -> Sequence[Call] | str:
    """Both filters in one kernel, after a softmax."""

    def make(sampling: Any) -> Sequence[Call]:
        def call(x: Tensor) -> object:
            return sampling.top_k_top_p_sampling_from_logits(x.float() / temperature, top_k, top_p)

        return [partial(call, x) for x in logits]

    return optional("flashinfer.sampling", make)
