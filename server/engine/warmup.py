"""The engine's first steps: they touch what later ones need, and tell how long steps take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from server.engine.config import SchedulerConfig, StepTimes
from server.engine.plan import PlannedRequest, StepPlan, StepRunner
from server.engine.request import Request, SamplingParams

# How long a step with running streams may take on account of a prompt beside them, as a multiple of a decode step and
# at least this many seconds: short enough not to be seen in a stream, long enough not to waste a step's fixed cost.
MIXED_STEP_DECODE_STEPS = 2.0
MIXED_STEP_MIN_SECONDS = 0.012

# How many tokens of a prompt are timed at its beginning and far along: about as many as there are beside streams.
CHUNK = 16

# How many rows are timed together: about as many as a step has that several tenants share.
SHARED_STEP_ROWS = 8

# And how often, or for how long, where a step takes long.
DECODE_ROUNDS = 30
DECODE_ROUNDS_SECONDS = 0.2

# A row of a shared step is taken for at least this part of a step of one, whatever a busy machine made of the rounds.
LEAST_ROW_PART = 64


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the first steps took, in seconds: one decode row, `num_rows` of them, a prompt of `prefill_tokens`, and a
    chunk of a prompt at its beginning and at position `context` (0: not measured)."""

    decode_seconds: float
    rows_seconds: float
    num_rows: int
    prefill_seconds: float
    prefill_tokens: int
    first_chunk_seconds: float = 0.0
    late_chunk_seconds: float = 0.0
    context: int = 0

    @property
    def mixed_step_tokens(self) -> int:
        """How many prompt tokens may share a step with running streams, at least one."""
        allowance = max(MIXED_STEP_MIN_SECONDS, MIXED_STEP_DECODE_STEPS * self.decode_seconds)
        return max(int(allowance * self.prefill_tokens / self.prefill_seconds), 1)

    @property
    def attention_span(self) -> int | None:
        """Where a prompt's token costs twice what it costs at the beginning; None: not known, or far away."""
        added = self.late_chunk_seconds - self.first_chunk_seconds
        if not self.context or added < 0.05 * self.first_chunk_seconds:
            return None
        return max(int(self.context * self.first_chunk_seconds / added), 1)

    @property
    def step_times(self) -> StepTimes:
        """What tenants share a step by. Of rows that come almost for nothing, a step has many."""
        decode_ns, token_ns = int(self.decode_seconds * 1e9), int(self.prefill_seconds / self.prefill_tokens * 1e9)
        more_ns = int((self.rows_seconds - self.decode_seconds) * 1e9) // max(self.num_rows - 1, 1)
        row_ns = min(max(more_ns, decode_ns // LEAST_ROW_PART, 1), decode_ns)
        return StepTimes(decode_ns - row_ns, row_ns, max(token_ns, 1))


def warm_up(runner: StepRunner, config: SchedulerConfig, num_tokens: int, context: int) -> WarmUp:
    """Touch the weights and the operators' caches, then time a prompt of about `num_tokens`, decode steps of one row
    and of several, and chunks of a prompt at its beginning and, unless it is 0, near position `context`.

    The plans are made by hand on blocks that nobody owns yet; their contents are overwritten before they are read. Far
    along in a sequence its blocks may be the same ones again: what attention reads does not change its time.
    """
    prompt_len = max(1, min(num_tokens, config.max_model_len - 2, config.max_tokens_per_step))
    chunk = min(CHUNK, prompt_len)
    context = max(0, min(context, config.max_model_len - 2 - chunk))
    num_rows = min(config.max_running, SHARED_STEP_ROWS)
    sampling = SamplingParams(max_new_tokens=2, temperature=1.0, top_k=50, top_p=0.9)
    short = [Request(index, [0] * prompt_len, sampling, output_token_ids=[0]) for index in range(num_rows)]
    long = [Request(num_rows, [0] * (context + chunk), sampling, output_token_ids=[0])]

    def timed(requests: list[Request], start: int, num_new_tokens: int, samples: bool = False) -> float:
        num_blocks = -(-(start + num_new_tokens) // config.block_size)
        blocks = tuple(index % config.num_blocks for index in range(num_blocks))
        planned = tuple(
            PlannedRequest(request, start, num_new_tokens, blocks, samples, output_index=1) for request in requests
        )
        began = time.perf_counter()
        runner.launch(StepPlan(0, planned)).result()
        return time.perf_counter() - began

    for _ in range(2):
        prefill = timed(short[:1], 0, prompt_len)
        decode, _ = timed(short[:1], prompt_len, 1, True), timed(short, prompt_len, 1, True)
    # Side by side, several times. Whatever else runs on the machine meanwhile makes steps longer, all of them or some:
    # so the larger of two ratios is taken, and a shared step has rather too few rows than too many.
    ones: list[float] = []
    several: list[float] = []
    began = time.perf_counter()
    while len(ones) < DECODE_ROUNDS and time.perf_counter() - began < DECODE_ROUNDS_SECONDS:
        ones.append(timed(short[:1], prompt_len, 1, True))
        several.append(timed(short, prompt_len, 1, True))
    decode = min(decode, *ones)
    ratios = (many / one for many, one in zip(several, ones, strict=True))
    rows = decode * max(statistics.median(ratios), min(several) / min(ones))
    first = late = 0.0
    if context:
        first, late = (min(timed(long, start, chunk) for _ in range(2)) for start in (0, context))
    return WarmUp(decode, rows, num_rows, prefill, prompt_len, first, late, context)
