"""A step that has to agree with autograd's on its first tokens before it trains.

Kernels are compiled for the GPU at hand, and few of all GPUs have run them.
Legend: N tokens, D width, M dead features.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.training.steps.autograd import AutogradStep
from fluxsae.training.steps.base import Fired, Outcome, StepAdam, TrainingStep

CHECKED = 1024
"""Tokens on which a step is compared with autograd's before it trains."""

_logger = logging.getLogger(__name__)


class CheckedStep(TrainingStep):
    """Steps by `fast`, once its first one has agreed with `reference`; else, with a warning, by `reference`.

    With `insist`, a RuntimeError instead of the warning.
    """

    def __init__(self, fast: TrainingStep, reference: AutogradStep, optimizer: StepAdam, insist: bool = False) -> None:
        self._step = fast
        self._reference = reference
        self._optimizer = optimizer
        self._insist = insist
        self._checked = bool(optimizer.state)  # a resumed run was checked when it began
        self._sae = reference.sae

    @property
    def gradients_by_autograd(self) -> bool:  # type: ignore[override]
        return self._step.gradients_by_autograd

    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty_ramp: float) -> Outcome:
        if not self._checked:
            self.check_against_autograd(tokens[:CHECKED], penalty_ramp)
        return self._step.forward(tokens, dead, penalty_ramp)

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        self._step.backward(loss, *arguments, **named)

    def finish_gradients(self, optimizer: StepAdam) -> None:
        self._step.finish_gradients(optimizer)

    def update(self, optimizer: StepAdam) -> None:
        self._step.update(optimizer)

    def fired(self) -> Fired:
        return self._step.fired()

    def updates_since_bad(self) -> int | None:
        return self._step.updates_since_bad()

    def synchronize_weights(self) -> None:
        self._step.synchronize_weights()

    def check_against_autograd(self, tokens: Float[Tensor, "N D"], penalty_ramp: float) -> None:
        """Go on by autograd where the fast step disagrees with it. Nothing is decided by a loss that is not finite."""
        sae, processes = self._sae, self._reference.processes
        dead = torch.arange(0, sae.n_features, 16, device=tokens.device)  # as if these were
        x = sae.normalise(tokens)
        loss = self._reference.loss(x, sae.training_forward(x), dead, penalty_ramp)
        if not bool(processes.all_reduce(loss.detach()).isfinite()):
            return
        why = self._disagreement(tokens, dead, penalty_ramp, loss)
        self._checked = True
        if not bool(processes.anywhere(torch.tensor([why is not None], device=tokens.device))):
            return
        why = why or "another process found that it disagrees with autograd's"
        if self._insist:
            raise RuntimeError(f"fused is true, but {why}; leave fused out to train by autograd, and report this.")
        _logger.warning(f"training goes on by autograd, since {why}; please report this.")
        self._step.synchronize_weights()
        self._step = self._reference

    def _disagreement(self, tokens: Tensor, dead: Tensor, penalty_ramp: float, loss: Tensor) -> str | None:
        """In words, what tells the fast step on `tokens` grossly from autograd's, whose `loss` it is; else None.

        Which of two equal pre-activations is kept differs, and with it up to a fifth of the gradients; wrong addresses
        or signs make more. Weights stay as they are, and the optimizer's state as if it had made no step.
        """
        sae, optimizer, processes = self._sae, self._optimizer, self._reference.processes
        with torch.enable_grad():
            loss.backward()
        for parameter in sae.parameters():
            if parameter.grad is not None and processes.n > 1:
                parameter.grad = processes.all_reduce(parameter.grad) / processes.n
        sae.remove_parallel_gradient()
        group = optimizer.param_groups[0]
        lr, group["lr"] = group["lr"], 0.0
        outcome = self._step.forward(tokens, dead, penalty_ramp)
        self._step.update(optimizer)
        self._step.fired()
        self._step.synchronize_weights()
        group["lr"] = lr
        checks = {"loss": (outcome.loss, loss.detach(), 0.03)}
        for name, parameter in sae.named_parameters():
            state = optimizer.state[parameter]
            if parameter.shape[0] == sae.n_features and parameter.grad is not None:
                gradient = state["exp_avg"] / (1 - group["betas"][0])
                checks[f"gradient of {name}"] = (gradient, parameter.grad, 0.5)
            for value in state.values():
                value.zero_()
            parameter.grad = None
        for name, (found, expected, tolerance) in checks.items():
            off = float((found - expected).norm() / expected.norm())
            if not off <= tolerance:
                return f"the {name} is {off:.0%} off autograd's on this GPU"
        return None
