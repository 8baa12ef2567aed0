"""Kernels of the fused step alone (Triton)."""
