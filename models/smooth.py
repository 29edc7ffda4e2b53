"""SmoothQuant (arXiv:2211.10438): move outliers from activations, which w8a8 rounds by token, into weights.

In w8a8 one scale serves all channels of a token, so a channel that is a hundred times as large as the others leaves
them a hundredth of the 255 steps. But what comes before a linear layer can be divided by a factor for each channel if
the weight's columns are multiplied by it:

    (x / s) (s W)^T = x W^T,      s_j = max|x_j|^a / max|w_j|^(1 - a)

over a calibration text and the rows of the weight. Dividing costs nothing when it is folded into weights:

    qkv       into the weight of the norm before attention
    gate_up   into the weight of the norm before the MLP
    down      into the rows (and biases) of up_proj, for silu(gate) * up is linear in up
    lm_head   into the weight of the last norm, where the head is not tied to the token table

Here s is rounded to a power of two, which moves it by a factor of sqrt(2) at most, and makes every product exact: the
unquantized model computes the same bits before and after, in float32 as in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Activations, LinearWeight, Ops, QuantizationMode, QuantizedWeight
from models.errors import ModelError
from models.evaluate import ObservedOps, Progress, Reader, silent, steps
from models.layers import DecoderModel, Linear
from models.llama import Llama

STRENGTH = 0.5  # a: how much of the difficulty moves to the weights; the paper's choice for most models
_MAX_EXPONENT = 20  # a channel that would need a larger factor is as good as dead


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What the tensors of a checkpoint are multiplied by: float32 powers of two, by the tensor's name.

    rows: a factor for each index of the first dimension, [N];  columns: for each of the second, [K].
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    def apply(self, name: str, tensor: Tensor, first: int = 0) -> Tensor:
        """The tensor `name`, or some of its rows, the first of which has the index `first`: [n, ...], a float dtype.

        The result has the same dtype, but for float16, whose range is too narrow for the factors: it becomes float32.
        """
        rows, columns = self.rows.get(name), self.columns.get(name)
        if rows is None and columns is None:
            return tensor
        result = tensor.to(torch.float32)
        if rows is not None:
            some = rows[first : first + len(tensor)]
            result = result * (some if tensor.dim() == 1 else some[:, None])
        if columns is not None:
            result = result * columns
        return result if tensor.dtype == torch.float16 else result.to(tensor.dtype)


def calibrate(
    load: Callable[[Ops], DecoderModel],
    ops: Ops,
    rows: Sequence[Sequence[int]],
    strength: float = STRENGTH,
    progress: Progress = silent,
) -> Smoothing:
    """Read the token sequences `rows` with the unquantized model that `load` makes on the ops that it is given.

    strength: a, from 0 (weights decide alone) to 1 (activations do). Raises ValueError for other numbers or if there
    is nothing to read, ModelError for models that it does not know.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must be from 0 to 1")
    if not any(rows):
        raise ValueError("rows hold no token to calibrate with")
    watched = _ChannelOps(ops)
    model = load(watched.as_ops())
    if not isinstance(model, Llama):
        raise ModelError(f"{model.config.architecture} cannot be smoothed: which norms feed which layers is not known")
    reader = Reader(model, watched, model.ops.dtype)
    read, total = 0, sum(map(len, rows))
    for step in steps(rows):
        hidden = reader.hidden([rows[index] for index in step])
        if model.head is not model.table:
            watched.see(hidden, model.head.weight)
        read += sum(len(rows[index]) for index in step)
        progress("calibrating", read / total)
    return _fold(model, watched, strength)


def _fold(model: Llama, watched: _ChannelOps, strength: float) -> Smoothing:
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    names = model.config.names

    def move(prefix: str, linear: Linear, norm: str) -> None:
        factors = watched.factors(linear.weight, strength)
        for part in linear.parts:
            columns[f"{prefix}{part}.weight"] = factors
        rows[f"{norm}.weight"] = 1 / factors

    for index, layer in enumerate(model.layers):
        prefix = names.layer.format(index)
        move(prefix, layer.attention.qkv, prefix + names.attention_norm)
        move(prefix, layer.mlp.gate_up, prefix + names.mlp_norm)
        factors = watched.factors(layer.mlp.down.weight, strength)
        columns[f"{prefix}{names.down}.weight"] = factors
        # up is the second of two tensors, or the second half of one.
        up = f"{prefix}{names.gate_up[-1]}"
        scale = 1 / factors if len(names.gate_up) == 2 else torch.cat([torch.ones_like(factors), 1 / factors])
        rows[f"{up}.weight"] = rows[f"{up}.bias"] = scale
    if model.head is not model.table:
        move("", model.head, names.norm)
    return Smoothing(rows, columns)


class _ChannelOps(ObservedOps):
    """Keeps of every linear layer the largest magnitude in each column of its weight, and in each channel of its
    inputs so far: float32 [K]. Weights are told apart by identity, and live as long as the model."""

    def __init__(self, ops: Ops) -> None:
        super().__init__(ops)
        self._weights: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}

    def prepare_linear(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None = None,
        mode: QuantizationMode = "none",
        embedding: bool = False,
    ) -> LinearWeight:
        """As the inner Ops does it."""
        if isinstance(weight, QuantizedWeight):
            raise ModelError("the model is quantized already, and can only be smoothed before that")
        prepared = self._ops.prepare_linear(weight, bias, mode, embedding)
        # Not abs(): that would be the whole weight once more.
        self._weights[id(prepared)] = torch.maximum(weight.amax(0), -weight.amin(0)).to(torch.float32)
        return prepared

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """As the inner Ops does it."""
        self.see(x, weight)
        return self._ops.linear(x, weight)

    def see(self, x: Tensor, weight: LinearWeight) -> None:
        """Count x [T, K] among the inputs of a weight."""
        largest = x.abs().amax(0).to(torch.float32)
        before = self._inputs.get(id(weight))
        self._inputs[id(weight)] = largest if before is None else torch.maximum(before, largest)

    def factors(self, weight: LinearWeight, strength: float) -> Tensor:
        """s of a weight [N, K], rounded: float32 [K] on the host. 1 where inputs or weights are 0 or not finite."""
        inputs, columns = self._inputs[id(weight)].cpu(), self._weights[id(weight)].cpu()
        exponents = strength * inputs.log2() - (1 - strength) * columns.log2()
        exponents = torch.where(exponents.isfinite(), exponents, 0.0).round()
        return torch.exp2(exponents.clamp(-_MAX_EXPONENT, _MAX_EXPONENT))
