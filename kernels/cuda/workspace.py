"""Scratch memory that stays where it is from step to step."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named buffers on one device. A CUDA graph keeps the addresses that it was captured with, so a buffer that a graph
    has seen is never freed: when a larger one is needed the old one is kept beside it until the workspace goes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._outgrown: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, outgrown buffers included."""
        return sum(buffer.nbytes for buffer in (*self._buffers.values(), *self._outgrown))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, zeroed: bool = False) -> Tensor:
        """A tensor of this shape at the start of the named buffer; its content is what was left there.

        zeroed: the buffer is zero when it is made (and whoever uses it leaves it so): for counters.
        """
        size = 1
        for length in shape:
            size *= length
        key = (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            if buffer is not None:
                self._outgrown.append(buffer)
            make = torch.zeros if zeroed else torch.empty
            buffer = self._buffers[key] = make(size, dtype=dtype, device=self.device)
        return buffer[:size].view(shape)
