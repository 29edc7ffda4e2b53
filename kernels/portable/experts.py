"""A mixture of experts: which experts a token goes through, and the sum of what they make. Rows do not meet."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts import SeparateExperts
from kernels.portable.elementwise import exp_
from kernels.portable.linear import PortableLinear


class PortableExperts(SeparateExperts[PortableLinear]):
    """One `PortableLinear` an expert."""


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E] -> the experts of each token int64 [T, top_k], the largest logit first and the lower index
    on a tie, and their weights float32 [T, top_k]. A row with a NaN has weights that are NaN."""
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)  # NaN first
    powers = exp_((ordered - ordered[:, :1]).contiguous())
    # One addition after the other, so that the order of the sum does not depend on the shape.
    total = torch.zeros(len(logits))
    for column in range(top_k if normalize else logits.shape[1]):
        total += powers[:, column]
    return indices[:, :top_k], powers[:, :top_k] / total[:, None]


def combine(made: Tensor, weights: Tensor) -> Tensor:
    """made float32 [T, k, H], weights [T, k] -> the weighted sum [T, H], from the first expert to the last."""
    total = torch.zeros(made.shape[0], made.shape[2])
    for rank in range(made.shape[1]):
        total += made[:, rank] * weights[:, rank, None]
    return total
