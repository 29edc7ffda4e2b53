"""A device that stores one number a token position and computes the next token from the numbers it reads.

It knows of a request only what a plan says: which slots to read, which to write. A stale or foreign slot, a position
written twice or never, changes every token after it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from server.engine.plan import PlannedRequest, RowResult, StepPlan, StepResult
from server.engine.request import Request
from tests.simulation.oracle import draw, extend, salt_number, stored_value

NAN = None  # a stored value that makes everything computed from it a NaN


class ForwardError(Exception):
    """The forward pass of a whole step has raised: no result, and what was written is undefined."""


@dataclass
class Launch:
    """A plan as it was handed to the device: token ids are read at launch, as a batch is built then."""

    plan: StepPlan
    inputs: list[list[int]]
    nan_rows: frozenset[int] = frozenset()
    raises: bool = False
    extra_draws: int = 0
    result: StepResult | None = None
    error: ForwardError | None = None


@dataclass
class Device:
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    rng: random.Random
    slots: list[int | None] = field(default_factory=list)
    samples: dict[int, int | None] = field(default_factory=dict)  # of the step executed last

    def __post_init__(self) -> None:
        self.slots = [self.rng.getrandbits(64) for _ in range(self.num_blocks * self.block_size)]

    def launch(self, plan: StepPlan, **faults: object) -> Launch:
        inputs = []
        for planned in plan.requests:
            end = planned.start + planned.num_new_tokens
            inputs.append(planned.request.token_ids(planned.start, end - planned.num_inflight))
        return Launch(plan, inputs, **faults)  # type: ignore[arg-type]

    def execute(self, launch: Launch) -> None:
        """Run a launched plan; its `result` or `error` is set afterwards."""
        if launch.raises:
            for planned in launch.plan.requests:  # whatever was written before it raised
                for position in range(planned.start, planned.start + planned.num_new_tokens):
                    if self.rng.random() < 0.5:
                        self.slots[self._slot(planned, position)] = self.rng.getrandbits(64)
            launch.error = ForwardError(f"step {launch.plan.step_id}")
            return
        previous, self.samples = self.samples, {}
        rows = []
        for planned, inputs in zip(launch.plan.requests, launch.inputs, strict=True):
            if planned.num_inflight:
                inputs = [*inputs, previous[planned.request.request_id]]
            if len(inputs) != planned.num_new_tokens:
                raise AssertionError(f"{planned} lacks input tokens: {inputs}")
            rows.append(self._row(planned, inputs, launch))
        launch.result = StepResult(launch.plan.step_id, tuple(rows))

    def _slot(self, planned: PlannedRequest, position: int) -> int:
        return planned.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _row(self, planned: PlannedRequest, inputs: list[int | None], launch: Launch) -> RowResult:
        request = planned.request
        context = self._read(planned)
        if request.request_id in launch.nan_rows or NAN in inputs:
            context = NAN
        salt = salt_number(request.tenant, request.cache_salt)
        for position, token_id in enumerate(inputs, start=planned.start):
            value = NAN if context is NAN or token_id is NAN else stored_value(context, position, token_id, salt)
            self.slots[self._slot(planned, position)] = value
            context = NAN if context is NAN or value is NAN else extend(context, value)
        if context is NAN:
            self.samples[request.request_id] = NAN
            return RowResult(request.request_id, (), error="the logits are not finite")
        if not planned.samples:
            return RowResult(request.request_id, ())
        token_ids = self._draw(context, request, planned, launch.extra_draws)
        self.samples[request.request_id] = token_ids[0]
        return RowResult(request.request_id, tuple(token_ids))

    def _read(self, planned: PlannedRequest) -> int | None:
        """The digest of what the row attends to: every earlier position, through its block table."""
        context, size, slots = 0, self.block_size, self.slots
        for position in range(planned.start):
            value = slots[planned.block_ids[position // size] * size + position % size]
            if value is NAN:
                return NAN
            context = extend(context, value)
        return context

    def _draw(self, context: int, request: Request, planned: PlannedRequest, extra: int) -> list[int]:
        """One token, and as many more as a draft would have been right about."""
        salt, position = salt_number(request.tenant, request.cache_salt), planned.start + planned.num_new_tokens
        token_ids = [draw(context, request, planned.output_index, self.eos_token_ids)]
        for index in range(extra):
            context = extend(context, stored_value(context, position + index, token_ids[-1], salt))
            token_ids.append(draw(context, request, planned.output_index + index + 1, self.eos_token_ids))
        return token_ids
