"""The device that is planned for: this machine's, asked and measured in a child process, or a card by its name.

What the child finds is kept in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), in stet/device-*.json, under a
key of all that it depends on: the machine, the versions, the kernels, the settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.planner.rates import CARDS, MeasuredRates, Rates
from server.planner.sizes import Backend
from server.planner.words import MODES, PlanError
from server.version import VERSION

_ROOT = Path(__file__).resolve().parents[2]
_FORMAT = 3  # of the cached file, and of what the probe measures
_PROBE_SECONDS = 300
_CUDA_KV = {asked: dict.fromkeys(("float32", "bfloat16", "float16"), "bfloat16") for asked in ("auto", "bf16")}


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """Where a model is to run.

    gpu_memory     bytes of the GPU; None on a CPU
    process_bytes  what an engine takes of the machine's memory before it loads anything
    rates          None: not known, because nobody has measured this machine
    """

    title: str
    backend: Backend
    gpu_memory: int | None
    process_bytes: int
    rates: Rates | None


def card(name: str) -> PlannedDevice:
    """A GPU from the table of published figures. Raises PlanError."""
    found = CARDS.get(name)
    if found is None:
        raise PlanError(f"--device {name}: choose one of auto, cpu, cuda, or of the cards {', '.join(CARDS)}", "device")
    int8 = {"int8": dict.fromkeys(("float32", "bfloat16", "float16"), "int8")}
    backend = Backend("cuda", "bfloat16", "bfloat16", _CUDA_KV | int8, MODES, block_size=64)
    return PlannedDevice(found.title, backend, found.memory, 0, found.rates)


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """This machine's device under some settings of the engine; what `probe` finds of it, and where that is kept."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None

    def known(self) -> PlannedDevice | None:
        """What is in the cache; None if nothing is. A file that cannot be read is as good as none: it is made anew."""
        try:
            return _parse(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, *, measure: bool, again: bool = False, say: Callable[[str], None] | None = None) -> PlannedDevice:
        """From the cache or, if it is not there, from a child process.

        measure: whether to measure how fast it is if that is not known; else `rates` may be None. again: whether to
        measure even if it is known. say: told before the machine is busy for some seconds. Raises PlanError.
        """
        known = None if again else self.known()
        if known is not None and (known.rates is not None or not measure):
            return known
        if say is not None and measure:
            say("measuring this machine, once, for about ten seconds")
            load, cores = os.getloadavg()[0], os.cpu_count() or 1
            if load > cores / 2:
                say(f"its {cores} cores are busy (load {load:.1f}): measure again with --measure when they are not")
        found = self._run(measure)
        try:
            device = _parse(found)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the probe of this machine said what cannot be used ({type(error).__name__})") from None
        self._write(found)
        return device

    @property
    def path(self) -> Path:
        """The file in the cache."""
        folder = os.environ.get("XDG_CACHE_HOME")
        base = Path(folder) if folder else Path.home() / ".cache"
        return base / "stet" / f"device-{self._key()}.json"

    def _key(self) -> str:
        parts: dict[str, Any] = {
            "format": _FORMAT,
            "stet": VERSION,
            "torch": importlib.metadata.version("torch"),
            "machine": [platform.machine(), platform.node(), _processor()],
            "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            # The compiled kernels' file is named after their sources.
            "kernels": sorted(file.name for file in (_ROOT / "kernels" / "cpu" / "lib").glob("*.so")),
            "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")},
            "settings": [self.device, self.dtype, self.threads],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _write(self, found: Mapping[str, Any]) -> None:
        path = self.path
        # Without a cache folder the plan is as good, only the next one takes as long.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                json.dump(found, file)
            Path(file.name).replace(path)

    def _run(self, measure: bool) -> dict[str, Any]:
        asked = {"device": self.device, "dtype": self.dtype, "threads": self.threads, "measure": measure}
        command = [sys.executable, "-m", "server.planner.probe", json.dumps(asked)]
        # As in the engine's process: idle threads soon sleep.
        environment = {"GOMP_SPINCOUNT": "2000", **os.environ}
        try:
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PlanError(f"the probe of this machine cannot run ({type(error).__name__}); try again") from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            if done.returncode == 2:  # its own word, for a person
                raise PlanError(lines[-1], "device")
            raise PlanError(f"the probe of this machine failed: {lines[-1]}")
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise PlanError("the probe of this machine said nothing that can be read; try again") from None
        return found


def _parse(found: Mapping[str, Any]) -> PlannedDevice:
    """Raises KeyError, TypeError, ValueError for what the probe did not write."""
    backend = Backend(**{**found["backend"], "modes": tuple(found["backend"]["modes"])})
    rates = found.get("rates")
    words = [str(found["device"]), str(found["instruction_set"])]
    if found["threads"]:
        words.append(f"{int(found['threads'])} threads")
    return PlannedDevice(
        title=", ".join(word for word in words if word),
        backend=backend,
        gpu_memory=None if found["gpu_memory"] is None else int(found["gpu_memory"]),
        process_bytes=int(found["process_bytes"]),
        rates=None if rates is None else MeasuredRates.from_dict(rates),
    )


def _processor() -> list[str]:
    """What tells one processor from another."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return [platform.processor()]
    wanted = ("model name", "flags", "Features", "cache size")
    return sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)})
