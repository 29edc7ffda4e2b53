"""How hypothesis makes examples for a campaign: by a number, not by what failed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings


def examples(count: int, number: int) -> Callable[[Any], Any]:
    """Decorate a `given` function: `count` examples, the same ones for the same number."""
    rules = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    return lambda test: seed(number)(rules(test))
