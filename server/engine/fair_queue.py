"""Who is admitted next: tenants share, and within a tenant the rank decides."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.request import Request

# Smaller goes first: (step of arrival less the head start of its priority, arrival, request id).
Rank = tuple[int, int, int]


@dataclass(slots=True)
class _Waiting:
    rank: Rank
    cost: int
    request: Request


@dataclass(slots=True)
class _Tenant:
    credit: int = 0
    waiting: list[_Waiting] = field(default_factory=list)  # sorted by rank


class FairQueue:
    """Waiting requests, ordered by deficit round robin over tenants (Shreedhar and Varghese, 1995).

    A tenant's best-ranked request may go when the tenant's credit covers its cost, in tokens. While nobody's does,
    every waiting tenant is given the same credit, one quantum a round. So a flood by one tenant costs others nothing:
    while two of them wait, both are served the same number of tokens, up to one request and one quantum. Credit ends
    with the tenant's last waiting request: it cannot be saved up.

    Owns the waiting requests and the credits; never changes a request.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._tenants: dict[str, _Tenant] = {}  # in turn order
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Request]:
        for tenant in self._tenants.values():
            for waiting in tenant.waiting:
                yield waiting.request

    def push(self, request: Request, rank: Rank, cost: int) -> None:
        """Let a request wait. `cost` is 0 for one that has paid before and lost its place."""
        tenant = self._tenants.setdefault(request.tenant, _Tenant())
        insort(tenant.waiting, _Waiting(rank, cost, request), key=lambda waiting: waiting.rank)
        self._len += 1

    def peek(self) -> Request | None:
        """The request that goes next; it stays. Asking again gives the same one, unless a better one has come."""
        if not self._len:
            return None
        # The rounds in which nobody could be served are added up in one go, so that a fine quantum costs no time.
        rounds = min(-((t.credit - t.waiting[0].cost) // self._quantum) for t in self._tenants.values())
        if rounds > 0:
            for tenant in self._tenants.values():
                tenant.credit += rounds * self._quantum
        for tenant in self._tenants.values():
            if tenant.credit >= tenant.waiting[0].cost:
                return tenant.waiting[0].request
        return None  # not reached: the rounds were enough for one

    def pop(self, request: Request) -> None:
        """Take out the request that `peek` gave: its tenant pays, and has its next turn after the others."""
        tenant = self._tenants.pop(request.tenant)
        tenant.credit -= tenant.waiting.pop(0).cost
        self._len -= 1
        if tenant.waiting:
            self._tenants[request.tenant] = tenant

    def remove(self, request: Request, rank: Rank) -> None:
        """Take out a request that waits no longer."""
        tenant = self._tenants[request.tenant]
        index = bisect_left(tenant.waiting, rank, key=lambda waiting: waiting.rank)
        del tenant.waiting[index]
        self._len -= 1
        if not tenant.waiting:
            del self._tenants[request.tenant]

    def refund(self, name: str, tokens: int) -> None:
        """A request of this tenant ended before it used all that was paid for."""
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.credit += tokens
