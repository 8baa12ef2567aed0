"""A training step of an L1 or TopK SAE as a few hand-made passes: no autograd, no gradients in memory, no host waits.

It minimises what `SAETraining` minimises. `passes` finds the loss, `updates` makes Adam's step, both read the weights
in few bits from `copies`, and `step` records them as CUDA graphs.
"""

from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import ALONE, CHECKED, FusedStep, StepAdam, disagreement, why_not_fused

__all__ = ["ALONE", "CHECKED", "FusedStep", "Settings", "StepAdam", "disagreement", "why_not_fused"]
