"""The sizes that are measured, and inputs that several cases share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import RotaryTable, SamplingMetadata


@dataclass(frozen=True)
class Heads:
    """The attention of one model."""

    model: str
    query: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    decode        (sequences, context) of decode attention       prefill   prompt lengths
    linears       (name, N, K)                                   rows      M of the linear layers
    tokens        T of the row-wise operators                    cold      bytes that the copies of rotating inputs
    hidden, intermediate, vocab, batches (of sampling)                     have together, more than the last cache
    """

    heads: tuple[Heads, ...]
    block_size: int
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    linears: tuple[tuple[str, int, int], ...]
    rows: tuple[int, ...]
    hidden: int
    intermediate: int
    tokens: tuple[int, ...]
    vocab: int
    batches: tuple[int, ...]
    cold: int

    def copies(self, num_bytes: int) -> int:
        """How many copies of an input are larger together than the last cache; at least two."""
        return max(2, min(64, -(-self.cold // num_bytes)))


FULL = Sizes(
    heads=(Heads("Llama-3.1-8B", 32, 8, 128), Heads("Qwen3-0.6B", 16, 8, 128)),
    block_size=64,  # as the engine has it on a GPU
    decode=((1, 4096), (16, 4096), (64, 4096), (1, 65536)),
    prefill=(1024, 2048, 4096, 8192),
    linears=(("gate_up", 28672, 4096), ("down", 4096, 14336), ("qkv", 6144, 4096)),
    rows=(1, 4, 16, 64, 128, 512, 4096),
    hidden=4096,
    intermediate=14336,
    tokens=(8192, 64, 1),
    vocab=131072,
    batches=(128, 64, 1),
    cold=256 << 20,
)

SMOKE = Sizes(
    heads=(Heads("tiny", 4, 2, 32),),
    block_size=16,
    decode=((2, 40),),
    prefill=(33,),
    linears=(("tiny", 48, 640),),
    rows=(1, 17),
    hidden=64,
    intermediate=48,
    tokens=(3,),
    vocab=300,
    batches=(1,),
    cold=1,
)


def rotary(positions: int, dim: int, device: torch.device) -> RotaryTable:
    """Angles like a model's: the table is [positions, dim / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return RotaryTable(angles.cos(), angles.sin())


def block_tables(sequences: int, context: int, block_size: int) -> list[list[int]]:
    """A table for each sequence; the blocks lie scattered over the cache, as they do after hours of service."""
    blocks = -(-context // block_size)
    ids: list[int] = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(1)).tolist()
    return [ids[s * blocks : (s + 1) * blocks] for s in range(sequences)]


def sampling(rows: int, temperature: float, top_k: int, top_p: float) -> SamplingMetadata:
    """The same parameters for every row."""
    one, zero = [1.0] * rows, [0.0] * rows
    seeds, zeros = list(range(rows)), [0] * rows
    temperatures, top_ks, top_ps = [temperature] * rows, [top_k] * rows, [top_p] * rows
    return SamplingMetadata(seeds, zeros, zeros, temperatures, top_ks, top_ps, zero, one, one, zero, zero)


def gathered(stored: Tensor, scales: Tensor | None, table: list[int], length: int) -> Tensor:
    """One sequence's K or V out of pages [blocks, Hkv, block_size, D]: float32 [Hkv, length, D]."""
    pages = stored[torch.tensor(table, device=stored.device)].to(torch.float32)
    if scales is not None:
        pages = pages * scales[torch.tensor(table, device=stored.device)][..., None]
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]
