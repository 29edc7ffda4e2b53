"""EngineCore: the engine without its process. Add requests, step, collect tokens; abort at any step boundary.

This is the Python surface that tests, benchmarks and evaluation use. It knows neither sockets nor messages.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from server.engine.admission import AdmissionError, token_limit
from server.engine.grammar import GrammarError, Grammars
from server.engine.plan import DeviceFault, PendingStep, RequestOutput, RowResult, StepPlan, StepResult, StepRunner
from server.engine.request import Request
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


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and whose result was not collected."""

    plan: StepPlan
    pending: PendingStep
    launched: float


class EngineCore:
    """Owns the scheduler, the runner, the steps in flight and the requests' timelines.

    Up to `pipeline_depth` steps are in flight: while the device computes one, the host plans and launches the next.
    `grammars` is set by whoever has a tokenizer for them. `on_step_start(step_id, predicted_seconds)` is told, for the
    heartbeat, before the core launches or waits: the oldest step that is not over, and how long everything in flight
    should take at most.
    """

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.perf_counter,
        on_step_start: Callable[[int, float], None] = lambda step_id, predicted: None,
    ) -> None:
        self.grammars: Grammars | None = None
        self.scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._on_step_start = on_step_start
        self.cost = StepCost()
        self._timelines: dict[int, Timeline] = {}
        self._flights: deque[_Flight] = deque()  # oldest first, as in the scheduler
        self._last_end = -math.inf

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do: anything is open, or in flight."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises AdmissionError if it can never fit, or its grammar cannot be used; ValueError if its
        id is open already."""
        if request.params.grammar:
            if self.grammars is None:
                raise AdmissionError("this engine has no tokenizer, which grammars need")
            try:
                request.matcher = self.grammars.matcher(request.params.grammar)
                request.matcher.mask(request.output_token_ids)
            except GrammarError as error:
                raise AdmissionError(f"the grammar cannot be used: {error}") from error
        self.scheduler.add(request)
        self._timelines[request.request_id] = Timeline(added=self._clock())

    def cached_tokens(self, request: Request) -> int:
        """How much of its prompt a request would find in the prefix cache now. Raises AdmissionError as `add` does."""
        token_limit(request, self.scheduler.config)
        return self.scheduler.cached_tokens(request)

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests without a word; unknown and finished ids are ignored. Blocks that no step in flight uses are
        free at once, the others when that step is over."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)
            self._timelines.pop(request_id, None)

    def step(self) -> list[StepOutcome]:
        """Launch the next step if there is one to plan; then, if the pipeline is full or nothing could be planned,
        wait for the oldest. So a call that does not launch waits: a loop around it never spins.

        Empty while idle, and when it has only launched; more than one outcome only after a failed forward pass. When
        one raises, it and every later one are rolled back and each of its requests is computed alone; those that raise
        alone end with ERROR, and their neighbours lose nothing. A DeviceFault passes through: nothing can be computed
        after it, and what was in flight is lost.
        """
        plan = self.scheduler.schedule()
        if plan is None and not self._flights:
            return []
        self._announce(plan)
        if plan is not None:
            try:
                self._flights.append(self._launch(plan))
            except DeviceFault:
                raise
            except Exception:
                # Those before it are sound, and what they draw is what the requests go on from when computed alone.
                outcomes: list[StepOutcome] = []
                while self._flights:
                    outcomes += self._collect()
                if self.scheduler.num_in_flight:  # else it was rolled back together with an older one
                    outcomes += self._separate(plan)
                return outcomes
            if len(self._flights) < self.scheduler.config.pipeline_depth:
                return []
        return self._collect()

    def _announce(self, plan: StepPlan | None) -> None:
        """Tell the heartbeat which step is due, and how long the core may have to wait for all that is in flight."""
        plans = [flight.plan for flight in self._flights]
        if plan is not None:
            plans.append(plan)
        self._on_step_start(plans[0].step_id, sum(self.cost.predict(each.num_tokens) for each in plans))

    def _launch(self, plan: StepPlan) -> _Flight:
        started = self._clock()
        for planned in plan.requests:
            timeline = self._timelines[planned.request.request_id]
            if timeline.scheduled is None:
                timeline.scheduled = started
        return _Flight(plan, self._runner.launch(plan), started)

    def _collect(self) -> list[StepOutcome]:
        """Wait for the oldest step."""
        flight = self._flights.popleft()
        try:
            result = flight.pending.result()
        except DeviceFault:
            raise
        except Exception:
            self._flights.clear()  # they went on from what this one should have computed
            return self._separate(flight.plan)
        return [self._finish(flight, result)]

    def _separate(self, plan: StepPlan) -> list[StepOutcome]:
        """Undo a step whose forward pass has just raised, and every later one; compute its requests one by one."""
        logger.exception("step %d failed; computing its %d requests one by one", plan.step_id, len(plan.requests))
        self.scheduler.rollback(plan.step_id)
        outcomes = (self._step_alone(planned.request) for planned in plan.requests)
        return [outcome for outcome in outcomes if outcome is not None]

    def _step_alone(self, request: Request) -> StepOutcome | None:
        plan = self.scheduler.schedule(only=request.request_id)
        if plan is None:
            return None  # it has ended, or has to stand still for lack of blocks; a later step will find out about it
        self._announce(plan)
        started = self._clock()
        try:
            flight = self._launch(plan)
            result = flight.pending.result()
        except DeviceFault:
            raise
        except Exception as error:
            logger.exception("request %d fails alone and ends", request.request_id)
            cause = str(error) if isinstance(error, GrammarError) else f"the forward pass raised {type(error).__name__}"
            row = RowResult(request.request_id, (), cause)
            return self._update(plan, StepResult(plan.step_id, (row,)), started, self._clock())
        return self._finish(flight, result)

    def _finish(self, flight: _Flight, result: StepResult) -> StepOutcome:
        ended = self._clock()
        # The device begins a step when it is launched, or when the one before it is over.
        started = max(flight.launched, self._last_end)
        self._last_end = ended
        self.cost.observe(flight.plan.num_tokens, ended - started)
        return self._update(flight.plan, result, started, ended)

    def _update(self, plan: StepPlan, result: StepResult, started: float, ended: float) -> StepOutcome:
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
