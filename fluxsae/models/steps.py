"""Which denoising step a pipeline is at: the clock that `record` and `intervene` share.

Legend: B batch, T tokens an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import nn


class StepCounter:
    """Knows, inside every forward pass of `pipe.transformer`, which step it belongs to.

    `step` is the 0-based index in the schedule, `n_steps` the schedule's length, `n_text` the number of text tokens of
    this forward pass. `conditional` tells the two passes of a step with true classifier-free guidance apart: the first,
    on the prompt, is the conditional one, and without such guidance every pass is.
    """

    def __init__(self, scheduler: Any, on_start: Callable[[int], None] | None = None) -> None:
        self.step = -1
        self.n_steps = 0
        self.n_text = 0
        self.conditional = True
        self._scheduler = scheduler
        self._on_start = on_start
        self._schedule: torch.Tensor | None = None

    def before_pass(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward-pre-hook. No value is read from the device."""
        schedule = self._scheduler.timesteps
        # Each call of a pipeline sets its timesteps anew, so another tensor means another call,
        # even when the last call was interrupted or raised at its first step.
        if schedule is not self._schedule:
            self._schedule, self.step, self.n_steps = schedule, -1, len(schedule)
            if self._on_start is not None:
                self._on_start(self.n_steps)
        # A scheduler's step_index is None until it has made its first step.
        index = self._scheduler.step_index
        step = int(index if index is not None else self._scheduler.begin_index or 0)
        self.conditional = step != self.step
        self.step = step
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        self.n_text = text.shape[1]


@contextmanager
def count_steps(pipe: FluxPipeline, on_start: Callable[[int], None] | None = None) -> Iterator[StepCounter]:
    """A `StepCounter` that follows every call of `pipe` inside the context; `on_start` is told the length of its
    schedule as each call begins."""
    counter = StepCounter(pipe.scheduler, on_start)
    handle = pipe.transformer.register_forward_pre_hook(counter.before_pass, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()
