"""One forward pass and the draw after it: the only file of the engine that touches the device in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.ops import AttentionPlan, KVCache, Ops
from models.layers import DecoderModel
from server.engine.batch import SamplingBuilder, build_batch
from server.engine.details import launch_details
from server.engine.plan import StepPlan, StepResult, add_details, step_result


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep whose result is there already."""

    finished: StepResult

    def result(self) -> StepResult:
        return self.finished


class Runner:
    """A StepRunner for devices that compute while the caller waits. Owns the KV cache of every layer; borrows the model
    and the device's ops.

    `run` changes the cache slots that its plan names and nothing else. It raises what the device raises: then the slots
    hold anything, and the caller computes them again or drops them.
    """

    def __init__(
        self,
        model: DecoderModel,
        ops: Ops,
        num_blocks: int,
        block_size: int,
        eos_token_ids: Sequence[int],
        kv_dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        max_running: int | None = None,
    ) -> None:
        """kv_dtype: of the KV cache; None: that of the ops. max_tokens, max_running: the most tokens and requests that
        a step may have; None: not known, and forward passes are not recorded (`Ops.record`)."""
        self.model = model
        self.ops = ops
        self._block_size = block_size
        self._sampling = SamplingBuilder(eos_token_ids)
        specs = model.kv_cache_specs(block_size, kv_dtype or ops.dtype)
        self.kv_caches: list[KVCache] = [ops.allocate_kv_cache(spec, num_blocks) for spec in specs]

        def forward(token_ids: Tensor, plan: AttentionPlan) -> Tensor:
            return model.forward(token_ids, self.kv_caches, plan)

        def decode(token_ids: Tensor, plan: AttentionPlan) -> Tensor:
            return model.raw_logits(model.forward(token_ids, self.kv_caches, plan))

        self._forward = forward if max_tokens is None else ops.record(forward, max_tokens, block_size)
        # Where all tokens draw, the logits are part of the same program: that spares two calls between which the
        # threads would wait for Python. With few rows, so that its logits take no more memory than they do anyway.
        self._decode = decode if max_running is None else ops.record(decode, max_running, block_size)

    def launch(self, plan: StepPlan) -> FinishedStep:
        """`run`, as a StepRunner."""
        return FinishedStep(self.run(plan))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's positions, and draw a token for each request that samples."""
        batch = build_batch(plan, self._block_size, self._sampling)
        attention = self.ops.plan(batch.attention)
        hidden = logits = token_ids = None
        if len(batch.sample_rows) == len(plan.requests) == len(batch.token_ids):
            # A row whose position is not finite has no finite logits either.
            logits = self.model.finish_logits(self._decode(batch.token_ids, attention))
            finite = [True] * len(plan.requests)
        else:
            hidden = self._forward(batch.token_ids, attention)
            # A position that is not finite has poisoned K and V behind it, whether or not a token is drawn from it.
            finite_tokens = np.isfinite(hidden.float().numpy()).all(axis=-1).tolist()
            finite = [
                all(finite_tokens[last + 1 - planned.num_new_tokens : last + 1])
                for planned, last in zip(plan.requests, batch.last_tokens, strict=True)
            ]
            if batch.sampling is not None:
                logits = self.model.logits(hidden[batch.sample_rows])
        tokens: list[int] = []
        finite_rows: list[bool] = []
        if logits is not None and batch.sampling is not None:
            sampled = self.ops.sample(logits, batch.sampling)
            token_ids, tokens = sampled.token_ids, sampled.token_ids.tolist()
            finite_rows = sampled.finite.tolist()
        asked = launch_details(
            plan, batch.sampling, model=self.model, ops=self.ops, hidden=hidden, logits=logits, token_ids=token_ids
        )
        result = step_result(plan, finite, tokens, finite_rows)
        if asked is not None:
            add_details(result, asked.read(tokens))
        return result
