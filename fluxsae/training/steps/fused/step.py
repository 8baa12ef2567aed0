"""Training steps by hand-made passes, recorded as CUDA graphs, and what decides whether they train.

Legend: N tokens, D width, M dead features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Adam

from fluxsae.runtime import Graphs, OneAllReduce, Processes
from fluxsae.sae.base import SAE
from fluxsae.sae.kinds.l1 import L1
from fluxsae.sae.kinds.topk import TopK
from fluxsae.training.steps.fused.settings import Settings

if find_spec("triton") is not None:
    from fluxsae.training.steps.fused.copies import Copies
    from fluxsae.training.steps.fused.passes import DensePasses, Outcome, SparsePasses
    from fluxsae.training.steps.fused.updates import Seen, States, Updates

SPARSE_UP_TO = 128
"""The largest k for which gathering rows beats matrix products (measured on an H100 at D = 3072, F = 12288)."""

ALONE = Processes(0, 1, None)

CHECKED = 1024
"""Tokens on which a fused step is compared with autograd's before it trains."""

_FITTED_EVERY = 64
"""Steps between looks at how large numbers are that are multiplied as fp8."""


class StepAdam(Adam):
    """torch's Adam, whose step a fused step may make; the state is the same."""

    fused_step: FusedStep | None = None

    def step(self, closure: Any = None) -> Any:
        if self.fused_step is None:
            return super().step(closure)
        loss = closure() if closure is not None else None
        if self.fused_step is None:  # the closure found it wrong, and left gradients
            super().step()
        else:
            self.fused_step.update(self, self.param_groups[0]["lr"])
        return loss


def why_not_fused(sae: SAE, trainer: Trainer) -> str | None:
    """What keeps a fused step from training this SAE, in words; None when nothing does."""
    checks = {
        f"it is a {type(sae).__name__} and only L1 and TopK have one": type(sae) in (L1, TopK),
        "its features are in groups": len(sae.groups) == 1,
        "Triton is not installed": find_spec("triton") is not None,
        "there is no NVIDIA GPU": sae.W_enc.device.type == "cuda" and torch.version.hip is None,
        f"the precision is {trainer.precision} and not bf16-mixed": trainer.precision == "bf16-mixed",
        f"there are {trainer.world_size} processes whose gradients do not travel as bf16": trainer.world_size == 1
        or (isinstance(trainer.strategy, OneAllReduce) and trainer.strategy.compress),
        f"{trainer.world_size} processes cannot share {sae.n_features} features evenly": not (
            sae.n_features % trainer.world_size
        ),
        "gradients are accumulated over batches": trainer.accumulate_grad_batches == 1,
        "the Trainer clips gradients": not trainer.gradient_clip_val,
    }
    return next((obstacle for obstacle, passed in checks.items() if not passed), None)


class FusedStep:
    """Training steps of one SAE: `forward`, then `update`, for each batch.

    Between steps the decoder's rows may be off unit length by what one step of Adam changes; `settle` makes them exact,
    and must be called before anyone else reads or writes the weights, or reads Adam's moments. With several `processes`
    a step is by the average of what their own tokens say, and all of them must `settle` together. With `fp8_encoder`
    pre-activations are products of fp8 numbers, and gradients pass straight through the rounding to these.
    """

    def __init__(self, sae: SAE, settings: Settings, processes: Processes = ALONE) -> None:
        if type(sae) not in (L1, TopK) or len(sae.groups) > 1:
            raise TypeError(f"a fused step knows L1 and TopK without groups, not this {type(sae).__name__}.")
        self.sae = sae
        self.settings = settings
        self.processes = processes
        self.copies = Copies(sae, settings)
        self.sparse = isinstance(sae, TopK) and sae.k <= SPARSE_UP_TO
        kind = SparsePasses if self.sparse else DensePasses
        self.passes = kind(sae, settings, processes, self.copies)
        self.updates = Updates(sae, settings, processes, self.copies)
        self.seen: Seen  # by the last update
        self._until_fitted = 0
        self._coming: list[Any] = []  # decoder rows that other processes stepped
        self._states: States | None = None
        self._graphs = Graphs(settings.graphs and sae.W_enc.device.type == "cuda" and processes.recordable)
        self._found: Any = None

    @torch.no_grad()
    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty: float = 0.0) -> Outcome:
        """Loss and what the update needs, for raw tokens. `penalty` is the weight of the codes' sum (L1)."""
        passes = self.passes
        if passes.make_room(len(tokens)):
            self._graphs.clear()
            self._until_fitted = 0
        if self.settings.fp8_encoder:
            if self._until_fitted == 0:
                self._spread(self.sae.W_enc)
                passes.fit_fp8(tokens)
                self._until_fitted = _FITTED_EVERY
            self._until_fitted -= 1
        self._key = passes.begin(tokens, dead, penalty)
        encoded = self._run("encode", passes.encode)
        self._arrive()
        self._found = self._run("explain", partial(passes.explain, encoded), reads=encoded)
        return self.outcome

    @property
    def outcome(self) -> Outcome:
        """What the last forward pass found; the next one writes to the same place."""
        outcome: Outcome = self._found.outcome
        return outcome

    def variance_explained(self) -> Float[Tensor, ""]:
        """The FVE of the last batch, against the batch's own channel means."""
        return 1 - self.outcome.mse / self.passes.x.float().var(dim=0, correction=0).mean()

    @torch.no_grad()
    def update(self, optimizer: Adam, lr: float) -> None:
        """Adam's step on the SAE's weights, moments in `optimizer`'s state; nothing where the loss was not finite."""
        states = self._states = States.of(optimizer, self.sae)
        self.updates.lr.fill_(lr)
        self.seen = self._run("update", partial(self.updates.make, self._found, states), reads=self._found)
        if self.processes.n > 1:  # they may still come while the next tokens are encoded
            rows = (self.copies.dec, self.copies.row_scale) if self.sparse else (self.copies.dec,)
            self._coming = [self.processes.spread(some) for some in rows]

    def steps_since_bad(self) -> int | None:
        """How many updates ago a loss was not finite for the first time. Waits for the device."""
        made, bad = self.updates.count.tolist()
        return made - bad if bad >= 0 else None

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the decoder's rows to unit length, and round the copies anew; all processes get all rows."""
        self._arrive()
        if self._states is not None:
            self._spread(self.sae.W_enc, self.sae.W_dec, *self._states.W_enc, *self._states.W_dec)
        self.copies.renew()
        self._until_fitted = 0

    def _run(self, name: str, function: Callable[[], Any], reads: Any = None) -> Any:
        """By a graph of its own for every number of tokens, and of places for dead features."""
        return self._graphs.run((name, *self._key), function, reads)

    def _spread(self, *shared: Tensor) -> None:
        """Give each process's features to all."""
        if self.processes.n > 1:
            for work in [self.processes.spread(rows.detach()) for rows in shared]:
                work.wait()

    def _arrive(self) -> None:
        """What the device does from here on it does with the decoder rows that other processes stepped."""
        while self._coming:
            self._coming.pop().wait()


def disagreement(
    step: FusedStep, optimizer: Adam, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty: float, loss: Tensor
) -> str | None:
    """In words, what tells a fused step on `tokens` grossly from autograd's, whose `loss` of them it is; else None.

    Kernels are compiled for the GPU at hand, and few of all GPUs have run them. Which of two equal pre-activations is
    kept differs, and with it up to a fifth of the gradients; wrong addresses or signs make more. Weights stay as they
    are, and the optimizer's state as if it had made no step; so it must have made none.
    """
    sae = step.sae
    with torch.enable_grad():
        loss.backward()
    for parameter in sae.parameters():
        if parameter.grad is not None and step.processes.n > 1:
            parameter.grad = step.processes.total(parameter.grad) / step.processes.n
    sae.remove_parallel_gradient()
    outcome = step.forward(tokens, dead, penalty)
    step.update(optimizer, 0.0)
    step.settle()
    checks = {"loss": (outcome.loss, loss.detach(), 0.03)}
    for name, parameter in sae.named_parameters():
        state = optimizer.state[parameter]
        if parameter.shape[0] == sae.n_features and parameter.grad is not None:
            gradient = state["exp_avg"] / (1 - step.settings.betas[0])
            checks[f"gradient of {name}"] = (gradient, parameter.grad, 0.5)
        for value in state.values():
            value.zero_()
        parameter.grad = None
    for name, (found, expected, tolerance) in checks.items():
        off = float((found - expected).norm() / expected.norm())
        if not off <= tolerance:
            return f"the {name} is {off:.0%} off autograd's on this GPU"
    return None
