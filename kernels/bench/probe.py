"""What the device can do, measured in the same run as the kernels: the floors are stated in it."""

from __future__ import annotations

import time

import torch

from kernels.bench.case import Probes
from kernels.bench.timing import Call, Sample, Timer
from kernels.cuda import activation

ROUNDS = 7


def best(sample: Sample) -> float:
    """Seconds of the round that was disturbed least."""
    return min(sample.run() for _ in range(ROUNDS))


def probe(timer: Timer, copied_bytes: int, matrix: int, launches: int) -> tuple[Probes, dict[str, float]]:
    """(rates, the same in familiar units with the costs of a launch).

    Bandwidth: a copy, read and written bytes together. Rate: a square bf16 product of random numbers (zeros would be
    faster), by the library that torch uses.
    """
    device = timer.device
    source = torch.randint(0, 127, (copied_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = copied_bytes / best(timer.prepare([lambda: target.copy_(source)]))
    a, b = (torch.randn(matrix, matrix, device=device).to(torch.bfloat16) for _ in range(2))
    rate = 2 * matrix**3 / best(timer.prepare([lambda: a @ b]))
    small = torch.ones(1024, device=device)
    in_graph = best(timer.prepare([lambda: small.add_(1.0)]))
    row = torch.ones(1, 1024, device=device).to(torch.bfloat16)
    timer.release()
    return Probes(bandwidth, rate), {
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "bf16_tflop_s": round(rate / 1e12, 2),
        "smallest_kernel_in_graph_us": round(in_graph * 1e6, 2),
        "host_launch_torch_us": round(_host_microseconds(lambda: small.add_(1.0), launches, timer), 2),
        "host_launch_triton_us": round(
            _host_microseconds(lambda: activation.gated(row, "silu", False), launches, timer), 2
        ),
    }


def _host_microseconds(call: Call, launches: int, timer: Timer) -> float:
    """Host time of one asynchronous launch; there are few enough of them that the device's queue never fills."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        timer.release()
        begin = time.perf_counter()
        for _ in range(launches):
            call()
        seconds.append((time.perf_counter() - begin) / launches)
    timer.release()
    return min(seconds) * 1e6
