"""What a step may take of prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.step_budget import StepBudget


def take(budget: StepBudget, position: int, wanted: int) -> int:
    taken = budget.room(position, wanted)
    budget.spend(position, taken)
    return taken


def test_without_streams_only_the_number_counts() -> None:
    budget = StepBudget(10, None, attention_span=1)
    assert (take(budget, 1000, 7), take(budget, 0, 7), bool(budget), take(budget, 0, 1)) == (7, 3, False, 0)


def test_a_token_far_along_takes_more_of_the_allowance() -> None:
    assert take(StepBudget(100, 16, None), 2000, 50) == 16
    assert take(StepBudget(100, 16, 2000), 0, 50) == 16
    assert take(StepBudget(100, 16, 2000), 2000, 50) == 8
    assert take(StepBudget(100, 16, 2000), 14_000, 50) == 2
    budget = StepBudget(100, 16, 2000)
    assert [take(budget, 2000, 4), take(budget, 0, 50), bool(budget)] == [4, 8, False]


def test_a_step_that_was_closed_has_no_room() -> None:
    budget = StepBudget(10, 5, None)
    budget.close()
    assert (bool(budget), budget.room(0, 3)) == (False, 0)


def test_a_prompt_goes_on_however_long_it_is() -> None:
    budget = StepBudget(100, 16, 10)
    assert [take(budget, 1_000_000, 50), bool(budget), take(budget, 0, 50)] == [1, False, 0]


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
        taken.append(take(budget, position, wanted))
        assert (taken[-1] > 0) == had_room
        assert taken[-1] <= wanted
        each = 1 + position / span if span else 1
        if taken[-1] and cost + taken[-1] * each > allowance + 1e-9:
            assert taken[-1] == 1, "a token that alone costs more than is left may be the last"
            assert not budget
        cost += taken[-1] * each
    assert sum(taken) <= tokens
