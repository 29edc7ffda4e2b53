"""A step queued on a GPU: where its results arrive, how to wait for them, and what says that the GPU is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.details import StepDetails
from server.engine.plan import DeviceFault, StepPlan, StepResult, add_details, step_result


@contextmanager
def device_faults() -> Iterator[None]:
    """Turn what says that the CUDA context is lost into DeviceFault. Running out of memory is no such thing."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except torch.AcceleratorError as error:
        raise DeviceFault(_first_line(error)) from error
    except RuntimeError as error:
        text = str(error)
        lost = "CUDA error" in text or "Triton Error [CUDA]" in text or "CUBLAS_STATUS" in text
        if lost and "out of memory" not in text:
            raise DeviceFault(_first_line(error)) from error
        raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


class StepBuffers:
    """Where one step's results arrive on the host."""

    def __init__(self, max_rows: int, max_tokens: int, on_gpu: bool) -> None:
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, pin_memory=on_gpu)
        self.finite_rows = torch.zeros(max_rows, dtype=torch.bool, pin_memory=on_gpu)
        self.finite_tokens = torch.zeros(max_tokens, dtype=torch.bool, pin_memory=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class CudaStep:
    """A PendingStep. num_sampled rows were drawn from; num_tokens positions are checked one by one (0: decode steps,
    where that is in the rows)."""

    plan: StepPlan
    results: StepBuffers
    num_sampled: int
    num_tokens: int
    details: StepDetails | None = None

    def result(self) -> StepResult:
        """Wait for the device. Raises DeviceFault."""
        results = self.results
        with device_faults():
            if results.arrived is not None:
                results.arrived.synchronize()
        tokens = results.tokens[: self.num_sampled].tolist()
        finite_rows = results.finite_rows[: self.num_sampled].tolist()
        result = step_result(self.plan, self._finite(), tokens, finite_rows)
        if self.details is not None:
            add_details(result, self.details.read(tokens))
        return result

    def _finite(self) -> list[bool]:
        """For each planned request, whether all that was computed for it is; a static step looks at its rows only."""
        requests = self.plan.requests
        if not self.num_tokens:
            return [True] * len(requests)
        counts = [planned.num_new_tokens for planned in requests]
        starts = np.cumsum([0, *counts[:-1]])
        finite_tokens = self.results.finite_tokens[: self.num_tokens].numpy()
        found: list[bool] = np.logical_and.reduceat(finite_tokens, starts).tolist()
        return found
