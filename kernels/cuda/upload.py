"""One packed copy a step from the host to the device.

A step needs a dozen short arrays of integers and floats on the device. A copy each would cost more host time than the
step's arithmetic, so they are packed into one page-locked buffer and sent as one asynchronous copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; Triton compiles faster loads for pointers that are multiples of it
_HOST_BUFFERS = 4
"""A step sends twice (its inputs; the parameters of its draw, behind the forward pass), and two steps are under way."""
_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


class Upload:
    """Arrays in, device tensors out: `put` each array, then `send` once. Then the tensors hold the values.

    The device buffer stays where it is: arrays of two steps that are put in the same order and sizes lie at the same
    addresses, which is what a CUDA graph needs. A tensor is valid until the next `send`; kernels that were launched
    before it on the same stream still read the old values. Page-locked buffers are used in turn, so that the host can
    pack a step while the copies of the one before wait behind its kernels. What exceeds the capacity is copied by
    itself.
    """

    def __init__(self, device: torch.device, capacity_bytes: int = 1 << 20) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        capacity = -(-capacity_bytes // _ALIGNMENT) * _ALIGNMENT
        self._device_buffer = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._host_buffers = [
            torch.zeros(capacity, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(_HOST_BUFFERS)
        ]
        self._host_arrays = [buffer.numpy() for buffer in self._host_buffers]
        self._copied = [torch.cuda.Event() for _ in range(_HOST_BUFFERS)] if self._on_gpu else []
        self._turn = 0
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self._device_buffer.numel()

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """Pack an array of int32, int64 or float32; return the device tensor of its shape, valid after `send`."""
        if array.dtype not in _TORCH_TYPES:
            raise ValueError(f"array has dtype {array.dtype}; int32, int64 and float32 can be uploaded")
        if self._used == 0 and self._on_gpu:
            self._copied[self._turn].synchronize()  # two steps ago: long over
        end = self._used + array.nbytes
        if end > len(self._host_arrays[0]):
            alone = torch.from_numpy(np.ascontiguousarray(array))
            if self._on_gpu:  # from pageable memory the host would wait for all that the device has to do before it
                alone = alone.pin_memory()
            return alone.to(self.device, non_blocking=self._on_gpu)
        self._host_arrays[self._turn][self._used : end].view(array.dtype)[:] = array.reshape(-1)
        tensor = self._device_buffer[self._used : end].view(_TORCH_TYPES[array.dtype]).view(array.shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return tensor

    def send(self) -> None:
        """Copy what was put since the last time; ordered before every kernel that is launched later."""
        used, self._used = self._used, 0
        if used:
            self._device_buffer[:used].copy_(self._host_buffers[self._turn][:used], non_blocking=True)
            if self._on_gpu:
                self._copied[self._turn].record()
            self._turn = (self._turn + 1) % _HOST_BUFFERS
