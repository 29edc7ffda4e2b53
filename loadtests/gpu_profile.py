"""Where a decode step's time goes on a GPU: kernels by torch's profiler, the host's part by cProfile.

    python -m loadtests.gpu_profile [--model qwen3-0.6b] [--mode none] [--batches 1 64]

Random weights, as in `loadtests.engine_bench`, and the same packages. For reading, not for figures: both profilers slow
down what they look at, so the time of a step is taken without them first.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import sys
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch.profiler import ProfilerActivity, profile

from kernels.ops import QuantizationMode
from loadtests.gpu_bench import PROMPT_LEN, SHAPES, make_peer, prompts, say, take_weights
from server.engine.build import start_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.device import make_device
from server.engine.request import Request, SamplingParams

WARM, TIMED, PROFILED = 20, 40, 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile each batch size and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*SHAPES], default="qwen3-0.6b")
    parser.add_argument("--mode", choices=["none", "w8a16", "w8a8"], default="none")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--rows", type=int, default=25, help="lines of each table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say("no GPU here")
        return 2
    config = EngineConfig(
        device="cuda",
        max_model_len=PROMPT_LEN + WARM + TIMED + 3 * PROFILED + 8,
        max_running=max(options.batches),
        max_tokens_per_step=8192,
        prefix_caching=False,
        quantization=options.mode,
    )
    device = make_device(config)
    shape = SHAPES[options.model]
    peer = make_peer(shape, torch.device("cuda"), torch.bfloat16)
    model = take_weights(peer, shape, device, cast(QuantizationMode, options.mode))
    del peer
    gc.collect()
    torch.cuda.empty_cache()
    core, _ = start_core(device, model, config, device.kv_cache_dtype("auto", model.config))
    for batch in options.batches:
        print(f"\n== {options.model} {options.mode}, batch {batch}")
        profile_decode(core, batch, model.config.vocab_size, options.rows)
    return 0


def profile_decode(core: EngineCore, batch: int, vocab_size: int, rows: int) -> None:
    """Print the time of a step, of its kernels, and of the host's functions; leave the core without requests."""
    params = SamplingParams(WARM + TIMED + 3 * PROFILED, temperature=0.0, ignore_eos=True)
    requests = [
        Request(1000 * batch + index, ids, params, arrival=index)
        for index, ids in enumerate(prompts(batch, vocab_size, salt=batch))
    ]
    for request in requests:
        core.add(request)
    run(core, WARM)
    print(f"{run(core, TIMED) / TIMED * 1e6:.0f} us a step")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run(core, PROFILED)
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    print(f"kernels: {total / PROFILED:.0f} us a step")
    for kernel in kernels[:rows]:
        of_step = kernel.self_device_time_total / PROFILED
        mean = kernel.self_device_time_total / max(kernel.count, 1)
        print(f"{of_step:9.1f} us a step  {kernel.count / PROFILED:6.1f} x {mean:8.2f} us  {kernel.key[:100]}")
    host = cProfile.Profile()
    host.enable()
    run(core, PROFILED)
    host.disable()
    print(f"host, {PROFILED} steps")
    pstats.Stats(host, stream=sys.stdout).sort_stats("tottime").print_stats(rows)
    core.abort([request.request_id for request in requests])
    while core.has_work:
        core.step()


def run(core: EngineCore, steps: int) -> float:
    """So many steps, and what they took, in seconds, until the device has nothing left to do."""
    started = time.perf_counter()
    for _ in range(steps):
        core.step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
