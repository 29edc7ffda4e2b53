"""500 seeds of the simulation; `python -m tests.simulation --seeds 25000` runs more."""

from __future__ import annotations

import pytest

from tests.simulation.driver import run_seed

NUM_SEEDS = 500
BATCH = 25


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
def test_every_token_is_right_and_every_promise_is_kept(first: int) -> None:
    for seed in range(first, first + BATCH):
        run_seed(seed)
