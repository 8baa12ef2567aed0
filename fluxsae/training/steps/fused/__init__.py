"""A training step as a few hand-made passes: no autograd, no gradients in memory, no host waits.

It trains SAEs whose kind has a `fused_form`, and minimises what `AutogradStep` minimises. `passes` finds the loss,
`updates` makes Adam's step, both read the weights in few bits from `copies`, and `step` records them as CUDA graphs.
"""

from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import FusedStep, why_not_fused

__all__ = ["FusedStep", "Settings", "why_not_fused"]
