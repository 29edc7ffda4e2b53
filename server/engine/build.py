"""From settings to a warm EngineCore: pick the device, load the weights, size the KV cache, run the first steps.

`build_engine` is what the engine process, the tests and the benchmarks all call; it needs no web package.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import llguidance
import torch

from kernels.ops import QuantizationMode, QuantizedWeight
from models.config import ModelConfig
from models.errors import ModelError
from models.layers import DecoderModel
from models.loader import LoadProgress, load_config, load_model, resolve_mode, resolve_model, weights_hash
from server.engine.config import EngineConfig, SchedulerConfig, StartupError
from server.engine.core import EngineCore
from server.engine.device import Device, make_device
from server.engine.dtypes import dtype_name
from server.engine.grammar import GrammarError, Grammars
from server.engine.identity import Identity
from server.engine.memory import KVCachePlan, MemorySettingError
from server.engine.scheduler import Scheduler
from server.engine.warmup import warm_up
from server.version import VERSION

logger = logging.getLogger(__name__)

__all__ = ["Engine", "StartupError", "build_engine"]

# report(phase, message, fraction): phase is "load" or "warmup"; fraction is None where it cannot be told.
Report = Callable[[str, str, float | None], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """A warm core and what there is to say about it.

    memory_bytes: what each kind takes: weights, kv_cache, workspace, graphs. startup_seconds: how long each part took.
    fallbacks: the ops' own counter of slower paths taken; it goes on counting. settle: waits, some seconds, until
    nothing of the start goes on in the background; only measurements need it.
    """

    core: EngineCore
    identity: Identity
    scheduler_config: SchedulerConfig
    vocab_size: int
    model_path: Path
    memory_bytes: dict[str, int]
    startup_seconds: dict[str, float]
    fallbacks: Counter[str]
    settle: Callable[[], None]


def build_engine(
    config: EngineConfig,
    report: Report = lambda phase, message, fraction: None,
    on_step_start: Callable[[int, float], None] = lambda step_id, predicted: None,
) -> Engine:
    """Load the model of `config` and warm it up. Raises StartupError."""
    try:
        return _build(config, report, on_step_start)
    except (ModelError, MemorySettingError) as error:
        raise StartupError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]} What makes room: --quantization w8a16, "
            "--kv-cache-dtype int8, a smaller --max-tokens-per-step, --max-running or --gpu-memory-fraction"
        ) from error
    except ValueError as error:
        # What a backend or the scheduler says of numbers that it cannot work with.
        raise StartupError(f"these settings cannot be used: {error}") from error


def _build(config: EngineConfig, report: Report, on_step_start: Callable[[int, float], None]) -> Engine:
    started = time.perf_counter()
    device = make_device(config)
    ops = device.ops
    path = resolve_model(
        config.model,
        config.revision,
        offline=config.offline,
        progress=lambda message: report("load", message, None),
    )

    def loaded(progress: LoadProgress) -> None:
        report("load", f"loading {config.model}", progress.loaded_bytes / max(progress.total_bytes, 1))

    model_config = load_config(path)
    check_length(config, model_config)  # before minutes of loading
    mode = quantization_mode(config.quantization, model_config, device)
    config = replace(config, quantization=mode)
    kv_dtype = device.kv_cache_dtype(config.kv_cache_dtype, model_config)  # before minutes of loading
    device.check_weights(model_config, config)
    model = load_model(path, ops, quantization=mode, progress=loaded)
    seconds = {"load": time.perf_counter() - started}

    warmup_started = time.perf_counter()
    core, kv_plan = start_core(device, model, config, kv_dtype, report, on_step_start)
    core.grammars = _grammars(path, model.config.vocab_size, core.scheduler.config.eos_token_ids)
    seconds["warmup"] = time.perf_counter() - warmup_started

    return Engine(
        core=core,
        identity=_identity(config, mode, device, model, path, kv_dtype),
        scheduler_config=core.scheduler.config,
        vocab_size=model.config.vocab_size,
        model_path=path,
        memory_bytes=device.memory_bytes(kv_plan.kv_cache_bytes),
        startup_seconds=seconds,
        fallbacks=ops.fallbacks,
        settle=device.settle,
    )


def _grammars(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars | None:
    """What grammars need, if the model's tokenizer can be used for them."""
    try:
        return Grammars((path / "tokenizer.json").read_text(encoding="utf-8"), vocab_size, eos_token_ids)
    except (OSError, UnicodeDecodeError, GrammarError) as error:
        logger.warning("requests with a grammar will be refused: %s", error)
        return None


def start_core(
    device: Device,
    model: DecoderModel,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    report: Report = lambda phase, message, fraction: None,
    on_step_start: Callable[[int, float], None] = lambda step_id, predicted: None,
) -> tuple[EngineCore, KVCachePlan]:
    """A warm core around a loaded model, and how large its KV cache became. Raises as `build_engine` does, and
    MemorySettingError."""
    block_size = config.block_size or device.block_size
    report("warmup", "sharing out the memory", None)
    runner, kv_plan = device.make_runner(model, config, kv_dtype, block_size)
    scheduler_config = SchedulerConfig(
        num_blocks=kv_plan.num_blocks,
        block_size=block_size,
        max_model_len=kv_plan.max_model_len,
        max_running=config.max_running,
        max_tokens_per_step=config.max_tokens_per_step,
        mixed_step_tokens=config.mixed_step_tokens or config.max_tokens_per_step,
        pipeline_depth=device.pipeline_depth,
        prefix_caching=config.prefix_caching,
        eos_token_ids=model.config.eos_token_ids,
    )
    device.warm_up(runner, lambda fraction: report("warmup", "preparing the kernels", fraction))
    report("warmup", "running the first steps", None)
    measured = warm_up(runner, scheduler_config, device.warmup_tokens, device.warmup_context)
    scheduler_config = replace(scheduler_config, step_times=measured.step_times)
    if config.mixed_step_tokens is None:
        allowed = min(measured.mixed_step_tokens, config.max_tokens_per_step)
        scheduler_config = replace(scheduler_config, mixed_step_tokens=allowed, attention_span=measured.attention_span)
    device.started()
    core = EngineCore(runner, Scheduler(scheduler_config), on_step_start=on_step_start)
    # So that the first steps are not taken for hung on a device where they are long.
    core.cost.observe(1, measured.decode_seconds)
    core.cost.observe(measured.prefill_tokens, measured.prefill_seconds)
    return core, kv_plan


def check_length(config: EngineConfig, model: ModelConfig) -> None:
    """Raise StartupError where --max-model-len is within what config.json says and beyond what is served of it."""
    asked, served, scaling = config.max_model_len, model.max_position_embeddings, model.rope_scaling
    if asked is not None and asked > served and scaling is not None and scaling.kind == "longrope":
        raise StartupError(
            f"--max-model-len {asked} is not supported: this model's rope_scaling is longrope, which rotates sequences "
            f"beyond {served} tokens by other frequencies, and only those up to there are served"
        )


def quantization_mode(asked: str | None, model: ModelConfig, device: Device) -> QuantizationMode:
    """The setting as a mode of the ops. None: as the checkpoint is; "auto": its own mode if it is int8, else what is
    fastest on the device. Raises StartupError for another word, ModelError for what the checkpoint cannot be."""
    modes = get_args(QuantizationMode)
    if asked not in (None, "auto", *modes):
        raise StartupError(f"--quantization {asked} is not supported: choose one of {', '.join(modes)}, auto")
    if asked == "auto":
        return _best_mode(device) if model.quantization is None else model.quantization.mode
    return resolve_mode(model, cast(QuantizationMode | None, asked))


def _best_mode(device: Device) -> QuantizationMode:
    """w8a16 on a GPU, where decoding waits for the weights' bytes; w8a8 on a CPU, where integer products are the faster
    ones at every batch size, unless they are not exact there."""
    if device.describe()["backend"] == "cuda":
        return "w8a16"
    smallest = QuantizedWeight(torch.ones((1, 1), dtype=torch.int8), torch.ones(1))
    try:
        device.ops.prepare_linear(smallest, None, "w8a8")
    except ValueError:
        return "w8a16"
    return "w8a8"


def _identity(
    config: EngineConfig, mode: QuantizationMode, device: Device, model: DecoderModel, path: Path, kv_dtype: torch.dtype
) -> Identity:
    versions = {"stet": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}
    versions["llguidance"] = llguidance.__version__
    return Identity(
        model=config.model,
        architecture=model.config.architecture,
        weights_hash=weights_hash(path),
        num_parameters=model.config.num_parameters,
        kv_cache_dtype=dtype_name(kv_dtype),
        quantization=mode,
        versions=versions | dict(device.versions()),
        **device.describe(),
    )
