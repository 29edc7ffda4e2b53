"""Once, when the engine starts on a GPU: does a row have the same bits in a prompt, in chunks, and in decode?

The kernels are made so that it has (docs/kernels.md), which the tests show on the compiled code of the versions that
they know. Another version of the compiler, or a device that none of us has seen, may break what they rest on, and
nobody would notice: the tokens would be good ones, just not always the same. So it is looked at, on the model served.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionMetadata, KVCacheSpec, Ops
from models.layers import DecoderModel

LENGTH = 300  # tokens: more than one piece of the attention's keys, and not a multiple of anything


@torch.inference_mode()
def rows_agree(model: DecoderModel, ops: Ops, specs: Sequence[KVCacheSpec], length: int = LENGTH) -> bool:
    """Whether the last hidden state of one sequence is the same three times: the whole prompt in one step; all but its
    last token in two chunks; that last token then decoded, and beside it the last of the first sequence once more.

    Takes a small KV cache of its own, one layer of it for each of `specs`.
    """
    length = min(length, model.config.max_position_embeddings)
    block_size = specs[0].block_size
    blocks = -(-length // block_size)
    caches = [ops.allocate_kv_cache(spec, 2 * blocks) for spec in specs]
    tables = (list(range(blocks)), list(range(blocks, 2 * blocks)))
    ids = [(7 * position + position * position // 5) % model.config.vocab_size for position in range(length)]

    def run(*rows: tuple[int, int, int]) -> Tensor:
        """Steps of (sequence, first position, one after the last) -> hidden states of all rows."""
        metadata = AttentionMetadata(
            query_lens=[end - start for _, start, end in rows],
            seq_lens=[end for _, _, end in rows],
            block_tables=[tables[sequence] for sequence, _, _ in rows],
            block_size=block_size,
        )
        flat = [token for _, start, end in rows for token in ids[start:end]]
        hidden = model.forward(torch.tensor(flat, device=ops.device), caches, ops.plan(metadata))
        return hidden.clone()

    whole = run((0, 0, length))[-1]
    run((1, 0, length // 3))
    run((1, length // 3, length - 1))
    decoded = run((1, length - 1, length), (0, length - 1, length))
    return torch.equal(decoded[0], whole) and torch.equal(decoded[1], whole)
