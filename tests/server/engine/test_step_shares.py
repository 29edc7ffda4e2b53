"""How a step is shared out between tenants, and what comes of it: a quiet one beside a flood, on a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.config import SchedulerConfig, StepTimes
from server.engine.plan import RowResult, StepPlan, StepResult
from server.engine.request import Request, RequestStatus, SamplingParams
from server.engine.scheduler import Scheduler
from server.engine.step_shares import shared_out, step_shares

# As measured with the embedded model on two cores.
TIMES = StepTimes(base_ns=650_000, row_ns=105_000, token_ns=54_000)

wanted = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), min_size=1)


@given(wanted, st.integers(0, 4000))
def test_shares_are_max_min_fair(wanted: dict[str, int], amount: int) -> None:
    shares = shared_out(wanted, amount)
    assert shares.keys() == wanted.keys()
    assert sum(shares.values()) == min(amount, sum(wanted.values())) or sum(wanted.values()) >= amount
    for tenant, share in shares.items():
        assert 0 <= share <= wanted[tenant]
        if share < wanted[tenant]:
            assert max(shares.values()) <= share + 1, "who wants more than it has, has as much as any"
    assert sum(shares.values()) >= min(amount, sum(wanted.values())) - len(wanted)


@given(wanted, st.integers(0, 4000))
def test_the_one_that_wants_least_gets_it_and_its_step_stays_short(wanted: dict[str, int], base: int) -> None:
    shares, least = step_shares(wanted, base), min(wanted.values())
    assert min(shares.values()) == least
    assert base + sum(shares.values()) <= max(1.125 * (base + least), base + len(wanted) * least)


class Clock:
    """A scheduler's steps, each as long as its rows and prompt tokens make it."""

    def __init__(self, depth: int, prefix_caching: bool = False) -> None:
        config = SchedulerConfig(4096, mixed_step_tokens=432, pipeline_depth=depth, step_times=TIMES)
        self.scheduler = Scheduler(replace(config, prefix_caching=prefix_caching))
        self.now = self.num_rows = 0
        self.plans: list[StepPlan] = []
        self.ids = iter(range(1, 1 << 30))

    def add(self, tenant: str, prompt_tokens: int, new_tokens: int) -> Request:
        request_id = next(self.ids)
        params = SamplingParams(new_tokens, ignore_eos=True)
        request = Request(request_id, [5] * prompt_tokens, params, tenant=tenant, arrival=request_id)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            if len(self.plans) < self.scheduler.config.pipeline_depth:
                return
        plan = self.plans.pop(0)
        tokens = sum(p.num_new_tokens for p in plan.requests if p.num_new_tokens > 1)
        rows = sum(p.num_new_tokens == 1 for p in plan.requests)
        self.num_rows = rows
        self.now += TIMES.base_ns + rows * TIMES.row_ns + tokens * TIMES.token_ns
        rows_of = (RowResult(p.request.request_id, (7,) if p.samples else ()) for p in plan.requests)
        self.scheduler.update(StepResult(plan.step_id, tuple(rows_of)))


def latencies(clock: Clock, flood: tuple[int, int] | None, prompt: int, new_tokens: int) -> Iterator[int]:
    """Of requests that a quiet tenant sends one after the other; the flood always has 100 open."""
    storm: list[Request] = []

    def step() -> None:
        storm[:] = [request for request in storm if request.status is not RequestStatus.FINISHED]
        if flood is not None:
            storm.extend(clock.add("flood", *flood) for _ in range(100 - len(storm)))
        clock.step()

    for _ in range(50 if flood is not None else 0):
        step()
    for _ in range(25):
        began, request = clock.now, clock.add("quiet", prompt, new_tokens)
        while request.status is not RequestStatus.FINISHED:
            step()
        yield clock.now - began


def p95(values: Iterator[int]) -> int:
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("flood", [(4, 16), (4, 900), (900, 100)], ids=str)
@pytest.mark.parametrize("quiet", [(4, 64), (400, 32)], ids=str)
def test_a_flood_leaves_a_quiet_tenants_latency_within_twice_its_own(
    quiet: tuple[int, int], flood: tuple[int, int], depth: int
) -> None:
    """With the 64 places of a default server, all of them taken: by short streams, long ones, and long prompts."""
    alone = p95(latencies(Clock(depth), None, *quiet))
    beside = p95(latencies(Clock(depth), flood, *quiet))
    assert beside <= 2 * alone, f"{beside / alone:.2f}"


def test_streams_that_wait_for_their_turn_all_go_on() -> None:
    clock = Clock(1)
    storm = [clock.add("flood", 4, 100) for _ in range(60)]
    for _ in range(5):
        clock.step()
    before = [len(request.output_token_ids) for request in storm]
    quiet = clock.add("quiet", 4, 300)
    while len(quiet.output_token_ids) < 250:
        clock.step()
    counts = [len(request.output_token_ids) - count for request, count in zip(storm, before, strict=True)]
    assert min(counts) > 2
    assert max(counts) - min(counts) <= 1


def test_one_tenant_alone_has_the_whole_step() -> None:
    clock = Clock(1)
    for _ in range(64):
        clock.add("flood", 4, 100)
    for _ in range(3):
        clock.step()
    plan = clock.scheduler.schedule()
    assert plan is not None
    assert len(plan.requests) == 64


def test_a_tenant_that_has_just_run_finds_short_steps_and_one_that_is_gone_costs_nothing() -> None:
    clock = Clock(1)
    for _ in range(64):
        clock.add("flood", 4, 1000)
    for _ in range(5):
        clock.step()
    quiet = clock.add("quiet", 4, 5)
    while quiet.status is not RequestStatus.FINISHED:
        clock.step()
    widths = []
    for _ in range(40):
        clock.step()
        widths.append(clock.num_rows)
    assert max(widths[:20]) <= 2, "a row beside its one, and a token of the request that comes back"
    assert widths[-1] == 64


def test_a_tenant_without_a_place_displaces_the_newest_of_the_one_that_has_most() -> None:
    clock = Clock(1)
    storm = [clock.add("flood", 4, 1000) for _ in range(80)]
    for _ in range(5):
        clock.step()
    quiet = clock.add("quiet", 4, 10)
    plan = clock.scheduler.schedule()
    assert plan is not None
    assert quiet.status is RequestStatus.RUNNING
    assert plan.displaced_ids == (storm[63].request_id,)
    assert quiet.request_id in {planned.request.request_id for planned in plan.requests}


def test_choices_that_follow_their_first_hold_up_no_other_tenant() -> None:
    clock = Clock(1, prefix_caching=True)
    for _ in range(80):
        clock.add("flood", 4, 1000)
    for _ in range(5):
        clock.step()
    siblings = [clock.add("one", 100, 10) for _ in range(3)]
    others = [clock.add("other", 4, 10), clock.add("another", 4, 10)]
    clock.step()
    assert [r.status is RequestStatus.RUNNING for r in siblings] == [True, False, False]
    assert all(r.status is RequestStatus.RUNNING for r in others)


def test_places_are_equal_in_the_end_and_nobody_is_displaced_any_more() -> None:
    clock = Clock(1)
    for _ in range(80):
        clock.add("a", 4, 400)
    for _ in range(5):
        clock.step()
    for _ in range(80):
        clock.add("b", 4, 400)
    for _ in range(5):
        clock.step()
    running = [r.tenant for r in clock.scheduler.requests if r.status is RequestStatus.RUNNING]
    assert (running.count("a"), running.count("b")) == (32, 32)
    plan = clock.scheduler.schedule()
    assert plan is not None
    assert plan.displaced_ids == ()
