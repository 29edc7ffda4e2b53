"""What must hold at every step, seen from the outside: from plans, statuses and counts, not from how they came about.

Each check raises Violation. Whether tokens are right is the driver's verdict; here is everything else that is promised:
limits of a step, streams that never wait for prompts, shares of tenants in places, steps and turns, order of admission
and preemption, contents of what can be found in the cache, and books that balance.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from server.engine.block_pool import BlockKey
from server.engine.plan import RequestOutput, StepCounters, StepPlan, StepResult
from server.engine.request import Request, RequestStatus
from server.engine.scheduler import Scheduler
from server.engine.step_shares import LINGERING_STEPS
from tests.simulation.device import Device
from tests.simulation.oracle import extend, salt_number, stored_value
from tests.simulation.world import World


class Violation(AssertionError):
    """The scheduler broke a promise."""


def require(condition: bool, message: str, *details: object) -> None:
    if not condition:
        raise Violation(" ".join((message, *map(str, details))))


@dataclass(slots=True)
class Known:
    """A request as an onlooker knows it. admitted: in turn; left_out: steps since it was due and not planned."""

    request: Request
    limit: int
    added_step: int
    high_water: int
    admitted: bool = False
    left_out: int = 0


@dataclass(slots=True)
class Turn:
    """How many tokens other tenants were granted since a request became its tenant's first."""

    request_id: int
    passed_over: int = 0


@dataclass
class Watch:
    """Onlooker of one scheduler; a restarted engine gets a new one."""

    world: World
    known: dict[int, Known] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    in_flight: list[StepPlan] = field(default_factory=list)
    num_steps: int = 0
    max_cost: int = 0
    tenants: set[str] = field(default_factory=set)
    waiting: list[Known] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    due: list[Request] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)
    last_ran: dict[str, int] = field(default_factory=dict)
    totals: StepCounters = field(default_factory=StepCounters)
    expected: StepCounters = field(default_factory=StepCounters)
    contents: dict[int, tuple[BlockKey, int, list[int]]] = field(default_factory=dict)

    # ---- events ----

    def added(self, request: Request) -> None:
        config = self.world.config
        limit = min(request.num_prompt_tokens + request.params.max_new_tokens, config.max_model_len)
        high_water = request.num_known_tokens - 1 if request.output_token_ids else 0
        self.known[request.request_id] = Known(request, limit, self.num_steps, high_water)
        self.max_cost = max(self.max_cost, limit)
        self.tenants.add(request.tenant)

    def ended(self, request: Request) -> None:
        """What a tenant did not use of its share, it may use for another request: that is not passing anyone over."""
        known = self.known.pop(request.request_id)
        self.expected.preemptions += request.num_preemptions
        self.expected.cached_prompt_tokens += request.num_cached_tokens or 0
        if known.admitted:
            self._credit(request.tenant, known.limit - known.high_water - 1)

    def before_schedule(self) -> None:
        self.busy = {planned.request.request_id for plan in self.in_flight for planned in plan.requests}
        self.waiting = [
            known
            for known in self.known.values()
            if known.request.status is RequestStatus.WAITING and known.request.request_id not in self.busy
        ]
        self.places = self._places()
        self.due = [
            known.request
            for known in self.known.values()
            if known.request.status is RequestStatus.RUNNING
            and known.request.num_tokens - known.request.num_computed_tokens == 1
            and known.request.num_tokens < known.limit
        ]

    def after_schedule(self, scheduler: Scheduler, plan: StepPlan | None, alone: bool = False) -> None:
        if plan is not None:
            require(plan.step_id == self.num_steps, "step ids go up by one:", plan.step_id)
            self.num_steps += 1
            self.in_flight.append(plan)
            self._check_limits(plan, scheduler)
        if not alone:
            self._check_streams(plan, scheduler)
            if plan is not None:
                self._check_shares(plan, scheduler)
                if not plan.preempted_ids:  # which gave blocks back when the places had been given out
                    self._check_places(scheduler)
        self._check_admissions(scheduler)
        self._check_victims(plan, scheduler)

    def after_update(self, scheduler: Scheduler, result: StepResult, outputs: list[RequestOutput]) -> None:
        plan = self.in_flight.pop(0)
        self._check_counters(plan, result, scheduler)
        counters = scheduler.last_step
        delivered = sum(len(output.token_ids) for output in outputs)
        require(counters.sampled_tokens == delivered + counters.pipeline_discarded_tokens, "tokens drawn are lost")
        self.totals.add(counters)

    def over(self, scheduler: Scheduler) -> None:
        """At the end of a run: what the steps have counted is what the requests have seen."""
        self.totals.add(scheduler._pending)
        for name in ("preemptions", "cached_prompt_tokens"):
            counted, seen = getattr(self.totals, name), getattr(self.expected, name)
            require(counted == seen, f"{name}: {counted} were counted, {seen} were seen")

    def rolled_back(self, step_id: int) -> None:
        self.in_flight = [plan for plan in self.in_flight if plan.step_id < step_id]

    # ---- promises ----

    def _check_limits(self, plan: StepPlan, scheduler: Scheduler) -> None:
        config = self.world.config
        ids = [planned.request.request_id for planned in plan.requests]
        require(len(ids) == len(set(ids)) > 0, "a step plans each request once:", ids)
        require(plan.num_tokens <= config.max_tokens_per_step, "too many tokens in a step:", plan.num_tokens)
        require(scheduler.num_running <= config.max_running, "too many requests run:", scheduler.num_running)
        require(scheduler.num_in_flight <= config.pipeline_depth, "the pipeline is too deep")
        written: set[int] = set()
        for planned in plan.requests:
            end = planned.start + planned.num_new_tokens
            limit = self.known[planned.request.request_id].limit
            require(end < limit, "a position is computed that is never needed:", planned.request.request_id, end)
            require(len(planned.block_ids) == -(-end // config.block_size), "a block table of the wrong length")
            blocks = planned.block_ids[planned.start // config.block_size :]
            require(written.isdisjoint(blocks), "two rows write one block:", blocks)
            require(all(scheduler.pool.ref_count(b) == 1 for b in blocks), "a shared block is written:", blocks)
            written.update(blocks)

    def _places(self) -> Counter[str]:
        running = (known.request for known in self.known.values() if known.request.status is RequestStatus.RUNNING)
        return Counter(request.tenant for request in running)

    def _check_streams(self, plan: StepPlan | None, scheduler: Scheduler) -> None:
        """A due stream is in the step, unless there is no block for it or its tenant's other streams have their turn;
        beside one, prompts stay small."""
        planned_ids = {planned.request.request_id for planned in plan.requests} if plan is not None else set()
        full = scheduler.num_in_flight == self.world.config.pipeline_depth and plan is None
        for tenant in self._places():
            self.last_ran[tenant] = self.num_steps
        several = sum(self.num_steps - step <= LINGERING_STEPS + 1 for step in self.last_ran.values()) > 1
        for request in self.due:
            known = self.known[request.request_id]
            if request.request_id in planned_ids or request.status is not RequestStatus.RUNNING or full:
                known.left_out = 0
                continue
            needs_block = request.num_computed_tokens == len(request.block_ids) * self.world.config.block_size
            if needs_block and scheduler.pool.num_available == 0:
                continue
            others = any(r.request_id in planned_ids for r in self.due if r.tenant == request.tenant)
            # Or the one that had its turn is preempted, or waits for a block.
            lost = scheduler.pool.num_available == 0 or (plan is not None and bool(plan.preempted_ids))
            require(several and (others or lost), "a stream waits and needs nothing: request", request.request_id)
            known.left_out += 1
            # Each of the others goes before it once, and once more where it could not use its turn for lack of a block.
            bound = 2 * self.world.config.max_running
            require(known.left_out <= bound, "a stream never has its turn: request", request.request_id)
        if plan is not None and any(request.status is RequestStatus.RUNNING for request in self.due):
            config = self.world.config
            prompts = [planned for planned in plan.requests if planned.num_new_tokens > 1]
            costs = [
                each.num_new_tokens * (1 + (each.start / config.attention_span if config.attention_span else 0))
                for each in prompts
            ]
            require(sum(costs) <= config.mixed_step_tokens + 1e-9, "prompts beside streams:", costs)

    def _check_shares(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """A flood does not make the step of the others long: it is at most an eighth longer than the shortest of the
        tenants' own steps, or as long as if each did as much as that one; and what is left out of it belongs to a
        tenant that got as much as any. All but for one row and two tokens a tenant."""
        times, places = self.world.config.step_times, self._places()
        if len(places) < 2 or scheduler.pool.num_available == 0 or plan.preempted_ids:
            return
        item = times.row_ns + 2 * times.token_ns
        got: Counter[str] = Counter()
        for planned in plan.requests:
            is_row = planned.num_new_tokens == 1 and planned.request in self.due
            got[planned.request.tenant] += times.row_ns if is_row else planned.num_new_tokens * times.token_ns
        planned_ids = {planned.request.request_id for planned in plan.requests}
        left_out = {
            request.tenant
            for request in self.due
            if request.status is RequestStatus.RUNNING and request.request_id not in planned_ids
        }
        for tenant in left_out:
            require(got[tenant] + item >= max(got.values()), f"{tenant} has less of the step than others:", got)
        catching_up = {
            known.request.tenant
            for known in self.known.values()
            if known.request.status is RequestStatus.RUNNING and known.request not in self.due
        }
        content = [got[tenant] for tenant in places if tenant not in left_out | catching_up and got[tenant]]
        if content:
            least, base = min(content), times.base_ns
            bound = max(len(places) * least, 9 * (base + least) / 8 - base) + len(places) * item
            require(got.total() <= bound, "one tenant makes the others' step long:", got, bound)

    def _check_places(self, scheduler: Scheduler) -> None:
        """Nobody waits without a place while another tenant has two, if there are blocks."""
        config, places = self.world.config, self._places()
        heads: dict[str, Known] = {}
        for known in self.waiting:
            tenant = known.request.tenant
            first = tenant not in heads or self._rank(known) < self._rank(heads[tenant])
            if known.request.status is RequestStatus.WAITING and first and not places[tenant] + self.places[tenant]:
                heads[tenant] = known
        if len(heads) == 1 and max(self.places.values(), default=0) > 1 and max(places.values(), default=0) > 1:
            (known,) = heads.values()
            blocks = -(-known.request.num_known_tokens // config.block_size) + 2 * (places.total() + 1)
            require(scheduler.pool.num_available < blocks, "no place for request", known.request.request_id, places)

    def _rank(self, known: Known) -> tuple[int, int, int]:
        aging = self.world.config.priority_aging_steps
        return (known.added_step - aging * known.request.priority, known.request.arrival, known.request.request_id)

    def _check_admissions(self, scheduler: Scheduler) -> None:
        """Within a tenant the best of those who wait goes first; between tenants nobody is passed over for long, but by
        those that have fewer places."""
        admitted = [known for known in self.waiting if known.request.status is RequestStatus.RUNNING]
        admitted.sort(key=self._rank)
        waiting = list(self.waiting)
        for chosen in admitted:
            for other in waiting:
                if other.request.tenant == chosen.request.tenant:
                    require(
                        self._rank(chosen) <= self._rank(other),
                        f"request {other.request.request_id} was passed over by {chosen.request.request_id}",
                    )
            waiting.remove(chosen)
            if not scheduler._entries[chosen.request.request_id].paid:
                mine, most = self.places[chosen.request.tenant], max(self.places.values(), default=0)
                require(
                    mine < max(most, 1), f"request {chosen.request.request_id} was admitted out of turn", self.places
                )
                continue
            if not chosen.admitted:
                self._charge(chosen.request.tenant, chosen.limit)
                self._credit(chosen.request.tenant, chosen.request.num_cached_tokens or 0)
            chosen.admitted = True
        self._check_turns(waiting)
        if admitted and scheduler.num_running > 1:
            size = self.world.config.block_size
            running = [self.known[r.request_id] for r in scheduler.requests if r.status is RequestStatus.RUNNING]
            growing = sum(known.limit - 1 > len(known.request.block_ids) * size for known in running)
            require(scheduler.pool.num_available >= growing, f"no reserve for {growing} streams: a newcomer has it")

    def _charge(self, tenant: str, tokens: int) -> None:
        for name, turn in self.turns.items():
            if name != tenant:
                turn.passed_over += tokens

    def _credit(self, tenant: str, tokens: int) -> None:
        self._charge(tenant, -tokens)

    def _check_turns(self, waiting: list[Known]) -> None:
        first: dict[str, Known] = {}
        for known in waiting:
            tenant = known.request.tenant
            if tenant not in first or self._rank(known) < self._rank(first[tenant]):
                first[tenant] = known
        turns, self.turns = self.turns, {}
        config = self.world.config
        for tenant, known in first.items():
            turn = turns.get(tenant)
            if turn is None or turn.request_id != known.request.request_id:
                turn = Turn(known.request.request_id)
            self.turns[tenant] = turn
            # Until this request's turn, another tenant spends what the rounds give it (as much as this one costs),
            # what it had left, what comes back from its running requests, and one request that began before.
            bound = (len(self.tenants) - 1) * (known.limit + 2 * config.block_size + 3 * self.max_cost)
            require(turn.passed_over <= bound, "a tenant starves: request", turn.request_id, turn.passed_over, bound)

    def _check_victims(self, plan: StepPlan | None, scheduler: Scheduler) -> None:
        if plan is None or not plan.preempted_ids:
            return
        victims = [self._rank(self.known[request_id]) for request_id in plan.preempted_ids]
        require(victims == sorted(victims, reverse=True), "victims are taken from the last rank up:", victims)
        # Blocks of a victim in flight come back later: taking more victims for the same block would be a waste.
        require(self.busy.isdisjoint(plan.preempted_ids[:-1]), "too many victims:", plan.preempted_ids)
        running = [
            self._rank(self.known[r.request_id]) for r in scheduler.requests if r.status is RequestStatus.RUNNING
        ]
        require(max(running, default=victims[-1]) <= victims[-1], "a better request was preempted:", plan.preempted_ids)

    def _check_counters(self, plan: StepPlan, result: StepResult, scheduler: Scheduler) -> None:
        """Every position computed is counted once, as prompt, as recomputed or as the input of a token drawn."""
        counters = scheduler.last_step
        prompt = recomputed = 0
        for planned in plan.requests:
            known = self.known.get(planned.request.request_id)
            high_water = planned.request.computed_high_water if known is None else known.high_water
            for position in range(planned.start, planned.start + planned.num_new_tokens):
                if position < high_water:
                    recomputed += 1
                elif position < planned.request.num_prompt_tokens:
                    prompt += 1
            if known is not None:
                known.high_water = max(high_water, planned.start + planned.num_new_tokens)
                require(known.high_water == planned.request.computed_high_water, "the high-water mark is wrong")
        sampled = sum(len(row.token_ids) for row in result.rows)
        require(counters.sampled_tokens == sampled, "sampled tokens:", counters.sampled_tokens, sampled)
        if all(planned.request.request_id in self.known for planned in plan.requests):
            require(
                (counters.prompt_tokens, counters.recomputed_tokens) == (prompt, recomputed),
                f"prompt and recomputed tokens: {counters}, {prompt} and {recomputed} were computed",
            )

    def check_cache(self, scheduler: Scheduler, device: Device) -> None:
        """Whatever can be found in the cache is physically there: full, of the right tokens, under the right salt."""
        size = self.world.config.block_size
        for block_id, key in enumerate(scheduler.pool._keys):
            if key is not None:
                stored = device.slots[block_id * size : (block_id + 1) * size]
                require(
                    stored == self._content(key)[2], f"block {block_id} is published and does not hold", key.token_ids
                )

    def _content(self, key: BlockKey) -> tuple[BlockKey, int, list[int]]:
        content = self.contents.get(id(key))
        if content is None:
            chain = [key]
            while chain[-1].parent is not None and id(chain[-1].parent) not in self.contents:
                chain.append(chain[-1].parent)
            for link in reversed(chain):
                parent = self.contents[id(link.parent)] if link.parent is not None else None
                context, values = parent[1] if parent is not None else 0, []
                depth = self._depth(link)
                for offset, token_id in enumerate(link.token_ids):
                    position = depth * self.world.config.block_size + offset
                    values.append(stored_value(context, position, token_id, salt_number(*link.extra_keys)))
                    context = extend(context, values[-1])
                self.contents[id(link)] = (link, context, values)  # keeps the key, so that its id stays its own
            content = self.contents[id(key)]
        return content

    def _depth(self, key: BlockKey) -> int:
        depth, parent = 0, key.parent
        while parent is not None:
            depth, parent = depth + 1, parent.parent
        return depth
