"""What passes between the scheduler, the core and the device: a plan of one step, what came of it, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.engine.request import FinishReason, Request
from server.engine.scores import Details

# PlannedRequest, RowResult and RequestOutput are made for every row of every step and never changed. They are not
# declared frozen because then making one takes three times as long, which is felt with 64 streams.


@dataclass(slots=True)
class PlannedRequest:
    """One request's share of a step: compute positions start to start + num_new_tokens - 1.

    block_ids      its blocks at this step, enough for every position up to the last one computed
    samples        whether the last position computed is the sequence's last token, so that a token is drawn
    output_index   index, in the request's output, of the token drawn (when `samples`)
    num_inflight   how many of the last tokens to compute are not known yet when this plan is made, because they are
                   drawn by steps still in flight: 0, or 1 at pipeline depth 2 (the input token then comes from the
                   previous step's samples, on the device)
    """

    request: Request
    start: int
    num_new_tokens: int
    block_ids: tuple[int, ...]
    samples: bool
    output_index: int
    num_inflight: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: requests in a fixed order, back to back. Never empty.

    preempted_ids: requests that gave their blocks back for this step, for the log; displaced_ids: those that gave
    their place to another tenant.
    """

    step_id: int
    requests: tuple[PlannedRequest, ...]
    preempted_ids: tuple[int, ...] = ()
    displaced_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step."""
        return sum(planned.num_new_tokens for planned in self.requests)


@dataclass(slots=True)
class RowResult:
    """What a step made of one planned request.

    token_ids  tokens drawn: none if the plan said so or on an error; one today; several with speculative decoding
    error      why this request cannot go on (a NaN in its row), or None
    details    what else it has asked for
    """

    request_id: int
    token_ids: tuple[int, ...]
    error: str | None = None
    details: Details | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results in the order of the plan's requests."""

    step_id: int
    rows: tuple[RowResult, ...]


NOT_FINITE = "the model produced a number that is not finite"


def step_result(
    plan: StepPlan, finite: Sequence[bool], tokens: Sequence[int], finite_rows: Sequence[bool]
) -> StepResult:
    """What a step made of its plan, without details.

    finite: for each planned request, whether all that was computed for it is. tokens, finite_rows: for each that
    samples, in plan order, the token drawn, and whether the logits were finite.
    """
    rows: list[RowResult] = []
    row = 0
    for planned, sound in zip(plan.requests, finite, strict=True):
        drawn: tuple[int, ...] = ()
        if planned.samples:
            sound = sound and finite_rows[row]
            drawn = (tokens[row],)
            row += 1
        request_id = planned.request.request_id
        rows.append(RowResult(request_id, drawn) if sound else RowResult(request_id, (), NOT_FINITE))
    return StepResult(plan.step_id, tuple(rows))


def add_details(result: StepResult, details: Mapping[int, Details]) -> None:
    """Give the rows that did not fail what they asked for beside tokens, by their place in the plan."""
    for place, found in details.items():
        if result.rows[place].error is None:
            result.rows[place].details = found


class PendingStep(Protocol):
    """A step that was handed to the device."""

    def result(self) -> StepResult:
        """Wait until the step is over. Raises what `StepRunner.launch` raises, where the device tells it only now."""
        ...


class StepRunner(Protocol):
    """What computes steps, in the order in which they are launched."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin a step: compute the plan's positions, and draw a token for each request that samples.

        Where the device works beside the host this returns at once, and the next plan may be launched before the result
        of this one is collected. A plan's tokens that are not known yet (`num_inflight`) are those that the step
        launched before it draws. Raises what the model and the device raise; DeviceFault when the device is lost.
        """
        ...


class DeviceFault(Exception):
    """The device cannot be used by this process any more: only a new process can go on."""


@dataclass(slots=True)
class RequestOutput:
    """What the outside learns of one request from one step: its new tokens, and its end.

    stop_token_id  the token that ended it, when finish_reason is STOP (it is the last of token_ids)
    error          for the log, when finish_reason is ERROR
    details        of these tokens, and of the prompt
    """

    request: Request
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    details: Details | None = None


@dataclass(slots=True)
class StepCounters:
    """One step in numbers, as in messages.StepStats. What happens between two plans counts with the second one."""

    prompt_tokens: int = 0
    recomputed_tokens: int = 0
    sampled_tokens: int = 0
    pipeline_discarded_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0

    def add(self, other: StepCounters) -> None:
        """Take over what a plan had counted that was never completed."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
