"""Edits of what a model represents while it generates, and what they change."""

from fluxsae.steering.effects import SteeringEffects
from fluxsae.steering.grids import SteeringGrids
from fluxsae.steering.intervention import Schedule, intervene, random_twin
from fluxsae.steering.module import FluxSteering

__all__ = ["FluxSteering", "Schedule", "SteeringEffects", "SteeringGrids", "intervene", "random_twin"]
