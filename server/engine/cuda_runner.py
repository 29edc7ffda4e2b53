"""Forward passes on CUDA: queued and not waited for, decode steps as CUDA graphs, drawn tokens kept on the device.

A step in which every request has one token to compute and draws the next one is a decode step. It runs in a bucket:
the smallest of a few fixed numbers of rows, in buffers that stay where they are, so that everything from the block
tables to the logits is one CUDA graph. Rows beyond the requests are padding, which reads and writes no block. Every
other step is launched kernel by kernel. Either way the draw follows on the device, and its tokens stay there as input
of the next step (`PlannedRequest.num_inflight`); the host learns of them when it collects the step, through page-locked
memory.

In Triton's interpreter the same code runs on the CPU, step by step and without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.cuda.ops import CudaOps
from kernels.cuda.plan import DecodeBatch, select_tokens
from kernels.ops import KVCache, SampleResult, SamplingMetadata
from models.layers import DecoderModel
from server.engine.batch import SamplingBuilder, build_batch
from server.engine.block_table_rows import BlockTableRows
from server.engine.cuda_step import CudaStep, StepBuffers, device_faults
from server.engine.details import StepDetails, launch_details
from server.engine.memory import decode_buckets
from server.engine.plan import DeviceFault, PlannedRequest, StepPlan
from server.engine.request import Request, SamplingParams

# Steps whose results may wait to be collected: one more than the pipeline has, so that none is overwritten.
_RESULT_SLOTS = 3


class CudaRunner:
    """A StepRunner. Owns the KV cache of every layer, the static buffers and the graphs; borrows model and ops.

    The steps of one runner go to one stream, in the order of their launches. After an exception in `launch` the slots
    of the plan hold anything, and everything else is as before.
    """

    def __init__(
        self,
        model: DecoderModel,
        ops: CudaOps,
        *,
        kv_dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        max_running: int,
        max_model_len: int,
        max_tokens_per_step: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.model = model
        self.ops = ops
        self.buckets = decode_buckets(max_running)
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_running = max_running
        self._max_model_len = max_model_len
        self._max_tokens = max_tokens_per_step
        self._on_gpu = ops.device.type == "cuda"
        max_rows = self.buckets[-1]
        with torch.inference_mode():
            specs = model.kv_cache_specs(block_size, kv_dtype)
            self.kv_caches: list[KVCache] = [ops.allocate_kv_cache(spec, num_blocks) for spec in specs]
            max_blocks = -(-max_model_len // block_size)
            self._decode = DecodeBatch(max_rows, max_blocks, block_size, ops.device, ops.upload)
            # One buffer for all buckets: a step's logits are drawn from before the next step begins. The copy into it
            # is one more pass over them, and saves every graph logits of its own.
            self._logits = torch.zeros(max_rows, model.config.vocab_size, dtype=ops.dtype, device=ops.device)
            self._finite = torch.zeros(max_rows, dtype=torch.bool, device=ops.device)
        self._rows = BlockTableRows(max_rows)
        self._sampling = SamplingBuilder(eos_token_ids)
        self._results = [StepBuffers(max_rows, max_tokens_per_step, self._on_gpu) for _ in range(_RESULT_SLOTS)]
        self._turn = 0
        # Where the tokens drawn by the step launched last lie in `sampled` on the device, by request id.
        self._drawn_at: dict[int, int] = {}
        self._bucket_of = [next(b for b in self.buckets if b >= rows) for rows in range(1, max_rows + 1)]
        self._graphs: dict[int, Any] = {}

    def launch(self, plan: StepPlan) -> CudaStep:
        """Queue a step. Raises DeviceFault when the device is lost, else what the kernels and the model raise."""
        try:
            with device_faults(), torch.inference_mode():
                if all(planned.num_new_tokens == 1 and planned.samples for planned in plan.requests):
                    return self._launch_decode(plan)
                return self._launch_mixed(plan)
        except DeviceFault:
            raise
        except Exception:
            self._drawn_at = {}
            self._rows.forget()
            self.ops.upload.send()  # what was put and not sent, so that the next step finds the upload empty
            raise

    # ---- decode steps ----

    def _launch_decode(self, plan: StepPlan) -> CudaStep:
        requests, drawn_at = plan.requests, self._drawn_at
        num_rows = len(requests)
        bucket = self._bucket_of[num_rows - 1]
        tokens: list[int] = []
        sources: list[int] = []
        seq_lens: list[int] = []
        for planned in requests:
            if planned.num_inflight:
                tokens.append(0)
                sources.append(drawn_at[planned.request.request_id])
            else:
                tokens.append(planned.request.token_ids(planned.start, planned.start + 1)[0])
                sources.append(-1)
            seq_lens.append(planned.start + 1)
        table_rows, updates = self._rows.assign(requests)
        self._decode.stage(bucket, tokens, sources, seq_lens, table_rows, updates)
        sampling = self._sampling.build(requests)
        pending = self._put_pending(sampling, sources)
        self.ops.upload.send()
        self._decode.apply_updates()
        last_tokens = pending()
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
        else:
            self._decode_forward(bucket)
        logits = self._logits[:num_rows]
        sampled = self.ops.sample(logits, sampling, last_tokens)
        details = self._details(plan, sampling, None, logits, sampled.token_ids)
        return self._finish(plan, sampled, sampled.finite.logical_and(self._finite[:num_rows]), None, details)

    def _decode_forward(self, bucket: int) -> None:
        """From the staged inputs of `bucket` rows to their logits, in static buffers: what a graph captures."""
        decode = self._decode
        decode.prepare(bucket)
        hidden = self.model.forward(decode.token_ids[:bucket], self.kv_caches, decode.plan(bucket))
        self._finite[:bucket].copy_(torch.isfinite(hidden).all(dim=-1))
        self._logits[:bucket].copy_(self.model.logits(hidden))

    # ---- all other steps ----

    def _launch_mixed(self, plan: StepPlan) -> CudaStep:
        upload = self.ops.upload
        batch = build_batch(plan, self._block_size, self._sampling)
        token_ids = upload.put(batch.token_ids.numpy())
        if batch.inflight:
            sources = np.full(batch.token_ids.shape, -1, dtype=np.int32)
            for index, request_id in batch.inflight:
                sources[index] = self._drawn_at[request_id]
            token_sources = upload.put(sources)
        pending: Callable[[], Tensor | None] = _nothing
        if batch.sampling is not None:
            sample_rows = upload.put(np.asarray(batch.sample_rows, dtype=np.int64))
            if batch.inflight:
                pending = self._put_pending(batch.sampling, sources[batch.sample_rows].tolist())
        attention = self.ops.plan(batch.attention)  # sends what was put
        if batch.inflight:
            token_ids = select_tokens(token_ids, token_sources, self._decode.sampled)
        last_tokens = pending()
        hidden = self.model.forward(token_ids, self.kv_caches, attention)
        # A position that is not finite has poisoned K and V behind it, whether or not a token is drawn from it.
        finite_tokens = torch.isfinite(hidden).all(dim=-1)
        if batch.sampling is None:
            return self._finish(plan, None, None, finite_tokens, self._details(plan, None, hidden, None, None))
        logits = self.model.logits(hidden.index_select(0, sample_rows))
        sampled = self.ops.sample(logits, batch.sampling, last_tokens)
        details = self._details(plan, batch.sampling, hidden, logits, sampled.token_ids)
        return self._finish(plan, sampled, sampled.finite, finite_tokens, details)

    # ---- what both share ----

    def _put_pending(self, sampling: SamplingMetadata, sources: Sequence[int]) -> Callable[[], Tensor | None]:
        """Put what is needed to tell the sampler of tokens that the host does not know (`Ops.sample`). What is returned
        is to be called after the upload was sent, and before the next draw: then it gives them, or None where no
        penalty asks for them.
        """
        if not any(sources[row] >= 0 for row in sampling.output_tokens):
            return _nothing
        at = self.ops.upload.put(np.asarray(sources, dtype=np.int32))
        none = self.ops.upload.put(np.full(len(sources), -1, dtype=np.int64))
        return lambda: select_tokens(none, at, self._decode.sampled)

    def _details(
        self,
        plan: StepPlan,
        sampling: SamplingMetadata | None,
        hidden: Tensor | None,
        logits: Tensor | None,
        token_ids: Tensor | None,
    ) -> StepDetails | None:
        return launch_details(
            plan, sampling, model=self.model, ops=self.ops, hidden=hidden, logits=logits, token_ids=token_ids
        )

    def _finish(
        self,
        plan: StepPlan,
        sampled: SampleResult | None,
        finite_rows: Tensor | None,
        finite_tokens: Tensor | None,
        details: StepDetails | None,
    ) -> CudaStep:
        """Keep the drawn tokens for the next step, and send them to the host."""
        results = self._results[self._turn]
        self._turn = (self._turn + 1) % _RESULT_SLOTS
        num_sampled = num_tokens = 0
        if sampled is not None and finite_rows is not None:
            num_sampled = sampled.token_ids.shape[0]
            self._decode.sampled[:num_sampled].copy_(sampled.token_ids)
            results.tokens[:num_sampled].copy_(sampled.token_ids, non_blocking=True)
            results.finite_rows[:num_sampled].copy_(finite_rows, non_blocking=True)
        if finite_tokens is not None:
            num_tokens = finite_tokens.shape[0]
            results.finite_tokens[:num_tokens].copy_(finite_tokens, non_blocking=True)
        if results.arrived is not None:
            results.arrived.record()
        drawn = [planned.request.request_id for planned in plan.requests if planned.samples]
        self._drawn_at = dict(zip(drawn, range(len(drawn)), strict=True))
        return CudaStep(plan, results, num_sampled, num_tokens, details)

    # ---- before the first request ----

    def run_worst_case(self) -> None:
        """The steps that need the most memory beside the KV cache: as many tokens as a step may have, and as many rows
        to draw from, with every filter; then the largest decode step."""
        self.launch(self._plan_of(self._max_tokens, self._max_running, _ALL_FILTERS)).result()
        self._warm_decode(self.buckets[-1])

    def compile_kernels(self, report: Callable[[float], None] = lambda fraction: None) -> None:
        """Compile what steps of every size need. report: told what part of it is done.

        Blocks are written whose content is of no use to anyone yet.
        """
        # The linear layers choose their tiles by classes of rows that begin behind powers of two, and for many rows
        # behind multiples of 128; with more than 8,192 all of them use their largest.
        sizes = sorted(
            {min(1 << power, self._max_tokens) for power in range(self._max_tokens.bit_length() + 1)}
            | set(range(128, min(self._max_tokens, 8192) + 1, 128))
        )
        num_all = len(sizes) + len(_WARM_PARAMS) + len(self.buckets)
        for num_done, size in enumerate(reversed(sizes)):
            self.launch(self._plan_of(size, 1, SamplingParams(2, temperature=0.0))).result()
            report(num_done / num_all)
        for num_done, params in enumerate(_WARM_PARAMS, start=len(sizes)):
            for num_rows in sorted({1, min(2, self._max_running), self._max_running}):
                for num_tokens in (num_rows, min(2 * num_rows, self._max_tokens)):
                    self.launch(self._plan_of(num_tokens, num_rows, params)).result()
                    # Once more, with the tokens that this has drawn as input.
                    self.launch(self._plan_of(num_tokens, num_rows, params, num_inflight=1)).result()
            report(num_done / num_all)
        for num_done, bucket in enumerate(reversed(self.buckets), start=len(sizes) + len(_WARM_PARAMS)):
            self._warm_decode(bucket)
            report(num_done / num_all)
        self._rows.forget()

    def capture_graphs(self, report: Callable[[float], None] = lambda fraction: None) -> None:
        """Capture the decode step of every bucket, the largest first, in one pool: each finds what the one before it
        needed there, and takes no more. Nothing on a device without graphs."""
        if not self._on_gpu:
            return
        pool = torch.cuda.graph_pool_handle()
        for num_done, bucket in enumerate(reversed(self.buckets)):
            self._warm_decode(bucket)
            self._capture(bucket, pool)
            report(num_done / len(self.buckets))

    def _warm_decode(self, bucket: int) -> None:
        """One decode step of padding alone: every kernel runs, and no block is touched."""
        with device_faults(), torch.inference_mode():
            self._decode.stage(bucket, [], [], [], [], [])
            self.ops.upload.send()
            self._decode_forward(bucket)

    def _capture(self, bucket: int, pool: Any) -> None:
        with device_faults(), torch.inference_mode():
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode_forward(bucket)
            self._graphs[bucket] = graph

    def _plan_of(self, num_tokens: int, num_rows: int, params: SamplingParams, num_inflight: int = 0) -> StepPlan:
        """A step of `num_tokens` tokens in at least `num_rows` sequences, one token drawn for each of `num_rows`. With
        `num_inflight`, the last token of each of these is one that the step before has drawn.

        The sequences share their blocks: what is written there is of no use to anyone.
        """
        capacity = min(self._num_blocks * self._block_size, self._max_model_len)
        num_sequences = max(num_rows, -(-num_tokens // capacity))
        length, longer = divmod(num_tokens, num_sequences)
        planned: list[PlannedRequest] = []
        for index in range(num_sequences):
            count = length + (index < longer)
            blocks = tuple(range(-(-count // self._block_size)))
            request = Request(-1 - index, [0] * count, params)
            if params.grammar:
                request.matcher = _AnyToken(self.model.config.vocab_size)
            samples = index < num_rows
            inflight = num_inflight if samples else 0
            planned.append(PlannedRequest(request, 0, count, blocks, samples, output_index=0, num_inflight=inflight))
        return StepPlan(0, tuple(planned))


def _nothing() -> None:
    return None


class _AnyToken:
    """A TokenMatcher that lets everything follow: the sampler's kernel for masks is to be compiled like the others."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, dtype=np.uint32)

    def mask(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.uint32]:
        """All ones."""
        return self._mask


_ALL_FILTERS = SamplingParams(
    2,
    min_new_tokens=1,
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((0, 1.0),),
    num_logprobs=20,
    num_prompt_logprobs=20,
    explain=20,
)

# What requests ask for, as far as it makes the sampler launch other kernels.
_WARM_PARAMS = (
    SamplingParams(2, temperature=0.0),
    SamplingParams(2, temperature=0.8),
    SamplingParams(2, temperature=0.8, top_p=0.9),
    SamplingParams(2, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(2, temperature=0.8, typical_p=0.9),
    SamplingParams(2, repetition_penalty=1.1, presence_penalty=0.1),
    SamplingParams(2, logit_bias=((0, 1.0),)),
    SamplingParams(2, grammar="any"),
    _ALL_FILTERS,
)
