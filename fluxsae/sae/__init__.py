"""The sparse autoencoders as plain modules, and their files."""

from fluxsae.sae.checkpoint import load_sae, save_sae
from fluxsae.sae.coder import L1, SAE, TopK

__all__ = ["L1", "SAE", "TopK", "load_sae", "save_sae"]
