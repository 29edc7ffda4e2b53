"""Who goes next: shares between tenants, ranks within one."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.engine.fair_queue import FairQueue
from server.engine.request import Request, SamplingParams


def request(request_id: int, tenant: str = "a") -> Request:
    return Request(request_id, [1], SamplingParams(max_new_tokens=1), tenant=tenant, arrival=request_id)


def push(queue: FairQueue, item: Request, cost: int, rank: int | None = None) -> None:
    queue.push(item, (item.request_id if rank is None else rank, item.arrival, item.request_id), cost)


def drain(queue: FairQueue) -> list[int]:
    order = []
    while (item := queue.peek()) is not None:
        queue.pop(item)
        order.append(item.request_id)
    return order


def test_an_empty_queue_has_nobody() -> None:
    queue = FairQueue(16)
    assert queue.peek() is None
    assert len(queue) == 0


def test_the_best_rank_of_a_tenant_goes_first() -> None:
    queue = FairQueue(16)
    for request_id, rank in ((1, 5), (2, -3), (3, 5)):
        push(queue, request(request_id), 10, rank)
    assert [item.request_id for item in queue] == [2, 1, 3]
    assert drain(queue) == [2, 1, 3]


def test_a_flood_takes_turns_with_the_others() -> None:
    queue = FairQueue(4)
    for request_id in range(10):
        push(queue, request(request_id, "flood"), 40)
    push(queue, request(10, "b"), 40)
    push(queue, request(11, "c"), 40)
    assert set(drain(queue)[:4]) == {0, 1, 10, 11}


def test_shares_are_in_tokens() -> None:
    queue = FairQueue(4)
    for request_id in range(20):
        push(queue, request(request_id, "small"), 10)
        push(queue, request(100 + request_id, "large"), 50)
    order = drain(queue)
    large = [index for index, request_id in enumerate(order) if request_id >= 100][1:4]
    assert [after - before for before, after in pairwise(large)] == [6, 6], "five small ones each"


def test_peeking_changes_nothing_for_the_one_who_is_next() -> None:
    queue = FairQueue(4)
    push(queue, request(1, "a"), 30)
    push(queue, request(2, "b"), 20)
    first = queue.peek()
    assert all(queue.peek() is first for _ in range(10))


def test_what_was_paid_before_costs_nothing() -> None:
    queue = FairQueue(4)
    push(queue, request(1, "a"), 10)
    push(queue, request(2, "b"), 10)
    push(queue, request(3, "b"), 10)
    first = queue.peek()
    assert first is not None
    queue.pop(first)
    push(queue, first, 0)
    assert drain(queue) == [2, 1, 3], "it needs no credit"


def test_a_newcomer_waits_for_one_request_at_most() -> None:
    queue = FairQueue(4)
    for request_id in range(10):
        push(queue, request(request_id, "flood"), 10)
    for _ in range(3):
        item = queue.peek()
        assert item is not None
        queue.pop(item)
    push(queue, request(10, "new"), 1000)
    assert 10 in drain(queue)[:2]


def test_debts_outlive_the_waiting() -> None:
    """One tenant keeps a single dear request waiting; the other one's cheap requests are not starved by that."""
    queue = FairQueue(4)
    for request_id in range(30):
        push(queue, request(request_id, "cheap"), 10)
    order = []
    push(queue, request(100, "dear"), 100)
    for _ in range(24):
        item = queue.peek()
        assert item is not None
        queue.pop(item)
        order.append(item.request_id)
        if item.tenant == "dear":
            push(queue, request(item.request_id + 1, "dear"), 100)
    assert sum(request_id >= 100 for request_id in order) <= 3


def test_credit_cannot_be_saved_up() -> None:
    queue = FairQueue(4)
    push(queue, request(1, "a"), 10)
    queue.refund("a", 1000)
    queue.remove(request(1, "a"), (1, 1, 1))
    queue.refund("a", 1000)
    for request_id in (2, 4, 6):
        push(queue, request(request_id, "a"), 10)
    for request_id in (3, 5, 7):
        push(queue, request(request_id, "b"), 10)
    assert drain(queue) == [2, 3, 4, 5, 6, 7]


def test_a_refund_is_spent_on_the_next_request() -> None:
    queue = FairQueue(4)
    for request_id, tenant in ((1, "a"), (2, "b"), (3, "b"), (4, "b"), (5, "a")):
        push(queue, request(request_id, tenant), 100)
    for _ in range(2):
        item = queue.peek()
        assert item is not None
        queue.pop(item)
    queue.refund("b", 200)
    assert drain(queue) == [3, 4, 5]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), min_size=1, max_size=60),
    st.integers(1, 40),
)
def test_whoever_waits_is_served_as_much_as_anyone(arrivals: list[tuple[str, int]], quantum: int) -> None:
    """While two tenants both wait, the tokens they were served differ by one request and one quantum each at most."""
    queue = FairQueue(quantum)
    costs = [cost for _, cost in arrivals]
    waiting = {tenant: sum(1 for other, _ in arrivals if other == tenant) for tenant, _ in arrivals}
    for request_id, (tenant, cost) in enumerate(arrivals):
        push(queue, request(request_id, tenant), cost)
    served = dict.fromkeys(waiting, 0)
    while (item := queue.peek()) is not None:
        queue.pop(item)
        served[item.tenant] += costs[item.request_id]
        waiting[item.tenant] -= 1
        both = [served[tenant] for tenant in served if waiting[tenant]]
        if len(both) > 1:
            assert max(both) - min(both) <= 2 * (max(costs) + quantum)
    assert len(queue) == 0
    assert sum(served.values()) == sum(costs)
