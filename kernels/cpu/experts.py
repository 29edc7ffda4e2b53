"""The weights of a mixture of experts: one packed weight [E * N, K], as csrc/experts.h reads it."""

from __future__ import annotations

from kernels.cpu.linear import CpuLinear
from kernels.experts import StackedExperts


class CpuExperts(StackedExperts[CpuLinear]):
    """N is a multiple of 16: each expert begins with a panel."""
