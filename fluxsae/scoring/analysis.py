"""What an analysis of S is: a callback that fills columns of the features table in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from fluxsae.records import Column, update_features
from fluxsae.scoring.module import ImageScores, SAEScoring, scoring_of
from fluxsae.scoring.reading import all_shards
from fluxsae.shards import ShardSet


class FeatureAnalysis(Callback, ABC):
    """A callback of the scores stage that fills in columns of the features table.

    A subclass declares its `columns` and returns their values from `finish`. This one says on how few images a feature
    is active: 0 if it is equally strong on all, almost 1 if it is active on one of many (Vinje and Gallant 2000).

    ```python
    class Selectivity(fluxsae.FeatureAnalysis):
        columns = (fluxsae.Column("selectivity", "float", "1 - mean(S)² / mean(S²) over images"),)

        def begin(self, module, shards):
            self.n_images = len(shards.with_tokens)
            self.sums = torch.zeros(2, module.sae.n_features, dtype=torch.float64, device=module.device)

        def update(self, batch):
            scores = batch.scores.double()
            self.sums += torch.stack([scores.sum(dim=0), scores.square().sum(dim=0)])

        def finish(self, trainer):
            mean, square = trainer.strategy.reduce(self.sums, reduce_op="sum") / self.n_images
            return {"selectivity": (1 - mean.square() / square).tolist()}
    ```

    A config names it by class path under `trainer.callbacks`, with `features` among its `init_args`. After a run,
    `Selection(rank_by="selectivity")` ranks by the column and `row["selectivity"]` reads it.

    With several processes, each sees a part of the images, and `finish` must combine the parts. The first process
    writes the table.

    Args:
        features: the features table.
    """

    columns: ClassVar[tuple[Column, ...]] = ()

    def __init__(self, features: Path) -> None:
        self.features = Path(features)

    def begin(self, module: SAEScoring, shards: ShardSet) -> None:
        """Called before the first batch: refuse wrong input, and set up what `update` adds to."""

    def update(self, batch: ImageScores) -> None:
        """Called after each batch, with its scores. Memory should not grow with the number of images."""

    @abstractmethod
    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        """Called in every process after the last batch: the columns, each a sequence over features.

        None means unknown. Processes may communicate here, and the answer of the first one counts. A column that is
        left out stays as it is in the table.
        """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(scoring_of(pl_module, self), all_shards(trainer))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: ImageScores, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.update(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self.finish(trainer)
        if trainer.is_global_zero and found:
            self._check(found, scoring_of(pl_module, self).sae.n_features)
            update_features(self.features, found, self.columns)
        trainer.strategy.barrier(type(self).__name__)

    def _check(self, found: Mapping[str, Sequence[Any]], n_features: int) -> None:
        """ValueError for a column that is not declared, or not of all features."""
        declared = [column.name for column in self.columns]
        for name, values in found.items():
            if name not in declared:
                raise ValueError(
                    f"{type(self).__name__} fills in column {name!r} but declares {', '.join(declared) or 'none'}; "
                    "add a Column for it to its `columns`."
                )
            if len(values) != n_features:
                raise ValueError(
                    f"{type(self).__name__} has {len(values)} values for column {name!r}; "
                    f"give one for each of the {n_features} features, None where it is unknown."
                )
