"""A mixture of experts: which experts a token goes through, and the sum of what they make. Rows do not meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.portable.elementwise import exp_
from kernels.portable.linear import PortableLinear


@dataclass(frozen=True, slots=True)
class PortableExperts:
    """A weight [N, K] for each expert."""

    each: list[PortableLinear]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.each)

    @property
    def out_features(self) -> int:
        """N."""
        return self.each[0].out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self.each[0].in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(weight.nbytes for weight in self.each)


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
