"""Drive a model through its paged KV cache, one sequence or several, in any chunks: an engine in 60 lines."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, Ops
from models.layers import DecoderModel

BLOCK_SIZE = 16


class PagedSequences:
    """Sequences of at most `max_tokens` tokens each, whose blocks lie scattered over the pool in a seeded order."""

    def __init__(self, model: DecoderModel, ops: Ops, count: int, max_tokens: int, seed: int = 0) -> None:
        self.model, self.ops = model, ops
        per_sequence = -(-max_tokens // BLOCK_SIZE)
        blocks = list(range(count * per_sequence + 3))
        random.Random(seed).shuffle(blocks)
        self.tables = [blocks[s * per_sequence : (s + 1) * per_sequence] for s in range(count)]
        self.lengths = [0] * count
        specs = model.kv_cache_specs(BLOCK_SIZE, ops.dtype)
        self.caches = [ops.allocate_kv_cache(spec, len(blocks)) for spec in specs]

    @torch.inference_mode()
    def step(self, tokens: dict[int, list[int]]) -> dict[int, Tensor]:
        """Run new tokens of some sequences in one step; return their logits, [new tokens, V] a sequence."""
        for sequence, new in tokens.items():
            self.lengths[sequence] += len(new)
        metadata = AttentionMetadata(
            query_lens=[len(new) for new in tokens.values()],
            seq_lens=[self.lengths[sequence] for sequence in tokens],
            block_tables=[self.tables[sequence] for sequence in tokens],
            block_size=BLOCK_SIZE,
        )
        flat = [token for new in tokens.values() for token in new]
        token_ids = torch.tensor(flat, device=self.ops.device)
        hidden = self.model.forward(token_ids, self.caches, self.ops.plan(metadata))
        logits = self.model.logits(hidden).float().clone()
        return dict(zip(tokens, logits.split(metadata.query_lens), strict=True))


def greedy(
    model: DecoderModel, ops: Ops, prompts: Sequence[list[int]], num_tokens: int, chunks: int = 1
) -> list[tuple[list[int], Tensor]]:
    """Continue every prompt, all in one batch. The prompts arrive in `chunks` steps, then a token a step.

    Returns of each sequence its `num_tokens` new ids and the logits [prompt + num_tokens - 1, V] of all positions.
    """
    sequences = PagedSequences(model, ops, len(prompts), max(map(len, prompts)) + num_tokens)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    for chunk in range(chunks):
        cuts = [[len(prompt) * c // chunks for c in (chunk, chunk + 1)] for prompt in prompts]
        rows = sequences.step({s: prompt[slice(*cuts[s])] for s, prompt in enumerate(prompts)})
        for s, row in rows.items():
            logits[s].append(row)
    for _ in range(num_tokens - 1):
        for s in range(len(prompts)):
            ids[s].append(int(logits[s][-1][-1].argmax()))
        for s, row in sequences.step({s: [new[-1]] for s, new in enumerate(ids)}).items():
            logits[s].append(row)
    for s in range(len(prompts)):
        ids[s].append(int(logits[s][-1][-1].argmax()))
    return [(new, torch.cat(rows)) for new, rows in zip(ids, logits, strict=True)]
