"""What an engine needs of the device that it runs on, and how the device is chosen."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from kernels.cpu.kv_cache import CpuKVCache, populate
from kernels.cpu.native import LibraryMissing, keep_freed_memory
from kernels.cpu.ops import CpuOps
from kernels.ops import Ops
from kernels.portable import PortableOps
from models.config import ModelConfig
from models.layers import DecoderModel
from server.engine.config import EngineConfig, StartupError
from server.engine.dtypes import DTYPES, dtype_name, kv_cache_dtype
from server.engine.memory import KVCachePlan, available_memory_bytes, plan_kv_cache
from server.engine.plan import StepRunner
from server.engine.runner import Runner

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)


class Device(Protocol):
    """Owns the ops, and knows how the device's memory is shared out.

    block_size      tokens of a KV block, unless the settings say otherwise
    pipeline_depth  steps in flight: 2 where the device computes beside the host
    warmup_tokens   length of the prompt that is timed before the first request
    warmup_context  position in a prompt up to which it is timed what attention adds; 0: nowhere
    """

    block_size: int
    pipeline_depth: int
    warmup_tokens: int
    warmup_context: int

    @property
    def ops(self) -> Ops:
        """The operators."""
        ...

    def kv_cache_dtype(self, asked: str, model: ModelConfig) -> torch.dtype:
        """What K and V are stored as. Raises StartupError for what the kernels do not mix."""
        ...

    def check_weights(self, model: ModelConfig, config: EngineConfig) -> None:
        """Before loading. Raises MemorySettingError if the weights cannot fit."""
        ...

    def make_runner(
        self, model: DecoderModel, config: EngineConfig, kv_dtype: torch.dtype, block_size: int
    ) -> tuple[StepRunner, KVCachePlan]:
        """After loading: a runner with as large a KV cache as there is room for. Raises MemorySettingError."""
        ...

    def warm_up(self, runner: Any, report: Callable[[float], None]) -> None:
        """Do once what would make the first steps of `runner`, which is the one from `make_runner`, slow."""
        ...

    def started(self) -> None:
        """The engine is warm: what only belongs to its start is a fault from now on."""
        ...

    def settle(self) -> None:
        """Wait until nothing that `started` began goes on in the background: what is timed then is only the steps."""
        ...

    def memory_bytes(self, kv_cache_bytes: int) -> dict[str, int]:
        """What each kind takes: weights, kv_cache, and workspace and graphs where they are known."""
        ...

    def describe(self) -> dict[str, Any]:
        """The device's part of the identity: backend, dtype, device, instruction_set, threads, deterministic."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Versions that belong to this device alone."""
        ...


class CpuDevice:
    """The processor, with the compiled kernels or, where they are missing, with torch's operators."""

    block_size = 16
    pipeline_depth = 1
    warmup_tokens = 256
    warmup_context = 2048

    def __init__(self, dtype: torch.dtype | None, threads: int | None) -> None:
        self._dtype = dtype
        self._weight_bytes = 0
        self._model_dtype = "float32"
        self._kv_caches: list[CpuKVCache] = []
        self._populating: threading.Thread | None = None
        self.ops: CpuOps | PortableOps
        try:
            self.ops = CpuOps(threads, dtype)
            torch.set_num_threads(1)  # the kernels bring their own threads; torch's would only be in their way
        except LibraryMissing as error:
            logger.warning("%s. Until then torch's own operators are used, which are slower", error)
            self.ops = PortableOps(threads, dtype)
            self.ops.fallbacks["kernels"] += 1

    def kv_cache_dtype(self, asked: str, model: ModelConfig) -> torch.dtype:
        """Asked nothing, K and V of a float32 model are float32, all others bfloat16."""
        if asked == "int8":
            return torch.int8
        if isinstance(self.ops, PortableOps):
            return kv_cache_dtype(asked, self.ops.dtype)
        stored = self._dtype or DTYPES[model.dtype]
        return torch.float32 if asked == "auto" and stored == torch.float32 else torch.bfloat16

    def check_weights(self, model: ModelConfig, config: EngineConfig) -> None:
        """Nothing is refused: the system may swap, and says when it cannot."""
        self._model_dtype = model.dtype

    def make_runner(
        self, model: DecoderModel, config: EngineConfig, kv_dtype: torch.dtype, block_size: int
    ) -> tuple[Runner, KVCachePlan]:
        """The KV cache gets a share of the memory that is free."""
        specs = model.kv_cache_specs(block_size, kv_dtype)
        plan = plan_kv_cache(specs, config, model.config.max_position_embeddings, available_memory_bytes())
        self._weight_bytes = model.weight_bytes
        runner = Runner(
            model,
            self.ops,
            plan.num_blocks,
            block_size,
            model.config.eos_token_ids,
            kv_dtype,
            max_tokens=config.max_tokens_per_step,
            max_running=config.max_running,
        )
        self._kv_caches = [cache for cache in runner.kv_caches if isinstance(cache, CpuKVCache)]
        return runner, plan

    def warm_up(self, runner: Any, report: Callable[[float], None]) -> None:
        """Nothing is compiled here."""

    def started(self) -> None:
        """The KV cache's memory is handed out meanwhile: requests need not wait for all of it."""
        if isinstance(self.ops, CpuOps):
            keep_freed_memory()
        self._populating = threading.Thread(target=populate, args=(self._kv_caches,), name="populate", daemon=True)
        self._populating.start()
        self._kv_caches = []

    def settle(self) -> None:
        if self._populating is not None:
            self._populating.join()

    def memory_bytes(self, kv_cache_bytes: int) -> dict[str, int]:
        return {"weights": self._weight_bytes, "kv_cache": kv_cache_bytes}

    def describe(self) -> dict[str, Any]:
        if isinstance(self.ops, CpuOps):
            backend, dtype = "cpu", self._model_dtype if self._dtype is None else dtype_name(self._dtype)
            instructions, threads = self.ops.team.kernels, self.ops.team.num_threads
        else:
            backend, dtype = "portable", dtype_name(self.ops.dtype)
            instructions, threads = torch.backends.cpu.get_cpu_capability().lower(), torch.get_num_threads()
        return {
            "backend": backend,
            "dtype": dtype,
            "device": processor(),
            "instruction_set": instructions,
            "threads": threads,
            "deterministic": True,
        }

    def versions(self) -> Mapping[str, str]:
        return {}


def make_device(config: EngineConfig) -> Device:
    """The device of these settings. Raises StartupError if it is not there, or does not do what they ask for."""
    if choose_device(config.device) == "cuda":
        if config.dtype not in ("auto", *DTYPES):
            raise StartupError(f"--dtype {config.dtype} is not supported: choose one of auto, {', '.join(DTYPES)}")
        # Triton takes time to import, and need not be there on other machines.
        try:
            from server.engine.cuda_device import CudaDevice
        except ImportError as error:
            raise StartupError(f"--device cuda needs Triton, which cannot be imported here ({error})") from error

        return CudaDevice(DTYPES.get(config.dtype), config.deterministic)
    if config.dtype not in ("auto", *DTYPES):
        raise StartupError(f"--dtype {config.dtype} is not supported: choose one of auto, {', '.join(DTYPES)}")
    return CpuDevice(DTYPES.get(config.dtype), config.threads)


def choose_device(asked: str) -> str:
    """ "cpu" or "cuda". Raises StartupError where cuda is asked for and is not there."""
    if asked == "cpu":
        return "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    usable = capability is not None and capability >= MIN_CAPABILITY
    if asked == "auto":
        return "cuda" if usable and not interpreted else "cpu"
    if asked != "cuda":
        raise StartupError(f"--device {asked} is not supported: choose one of auto, cpu, cuda")
    if interpreted:
        logger.warning(
            "TRITON_INTERPRET=1: the CUDA kernels run in Triton's interpreter on the CPU, which is very slow"
        )
        return "cuda"
    if capability is None:
        raise StartupError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if not usable:
        name = ".".join(map(str, capability))
        raise StartupError(f"--device cuda: the GPU has compute capability {name}, and 8.0 is needed; use --device cpu")
    return "cuda"


def processor() -> str:
    """The processor, for the identity."""
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
