"""Which images are to be made of a prompt file, with which seeds, in which batches and by which process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lightning import LightningDataModule

from fluxsae.files import derived_seed
from fluxsae.records import Prompt, read_prompts


class GenerationRequest(NamedTuple):
    """One image to be made: its index in the capture, prompt, repetition of the prompt, and seed."""

    image: int
    prompt_id: int
    repetition: int
    seed: int
    prompt: str


class RequestBatch(NamedTuple):
    """Images made together. A batch lies within one shard, so it is the same for any number of processes."""

    requests: list[GenerationRequest]
    shard: int
    last_of_shard: bool


def image_seed(base_seed: int, image: int) -> int:
    """The seed of an image: the first 63 bits of the SHA-256 of `"<base_seed>:<image>"`.

    So seeds of neighbouring images, and of neighbouring base seeds, have nothing to do with one another.
    """
    return derived_seed(base_seed, image)


class Requests:
    """The batches of one process, in order: process r of w makes the shards j with j mod w = r.

    Not a DataLoader, which Lightning would give a sampler of its own when there are several processes.
    """

    def __init__(self, data: PromptData, rank: int, world_size: int) -> None:
        self._data = data
        self._shards = range(rank, data.n_shards, world_size)

    def __len__(self) -> int:
        return sum(math.ceil(self._data.samples(shard) / self._data.batch_size) for shard in self._shards)

    def __iter__(self) -> Iterator[RequestBatch]:
        for shard in self._shards:
            first = shard * self._data.images_per_shard
            end = first + self._data.samples(shard)
            for start in range(first, end, self._data.batch_size):
                stop = min(start + self._data.batch_size, end)
                yield RequestBatch([self._data.request(i) for i in range(start, stop)], shard, stop == end)


class PromptData(LightningDataModule):
    """The prompts of a capture or a steering run. Each prompt gives `repetitions` images, each with its own seed.

    Images are numbered prompt · repetitions + repetition.

    Args:
        prompts: a .txt, .jsonl or .csv file, see `fluxsae.read_prompts`.
        repetitions: number of images of each prompt.
        batch_size: number of images that are made together.
        images_per_shard: number of images in a shard.
        base_seed: decides the seeds of all images, together with the image's number.
        limit: use only the first `limit` prompts.
    """

    def __init__(
        self,
        prompts: Path,
        repetitions: int = 1,
        batch_size: int = 8,
        images_per_shard: int = 64,
        base_seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"repetitions": repetitions, "batch_size": batch_size, "images_per_shard": images_per_shard}
        for name, count in {**counts, **({} if limit is None else {"limit": limit})}.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1.")
        self.path = Path(prompts)
        self.repetitions = repetitions
        self.batch_size = batch_size
        self.images_per_shard = images_per_shard
        self.base_seed = base_seed
        self.limit = limit

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts taken; reads the file when first asked for, with the errors of `read_prompts`."""
        return read_prompts(self.path)[: self.limit]

    @property
    def n_images(self) -> int:
        return len(self.prompts) * self.repetitions

    @property
    def n_shards(self) -> int:
        return math.ceil(self.n_images / self.images_per_shard)

    def samples(self, shard: int) -> int:
        """How many images a shard holds; the last may hold fewer."""
        return min(self.images_per_shard, self.n_images - shard * self.images_per_shard)

    def request(self, image: int) -> GenerationRequest:
        prompt_id, repetition = divmod(image, self.repetitions)
        seed = image_seed(self.base_seed, image)
        return GenerationRequest(image, prompt_id, repetition, seed, self.prompts[prompt_id].text)

    def setup(self, stage: str) -> None:
        """ValueError, before any model is loaded, for a wrong file, or fewer shards than processes."""
        n_images, n_processes = self.n_images, 1 if self.trainer is None else self.trainer.world_size
        if 0 < self.n_shards < n_processes:
            raise ValueError(
                f"{n_processes} processes cannot share {n_images} images in {self.n_shards} shard(s) of "
                f"{self.images_per_shard}, as each makes whole shards; lower images_per_shard to "
                f"{max(1, n_images // n_processes)}, or use fewer processes."
            )

    def predict_dataloader(self) -> Requests:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Requests(self, rank, world_size)

    def test_dataloader(self) -> Requests:
        return self.predict_dataloader()
