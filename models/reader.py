"""Tensors out of safetensors files, some rows at a time, through one buffer.

The files are read and not mapped: pages of a mapped file count as memory of this process for as long as the system
likes, and then a model would seem to be there twice while it loads. Little endian, as the format is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from models.checkpoint import ELEMENT_BYTES, StoredTensor
from models.errors import ModelError

# What is read at a time. Small enough to be still in the processor's cache when it is converted or copied on.
PIECE_BYTES = 1 << 20

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def check_size(name: str, tensor: StoredTensor) -> None:
    """Raise ModelError unless the tensor's bytes are those of its shape, and of a dtype that can be read."""
    wanted = math.prod(tensor.shape) * ELEMENT_BYTES[tensor.dtype]
    if wanted != tensor.num_bytes:
        raise ModelError(
            f"{tensor.file} cannot be read ({name} has {tensor.num_bytes} bytes, and {list(tensor.shape)} in "
            f"{tensor.dtype} takes {wanted}); download it again"
        )


class TensorReader:
    """Owns the buffer and the open files; a context manager, which closes them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def pieces(self, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """The tensor from its first row to its last, as (index of the first row, rows [n, ...]).

        A row is what lies under one index of the first dimension; n is as many as PIECE_BYTES hold, and at least one.
        The rows lie in the buffer: they may be written to, and are gone with the next piece. Raises ModelError.
        """
        rows = tensor.shape[0]
        row_bytes = tensor.num_bytes // rows
        step = max(1, PIECE_BYTES // row_bytes)
        if len(self._buffer) < min(step, rows) * row_bytes:
            self._buffer = bytearray(min(step, rows) * row_bytes)
        dtype = _DTYPES[tensor.dtype]
        for first in range(0, rows, step):
            count = min(step, rows - first)
            self._read(tensor, tensor.offset + first * row_bytes, count * row_bytes)
            flat = torch.frombuffer(self._buffer, dtype=dtype, count=count * row_bytes // dtype.itemsize)
            yield first, flat.view(count, *tensor.shape[1:])

    def whole(self, tensor: StoredTensor) -> Tensor:
        """All of a small tensor, the caller's own. Raises ModelError."""
        return torch.cat([rows.clone() for _, rows in self.pieces(tensor)])

    def _read(self, tensor: StoredTensor, offset: int, size: int) -> None:
        try:
            if tensor.file not in self._files:
                self._files[tensor.file] = FileIO(tensor.file)
            file = self._files[tensor.file]
            file.seek(offset)
            view, done = memoryview(self._buffer)[:size], 0
            while done < size:
                read = file.readinto(view[done:])
                if not read:
                    raise ModelError(f"{tensor.file} is truncated: it ended while it was read; download it again")
                done += read
        except OSError as error:
            raise ModelError(f"{tensor.file} cannot be read ({error.strerror}); download it again") from None
