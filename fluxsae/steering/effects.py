"""What steering a feature changes, measured, beside what a random direction of equal norm changes.

Legend: B images, S steered features, E width of a CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.image import structural_similarity_index_measure

from fluxsae.files import write_csv
from fluxsae.records import read_features
from fluxsae.runtime import OneRunOnly, gather_objects
from fluxsae.scoring import Clip, embed, load_clip
from fluxsae.shards import ShardSet
from fluxsae.steering.module import FluxSteering, Steered

MEASURES = ("ssim_distance", "clip_distance", "clip_change", "activation", "activation_change")
"""The columns of numbers.

`ssim_distance` is 1 - SSIM (Wang et al. 2004) and `clip_distance` 1 - cosine, both to the unsteered image;
`clip_change` is the rise in cosine with the mean CLIP embedding of the feature's top images; `activation` is the
feature's largest code over tokens at the SAE's site and step, `activation_change` its rise over the unsteered image.
"""


def ssim_distance(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> Float[Tensor, "B"]:
    """1 - SSIM of each pair of pictures: 0 when they are equal, about 1 when nothing is alike."""
    similarity = structural_similarity_index_measure(_pixels(ours), _pixels(theirs), data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return 1.0 - similarity.reshape(-1)


def clip_target(clip: Clip, images: ShardSet, top_images: Sequence[int]) -> Float[Tensor, "E"]:
    """The mean CLIP embedding of a feature's top images, of unit length."""
    return normalize(embed(clip, (images.image(image) for image in top_images)).mean(dim=0), dim=0)


def measure(steered: Steered, clip: Clip, targets: dict[int, Tensor]) -> Iterator[dict[str, Any]]:
    """A row for each feature, variant that concerns it, and image of a batch."""
    baseline = embed(clip, steered.images[0])
    for v, variant in enumerate(steered.variants[1:], start=1):
        embedded = embed(clip, steered.images[v])
        ssim = ssim_distance(steered.images[v], steered.images[0])
        cosine = (embedded * baseline).sum(dim=1).clamp(-1, 1)
        for s, feature in enumerate(steered.features):
            if variant.feature not in (feature, None):
                continue
            towards = (embedded - baseline) @ targets[feature] if feature in targets else None
            for i, request in enumerate(steered.requests):
                before, after = float(steered.activations[0, i, s]), float(steered.activations[v, i, s])
                yield {
                    "feature": feature,
                    "kind": variant.kind,
                    "draw": variant.draw,
                    "strength": variant.strength,
                    "image": request.image,
                    "prompt": request.prompt,
                    "seed": request.seed,
                    "ssim_distance": float(ssim[i]),
                    "clip_distance": 1.0 - float(cosine[i]),
                    "clip_change": None if towards is None else float(towards[i]),
                    "activation": after,
                    "activation_change": after - before,
                }


def summarise(rows: Sequence[dict[str, Any]], labels: dict[int, str]) -> list[dict[str, Any]]:
    """Means over images of every measure, a row for each feature and strength, feature and random side by side."""
    groups: dict[tuple[int, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["feature"], row["strength"]), {"feature": [], "random": []})
        group[row["kind"]].append(row)
    summary = []
    for (feature, strength), kinds in groups.items():
        means = {
            f"{kind}_{name}": _mean([row[name] for row in members])
            for name in MEASURES
            for kind, members in kinds.items()
        }
        of = {"feature": feature, "label": labels.get(feature, ""), "strength": strength}
        summary.append({**of, "n_images": len(kinds["feature"]), **means})
    return summary


class SteeringEffects(OneRunOnly):
    """Measures what steering changes, for features and for random directions of equal norm.

    `effects.csv` has one row for each feature, variant and image. `summary.csv` has the means over images, with feature
    and random direction side by side.

    Args:
        folder: where the tables go.
        features: the features table, which names each feature's top images.
        images: folder of the captured images.
        clip: `bundled:tiny-clip`, `local-dir:FOLDER`, or an open_clip model and weights such as `ViT-B-32/openai`.
        n_images: number of top images that a feature is measured against.
    """

    def __init__(
        self, folder: Path, features: Path, images: Path, clip: str = "ViT-B-32/openai", n_images: int = 9
    ) -> None:
        super().__init__(folder)
        self.features = Path(features)
        self.images = Path(images)
        self.clip = clip
        self.n_images = n_images
        self._clip: Clip | None = None
        self._targets: dict[int, Tensor] = {}
        self._labels: dict[int, str] = {}
        self._rows: list[dict[str, Any]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FluxSteering)
        table = {row.feature: row for row in read_features(self.features)}
        images = ShardSet.open(self.images, "images")
        self._clip = load_clip(self.clip, pl_module.device)
        chosen = [table[feature] for feature in pl_module.features if feature in table]
        self._targets = {
            row.feature: clip_target(self._clip, images, row.top_images[: self.n_images])
            for row in chosen
            if row.top_images
        }
        self._labels = {row.feature: row.label for row in chosen}
        self._rows = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(outputs, Steered) and self._clip is not None
        self._rows.extend(measure(outputs, self._clip, self._targets))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = gather_objects(trainer, self._rows)
        rows.sort(key=lambda row: (row["feature"], row["kind"], row["draw"], row["strength"], row["image"]))
        if trainer.is_global_zero:
            write_csv(self.folder / "effects.csv", rows, tuple(rows[0]))
            summary = summarise(rows, self._labels)
            write_csv(self.folder / "summary.csv", summary, tuple(summary[0]))
        trainer.strategy.barrier("steering effects")


def _pixels(pictures: Sequence[Image.Image]) -> Float[Tensor, "B 3 H W"]:
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
