"""Metrics of held-out tokens, and of which weights they are.

Legend: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from fluxsae.sae import SAE, Evaluation, Metrics


class HeldOut:
    """Measures one SAE on held-out tokens: `begin`, `update` for each batch, `end`. The last `metrics` are kept."""

    def __init__(self) -> None:
        self.metrics: Metrics | None = None
        self._of_step = -1
        self._evaluation: Evaluation | None = None

    def begin(self, sae: SAE) -> None:
        self._evaluation = Evaluation(sae.d_in, sae.n_features, sae.b_dec.device)

    def update(self, sae: SAE, tokens: Float[Tensor, "N D"]) -> None:
        assert self._evaluation is not None
        self._evaluation.update(sae, tokens)

    def end(self, total: Callable[[Tensor], Tensor], step: int | None) -> Metrics:
        """The metrics since `begin`, summed over processes by `total`; kept as those of `step`, unless that is None."""
        assert self._evaluation is not None
        metrics = self._evaluation.result(total)
        if step is not None:
            self.metrics, self._of_step = metrics, step
        return metrics

    def is_of(self, step: int) -> bool:
        """Whether the metrics that are kept are of the weights after this step."""
        return self.metrics is not None and self._of_step == step

    def summary(self) -> dict[str, int | float]:
        """The metrics but the densities, for `config.json`; empty when nothing was measured."""
        if self.metrics is None:
            return {}
        return {name: value for name, value in self.metrics._asdict().items() if name != "density"}

    def __str__(self) -> str:
        if self.metrics is None:
            return "nothing was measured on held-out prompts"
        fve, l0, dead = self.metrics.fve, self.metrics.l0, self.metrics.dead_fraction
        return f"FVE {fve:.3f} at L0 {l0:.1f}, {dead:.1%} dead, on held-out prompts"
