"""The figures that the engine's first steps give."""

from __future__ import annotations

import pytest

from server.engine.config import StepTimes
from server.engine.warmup import WarmUp


def warm_up(
    decode: float, prefill: float, first_chunk: float = 0.0, late_chunk: float = 0.0, context: int = 0
) -> WarmUp:
    return WarmUp(decode, 4 * decode, 8, prefill, 256, first_chunk, late_chunk, context)


def test_what_it_measures() -> None:
    figures = warm_up(0.010, 0.400, 0.030, 0.045, 2000)
    assert figures.mixed_step_tokens == 12  # two decode steps, 20 ms, at 640 tokens a second
    assert figures.attention_span == 4000
    assert figures.step_times == StepTimes(10_000_000 - 4_285_714, 4_285_714, 1_562_500)
    assert warm_up(0.001, 0.400).mixed_step_tokens == 7  # 12 ms
    assert warm_up(0.1, 0.4).mixed_step_tokens == 128
    assert warm_up(0.001, 400.0).mixed_step_tokens == 1


@pytest.mark.parametrize(("late", "context"), [(0.031, 2000), (0.020, 2000), (0.045, 0)])
def test_no_span_where_attention_adds_nothing_that_can_be_told(late: float, context: int) -> None:
    assert warm_up(0.01, 0.4, 0.030, late, context).attention_span is None
