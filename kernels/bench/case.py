"""One operator in one shape: its floor, its gate, its aims, its peers; and what became of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kernels.bench.peers import Peers
from kernels.bench.timing import Call, Spread, Timer, interleaved


@dataclass(frozen=True)
class Aim:
    """What was promised: a share of the floor, a time in microseconds, or a speed in times that of a peer."""

    what: Literal["share", "microseconds", "ratio"]
    bound: float
    peer: str = ""


@dataclass(frozen=True)
class Case:
    """num_bytes, operations: what must be moved and computed; the floor is the longer of the two at the probed rates.

    rate_factor: the device's rate for these operands over that for bf16. ours: calls that differ in their inputs'
    addresses. error: computes in float32 what the first of them must give and returns how far it is off; it may be at
    most `tolerance`.
    """

    num_bytes: int
    operations: int
    ours: Sequence[Call]
    error: Callable[[], float]
    tolerance: float
    peers: Peers
    aims: tuple[Aim, ...] = ()
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Spec:
    """A case before it is built: its tensors are made when its turn comes."""

    op: str
    shape: str
    build: Callable[[], Case]


@dataclass(frozen=True)
class Probes:
    """What the device can do, measured in this run: bytes and operations a second."""

    bandwidth: float
    rate: float


@dataclass
class Row:
    """One line of the result. Times in microseconds; peers: median, or why there is none.

    ungraphed: who could not be captured in a graph, so that the host's launches may be part of the time.
    """

    op: str
    shape: str
    error: float | None
    failure: str = ""
    floor_us: float = 0.0
    min_us: float = 0.0
    median_us: float = 0.0
    p90_us: float = 0.0
    share: float = 0.0
    peers: dict[str, float | str] = field(default_factory=dict)
    ungraphed: list[str] = field(default_factory=list)
    aims: list[dict[str, object]] = field(default_factory=list)


def difference(ours: Tensor, truth: Tensor) -> float:
    """‖ours − truth‖ / ‖truth‖ in float32. NaN and infinity stay visible: NaN is at most nothing."""
    ours, truth = ours.to(torch.float32), truth.to(torch.float32)
    if ours.shape != truth.shape:
        return math.inf
    return float((ours - truth).norm() / truth.norm())


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """The result of a second call into memory that the first result left full of NaN: what it leaves out shows."""
    first = call()
    first.fill_(math.nan if first.is_floating_point() else -1)
    del first  # the allocator hands the same block out again
    return call()


def measure(spec: Spec, timer: Timer, probes: Probes, rounds: int) -> Row:
    """Gate, then time ours and the peers in turn."""
    case = spec.build()
    error = case.error()
    row = Row(spec.op, spec.shape, error if math.isfinite(error) else None)  # JSON has no NaN
    if not error <= case.tolerance:  # written so that NaN fails
        row.failure = f"error {error:.3g}, allowed {case.tolerance:.3g}"
        return row
    samples = {"ours": timer.prepare(case.ours)}
    for name, peer in case.peers.items():
        if isinstance(peer, str):
            row.peers[name] = peer
            continue
        try:
            samples[name] = timer.prepare(peer)
        except Exception as problem:  # a peer that does not run is named in the table, whatever its reason
            row.peers[name] = f"failed: {str(problem).strip().splitlines()[0][:80] if str(problem) else type(problem)}"
    spreads = interleaved(samples, rounds)
    row.ungraphed = [name for name, sample in samples.items() if not sample.graphed]
    floor = max(case.num_bytes / probes.bandwidth, case.operations / (probes.rate * case.rate_factor))
    ours = spreads.pop("ours")
    row.floor_us, row.share = floor * 1e6, floor / ours.median
    row.min_us, row.median_us, row.p90_us = ours.least * 1e6, ours.median * 1e6, ours.p90 * 1e6
    row.peers |= {name: spread.median * 1e6 for name, spread in spreads.items()}
    row.aims = [verdict(aim, row, spreads) for aim in case.aims]
    return row


def verdict(aim: Aim, row: Row, spreads: Mapping[str, Spread]) -> dict[str, object]:
    """An aim, the value reached, and whether it was met; None where the peer did not run."""
    value: float | None
    if aim.what == "share":
        text, value = f"share >= {aim.bound}", row.share
    elif aim.what == "microseconds":
        text, value = f"<= {aim.bound:g} us", row.median_us
    else:
        text = f">= {aim.bound}x {aim.peer}"
        # A peer's name may go on with how it was run.
        peer = next((spread for name, spread in spreads.items() if name.startswith(aim.peer)), None)
        value = None if peer is None else peer.median * 1e6 / row.median_us
    met = None if value is None else value <= aim.bound if aim.what == "microseconds" else value >= aim.bound
    return {"aim": text, "value": None if value is None else round(value, 3), "met": met}
