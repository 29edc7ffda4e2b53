"""The scenarios: who comes, how many of them when, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Seconds since the beginning -> users; the last entry's time is the end.
Stages = Sequence[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What fails a run; None: no limit. Milliseconds at the 99th percentile of the behaviour named in `of`.

    They are wide: a machine of two cores, which the load shares, keeps them with the embedded model. For another model
    or machine, set them with the flags of the same names.
    """

    of: str = "chat"
    ttft_p99: float | None = 1000.0
    itl_p99: float | None = 200.0
    failures: float = 0.0
    refused: float | None = 0.0
    cached: float | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """mix: behaviour -> weight. users, seconds: where the flags do not say otherwise. think: seconds between a user's
    requests, from and to. stages: from users and seconds, how many there are when."""

    what: str
    mix: dict[str, int]
    users: int = 8
    seconds: float = 60.0
    think: tuple[float, float] = (0.2, 1.0)
    thresholds: Thresholds = field(default_factory=Thresholds)
    stages: Callable[[int, float], Stages] = lambda users, seconds: [(seconds, users)]


def burst(users: int, seconds: float) -> Stages:
    """A tenth of the users, then all of them at once for a quarter of the time, then a tenth again."""
    few = max(1, users // 10)
    return [(seconds / 3, few), (seconds / 3 + seconds / 4, users), (seconds, few)]


def ramp(users: int, seconds: float) -> Stages:
    """Eight equal steps, each with more users, up to all of them."""
    return [(seconds * step / 8, max(1, round(users * step / 8))) for step in range(1, 9)]


SCENARIOS: dict[str, Scenario] = {
    "steady": Scenario("chats at an even pace", {"chat": 1}),
    "burst": Scenario(
        "ten times as many chats for a while: the queue may refuse, and must recover",
        {"chat": 1},
        users=80,
        thresholds=Thresholds(ttft_p99=10_000.0, itl_p99=500.0, refused=None),
        stages=burst,
    ),
    "ramp": Scenario(
        "more and more users without pauses, to saturation",
        {"chat": 1},
        users=64,
        seconds=120.0,
        think=(0.0, 0.0),
        thresholds=Thresholds(ttft_p99=10_000.0, itl_p99=500.0, refused=None),
        stages=ramp,
    ),
    "long": Scenario(
        "prompts that fill most of the context among short ones, whose streams must not stall",
        {"chat": 6, "long": 1},
    ),
    "shared": Scenario(
        "one system prompt for all: the prefix cache must find it",
        {"shared": 1},
        thresholds=Thresholds(of="shared", cached=0.5),
    ),
    "cancels": Scenario(
        "half of the readers leave in the middle", {"chat": 1, "cancel": 1}, users=16, think=(0.0, 0.5)
    ),
    "slow": Scenario("half of the readers read slowly", {"chat": 1, "slow": 1}, users=16),
    "soak": Scenario(
        "all of it for an hour",
        {"chat": 6, "long": 1, "shared": 3, "cancel": 2, "slow": 1},
        seconds=3600.0,
    ),
}


def users_at(stages: Stages, now: float) -> int | None:
    """How many there are `now` seconds after the beginning; None once it is over."""
    return next((users for end, users in stages if now < end), None)
