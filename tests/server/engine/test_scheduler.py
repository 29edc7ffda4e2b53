"""The scheduler's rules, one by one. Whether they hold together is the simulation's business."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.config import SchedulerConfig
from server.engine.plan import RequestOutput, RowResult, StepCounters, StepPlan, StepResult
from server.engine.request import FinishReason, Request, RequestStatus, SamplingParams
from server.engine.scheduler import AdmissionError, Scheduler

EOS = 99


def make(**changes: object) -> Scheduler:
    limits: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 200,
        "max_running": 8,
        "max_tokens_per_step": 32,
        "mixed_step_tokens": 8,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(SchedulerConfig(**(limits | changes)))  # type: ignore[arg-type]


def request(request_id: int, prompt: int | Sequence[int] = 4, max_new_tokens: int = 8, **fields: object) -> Request:
    """A request; a prompt given as a number has tokens of its own, which no other request shares."""
    tokens = [1000 * (request_id + 1) + index for index in range(prompt)] if isinstance(prompt, int) else list(prompt)
    params = {name: fields.pop(name) for name in ("min_new_tokens", "stop_token_ids", "ignore_eos") if name in fields}
    fields.setdefault("arrival", request_id)
    return Request(request_id, tokens, SamplingParams(max_new_tokens=max_new_tokens, **params), **fields)  # type: ignore[arg-type]


def result(plan: StepPlan, token: int | Sequence[int] = 7, errors: dict[int, str] | None = None) -> StepResult:
    tokens = (token,) if isinstance(token, int) else tuple(token)
    rows = []
    for planned in plan.requests:
        error = (errors or {}).get(planned.request.request_id)
        rows.append(RowResult(planned.request.request_id, tokens if planned.samples and not error else (), error))
    return StepResult(plan.step_id, tuple(rows))


def plan_of(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check_integrity()
    return plan


def step(scheduler: Scheduler, token: int | Sequence[int] = 7) -> list[RequestOutput]:
    outputs = scheduler.update(result(plan_of(scheduler), token))
    scheduler.check_integrity()
    return outputs


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(planned.request.request_id, planned.start, planned.num_new_tokens) for planned in plan.requests]


def run(scheduler: Scheduler, steps: int = 1000) -> None:
    while scheduler.has_work and steps:
        step(scheduler)
        steps -= 1


# ---- admission ----


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("changes", "prompt", "max_new_tokens", "message"),
    [
        ({}, 0, 1, "prompt is empty"),
        ({}, 200, 1, "200 tokens leave no room for a new one: prompt and output have 200 at most"),
        ({"num_blocks": 5}, 12, 10, "22 tokens .12 of the prompt.* need 6 blocks of 4 tokens, and the cache has 5"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    changes: dict[str, object], prompt: int, max_new_tokens: int, message: str
) -> None:
    scheduler = make(**changes)
    with pytest.raises(AdmissionError, match=message):
        scheduler.add(request(1, prompt, max_new_tokens))
    assert not scheduler.has_work


def test_a_request_that_just_fits_runs_alone_to_its_end() -> None:
    """21 tokens, of which the last one needs no K and V, fill 5 blocks of 4."""
    scheduler = make(num_blocks=5)
    item = request(1, 12, 9)
    scheduler.add(item)
    run(scheduler)
    assert len(item.output_token_ids) == 9
    assert item.num_preemptions == 0


def test_an_id_is_open_once() -> None:
    scheduler = make()
    scheduler.add(request(1))
    with pytest.raises(ValueError, match="request 1 is open already"):
        scheduler.add(request(1))
    done = scheduler.abort(1)
    assert done is not None
    with pytest.raises(ValueError, match="request 1 is not new: it is finished"):
        scheduler.add(done)
    scheduler.add(request(1))


def test_limits_that_would_starve_a_stream_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 running streams .* need one token each"):
        make(max_running=8, max_tokens_per_step=7)
    with pytest.raises(ValueError, match="start at 1"):
        make(mixed_step_tokens=0)


def test_admission_leaves_a_block_to_every_stream() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(request(1, 7, 8))
    step(scheduler)  # 2 of 6 blocks, and it is going to need more
    scheduler.add(request(2, 8, 8))  # 2 blocks, and one more later: 2 + 1 + 1 are there
    assert {row[0] for row in shape(plan_of(scheduler))} == {1, 2}
    tight = make(num_blocks=5)
    tight.add(request(1, 7, 8))
    step(tight)
    tight.add(request(2, 8, 8))
    assert {row[0] for row in shape(plan_of(tight))} == {1}


# ---- a step ----


def test_a_long_prompt_catches_up_in_several_steps_and_draws_in_the_last() -> None:
    scheduler = make()
    item = request(1, 70)
    scheduler.add(item)
    assert step(scheduler) == []
    assert step(scheduler) == []
    plan = plan_of(scheduler)
    assert shape(plan) == [(1, 64, 6)]
    assert plan.requests[0].samples
    assert plan.requests[0].output_index == 0
    assert len(plan.requests[0].block_ids) == 18
    outputs = scheduler.update(result(plan))
    assert [output.token_ids for output in outputs] == [(7,)]
    assert shape(plan_of(scheduler)) == [(1, 70, 1)]


def test_prompts_beside_streams_stay_small_and_streams_are_in_every_step() -> None:
    scheduler = make()
    stream = request(1, 3, 50)
    scheduler.add(stream)
    step(scheduler)
    scheduler.add(request(2, 60))
    scheduler.add(request(3, 60))
    for nth in range(7):
        plan = plan_of(scheduler)
        assert shape(plan) == [(1, 3 + nth, 1), (2, 8 * nth, 8)]
        scheduler.update(result(plan))
    assert shape(plan_of(scheduler)) == [(1, 10, 1), (2, 56, 4), (3, 0, 4)], "the rest of the share is for the next one"


def test_prompts_fill_the_step_when_nothing_streams() -> None:
    scheduler = make()
    scheduler.add(request(1, 20))
    scheduler.add(request(2, 20))
    assert shape(plan_of(scheduler)) == [(1, 0, 20), (2, 0, 12)]


def test_no_more_than_max_running_run() -> None:
    scheduler = make(max_running=2)
    for request_id in range(3):
        scheduler.add(request(request_id))
    assert [row[0] for row in shape(plan_of(scheduler))] == [0, 1]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


# ---- order ----


def test_priority_then_arrival_within_a_tenant() -> None:
    scheduler = make(max_running=1)
    for request_id, priority in ((0, 0), (1, 0), (2, 1)):
        scheduler.add(request(request_id, max_new_tokens=1, priority=priority))
    order = []
    while scheduler.has_work:
        order += [output.request.request_id for output in step(scheduler)]
    assert order == [2, 0, 1]


def test_waiting_makes_up_for_priority() -> None:
    scheduler = make(max_running=1, priority_aging_steps=4)
    scheduler.add(request(0, 1, 100))
    step(scheduler)
    scheduler.add(request(1, 1, 1, priority=-1))
    for _ in range(5):
        step(scheduler)
    scheduler.add(request(2, 1, 1))  # five steps later: one level is made up for
    scheduler.abort(0)
    assert shape(plan_of(scheduler))[0][0] == 1


def test_a_newcomer_of_higher_priority_goes_first_while_it_is_worth_more_than_the_wait() -> None:
    scheduler = make(max_running=1, priority_aging_steps=8)
    scheduler.add(request(0, 1, 100))
    step(scheduler)
    scheduler.add(request(1, 1, 1, priority=-1))
    for _ in range(5):
        step(scheduler)
    scheduler.add(request(2, 1, 1))
    scheduler.abort(0)
    assert shape(plan_of(scheduler))[0][0] == 2


def test_a_flood_leaves_the_others_their_share() -> None:
    scheduler = make(max_running=1)
    for request_id in range(20):
        scheduler.add(request(request_id, 4, 4, tenant="flood"))
    scheduler.add(request(20, 4, 4, tenant="other"))
    order: list[int] = []
    while scheduler.has_work:
        order += [output.request.request_id for output in step(scheduler) if output.finish_reason]
    assert order.index(20) <= 1


def test_a_tenant_pays_for_the_tokens_it_gets_not_for_those_it_asked_for() -> None:
    scheduler = make(max_running=1)
    for request_id in range(12):
        asks_for = 100 if request_id % 2 else 1
        scheduler.add(request(request_id, 4, asks_for, tenant=str(request_id % 2)))
    order: list[int] = []
    while scheduler.has_work:
        order += [output.request.request_id % 2 for output in step(scheduler, EOS)]
    assert order == [0, 1] * 6


def test_a_preempted_request_does_not_pay_twice() -> None:
    scheduler = make(max_running=1)
    scheduler.add(request(0, 4, 40, tenant="a"))
    step(scheduler)
    scheduler.add(request(1, 4, 4, tenant="b"))
    scheduler.preempt(0)
    assert [row[0] for row in shape(plan_of(scheduler))] == [0]


# ---- memory ----


def test_the_last_by_rank_is_preempted_for_a_stream_in_need() -> None:
    scheduler = make(num_blocks=6, prefix_caching=False)
    first, second = request(1, 8, 12), request(2, 8, 12)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    assert (scheduler.num_running, scheduler.pool.num_free) == (2, 2)
    step(scheduler)  # both take one more block
    for _ in range(3):
        step(scheduler)
    plan = plan_of(scheduler)
    assert plan.preempted_ids == (2,)
    assert shape(plan) == [(1, 12, 1)]
    assert second.status is RequestStatus.WAITING
    assert (second.block_ids, second.num_computed_tokens, second.num_preemptions) == ([], 0, 1)
    scheduler.update(result(plan))
    assert scheduler.last_step.preemptions == 1
    run(scheduler)
    assert (len(first.output_token_ids), len(second.output_token_ids)) == (12, 12)
    assert scheduler.pool.num_free == 6


def test_priority_decides_who_is_preempted() -> None:
    scheduler = make(num_blocks=6, prefix_caching=False)
    scheduler.add(request(1, 8, 12))
    scheduler.add(request(2, 8, 12, priority=1))
    preempted: list[int] = []
    while scheduler.has_work:
        plan = plan_of(scheduler)
        preempted += plan.preempted_ids
        scheduler.update(result(plan))
    assert preempted == [1]


def test_a_stream_in_need_that_is_last_by_rank_stands_still_and_keeps_its_blocks() -> None:
    scheduler = make(num_blocks=6, prefix_caching=False)
    first, second = request(1, 5, 16), request(2, 8, 8)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    for _ in range(3):
        step(scheduler)  # 3 blocks each
    assert (first.num_computed_tokens, second.num_computed_tokens) == (8, 11)
    step(scheduler)
    plan = plan_of(scheduler)
    assert [row[0] for row in shape(plan)] == [1]
    assert plan.preempted_ids == ()
    assert len(second.block_ids) == 3
    scheduler.update(result(plan))
    run(scheduler)
    assert second.num_preemptions <= 1
    assert len(second.output_token_ids) == 8


def test_a_preempted_request_counts_recomputed_tokens_and_goes_on() -> None:
    scheduler = make(prefix_caching=False)
    item = request(1, 6)
    scheduler.add(item)
    step(scheduler)
    step(scheduler)
    assert scheduler.preempt(1)
    assert not scheduler.preempt(1)
    plan = plan_of(scheduler)
    assert shape(plan) == [(1, 0, 8)]
    assert plan.requests[0].output_index == 2
    scheduler.update(result(plan))
    assert scheduler.last_step == StepCounters(recomputed_tokens=7, sampled_tokens=1, preemptions=1)


# ---- prefix cache ----


def test_a_prefix_is_found_but_for_its_last_token() -> None:
    scheduler = make()
    prompt = list(range(8))
    scheduler.add(request(1, prompt, 1))
    step(scheduler)
    assert scheduler.pool.num_cached == 2
    again = request(2, prompt, 1)
    scheduler.add(again)
    plan = plan_of(scheduler)
    assert shape(plan) == [(2, 4, 4)], "the second block has the last token in it"
    scheduler.update(result(plan))
    assert again.num_cached_tokens == 4
    assert scheduler.last_step == StepCounters(
        prompt_tokens=4, sampled_tokens=1, cached_prompt_tokens=4, prefix_queried_tokens=8, prefix_hit_tokens=4
    )
    longer = request(3, [*prompt, 8], 1)
    scheduler.add(longer)
    assert shape(plan_of(scheduler)) == [(3, 8, 1)]


def test_generated_tokens_are_found_too() -> None:
    scheduler = make()
    item = request(1, 4, 20)
    scheduler.add(item)
    for _ in range(9):
        step(scheduler)
    assert item.num_computed_tokens == 12
    scheduler.preempt(1)
    assert shape(plan_of(scheduler)) == [(1, 12, 1)]
    assert item.num_cached_tokens == 0, "it says what was cached at first"


def test_nothing_is_found_before_its_step_is_over() -> None:
    scheduler = make(pipeline_depth=2)
    prompt = list(range(9))
    scheduler.add(request(1, prompt, 1))
    first = plan_of(scheduler)
    scheduler.add(request(2, prompt, 1))
    assert scheduler.schedule() is None, "it waits for the prefix that is being computed"
    scheduler.update(result(first))
    assert shape(plan_of(scheduler)) == [(2, 8, 1)]


def test_choices_of_one_prompt_follow_the_first() -> None:
    scheduler = make(max_tokens_per_step=64)
    for choice in range(3):
        scheduler.add(request(choice, list(range(10)), 4, choice=choice))
    plan = plan_of(scheduler)
    assert shape(plan) == [(0, 0, 10)]
    scheduler.update(result(plan))
    assert shape(plan_of(scheduler)) == [(0, 10, 1), (1, 8, 2), (2, 8, 2)]


def test_another_salt_finds_nothing() -> None:
    scheduler = make()
    scheduler.add(request(1, list(range(9)), 1))
    step(scheduler)
    scheduler.add(request(2, list(range(9)), 1, cache_salt="mine"))
    assert shape(plan_of(scheduler)) == [(2, 0, 9)]


def test_another_tenant_finds_nothing_and_waits_for_nothing() -> None:
    """Nor can a tenant and a salt together spell another tenant's."""
    scheduler = make()
    scheduler.add(request(1, list(range(9)), 1, tenant="a", cache_salt="bc"))
    step(scheduler)
    scheduler.add(request(2, list(range(9)), 1, tenant="ab", cache_salt="c"))
    scheduler.add(request(3, list(range(9)), 1, tenant="", cache_salt="abc"))
    scheduler.add(request(4, list(range(9)), 1, tenant="bc", cache_salt="a"))
    assert sorted(shape(plan_of(scheduler))) == [(2, 0, 9), (3, 0, 9), (4, 0, 9)]


def test_without_prefix_caching_nothing_is_kept() -> None:
    scheduler = make(prefix_caching=False)
    scheduler.add(request(1, list(range(9)), 1))
    step(scheduler)
    assert scheduler.pool.num_free == 64
    scheduler.add(request(2, list(range(9)), 1))
    assert shape(plan_of(scheduler)) == [(2, 0, 9)]


# ---- ends ----


def test_end_of_sequence_stops_and_is_the_last_token() -> None:
    scheduler = make()
    scheduler.add(request(1))
    step(scheduler)
    (output,) = step(scheduler, EOS)
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ((EOS,), FinishReason.STOP, EOS)
    assert output.request.output_token_ids == [7, EOS]
    assert output.request.status is RequestStatus.FINISHED
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_stop_tokens_end_even_when_eos_is_ignored() -> None:
    scheduler = make()
    scheduler.add(request(1, ignore_eos=True, stop_token_ids=(13,)))
    assert step(scheduler, EOS)[0].finish_reason is None
    assert step(scheduler, 13)[0].stop_token_id == 13


def test_no_stop_before_min_new_tokens() -> None:
    scheduler = make()
    scheduler.add(request(1, min_new_tokens=2))
    assert [step(scheduler, EOS)[0].finish_reason for _ in range(3)] == [None, None, FinishReason.STOP]


def test_length_by_new_tokens_and_by_the_model() -> None:
    scheduler = make(max_model_len=8)
    scheduler.add(request(1, 3, 2))
    scheduler.add(request(2, 6, 100))
    reasons = [[output.finish_reason for output in step(scheduler)] for _ in range(2)]
    assert reasons == [[None, None], [FinishReason.LENGTH, FinishReason.LENGTH]]


def test_a_stop_at_the_limit_is_a_stop() -> None:
    scheduler = make()
    scheduler.add(request(1, max_new_tokens=1))
    assert step(scheduler, EOS)[0].finish_reason is FinishReason.STOP


def test_what_follows_the_ending_token_is_dropped() -> None:
    scheduler = make()
    scheduler.add(request(1))
    scheduler.add(request(2, max_new_tokens=2))
    outputs = step(scheduler, (7, EOS, 8))
    assert [output.token_ids for output in outputs] == [(7, EOS), (7, EOS)]
    assert scheduler.last_step.sampled_tokens == 6
    assert scheduler.last_step.pipeline_discarded_tokens == 2


def test_several_tokens_a_step_are_caught_up() -> None:
    scheduler = make()
    item = request(1, 4, 20)
    scheduler.add(item)
    step(scheduler, (1, 2, 3))
    while scheduler.has_work:
        step(scheduler, (1, 2, 3))
    assert item.output_token_ids == [1, 2, 3] * 6 + [1, 2]


def test_an_error_ends_one_request_and_is_never_found() -> None:
    scheduler = make()
    prompt = list(range(12))
    scheduler.add(request(1, prompt, 8))
    neighbour = request(2, 5)
    scheduler.add(neighbour)
    first = plan_of(scheduler)
    outputs = scheduler.update(result(first, errors={1: "the logits are not finite"}))
    assert [(o.request.request_id, o.finish_reason, o.error) for o in outputs] == [
        (1, FinishReason.ERROR, "the logits are not finite"),
        (2, None, None),
    ]
    scheduler.check_integrity()
    scheduler.add(request(3, prompt))
    assert (3, 0, 8) in shape(plan_of(scheduler)), "nothing of it was published"


def test_an_error_takes_back_what_was_published_before() -> None:
    scheduler = make(max_tokens_per_step=8)
    prompt = list(range(16))
    scheduler.add(request(1, prompt))
    step(scheduler)
    scheduler.update(result(plan_of(scheduler), errors={1: "nan"}))
    scheduler.add(request(2, prompt))
    assert shape(plan_of(scheduler)) == [(2, 0, 8)]


def test_a_request_taken_up_again_goes_on_where_it_stood() -> None:
    scheduler = make()
    item = request(1, 6, 4, output_token_ids=[7, 7])
    scheduler.add(item)
    plan = plan_of(scheduler)
    assert shape(plan) == [(1, 0, 8)]
    assert plan.requests[0].output_index == 2
    scheduler.update(result(plan))
    assert scheduler.last_step == StepCounters(recomputed_tokens=7, sampled_tokens=1, prefix_queried_tokens=8)
    assert step(scheduler)[0].finish_reason is FinishReason.LENGTH
    with pytest.raises(AdmissionError, match="4 of 4 new tokens are there"):
        scheduler.add(request(2, 6, 4, output_token_ids=[7, 7, 7, 7]))


def test_abort_frees_at_once_and_once() -> None:
    scheduler = make()
    for request_id in range(2):
        scheduler.add(request(request_id, max_new_tokens=20))
    step(scheduler)
    scheduler.add(request(2))
    assert scheduler.abort(2) is not None
    aborted = scheduler.abort(0)
    assert aborted is not None
    assert aborted.status is RequestStatus.FINISHED
    assert scheduler.abort(0) is None
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 1
    assert [r.request_id for r in scheduler.requests] == [1]


# ---- two steps in flight ----


def test_the_pipeline_has_its_depth() -> None:
    scheduler = make(pipeline_depth=2)
    scheduler.add(request(1, 4))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert scheduler.schedule() is None
    assert scheduler.num_in_flight == 2
    assert (first.requests[0].num_inflight, second.requests[0].num_inflight) == (0, 1)
    assert (second.requests[0].start, second.requests[0].output_index) == (4, 1)


def test_a_step_planned_for_a_request_that_has_ended_is_dropped() -> None:
    scheduler = make(pipeline_depth=2)
    scheduler.add(request(1, 4))
    first, second = plan_of(scheduler), plan_of(scheduler)
    (output,) = scheduler.update(result(first, EOS))
    assert output.finish_reason is FinishReason.STOP
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 2, "the second step still writes its blocks"
    assert scheduler.has_work
    assert scheduler.update(result(second)) == []
    assert scheduler.last_step.pipeline_discarded_tokens == 1
    assert scheduler.pool.num_used == 0
    assert output.request.output_token_ids == [EOS]


def test_nothing_is_planned_beyond_a_last_token_in_flight() -> None:
    scheduler = make(pipeline_depth=2)
    scheduler.add(request(1, 4, 1))
    first = plan_of(scheduler)
    assert scheduler.schedule() is None
    scheduler.update(result(first))
    assert not scheduler.has_work


def test_abort_in_flight_frees_when_the_step_is_over() -> None:
    scheduler = make(pipeline_depth=2, prefix_caching=False)
    scheduler.add(request(1, 4))
    plan = plan_of(scheduler)
    scheduler.abort(1)
    scheduler.check_integrity()
    assert (scheduler.pool.num_used, scheduler.num_running) == (1, 0)
    assert scheduler.update(result(plan)) == []
    assert scheduler.pool.num_used == 0
    assert scheduler.last_step.pipeline_discarded_tokens == 1


def test_a_token_drawn_for_a_request_preempted_meanwhile_is_kept() -> None:
    scheduler = make(pipeline_depth=2)
    item = request(1, 4)
    scheduler.add(item)
    plan = plan_of(scheduler)
    scheduler.preempt(1)
    assert scheduler.schedule() is None, "it is not taken up before that step is over"
    scheduler.check_integrity()
    (output,) = scheduler.update(result(plan))
    assert output.token_ids == (7,)
    plan = plan_of(scheduler)
    assert shape(plan) == [(1, 4, 1)]
    assert plan.requests[0].output_index == 1


def test_a_request_preempted_in_two_steps_is_queued_when_the_older_is_over_and_the_newer_undone() -> None:
    scheduler = make(pipeline_depth=2)
    item = request(1, 4)
    scheduler.add(item)
    first, second = plan_of(scheduler), plan_of(scheduler)
    scheduler.preempt(1)
    scheduler.rollback(second.step_id)
    scheduler.check_integrity()
    assert scheduler.schedule() is None
    assert scheduler.pool.num_used == 2, "the older step still uses its blocks"
    scheduler.update(result(first))
    assert item.output_token_ids == [7]
    assert shape(plan_of(scheduler)) == [(1, 4, 1)]


def test_one_victim_in_flight_is_enough() -> None:
    scheduler = make(num_blocks=9, pipeline_depth=2, prefix_caching=False)
    for request_id in range(3):
        scheduler.add(request(request_id, (3, 5, 5)[request_id], 24))
    plans: list[StepPlan] = []
    preempted: list[tuple[int, ...]] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        if plan is not None:
            plans.append(plan)
            preempted.append(plan.preempted_ids)
        if plan is None or len(plans) == 2:
            scheduler.update(result(plans.pop(0)))
    assert next(ids for ids in preempted if ids) == (2,)
    assert all(len(ids) <= 1 for ids in preempted)


def test_only_the_result_that_is_due_is_taken() -> None:
    scheduler = make(pipeline_depth=2)
    scheduler.add(request(1, 4))
    with pytest.raises(ValueError, match="no step is in flight"):
        scheduler.update(StepResult(0, ()))
    first, second = plan_of(scheduler), plan_of(scheduler)
    for wrong, message in (
        (result(second), "that of step 0 is due"),
        (StepResult(0, ()), "1 requests, not 0"),
        (StepResult(0, (RowResult(5, (1,)),)), "a row of request 5"),
        (StepResult(0, (RowResult(1, ()),)), "0 tokens for request 1"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.update(wrong)
    scheduler.update(result(first))
    with pytest.raises(ValueError, match="that of step 1 is due"):
        scheduler.update(result(first))


# ---- a forward pass that fails ----


def test_a_rolled_back_step_is_planned_again_as_it_was() -> None:
    scheduler = make()
    for request_id in range(2):
        scheduler.add(request(request_id, 6))
    first = plan_of(scheduler)
    scheduler.rollback(first.step_id)
    scheduler.check_integrity()
    again = plan_of(scheduler)
    assert shape(again) == shape(first)
    assert [p.block_ids for p in again.requests] == [p.block_ids for p in first.requests]
    assert again.step_id == first.step_id + 1
    scheduler.update(result(again))
    assert scheduler.last_step == StepCounters(prompt_tokens=12, sampled_tokens=2, prefix_queried_tokens=12)


def test_rolling_back_undoes_later_steps_too() -> None:
    scheduler = make(pipeline_depth=2)
    item = request(1, 6)
    scheduler.add(item)
    first = plan_of(scheduler)
    plan_of(scheduler)
    scheduler.rollback(first.step_id)
    scheduler.check_integrity()
    assert (scheduler.num_in_flight, item.num_computed_tokens, item.num_inflight_samples) == (0, 0, 0)
    with pytest.raises(ValueError, match="step 0 is not in flight"):
        scheduler.rollback(first.step_id)


def test_the_requests_of_a_failed_step_are_planned_alone() -> None:
    scheduler = make(mixed_step_tokens=5)
    scheduler.add(request(1, 3))
    step(scheduler)
    scheduler.add(request(2, 9))
    failed = plan_of(scheduler)
    scheduler.rollback(failed.step_id)
    plan = scheduler.schedule(only=1)
    assert plan is not None
    assert shape(plan) == [(1, 3, 1)]
    scheduler.update(result(plan))
    plan = scheduler.schedule(only=2)
    assert plan is not None
    assert shape(plan) == [(2, 0, 5)], "no more than in a mixed step"
    scheduler.rollback(plan.step_id)
    output = scheduler.fail(2, "the forward pass raised")
    assert output is not None
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "the forward pass raised")
    assert scheduler.fail(2, "again") is None
    assert scheduler.schedule(only=2) is None
    scheduler.check_integrity()
    assert shape(plan_of(scheduler)) == [(1, 4, 1)]


# ---- books ----


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=10), st.integers(1, 2))
def test_every_computed_position_is_counted_once(sizes: list[tuple[int, int]], depth: int) -> None:
    scheduler = make(num_blocks=16, pipeline_depth=depth, max_model_len=60)
    requests = [request(index, prompt, new) for index, (prompt, new) in enumerate(sizes)]
    for item in requests:
        scheduler.add(item)
    total = StepCounters()
    plans: list[StepPlan] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        plans += [] if plan is None else [plan]
        if plan is None or len(plans) == depth:
            scheduler.update(result(plans.pop(0)))
            total.add(scheduler.last_step)
        scheduler.check_integrity()
    assert total.sampled_tokens - total.pipeline_discarded_tokens == sum(new for _, new in sizes)
    assert total.prompt_tokens + total.cached_prompt_tokens == sum(prompt for prompt, _ in sizes)
    assert total.preemptions == sum(item.num_preemptions for item in requests)
    assert all(len(item.output_token_ids) == new for item, (_, new) in zip(requests, sizes, strict=True))
