"""The backend for NVIDIA GPUs: the operations of kernels.ops in Triton."""
