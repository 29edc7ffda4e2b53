"""What a start shows: how far it is, on a terminal or as log lines, and what is served once it is ready."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING

from server.units import count, size
from server.version import VERSION

if TYPE_CHECKING:
    from server.engine.messages import Ready
    from server.service import Service
    from server.supervisor import Supervisor

_PROGRESS_SECONDS = 0.1
_PROGRESS_LOG_SECONDS = 5.0


async def announce(
    url: str, service: Service, supervisor: Supervisor, began: float, as_text: bool, with_keys: bool
) -> None:
    """Show how the start goes, and what is served once it is. Raises EngineFailed."""
    # A line that is rewritten would be noise in a log file, and JSON must stay JSON.
    on_terminal = as_text and sys.stderr.isatty()
    show = asyncio.create_task(_show_progress(supervisor) if on_terminal else _log_progress(supervisor))
    try:
        await service.ready()
        ready = await supervisor.wait_ready()
    finally:
        show.cancel()
        if on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    if as_text:
        print(_summary(ready, service.model, url, seconds, with_keys), file=sys.stderr, flush=True)
        return
    identity = ready.identity
    fields = {
        "url": url,
        "model": identity.model,
        "dtype": identity.dtype,
        "kv_cache_dtype": identity.kv_cache_dtype,
        "quantization": identity.quantization,
        "device": identity.device,
        "context_length": ready.max_model_len,
        "max_running": ready.max_running,
        "memory_bytes": ready.memory_bytes,
        "api_keys": with_keys,
        "startup_seconds": round(seconds, 3),
    }
    logging.getLogger("stet").info("ready", extra={"fields": fields})


def _progress_line(supervisor: Supervisor) -> str:
    """The phase of the start, what it does, and how far it is."""
    progress = supervisor.progress
    if progress is None:
        return "starting the engine"
    share = "" if progress.fraction is None else f" {progress.fraction:4.0%}"
    return f"{progress.phase}: {progress.message}{share}"


async def _log_progress(supervisor: Supervisor) -> None:
    """A log line every few seconds, where nobody sees a line rewritten. A quick start has none."""
    while True:
        await asyncio.sleep(_PROGRESS_LOG_SECONDS)
        progress = supervisor.progress
        fields: dict[str, object] = {}
        if progress is not None:
            fields = {"phase": progress.phase, "what": progress.message}
            if progress.fraction is not None:
                fields["done"] = round(progress.fraction, 3)
        logging.getLogger("stet").info("starting", extra={"fields": fields})


async def _show_progress(supervisor: Supervisor) -> None:
    """One line on the terminal, rewritten."""
    shown = ""
    while True:
        line = _progress_line(supervisor)
        if line != shown:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            shown = line
        await asyncio.sleep(_PROGRESS_SECONDS)


def _summary(ready: Ready, model: str, url: str, seconds: float, with_keys: bool) -> str:
    """What is served and how to try it, for a person. model: in requests; with_keys: whether a key is asked for."""
    identity = ready.identity
    phases = ", ".join(f"{name} {value:.1f}" for name, value in ready.startup_seconds.items())
    memory = ", ".join(f"{kind.replace('_', ' ')} {size(held)}" for kind, held in ready.memory_bytes.items() if held)
    tokens = ready.num_blocks * ready.block_size
    instructions = f", {identity.instruction_set}" if identity.instruction_set else ""
    threads = f", {identity.threads} threads" if identity.threads else ""
    rows = {
        "model": f"{identity.model} ({identity.architecture}, {count(identity.num_parameters)} parameters)",
        "dtype": f"{identity.dtype}, KV cache {identity.kv_cache_dtype}",
        "quantization": identity.quantization,
        "device": f"{identity.device}{instructions}{threads}",
        "context": f"{ready.max_model_len:,} tokens, up to {ready.max_running} requests at once",
        "KV cache": f"{ready.num_blocks:,} blocks of {ready.block_size} tokens ({tokens:,} tokens)",
        "memory": memory,
        "API keys": "needed" if with_keys else "none: for this machine, or a network that is trusted",
        "started in": f"{seconds:.1f} s ({phases})",
    }
    key = ' -H "Authorization: Bearer $KEY"' if with_keys else ""
    lines = [f"Stet {VERSION} serves {identity.model} on {url}", ""]
    lines += [f"  {name:<14}{value}" for name, value in rows.items()]
    lines += [
        "",
        "Try it:",
        f"  curl {url}/generate{key} -H 'Content-Type: application/json' \\",
        """    -d '{"prompt": "Once upon a time", "max_new_tokens": 60}'""",
        f"OpenAI's clients: base_url {url}/v1, model {model}; metrics: {url}/metrics",
        "",
    ]
    return "\n".join(lines)
