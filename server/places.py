"""Places: how many requests may be inside at once, and whose they are.

A place is held by each choice of a request from its admission to its end. There are as many as the engine runs at once,
and `max_waiting` more for those that wait. No clock: `now` is seconds on the caller's, which is monotonic.
"""

from __future__ import annotations

import asyncio

from server.generation import Problem, Refusal
from server.rates import DrainRate

# A named tenant may hold so many times the places that it leaves free. So whoever floods the queue leaves a part of it,
# and a second one a part of that, for whoever comes next (dynamic thresholds: Choudhury and Hahne, 1998).
_PER_FREE_PLACE = 4


class Places:
    """Owns the count of what is taken, by whom, and how fast it got free lately.

    The engine says how many it runs at once (`max_running`, at least 1) only when it is ready: so it is told each time.
    """

    def __init__(self, max_waiting: int) -> None:
        self.taken = 0
        self._max_waiting = max_waiting
        self._taken_by: dict[str, int] = {}
        self._drain_rate = DrainRate()
        self._idle = asyncio.Event()
        self._idle.set()

    def capacity(self, max_running: int) -> int:
        """Places, taken or not."""
        return max_running + self._max_waiting

    def check(self, wanted: int, tenant: str, max_running: int, now: float) -> None:
        """Raise Refusal unless so many are free, and this tenant may take them; one without a name may take all."""
        capacity = self.capacity(max_running)
        if wanted > capacity:
            message = f"The prompts' {wanted} choices exceed the {capacity} places of this server."
            raise Refusal("invalid_request", [Problem("prompt", message, wanted, f"up to {capacity} choices")])
        if self.taken + wanted > capacity:
            message = f"All {capacity} places are taken ({max_running} running, the rest waiting)."
            raise Refusal("queue_full", [Problem(None, message)], self._drain_rate.wait(wanted, now))
        if not tenant:
            return
        held = self._taken_by.get(tenant, 0)
        # The first request of a tenant is not too large for a share: it would never get in.
        if held and held + wanted > _PER_FREE_PLACE * (capacity - self.taken - wanted):
            message = f"This API key holds {held} of {capacity} places; the others are for other keys."
            raise Refusal("queue_full", [Problem(None, message)], self._drain_rate.wait(wanted, now))

    def take(self, wanted: int, tenant: str, max_running: int, now: float) -> None:
        """Take all of them or none, without a pause in which another could. Raises Refusal, as `check` does."""
        self.check(wanted, tenant, max_running, now)
        self.taken += wanted
        self._taken_by[tenant] = self._taken_by.get(tenant, 0) + wanted
        self._idle.clear()

    def release(self, places: int, tenant: str, now: float) -> None:
        """Give back what was taken."""
        self.taken -= places
        self._taken_by[tenant] -= places
        if not self._taken_by[tenant]:
            del self._taken_by[tenant]
        self._drain_rate.freed(places, now)
        if self.taken == 0:
            self._idle.set()

    def seconds_in_queue(self, max_running: int, now: float) -> float | None:
        """How long whoever holds the newest place waits to run, as fast as places got free lately; None: unknown."""
        waiting = self.taken - max_running
        return self._drain_rate.seconds_until(waiting, now) if waiting > 0 else 0.0

    async def wait_until_free(self) -> None:
        """Wait until none is taken."""
        await self._idle.wait()
