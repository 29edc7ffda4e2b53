"""The plan: whether a model fits, how much of it at once, how fast, and what training it would take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.config import ModelConfig
from server.engine.config import EngineConfig
from server.engine.memory import (
    KV_SHARE_OF_FREE,
    GpuUse,
    KVCachePlan,
    MemorySettingError,
    decode_buckets,
    plan_gpu_kv_cache,
    plan_kv_cache,
)
from server.planner.device import PlannedDevice
from server.planner.sizes import BlockBytes, WeightBytes, kv_block, weight_bytes, workspace_bytes
from server.planner.speed import SpeedModel, StepTime
from server.planner.subject import Subject
from server.planner.training import TrainingMemory, training_memory
from server.planner.words import DEFAULT_CONCURRENCY, DEFAULT_CONTEXT, MODES, PlanError

ENGINE = EngineConfig()
"""What `stet serve` does unasked."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to plan for. None: what `stet serve` does unasked, or what is said.

    memory          bytes: of the GPU, or what is available on the machine; None: what there is
    quantization    one mode; None: all, side by side
    kv_cache_dtype  as --kv-cache-dtype
    context         tokens of a sequence, prompt and output; None: as long as the model was made for, and the speed at
                    DEFAULT_CONTEXT
    concurrency     sequences at once; None: max_running of the engine, and the speed at DEFAULT_CONCURRENCY
    train_devices, train_batch, train_context   devices, sequences on each, tokens of each; train_context None: as
                    `context`
    """

    memory: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    context: int | None = None
    concurrency: int | None = None
    max_tokens_per_step: int = ENGINE.max_tokens_per_step
    gpu_memory_fraction: float = ENGINE.gpu_memory_fraction
    train_devices: int = 1
    train_batch: int = 1
    train_context: int | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted times at `context` tokens a sequence: of one sequence, of `concurrency`, and of such a prompt."""

    context: int
    concurrency: int
    decode_one: StepTime
    decode_many: StepTime
    prefill: StepTime


@dataclass(frozen=True, slots=True)
class ModePlan:
    """One quantization mode.

    kv_budget       bytes that the engine would give to the KV cache, at most
    cache           what it would allocate; None if the model, or what was asked of it, does not fit
    max_context     the longest that each of the planned number of sequences can have at once
    max_concurrency how many sequences of the planned context fit at once
    missing         bytes of memory that are lacking for one sequence of the wanted context; 0 if it fits
    speed           None: this machine has not been measured
    """

    mode: str
    weights: WeightBytes
    workspace: int
    kv_budget: int
    cache: KVCachePlan | None
    max_context: int
    max_concurrency: int
    missing: int
    speed: Speed | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it. `unavailable`: modes that the device does not have, or that the checkpoint cannot be."""

    subject: Subject
    device: PlannedDevice
    memory: int
    kv_dtype: str
    block: BlockBytes
    context: int
    concurrency: int
    modes: tuple[ModePlan, ...]
    unavailable: tuple[str, ...]
    training: tuple[TrainingMemory, ...]


def make_plan(subject: Subject, device: PlannedDevice, request: PlanRequest, available: int) -> Plan:
    """Plan one model on one device. available: bytes free on this machine, used for a CPU unless memory is given.

    Raises PlanError for what cannot be, and if the model fits in no mode: with what is missing and what would help.
    """
    config, backend = subject.config, device.backend
    memory = request.memory or device.gpu_memory or available
    kv_dtype = _kv_dtype(request, device, config)
    block = kv_block(config, kv_dtype, backend.block_size)
    positions = config.max_position_embeddings
    if request.context is not None and request.context > positions:
        raise PlanError(
            f"a context of {request.context} tokens exceeds the {positions} positions that the model was made for",
            "context",
        )
    wanted = (request.quantization,) if request.quantization else MODES
    # The weights of an int8 checkpoint do for both int8 modes, and cannot be had unquantized.
    there = [mode for mode in backend.modes if mode != "none" or config.quantization is None]
    if request.quantization and request.quantization not in there:
        where = device.title if request.quantization not in backend.modes else "an int8 checkpoint"
        raise PlanError(
            f"quantization {request.quantization} is not to be had on {where}: choose one of {', '.join(there)}",
            "quantization",
        )
    context = request.context or min(positions, DEFAULT_CONTEXT)
    concurrency = request.concurrency or DEFAULT_CONCURRENCY
    modes = tuple(
        _plan_mode(mode, subject, device, request, memory, kv_dtype, block, context, concurrency)
        for mode in wanted
        if mode in there
    )
    if all(mode.missing for mode in modes):
        raise PlanError(_does_not_fit(subject, device, request, memory, modes, kv_dtype, block), "memory")
    return Plan(
        subject=subject,
        device=device,
        memory=memory,
        kv_dtype=kv_dtype,
        block=block,
        context=context,
        concurrency=concurrency,
        modes=modes,
        unavailable=tuple(mode for mode in wanted if mode not in there),
        training=tuple(
            training_memory(config, request.train_devices, request.train_batch, request.train_context or context)
        ),
    )


def _kv_dtype(request: PlanRequest, device: PlannedDevice, config: ModelConfig) -> str:
    found = device.backend.kv_dtypes.get(request.kv_cache_dtype, {}).get(config.dtype)
    if found is None:
        there = [name for name, by_dtype in device.backend.kv_dtypes.items() if config.dtype in by_dtype]
        raise PlanError(
            f"a KV cache of {request.kv_cache_dtype} is not to be had on {device.title}: choose one of "
            f"{', '.join(there)}",
            "kv_cache_dtype",
        )
    return found


def _plan_mode(
    mode: str,
    subject: Subject,
    device: PlannedDevice,
    request: PlanRequest,
    memory: int,
    kv_dtype: str,
    block: BlockBytes,
    context: int,
    concurrency: int,
) -> ModePlan:
    config, backend = subject.config, device.backend
    settings = EngineConfig(
        model=subject.name,
        quantization=mode,
        kv_cache_dtype=request.kv_cache_dtype,
        max_model_len=request.context,
        max_running=request.concurrency or ENGINE.max_running,
        max_tokens_per_step=request.max_tokens_per_step,
        gpu_memory_fraction=request.gpu_memory_fraction,
    )
    weights = weight_bytes(config, mode, backend)
    workspace = workspace_bytes(config, backend, settings.max_tokens_per_step, settings.max_running)
    positions = config.max_position_embeddings
    cache: KVCachePlan | None = None
    use = GpuUse(memory, 0, weights.total, weights.total + workspace, len(decode_buckets(settings.max_running)))
    free = memory - device.process_bytes - weights.total
    budget = int(free * KV_SHARE_OF_FREE) if device.gpu_memory is None else use.kv_budget(settings.gpu_memory_fraction)
    try:
        if device.gpu_memory is None:
            cache = plan_kv_cache([block], settings, positions, free)
        else:
            cache = plan_gpu_kv_cache([block], settings, positions, use)
    except MemorySettingError:
        pass  # how much is missing is counted below, for all modes alike
    fitting = max(budget, 0) // block.bytes_per_block
    needed = -(-(request.context or 1) // block.block_size) * block.bytes_per_block
    # Of more memory the engine gives the cache a share.
    missing = 0 if cache is not None else max(math.ceil((needed - budget) / _share(device, request)), 1)
    speed = None
    if device.rates is not None and cache is not None:
        model = SpeedModel(config, backend, device.rates, mode, kv_dtype)
        speed = Speed(
            context,
            concurrency,
            model.decode(1, context),
            model.decode(concurrency, context),
            model.prefill(context, settings.max_tokens_per_step),
        )
    return ModePlan(
        mode=mode,
        weights=weights,
        workspace=workspace,
        kv_budget=max(budget, 0),
        cache=cache,
        max_context=min(fitting // concurrency * block.block_size, positions),
        max_concurrency=fitting // -(-context // block.block_size),
        missing=missing,
        speed=speed,
    )


def _does_not_fit(
    subject: Subject,
    device: PlannedDevice,
    request: PlanRequest,
    memory: int,
    modes: tuple[ModePlan, ...],
    kv_dtype: str,
    block: BlockBytes,
) -> str:
    """One line: what the model needs in the mode that comes closest, what is there, and what would help."""
    best = min(modes, key=lambda each: each.missing)
    length = request.context or block.block_size
    ways = [f"{_gib(memory + best.missing, up=True)} of memory"]
    backend = device.backend
    if request.quantization == "none" and (smaller := [mode for mode in backend.modes if mode != "none"]):
        saved = best.weights.total - weight_bytes(subject.config, smaller[0], backend).total
        ways.append(f"--quantization {smaller[0]} (saves {_gib(saved)})")
    fitting = best.kv_budget // block.bytes_per_block * block.block_size
    if request.context is not None and fitting:
        ways.append(f"a context of {fitting} tokens")
    if kv_dtype != "int8" and "int8" in backend.kv_dtypes and best.kv_budget > 0:
        ways.append("--kv-cache-dtype int8")
    ways.append("a smaller model")
    return (
        f"{subject.name} does not fit: its weights take {_gib(best.weights.total)} ({best.mode}) and {length} tokens "
        f"of KV cache {_gib(-(-length // block.block_size) * block.bytes_per_block)}; of {_gib(memory)} of memory the "
        f"engine could give the cache {_gib(best.kv_budget)}: {_gib(best.missing, up=True)} are missing. "
        f"What would help: {', '.join(ways)}"
    )


def _share(device: PlannedDevice, request: PlanRequest) -> float:
    """How much of each further byte of memory the engine gives the KV cache unasked."""
    return KV_SHARE_OF_FREE if device.gpu_memory is None else request.gpu_memory_fraction


def _gib(num_bytes: int, up: bool = False) -> str:
    """For a person; `up`: rounded up, so that what is said to help does."""
    factor, digits, unit = (2**30, 2, "GiB") if num_bytes >= 2**30 else (2**20, 1, "MiB")
    scaled = num_bytes / factor * 10**digits
    return f"{(math.ceil(scaled) if up else round(scaled)) / 10**digits:,.{digits}f} {unit}"
