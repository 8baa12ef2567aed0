"""What a trained SAE is worth, by one formula for every library, and how that grew with seconds of training.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Task
from fluxsae.sae.evaluation import channel_sums, variance_explained


class Quality(NamedTuple):
    """`fve`: 1 - Σ_d SSE_d / Σ_d SST_d. `l0`: codes other than 0 a token. `dead`: share of features 0 on all tokens."""

    fve: float
    l0: float
    dead: float


class Point(NamedTuple):
    """Seconds of training, the clock stopped during evaluations, and the FVE on validation tokens after them."""

    step: int
    seconds: float
    fve: float


class Run(NamedTuple):
    """One training: its rate and seed, what came out on both held-out sides, and the way there."""

    library: str
    rate: float
    seed: int
    validation: Quality
    test: Quality
    seconds: float
    curve: list[Point]


@torch.no_grad()
def evaluate(library: Library, tokens: Float[Tensor, "N D"], chunk: int = 8192) -> Quality:
    """The quality on `tokens`, in float32."""
    channels = torch.zeros(3, tokens.shape[1], dtype=torch.float64, device=tokens.device)
    fired = torch.zeros((), dtype=torch.float64, device=tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        for x in tokens.split(chunk):
            codes, recon = library.reconstruct(x)
            channels += channel_sums(x, recon.float())
            fired = fired + (codes != 0).sum(dim=0)
    return Quality(
        fve=float(variance_explained(channels, len(tokens))),
        l0=float(fired.sum() / len(tokens)),
        dead=float((fired == 0).double().mean()),
    )


class Clock:
    """Seconds that training takes on the device, without what happens between `stop` and `go`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._since = 0.0

    def go(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Watch:
    """Counts steps for the clock, and evaluates every `every` of them with the clock stopped; never when 0."""

    def __init__(self, library: Library, tokens: Float[Tensor, "N D"], every: int) -> None:
        self.library = library
        self.tokens = tokens
        self.every = every
        self.clock = Clock(tokens.device)
        self.curve: list[Point] = []

    def __call__(self, done: int) -> None:
        if self.every and done % self.every == 0:
            self.clock.stop()
            self.curve.append(Point(done, self.clock.seconds, evaluate(self.library, self.tokens).fve))
            self.clock.go()


def train_and_measure(
    kind: type[Library], task: Task, train: Tensor, validation: Tensor, test: Tensor, every: int = 0
) -> Run:
    """Train a library on `train` in the order that the task's seed decides, and measure it."""
    library = kind(task)
    watch = Watch(library, validation, every)
    batches = Batches(train, task.batch_size, task.n_steps, task.seed, watch)
    watch.clock.go()
    library.train(batches)
    watch.clock.stop()
    at_end = evaluate(library, validation)
    last = Point(task.n_steps, watch.clock.seconds, at_end.fve)
    curve = [*(point for point in watch.curve if point.step < task.n_steps), last]
    return Run(kind.name, task.rate, task.seed, at_end, evaluate(library, test), watch.clock.seconds, curve)
