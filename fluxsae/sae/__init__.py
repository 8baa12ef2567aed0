"""The sparse autoencoders as plain modules, and their files."""

from fluxsae.sae.batch_topk import BatchTopK
from fluxsae.sae.checkpoint import load_sae, save_sae
from fluxsae.sae.coder import L1, SAE, TopK
from fluxsae.sae.jumprelu import JumpReLU

__all__ = ["L1", "SAE", "BatchTopK", "JumpReLU", "TopK", "load_sae", "save_sae"]
