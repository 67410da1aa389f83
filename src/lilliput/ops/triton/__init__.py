"""Kernels for CUDA, twins of compiled ones: the same ops, the same signatures, checked by the same vectors in Triton's interpreter."""
