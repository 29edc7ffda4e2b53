"""CpuOps: the operations of a decoder on torch's CPU kernels, in bf16 where the processor has it."""

from kernels.cpu.ops import CpuOps

__all__ = ["CpuOps"]
