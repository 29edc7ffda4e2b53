"""The servers that are compared over HTTP, each with two threads and the OpenAI-shaped /v1/completions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.peers.contestants import THREADS, vllm_dtype

MAX_STREAMS = 16
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Server:
    """How a server is started for a port, what answers 200 once it is ready, and how long that may take, in seconds."""

    name: str
    command: Callable[[int], Sequence[str]]
    ready_path: str
    ready_timeout: float
    environment: dict[str, str] = field(default_factory=dict)


def stet(model: Path, quantization: str) -> Server:
    """model: its folder in Hugging Face's layout."""

    def command(port: int) -> list[str]:
        flags = {"quantization": quantization, "threads": THREADS, "max-model-len": CONTEXT, "port": port}
        flags |= {"max-running": MAX_STREAMS, "kv-cache-memory": "1GiB", "log-format": "text"}
        pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "server.cli", "serve", str(model), *pairs]

    return Server("stet", command, "/readyz", 120.0)


def llama_server(binaries: Path, folder: Path) -> Server:
    model = folder / "model-q8_0.gguf"
    return Server("llama.cpp", lambda port: llama_server_command(binaries, model, port), "/health", 120.0)


def llama_server_command(binaries: Path, model: Path, port: int) -> list[str]:
    command = [binaries / "llama-server", "-m", model, "--port", port, "--host", "127.0.0.1"]
    command += ["-t", THREADS, "-tb", THREADS, "-np", MAX_STREAMS, "-c", MAX_STREAMS * CONTEXT]
    return list(map(str, command))


def vllm(python: Path, folder: Path, environment: dict[str, str]) -> Server:
    def command(port: int) -> list[str]:
        flags = {"dtype": vllm_dtype(), "max-model-len": CONTEXT, "max-num-seqs": MAX_STREAMS, "port": port}
        pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        # Its command `vllm` looks for a package of that name, which the CPU build's is not.
        module = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        return [*module, "--model", str(folder / "hf"), "--host", "127.0.0.1", *pairs]

    return Server("vllm", command, "/health", 900.0, environment)


def thread_environment() -> dict[str, str]:
    """For every contestant: two threads wherever a library counts for itself, and no look at a network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {name: str(THREADS) for name in names} | offline | {"PATH": os.environ.get("PATH", "")}
