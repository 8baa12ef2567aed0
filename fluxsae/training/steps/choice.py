"""Who makes the training steps of an SAE: hand-made kernels where they can, else autograd."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fluxsae.runtime import Processes
from fluxsae.sae import SAE
from fluxsae.training.steps.autograd import AutogradStep
from fluxsae.training.steps.base import Objective, RunFacts, StepAdam, TrainingStep
from fluxsae.training.steps.checked import CheckedStep

_FUSED = "fluxsae.training.steps.fused"


def choose_step(
    sae: SAE,
    objective: Objective,
    optimizer: StepAdam,
    processes: Processes,
    run: RunFacts,
    fused: bool | None = None,
    fp8_encoder: bool = False,
) -> TrainingStep:
    """The step that trains `sae`, which is told to `optimizer`.

    ValueError where `fused` or `fp8_encoder` asks for a hand-made step and none can be made.
    """
    by_autograd = AutogradStep(sae, objective, processes)
    optimizer.made_by = by_autograd
    if fused is False:
        if fp8_encoder:
            raise ValueError("fp8_encoder is true, but fused is false; leave one of them out.")
        return by_autograd
    obstacle = why_not_fused(sae, run)
    if obstacle is not None:
        asked = [name for name, value in (("fused", fused), ("fp8_encoder", fp8_encoder)) if value]
        if asked:
            raise ValueError(f"{asked[0]} is true, but {obstacle}; leave {asked[0]} out, or change that.")
        return by_autograd
    betas = optimizer.param_groups[0]["betas"]
    fast: TrainingStep = _fused().FusedStep(sae, _fused().Settings.of(objective, betas, fp8_encoder), processes)
    optimizer.made_by = CheckedStep(fast, by_autograd, optimizer, insist=bool(fused))
    return optimizer.made_by


def why_not_fused(sae: SAE, run: RunFacts) -> str | None:
    """What keeps a hand-made step from training this SAE, in words; None when nothing does."""
    if find_spec(_FUSED) is None:
        return "hand-made steps are not installed"
    obstacle: str | None = _fused().why_not_fused(sae, run)
    return obstacle


def _fused() -> Any:
    """The hand-made step's package, by name: it is a part that may be missing."""
    return import_module(_FUSED)
