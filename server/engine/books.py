"""What the scheduler keeps about requests and plans beside themselves, and the checks that it all balances."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from server.engine.block_pool import BlockKey, BlockPool, IntegrityError
from server.engine.fair_queue import FairQueue, Rank
from server.engine.plan import PlannedRequest, RowResult, StepCounters, StepPlan, StepResult
from server.engine.request import Request, RequestStatus


@dataclass(slots=True, eq=False)
class Entry:
    """An open request.

    rank           its place among all others, fixed when it is added; smaller is better
    limit          tokens, prompt and output, at which it ends
    keys           keys of its full blocks from the first on, as far as they have been needed: each is hashed once
    num_confirmed  while it runs: tokens whose K and V are known to be in its blocks, that is, num_computed_tokens
                   without the steps in flight
    steps          ids of the plans in flight that it takes part in, oldest first
    queued         whether it is in the queue. A preempted request stays outside until the steps above are over
    paid           whether its tenant has paid for it: not before it gets a turn; being preempted costs nothing
    turn           the step in which it was admitted, or last had its turn among its tenant's streams
    """

    request: Request
    rank: Rank
    limit: int
    keys: list[BlockKey] = field(default_factory=list)
    num_confirmed: int = 0
    steps: list[int] = field(default_factory=list)
    queued: bool = False
    paid: bool = False
    turn: int = 0


@dataclass(slots=True, eq=False)
class Flight:
    """A plan whose result is not known. Blocks in `release` and requests in `requeue` are tied to it until it is."""

    plan: StepPlan
    counters: StepCounters
    release: list[list[int]] = field(default_factory=list)
    requeue: list[Entry] = field(default_factory=list)


def check_result(plan: StepPlan | None, result: StepResult) -> None:
    """ValueError unless this is a result of this plan, the oldest in flight."""
    if plan is None or result.step_id != plan.step_id:
        due = "no step is in flight" if plan is None else f"that of step {plan.step_id} is due"
        raise ValueError(f"a result of step {result.step_id}, and {due}")
    if len(result.rows) != len(plan.requests):
        raise ValueError(f"step {plan.step_id} has {len(plan.requests)} requests, not {len(result.rows)}")
    for planned, row in zip(plan.requests, result.rows, strict=True):
        if row.request_id != planned.request.request_id:
            raise ValueError(f"step {plan.step_id}: a row of request {row.request_id}, out of order")
        if bool(row.token_ids) != (planned.samples and row.error is None):
            raise ValueError(f"step {plan.step_id}: {len(row.token_ids)} tokens for request {row.request_id}")


def count_row(counters: StepCounters, planned: PlannedRequest, row: RowResult) -> None:
    """Count what a row has computed, and move its request's high-water mark."""
    request, start = planned.request, planned.start
    end, high_water = start + planned.num_new_tokens, request.computed_high_water
    counters.sampled_tokens += len(row.token_ids)
    if start < high_water or start < len(request.prompt_token_ids):
        first_new = max(start, min(end, high_water))
        counters.recomputed_tokens += first_new - start
        counters.prompt_tokens += max(0, min(end, request.num_prompt_tokens) - first_new)
    if end > high_water:
        request.computed_high_water = end


def check_books(
    pool: BlockPool, entries: dict[int, Entry], running: list[Entry], queue: FairQueue, flights: deque[Flight]
) -> None:
    """Every invariant that can be seen from the inside, or IntegrityError. Linear in the pool and the requests."""
    held = [block_id for entry in running for block_id in entry.request.block_ids]
    held += [block_id for flight in flights for block_ids in flight.release for block_id in block_ids]
    pool.check_integrity(held)
    if [entry.rank for entry in running] != sorted(entry.rank for entry in running):
        raise IntegrityError("the running requests are out of order")

    steps: dict[int, list[int]] = {}
    for flight in flights:
        for planned in flight.plan.requests:
            if planned.request.status is not RequestStatus.FINISHED:
                steps.setdefault(planned.request.request_id, []).append(flight.plan.step_id)
            if 0 in map(pool.ref_count, planned.block_ids):
                raise IntegrityError(f"step {flight.plan.step_id} is in flight and its blocks are free")

    places = [entry.request for entry in running] + list(queue)
    places += [e.request for f in flights for e in f.requeue if e.request.status is not RequestStatus.FINISHED]
    if sorted(map(id, places)) != sorted(id(entry.request) for entry in entries.values()):
        raise IntegrityError("an open request is nowhere, or in two places")
    if sum(request.status is RequestStatus.RUNNING for request in places[: len(running)]) != len(running):
        raise IntegrityError("a request among the running ones does not run")

    for request_id, entry in entries.items():
        request = entry.request
        num_tokens, num_computed = request.num_tokens, request.num_computed_tokens
        if entry.steps != steps.get(request_id, []):
            raise _error(entry, f"takes part in steps {steps.get(request_id, [])}, noted are {entry.steps}")
        if num_tokens > entry.limit or num_tokens - request.num_inflight_samples >= entry.limit:
            raise _error(entry, f"has {num_tokens} tokens, its limit is {entry.limit}")
        if request.status is RequestStatus.WAITING:
            if request.block_ids or num_computed:
                raise _error(entry, "waits and holds blocks")
        elif not entry.num_confirmed <= num_computed <= len(request.block_ids) * pool.block_size:
            raise _error(entry, "has computed more than its blocks hold")


def _error(entry: Entry, what: str) -> IntegrityError:
    return IntegrityError(f"request {entry.request.request_id} ({entry.request.status}) {what}")
