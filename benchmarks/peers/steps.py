"""The time of a full training step on tokens that are already on the device: every library in its own mixed precision.

Legend: N tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Task

N_RESIDENT = 4
"""Batches of synthetic tokens that the steps take in turn."""


class StepTime(NamedTuple):
    """The median time of a step after warm-up. `plain`: Adam, and no help for dead features."""

    library: str
    k: int
    plain: bool
    milliseconds: float


class StepClock:
    """Marks the end of each step: as CUDA events, which wait for nothing, or on the host where the device is a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def __call__(self, done: int) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The time between one mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [one.elapsed_time(two) if self.cuda else 1e3 * (two - one) for one, two in pairs]  # type: ignore


def time_steps(kinds: Sequence[type[Library]], task: Task, warmup: int) -> list[StepTime]:
    """The step of each library, one after the other, on the same tokens; the first `warmup` steps do not count."""
    generator = torch.Generator(task.device).manual_seed(0)
    tokens = torch.randn(N_RESIDENT * task.batch_size, task.d_in, generator=generator, device=task.device)
    return [time_step(kind, task, tokens, warmup) for kind in kinds]


def time_step(kind: type[Library], task: Task, tokens: Float[Tensor, "N D"], warmup: int) -> StepTime:
    clock = StepClock(task.device)
    library = kind(replace(task, rate=kind.default_rate(task.n_features)))
    library.train(Batches(tokens, task.batch_size, task.n_steps, 0, clock))
    times = clock.milliseconds()[warmup:]
    del library
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    return StepTime(kind.name, task.k, task.plain, median(times))


def step_table(times: Sequence[StepTime], ours: str, absolute: bool) -> str:
    """A Markdown table: milliseconds where they mean something, and each library's time over ours."""
    lines = ["| library | k | recipe | ms a step | over ours |", "| --- | --- | --- | --- | --- |"]
    for one in times:
        mine = [other.milliseconds for other in times if other[:3] == (ours, one.k, one.plain)]
        ratio = f"{one.milliseconds / mine[0]:.2f}" if mine else "–"
        recipe = "plain" if one.plain else "own"
        shown = f"{one.milliseconds:.2f}" if absolute else "–"
        lines.append(f"| {one.library} | {one.k} | {recipe} | {shown} | {ratio} |")
    return "\n".join(lines)
