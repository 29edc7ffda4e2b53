"""What a grammar may cost, for both processes: the one that finds it sound, and the one that applies it."""

from __future__ import annotations

import llguidance

# To whoever names one, as `<|end|>`: which names there are is a matter of the model.
NO_SPECIAL_NAMES = "a special token is written by its id, as in <[5]>"


def grammar_limits() -> llguidance.LLParserLimits:
    """About 0.2 s to begin with, and 20 ms a token. Without them, 2,000 arrays of different lengths in one schema were
    seen to take 3 s to begin with, and `(a{1000}){1000}` a second, during which the engine computes nothing else."""
    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )
