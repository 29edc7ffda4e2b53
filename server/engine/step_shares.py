"""What of a step each tenant gets while several run: so little of a flood that nobody else's step gets long.

A step takes `base_ns`, and more for each row and each prompt token (`StepTimes`). What a tenant has to do is measured
in these nanoseconds; without the base, which all of them need alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from server.engine.books import Entry
from server.engine.config import SchedulerConfig

# A shared step takes at most so many eighths of the time that the shortest of its tenants' own steps would take alone.
# Far below 2, because a stream also waits for its admission and for the HTTP process, which a flood keeps busy too.
SLOWDOWN_EIGHTHS = 9

# For so many steps after its last one a tenant counts as if it had a stream: who asks one thing after the other does
# not find a step under way, each time, that has all of a flood in it.
LINGERING_STEPS = 32


def shared_out(wanted: Mapping[str, int], amount: int) -> dict[str, int]:
    """`amount`, max-min fair: everybody gets the same, but nobody more than is wanted, and what is left over by those
    goes to the others. In the order of `wanted` where that matters."""
    shares: dict[str, int] = {}
    for tenant, most in sorted(wanted.items(), key=lambda item: item[1]):
        shares[tenant] = min(most, amount // (len(wanted) - len(shares)))
        amount -= shares[tenant]
    return shares


def step_shares(wanted_ns: Mapping[str, int], base_ns: int) -> dict[str, int]:
    """The nanoseconds of the next step that each tenant may use; `wanted_ns`: what each could use, more than 0.

    Each gets as much as the one that wants least, for that is an equal share; beyond that, what keeps the step within
    SLOWDOWN_EIGHTHS of the time that this one's own step would take.
    """
    least = min(wanted_ns.values())
    return shared_out(wanted_ns, max(len(wanted_ns) * least, SLOWDOWN_EIGHTHS * (base_ns + least) // 8 - base_ns))


class StepShares:
    """A step as it is shared out between several tenants.

    left_out: streams whose turn it is not. Of each tenant at least one stream or prompt token is in every step.
    """

    def __init__(self, running: Sequence[Entry], config: SchedulerConfig, tenants: Iterable[str]) -> None:
        """tenants: those of `running` and those that count as if they had a stream; two at least."""
        times = config.step_times
        num_rows: Counter[str] = Counter()
        num_tokens: Counter[str] = Counter()
        due: dict[str, list[Entry]] = {}
        for entry in running:
            request = entry.request
            tenant, length = request.tenant, request.num_tokens
            behind = length - request.num_computed_tokens
            if behind > 1:
                num_tokens[tenant] += behind
            elif length < entry.limit:
                # One that cannot be planned before its token in flight is known will be due again at once.
                num_rows[tenant] += 1
                if not request.waits_for_token:
                    due.setdefault(tenant, []).append(entry)
        for tenant in tenants:
            if not num_rows[tenant] and not num_tokens[tenant]:
                num_rows[tenant] = 1
        budget = max(config.max_tokens_per_step - num_rows.total(), 1)
        tokens = shared_out(num_tokens, min(budget, config.mixed_step_tokens) if due else budget)
        wanted = {
            tenant: num_rows[tenant] * times.row_ns + tokens.get(tenant, 0) * times.token_ns
            for tenant in num_rows | num_tokens
        }
        shares = step_shares(wanted, times.base_ns)
        self.left_out: set[Entry] = set()
        self._row_tokens = times.row_ns // times.token_ns
        self._tokens: dict[str, int] = {}
        for tenant, share in shares.items():
            streams = due.get(tenant, [])
            num_streams = min(max(share // times.row_ns, 1), len(streams))
            if num_streams < len(streams):
                streams.sort(key=lambda entry: (entry.turn, entry.rank))
                self.left_out.update(streams[num_streams:])
            left = (share - num_streams * times.row_ns) // times.token_ns
            self._tokens[tenant] = max(left, 0 if streams else 1)

    def pass_on(self, tenant: str) -> None:
        """A stream that had its turn cannot use it: its part is for its tenant's prompts."""
        self._tokens[tenant] += max(self._row_tokens, 1)

    def take_tokens(self, tenant: str, num_tokens: int) -> int:
        """Use up so much of a tenant's share for its prompts. Returns how many tokens it may have of these."""
        allowed = min(num_tokens, self._tokens.get(tenant, 0))
        self._tokens[tenant] = self._tokens.get(tenant, 0) - allowed
        return allowed
