"""What the tokens are a function of, beside the request and its seed: the promise of reproducibility names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """Shown in /info. Two engines with equal identities give equal tokens for equal requests.

    model          the name it was asked for by
    weights_hash   SHA-256 over the weights, see models.loader.weights_hash
    instruction_set what the device's kernels were chosen by ("AVX512"), part of the identity on a CPU
    versions       of this server, torch and Python
    """

    model: str
    architecture: str
    weights_hash: str
    num_parameters: int
    dtype: str
    kv_cache_dtype: str
    quantization: str
    device: str
    instruction_set: str
    threads: int
    versions: dict[str, str]
