"""Bugs that the simulation has to find: each is one plausible mistake in the scheduler, the pool or the queue.

Every class is the real scheduler but for its docstring. `BUGS` has them by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from types import MethodType

from server.engine.block_pool import BlockKey
from server.engine.books import Entry
from server.engine.plan import PlannedRequest, RequestOutput, StepCounters, StepPlan, StepResult
from server.engine.request import Request, RequestStatus
from server.engine.scheduler import Scheduler
from tests.simulation.driver import MakeScheduler


class EarlyPublish(Scheduler):
    """Blocks can be found as soon as they are planned, before anything is computed."""

    def _plan(self, entry: Entry, start: int, end: int) -> PlannedRequest:
        planned = super()._plan(entry, start, end)
        if self.config.prefix_caching and not planned.num_inflight:
            super()._publish(entry, planned)
        return planned

    def _publish(self, entry: Entry, planned: PlannedRequest) -> None:
        pass


class PublishInFlight(Scheduler):
    """Publishes up to num_computed_tokens, which counts steps whose result is not known."""

    def _publish(self, entry: Entry, planned: PlannedRequest) -> None:
        size, request = self.config.block_size, entry.request
        for index in range(min(request.num_computed_tokens, request.num_known_tokens) // size):
            if index < len(request.block_ids) and self.pool._keys[request.block_ids[index]] is None:
                self.pool.publish(request.block_ids[index], self._key(entry, index))


class PublishNan(Scheduler):
    """A row that is not finite leaves its blocks in the cache."""

    def _finish_with_error(self, entry: Entry, block_ids: Sequence[int], error: str) -> RequestOutput:
        for index in range(entry.request.num_known_tokens // self.config.block_size):
            if self.config.prefix_caching and index < len(block_ids) and self.pool._keys[block_ids[index]] is None:
                self.pool.publish(block_ids[index], self._key(entry, index))
        return super()._finish_with_error(entry, (), error)


class PartialTailPublished(Scheduler):
    """Publishes a last block that is not full yet."""

    def _publish(self, entry: Entry, planned: PlannedRequest) -> None:
        super()._publish(entry, planned)
        size, end = self.config.block_size, planned.start + planned.num_new_tokens
        known = end % size and end // size * size + size <= entry.request.num_known_tokens
        if known and self.pool._keys[planned.block_ids[-1]] is None:
            self.pool.publish(planned.block_ids[-1], self._key(entry, end // size))


class DigestOnly(Scheduler):
    """A hit is a hit when the digests agree: what they stand for is not compared."""

    def _find_prefix(self, entry: Entry) -> list[int]:
        found = []
        for index in range((entry.request.num_known_tokens - 1) // self.config.block_size):
            block_id = self.pool._published.get(self._key(entry, index).digest)
            if block_id is None or not self.config.prefix_caching:
                break
            found.append(block_id)
        return found


class OwnTokensOnly(Scheduler):
    """A hit compares the block's own tokens, not those before it: colliding parents pass for each other."""

    def _find_prefix(self, entry: Entry) -> list[int]:
        found = []
        for index in range((entry.request.num_known_tokens - 1) // self.config.block_size):
            key = self._key(entry, index)
            block_id = self.pool._published.get(key.digest)
            other = None if block_id is None else self.pool._keys[block_id]
            if other is None or other.token_ids != key.token_ids or not self.config.prefix_caching:
                break
            assert block_id is not None
            found.append(block_id)
        return found


class SaltForgotten(Scheduler):
    """The cache salt is not part of the key."""

    def _key(self, entry: Entry, index: int) -> BlockKey:
        salt, entry.request.cache_salt = entry.request.cache_salt, ""
        try:
            return super()._key(entry, index)
        finally:
            entry.request.cache_salt = salt


class TenantForgotten(Scheduler):
    """The tenant is not part of the key: one finds what another has sent."""

    def _key(self, entry: Entry, index: int) -> BlockKey:
        tenant, entry.request.tenant = entry.request.tenant, ""
        try:
            return super()._key(entry, index)
        finally:
            entry.request.tenant = tenant


class StaleHash(Scheduler):
    """A block that is handed out again can still be found under its old content."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]

        def allocate(pool: object, count: int) -> list[int]:
            pool = self.pool
            block_ids = []
            for _ in range(count):
                block_id = pool._free.pop() if pool._free else pool._cached.popitem(last=False)[0]
                pool._ref_counts[block_id] = 1
                block_ids.append(block_id)
            return block_ids

        self.pool.allocate = MethodType(allocate, self.pool)  # type: ignore[method-assign]


class StaleKeys(Scheduler):
    """A preempted request loses the key of its first block, and all others move up by one."""

    def _preempt(self, entry: Entry) -> None:
        super()._preempt(entry)
        del entry.keys[:1]


class WholePromptHit(Scheduler):
    """A prompt that is cached to its last token leaves nothing to compute, and so nothing to draw from."""

    def _find_prefix(self, entry: Entry) -> list[int]:
        found: list[int] = []
        for index in range(entry.request.num_known_tokens // self.config.block_size):
            block_id = self.pool.find(self._key(entry, index)) if self.config.prefix_caching else None
            if block_id is None:
                break
            found.append(block_id)
        return found


class ReleaseInFlight(Scheduler):
    """Blocks are free at once, though a step in flight still writes them."""

    def _release(self, entry: Entry) -> None:
        block_ids, entry.request.block_ids = entry.request.block_ids, []
        self.pool.release(block_ids)


class LeakOnAbort(Scheduler):
    """An aborted request takes its last block with it."""

    def abort(self, request_id: int) -> Request | None:
        entry = self._entries.get(request_id)
        if entry is not None and entry.request.block_ids:
            entry.request.block_ids.pop()
        return super().abort(request_id)


class LeakWhenShared(Scheduler):
    """A block taken from the cache is given one reference too many."""

    def _find_prefix(self, entry: Entry) -> list[int]:
        found = super()._find_prefix(entry)
        return found + found[-1:] if len(found) == 2 else found


class DoubleFree(Scheduler):
    """A request that is preempted gives its first block back twice."""

    def _preempt(self, entry: Entry) -> None:
        entry.request.block_ids += entry.request.block_ids[:1]
        super()._preempt(entry)


class LostReset(Scheduler):
    """A preempted request believes that its first blocks are still computed."""

    def _admit(self) -> Entry | None:
        entry = super()._admit()
        if entry is not None and entry.request.num_preemptions:
            computed = min(entry.request.computed_high_water, entry.request.num_known_tokens - 1)
            entry.request.num_computed_tokens = max(entry.request.num_computed_tokens, computed)
        return entry


class LostRequest(Scheduler):
    """A request that is preempted while a step is in flight is never queued again."""

    def _preempt(self, entry: Entry) -> None:
        super()._preempt(entry)
        for flight in self._flights:
            flight.requeue = []


class LostSample(Scheduler):
    """The token that is in flight when its request is preempted is dropped."""

    def update(self, result: StepResult) -> list[RequestOutput]:
        outputs = super().update(result)
        for output in outputs:
            if output.request.status is RequestStatus.WAITING:
                del output.request.output_token_ids[-len(output.token_ids) :]
        return outputs


class RollbackKeepsProgress(Scheduler):
    """A step that failed still counts as computed."""

    def rollback(self, step_id: int) -> None:
        ends = {
            planned.request.request_id: planned.start + planned.num_new_tokens
            for flight in self._flights
            for planned in flight.plan.requests
            if flight.plan.step_id == step_id and not planned.samples
        }
        super().rollback(step_id)
        for entry in self._running:
            entry.request.num_computed_tokens = ends.get(entry.request.request_id, entry.request.num_computed_tokens)


class RollbackOneStep(Scheduler):
    """Undoing a step leaves the one after it in flight, though it builds on what was never computed."""

    def rollback(self, step_id: int) -> None:
        later = [flight for flight in self._flights if flight.plan.step_id > step_id]
        self._flights = deque(flight for flight in self._flights if flight.plan.step_id <= step_id)
        super().rollback(step_id)
        self._flights += later


class ResultNotChecked(Scheduler):
    """Any result is taken for that of the oldest step."""

    def update(self, result: StepResult) -> list[RequestOutput]:
        if self._flights:
            rows = result.rows[: len(self._flights[0].plan.requests)]
            result = StepResult(self._flights[0].plan.step_id, rows)
        return super().update(result)


class PastTheLimit(Scheduler):
    """At depth 2 a request is planned once more while its last token is in flight."""

    def schedule(self, only: int | None = None) -> StepPlan | None:
        limits = {id(entry): entry.limit for entry in self._running}
        for entry in self._running:
            entry.limit += 1
        plan = super().schedule(only)
        for entry in self._running:
            entry.limit = limits.get(id(entry), entry.limit)
        return plan


class EndsEarly(Scheduler):
    """The limit is one token short where the prompt ends with a block."""

    def add(self, request: Request) -> None:
        super().add(request)
        entry = self._entries[request.request_id]
        if request.num_prompt_tokens % self.config.block_size == 0 and entry.limit > request.num_known_tokens + 1:
            entry.limit -= 1


class EosNotIgnored(Scheduler):
    """An end-of-sequence token ends a request that asked to go on."""

    def update(self, result: StepResult) -> list[RequestOutput]:
        for request in self.requests:
            request.params = replace(request.params, ignore_eos=False)
        return super().update(result)


class WrongOutputIndex(Scheduler):
    """After a preemption the position that a draw depends on starts again from the prompt."""

    def _plan(self, entry: Entry, start: int, end: int) -> PlannedRequest:
        planned = super()._plan(entry, start, end)
        if entry.request.num_preemptions and planned.num_new_tokens > 1:
            object.__setattr__(planned, "output_index", 0)
        return planned


class PromptsStallStreams(Scheduler):
    """Prompts may fill a step although streams run."""

    def schedule(self, only: int | None = None) -> StepPlan | None:
        config = self.config
        object.__setattr__(config, "mixed_step_tokens", config.mixed_step_tokens + 100)
        try:
            return super().schedule(only)
        finally:
            object.__setattr__(config, "mixed_step_tokens", config.mixed_step_tokens - 100)


class PromptsFirst(Scheduler):
    """While a prompt is catching up, a stream waits."""

    def schedule(self, only: int | None = None) -> StepPlan | None:
        running = self._running
        prompts = [e for e in running if e.request.num_tokens - e.request.num_computed_tokens > 1]
        self._running = prompts if prompts and len(prompts) < len(running) and only is None else running
        held_back = [entry for entry in running if entry not in self._running]
        plan = super().schedule(only)
        self._running = sorted([*self._running, *held_back], key=lambda entry: entry.rank)
        return plan


class NoAging(Scheduler):
    """Priority is not aged: the last in rank waits for as long as better ones come."""

    def add(self, request: Request) -> None:
        super().add(request)
        entry = self._entries[request.request_id]
        if entry.queued:
            self._queue.remove(request, entry.rank)
            entry.rank = (-1_000_000 * request.priority, request.arrival, request.request_id)
            self._queue.push(request, entry.rank, entry.limit)


class TenantsInOrder(Scheduler):
    """Whoever came first goes first, whichever tenant sends the most."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        queue = self._queue

        def peek(_: object, among: Collection[str] | None = None) -> Request | None:
            heads = [
                tenant.waiting[0]
                for name, tenant in queue._tenants.items()
                if tenant.waiting and (among is None or name in among)
            ]
            return min(heads, key=lambda waiting: waiting.rank).request if heads else None

        queue.peek = MethodType(peek, queue)  # type: ignore[method-assign]


class FloodsFillSteps(Scheduler):
    """A step is as long as all who run make it."""

    def _share(self, running: list[Entry]) -> None:
        return None


class SameStreamsEveryStep(Scheduler):
    """Of a tenant that has no room for all its streams, the best by rank have it in every step."""

    def schedule(self, only: int | None = None) -> StepPlan | None:
        for entry in self._running:
            entry.turn = 0
        return super().schedule(only)


class NoPlaceByRight(Scheduler):
    """A tenant without a place waits until the flood leaves it one."""

    def _admit_by_right(self, displaced: list[int]) -> bool:
        return True


class WorstVictimFirst(Scheduler):
    """The best of those behind a stream in need is preempted, not the last."""

    def _make_room(self, entry: Entry, preempted: list[int]) -> bool:
        behind = self._running.index(entry) + 1
        if behind < len(self._running):
            self._running.append(self._running.pop(behind))
        return super()._make_room(entry, preempted)


class TooManyVictims(Scheduler):
    """A stream goes on preempting, though the blocks it needs come back with a step in flight."""

    def _make_room(self, entry: Entry, preempted: list[int]) -> bool:
        while not super()._make_room(entry, preempted):
            if self._running[-1] is entry:
                return False
        return True


class CountsLostByRollback(Scheduler):
    """What was counted with a step that failed is forgotten."""

    def rollback(self, step_id: int) -> None:
        super().rollback(step_id)
        self._pending = StepCounters()


class DiscardsNotCounted(Scheduler):
    """Tokens drawn for requests that have ended vanish from the books."""

    def update(self, result: StepResult) -> list[RequestOutput]:
        outputs = super().update(result)
        self.last_step.pipeline_discarded_tokens = 0
        return outputs


class LostByRollback(Scheduler):
    """A request that waits for a step to be over is forgotten when that step is undone and an older one goes on."""

    def rollback(self, step_id: int) -> None:
        for flight in self._flights:
            if self._flights[0].plan.step_id < step_id <= flight.plan.step_id:
                flight.requeue = []
        super().rollback(step_id)


class FollowersWaitForEachOther(Scheduler):
    """A request waits for a prefix that another waiting request is going to compute."""

    def _is_computing_next_block(self, entry: Entry, index: int) -> bool:
        running, self._running = self._running, [other for other in self._entries.values() if other is not entry]
        waits = super()._is_computing_next_block(entry, index)
        self._running = running
        return waits


class NoReserve(Scheduler):
    """Newcomers take the blocks that running streams are about to need."""

    def _will_grow(self, entry: Entry, num_blocks: int) -> bool:
        return False


class FreeListForgotten(Scheduler):
    """Blocks that remember nothing are put among the cached ones."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        pool = self.pool

        def release(_: object, block_ids: Sequence[int]) -> None:
            for block_id in block_ids:
                pool._ref_counts[block_id] -= 1
                if pool._ref_counts[block_id] == 0:
                    pool._cached[block_id] = None

        pool.release = MethodType(release, pool)  # type: ignore[method-assign]


BUGS: dict[str, MakeScheduler] = {
    bug.__name__: bug
    for bug in (
        EarlyPublish,
        PublishInFlight,
        PublishNan,
        PartialTailPublished,
        DigestOnly,
        OwnTokensOnly,
        SaltForgotten,
        TenantForgotten,
        StaleHash,
        StaleKeys,
        WholePromptHit,
        ReleaseInFlight,
        LeakOnAbort,
        LeakWhenShared,
        DoubleFree,
        LostReset,
        LostRequest,
        LostSample,
        RollbackKeepsProgress,
        RollbackOneStep,
        ResultNotChecked,
        PastTheLimit,
        EndsEarly,
        EosNotIgnored,
        WrongOutputIndex,
        PromptsStallStreams,
        PromptsFirst,
        NoAging,
        TenantsInOrder,
        FloodsFillSteps,
        SameStreamsEveryStep,
        NoPlaceByRight,
        WorstVictimFirst,
        TooManyVictims,
        CountsLostByRollback,
        DiscardsNotCounted,
        LostByRollback,
        FollowersWaitForEachOther,
        NoReserve,
        FreeListForgotten,
    )
}
