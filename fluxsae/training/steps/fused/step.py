"""Training steps by hand-made passes, recorded as CUDA graphs, and what keeps them from training.

Legend: N tokens, D width, M dead features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Adam

from fluxsae.runtime import Graphs, Processes
from fluxsae.sae import SAE, kinds_with
from fluxsae.training.steps.base import Fired, Measured, Outcome, RunFacts, StepAdam, TrainingStep
from fluxsae.training.steps.fused.settings import Settings

if find_spec("triton") is not None:
    from fluxsae.training.steps.fused.copies import Copies
    from fluxsae.training.steps.fused.passes import Batch, DensePasses, SparsePasses
    from fluxsae.training.steps.fused.updates import States, Updates

SPARSE_UP_TO = 128
"""The largest k for which gathering rows beats matrix products (measured on an H100 at D = 3072, F = 12288)."""

ALONE = Processes(0, 1, None)

_FITTED_EVERY = 64
"""Steps between looks at how large numbers are that are multiplied as fp8."""


def why_not_fused(sae: SAE, run: RunFacts) -> str | None:
    """What keeps a fused step from training this SAE, in words; None when nothing does."""
    checks = {
        "its features are in groups": len(sae.groups) == 1,
        f"it is a {type(sae).__name__} and only {' and '.join(kinds_with('fused_form'))} have one": sae.fused_form()
        is not None,
        "Triton is not installed": find_spec("triton") is not None,
        "there is no NVIDIA GPU": sae.W_enc.device.type == "cuda" and torch.version.hip is None,
        f"the precision is {run.precision} and not bf16-mixed": run.precision == "bf16-mixed",
        f"there are {run.n_processes} processes whose gradients do not travel as bf16": run.n_processes == 1
        or run.bf16_gradients,
        f"{run.n_processes} processes cannot share {sae.n_features} features evenly": not (
            sae.n_features % run.n_processes
        ),
        "gradients are accumulated over batches": run.n_accumulated == 1,
        "the Trainer clips gradients": not run.clips_gradients,
        # DistributedDataParallel either averages all gradients of a module or none.
        "it is one of a sweep's, in several processes": not (run.in_sweep and run.n_processes > 1),
    }
    return next((obstacle for obstacle, passed in checks.items() if not passed), None)


class FusedStep(TrainingStep):
    """Training steps of one SAE: `forward`, then `update`, for each batch.

    Between steps the decoder's rows may be off unit length by what one step of Adam changes; `synchronize_weights`
    makes them exact. With several `processes` a step is by the average of what their own tokens say, and all of them
    must synchronize together. With `fp8_encoder` pre-activations are products of fp8 numbers, and gradients pass
    straight through the rounding to these.
    """

    gradients_by_autograd = False

    def __init__(self, sae: SAE, settings: Settings, processes: Processes = ALONE) -> None:
        form = sae.fused_form()
        if form is None:
            raise TypeError(f"this {type(sae).__name__} of {len(sae.groups)} group(s) has no form for a fused step.")
        self.sae = sae
        self.settings = settings
        self.processes = processes
        self.copies = Copies(sae, settings)
        self.form = form
        self.sparse = form.k is not None and form.k <= SPARSE_UP_TO
        passes = SparsePasses if self.sparse else DensePasses
        self.passes = passes(sae, form, settings, processes, self.copies)
        self.updates = Updates(sae, settings, processes, self.copies)
        self.seen: Fired  # by the last update
        self._until_fitted = 0
        self._coming: list[Any] = []  # decoder rows that other processes stepped
        self._states: States | None = None
        self._graphs = Graphs(settings.graphs and sae.W_enc.device.type == "cuda" and processes.recordable)
        self._found: Any = None

    @torch.no_grad()
    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty_ramp: float = 1.0) -> Outcome:
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
        self._key = passes.begin(tokens, dead, self.form.penalty * penalty_ramp)
        encoded = self._run("encode", passes.encode)
        self._arrive()
        self._found = self._run("explain", partial(passes.explain, encoded), reads=encoded)
        return Outcome(self._found.outcome.loss, self._measure)

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        """Gradients are found where they are used."""

    def finish_gradients(self, optimizer: StepAdam) -> None:
        """They are finished where they are used."""

    @torch.no_grad()
    def update(self, optimizer: Adam) -> None:
        """Adam's step on the SAE's weights, moments in `optimizer`'s state; nothing where the loss was not finite."""
        states = self._states = States.of(optimizer, self.sae)
        self.updates.lr.fill_(optimizer.param_groups[0]["lr"])
        self.seen = self._run("update", partial(self.updates.make, self._found, states), reads=self._found)
        if self.processes.n > 1:  # they may still come while the next tokens are encoded
            rows = (self.copies.dec, self.copies.row_scale) if self.sparse else (self.copies.dec,)
            self._coming = [self.processes.all_gather_(some) for some in rows]

    def fired(self) -> Fired:
        return self.seen

    def updates_since_bad(self) -> int | None:
        made, bad = self.updates.count.tolist()
        return made - bad if bad >= 0 else None

    @torch.no_grad()
    def synchronize_weights(self) -> None:
        """Bring the decoder's rows to unit length, and round the copies anew; all processes get all rows."""
        self._arrive()
        if self._states is not None:
            self._spread(self.sae.W_enc, self.sae.W_dec, *self._states.W_enc, *self._states.W_dec)
        self.copies.renew()
        self._until_fitted = 0

    def _measure(self) -> Measured:
        """The last forward pass, against the batch's own channel means; the next one writes to the same places."""
        found: Batch = self._found.outcome
        fve = 1 - found.mse / self.passes.x.float().var(dim=0, correction=0).mean()
        return Measured(found.mse, fve, found.l0)

    def _run(self, name: str, function: Callable[[], Any], reads: Any = None) -> Any:
        """By a graph of its own for every number of tokens, and of places for dead features."""
        return self._graphs.run((name, *self._key), function, reads)

    def _spread(self, *shared: Tensor) -> None:
        """Give each process's features to all."""
        if self.processes.n > 1:
            for work in [self.processes.all_gather_(rows.detach()) for rows in shared]:
                work.wait()

    def _arrive(self) -> None:
        """What the device does from here on it does with the decoder rows that other processes stepped."""
        while self._coming:
            self._coming.pop().wait()
