"""All that differs between measuring on a GPU and, for a rehearsal of the same code, in the interpreter on the CPU.

On a GPU the calls are captured in a graph that runs for a few milliseconds, and CUDA events stand around its replay:
the launches of the host are then no part of the time, as they are none in service, where decode runs in graphs. What
cannot be captured runs in a loop between the events, and is marked. On the CPU it is wall time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-3
"""Of one replay: long against the half microsecond that events resolve, short enough for many rounds."""
MAX_CALLS = 512


@dataclass(frozen=True)
class Sample:
    """Measures once, in seconds a call; graphed: without the launches of the host."""

    run: Callable[[], float]
    graphed: bool = True


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the best, the middle and nearly the worst of all rounds."""

    least: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))])


class Timer(Protocol):
    """Turns calls into samples."""

    device: torch.device

    def prepare(self, copies: Sequence[Call]) -> Sample:
        """Warm up; return what measures the copies in turn: the seconds of one call. Raises what they raise."""
        ...

    def release(self) -> None:
        """Wait for the device and give memory back between cases."""
        ...

    def describe(self) -> dict[str, object]:
        """The device and its driver."""
        ...


class HostTimer:
    """Wall time, for the interpreter."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def prepare(self, copies: Sequence[Call]) -> Sample:
        copies[0]()

        def sample() -> float:
            begin = time.perf_counter()
            for call in copies:
                call()
            return (time.perf_counter() - begin) / len(copies)

        return Sample(sample)

    def release(self) -> None:
        pass

    def describe(self) -> dict[str, object]:
        return {"device": "CPU, Triton's interpreter: the times mean nothing"}


class CudaTimer:
    """Events around graph replays."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def prepare(self, copies: Sequence[Call]) -> Sample:
        def once() -> None:
            for call in copies:
                call()

        once()  # compiles, and fills workspaces
        # A graph's capture needs a side stream that has seen the calls.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            once()
        torch.cuda.current_stream().wait_stream(stream)
        seconds = min(self._between_events(once) for _ in range(2)) / len(copies)
        turns = math.ceil(min(MAX_CALLS, SAMPLE_SECONDS / max(seconds, 1e-7)) / len(copies))
        replay, graphed = self._captured(once, turns)
        for _ in range(2):
            replay()
        return Sample(lambda: self._between_events(replay) / (turns * len(copies)), graphed)

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver_version(),
            "cuda": str(torch.version.cuda),
        }

    def _between_events(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _captured(self, once: Callable[[], None], turns: int) -> tuple[Callable[[], None], bool]:
        """The calls `turns` times, as a graph, or as a loop where something in them cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(turns):
                    once()
        except RuntimeError:
            torch.cuda.synchronize()

            def loop() -> None:
                for _ in range(turns):
                    once()

            return loop, False
        return graph.replay, True


def _driver_version() -> str:
    """From the driver's own file: no tool needs to be installed."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def make_timer(interpreted: bool) -> Timer:
    """The timer of the device whose kernels are measured."""
    return HostTimer() if interpreted else CudaTimer()


def interleaved(samples: Mapping[str, Sample], rounds: int) -> dict[str, Spread]:
    """Measure all in turn, A B and then B A, so that what drifts drifts for all."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    order = list(samples)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            seconds[name].append(samples[name].run())
    return {name: Spread.of(values) for name, values in seconds.items()}
