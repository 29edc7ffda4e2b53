"""What a step may take of prompts, and the warm-up's figures that say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.build import WarmUp
from server.engine.step_budget import StepBudget


def test_without_streams_only_the_number_counts() -> None:
    budget = StepBudget(10, None, attention_span=1)
    assert (budget.take(1000, 7), budget.take(0, 7), bool(budget), budget.take(0, 1)) == (7, 3, False, 0)


def test_a_token_far_along_takes_more_of_the_allowance() -> None:
    assert StepBudget(100, 16, None).take(2000, 50) == 16
    assert StepBudget(100, 16, 2000).take(0, 50) == 16
    assert StepBudget(100, 16, 2000).take(2000, 50) == 8
    assert StepBudget(100, 16, 2000).take(14_000, 50) == 2
    budget = StepBudget(100, 16, 2000)
    assert [budget.take(2000, 4), budget.take(0, 50), bool(budget)] == [4, 8, False]


def test_a_prompt_goes_on_however_long_it_is() -> None:
    budget = StepBudget(100, 16, 10)
    assert [budget.take(1_000_000, 50), bool(budget), budget.take(0, 50)] == [1, False, 0]


@given(
    tokens=st.integers(0, 40),
    allowance=st.integers(1, 40),
    span=st.none() | st.integers(1, 100),
    prompts=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), max_size=6),
)
def test_nothing_is_exceeded_but_by_one_token(
    tokens: int, allowance: int, span: int | None, prompts: list[tuple[int, int]]
) -> None:
    budget = StepBudget(tokens, allowance, span)
    cost, taken = 0.0, []
    for position, wanted in prompts:
        had_room = bool(budget)
        taken.append(budget.take(position, wanted))
        assert (taken[-1] > 0) == had_room
        assert taken[-1] <= wanted
        each = 1 + position / span if span else 1
        if taken[-1] and cost + taken[-1] * each > allowance + 1e-9:
            assert taken[-1] == 1, "a token that alone costs more than is left may be the last"
            assert not budget
        cost += taken[-1] * each
    assert sum(taken) <= tokens


def test_what_the_warm_up_measures() -> None:
    figures = WarmUp(0.010, 0.400, 256, first_chunk_seconds=0.030, late_chunk_seconds=0.045, context=2000)
    assert figures.mixed_step_tokens == 16  # 25 ms at 640 tokens a second
    assert figures.attention_span == 4000
    assert WarmUp(0.1, 0.4, 256).mixed_step_tokens == 128  # two decode steps
    assert WarmUp(0.001, 400.0, 256).mixed_step_tokens == 1


@pytest.mark.parametrize(("late", "context"), [(0.031, 2000), (0.020, 2000), (0.045, 0)])
def test_no_span_where_attention_adds_nothing_that_can_be_told(late: float, context: int) -> None:
    assert (
        WarmUp(0.01, 0.4, 256, first_chunk_seconds=0.030, late_chunk_seconds=late, context=context).attention_span
        is None
    )
