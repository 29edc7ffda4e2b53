"""PortableOps: the operations of a decoder on torch's CPU kernels, in bf16 where the processor has it."""

from kernels.portable.ops import PortableOps

__all__ = ["PortableOps"]
