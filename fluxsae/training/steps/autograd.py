"""Training steps by autograd: the reference, for every kind, device and precision.

Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.runtime import Processes
from fluxsae.sae import (
    SAE,
    TrainOutput,
    aux_error,
    average_gradients,
    batch_variance_explained,
    squared_errors,
    token_weights,
    whole,
)
from fluxsae.training.steps.base import Fired, Measured, Objective, Outcome, StepAdam, TrainingStep


class AutogradStep(TrainingStep):
    """Loss and gradients by PyTorch, Adam's step by PyTorch's Adam; decoder rows have unit length after each step."""

    gradients_by_autograd = True

    def __init__(self, sae: SAE, objective: Objective, processes: Processes) -> None:
        self.sae = sae
        self.objective = objective
        self.processes = processes
        self._fired: Tensor | None = None
        self._n_tokens = 0
        self._n_updates = 0
        self._first_bad = torch.tensor(-1, device=sae.W_enc.device)

    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty_ramp: float) -> Outcome:
        x = self.sae.normalise(tokens)
        output = self.sae.training_forward(x)
        loss = self.loss(x, output, dead, penalty_ramp)
        self.sae.remember(output, average=lambda value: self.processes.all_reduce(value) / self.processes.n)
        fired = output.fired.int()
        self._fired = fired if self._fired is None else self._fired + fired
        self._n_tokens += len(x)
        return Outcome(loss, partial(_measure, x, output))

    def loss(self, x: Tensor, output: TrainOutput, dead: Tensor, penalty_ramp: float) -> Float[Tensor, ""]:
        """(‖x - recon‖² + penalty + aux_coef · aux error) / D, a mean over tokens; errors with `token_weights`."""
        objective, squared = self.objective, squared_errors(x, output)
        weights = token_weights(squared, objective.clip_tokens, self.processes.all_reduce)
        if output.auxiliary is not None:
            squared = squared + output.auxiliary
        loss = (weights * squared).mean() + penalty_ramp * output.penalty
        if objective.aux_k > 0 and len(dead):
            error = (x - output.recon).detach()
            loss = loss + objective.aux_coef * aux_error(self.sae, x, error, dead, objective.aux_k, weights)
        return loss / self.sae.d_in

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        loss.backward(*arguments, **named)

    def finish_gradients(self, optimizer: StepAdam) -> None:
        """If a gradient is not finite, Adam leaves weights and moments unchanged. The host is not asked."""
        average_gradients(self.sae)
        self.sae.remove_parallel_gradient()
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        bad = ~whole(torch.nn.utils.get_total_norm(gradients)).isfinite()
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
        is_first = bad & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, self._n_updates, self._first_bad)

    def update(self, optimizer: StepAdam) -> None:
        optimizer.step_by_gradients()
        self.sae.normalise_rows()
        self._n_updates += 1

    def fired(self) -> Fired:
        assert self._fired is not None
        fired, n_tokens = self._fired, self._n_tokens
        self._fired, self._n_tokens = None, 0
        if self.processes.n == 1:
            return Fired(fired, n_tokens)
        # Over all processes, as replicas with other numbers would take others for dead.
        total = self.processes.all_reduce(torch.cat([fired, torch.full_like(fired[:1], n_tokens)]))
        return Fired(total[:-1], total[-1])

    def updates_since_bad(self) -> int | None:
        bad = int(self._first_bad)
        return self._n_updates - bad if bad >= 0 else None

    def synchronize_weights(self) -> None:
        """Weights are always up to date."""


def _measure(x: Tensor, output: TrainOutput) -> Measured:
    mse = (x - output.recon.detach()).square().mean()
    return Measured(mse, batch_variance_explained(x, output).float(), output.l0)
