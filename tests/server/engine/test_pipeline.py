"""EngineCore with two steps in flight, on a device that computes tokens from its blocks and fails on cue."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from server.engine.config import SchedulerConfig
from server.engine.core import EngineCore, StepOutcome
from server.engine.plan import DeviceFault, RequestOutput, StepPlan, StepResult
from server.engine.request import FinishReason, Request, SamplingParams
from server.engine.scheduler import Scheduler
from tests.server.engine.cores import tokens_of
from tests.simulation.device import Device, Launch
from tests.simulation.oracle import VOCAB_SIZE, answer

EOS = (3,)

# What happens to a step: nothing, an exception when it is launched or when it is waited for, or the device is lost.
Fault = Callable[[StepPlan], str | None]


@dataclass(frozen=True)
class Pending:
    runner: ScriptedRunner
    launch: Launch
    fault: str | None

    def result(self) -> StepResult:
        runner = self.runner
        runner.now += 1.0
        runner.log.append(("collect", self.launch.plan.step_id))
        if self.fault == "lost":
            raise DeviceFault("planted")
        if self.launch.error is not None:
            raise self.launch.error
        assert self.launch.result is not None
        return self.launch.result


class ScriptedRunner:
    """Computes a step as soon as it is launched, as a device does that is never waited for; the result comes later."""

    def __init__(self, config: SchedulerConfig, fault: Fault) -> None:
        self.device = Device(config.num_blocks, config.block_size, config.eos_token_ids, random.Random(1))
        self.fault = fault
        self.log: list[tuple[str, int]] = []
        self.now = 0.0

    def launch(self, plan: StepPlan) -> Pending:
        fault = self.fault(plan)
        if fault == "launch":
            raise RuntimeError("planted")
        self.now += 0.25
        self.log.append(("launch", plan.step_id))
        launch = self.device.launch(plan, raises=fault == "result")
        self.device.execute(launch)
        if launch.error is not None:  # steps that were launched on top of it draw what they like
            self.device.samples = {planned.request.request_id: 1 for planned in plan.requests}
        return Pending(self, launch, fault)


def make(depth: int = 2, fault: Fault = lambda plan: None, **settings: int) -> tuple[EngineCore, ScriptedRunner]:
    config = SchedulerConfig(
        **{"num_blocks": 64, "block_size": 4, "max_model_len": 60, "max_running": 6, "max_tokens_per_step": 24}
        | {"mixed_step_tokens": 8, "pipeline_depth": depth}
        | settings,
        eos_token_ids=EOS,
    )
    runner = ScriptedRunner(config, fault)
    return EngineCore(runner, Scheduler(config), clock=lambda: runner.now), runner


def some_requests(count: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            request_id,
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))],
            SamplingParams(rng.randint(1, 20), seed=rng.getrandbits(32), ignore_eos=rng.random() < 0.5),
            arrival=request_id,
        )
        for request_id in range(count)
    ]


def drive(
    core: EngineCore, requests: Iterable[Request], between_steps: Callable[[], None] = lambda: None
) -> tuple[dict[int, list[RequestOutput]], list[StepOutcome]]:
    outputs: dict[int, list[RequestOutput]] = {}
    outcomes: list[StepOutcome] = []
    for request in requests:
        core.add(request)
        outputs[request.request_id] = []
    for _ in range(2000):
        if not core.has_work:
            return outputs, outcomes
        for outcome in core.step():
            outcomes.append(outcome)
            for output in outcome.outputs:
                outputs[output.request.request_id].append(output)
        core.scheduler.check_integrity()
        between_steps()
    raise AssertionError("no end")


def right(request: Request) -> list[int]:
    fresh = Request(request.request_id, list(request.prompt_token_ids), request.params)
    return list(answer(fresh, 60, EOS).token_ids)


@pytest.mark.parametrize("num_blocks", [64, 16])
def test_the_tokens_are_those_of_one_step_at_a_time(num_blocks: int) -> None:
    for seed in range(5):
        requests = some_requests(9, seed)
        expected = [right(request) for request in requests]
        core, _ = make(num_blocks=num_blocks)
        outputs, outcomes = drive(core, requests)
        assert [tokens_of(outputs[i]) for i in range(9)] == expected
        assert all(o[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for o in outputs.values())
        assert core.scheduler.pool.num_used == 0
        assert core.scheduler.num_in_flight == 0
        # A token that follows the last one of a stream was on its way already, and is counted.
        drawn = sum(outcome.counters.sampled_tokens for outcome in outcomes)
        discarded = sum(outcome.counters.pipeline_discarded_tokens for outcome in outcomes)
        assert drawn - discarded == sum(map(len, expected))
        assert [outcome.step_id for outcome in outcomes] == sorted(outcome.step_id for outcome in outcomes)


def test_the_next_step_is_launched_before_the_last_one_is_collected() -> None:
    core, runner = make()
    core.add(Request(0, [5, 6], SamplingParams(4, ignore_eos=True)))
    assert core.step() == []
    assert runner.log == [("launch", 0)]
    assert [len(outcome.outputs) for outcome in core.step()] == [1]
    assert runner.log == [("launch", 0), ("launch", 1), ("collect", 0)]
    while core.has_work:
        core.step()
    assert runner.log[-3:] == [("launch", 3), ("collect", 2), ("collect", 3)], "the last step plans nothing and waits"
    assert core.step() == []


def test_one_at_a_time_stays_one_at_a_time() -> None:
    core, runner = make(depth=1)
    core.add(Request(0, [5, 6], SamplingParams(4, ignore_eos=True)))
    while core.has_work:
        assert len(core.step()) == 1
    assert runner.log == [(what, step) for step in range(4) for what in ("launch", "collect")]


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    core, runner = make()
    told: list[tuple[int, float]] = []
    core._on_step_start = lambda step_id, predicted: told.append((step_id, predicted))
    _, outcomes = drive(core, [Request(0, [5, 6], SamplingParams(5, ignore_eos=True))])
    # A launch takes 0.25, a wait 1.0. The first step was launched at 0 and is over at 1.5, after the second launch.
    assert [outcome.duration_seconds for outcome in outcomes] == [1.25 + 0.25, 1.25, 1.25, 1.25, 1.0]
    assert [step_id for step_id, _ in told] == [0, 0, 1, 2, 3, 4], "the oldest that is not over"
    assert told[2][1] >= 2 * told[0][1] + 2 * 1.25, "what may be waited for is all that is in flight"
    assert sum(outcome.duration_seconds for outcome in outcomes) == runner.now


@pytest.mark.parametrize("when", ["launch", "result"])
def test_a_request_that_makes_a_step_raise_ends_alone(when: str) -> None:
    for culprit in range(6):

        def fault(plan: StepPlan, culprit: int = culprit) -> str | None:
            return when if any(p.request.request_id == culprit and p.output_index > 2 for p in plan.requests) else None

        core, _ = make(fault=fault)
        requests = some_requests(6, seed=4)
        for request in requests:
            request.params = SamplingParams(9, seed=request.params.seed, ignore_eos=True)
        outputs, _ = drive(core, requests)
        for request in requests:
            tokens, last = tokens_of(outputs[request.request_id]), outputs[request.request_id][-1]
            if request.request_id == culprit:
                assert last.finish_reason is FinishReason.ERROR
                assert tokens == right(request)[:3]
            else:
                assert tokens == right(request)
        assert core.scheduler.pool.num_used == 0


@pytest.mark.parametrize("when", ["launch", "result"])
def test_steps_that_fail_now_and_then_cost_no_token(when: str) -> None:
    """As when memory runs out in a large step: alone, every request gets through."""
    rng = random.Random(7)

    def fault(plan: StepPlan) -> str | None:
        return when if len(plan.requests) > 1 and rng.random() < 0.3 else None

    core, _ = make(fault=fault, num_blocks=20)
    requests = some_requests(8, seed=2)
    outputs, _ = drive(core, requests)
    assert [tokens_of(outputs[request.request_id]) for request in requests] == [right(r) for r in requests]


@pytest.mark.parametrize("when", ["launch", "result"])
def test_aborts_meet_steps_in_flight_and_failures(when: str) -> None:
    for seed in range(8):
        rng = random.Random(seed)

        def fault(plan: StepPlan, rng: random.Random = rng) -> str | None:
            return when if len(plan.requests) > 1 and rng.random() < 0.1 else None

        core, _ = make(fault=fault)
        requests = some_requests(10, seed)
        gone: set[int] = set()

        def abort_one(rng: random.Random = rng, core: EngineCore = core, gone: set[int] = gone) -> None:
            if rng.random() < 0.2:
                victim = rng.randrange(10)
                gone.add(victim)
                core.abort([victim])

        outputs, _ = drive(core, requests, abort_one)
        for request in requests:
            tokens = tokens_of(outputs[request.request_id])
            expected = right(request)
            assert tokens == expected[: len(tokens)]
            assert tokens == expected or request.request_id in gone
        assert core.scheduler.pool.num_used == 0


def test_the_blocks_of_an_aborted_request_are_free_when_its_steps_are_over() -> None:
    core, _ = make(prefix_caching=False)
    core.add(Request(0, [5] * 9, SamplingParams(9, ignore_eos=True)))
    core.step()
    core.abort([0])
    assert core.scheduler.pool.num_used == 3
    assert core.has_work
    assert [outcome.outputs for outcome in core.step()] == [[]]
    assert core.scheduler.pool.num_used == 0
    assert not core.has_work


@pytest.mark.parametrize("depth", [1, 2])
def test_a_lost_device_is_not_tried_again(depth: int) -> None:
    core, runner = make(depth, fault=lambda plan: "lost" if plan.step_id == 3 else None)
    with pytest.raises(DeviceFault):
        drive(core, some_requests(3))
    assert runner.log[-1] == ("collect", 3)


def test_a_device_that_is_lost_while_requests_are_tried_alone() -> None:
    core, _ = make(fault=lambda plan: "result" if len(plan.requests) > 1 else "lost")
    with pytest.raises(DeviceFault):
        drive(core, some_requests(3))
