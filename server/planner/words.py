"""What the command, the route and the planner share: names, bounds, and the error. Quick to import."""

from __future__ import annotations

MODES = ("none", "w8a16", "w8a8")
KV_DTYPES = ("auto", "bf16", "int8")
CARD_NAMES = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "l4-24gb", "l40s-48gb", "rtx4090-24gb")
"""The keys of server.planner.rates.CARDS."""
COUNT_WORDS = "a number of parameters from 1M to 10T, such as 70b or 600M"

DEFAULT_CONCURRENCY = 8
DEFAULT_CONTEXT = 1024
MAX_CONTEXT = 2**31 - 1
MAX_CONCURRENCY = 4096
MAX_TOKENS_PER_STEP = 1_000_000
MAX_DEVICES = 100_000
MAX_BATCH = 1_000_000


class PlanError(Exception):
    """Why there is no plan. One line for a person: what was wrong, what is allowed, what to do.

    param: which parameter of the request it is about, where that is known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
