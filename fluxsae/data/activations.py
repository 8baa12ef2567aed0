"""Streams captured tokens from shards.

Mixed across images for training, of held-out prompts for validation, whole images for scoring.
Legend: B batch (tokens in training and validation, images in prediction), T tokens an image, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fluxsae.data.image_loader import ImagesAhead, StoredImages
from fluxsae.data.mixing.order import WHOLE, Part
from fluxsae.data.mixing.tokens import Feed, MixedTokens
from fluxsae.data.split import Split, split_by_prompt
from fluxsae.records import CaptureSpec, Selection, Statistics
from fluxsae.runtime import EpochPosition, Processes, close_resumed_epoch, epoch_position
from fluxsae.shards import RowReader, ShardSet, TokenBlock

_ADVICE = (
    r"Your `IterableDataset` has `__len__` defined",  # ours counts what each worker yields
    r"The '\w+' does not have many workers",  # training reads with threads; the rest is memory-mapped
)
"""What Lightning warns of for any loader like these, and why it does not hold here."""


class TokenBatch(NamedTuple):
    """All tokens of some images, and the numbers of these images."""

    tokens: Float[Tensor, "B T D"]
    images: Int[Tensor, "B"]


class ActivationData(LightningDataModule):
    """The tokens of one shard set, for training, validation and scoring.

    A hash of a prompt's text decides whether the prompt is held out. So all its images are on the same side, in every
    run. With several processes, each trains on its share of the images, and all take the same number of steps. Images
    that the capture skipped are not read.

    Args:
        shards: folder of a set of tokens, for example `runs/tiny/capture/transformer_blocks.1.ff/step-03`.
        batch_size: number of tokens in a batch, in training, validation and testing.
        images_per_batch: number of images in a batch, in prediction.
        val_fraction: share of the prompts to hold out for validation and testing.
        buffer_images: the most images whose tokens are mixed at a time. An epoch is divided into equal parts, and there
            is memory for two of them.
        seed: decides the order of the training tokens, together with the epoch.
        num_workers: number of processes that read ahead in validation and testing.
        readers: number of threads that read ahead in training and prediction. By default 2, or 8 with a device buffer.
        device_buffer: whether to mix training tokens in the memory of a CUDA device. By default this happens if there
            is a device and the buffer takes at most half of its free memory. The order of tokens is the same.
        only: predict only the images that this selection shows.
    """

    def __init__(
        self,
        shards: Path,
        batch_size: int = 8192,
        images_per_batch: int = 64,
        val_fraction: float = 0.1,
        buffer_images: int = 1280,
        seed: int = 0,
        num_workers: int = 0,
        readers: int | None = None,
        device_buffer: bool | None = None,
        only: Selection | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("images_per_batch", images_per_batch), ("readers", readers)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1.")
        if buffer_images < 1 or not 0 < val_fraction < 1:
            raise ValueError(
                f"buffer_images is {buffer_images} and val_fraction {val_fraction}; "
                "expected at least 1 image, and a fraction between 0 and 1."
            )
        self.shards = Path(shards)
        self.batch_size = batch_size
        self.images_per_batch = images_per_batch
        self.val_fraction = val_fraction
        self.buffer_images = buffer_images
        self.seed = seed
        self.num_workers = num_workers
        self.readers = readers
        self.device_buffer = device_buffer
        self.only = only
        self.feed = Feed()
        self._mixed: MixedTokens | None = None

    @cached_property
    def shard_set(self) -> ShardSet:
        """The shards, opened when first asked for."""
        return ShardSet.open(self.shards, "tokens")

    @property
    def spec(self) -> CaptureSpec:
        return self.shard_set.spec

    @property
    def statistics(self) -> Statistics:
        return self.shard_set.statistics

    @property
    def d_in(self) -> int:
        return self.shard_set.statistics.mean.numel()

    @cached_property
    def split(self) -> Split:
        sides = split_by_prompt(self.shard_set.records, self.val_fraction)
        return Split(*([image for image in side if image not in self.shard_set.skipped] for side in sides))

    def setup(self, stage: str) -> None:
        """Open the shards before anything expensive starts, so that a wrong folder ends the run at once."""
        for advice in _ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        if not self.shard_set.with_tokens:
            raise ValueError(f"{self.shards} holds no images; capture some first.")
        if stage != "predict":
            self._check_shares(min(map(len, self.split)), "on one side of the split")
        elif self._part.of > 1:
            self._check_shares(len(self._predicted), "to predict")

    def _check_shares(self, n_images: int, where: str) -> None:
        if n_images < self._part.of:
            raise ValueError(
                f"{self._part.of} processes cannot share the {n_images} images {where} of {self.shards}; "
                "use fewer processes or capture more prompts."
            )

    def teardown(self, stage: str) -> None:
        """Give up what was read for an epoch that does not come."""
        if self._mixed is not None:
            self._mixed.close()

    def train_dataloader(self) -> DataLoader[TokenBlock]:
        """The training tokens as they are stored, which `on_after_batch_transfer` decodes."""
        if self.trainer is not None:
            close_resumed_epoch(self.trainer)
        device = self._device
        tokens = MixedTokens(
            self.shard_set,
            self.split.train,
            batch_size=self.batch_size,
            buffer_images=self.buffer_images,
            seed=self.seed,
            part=self._part,
            readers=self.readers or (2 if device is None else 8),
            device=device,
            feed=self.feed,
            last_epoch=self._last_epoch,
        )
        self._mixed = tokens
        return _ResumableLoader(
            tokens, position=self._position, pin_memory=device is None and torch.cuda.is_available()
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        share = self.split.held_out[self._part.rank :: self._part.of]
        return DataLoader(OrderedTokens(self.shard_set, share, self.batch_size), **self._loading)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[StoredImages]:
        """All images in order, or the selected ones, as they are stored, which `on_after_batch_transfer` decodes.

        With several processes, each takes one contiguous run of them.
        """
        images = self._predicted
        begin, end = (len(images) * (self._part.rank + i) // self._part.of for i in (0, 1))
        mine, readers = images[begin:end], self.readers or 2
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        ahead = ImagesAhead(self.shard_set, mine, self.images_per_batch, readers, pinned=pinned)
        return DataLoader(ahead, batch_size=None)

    def on_after_batch_transfer(
        self, batch: TokenBlock | Tensor | StoredImages, dataloader_idx: int
    ) -> Tensor | TokenBatch:
        """Decode stored tokens where they are used, so that fp8 travels there as it is stored."""
        if isinstance(batch, StoredImages):
            return TokenBatch(batch.tokens(), batch.images)
        return batch.decoded() if isinstance(batch, TokenBlock) else batch

    @property
    def _predicted(self) -> list[int]:
        return self.shard_set.with_tokens if self.only is None else self.only.images()

    @property
    def _part(self) -> Part:
        if self.trainer is None:
            return WHOLE
        processes = Processes.of(self.trainer)
        return Part(processes.rank, processes.n)

    @property
    def _last_epoch(self) -> int | None:
        """The last that the Trainer may come to, counted from 0; None where it may go on for ever."""
        if self.trainer is None:
            return 0
        return None if self.trainer.max_epochs in (None, -1) else self.trainer.max_epochs - 1

    @property
    def _device(self) -> torch.device | None:
        """The device that training tokens are mixed on, None for host memory. ValueError where none can be."""
        root = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if self.device_buffer and root.type != "cuda":
            raise ValueError(f"device_buffer is true but the training runs on {root}; it needs a CUDA device.")
        if self.device_buffer is None and root.type == "cuda":
            n_tokens = min(self.buffer_images, len(self.split.train)) * self.spec.n_tokens
            needed = 2 * RowReader(self.shard_set).format.n_bytes(n_tokens)
            return root if needed <= torch.cuda.mem_get_info(root)[0] // 2 else None
        return root if self.device_buffer else None

    def _position(self) -> EpochPosition:
        return EpochPosition(0, 0) if self.trainer is None else epoch_position(self.trainer)

    @property
    def _loading(self) -> dict[str, Any]:
        return {"batch_size": None, "num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}


class OrderedTokens(IterableDataset[Tensor]):
    """Batches [B, D] of the tokens of some images, in order; the last one may be smaller."""

    def __init__(self, shards: ShardSet, images: Sequence[int], batch_size: int) -> None:
        self.shards = shards
        self.images = list(images)
        self.images_per_batch = max(1, batch_size // shards.spec.n_tokens)

    def __len__(self) -> int:
        return -(-len(self.images) // self.images_per_batch)

    def __iter__(self) -> Iterator[Tensor]:
        for images in _chunks(self.images, self.images_per_batch):
            yield self.shards.tokens_batch(images).flatten(0, 1)


def _chunks(images: list[int], size: int) -> Iterator[list[int]]:
    """Chunks of `size`; in a worker process, every n-th, in which order the loader puts them together again."""
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
    for chunk in range(first, -(-len(images) // size), step):
        yield images[chunk * size : (chunk + 1) * size]


class _ResumableLoader(DataLoader[TokenBlock]):
    """Tells its dataset the epoch before each pass (Lightning does so for samplers only), and keeps its place.

    Lightning saves and restores the state of a loader that has one. The first pass after that goes on behind the
    batches that were done, without reading those.
    """

    def __init__(self, tokens: Dataset[TokenBlock], *, position: Callable[[], EpochPosition], pin_memory: bool) -> None:
        super().__init__(tokens, batch_size=None, pin_memory=pin_memory)
        self._position = position
        self._skip = 0

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, MixedTokens)
        self.dataset.epoch = self._position().epoch
        self.dataset.n_skipped, self._skip = self._skip, 0
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._position().batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches"]
