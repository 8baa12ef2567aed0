"""Trains sparse autoencoders."""

from fluxsae.training.module import SAETraining
from fluxsae.training.sweep import SweepTraining

__all__ = ["SAETraining", "SweepTraining"]
