"""How alike the top images of a feature look to CLIP, beside how alike random images look.

Legend: M images of a set, R sets, N images embedded, E width of an embedding, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import Trainer
from torch import Tensor

from fluxsae.records import Column, differences
from fluxsae.runtime import gather_tensors
from fluxsae.scoring.analyses.top_images import COLUMN as TOP_IMAGES
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.clip import embed, load_clip
from fluxsae.scoring.module import SAEScoring, prompt_key
from fluxsae.scoring.top_lists import TopLists
from fluxsae.shards import ShardSet

_CANDIDATES = 4
"""Times as many images are kept a feature where its examples may be taken by another."""


def coherence(embeddings: Float[Tensor, "N E"], sets: Int[Tensor, "R M"]) -> Float[Tensor, "R"]:
    """Mean cosine over all pairs of each set of rows of `embeddings`, which have unit length.

    A sum of M unit vectors has the squared length M + 2 · (sum of the cosines of its pairs), so no pair is formed.
    """
    size = sets.shape[1]
    sums = [embeddings[part].sum(dim=1) for part in sets.split(1024)]
    squared = torch.cat(sums).square().sum(dim=1) if sums else torch.zeros(0)
    return (squared - size) / (size * (size - 1))


def random_sets(
    n_images: int, prompt_of: Callable[[int], int], size: int, n_sets: int, *, unique_prompts: bool, seed: int
) -> list[list[int]]:
    """Sets of `size` images drawn evenly, under the same constraint as top images. ValueError with too few prompts."""
    rng = np.random.default_rng(seed)
    return [_random_set(rng.permutation(n_images), prompt_of, size, unique_prompts) for _ in range(n_sets)]


def _random_set(
    order: Int[np.ndarray, "I"], prompt_of: Callable[[int], int], size: int, unique_prompts: bool
) -> list[int]:
    chosen: dict[int, int] = {}
    for image in map(int, order):
        chosen.setdefault(prompt_of(image) if unique_prompts else image, image)
        if len(chosen) == size:
            return list(chosen.values())
    raise ValueError(
        f"a set of {size} images needs as many different prompts but there are {len(chosen)}; "
        "capture more or lower n_images."
    )


def share_out(candidates: Sequence[Sequence[int]], order: Sequence[int], n_images: int) -> list[list[int]]:
    """Up to `n_images` of each feature's candidates such that no image is taken twice; features choose in `order`."""
    taken: set[int] = set()
    chosen: list[list[int]] = [[] for _ in candidates]
    for feature in order:
        chosen[feature] = [image for image in candidates[feature] if image not in taken][:n_images]
        taken.update(chosen[feature])
    return chosen


class Coherence(FeatureAnalysis):
    """Fills in coherence, coherence_null and coherence_rank (1 is the most coherent) of the features table.

    Coherence is the mean cosine over pairs of CLIP embeddings of a feature's top images. It always uses exactly
    `n_images` images, because smaller sets are high by chance more often. So a feature that is active on fewer prompts
    has no coherence. The null is the mean over `n_null` random sets of `n_images` images.

    Args:
        features: the features table.
        images: folder of the captured images.
        clip: `bundled:tiny-clip`, `local-dir:FOLDER`, or an open_clip model and weights such as `ViT-B-32/openai`.
        n_images: number of images in a set.
        n_null: number of random sets for the null.
        unique_prompts: take at most one image of each prompt into a set.
        unique_globally: no image may stand for two features. In the order of coherence, each feature takes its best
            images that are left. They replace the column top_images, so name this callback after `TopImages`.
        batch_size: number of images that CLIP embeds at a time.
        seed: decides the random sets.
    """

    columns = (
        Column("coherence", "float", "mean cosine of the CLIP embeddings of its top images"),
        Column("coherence_null", "float", "the same of random images"),
        Column("coherence_rank", "int", "1 is the most coherent"),
        TOP_IMAGES,
    )

    def __init__(
        self,
        features: Path,
        images: Path,
        clip: str = "ViT-B-32/openai",
        n_images: int = 9,
        n_null: int = 200,
        unique_prompts: bool = True,
        unique_globally: bool = False,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if n_images < 2 or n_null < 1:
            raise ValueError(f"n_images is {n_images} and n_null {n_null}; expected at least 2 images and 1 set.")
        super().__init__(features)
        self.images = Path(images)
        self.clip = clip
        self.n_images = n_images
        self.n_null = n_null
        self.unique_prompts = unique_prompts
        self.unique_globally = unique_globally
        self.batch_size = batch_size
        self.seed = seed
        self._top: TopLists

    def begin(self, module: SAEScoring, shards: ShardSet) -> None:
        check_images(ShardSet.open(self.images, "images"), shards)
        load_clip(self.clip)  # a wrong name ends the run before the scoring, not after it
        self._device, self._top = module.device, module.top
        self._top.ask(self._depth, self.unique_prompts)

    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        candidates = self._top.ids(trainer, self._depth, self.unique_prompts)
        sets = {f: ids[: self.n_images] for f, ids in enumerate(candidates) if len(ids) >= self.n_images}
        null = self._null_sets(ShardSet.open(self.images, "images"))
        needed = sorted({image for ids in [*sets.values(), *null] for image in ids})
        embeddings = self._embed(trainer, needed)
        row = {image: i for i, image in enumerate(needed)}
        indices = [torch.tensor([[row[i] for i in ids] for ids in group]) for group in (list(sets.values()), null)]
        values = coherence(embeddings, indices[0].reshape(-1, self.n_images)).tolist()
        columns = table_columns(
            dict(zip(sets, values, strict=True)), float(coherence(embeddings, indices[1]).mean()), len(candidates)
        )
        if self.unique_globally:
            ranks = columns["coherence_rank"]
            order = sorted(range(len(ranks)), key=lambda f: (ranks[f] or len(ranks) + 1, f))
            columns[TOP_IMAGES.name] = share_out(candidates, order, self.n_images)
        return columns

    @property
    def _depth(self) -> int:
        return self.n_images * (_CANDIDATES if self.unique_globally else 1)

    def _null_sets(self, images: ShardSet) -> list[list[int]]:
        def prompt_of(image: int) -> int:
            return prompt_key(images.record(image).prompt)

        return random_sets(
            len(images), prompt_of, self.n_images, self.n_null, unique_prompts=self.unique_prompts, seed=self.seed
        )

    def _embed(self, trainer: Trainer, needed: list[int]) -> Float[Tensor, "N E"]:
        """Embeddings of the needed images in order; every process embeds each W-th, the last ones again to fill up."""
        images = ShardSet.open(self.images, "images")
        clip = load_clip(self.clip, self._device)
        share = -(-len(needed) // trainer.world_size)
        wanted = [min(i * trainer.world_size + trainer.global_rank, len(needed) - 1) for i in range(share)]
        mine = embed(clip, (images.image(needed[i]) for i in wanted), self.batch_size)
        parts = gather_tensors(trainer, mine.to(self._device)).cpu()
        return parts.transpose(0, 1).flatten(0, 1)[: len(needed)]


def check_images(images: ShardSet, tokens: ShardSet) -> None:
    """ValueError unless the pictures are those whose tokens are scored."""
    different = differences(images.generation, tokens.generation)
    if different or len(images) != len(tokens):
        why = "; ".join(different) or f"{len(images)} pictures, {len(tokens)} images with tokens"
        raise ValueError(
            f"the pictures in {images.folder} and the tokens in {tokens.folder} are of two captures ({why}); "
            "name folders of one."
        )


def table_columns(values: dict[int, float], null: float, n_features: int) -> dict[str, list[Any]]:
    """The columns of the features table from the coherence of some features."""
    ranked = sorted(values, key=lambda feature: (-values[feature], feature))
    rank = {feature: i + 1 for i, feature in enumerate(ranked)}
    every = range(n_features)
    return {
        "coherence": [values.get(feature) for feature in every],
        "coherence_null": [null if feature in values else None for feature in every],
        "coherence_rank": [rank.get(feature) for feature in every],
    }
