"""What the benchmark asks of a library: train a TopK SAE on batches, then say codes and reconstructions.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One training: sizes, length, learning rate and seed; the same for every library.

    Args:
        d_in: width of a token.
        n_features: number of features.
        k: features kept a token.
        batch_size: tokens a step.
        n_steps: training steps.
        rate: peak learning rate.
        seed: of the weights.
        device: where tokens and weights are.
        plain: Adam and no help for dead features, so that steps do the same work; else the library's own recipe.
        dead_after: tokens without firing after which a feature counts as dead; by default the library's own.
    """

    d_in: int
    n_features: int
    k: int
    batch_size: int
    n_steps: int
    rate: float
    seed: int
    device: torch.device
    plain: bool = False
    dead_after: int | None = None

    def share(self, fraction: float) -> int:
        """A fraction of the steps: libraries state warm-up and decay for long runs, and here they shrink with it."""
        return int(fraction * self.n_steps)


class Reconstruction(NamedTuple):
    """What an SAE makes of tokens: its codes, and the tokens again."""

    codes: Float[Tensor, "N F"]
    recon: Float[Tensor, "N D"]


class Batches:
    """Batches [N, D] of resident tokens in an order that `seed` decides, epoch after epoch.

    `after` hears how many steps are done when a library comes back for the next batch, which works for libraries that
    let nobody into their loop. Of the last step it hears only where a library comes back for more than its number.
    """

    def __init__(
        self, tokens: Float[Tensor, "N D"], size: int, n_steps: int, seed: int, after: Callable[[int], None]
    ) -> None:
        self.tokens = tokens
        self.size = size
        self.n_steps = n_steps
        self.seed = seed
        self.after = after

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Float[Tensor, "N D"]]:
        for done, rows in zip(range(self.n_steps), self._rows(), strict=False):
            yield self.tokens[rows]
            self.after(done + 1)

    def _rows(self) -> Iterator[Int[Tensor, "N"]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.tokens), generator=generator).to(self.tokens.device)
            yield from order[: len(order) // self.size * self.size].split(self.size)


class Library(ABC):
    """A library's TopK SAE and its way of training it, by its own public interface.

    Tokens come normalised: centred, and of mean square 1 a channel. Making one raises ImportError where the library is
    not installed.
    """

    name: ClassVar[str]
    distribution: ClassVar[str]
    """What pip calls it."""
    factors: ClassVar[tuple[float, ...]] = (2, 4, 8, 16, 32)
    """The rates of a sweep, in default rates; these are made for trainings far longer than a sweep's."""

    @staticmethod
    @abstractmethod
    def default_rate(n_features: int) -> float:
        """The learning rate that the library recommends."""

    @abstractmethod
    def __init__(self, task: Task) -> None: ...

    @abstractmethod
    def train(self, batches: Batches) -> None:
        """Take one full training step a batch, in the library's own mixed precision where the device is CUDA."""

    @abstractmethod
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        """Codes and reconstructions in float32, as at inference; training may go on after it."""


def gao_rate(n_features: int) -> float:
    """2e-4 / sqrt(F / 2^14), the scaling law of Gao et al. (2024) that several libraries take over."""
    return float(2e-4 / (n_features / 2**14) ** 0.5)
