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
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from server.engine.admission import AdmissionError, token_limit
from server.engine.block_pool import BlockKey, BlockPool, Digest, IntegrityError, sha256
from server.engine.books import Entry, Flight, check_books, check_result, count_row
from server.engine.config import SchedulerConfig
from server.engine.fair_queue import FairQueue
from server.engine.plan import PlannedRequest, RequestOutput, StepCounters, StepPlan, StepResult
from server.engine.request import FinishReason, Request, RequestStatus
from server.engine.step_budget import StepBudget
from server.engine.step_shares import LINGERING_STEPS, StepShares

__all__ = ["AdmissionError", "Scheduler", "StepCounters"]


class Scheduler:
    """Owns the open requests, the block pool and the plans in flight; the only one that changes any of them.

    Order. Every request has a rank: the step in which it was added, minus `priority_aging_steps` for each level of
    priority, then its arrival. That is priority with aging: as all who wait age alike, it is enough that newcomers
    start behind. Within a tenant the best rank is admitted first; tenants take turns (`FairQueue`). Running requests
    are served by rank, and when blocks run out the last one by rank is preempted. So the best-ranked running request
    always goes on, and since every newcomer eventually ranks behind, nothing starves.

    Sharing. While several tenants run, each gets a share of the step's time (`step_shares`), and its streams take turns
    within it, the one that was left out for longest first. Of the places a tenant may have as many as another one: if
    all are taken it displaces the last of the tenant that has most, and it does not wait or pay for a turn. Blocks are
    not shared out: whoever waits for them holds up all newcomers.

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
        self._entries: dict[int, Entry] = {}
        self._running: list[Entry] = []  # by rank
        self._places: Counter[str] = Counter()  # how many of them each tenant has that has any
        self._queue = FairQueue(quantum=config.block_size)
        self._flights: deque[Flight] = deque()  # oldest first
        self._last_ran: dict[str, int] = {}  # the step in which each tenant last ran, if that was lately
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
        limit = token_limit(request, self.config)
        rank = (
            self._next_step_id - request.priority * self.config.priority_aging_steps,
            request.arrival,
            request.request_id,
        )
        entry = Entry(request, rank, limit)
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

        What its blocks hold is not found again in the cache: it may be the cause.
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

    def cached_tokens(self, request: Request) -> int:
        """How many of a request's tokens lie in published blocks now. The request is not added."""
        return len(self._find_prefix(Entry(request, (0, 0, 0), 0))) * self.config.block_size

    # ---- planning a step ----

    def schedule(self, only: int | None = None) -> StepPlan | None:
        """The next step, or None: nothing can run, or the pipeline is full.

        With `only`, a step of that one request, if it runs, with no more of its prompt than in a mixed step: how the
        core finds out which request makes the forward pass fail.
        """
        config = self.config
        if len(self._flights) >= config.pipeline_depth:
            return None
        rows: list[PlannedRequest] = []
        preempted: list[int] = []
        displaced: list[int] = []
        nobody_waits_by_right = only is not None or self._admit_by_right(displaced)
        chosen = [e for e in self._running if only is None or e.request.request_id == only]
        shares = self._share(chosen) if only is None else None

        # Streams first: one token each, best rank first. All of them fit, since max_running <= max_tokens_per_step.
        streaming = short_of_blocks = False
        catching_up: list[Entry] = []
        for entry in chosen:
            if shares is not None and entry in shares.left_out:
                streaming = True
                continue  # it has its turn in a later step
            request = entry.request
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted a moment ago
            num_computed, num_tokens = request.num_computed_tokens, request.num_tokens
            if num_tokens >= entry.limit:
                continue  # the token in flight is its last one
            if request.waits_for_token:
                continue
            is_stream = num_tokens - num_computed == 1
            if is_stream:
                streaming = True
                entry.turn = self._next_step_id
            else:
                catching_up.append(entry)
            if self._is_full(entry):
                if not self.pool.num_available and (short_of_blocks or not self._make_room(entry, preempted)):
                    short_of_blocks = True
                    if shares is not None and is_stream:
                        shares.pass_on(request.tenant)
                    continue
                request.block_ids += self.pool.allocate(1)
            if is_stream:
                rows.append(self._plan(entry, num_computed, num_tokens))

        # Then whoever has more to catch up, within what is left: little beside streams, so that they do not stall.
        allowance = config.mixed_step_tokens if streaming or only is not None else None
        budget = StepBudget(config.max_tokens_per_step - len(rows), allowance, config.attention_span)
        for entry in catching_up:
            request = entry.request
            num_computed, num_tokens = request.num_computed_tokens, request.num_tokens
            if num_tokens - num_computed > 1 and request.status is RequestStatus.RUNNING:
                room = len(request.block_ids) * config.block_size - num_computed
                num_new_tokens = budget.room(num_computed, min(num_tokens - num_computed, room))
                if shares is not None:
                    num_new_tokens = shares.take_tokens(request.tenant, num_new_tokens)
                if num_new_tokens:
                    rows.append(self._plan(entry, num_computed, num_computed + num_new_tokens))
                    budget.spend(num_computed, num_new_tokens)

        # Then newcomers, unless memory is short: what a preemption has freed is not for them.
        if nobody_waits_by_right and only is None and not short_of_blocks and not preempted:
            while budget and (admitted := self._admit(self._queue.peek())) is not None:
                request = admitted.request
                num_computed = request.num_computed_tokens
                num_new_tokens = budget.room(num_computed, request.num_tokens - num_computed)
                if shares is not None:
                    num_new_tokens = shares.take_tokens(request.tenant, num_new_tokens)
                budget.spend(num_computed, num_new_tokens)
                if not num_new_tokens:  # one token, for it was its turn; but after that this step is full
                    num_new_tokens = 1
                    budget.close()
                rows.append(self._plan(admitted, num_computed, num_computed + num_new_tokens))

        if not rows:
            return None
        plan = StepPlan(self._next_step_id, tuple(rows), tuple(preempted), tuple(displaced))
        self._flights.append(Flight(plan, self._pending))
        self._pending = StepCounters()
        self._next_step_id += 1
        return plan

    def _share(self, running: list[Entry]) -> StepShares | None:
        """The next step's shares; None where one tenant has all of it."""
        for tenant in self._places:
            self._last_ran[tenant] = self._next_step_id
        if len(self._last_ran) > len(self._places):
            for tenant, step_id in list(self._last_ran.items()):
                if step_id < self._next_step_id - LINGERING_STEPS:
                    del self._last_ran[tenant]
        return StepShares(running, self.config, self._last_ran) if len(self._last_ran) > 1 else None

    def _plan(self, entry: Entry, start: int, end: int) -> PlannedRequest:
        request = entry.request
        num_known = request.num_known_tokens
        num_tokens = num_known + request.num_inflight_samples
        samples = end == num_tokens
        request.num_computed_tokens = end
        request.num_inflight_samples += samples
        entry.steps.append(self._next_step_id)
        return PlannedRequest(
            request=request,
            start=start,
            num_new_tokens=end - start,
            block_ids=tuple(request.block_ids[: self.pool.blocks_for(end)]),
            samples=samples,
            output_index=num_tokens - len(request.prompt_token_ids),
            num_inflight=max(0, end - num_known),
        )

    def _make_room(self, entry: Entry, preempted: list[int]) -> bool:
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

    def _admit_by_right(self, displaced: list[int]) -> bool:
        """Admit those that need no turn: of a tenant that has none of the places, or two fewer than another. If all are
        taken, the tenant that has most gives back the one that it got last. False if one of them has to wait."""
        places, waiting = self._places, self._queue.tenants
        followers: set[str] = set()  # whose next request waits for what another one of theirs is computing
        if not places or len(places.keys() | waiting) < 2:
            return True
        while True:
            full = len(self._running) >= self.config.max_running
            most = max(places.values(), default=0)
            entitled = {name for name in waiting if places[name] + (2 if full or places[name] else 1) <= most}
            request = self._queue.peek(entitled - followers)
            if request is None:
                return True
            entry = self._entries[request.request_id]
            if self._is_computing_next_block(entry, len(self._find_prefix(entry))):
                followers.add(request.tenant)
                continue
            victim = next((e for e in reversed(self._running) if places[e.request.tenant] == most), None)
            if self._admit(request, in_turn=False, victim=victim if full else None) is None:
                return False
            if full and victim is not None:
                displaced.append(victim.request.request_id)
            waiting = self._queue.tenants

    def _admit(self, request: Request | None, *, in_turn: bool = True, victim: Entry | None = None) -> Entry | None:
        """Let a waiting request run, with blocks for all its known tokens; None if it has to wait. It pays if this is
        its tenant's turn. It gets the place of `victim` if one is given, which is not in this step's plan."""
        if request is None or (victim is None and len(self._running) >= self.config.max_running):
            return None
        entry = self._entries[request.request_id]
        shared = self._find_prefix(entry)
        if self._is_computing_next_block(entry, len(shared)):
            return None
        needed = self.pool.blocks_for(request.num_known_tokens) - len(shared)
        available = self.pool.num_available - sum(self.pool.is_cached(block_id) for block_id in shared)
        reserve = 0
        if self._running:  # a lone request needs none: it fits, or it would not have been added
            reserve = sum(self._will_grow(other, len(other.request.block_ids)) for other in self._running)
            reserve += self._will_grow(entry, needed + len(shared))
            if not in_turn:  # before the others' streams have what they need for this step
                reserve += sum(self._is_full(other) for other in self._running)
        if needed + reserve > available:
            return None

        self._queue.pop(request, in_turn=in_turn)
        entry.queued = False
        entry.turn = self._next_step_id
        if victim is not None:
            self._preempt(victim)
        self._places[request.tenant] += 1
        self.pool.share(shared)
        request.block_ids = shared + self.pool.allocate(needed)
        request.num_computed_tokens = entry.num_confirmed = len(shared) * self.config.block_size
        request.status = RequestStatus.RUNNING
        insort(self._running, entry, key=lambda other: other.rank)
        if in_turn and not entry.paid:
            entry.paid = True
            self._queue.refund(request.tenant, request.num_computed_tokens)
        if self.config.prefix_caching:
            self._pending.prefix_queried_tokens += request.num_known_tokens
            self._pending.prefix_hit_tokens += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._pending.cached_prompt_tokens += request.num_cached_tokens
        return entry

    def _will_grow(self, entry: Entry, num_blocks: int) -> bool:
        """Whether a request that has so many blocks is going to need more."""
        return self.pool.blocks_for(entry.limit - 1) > num_blocks

    def _is_full(self, entry: Entry) -> bool:
        """Whether a request needs a block for its next token."""
        return entry.request.num_computed_tokens == len(entry.request.block_ids) * self.config.block_size

    # ---- what came of a step ----

    def update(self, result: StepResult) -> list[RequestOutput]:
        """Take in the result of the oldest plan in flight: what the outside learns of it, in the plan's order.

        Raises ValueError, and changes nothing, when the result is not that plan's.
        """
        check_result(self._flights[0].plan if self._flights else None, result)
        flight = self._flights.popleft()
        counters = self.last_step = flight.counters
        outputs = []
        for planned, row in zip(flight.plan.requests, result.rows, strict=True):
            request = planned.request
            count_row(counters, planned, row)
            if request.status is RequestStatus.FINISHED:
                counters.pipeline_discarded_tokens += len(row.token_ids)
                continue
            entry = self._entries[request.request_id]
            if entry.steps.pop(0) != result.step_id:
                raise IntegrityError(f"request {request.request_id} does not know of step {result.step_id}")
            request.num_inflight_samples -= planned.samples
            if row.error is not None:
                outputs.append(self._finish_with_error(entry, planned.block_ids, row.error))
                continue
            entry.num_confirmed = planned.start + planned.num_new_tokens
            if self.config.prefix_caching:
                self._publish(entry, planned)
            if row.token_ids:
                output = self._take_tokens(entry, row.token_ids)
                counters.pipeline_discarded_tokens += len(row.token_ids) - len(output.token_ids)
                output.details = row.details
                outputs.append(output)
            elif row.details is not None:
                outputs.append(RequestOutput(request, (), details=row.details))
        self._land(flight)
        return outputs

    def _take_tokens(self, entry: Entry, token_ids: tuple[int, ...]) -> RequestOutput:
        """Append the tokens drawn, up to the one that ends the request, if one does."""
        request, params, eos_token_ids = entry.request, entry.request.params, self.config.eos_token_ids
        for num_taken, token_id in enumerate(token_ids, start=1):
            request.output_token_ids.append(token_id)
            ends = token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)
            # Before the minimum an end can only be drawn where a grammar allows nothing else.
            if ends and (params.grammar or len(request.output_token_ids) > params.min_new_tokens):
                self._finish(entry)
                return RequestOutput(request, token_ids[:num_taken], FinishReason.STOP, stop_token_id=token_id)
            if request.num_known_tokens >= entry.limit:
                self._finish(entry)
                return RequestOutput(request, token_ids[:num_taken], FinishReason.LENGTH)
        return RequestOutput(request, token_ids)

    def rollback(self, step_id: int) -> None:
        """Undo a plan in flight whose forward pass has failed, and every later one, as if they had never been made.

        Requests keep their blocks and may be planned again at once; nothing they wrote is published. Requests that were
        preempted or ended in the meantime stay so. Raises ValueError when no such plan is in flight.
        """
        if all(flight.plan.step_id != step_id for flight in self._flights):
            raise ValueError(f"step {step_id} is not in flight")
        undone: list[Flight] = []
        while self._flights and self._flights[-1].plan.step_id >= step_id:
            flight = self._flights.pop()
            undone.insert(0, flight)
            for planned in flight.plan.requests:
                request = planned.request
                if request.status is RequestStatus.FINISHED:
                    continue
                self._entries[request.request_id].steps.pop()
                request.num_inflight_samples -= planned.samples
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

    def _land(self, flight: Flight) -> None:
        """The step is over: what was in use until now is free."""
        for block_ids in flight.release:
            self.pool.release(block_ids)
        for entry in flight.requeue:
            if entry.request.status is RequestStatus.WAITING:
                self._enqueue(entry)

    def _release(self, entry: Entry) -> None:
        """Give a request's blocks back, when the last step in flight that uses them is over."""
        request = entry.request
        block_ids, request.block_ids = request.block_ids, []
        if entry.steps:
            self._newest_flight(entry).release.append(block_ids)
        else:
            self.pool.release(block_ids)

    def _newest_flight(self, entry: Entry) -> Flight:
        for flight in self._flights:
            if flight.plan.step_id == entry.steps[-1]:
                return flight
        raise IntegrityError(f"request {entry.request.request_id} waits for step {entry.steps[-1]}: not in flight")

    def _find_prefix(self, entry: Entry) -> list[int]:
        """Published blocks with the request's first tokens. At least one token is left over: its logits are needed."""
        found: list[int] = []
        if self.config.prefix_caching and not entry.request.wants_prompt_scores:
            for index in range((entry.request.num_known_tokens - 1) // self.config.block_size):
                block_id = self.pool.find(self._key(entry, index))
                if block_id is None:
                    break
                found.append(block_id)
        return found

    def _is_computing_next_block(self, entry: Entry, index: int) -> bool:
        """Whether a running request is about to fill the first block that this one misses.

        Then waiting is cheaper than computing it twice: the n choices of one prompt, or a burst of requests with one
        system prompt, follow the first of them. The wait is as long as the other's way to that block.
        """
        end = (index + 1) * self.config.block_size
        if not self.config.prefix_caching or end >= entry.request.num_known_tokens or entry.request.wants_prompt_scores:
            return False
        return any(
            other.num_confirmed < end <= other.request.num_known_tokens
            and self._key(other, index).same_prefix(self._key(entry, index))
            for other in self._running
        )

    def _publish(self, entry: Entry, planned: PlannedRequest) -> None:
        """Let others find the blocks that this step has filled. All their tokens are known by now."""
        block_size = self.config.block_size
        for index in range(planned.start // block_size, (planned.start + planned.num_new_tokens) // block_size):
            self.pool.publish(planned.block_ids[index], self._key(entry, index))

    def _key(self, entry: Entry, index: int) -> BlockKey:
        """The key of a request's full block; those before it are made on the way."""
        keys, block_size = entry.keys, self.config.block_size
        while len(keys) <= index:
            start = len(keys) * block_size
            tokens = entry.request.token_ids(start, start + block_size)
            # The tenant's name is a salt too: nobody finds, or learns by the time it takes, what another one has sent.
            extra_keys = (entry.request.tenant, entry.request.cache_salt)
            keys.append(BlockKey(keys[-1] if keys else None, tokens, extra_keys, self.pool.digest))
        return keys[index]

    # ---- states ----

    def _enqueue(self, entry: Entry) -> None:
        self._queue.push(entry.request, entry.rank, 0 if entry.paid else entry.limit)
        entry.queued = True

    def _stop_running(self, entry: Entry) -> None:
        self._running.remove(entry)
        tenant = entry.request.tenant
        self._places[tenant] -= 1
        if not self._places[tenant]:
            del self._places[tenant]

    def _preempt(self, entry: Entry) -> None:
        request = entry.request
        self._stop_running(entry)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._pending.preemptions += 1
        self._release(entry)
        if entry.steps:
            self._newest_flight(entry).requeue.append(entry)
        else:
            self._enqueue(entry)

    def _finish(self, entry: Entry) -> None:
        request = entry.request
        del self._entries[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self._stop_running(entry)
        elif entry.queued:
            self._queue.remove(request, entry.rank)
        if entry.paid:
            self._queue.refund(request.tenant, entry.limit - request.computed_high_water - 1)
        request.status = RequestStatus.FINISHED
        request.num_inflight_samples = 0
        self._release(entry)

    def _finish_with_error(self, entry: Entry, block_ids: Sequence[int], error: str) -> RequestOutput:
        """End a request whose numbers went wrong. What it read may be the cause, so that is not found again either."""
        self.pool.withdraw(block_ids)
        self._finish(entry)
        return RequestOutput(entry.request, (), FinishReason.ERROR, error=error)

    def check_integrity(self) -> None:
        """Every invariant that can be seen from the inside, or IntegrityError. Linear in the pool: for tests."""
        if self._places != Counter(entry.request.tenant for entry in self._running):
            raise IntegrityError("the tenants' places are not those of the running requests")
        check_books(self.pool, self._entries, self._running, self._queue, self._flights)
