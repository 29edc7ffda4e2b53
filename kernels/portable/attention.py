"""Paged attention in tiles of fixed shape.

A tile has the query heads of one KV head for some tokens as its rows (GQA packing) and a fixed number of keys. Its
shape depends on the positions of its tokens only (`kernels.portable.plan`); what a row may not see is masked.
All tiles of one extent are computed in one call of torch's flash attention kernel for the CPU, which treats each tile
alone: scores, softmax and sums in float32, online softmax in steps of 512 keys, in order (arXiv:2205.14135).

Tiles have two heights: one token (its heads padded to a multiple of 4 rows) in decode, and 32 rows in prompts, which
is about twice as fast there. Rows have equal bits in both: seen in bf16 and float32, for head sizes 64 to 256, 4 to 64
rows, 64 to 1,280 keys; 1 to 3 rows do differ. The libraries below do not promise it, so `heights_agree` checks it once
for each head size, and where it fails every token gets a tile of its own, which makes equality hold by construction.

`_scaled_dot_product_flash_attention_for_cpu` is private; the public F.scaled_dot_product_attention chooses among
kernels by its arguments, and this is the one that it chooses for such tiles (torch 2.2 to 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.portable.elementwise import tanh_
from kernels.portable.kv_cache import PortableKVCache
from kernels.portable.plan import PortablePlan, Work
from kernels.portable.workspace import Workspace

PROMPT_ROWS = 32
MAX_GATHER_BYTES = 4 << 20  # stays in the last-level cache between gathering and use
MAX_MASK_BYTES = 16 << 20
MAX_CACHED_MASK_BYTES = 16 << 20  # for each Work


def decode_rows(group: int) -> int:
    """Height of a decode tile: the query heads of one KV head, padded to a multiple of 4."""
    return -(-group // 4) * 4


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of tiles: q [B, Hkv, M, D], k and v [B, Hkv, L, D], mask float32 [B, 1, M or 1, L] -> [B, Hkv, M, D].

    With a soft cap (which the flash kernel lacks) scores are materialized and the products computed in float32.
    """
    if softcap is None:
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )[0]
        return output
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale / softcap)
    scores = tanh_(scores.contiguous()).mul_(softcap).add_(mask)
    # Softmax over the last axis vectorizes each row alone, and rows are multiples of 64 long: no scalar tails.
    return torch.matmul(torch.softmax(scores, -1), v.float()).to(q.dtype)


def heights_agree(head_dim: int, dtype: torch.dtype, rows: int, softcap: bool) -> bool:
    """Whether `rows`-row tiles have the bits of PROMPT_ROWS-row tiles, wherever in the tile a row stands."""
    generator = torch.Generator().manual_seed(0)
    cap = 5.0 if softcap else None
    for extent in (64, 128, 192, 256, 384, 512, 768, 1280):
        q = torch.randn(2, 1, PROMPT_ROWS, head_dim, generator=generator).to(dtype)
        k = torch.randn(2, 1, extent, head_dim, generator=generator).to(dtype)
        v = torch.randn(2, 1, extent, head_dim, generator=generator).to(dtype)
        mask = torch.zeros(2, 1, 1, extent)
        mask[..., extent - 37 :] = float("-inf")
        expected = attend(q, k, v, mask.expand(-1, -1, PROMPT_ROWS, -1), 0.125, cap)
        rolled = attend(q.roll(5, 2), k, v, mask.expand(-1, -1, PROMPT_ROWS, -1), 0.125, cap)
        if not torch.equal(rolled, expected.roll(5, 2)):
            return False
        for first in range(0, PROMPT_ROWS - rows + 1, rows):
            tile = slice(first, first + rows)
            alone = attend(q[:1, :, tile], k[:1], v[:1], mask[:1], 0.125, cap)
            if not torch.equal(alone, expected[:1, :, tile]):
                return False
    return True


def paged_attention(
    query: Tensor,
    cache: PortableKVCache,
    plan: PortablePlan,
    scale: float,
    softcap: float | None,
    one_height: bool,
    workspace: Workspace,
) -> Tensor:
    """query [T, Hq, D] in `cache.dtype` -> [T, Hq * D]. `one_height`: give every token a tile of its own."""
    tokens, heads, head_dim = query.shape
    kv_heads = cache.spec.num_kv_heads
    grouped = query.view(tokens, kv_heads, heads // kv_heads, head_dim)
    output = torch.empty(grouped.shape, dtype=query.dtype)
    for work in plan.work(cache.spec.sliding_window, one_height):
        run = _decode if work.decode else _prompt
        run(grouped, output, work, cache, scale, softcap, workspace)
    return output.view(tokens, heads * head_dim)


@dataclass(frozen=True, slots=True)
class _DecodePiece:
    """All that does not change from layer to layer of some sequences' decode tiles: indices, buffers, their views."""

    token_rows: Tensor | None  # None: every token of the step, in order
    heads: slice
    index: Tensor
    gathered: Tensor
    keys: Tensor  # k, v: views of `gathered`
    values: Tensor
    tiles: Tensor
    tile_heads: Tensor  # view of `tiles` without the padding rows
    mask: Tensor


def _decode(
    query: Tensor,
    output: Tensor,
    work: Work,
    cache: PortableKVCache,
    scale: float,
    softcap: float | None,
    workspace: Workspace,
) -> None:
    """One tile of `decode_rows` rows for each token and KV head."""
    _, kv_heads, group, head_dim = query.shape
    key = (kv_heads, cache.num_blocks, group, head_dim, query.itemsize)
    pieces = work.prepared.get(key)
    if pieces is None:
        pieces = work.prepared[key] = list(_decode_pieces(query, work, cache, workspace))
    for piece in pieces:
        # Padding rows keep what an earlier call left in them; a row's result does not depend on another's.
        some = query[:, piece.heads]
        piece.tile_heads.copy_(some if piece.token_rows is None else some[piece.token_rows])
        cache.gather(piece.index, piece.gathered, workspace)
        result = attend(piece.tiles, piece.keys, piece.values, piece.mask, scale, softcap)[:, :, :group]
        if piece.token_rows is None:
            output[:, piece.heads] = result
        else:
            output[piece.token_rows, piece.heads] = result


def _decode_pieces(query: Tensor, work: Work, cache: PortableKVCache, workspace: Workspace) -> Iterator[_DecodePiece]:
    """Cut the work so that the gathered keys and values stay within MAX_GATHER_BYTES."""
    _, kv_heads, group, head_dim = query.shape
    index = work.gather_index(cache)
    count = len(work.rows)
    head_bytes = 2 * work.extent * head_dim * query.itemsize
    heads_at_once = max(1, min(kv_heads, MAX_GATHER_BYTES // head_bytes))
    at_once = max(1, MAX_GATHER_BYTES // (head_bytes * heads_at_once)) if heads_at_once == kv_heads else 1
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        mask = _mask(work, first, last, group=1, rows=1, window=cache.spec.sliding_window)
        for head in range(0, kv_heads, heads_at_once):
            heads = slice(head, min(head + heads_at_once, kv_heads))
            shape = (last - first, heads.stop - heads.start, decode_rows(group), head_dim)
            tiles = workspace.take("decode_tiles", shape, query.dtype)
            part = index[:, first:last, heads].contiguous()
            gathered, keys, values = _gather_buffer(cache, part, work.extent, workspace)
            yield _DecodePiece(
                token_rows=None if work.every_row and last - first == count else work.row_index[first:last],
                heads=heads,
                index=part.view(-1),
                gathered=gathered,
                keys=keys,
                values=values,
                tiles=tiles,
                tile_heads=tiles[:, :, :group],
                mask=mask,
            )


def _prompt(
    query: Tensor,
    output: Tensor,
    work: Work,
    cache: PortableKVCache,
    scale: float,
    softcap: float | None,
    workspace: Workspace,
) -> None:
    """Tiles of PROMPT_ROWS rows over a run of tokens of one sequence, which share their keys."""
    _, kv_heads, group, head_dim = query.shape
    per_tile = PROMPT_ROWS // group
    first_token, count = int(work.rows[0]), len(work.rows)
    index = work.gather_index(cache)
    head_bytes = 2 * work.extent * head_dim * query.itemsize
    heads_at_once = max(1, min(kv_heads, MAX_GATHER_BYTES // head_bytes))
    # A soft cap materializes scores and copies of the keys for every tile.
    tile_bytes = PROMPT_ROWS * work.extent * 4
    if softcap is not None:
        tile_bytes = heads_at_once * (2 * tile_bytes + 2 * head_bytes)
    tiles_at_once = max(1, MAX_MASK_BYTES // tile_bytes)
    for head in range(0, kv_heads, heads_at_once):
        some = slice(head, head + heads_at_once)
        k, v = _gather(cache, index[:, :, some], work.extent, workspace)
        for first in range(0, count, tiles_at_once * per_tile):
            last = min(first + tiles_at_once * per_tile, count)
            num_tiles = -(-(last - first) // per_tile)
            tokens = slice(first_token + first, first_token + last)
            tiles = _pack(query[tokens, some], num_tiles, per_tile, workspace)
            mask = _mask(work, first, last, group, PROMPT_ROWS, cache.spec.sliding_window)
            shared = (num_tiles, -1, -1, -1)
            result = attend(tiles, k.expand(shared), v.expand(shared), mask, scale, softcap)
            # [tiles, heads, token * group, D] -> [tiles * token, heads, group, D]
            result = torch.unflatten(result[:, :, : per_tile * group], 2, (per_tile, group)).transpose(1, 2)
            output[tokens, some] = result.reshape(-1, *result.shape[2:])[: last - first]


def _pack(query: Tensor, num_tiles: int, per_tile: int, workspace: Workspace) -> Tensor:
    """query [n, heads, group, D] -> [num_tiles, heads, PROMPT_ROWS, D], token-major rows, zeros where none is."""
    count, heads, group, head_dim = query.shape
    tiles = workspace.take("prompt_tiles", (num_tiles, heads, PROMPT_ROWS, head_dim), query.dtype)
    tiles.zero_()
    # [tiles, heads, token, group, D], a view of the rows that hold tokens
    packed = torch.unflatten(tiles[:, :, : per_tile * group], 2, (per_tile, group))
    whole, rest = divmod(count, per_tile)
    if whole:
        packed[:whole] = torch.unflatten(query[: whole * per_tile], 0, (whole, per_tile)).transpose(1, 2)
    if rest:
        packed[whole, :, :rest] = query[whole * per_tile :].transpose(0, 1)
    return tiles


def _gather_buffer(
    cache: PortableKVCache, index: Tensor, extent: int, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the blocks of an index int64 [2, W, heads, blocks]; its keys and values, each [W, heads, extent, D]."""
    _, count, heads, blocks = index.shape
    width = cache.block_rows.shape[1]
    buffer = workspace.take("gathered", (2 * count * heads * blocks, width), cache.dtype)
    both = buffer.view(2, count, heads, extent, cache.spec.head_dim)
    return buffer, both[0], both[1]


def _gather(cache: PortableKVCache, index: Tensor, extent: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Keys and values of the indexed blocks."""
    buffer, keys, values = _gather_buffer(cache, index, extent, workspace)
    cache.gather(index.reshape(-1), buffer, workspace)
    return keys, values


def _mask(work: Work, first: int, last: int, group: int, rows: int, window: int | None) -> Tensor:
    """0 where a query may see a key, -inf elsewhere: float32 [tiles, 1, rows, extent] for queries first to last.

    The same for all layers with this window, so it is kept in the plan unless it is large. Rows without a token see
    what the last token sees, so that no row is without keys.
    """
    key = (first, last, group)
    mask = work.masks.get(key)
    if mask is not None:
        return mask
    positions = torch.from_numpy(work.positions[first:last])
    if work.decode:
        starts = torch.from_numpy(work.starts[first:last])[:, None]
        tile_positions = positions[:, None]
    else:
        starts = torch.from_numpy(work.starts)[:, None]
        per_tile = rows // group
        num_tiles = -(-(last - first) // per_tile)
        row_tokens = torch.arange(rows).div(group, rounding_mode="floor").clamp_(max=per_tile - 1)
        tokens = (torch.arange(num_tiles)[:, None] * per_tile + row_tokens).clamp_(max=last - first - 1)
        tile_positions = positions[tokens]
    distance = (tile_positions - starts)[:, :, None] - torch.arange(work.extent)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    kept = sum(m.numel() * m.itemsize for m in work.masks.values())
    if kept + mask.numel() * mask.itemsize <= MAX_CACHED_MASK_BYTES:
        work.masks[key] = mask
    return mask
