"""Where the tensors of a checkpoint go as they arrive, some rows at a time: the places that layers offer a loader."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int8 import quantize_rows
from kernels.ops import QuantizationMode, QuantizedWeight
from models.errors import ModelError

# Elements that are quantized at a time: 256 KiB in float32. What `quantize_rows` makes of them stays in the processor's
# cache and is nothing beside the weights. Pieces four times as large took three quarters of the time (500 MB of
# bfloat16 on one core: 0.67 s, not 0.93), but the holes that they left in glibc's heap took a fifth of the model.
_QUANTIZED_AT_A_TIME = 1 << 16


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one checkpoint tensor, which may arrive in pieces of rows.

    shape   what the tensor must have
    put     put(first row, rows): takes [n, ...], a copy of it. Where `mode` quantizes, the rows may be float, and are
            quantized here, or a QuantizedWeight.
    mode    of the Linear whose weight this is; "none" for everything else
    stack   elements of the weight that the tensor becomes a part of: pieces of one weight belong together
    mean    of the values, where they are drawn at random
    transposed   the tensor is [K, N], the weight [N, K]; it cannot arrive quantized then
    """

    shape: tuple[int, ...]
    put: Callable[[int, Tensor | QuantizedWeight], None]
    stack: int
    mode: QuantizationMode = "none"
    mean: float = 0.0
    transposed: bool = False

    def fill(self, tensor: Tensor) -> None:
        """Take the whole tensor."""
        self.put(0, tensor)


@dataclass(frozen=True, slots=True)
class Precision:
    """The mode in which a model's Linears are prepared, but for the modules that stay unquantized.

    keep: whether a module does, by its name in the checkpoint ("lm_head", "model.layers.3.mlp.down_proj"); None: no one
    """

    mode: QuantizationMode = "none"
    keep: Callable[[str], bool] | None = None

    def of(self, prefix: str, parts: Collection[str]) -> QuantizationMode:
        """The mode of one Linear that is made of the modules `prefix` + part. Raises ModelError if they differ."""
        modules = [prefix + part for part in parts]
        kept = [module for module in modules if self.keep is not None and self.keep(module)]
        if not kept or self.mode == "none":
            return self.mode
        if others := [module for module in modules if module not in kept]:
            raise ModelError(
                f"{kept[0]} is unquantized and {others[0]} is int8; they are computed as one weight, for which a "
                "mixture is not supported: use a checkpoint with all or none of them quantized"
            )
        return "none"


class Rows:
    """A tensor that arrives in pieces along its first dimension.

    order: None, or where each row that arrives has its place: int64 [N].
    """

    def __init__(self, shape: tuple[int, ...], order: Tensor | None = None) -> None:
        self.shape = shape
        self.order = order
        self.total = self.missing = shape[0]
        self.buffer: Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def put(self, start: int, piece: Tensor | QuantizedWeight) -> None:
        """Copy a piece to where the rows from `start` on belong."""
        if isinstance(piece, QuantizedWeight):
            raise ValueError("piece is quantized; this tensor takes unquantized rows")
        if self.buffer is None:
            self.buffer = torch.empty(self.shape, dtype=piece.dtype)
        elif self.buffer.dtype != piece.dtype:
            self.buffer = self.buffer.to(torch.promote_types(self.buffer.dtype, piece.dtype))
        self._copy(self.buffer, start, piece)
        self.missing -= piece.shape[0]

    def _copy(self, buffer: Tensor, start: int, piece: Tensor) -> None:
        buffer[places(self.order, start, piece.shape[0])] = piece

    def take(self) -> Tensor:
        """Hand out the whole tensor and forget it. Raises RuntimeError if nothing has arrived."""
        if self.buffer is None:
            raise RuntimeError("a weight was taken before it arrived")
        buffer, self.buffer = self.buffer, None
        self.missing = self.total
        return buffer


class Int8Rows:
    """A weight [N, K] that arrives in pieces of rows and is kept as int8, on the device that it is for.

    Quantized by rows, so that the result is the same however they are cut. order: as in `Rows`.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, order: Tensor | None = None) -> None:
        self.shape = shape
        self.order = order
        self.device = device
        self.missing = shape[0]
        self.weight: QuantizedWeight | None = None

    @property
    def complete(self) -> bool:
        return self.missing == 0

    def put(self, start: int, piece: Tensor | QuantizedWeight) -> None:
        """Quantize a piece into the rows from `start` on, or copy it if it is quantized."""
        if self.weight is None:
            values = torch.empty(self.shape, dtype=torch.int8, device=self.device)
            self.weight = QuantizedWeight(values, torch.empty(self.shape[0], device=self.device))
        values, scales = self.weight.values, self.weight.scales
        count = piece.shape[0]
        if isinstance(piece, QuantizedWeight):
            target = places(self.order, start, count)
            values[target] = piece.values.to(self.device)
            scales[target] = piece.scales.to(self.device)
        else:
            step = max(1, _QUANTIZED_AT_A_TIME // self.shape[1])
            for first in range(0, count, step):
                rows = piece[first : first + step].to(self.device)
                target = places(self.order, start + first, rows.shape[0])
                values[target], scales[target] = quantize_rows(rows)
        self.missing -= count

    def take(self) -> QuantizedWeight:
        """Hand out the whole weight and forget it. Raises RuntimeError if nothing has arrived."""
        if self.weight is None:
            raise RuntimeError("a weight was taken before it arrived")
        weight, self.weight = self.weight, None
        self.missing = self.shape[0]
        return weight


class Columns(Rows):
    """A weight [N, K] that arrives transposed, some rows of [K, N] at a time. Kept unquantized until it is whole, for
    its scales are those of the columns that come."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.total = self.missing = shape[1]

    def _copy(self, buffer: Tensor, start: int, piece: Tensor) -> None:
        buffer[:, start : start + piece.shape[0]] = piece.T


def places(order: Tensor | None, start: int, count: int) -> Tensor | slice:
    """Where the rows from `start` on have their places: as they come, or in an order of their own."""
    return slice(start, start + count) if order is None else order[start : start + count]
