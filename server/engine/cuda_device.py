"""An NVIDIA GPU as an engine's device, or Triton's interpreter in its place.

Imported only where it is used: Triton takes time to import.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from kernels.cuda.common import device_type
from kernels.cuda.ops import CudaOps
from kernels.ops import KVCacheSpec
from models.config import ModelConfig
from models.layers import DecoderModel
from server.engine.config import EngineConfig
from server.engine.cuda_runner import CudaRunner
from server.engine.dtypes import dtype_name, kv_cache_dtype
from server.engine.invariance import rows_agree
from server.engine.memory import (
    GpuUse,
    KVCachePlan,
    available_memory_bytes,
    check_weights,
    decode_buckets,
    plan_gpu_kv_cache,
    plan_kv_cache,
)

logger = logging.getLogger(__name__)


class CudaDevice:
    """Implements server.engine.device.Device."""

    block_size = 64
    pipeline_depth = 2
    warmup_context = 0  # hundreds of prompt tokens fit beside streams: few contexts are long enough to matter

    def __init__(self, dtype: torch.dtype | None, deterministic: bool) -> None:
        self.ops = CudaOps(dtype or torch.bfloat16, deterministic)
        self._on_gpu = device_type() == "cuda"
        self.warmup_tokens = 256 if self._on_gpu else 4  # the interpreter takes a second for a few
        self._weight_bytes = self._peak_bytes = self._graph_bytes = 0
        self._base_bytes = self._allocated()
        self._specs: list[KVCacheSpec] = []

    def kv_cache_dtype(self, asked: str, model: ModelConfig) -> torch.dtype:
        """Asked nothing, that of the ops."""
        return kv_cache_dtype(asked, self.ops.dtype)

    def check_weights(self, model: ModelConfig, config: EngineConfig) -> None:
        """MemorySettingError if the weights cannot fit into what is free."""
        if self._on_gpu:
            check_weights(model.num_parameters, self.ops.dtype.itemsize, config, torch.cuda.mem_get_info()[0])

    def make_runner(
        self, model: DecoderModel, config: EngineConfig, kv_dtype: torch.dtype, block_size: int
    ) -> tuple[CudaRunner, KVCachePlan]:
        """Run a worst-case step on a small cache, and give the real one what is left. Raises MemorySettingError."""

        def runner(num_blocks: int, max_model_len: int) -> CudaRunner:
            return CudaRunner(
                model,
                self.ops,
                kv_dtype=kv_dtype,
                num_blocks=num_blocks,
                block_size=block_size,
                max_running=config.max_running,
                max_model_len=max_model_len,
                max_tokens_per_step=config.max_tokens_per_step,
                eos_token_ids=model.config.eos_token_ids,
            )

        specs = self._specs = model.kv_cache_specs(block_size, kv_dtype)
        max_positions = model.config.max_position_embeddings
        self._weight_bytes = model.weight_bytes
        if not self._on_gpu:
            plan = plan_kv_cache(specs, config, max_positions, available_memory_bytes())
            return runner(plan.num_blocks, plan.max_model_len), plan

        self._weight_bytes = self._allocated() - self._base_bytes
        longest = min(config.max_model_len or max_positions, max_positions)
        num_blocks = -(-min(longest, config.max_tokens_per_step) // block_size)
        cache_bytes = num_blocks * sum(spec.bytes_per_block for spec in specs)
        torch.cuda.reset_peak_memory_stats()
        trial = runner(num_blocks, longest)
        trial.run_worst_case()
        torch.cuda.synchronize()
        self._peak_bytes = torch.cuda.max_memory_allocated() - cache_bytes - self._base_bytes
        del trial
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        use = GpuUse(
            total=total,
            foreign=total - free - torch.cuda.memory_reserved() + self._base_bytes,
            weights=self._weight_bytes,
            peak=self._peak_bytes,
            num_graphs=len(decode_buckets(config.max_running)),
        )
        plan = plan_gpu_kv_cache(specs, config, max_positions, use)
        return runner(plan.num_blocks, plan.max_model_len), plan

    def warm_up(self, runner: CudaRunner, report: Callable[[float], None]) -> None:
        """Compile and capture; measure what the graphs take. From then on a compilation is a fault, and is counted."""
        if not self._on_gpu:
            return  # interpreted kernels are never compiled, and a warm-up of all buckets would take minutes
        runner.compile_kernels(report)
        if self.ops.deterministic and not rows_agree(runner.model, self.ops, self._specs):
            self.ops.fallbacks["row_invariance"] += 1
            logger.error(
                "a row's bits depend on the rows beside it: tokens may vary with the batch on this GPU with Triton %s. "
                "Please report it with the content of /info",
                triton.__version__,
            )
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        runner.capture_graphs(report)
        torch.cuda.synchronize()
        self._graph_bytes = max(free - torch.cuda.mem_get_info()[0], 0)
        logger.info("the decode graphs take %.0f MiB", self._graph_bytes / 2**20)

    def started(self) -> None:
        """Count every compilation from now on in `ops.fallbacks["compile"]`."""
        if not self._on_gpu:
            return

        def compiled(*, fn: Any = None, **_: Any) -> None:
            self.ops.fallbacks["compile"] += 1
            logger.warning(
                "a kernel was compiled in service, which holds up every request: %s", getattr(fn, "name", fn)
            )

        triton.knobs.runtime.jit_post_compile_hook = compiled

    def settle(self) -> None:
        """Nothing goes on in the background."""

    def memory_bytes(self, kv_cache_bytes: int) -> dict[str, int]:
        """Bytes by kind: as the allocator and the driver tell them, or as computed in the interpreter.

        workspace: what a worst-case step takes beside weights and KV cache.
        """
        memory = {"weights": self._weight_bytes, "kv_cache": kv_cache_bytes}
        if self._on_gpu:
            memory["workspace"] = max(self._peak_bytes - self._weight_bytes, 0)
            memory["graphs"] = self._graph_bytes
        return memory

    def describe(self) -> dict[str, Any]:
        """The device's part of the identity."""
        if not self._on_gpu:
            name, instructions = f"Triton's interpreter on a CPU ({platform.machine()})", ""
        else:
            major, minor = torch.cuda.get_device_capability()
            name, instructions = torch.cuda.get_device_name(), f"sm_{major}{minor}"
        return {
            "backend": "cuda",
            "dtype": dtype_name(self.ops.dtype),
            "device": name,
            "instruction_set": instructions,
            "threads": 0,
            "deterministic": self.ops.deterministic,
        }

    def versions(self) -> Mapping[str, str]:
        """What the kernels were compiled with."""
        return {"triton": str(triton.__version__)}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else 0
