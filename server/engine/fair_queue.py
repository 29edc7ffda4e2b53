"""Who is admitted next: tenants share, and within a tenant the rank decides."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
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
    """Waiting requests, ordered by deficit round robin over tenants (Shreedhar and Varghese, 1995), paid in arrears.

    A tenant that owes nothing may send its best-ranked request, and then owes the tokens that it costs. When everyone
    who waits is in debt, all debts shrink alike, one quantum a round. So a flood by one tenant costs the others
    nothing: a newcomer waits for one request of each other tenant at most, and while two of them wait, both are served
    the same number of tokens, up to one request and one quantum. Debts outlive the waiting, or a tenant would escape
    them by sending one request at a time; credit does not, for it cannot be saved up.

    Owns the waiting requests and the debts; never changes a request.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._tenants: dict[str, _Tenant] = {}  # those who wait or owe, in turn order
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Request]:
        for tenant in self._tenants.values():
            for waiting in tenant.waiting:
                yield waiting.request

    def push(self, request: Request, rank: Rank, cost: int) -> None:
        """Let a request wait. `cost` is 0 for one that has paid before and lost its place: it owes nobody a turn."""
        tenant = self._tenants.setdefault(request.tenant, _Tenant())
        insort(tenant.waiting, _Waiting(rank, cost, request), key=lambda waiting: waiting.rank)
        self._len += 1

    @property
    def tenants(self) -> list[str]:
        """Who waits, in turn order."""
        return [name for name, tenant in self._tenants.items() if tenant.waiting]

    def peek(self, among: Collection[str] | None = None) -> Request | None:
        """The request that goes next; it stays. Asking again gives the same one, unless a better one has come.

        among: only of these tenants.
        """
        waiting = [t for name, t in self._tenants.items() if t.waiting and (among is None or name in among)]
        if not waiting:
            return None
        # The rounds in which nobody could be served are added up in one go, so that a fine quantum costs no time.
        rounds = min(map(self._rounds, waiting))
        if rounds:
            for name, tenant in list(self._tenants.items()):
                # A debt shrinks to less than a round's worth of credit: one that is passed over saves nothing up.
                least = min(tenant.credit + rounds * self._quantum, self._quantum - 1)
                tenant.credit = max(tenant.credit, least)
                self._forget_if_even(name)
        return next(tenant.waiting[0].request for tenant in waiting if not self._rounds(tenant))

    def _rounds(self, tenant: _Tenant) -> int:
        """Rounds until a waiting tenant may send its next request."""
        return 0 if tenant.credit >= 0 or not tenant.waiting[0].cost else -(tenant.credit // self._quantum)

    def pop(self, request: Request, *, in_turn: bool = True) -> None:
        """Take out the request that `peek` gave: its tenant owes its cost, and has its next turn after the others.
        One that did not need a turn (not `in_turn`) leaves its tenant's debts and turn as they are."""
        tenant = self._tenants[request.tenant]
        cost = tenant.waiting.pop(0).cost
        if in_turn:
            tenant.credit -= cost
            del self._tenants[request.tenant]
            self._tenants[request.tenant] = tenant
        self._len -= 1
        self._forget_if_even(request.tenant)

    def remove(self, request: Request, rank: Rank) -> None:
        """Take out a request that waits no longer."""
        tenant = self._tenants[request.tenant]
        del tenant.waiting[bisect_left(tenant.waiting, rank, key=lambda waiting: waiting.rank)]
        self._len -= 1
        self._forget_if_even(request.tenant)

    def refund(self, name: str, tokens: int) -> None:
        """A request of this tenant did not use so many of the tokens that it cost."""
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.credit += tokens
            self._forget_if_even(name)

    def _forget_if_even(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.waiting and tenant.credit >= 0:
            del self._tenants[name]
