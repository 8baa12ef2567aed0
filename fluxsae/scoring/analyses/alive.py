"""Which features are alive, how often and how strongly they are active, in one pass and in fixed memory.

Legend: B images of a batch, F features, W parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from lightning.pytorch import Trainer
from torch import Tensor

from fluxsae.records import Column
from fluxsae.runtime import gather_tensors
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.module import ImageScores, SAEScoring
from fluxsae.shards import ShardSet


class Activity(NamedTuple):
    """Moments of S over the images on which a feature is active, in a form that merges (Chan et al. 1979).

    `squares` is the sum of squared distances to the mean; `max` is over all images seen.
    """

    n_seen: Int[Tensor, ""]
    n_active: Float64[Tensor, "F"]
    mean: Float64[Tensor, "F"]
    squares: Float64[Tensor, "F"]
    max: Float64[Tensor, "F"]

    @classmethod
    def none(cls, n_features: int, device: torch.device | str = "cpu") -> Activity:
        """The activity on no images."""
        zeros = torch.zeros(n_features, dtype=torch.float64, device=device)
        return cls(torch.tensor(0, device=device), zeros, zeros, zeros, zeros)

    @classmethod
    def of(cls, scores: Float[Tensor, "B F"], epsilon: float) -> Activity:
        """The activity on some images; active means S > epsilon."""
        active = scores > epsilon
        n_active = active.sum(dim=0, dtype=torch.float64)
        mean = (scores * active).sum(dim=0, dtype=torch.float64) / n_active.clamp_min(1)
        squares = ((scores - mean) * active).square_().sum(dim=0)
        n_seen = torch.full_like(active[0, 0], len(scores), dtype=torch.int64)  # `torch.tensor` would wait for a GPU
        return cls(n_seen, n_active, mean, squares, scores.amax(dim=0).double())

    def merge(self, other: Activity) -> Activity:
        n_active = self.n_active + other.n_active
        delta = other.mean - self.mean
        share = other.n_active / n_active.clamp_min(1)
        return Activity(
            self.n_seen + other.n_seen,
            n_active,
            self.mean + delta * share,
            self.squares + other.squares + delta.square() * self.n_active * share,
            torch.maximum(self.max, other.max),
        )

    @property
    def frequency(self) -> Float64[Tensor, "F"]:
        """Share of images on which a feature is active."""
        return self.n_active / self.n_seen

    @property
    def std(self) -> Float64[Tensor, "F"]:
        """Standard deviation over the active images, 0 for a single one."""
        return (self.squares / self.n_active.clamp_min(1)).sqrt()


class AliveStatistics(FeatureAnalysis):
    """Fills in alive, frequency, token_frequency, max, mean_active, std_active, n_images and class of the table.

    The frequency is the share of images on which a feature is active. The token frequency is the share of tokens on
    which it has a code above 0.

    Args:
        features: the features table.
        epsilon: a feature is active on an image when S > epsilon.
        min_images: a feature is alive when it is active on at least this many images.
        rare: alive features with a lower frequency have the class rare.
        common: features with a higher frequency have the class common. Other alive features are moderate.
    """

    columns = (
        Column("alive", "bool", "whether it is active on enough images"),
        Column("frequency", "float", "share of images on which it is active"),
        Column("token_frequency", "float", "share of tokens on which it has a code"),
        Column("max", "float", "largest score"),
        Column("mean_active", "float", "mean score on the images on which it is active"),
        Column("std_active", "float", "standard deviation of the score on the images on which it is active"),
        Column("n_images", "int", "images on which it is active"),
        Column("class", "text", "dead, rare, moderate or common, by frequency"),
    )

    def __init__(
        self, features: Path, epsilon: float = 1e-3, min_images: int = 3, rare: float = 0.01, common: float = 0.5
    ) -> None:
        if min_images < 1 or epsilon < 0 or not 0 <= rare <= common <= 1:
            raise ValueError(
                f"min_images is {min_images}, epsilon {epsilon}, rare {rare} and common {common}; "
                "expected min_images ≥ 1, epsilon ≥ 0 and 0 ≤ rare ≤ common ≤ 1."
            )
        super().__init__(features)
        self.epsilon = epsilon
        self.min_images = min_images
        self.rare = rare
        self.common = common

    def begin(self, module: SAEScoring, shards: ShardSet) -> None:
        self._n_tokens = shards.spec.n_tokens
        self._activity = Activity.none(module.sae.n_features, module.device)
        self._n_fired = torch.zeros(module.sae.n_features, dtype=torch.int64, device=module.device)

    def update(self, batch: ImageScores) -> None:
        self._activity = self._activity.merge(Activity.of(batch.scores, self.epsilon))
        self._n_fired += batch.fired.sum(dim=0)

    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        parts = [gather_tensors(trainer, field) for field in self._activity]
        total = Activity(*(field[0] for field in parts))
        for rank in range(1, trainer.world_size):
            total = total.merge(Activity(*(field[rank] for field in parts)))
        n_fired = gather_tensors(trainer, self._n_fired).sum(dim=0)
        n_tokens = int(total.n_seen) * self._n_tokens
        columns = table_columns(total, self.min_images, self.rare, self.common)
        return {**columns, "token_frequency": (n_fired.double() / n_tokens).tolist()}


def table_columns(activity: Activity, min_images: int, rare: float, common: float) -> dict[str, list[Any]]:
    """The columns of the features table; mean and standard deviation are empty where a feature is never active."""
    counts = activity.n_active.long().tolist()
    alive = [count >= min_images for count in counts]
    frequency = activity.frequency.tolist()
    return {
        "alive": alive,
        "frequency": frequency,
        "max": activity.max.tolist(),
        "mean_active": [m if n else None for m, n in zip(activity.mean.tolist(), counts, strict=True)],
        "std_active": [s if n else None for s, n in zip(activity.std.tolist(), counts, strict=True)],
        "n_images": counts,
        "class": [_name(f, rare, common) if a else "dead" for f, a in zip(frequency, alive, strict=True)],
    }


def _name(frequency: float, rare: float, common: float) -> str:
    if frequency < rare:
        return "rare"
    return "common" if frequency > common else "moderate"
