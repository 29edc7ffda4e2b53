"""EngineCore: the engine without its process. Add requests, step, collect tokens; abort at any step boundary.

This is the Python surface that tests, benchmarks and evaluation use. It knows neither sockets nor messages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from server.engine.plan import RequestOutput, RowResult, StepPlan, StepResult
from server.engine.request import Request
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler, StepCounters

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Timeline:
    """When a request reached each stage, in seconds of the core's clock; None: not yet."""

    added: float
    scheduled: float | None = None
    first_token: float | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one executed step brought.

    first_tokens: the timelines of the requests whose first token (since they were added here) is in `outputs`.
    """

    step_id: int
    duration_seconds: float
    counters: StepCounters
    outputs: list[RequestOutput]
    first_tokens: dict[int, Timeline] = field(default_factory=dict)


class StepCost:
    """Predicts a step's duration from earlier ones: a fixed part and a part for each token, the dearest seen lately.

    Used only to tell a long step from a hung one, so it errs on the long side.
    """

    def __init__(self) -> None:
        self.fixed_seconds = 0.0
        self.seconds_per_token = 0.0

    def predict(self, num_tokens: int) -> float:
        """Seconds that a step of so many tokens should take at most; 0 before the first step."""
        return self.fixed_seconds + num_tokens * self.seconds_per_token

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take a finished step into account; older dear steps fade."""
        self.fixed_seconds = max(self.fixed_seconds * 0.99, seconds if num_tokens <= 8 else 0.0)
        self.seconds_per_token = max(self.seconds_per_token * 0.99, seconds / num_tokens)


class EngineCore:
    """Owns the scheduler, the runner and the requests' timelines.

    `on_step_start(step_id, predicted_seconds)` is told before each forward pass, for the heartbeat.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.perf_counter,
        on_step_start: Callable[[int, float], None] = lambda step_id, predicted: None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._on_step_start = on_step_start
        self._cost = StepCost()
        self._timelines: dict[int, Timeline] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises AdmissionError if it can never fit, ValueError if its id is open already."""
        self.scheduler.add(request)
        self._timelines[request.request_id] = Timeline(added=self._clock())

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests without a word; unknown and finished ids are ignored. Their blocks are free at once."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)
            self._timelines.pop(request_id, None)

    def step(self) -> list[StepOutcome]:
        """Run the next step. Empty when idle; more than one outcome only after a failed forward pass.

        When a forward pass raises, its plan is rolled back and each of its requests is computed alone; those that
        raise alone end with ERROR, and their neighbours lose nothing.
        """
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        started = self._clock()
        try:
            result = self._run(plan)
        except Exception:
            logger.exception("step %d failed; computing its %d requests one by one", plan.step_id, len(plan.requests))
            self.scheduler.rollback(plan.step_id)
            outcomes = (self._step_alone(planned.request) for planned in plan.requests)
            return [outcome for outcome in outcomes if outcome is not None]
        return [self._finish(plan, result, started)]

    def _step_alone(self, request: Request) -> StepOutcome | None:
        plan = self.scheduler.schedule(only=request.request_id)
        if plan is None:
            return None  # it has to stand still for lack of blocks; a later step will find out about it
        started = self._clock()
        try:
            result = self._run(plan)
        except Exception as error:
            logger.exception("request %d fails alone and ends", request.request_id)
            row = RowResult(request.request_id, (), f"the forward pass raised {type(error).__name__}")
            result = StepResult(plan.step_id, (row,))
        return self._finish(plan, result, started)

    def _run(self, plan: StepPlan) -> StepResult:
        """The forward pass and the draw. Raises what the device raises: only this may fail and be tried again."""
        num_tokens = plan.num_tokens
        self._on_step_start(plan.step_id, self._cost.predict(num_tokens))
        started = self._clock()
        for planned in plan.requests:
            timeline = self._timelines[planned.request.request_id]
            if timeline.scheduled is None:
                timeline.scheduled = started
        result = self._runner.run(plan)
        self._cost.observe(num_tokens, self._clock() - started)
        return result

    def _finish(self, plan: StepPlan, result: StepResult, started: float) -> StepOutcome:
        ended = self._clock()
        outputs = self.scheduler.update(result)
        first_tokens: dict[int, Timeline] = {}
        for output in outputs:
            request_id = output.request.request_id
            timeline = self._timelines[request_id]
            if output.token_ids and timeline.first_token is None:
                timeline.first_token = ended
                first_tokens[request_id] = timeline
            if output.finish_reason is not None:
                del self._timelines[request_id]
        return StepOutcome(plan.step_id, ended - started, self.scheduler.last_step, outputs, first_tokens)
