"""How many prompt tokens a step may still take: by their number, and beside running streams by what they cost."""

from __future__ import annotations


class StepBudget:
    """What is left of a step.

    Beside streams a prompt has an allowance, in tokens at its beginning. A token further along sees more keys: at
    position `attention_span` it costs twice as much, and takes twice as much of the allowance. So a stream waits no
    longer for the end of a long prompt than for its beginning.
    """

    def __init__(self, tokens: int, allowance: int | None, attention_span: int | None) -> None:
        """tokens: rows left in the step. allowance: None without streams. attention_span: None: all cost the same."""
        self._tokens = tokens
        self._span = attention_span or 0
        self._per_token = self._span or 1
        self._left = None if allowance is None else allowance * self._per_token

    def room(self, position: int, wanted: int) -> int:
        """How many of a prompt's next tokens, from this position on, there is room for.

        Never 0 while anything is left, so that a prompt always goes on, however long it is.
        """
        room = min(wanted, self._tokens)
        if self._left is not None:
            room = min(room, max(self._left // self._cost(position), self._left > 0))
        return room

    def spend(self, position: int, num_tokens: int) -> None:
        """Take so many tokens from what is left."""
        self._tokens -= num_tokens
        if self._left is not None:
            self._left = max(self._left - num_tokens * self._cost(position), 0)

    def close(self) -> None:
        """There is room for no more."""
        self._tokens = 0

    def __bool__(self) -> bool:
        """Whether there is room for one more token."""
        return self._tokens > 0 and self._left != 0

    def _cost(self, position: int) -> int:
        return self._per_token + (position if self._span else 0)
