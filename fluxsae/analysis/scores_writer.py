"""Writes S to disk, row by row while it is made. Legend: I images, B images of a batch, F features."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule, Trainer

from fluxsae.analysis.gather import gather
from fluxsae.one_run import OneRunOnly
from fluxsae.prompts import read_prompts
from fluxsae.scoring import IMAGE_COLUMNS, IMAGES, MATRIX, SUMMARY, ImageScores, SAEScoring, all_shards
from fluxsae.shards.read import ShardSet
from fluxsae.storage import remove_parts, whole_file, write_csv, write_json


class ScoresWriter(OneRunOnly):
    """Leaves `matrix.npy` (S, float32 [I, F]), `images.csv` (its rows) and `scores.json`, which says both are whole.

    Several processes write their rows into one file, so `folder` must be one that all of them see.

    Args:
        folder: where to write.
        prompts: a prompts file; the attributes of its prompts become columns of `images.csv`.
    """

    def __init__(self, folder: Path, prompts: Path | None = None) -> None:
        super().__init__(folder)
        self.prompts = prompts
        self._matrix: Float[np.ndarray, "I F"] | None = None
        self._n_rows = 0
        self._temporary = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SAEScoring)
        shape = (len(all_shards(trainer)), pl_module.sae.n_features)
        path = ""
        if trainer.is_global_zero:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            for name in (MATRIX, IMAGES, SUMMARY):
                remove_parts(self.folder / name)
            path = str(self._temporary.enter_context(whole_file(self.folder / MATRIX)))
            matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            reserve(Path(path), matrix.nbytes + matrix.offset)
            matrix.flush()
        path = trainer.strategy.broadcast(path)
        self._matrix, self._n_rows = np.lib.format.open_memmap(path, mode="r+"), 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(outputs, ImageScores) and self._matrix is not None
        write_rows(self._matrix, outputs.images.cpu(), outputs.scores.float().cpu())
        self._n_rows += len(outputs.images)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SAEScoring) and isinstance(self._matrix, np.memmap)
        self._matrix.flush()
        n_images, n_features = self._matrix.shape
        self._matrix = None
        n_rows = int(gather(trainer, torch.tensor(self._n_rows, device=pl_module.device)).sum())
        if n_rows != n_images:
            raise ValueError(f"{n_rows} images were scored but the shards hold {n_images}; score all of them.")
        if trainer.is_global_zero:
            self._temporary.close()
            shards = all_shards(trainer)
            write_images(self.folder / IMAGES, shards, self.prompts)
            summary = {"n_images": n_images, "n_features": n_features, "spec": shards.spec.to_dict()}
            write_json(self.folder / SUMMARY, summary)
        trainer.strategy.barrier("scores")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._temporary.__exit__(type(exception), exception, None)
        super().on_exception(trainer, pl_module, exception)


def reserve(path: Path, size: int) -> None:
    """Have the disk keep `size` bytes for a file. Writing to a map of one that it has no room for kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def write_rows(
    matrix: Float[np.ndarray, "I F"], images: Int[torch.Tensor, "B"], scores: Float[torch.Tensor, "B F"]
) -> None:
    matrix[images.numpy()] = scores.numpy()


def write_images(path: Path, shards: ShardSet, prompts: Path | None) -> None:
    """The table of a set's images, one row an image in order, with the attributes that `prompts` gives them."""
    by_id = {prompt.id: prompt.attributes for prompt in read_prompts(prompts)} if prompts is not None else {}
    attributes = sorted({name for said in by_id.values() for name in said} - set(IMAGE_COLUMNS))
    records = (shards.record(image) for image in range(len(shards)))
    rows = ({**by_id.get(record.prompt_id, {}), **record._asdict()} for record in records)
    write_csv(path, rows, [*IMAGE_COLUMNS, *attributes])
