"""How much may be asked, and when to come back: token buckets, and the rate at which places get free."""

from __future__ import annotations

import math
from collections import deque

_WINDOW_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 60
_UNKNOWN_WAIT_SECONDS = 5


class TokenBucket:
    """An allowance of so much a minute, of which up to a minute's worth is saved up.

    It may be overdrawn: what something cost is often known only at its end. Then nothing is allowed until the debt is
    paid off, so that in the long run never more is used than is allowed.
    """

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; 0 if it is."""
        self._refill(now)
        return max(0.0, amount - self._level) * 60.0 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Use so much, whether or not it is there."""
        self._refill(now)
        self._level -= amount

    def change(self, per_minute: int, now: float) -> None:
        """Another allowance from now on. What was used of the old one stays used."""
        self._refill(now)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def _refill(self, now: float) -> None:
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60.0)
        self._at = now


class DrainRate:
    """How fast places got free lately."""

    __slots__ = ("_freed",)

    def __init__(self) -> None:
        self._freed: deque[float] = deque(maxlen=4096)

    def freed(self, places: int, now: float) -> None:
        """So many places got free."""
        self._freed.extend([now] * places)

    def wait(self, places: int, now: float) -> int:
        """Whole seconds after which to try again for so many places; 1 to 60."""
        seconds = self.seconds_until(places, now)
        return _UNKNOWN_WAIT_SECONDS if seconds is None else min(_LONGEST_WAIT_SECONDS, max(1, math.ceil(seconds)))

    def seconds_until(self, places: int, now: float) -> float | None:
        """How long so many places took to get free lately; None if none has."""
        while self._freed and self._freed[0] < now - _WINDOW_SECONDS:
            self._freed.popleft()
        return places * max(1.0, now - self._freed[0]) / len(self._freed) if self._freed else None
