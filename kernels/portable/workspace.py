"""Scratch memory that survives from call to call, so that a decode step allocates almost nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers that grow and never shrink. Contents between calls are what earlier calls left, zeros at first.

    Owns its memory; a buffer is valid until the next `take` of the same name.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of this shape, 64-byte aligned as all of torch's CPU allocations are."""
        key = (name, dtype)
        last = self._last.get(key)
        if last is not None and last[0] == shape:
            return last[1]
        size = math.prod(shape)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            # A tensor born under inference_mode could not be written to outside of it.
            with torch.inference_mode(False):
                flat = torch.zeros(size, dtype=dtype)
            self._flat[key] = flat
        view = flat[:size].view(shape)
        self._last[key] = (shape, view)
        return view

    @property
    def num_bytes(self) -> int:
        """How much memory the buffers hold."""
        return sum(flat.numel() * flat.itemsize for flat in self._flat.values())
