"""Continuous batching: which requests compute which positions in the next step, and where their K and V lie.

There is no prefill phase and no decode phase. Each request has `num_tokens` and `num_computed_tokens`, and a step lets
some requests catch up. A stream that decodes is a request with one token to catch up; a new prompt has many, and may
take several steps (a chunked prefill); a preempted request starts again from zero; a prefix found in the cache is a
request that starts further along. Whoever reaches its last token draws the next one.

    plan = scheduler.schedule()             what to compute: up to `pipeline_depth` plans are in flight at a time
    outputs = scheduler.update(result)      what came of the oldest plan: tokens, ends, blocks to publish or free

Both are pure: the next plan is a function of the calls so far, and of nothing else.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from server.engine.block_pool import BlockKey, BlockPool, Digest, IntegrityError, sha256
from server.engine.config import SchedulerConfig
from server.engine.fair_queue import FairQueue, Rank
from server.engine.plan import PlannedRequest, RequestOutput, RowResult, StepCounters, StepPlan, StepResult
from server.engine.request import FinishReason, Request, RequestStatus

__all__ = ["AdmissionError", "Scheduler", "StepCounters"]


class AdmissionError(Exception):
    """A request that could never run here, however long it waited. The message has the numbers."""


@dataclass(slots=True, eq=False)
class _Entry:
    """What the scheduler knows of an open request, beside the request.

    rank      its place among all others, fixed when it is added; smaller is better
    limit     tokens, prompt and output, at which it ends
    keys      keys of its full blocks from the first on, as far as they have been needed: each block is hashed once
    steps     ids of the plans in flight that it takes part in
    queued    whether it is in the queue. A preempted request waits outside until the steps above are over
    paid      whether its tenant has paid for it; being preempted costs nothing
    """

    request: Request
    rank: Rank
    limit: int
    keys: list[BlockKey] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    queued: bool = False
    paid: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """A plan whose result is not known. Blocks in `release` and requests in `requeue` were in use until it is."""

    plan: StepPlan
    counters: StepCounters
    release: list[list[int]] = field(default_factory=list)
    requeue: list[_Entry] = field(default_factory=list)


class Scheduler:
    """Owns the open requests, the block pool and the plans in flight; the only one that changes any of them.

    Order. Every request has a rank: the step in which it was added, minus `priority_aging_steps` for each level of
    priority, then its arrival. That is priority with aging: as all who wait age alike, it is enough that newcomers
    start behind. Within a tenant the best rank is admitted first; tenants take turns (`FairQueue`). Running requests
    are served by rank, and when blocks run out the last one by rank is preempted. So the best-ranked running request
    always goes on, and since every newcomer eventually ranks behind, nothing starves.

    Blocks. A request is admitted with the blocks of all its known tokens; from then on only decoding takes blocks, one
    at a time. Admission leaves one block to every running stream that is going to need one, so that nobody has to be
    preempted for a newcomer before each stream has had `block_size` more tokens. Blocks that a step in flight reads or
    writes are given back when it is over, never before.

    Preemption is by recomputation. A request that has rows in flight keeps the tokens they draw: a token depends on the
    request alone. It waits for those rows, then queues up with its old rank. When the stream in need is itself the
    last by rank, it keeps its blocks and stands still until another one ends.

    Errors. `add` raises AdmissionError or ValueError, `update` and `rollback` raise ValueError, and nothing changes.
    IntegrityError means a bug in here.
    """

    def __init__(self, config: SchedulerConfig, digest: Digest = sha256) -> None:
        if config.max_running > config.max_tokens_per_step:
            raise ValueError(
                f"max_tokens_per_step is {config.max_tokens_per_step}: "
                f"{config.max_running} running streams (max_running) need one token each"
            )
        if min(config.max_running, config.mixed_step_tokens, config.pipeline_depth, config.priority_aging_steps) < 1:
            raise ValueError("max_running, mixed_step_tokens, pipeline_depth and priority_aging_steps start at 1")
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size, digest)
        self.last_step = StepCounters()  # of the step that was completed last
        self._entries: dict[int, _Entry] = {}
        self._running: list[_Entry] = []  # by rank
        self._queue = FairQueue(quantum=config.block_size)
        self._flights: deque[_Flight] = deque()  # oldest first
        self._next_step_id = 0
        self._pending = StepCounters()  # what happened since the last plan

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Plans whose result is not known."""
        return len(self._flights)

    @property
    def has_work(self) -> bool:
        """Whether anything is open or in flight."""
        return bool(self._entries or self._flights)

    @property
    def requests(self) -> Iterator[Request]:
        """Open requests, in the order in which they were added."""
        return (entry.request for entry in self._entries.values())

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. With output_token_ids it goes on after the last of them.

        Raises AdmissionError when it could never run, ValueError when its id is open or it is not new.
        """
        if request.request_id in self._entries:
            raise ValueError(f"request {request.request_id} is open already")
        if request.status is not RequestStatus.WAITING or request.block_ids:
            raise ValueError(f"request {request.request_id} is not new: it is {request.status}")
        config, known = self.config, request.num_known_tokens
        if not request.prompt_token_ids:
            raise AdmissionError("the prompt is empty: at least one token is needed")
        if known >= config.max_model_len:
            raise AdmissionError(
                f"{known} tokens leave no room for a new one: prompt and output have {config.max_model_len} at most"
            )
        limit = min(request.num_prompt_tokens + request.params.max_new_tokens, config.max_model_len)
        if known >= limit:
            raise AdmissionError(
                f"nothing is left to generate: {len(request.output_token_ids)} of "
                f"{request.params.max_new_tokens} new tokens are there"
            )
        # The last token's K and V are never needed: nothing comes after it.
        blocks = self.pool.blocks_for(limit - 1)
        if blocks > config.num_blocks:
            raise AdmissionError(
                f"{limit} tokens ({request.num_prompt_tokens} of the prompt, the rest new) need {blocks} blocks of "
                f"{config.block_size} tokens, and the cache has {config.num_blocks}: ask for fewer tokens"
            )
        rank = (
            self._next_step_id - request.priority * config.priority_aging_steps,
            request.arrival,
            request.request_id,
        )
        entry = _Entry(request, rank, limit)
        self._entries[request.request_id] = entry
        self._enqueue(entry)

    def abort(self, request_id: int) -> Request | None:
        """End a request that nobody wants any more; None if it is not open. Tokens still in flight are dropped."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._finish(entry)
        return entry.request

    def fail(self, request_id: int, error: str) -> RequestOutput | None:
        """End a request with ERROR, for a reason that the runner has found; None if it is not open.

        Nothing it has read or written is found again in the cache.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        return self._finish_with_error(entry, entry.request.block_ids, error)

    def preempt(self, request_id: int) -> bool:
        """Take a running request's blocks away, as when memory is short; False if it is not running."""
        entry = self._entries.get(request_id)
        if entry is None or entry.request.status is not RequestStatus.RUNNING:
            return False
        self._preempt(entry)
        return True

    # ---- planning a step ----

    def schedule(self, only: int | None = None) -> StepPlan | None:
        """The next step, or None: nothing can run, or the pipeline is full.

        With `only`, a step of that one request, if it runs, with no more of its prompt than in a mixed step: how the
        core finds out which request makes the forward pass fail.
        """
        config = self.config
        if len(self._flights) >= config.pipeline_depth:
            return None
        chosen = [e for e in self._running if only is None or e.request.request_id == only]
        rows: list[PlannedRequest] = []
        preempted: list[int] = []

        # Streams first: one token each, best rank first. All of them fit, since max_running <= max_tokens_per_step.
        streaming = False
        short_of_blocks = False
        for entry in chosen:
            request = entry.request
            if request.num_tokens - request.num_computed_tokens != 1 or request.status is not RequestStatus.RUNNING:
                continue
            if request.num_tokens >= entry.limit:
                continue  # the token in flight is its last one
            streaming = True
            if request.num_computed_tokens == len(request.block_ids) * config.block_size:
                if not self.pool.num_available and (short_of_blocks or not self._make_room(entry, preempted)):
                    short_of_blocks = True
                    continue
                request.block_ids += self.pool.allocate(1)
            rows.append(self._plan(entry, 1))

        # Then whoever has more to catch up, within what is left: little beside streams, so that they do not stall.
        budget = config.max_tokens_per_step - len(rows)
        if streaming or only is not None:
            budget = min(budget, config.mixed_step_tokens)
        for entry in chosen:
            request = entry.request
            remaining = request.num_tokens - request.num_computed_tokens
            if remaining > 1 and budget and request.status is RequestStatus.RUNNING:
                rows.append(self._plan(entry, min(remaining, budget)))
                budget -= rows[-1].num_new_tokens

        # Then newcomers, unless memory is short: what a preemption has freed is not for them.
        if only is None and not short_of_blocks and not preempted:
            while budget and (admitted := self._admit()) is not None:
                request = admitted.request
                rows.append(self._plan(admitted, min(request.num_tokens - request.num_computed_tokens, budget)))
                budget -= rows[-1].num_new_tokens

        if not rows:
            return None
        plan = StepPlan(self._next_step_id, tuple(rows), tuple(preempted))
        self._flights.append(_Flight(plan, self._pending))
        self._pending = StepCounters()
        self._next_step_id += 1
        return plan

    def _plan(self, entry: _Entry, num_new_tokens: int) -> PlannedRequest:
        request = entry.request
        start = request.num_computed_tokens
        end = start + num_new_tokens
        planned = PlannedRequest(
            request=request,
            start=start,
            num_new_tokens=num_new_tokens,
            block_ids=tuple(request.block_ids[: self.pool.blocks_for(end)]),
            samples=end == request.num_tokens,
            output_index=len(request.output_token_ids) + request.num_inflight_samples,
            num_inflight=max(0, end - request.num_known_tokens),
        )
        request.num_computed_tokens = end
        if planned.samples:
            request.num_inflight_samples += 1
        entry.steps.append(self._next_step_id)
        return planned

    def _make_room(self, entry: _Entry, preempted: list[int]) -> bool:
        """Preempt from the last by rank until a block is available for this stream; False if it has to stand still.

        Nobody behind it by rank has been planned yet: streams are planned by rank, the others after them.
        """
        while not self.pool.num_available:
            victim = self._running[-1]
            if victim is entry:
                return False
            in_flight = bool(victim.steps)
            self._preempt(victim)
            preempted.append(victim.request.request_id)
            if in_flight:
                return False  # its blocks come back with that step: one preemption at a time
        return True

    def _admit(self) -> _Entry | None:
        """Let the next waiting request run, with blocks for all its known tokens; None if it has to wait."""
        request = self._queue.peek()
        if request is None or len(self._running) >= self.config.max_running:
            return None
        entry = self._entries[request.request_id]
        shared = self._find_prefix(entry)
        needed = self.pool.blocks_for(request.num_known_tokens) - len(shared)
        available = self.pool.num_available - sum(self.pool.is_cached(block_id) for block_id in shared)
        reserve = 0
        if self._running:  # a lone request needs none: it fits, or it would not have been added
            reserve = sum(self._will_grow(other, len(other.request.block_ids)) for other in self._running)
            reserve += self._will_grow(entry, needed + len(shared))
        if needed + reserve > available:
            return None

        self._queue.pop(request)
        entry.queued = False
        self.pool.share(shared)
        request.block_ids = shared + self.pool.allocate(needed)
        request.num_computed_tokens = len(shared) * self.config.block_size
        request.status = RequestStatus.RUNNING
        insort(self._running, entry, key=lambda other: other.rank)
        if not entry.paid:
            entry.paid = True
            self._queue.refund(request.tenant, request.num_computed_tokens)
        if self.config.prefix_caching:
            self._pending.prefix_queried_tokens += request.num_known_tokens
            self._pending.prefix_hit_tokens += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._pending.cached_prompt_tokens += request.num_cached_tokens
        return entry

    def _will_grow(self, entry: _Entry, num_blocks: int) -> bool:
        """Whether a request that has so many blocks is going to need more."""
        return self.pool.blocks_for(entry.limit - 1) > num_blocks

    # ---- what came of a step ----

    def update(self, result: StepResult) -> list[RequestOutput]:
        """Take in the result of the oldest plan in flight: what the outside learns of it, in the plan's order.

        Raises ValueError, and changes nothing, when the result is not that plan's.
        """
        flight = self._check_result(result)
        self._flights.popleft()
        counters = self.last_step = flight.counters
        outputs = []
        for planned, row in zip(flight.plan.requests, result.rows, strict=True):
            request = planned.request
            self._count(counters, planned, row)
            if request.status is RequestStatus.FINISHED:
                counters.pipeline_discarded_tokens += len(row.token_ids)
                continue
            entry = self._entries[request.request_id]
            entry.steps.pop(0)
            if planned.samples:
                request.num_inflight_samples -= 1
            if row.error is not None:
                outputs.append(self._finish_with_error(entry, planned.block_ids, row.error))
                continue
            self._publish(entry, planned)
            if row.token_ids:
                output = self._take_tokens(entry, row.token_ids)
                counters.pipeline_discarded_tokens += len(row.token_ids) - len(output.token_ids)
                outputs.append(output)
        self._land(flight)
        return outputs

    def _check_result(self, result: StepResult) -> _Flight:
        if not self._flights:
            raise ValueError(f"a result of step {result.step_id}, and no step is in flight")
        flight = self._flights[0]
        plan = flight.plan
        if result.step_id != plan.step_id:
            raise ValueError(f"a result of step {result.step_id} where that of step {plan.step_id} is due")
        if [row.request_id for row in result.rows] != [planned.request.request_id for planned in plan.requests]:
            raise ValueError(f"the rows of step {result.step_id} are not those of its plan")
        for planned, row in zip(plan.requests, result.rows, strict=True):
            if bool(row.token_ids) != (planned.samples and row.error is None):
                raise ValueError(f"step {result.step_id}: {len(row.token_ids)} tokens for request {row.request_id}")
        return flight

    def _count(self, counters: StepCounters, planned: PlannedRequest, row: RowResult) -> None:
        request, end = planned.request, planned.start + planned.num_new_tokens
        first_new = max(planned.start, min(end, request.computed_high_water))
        counters.recomputed_tokens += first_new - planned.start
        counters.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - first_new)
        counters.sampled_tokens += len(row.token_ids)
        request.computed_high_water = max(end, request.computed_high_water)

    def _take_tokens(self, entry: _Entry, token_ids: tuple[int, ...]) -> RequestOutput:
        """Append the tokens drawn, up to the one that ends the request, if one does."""
        request, params = entry.request, entry.request.params
        for index, token_id in enumerate(token_ids):
            request.output_token_ids.append(token_id)
            taken = token_ids[: index + 1]
            ends = token_id in params.stop_token_ids or (
                not params.ignore_eos and token_id in self.config.eos_token_ids
            )
            if ends and len(request.output_token_ids) > params.min_new_tokens:
                self._finish(entry)
                return RequestOutput(request, taken, FinishReason.STOP, stop_token_id=token_id)
            if request.num_known_tokens >= entry.limit:
                self._finish(entry)
                return RequestOutput(request, taken, FinishReason.LENGTH)
        return RequestOutput(request, token_ids)

    def rollback(self, step_id: int) -> None:
        """Undo a plan in flight whose forward pass has failed, and every later one, as if they had never been made.

        Requests keep their blocks and may be planned again at once; nothing they wrote is published. Requests that were
        preempted or ended in the meantime stay so. Raises ValueError when no such plan is in flight.
        """
        if all(flight.plan.step_id != step_id for flight in self._flights):
            raise ValueError(f"step {step_id} is not in flight")
        undone: list[_Flight] = []
        while self._flights and self._flights[-1].plan.step_id >= step_id:
            flight = self._flights.pop()
            undone.insert(0, flight)
            for planned in flight.plan.requests:
                request = planned.request
                if request.status is RequestStatus.FINISHED:
                    continue
                self._entries[request.request_id].steps.pop()
                if planned.samples:
                    request.num_inflight_samples -= 1
                if request.status is RequestStatus.RUNNING:
                    request.num_computed_tokens = planned.start
        for flight in undone:
            self._pending.add(flight.counters)
            if self._flights:  # an older step may still read those blocks
                self._flights[-1].release += flight.release
                self._flights[-1].requeue += flight.requeue
            else:
                self._land(flight)

    # ---- blocks ----

    def _land(self, flight: _Flight) -> None:
        """The step is over: what was in use until now is free."""
        for block_ids in flight.release:
            self.pool.release(block_ids)
        for entry in flight.requeue:
            if entry.request.status is RequestStatus.WAITING:
                self._enqueue(entry)

    def _release(self, entry: _Entry) -> None:
        """Give a request's blocks back, when the last step in flight that uses them is over."""
        request = entry.request
        block_ids, request.block_ids = request.block_ids, []
        if entry.steps:
            self._newest_flight(entry).release.append(block_ids)
        else:
            self.pool.release(block_ids)

    def _newest_flight(self, entry: _Entry) -> _Flight:
        for flight in self._flights:
            if flight.plan.step_id == entry.steps[-1]:
                return flight
        raise IntegrityError(f"request {entry.request.request_id} waits for step {entry.steps[-1]}: not in flight")

    def _find_prefix(self, entry: _Entry) -> list[int]:
        """Published blocks with the request's first tokens. At least one token is left over: its logits are needed."""
        found: list[int] = []
        if self.config.prefix_caching:
            for index in range((entry.request.num_known_tokens - 1) // self.config.block_size):
                block_id = self.pool.find(self._key(entry, index))
                if block_id is None:
                    break
                found.append(block_id)
        return found

    def _publish(self, entry: _Entry, planned: PlannedRequest) -> None:
        """Let others find the blocks that this step has filled. All their tokens are known by now."""
        if not self.config.prefix_caching:
            return
        block_size = self.config.block_size
        for index in range(planned.start // block_size, (planned.start + planned.num_new_tokens) // block_size):
            self.pool.publish(planned.block_ids[index], self._key(entry, index))

    def _key(self, entry: _Entry, index: int) -> BlockKey:
        """The key of a request's full block; those before it are made on the way."""
        keys, block_size = entry.keys, self.config.block_size
        while len(keys) <= index:
            start = len(keys) * block_size
            tokens = entry.request.token_ids(start, start + block_size)
            extra_keys = (entry.request.cache_salt,)
            keys.append(BlockKey(keys[-1] if keys else None, tokens, extra_keys, self.pool.digest))
        return keys[index]

    # ---- states ----

    def _enqueue(self, entry: _Entry) -> None:
        self._queue.push(entry.request, entry.rank, 0 if entry.paid else entry.limit)
        entry.queued = True

    def _preempt(self, entry: _Entry) -> None:
        request = entry.request
        self._running.remove(entry)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._pending.preemptions += 1
        self._release(entry)
        if entry.steps:
            self._newest_flight(entry).requeue.append(entry)
        else:
            self._enqueue(entry)

    def _finish(self, entry: _Entry) -> None:
        request = entry.request
        del self._entries[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self._running.remove(entry)
        elif entry.queued:
            self._queue.remove(request, entry.rank)
        if entry.paid:
            self._queue.refund(request.tenant, entry.limit - request.computed_high_water - 1)
        request.status = RequestStatus.FINISHED
        request.num_inflight_samples = 0
        self._release(entry)

    def _finish_with_error(self, entry: _Entry, block_ids: Sequence[int], error: str) -> RequestOutput:
        """End a request whose numbers went wrong. What it read may be the cause, so that is not found again either."""
        self.pool.withdraw(block_ids)
        self._finish(entry)
        return RequestOutput(entry.request, (), FinishReason.ERROR, error=error)

    # ---- the books ----

    def check_integrity(self) -> None:
        """Every invariant that can be seen from the inside, or IntegrityError. Linear in the pool and in the requests."""
        held = [block_id for entry in self._running for block_id in entry.request.block_ids]
        held += [block_id for flight in self._flights for blocks in flight.release for block_id in blocks]
        self.pool.check_integrity(held)
        steps: dict[int, list[int]] = {}
        for flight in self._flights:
            for planned in flight.plan.requests:
                steps.setdefault(planned.request.request_id, []).append(flight.plan.step_id)
                if any(self.pool.ref_count(block_id) == 0 for block_id in planned.block_ids):
                    raise IntegrityError(f"step {flight.plan.step_id} is in flight and its blocks are free")
        queued = list(self._queue)
        if [e.rank for e in self._running] != sorted(e.rank for e in self._running):
            raise IntegrityError("the running requests are out of order")
        if len(self._running) > self.config.max_running or len(queued) != len(self._queue):
            raise IntegrityError("too many requests run, or the queue has lost count")
        for entry in self._entries.values():
            self._check_entry(entry, queued)

    def _check_entry(self, entry: _Entry, queued: list[Request]) -> None:
        request = entry.request
        name = f"request {request.request_id} ({request.status})"
        running = entry in self._running
        if running != (request.status is RequestStatus.RUNNING) or request.status is RequestStatus.FINISHED:
            raise IntegrityError(f"{name} is in the wrong place")
        if entry.queued != (request in queued) or (running and entry.queued):
            raise IntegrityError(f"{name} has lost its place in the queue")
        if not running and (request.block_ids or request.num_computed_tokens):
            raise IntegrityError(f"{name} waits and holds blocks")
        if not running and not entry.queued and not any(entry in flight.requeue for flight in self._flights):
            raise IntegrityError(f"{name} waits and will never be queued again")
        if running and len(request.block_ids) < self.pool.blocks_for(request.num_computed_tokens):
            raise IntegrityError(f"{name} has computed more than its blocks hold")
        if request.num_tokens > entry.limit or request.num_known_tokens >= entry.limit:
            raise IntegrityError(f"{name} has passed its limit of {entry.limit} tokens")
        in_flight = {flight.plan.step_id for flight in self._flights}
        if not in_flight.issuperset(entry.steps):
            raise IntegrityError(f"{name} waits for steps {entry.steps} that are not in flight")
