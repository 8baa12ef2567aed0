"""Features that have not fired for a while, and what is done for them between steps.

Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxsae.runtime import Processes
from fluxsae.sae import SAE, add_rows, draw_directions, resample

_logger = logging.getLogger(__name__)


class DeadFeatures(nn.Module):
    """Counts tokens since each feature fired; one that has not for more than `dead_after` tokens is dead.

    `features` are the dead ones as counted at the last check, which waits for the device. After a step, the encoder
    bias of dead features rises by `bias_increment`, until they fire.
    """

    since_fired: Tensor
    tokens_seen: Tensor

    def __init__(self, n_features: int, dead_after: int, bias_increment: float) -> None:
        super().__init__()
        self.dead_after = dead_after
        self.bias_increment = bias_increment
        self.features: Int[Tensor, "M"] | None = None
        self.register_buffer("since_fired", torch.zeros(n_features, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    @property
    def silent(self) -> Bool[Tensor, "F"]:
        """Which features are dead now."""
        return self.since_fired > self.dead_after

    @property
    def fraction(self) -> Float[Tensor, ""]:
        return self.silent.float().mean()

    def check(self) -> None:
        """Count the dead features anew."""
        self.features = self.silent.nonzero().flatten()

    @torch.no_grad()
    def after_step(self, sae: SAE, fired: Tensor, n_tokens: Tensor | int) -> None:
        """Take note of a step on `n_tokens` tokens, in which `fired` tells which features fired."""
        self.since_fired.add_(n_tokens).masked_fill_(fired > 0, 0)
        self.tokens_seen.add_(n_tokens)
        if self.bias_increment:
            add_rows(sae.b_enc, self.bias_increment * self.silent)

    @torch.no_grad()
    def restart(
        self, sae: SAE, optimizer: Optimizer, tokens: Float[Tensor, "N D"], processes: Processes, seed: int
    ) -> int:
        """Start the dead features anew at tokens that are explained badly; how many there were.

        Every process, and a resumed run with the same `seed`, restarts them at the same tokens.
        """
        dead = self.silent.nonzero().flatten()
        if len(dead):
            x = sae.normalise(tokens)
            x, error = (processes.gather(rows) for rows in (x, x - sae.training_forward(x).recon))
            generator = torch.Generator(x.device).manual_seed(seed)
            resample(sae, optimizer, dead, draw_directions(sae, x, error, len(dead), generator))
            self.since_fired[dead] = 0
            self.features = None
            _logger.info("step %d: restarted %d dead features", seed, len(dead))
        return len(dead)


def take_older_counts(state_dict: dict[str, Any], older: str, newer: str) -> None:
    """A checkpoint of the first edition has the counts of `DeadFeatures` at `older`: put them where they are now."""
    for name in ("since_fired", "tokens_seen"):
        if older + name in state_dict:
            state_dict[newer + name] = state_dict.pop(older + name)
