"""Captured tokens for training, validation and scoring."""

from fluxsae.data.activations import ActivationData, TokenBatch
from fluxsae.data.split import split_by_prompt
from fluxsae.data.throughput import Throughput

__all__ = ["ActivationData", "Throughput", "TokenBatch", "split_by_prompt"]
