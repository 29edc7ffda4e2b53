"""A step queued on a GPU: where its results arrive, how to wait for them, and what says that the GPU is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.details import StepDetails
from server.engine.plan import DeviceFault, RowResult, StepPlan, StepResult
from server.engine.runner import NOT_FINITE


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
        if self.details is None:
            return self._result(tokens, finite_rows)
        found = self.details.read(tokens)
        result = self._result(tokens, finite_rows)
        for place, row in enumerate(result.rows):
            if row.error is None:
                row.details = found.get(place)
        return result

    def _result(self, tokens: list[int], finite_rows: list[bool]) -> StepResult:
        results, requests = self.results, self.plan.requests
        if not self.num_tokens:
            rows = tuple(
                RowResult(planned.request.request_id, (token,))
                if finite
                else RowResult(planned.request.request_id, (), NOT_FINITE)
                for planned, token, finite in zip(requests, tokens, finite_rows, strict=True)
            )
            return StepResult(self.plan.step_id, rows)
        counts = [planned.num_new_tokens for planned in requests]
        starts = np.cumsum([0, *counts[:-1]])
        finite_tokens = results.finite_tokens[: self.num_tokens].numpy()
        finite_requests = np.logical_and.reduceat(finite_tokens, starts).tolist()
        mixed: list[RowResult] = []
        row = 0
        for planned, finite in zip(requests, finite_requests, strict=True):
            drawn: tuple[int, ...] = ()
            if planned.samples:
                finite = finite and finite_rows[row]
                drawn = (tokens[row],)
                row += 1
            request_id = planned.request.request_id
            mixed.append(RowResult(request_id, drawn) if finite else RowResult(request_id, (), NOT_FINITE))
        return StepResult(self.plan.step_id, tuple(mixed))
