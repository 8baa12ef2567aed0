"""The hot operations of the autoencoders, and the one place that chooses who computes them."""

from fluxsae.sae.kernels.reference import decode, largest

__all__ = ["decode", "largest"]
