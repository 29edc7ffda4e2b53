"""Routes requests to the engine and its tokens back, and takes every open request up again after a crash."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from server.engine.messages import Abort, Delta, FirstToken, Ready, StepOutput, Submit
from server.engine.request import FinishReason, SamplingParams
from server.engine.scores import Details, Explanation
from server.supervisor import Supervisor

if TYPE_CHECKING:
    from server.metrics import Metrics

DiscardReason = Literal["stop", "abort"]

# A suspect is on probation for its next token and for those that a pipeline of two steps may have drawn, and not
# delivered, before the crash: then it is past the position at which the engine went down.
PROBATION_TOKENS = 3

# Ids that were aborted lately: what is still drawn for them is counted under the reason of the abort.
_MAX_ABORTED = 4096

CRASHED_TWICE = "the engine went down twice while it worked on this request"
ENGINE_FAILED = "the engine failed and is not started again"


@dataclass(slots=True)
class Arrival:
    """All that has arrived for one choice since its reader last looked: one delta, or several merged.

    first_at, last_at: when the first and the last token came, in seconds of the client's clock. details: of the
    tokens, joined; prompt_scores: pieces of packed scores and the positions at which they begin. refused: the engine
    did not begin it, and `error` says why, for the client.
    """

    index: int
    token_ids: list[int]
    first_at: float
    last_at: float
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    first: FirstToken | None = None
    scores: bytes = b""
    explanations: list[Explanation] = field(default_factory=list)
    prompt_scores: list[tuple[int, bytes]] = field(default_factory=list)
    refused: bool = False

    def add_details(self, details: Details) -> None:
        """Take over what came with a delta."""
        self.scores += details.scores
        self.explanations += details.explanations
        if details.prompt_scores:
            self.prompt_scores.append((details.prompt_start, details.prompt_scores))


class Mailbox:
    """What has arrived for one request, all its choices, and was not read yet.

    The client puts, one reader receives. Unread arrivals of a choice merge, so a mailbox holds at most one arrival a
    choice, and no more token ids than the request may generate.
    """

    __slots__ = ("_arrivals", "_waiter", "routes")

    def __init__(self) -> None:
        self.routes: list[_Route] = []
        self._arrivals: dict[int, Arrival] = {}
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, delta: Delta, now: float) -> None:
        """Add a delta. The reader is not woken yet."""
        arrival = self._arrivals.get(index)
        if arrival is None:
            arrival = self._arrivals[index] = Arrival(
                index, delta.token_ids, now, now, delta.finish_reason, delta.stop_token_id, delta.error, delta.first
            )
            arrival.refused = delta.refused
            if delta.details is not None:
                arrival.add_details(delta.details)
            return
        if delta.details is not None:
            arrival.add_details(delta.details)
        if delta.token_ids:
            if not arrival.token_ids:
                arrival.first_at = now
            arrival.token_ids += delta.token_ids
            arrival.last_at = now
        arrival.finish_reason = delta.finish_reason
        arrival.stop_token_id = delta.stop_token_id
        arrival.error = delta.error
        arrival.refused = delta.refused
        arrival.first = arrival.first or delta.first

    def wake(self) -> None:
        """Let the reader run, if it waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[Arrival]:
        """Everything that has arrived, at least one arrival: waits for it. One reader at a time."""
        while not self._arrivals:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    def take(self) -> list[Arrival]:
        """Everything that has arrived, perhaps nothing. Does not wait."""
        arrivals = list(self._arrivals.values())
        self._arrivals.clear()
        return arrivals


@dataclass(slots=True, eq=False)
class _Route:
    """One choice of one request, from `open` to its end.

    engine_id  its id at the engine: a fresh one for each submission; None while it is not there
    delivered  tokens received from any engine so far
    suspected  it was in flight at a crash and has not been proven innocent since
    ended      its terminal arrival is in the mailbox, or its reader has gone
    """

    mailbox: Mailbox
    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    tenant: str
    cache_salt: str
    arrival: int
    dry_run: bool = False
    delivered: list[int] = field(default_factory=list)
    engine_id: int | None = None
    suspected: bool = False
    ended: bool = False


class EngineClient:
    """Owns the open requests and what is known of them at the engine. One event loop, one thread; nothing blocks.

    A request that is open is in exactly one place: at the engine (`_at_engine`), a suspect, or held back because the
    engine is not ready, is busy with a suspect, or does not read.

    After a crash, every request that was at the engine is a suspect. Suspects are replayed one by one, each alone in
    the engine, until it has drawn PROBATION_TOKENS more tokens or ended; then it is innocent, and waits for the others.
    So a crash during a probation has one possible cause: that request, in flight in two crashes, ends with ERROR.
    Everyone else goes on after the last probation, as prompt plus delivered tokens, in order of arrival.
    """

    def __init__(
        self, supervisor: Supervisor, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        supervisor.listener = self
        self._supervisor = supervisor
        self._metrics = metrics
        self._clock = clock
        self._engine_ids = itertools.count(1)
        self._arrivals = itertools.count(1)
        self._at_engine: dict[int, _Route] = {}
        self._held: dict[int, _Route] = {}  # by order of arrival
        self._suspects: deque[_Route] = deque()
        self._probation: _Route | None = None
        self._probation_left = 0
        self._await_idle = False  # a suspect was aborted in the middle: the engine may still be working on it
        self._aborted: dict[int, DiscardReason] = {}
        self._failed = False

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        suspects = sum(not route.ended for route in self._suspects)
        return len(self._at_engine) + len(self._held) + suspects

    def open(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        num_choices: int = 1,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        dry_run: bool = False,
    ) -> Mailbox:
        """Send a request. Whoever opens closes: `close` when the mailbox is read no more, whatever happened.

        dry_run: nothing is generated; the one arrival has `first`, with the number of cached tokens.
        """
        mailbox = Mailbox()
        for index in range(num_choices):
            order = next(self._arrivals)
            route = _Route(mailbox, index, prompt_token_ids, params, priority, tenant, cache_salt, order, dry_run)
            mailbox.routes.append(route)
            self._held[route.arrival] = route
            if self._failed:
                self._end(route, FinishReason.ERROR, ENGINE_FAILED)
        self._pump()
        return mailbox

    def close(self, mailbox: Mailbox) -> None:
        """The reader goes: what has not ended is aborted, what was not read is counted as discarded. Idempotent."""
        for arrival in mailbox.take():
            self._discard("abort", len(arrival.token_ids))
        for route in mailbox.routes:
            self._abandon(route, "abort")
        # Nobody needs them any more, and without the circle both are freed at once.
        mailbox.routes.clear()
        self._pump()

    def stop_choice(self, mailbox: Mailbox, index: int) -> None:
        """A stop string has ended this choice: whatever else is drawn for it is discarded. No arrival follows."""
        self._abandon(mailbox.routes[index], "stop")
        self._pump()

    def end(self, mailbox: Mailbox, reason: FinishReason, error: str | None = None) -> None:
        """End what has not ended yet, for a cause of ours. The reader gets what had arrived, and then this end."""
        for route in mailbox.routes:
            if not route.ended:
                self._abandon(route, "abort")
                self._end(route, reason, error)
        mailbox.wake()
        self._pump()

    # What the supervisor tells

    def engine_ready(self, ready: Ready) -> None:
        self._pump()

    def engine_writable(self) -> None:
        self._pump()

    def engine_idle(self) -> None:
        if self._await_idle:
            self._await_idle = False
            self._pump()

    def engine_output(self, output: StepOutput) -> None:
        """Fill all mailboxes first, then wake their readers: one wake a request and step."""
        now = self._clock()
        at_engine = self._at_engine
        mailboxes: list[Mailbox] = []
        for delta in output.deltas:
            route = at_engine.get(delta.request_id)
            if route is None:
                self._discard(self._aborted.get(delta.request_id, "abort"), len(delta.token_ids))
                continue
            route.delivered += delta.token_ids
            mailbox = route.mailbox
            mailbox.put(route.index, delta, now)
            mailboxes.append(mailbox)
            if delta.finish_reason is not None:
                del at_engine[delta.request_id]
                route.engine_id = None
                route.ended = True
            if route is self._probation:
                self._probation_left -= len(delta.token_ids)
        if output.stats is not None:
            self._metrics.engine_step(output.stats)
        for mailbox in mailboxes:
            mailbox.wake()
        if self._probation is not None:
            self._pump()

    def engine_down(self) -> None:
        in_flight = sorted(self._at_engine.values(), key=lambda route: route.arrival)
        self._at_engine.clear()
        self._aborted.clear()
        self._probation = None
        self._await_idle = False
        for route in in_flight:
            route.engine_id = None
            if route.suspected:
                self._end(route, FinishReason.ERROR, CRASHED_TWICE)
                route.mailbox.wake()
            else:
                route.suspected = True
                self._suspects.append(route)

    def engine_failed(self, cause: str) -> None:
        self._failed = True
        for route in [*self._held.values(), *self._suspects]:
            if not route.ended:
                self._end(route, FinishReason.ERROR, ENGINE_FAILED)
                route.mailbox.wake()
        self._suspects.clear()

    # Places: a route is held, a suspect, or at the engine

    def _pump(self) -> None:
        """Submit whatever may be submitted now."""
        probation = self._probation
        if probation is not None:
            if not probation.ended and self._probation_left > 0:
                return
            self._probation = None
            probation.suspected = False
        while self._suspects and self._suspects[0].ended:
            self._suspects.popleft()
        if self._supervisor.state != "ready" or self._await_idle:
            return
        if self._suspects:
            if probation is not None and not probation.ended:
                # Innocent; but the next suspect must be alone too.
                self._abort(probation, "abort")
                self._held[probation.arrival] = probation
            if not self._at_engine:
                self._probation = self._suspects.popleft()
                self._probation_left = PROBATION_TOKENS
                self._submit(self._probation)
            return
        if self._held:
            for arrival in sorted(self._held):
                if not self._supervisor.writable:
                    break
                self._submit(self._held.pop(arrival))

    def _submit(self, route: _Route) -> None:
        route.engine_id = next(self._engine_ids)
        self._at_engine[route.engine_id] = route
        self._supervisor.send(
            Submit(
                request_id=route.engine_id,
                prompt_token_ids=route.prompt_token_ids,
                params=route.params,
                output_token_ids=route.delivered,
                choice=route.index,
                priority=route.priority,
                tenant=route.tenant,
                cache_salt=route.cache_salt,
                arrival=route.arrival,
                dry_run=route.dry_run,
            )
        )

    def _abort(self, route: _Route, reason: DiscardReason) -> None:
        """Take a route away from the engine, or from where it waits."""
        self._held.pop(route.arrival, None)
        if route.engine_id is None:
            return
        del self._at_engine[route.engine_id]
        self._supervisor.send(Abort([route.engine_id]))
        self._aborted[route.engine_id] = reason
        if len(self._aborted) > _MAX_ABORTED:
            del self._aborted[next(iter(self._aborted))]
        route.engine_id = None

    def _abandon(self, route: _Route, reason: DiscardReason) -> None:
        if not route.ended:
            self._abort(route, reason)
            route.ended = True
            self._await_idle |= route is self._probation

    def _end(self, route: _Route, reason: FinishReason, error: str | None) -> None:
        self._held.pop(route.arrival, None)
        route.ended = True
        route.mailbox.put(route.index, Delta(0, [], reason, error=error), self._clock())

    def _discard(self, reason: DiscardReason, count: int) -> None:
        if count:
            self._metrics.tokens_discarded(reason, count)
