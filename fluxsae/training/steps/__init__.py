"""Training steps: by autograd, or by hand-made kernels, behind one interface.

The package `fused` may be deleted; then every step is autograd's.
"""

from fluxsae.training.steps.base import Measured, Objective, Outcome, RunFacts, StepAdam, TrainingStep
from fluxsae.training.steps.choice import choose_step

__all__ = ["Measured", "Objective", "Outcome", "RunFacts", "StepAdam", "TrainingStep", "choose_step"]
