"""The simulation finds every planted bug, within seeds that the real scheduler passes."""

from __future__ import annotations

import pytest

from tests.simulation.driver import MakeScheduler, SimulationFailure, run_seed
from tests.simulation.planted import BUGS
from tests.simulation.test_simulation import NUM_SEEDS


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_found(bug: MakeScheduler) -> None:
    for seed in range(NUM_SEEDS):
        try:
            run_seed(seed, bug)
        except SimulationFailure:
            run_seed(seed)  # the seed is right: it is the bug that fails
            return
    pytest.fail(f"{NUM_SEEDS} seeds and nothing was found")
