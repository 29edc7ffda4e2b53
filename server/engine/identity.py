"""What the tokens are a function of, beside the request and its seed: the promise of reproducibility names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """Shown in /info. Two engines with equal identities give equal tokens for equal requests.

    model          the name it was asked for by
    weights_hash   SHA-256 over the weights, see models.loader.weights_hash
    dtype          of the weights that are not quantized; the cpu backend computes in float32
    kv_cache_dtype what K and V are stored as
    quantization   none, w8a16 or w8a8
    device         the processor, or the GPU's name
    instruction_set what the device's kernels were chosen by: "avx512" on a CPU, "sm_90" on a GPU
    threads        of a CPU; the bits of the cpu backend depend neither on them nor on the instruction set
    backend        which kernels compute: cpu (compiled), portable (torch's operators) or cuda
    versions       of this server, torch and Python, and of Triton on a GPU
    deterministic  whether every operator is row-invariant; if not, tokens may also depend on the batch
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
    backend: str = ""
    deterministic: bool = True
