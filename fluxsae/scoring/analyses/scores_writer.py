"""Writes S to disk, row by row while it is made. Legend: I images, B images of a batch, F features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer

from fluxsae.files import remove_parts, write_csv, write_json
from fluxsae.records import read_prompts
from fluxsae.runtime import OneRunOnly, SharedArray
from fluxsae.scoring.by_feature import FILES, OFFSETS, write_by_feature
from fluxsae.scoring.module import ImageScores, scoring_of
from fluxsae.scoring.reading import all_shards
from fluxsae.scoring.scores import IMAGE_COLUMNS, IMAGES, MATRIX, SUMMARY
from fluxsae.shards import ShardSet


class ScoresWriter(OneRunOnly):
    """Writes S to `matrix.npy` (float32 [I, F]), its rows to `images.csv`, and at last `scores.json`.

    Rows of images that the capture skipped are 0. Several processes write into one file, so all of them must see
    `folder`.

    Args:
        folder: where to write.
        prompts: a prompts file; the attributes of its prompts become columns of `images.csv`.
        by_feature: also write S in the order of features, without its zeros. One feature's scores are then in one
            place. If a tenth of S is above 0, this takes a fifth of the space of `matrix.npy`.
    """

    def __init__(self, folder: Path, prompts: Path | None = None, by_feature: bool = False) -> None:
        super().__init__(folder)
        self.prompts = prompts
        self.by_feature = by_feature
        self._matrix: SharedArray | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shape = (len(all_shards(trainer)), scoring_of(pl_module, self).sae.n_features)
        if trainer.is_global_zero:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            (self.folder / OFFSETS).unlink(missing_ok=True)
            for name in (IMAGES, SUMMARY, *FILES):
                remove_parts(self.folder / name)
        self._matrix = SharedArray(trainer, self.folder / MATRIX, shape)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: ImageScores, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert self._matrix is not None
        self._matrix.write(outputs.images.cpu().numpy(), outputs.scores.float().cpu().numpy())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._matrix is not None
        n_images, n_features = self._matrix.array.shape
        n_rows, shards = self._matrix.n_written(trainer), all_shards(trainer)
        if n_rows != len(shards.with_tokens):
            expected = len(shards.with_tokens)
            raise ValueError(f"{n_rows} images were scored but the shards hold {expected}; score all of them.")
        if trainer.is_global_zero:
            self._matrix.finish()
            if self.by_feature:
                write_by_feature(np.load(self.folder / MATRIX, mmap_mode="r"), self.folder)
            write_images(self.folder / IMAGES, shards, self.prompts)
            summary = {"n_images": n_images, "n_features": n_features, "spec": shards.spec.to_dict()}
            summary |= {"skipped": sorted(shards.skipped)} if shards.skipped else {}
            write_json(self.folder / SUMMARY, summary)
        trainer.strategy.barrier("scores")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._matrix is not None:
            self._matrix.discard(exception)
        super().on_exception(trainer, pl_module, exception)


def write_images(path: Path, shards: ShardSet, prompts: Path | None) -> None:
    """The table of a set's images, one row an image in order, with the attributes that `prompts` gives them."""
    by_id = {prompt.id: prompt.attributes for prompt in read_prompts(prompts)} if prompts is not None else {}
    attributes = sorted({name for said in by_id.values() for name in said} - set(IMAGE_COLUMNS))
    records = (shards.record(image) for image in range(len(shards)))
    rows = ({**by_id.get(record.prompt_id, {}), **record._asdict()} for record in records)
    write_csv(path, rows, [*IMAGE_COLUMNS, *attributes])
