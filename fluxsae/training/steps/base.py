"""What a training step is, whoever makes it, and the optimizer that leaves its steps to it.

Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Adam


@dataclass(frozen=True)
class Objective:
    """What training changes about an SAE's own loss.

    Each token's error norm is clipped to `clip_tokens` times the batch mean; 0 switches that off. The `aux_k` strongest
    dead features of a token learn to explain the residual, and `aux_coef` times the squared error of that is added.
    """

    clip_tokens: float = 10.0
    aux_k: int = 0
    aux_coef: float = 0.0


class RunFacts(NamedTuple):
    """What a step needs to know of the run.

    Its precision, how many processes take part, whether their gradients travel as bf16, over how many batches gradients
    are accumulated, whether the Trainer clips them, and whether the SAE is one of several in a sweep.
    """

    precision: str
    n_processes: int = 1
    bf16_gradients: bool = False
    n_accumulated: int = 1
    clips_gradients: bool = False
    in_sweep: bool = False


class Measured(NamedTuple):
    """Metrics of a training batch: squared error of a channel, fraction of variance explained, codes above 0."""

    mse: Float[Tensor, ""]
    fve: Tensor
    l0: Float[Tensor, ""]


class Outcome(NamedTuple):
    """The loss of a batch, a channel, and what else can be told of it until the next batch comes."""

    loss: Float[Tensor, ""]
    measure: Callable[[], Measured]


class Fired(NamedTuple):
    """On how many tokens of all processes each feature fired in a step, and how many tokens there were.

    Where only whether it fired is known, the numbers are 0 and above.
    """

    fired: Tensor
    n_tokens: Tensor | int


class TrainingStep(ABC):
    """Training steps of one SAE: `forward`, `backward`, `finish_gradients`, `update`, for each batch.

    Between steps, weights may be in a form that only the next step understands. So call `synchronize_weights` before
    you read or write weights or read Adam's moments, in all processes that train the SAE together.
    """

    gradients_by_autograd: bool
    """Whether gradients reach the parameters' `grad`, so that several processes have to average them there."""

    @abstractmethod
    def forward(self, tokens: Float[Tensor, "N D"], dead: Int[Tensor, "M"], penalty_ramp: float) -> Outcome:
        """Loss of raw tokens; the SAE's own penalty counts `penalty_ramp` times."""

    @abstractmethod
    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        """Gradients of a loss that `forward` found."""

    @abstractmethod
    def finish_gradients(self, optimizer: StepAdam) -> None:
        """What is done to gradients before anyone clips them, and before `update`."""

    @abstractmethod
    def update(self, optimizer: StepAdam) -> None:
        """Adam's step. Nothing where the loss or its gradient was not finite; no host is asked."""

    @abstractmethod
    def fired(self) -> Fired:
        """What fired in the batches since this was asked last, in all processes."""

    @abstractmethod
    def updates_since_bad(self) -> int | None:
        """How many updates ago a loss or gradient was not finite for the first time. Waits for the device."""

    @abstractmethod
    def synchronize_weights(self) -> None:
        """Bring weights up to date for other readers, and take over what others wrote. Call it in all processes."""


class StepAdam(Adam):
    """torch's Adam, whose step is made by a `TrainingStep`. Its state is the same for every kind of step."""

    made_by: TrainingStep | None = None

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        if self.made_by is None:  # before training: torch steps once, by nothing, to have a state to load into
            self.step_by_gradients()
        else:
            self.made_by.update(self)  # asked only now: while the closure ran, a step may have been found wrong
        return loss

    @torch.no_grad()
    def step_by_gradients(self) -> None:
        """torch's own step, by the parameters' gradients."""
        super().step()
