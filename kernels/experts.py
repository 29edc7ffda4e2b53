"""The weights of a mixture of experts, as backends hold them: one weight for all experts, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kernels.ops import LinearWeight

AnyWeight = TypeVar("AnyWeight", bound=LinearWeight)


@dataclass(frozen=True)
class StackedExperts(Generic[AnyWeight]):
    """Experts one after the other along the output features of one weight [E * N, K]."""

    num_experts: int
    stacked: AnyWeight

    @property
    def out_features(self) -> int:
        """N, of one expert."""
        return self.stacked.out_features // self.num_experts

    @property
    def in_features(self) -> int:
        """K."""
        return self.stacked.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.stacked.nbytes


@dataclass(frozen=True)
class SeparateExperts(Generic[AnyWeight]):
    """A weight [N, K] for each expert."""

    each: Sequence[AnyWeight]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.each)

    @property
    def out_features(self) -> int:
        """N, of one expert."""
        return self.each[0].out_features

    @property
    def in_features(self) -> int:
        """K."""
        return self.each[0].in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(weight.nbytes for weight in self.each)
