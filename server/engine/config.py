"""The engine's settings, resolved once and never changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass


class StartupError(Exception):
    """The engine cannot start with these settings: one line for a person, with what to do."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step costs, in nanoseconds: one with little to do, and more for each row and each further prompt token."""

    base_ns: int = 1_000_000
    row_ns: int = 100_000
    token_ns: int = 50_000


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the pool.

    num_blocks, block_size    the KV pool, in blocks of block_size tokens
    max_model_len             tokens of one sequence, prompt and output
    max_running               requests in one step at most
    max_tokens_per_step       tokens computed in one step at most
    mixed_step_tokens         prompt tokens beside running streams at most, so that a long prompt does not stall them
    attention_span            position at which a prompt's token costs twice what one at its beginning does, for the
                              keys that it sees, and counts twice beside streams; None: all count alike
    pipeline_depth            steps that may be planned before the first one's result is known: 1, or 2
    priority_aging_steps      a waiting request gains one priority for this many steps: nothing starves
    prefix_caching            whether finished prefixes are looked up and kept
    step_times                by what tenants share a step (measured when the engine starts)
    eos_token_ids             the model's end-of-sequence tokens
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int = 1024
    max_running: int = 64
    max_tokens_per_step: int = 2048
    mixed_step_tokens: int = 256
    attention_span: int | None = None
    pipeline_depth: int = 1
    priority_aging_steps: int = 64
    prefix_caching: bool = True
    step_times: StepTimes = StepTimes()
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the parent process asks of the engine. None means: the engine decides, and says what in `Ready`.

    model             a folder, a Hub id, or the name of the embedded model
    device            "auto" (cuda if there is a GPU that it runs on), "cpu" or "cuda"
    dtype             "auto" (the device's own), "bfloat16", "float16" or "float32"
    quantization      "none", "w8a16", "w8a8" or "auto" (the checkpoint's own mode if it is int8, else the best
                      one of the device); None: as the checkpoint is
    max_model_len     None: what the model was made for, as far as the memory carries one such sequence
    block_size        None: 16 on the CPU, 64 on CUDA
    kv_cache_bytes    None: a share of the memory that is free once the weights are loaded
    mixed_step_tokens None: measured at warm-up, with what attention adds along a prompt
    heartbeat_seconds time from one sign of life to the next
    log_format        "text" or "json", like the server's own lines
    threads           CPU threads of the engine; None: the physical cores this process may use
    kv_cache_dtype    "auto" (that of the model), "bf16" or "int8"
    gpu_memory_fraction  how much of the GPU's memory the engine may take in all
    deterministic     False lets cuBLAS compute unquantized layers on CUDA: then tokens may depend on the batch
    """

    model: str = "stet-tales"
    revision: str | None = None
    offline: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    kv_cache_bytes: int | None = None
    max_running: int = 64
    max_tokens_per_step: int = 2048
    mixed_step_tokens: int | None = None
    prefix_caching: bool = True
    threads: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_fraction: float = 0.9
    deterministic: bool = True
    heartbeat_seconds: float = 0.2
    log_format: str = "text"
