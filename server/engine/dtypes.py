"""Names of number types, as settings have them, and torch's."""

from __future__ import annotations

import torch

from server.engine.config import StartupError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def kv_cache_dtype(asked: str, dtype: torch.dtype) -> torch.dtype:
    """What K and V are stored as by kernels that store them as int8 or in the type that they compute in, `dtype`.

    asked: "auto", "bf16" or "int8". Raises StartupError for what they do not mix.
    """
    if asked == "int8":
        return torch.int8
    if asked == "bf16" and dtype != torch.bfloat16:
        raise StartupError(f"--kv-cache-dtype bf16 needs --dtype bfloat16, not {dtype_name(dtype)}: use auto")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's prefix."""
    return str(dtype).removeprefix("torch.")
