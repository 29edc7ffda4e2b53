"""The weights of a mixture of experts: one packed weight [E * N, K], as csrc/experts.h reads it."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cpu.linear import CpuLinear


@dataclass(frozen=True, slots=True)
class CpuExperts:
    """Experts one after the other along the output features. N is a multiple of 16: each begins with a panel."""

    num_experts: int
    stacked: CpuLinear

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
