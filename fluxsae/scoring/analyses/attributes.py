"""Which attribute of the scene the top images of a feature share, where prompts say what is in them."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from fluxsae.files import remove_parts, write_json
from fluxsae.records import Column, Feature, read_features, read_prompts
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.module import SAEScoring
from fluxsae.shards import ShardSet

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """An attribute value, as `background=blue`, and the share of some images whose prompts say it."""

    label: str
    share: float


def shared_attribute(
    images: Sequence[frozenset[str]], frequency: Mapping[str, float], min_share: float = 0.8
) -> Shared:
    """The attribute value that says most about `images`.

    Of the values that at least `min_share` of the images have, it is the one with the lowest `frequency` in all
    prompts. If there is none, it is the most common value. An image counts for each value that it has.
    """
    counts = Counter(value for values in images for value in values)
    if not counts:
        return Shared("", 0.0)
    shared = [value for value in counts if counts[value] >= min_share * len(images)]
    most = [value for value in counts if counts[value] == max(counts.values())]
    label = min(shared or most, key=lambda value: (frequency.get(value, 0.0), -counts[value], value))
    return Shared(label, counts[label] / len(images))


def attribute_values(attributes: Mapping[str, str]) -> frozenset[str]:
    """`{"object": "fox|red apple"}` as {"object=fox", "object=red apple"}."""
    return frozenset(f"{name}={value}" for name, values in attributes.items() for value in values.split("|"))


class Comparison(NamedTuple):
    """How many of the most coherent features, and of random alive ones, share an attribute among their top images."""

    min_share: float
    coherent: list[int]
    coherent_sharing: int
    random: list[int]
    random_sharing: int


def compare(table: Sequence[Feature], n_features: int, min_share: float, seed: int) -> Comparison:
    """Compare the `n_features` most coherent alive features with as many random alive ones, drawn with `seed`.

    Both are drawn from the alive features that have a coherence, so that both have full sets of top images.
    """
    ranked = [row for row in table if row.alive and row.coherence is not None]
    ranked.sort(key=lambda row: (-(row.coherence or 0.0), row.feature))
    drawn = random.Random(seed).sample(ranked, min(n_features, len(ranked)))
    groups = [ranked[:n_features], sorted(drawn, key=lambda row: row.feature)]
    sharing = [sum((row.label_share or 0.0) >= min_share for row in group) for group in groups]
    ids = [[row.feature for row in group] for group in groups]
    return Comparison(min_share, ids[0], sharing[0], ids[1], sharing[1])


class Attributes(FeatureAnalysis):
    """Fills in label and label_share of the features table, and compares coherent with random features.

    A label is the rarest attribute value that at least `min_share` of the top images share, or else the most common
    one. The comparison goes to `attributes.json`.

    It reads the columns top_images, alive and coherence when scoring has ended. So name it after the callbacks that
    fill them in, or run those earlier. If the prompts have no attributes, it writes nothing and says so in the log.

    Args:
        features: the features table; `attributes.json` is written beside it.
        prompts: the prompts file with the attributes.
        n_images: number of top images of a feature that are compared.
        n_compare: number of features in each group of the comparison.
        min_share: share of the top images that must have a value for it to count as shared.
        seed: decides the random features.
    """

    columns = (
        Column("label", "text", "the attribute that most tells its top images from others"),
        Column("label_share", "float", "share of its top images that have it"),
    )

    def __init__(
        self,
        features: Path,
        prompts: Path,
        n_images: int = 9,
        n_compare: int = 20,
        min_share: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(features)
        self.prompts = Path(prompts)
        self.n_images = n_images
        self.n_compare = n_compare
        self.min_share = min_share
        self.seed = seed

    def begin(self, module: SAEScoring, shards: ShardSet) -> None:
        read_prompts(self.prompts)  # a wrong file ends the run before the scoring, not after it
        self._shards = shards

    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        if not trainer.is_global_zero:  # the table is read, by whoever writes it
            return {}
        values = [attribute_values(prompt.attributes) for prompt in read_prompts(self.prompts)]
        if not any(values):
            logger.info("the prompts in %s carry no attributes, so features get no labels", self.prompts)
            return {}
        table = read_features(self.features)
        top = [[values[self._shards.record(i).prompt_id] for i in row.top_images[: self.n_images]] for row in table]
        columns = label_columns(top, frequencies(values), self.min_share)
        labelled = [
            Feature({**row.columns, "label_share": share})
            for row, share in zip(table, columns["label_share"], strict=True)
        ]
        path = self.features.with_name("attributes.json")
        remove_parts(path)
        write_json(path, compare(labelled, self.n_compare, self.min_share, self.seed)._asdict())
        return columns


def frequencies(values: Sequence[frozenset[str]]) -> dict[str, float]:
    """In which share of the prompts each value occurs."""
    counts = Counter(value for said in values for value in said)
    return {value: count / len(values) for value, count in counts.items()}


def label_columns(
    top: Sequence[Sequence[frozenset[str]]], frequency: Mapping[str, float], min_share: float
) -> dict[str, list[Any]]:
    """The columns label and label_share from the attribute values of every feature's top images."""
    shared = [shared_attribute(images, frequency, min_share) for images in top]
    return {
        "label": [best.label or None for best in shared],
        "label_share": [best.share if best.label else None for best in shared],
    }
