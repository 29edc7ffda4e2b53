"""Norms and activations whose result for a row does not depend on the other rows.

Addition, multiplication, division and square root are rounded exactly, so torch may run them in any order and in any
number of pieces. exp and tanh are not: the vector loops of torch's activations call one library and the scalar tail of
each thread's piece another, and where the pieces end depends on the size of the whole tensor and on the number of
threads (F.silu does change its bits with the number of rows). So exp and tanh come from NumPy, whose loops treat every
element alike (SIMD with masked tails, or scalar throughout) and which is twice as fast on one thread: 15 against 27 us
for 16 x 2048. tests/kernels shows it at several thread counts.

Sums over a row are torch's: a reduction over the last axis is not split within a row (TensorIterator divides the
outputs among threads); the one exception, a single row of 32,768 elements or more, is refused.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.portable.workspace import Workspace

# at::internal::GRAIN_SIZE: from so many elements on, a reduction to one output may be split among threads.
MAX_REDUCTION = 32768


def exp_(x: Tensor) -> Tensor:
    """exp in place, on a contiguous float32 tensor. Overflow gives inf, as in torch."""
    array = x.numpy()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.exp(array, out=array)
    return x


def tanh_(x: Tensor) -> Tensor:
    """tanh in place, on a contiguous float32 tensor."""
    array = x.numpy()
    with np.errstate(under="ignore", invalid="ignore"):
        np.tanh(array, out=array)
    return x


def normalize(x: Tensor, eps: float, workspace: Workspace) -> Tensor:
    """x [..., H] of any dtype -> x / sqrt(mean(x^2) + eps), float32, in a buffer named "normalized".

    Copies convert; everything else is float32 with float32, which is about twice as fast as mixed operands. The
    statistic has one element a row, for which NumPy's calls are the cheaper ones.
    """
    shape = tuple(x.shape)
    if shape[-1] >= MAX_REDUCTION:
        raise ValueError(f"x has rows of {shape[-1]} elements; below {MAX_REDUCTION} are supported")
    normalized = workspace.take("normalized", shape, torch.float32).copy_(x)
    squares = torch.mul(normalized, normalized, out=workspace.take("squares", shape, torch.float32))
    statistic = workspace.take("statistic", (*shape[:-1], 1), torch.float32)
    torch.sum(squares, -1, keepdim=True, out=statistic)
    array = statistic.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        np.divide(array, np.float32(shape[-1]), out=array)
        np.add(array, np.float32(eps), out=array)
        np.sqrt(array, out=array)
    return normalized.div_(statistic)


def layer_normalize(x: Tensor, eps: float, workspace: Workspace) -> Tensor:
    """x [..., H] of any dtype -> (x - mean(x)) / sqrt(variance(x) + eps), float32, in a buffer named "normalized"."""
    if x.shape[-1] >= MAX_REDUCTION:
        raise ValueError(f"x has rows of {x.shape[-1]} elements; below {MAX_REDUCTION} are supported")
    centred = workspace.take("centred", tuple(x.shape), torch.float32).copy_(x)
    mean = torch.sum(centred, -1, keepdim=True).div_(x.shape[-1])
    return normalize(centred.sub_(mean), eps, workspace)


def silu_mul(gate_up: Tensor, workspace: Workspace) -> Tensor:
    """gate_up [T, 2*I] -> gate / (1 + exp(-gate)) * up, [T, I], float32 until the last rounding."""
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    result = workspace.take("gate", shape, torch.float32).copy_(gate_up[:, : shape[1]])
    denominator = torch.neg(result, out=workspace.take("gate term", shape, torch.float32))
    exp_(denominator).add_(1.0)
    result.div_(denominator)
    result.mul_(denominator.copy_(gate_up[:, shape[1] :]))
    return result.to(gate_up.dtype, copy=True)


def gelu_mul(gate_up: Tensor, workspace: Workspace) -> Tensor:
    """gate_up [T, 2*I] -> gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) * up, [T, I], in float32."""
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    result = workspace.take("gate", shape, torch.float32).copy_(gate_up[:, : shape[1]])
    term = torch.mul(result, result, out=workspace.take("gate term", shape, torch.float32))
    term.mul_(0.044715).add_(1.0).mul_(result).mul_(math.sqrt(2.0 / math.pi))
    tanh_(term).add_(1.0).mul_(0.5)
    result.mul_(term)
    result.mul_(term.copy_(gate_up[:, shape[1] :]))
    return result.to(gate_up.dtype, copy=True)


# erf(z) = 1 - (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), for z >= 0, within 1.5e-7: Abramowitz and Stegun,
# Handbook of Mathematical Functions, 7.1.26.
_ERF_P = 0.3275911
_ERF_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def gelu(x: Tensor, tanh: bool, workspace: Workspace) -> Tensor:
    """x [T, I] -> gelu(x), [T, I], float32 until the last rounding; the exact form within 2e-7 * |x|."""
    shape = tuple(x.shape)
    result = workspace.take("gate", shape, torch.float32).copy_(x)
    if tanh:
        term = torch.mul(result, result, out=workspace.take("gate term", shape, torch.float32))
        term.mul_(0.044715).add_(1.0).mul_(result).mul_(math.sqrt(2.0 / math.pi))
        tanh_(term).add_(1.0).mul_(0.5)
        return result.mul_(term).to(x.dtype, copy=True)
    # x times the normal distribution: max(x, 0) - |x| * tail, where tail = (1 - erf(|x| / sqrt(2))) / 2.
    magnitude = torch.abs(result, out=workspace.take("magnitude", shape, torch.float32))
    z = torch.mul(magnitude, math.sqrt(0.5), out=workspace.take("gate term", shape, torch.float32))
    t = torch.mul(z, _ERF_P, out=workspace.take("erf term", shape, torch.float32)).add_(1.0).reciprocal_()
    tail = workspace.take("erf tail", shape, torch.float32).fill_(_ERF_A[-1])
    for a in reversed(_ERF_A[:-1]):
        tail.mul_(t).add_(a)
    tail.mul_(t).mul_(exp_(z.mul_(z).neg_())).mul_(0.5).mul_(magnitude)
    return result.clamp_(min=0.0).sub_(tail).to(x.dtype, copy=True)


def softcap(x: Tensor, cap: float, workspace: Workspace) -> Tensor:
    """x [R, V] -> cap * tanh(x / cap), float32 until the last rounding."""
    result = workspace.take("softcap", tuple(x.shape), torch.float32).copy_(x)
    return tanh_(result.div_(cap)).mul_(cap).to(x.dtype, copy=True)
