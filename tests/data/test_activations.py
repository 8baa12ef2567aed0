"""The token stream: what is held out, what comes in which order, and that nothing is lost or seen twice."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fluxsae.data.activations import ActivationData, MixedTokens, Part, split_by_prompt
from fluxsae.data.mixing.host import HostMixing
from fluxsae.records.features import Selection, update_features
from fluxsae.sae import TopK
from fluxsae.shards import SampleRecord, ShardSet
from fluxsae.shards.format import Storage
from fluxsae.shards.token_blocks import TokenBlock
from fluxsae.training.module import SAETraining
from tests.synthetic import records, token_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """24 images of 12 prompts, 16 tokens each, stored in float32 so that every token is unlike every other."""
    return token_shards(tmp_path_factory.mktemp("tokens"), 12, 2, storage="fp32")


def keys(batch: TokenBlock | Tensor) -> list[float]:
    """What tells one synthetic token from another."""
    return (batch.decoded() if isinstance(batch, TokenBlock) else batch)[:, 0].tolist()


def all_keys(shards: ShardSet, images: list[int]) -> Counter[float]:
    return Counter(keys(shards.tokens_batch(images).flatten(0, 1)))


def test_what_a_capture_skipped_is_on_neither_side(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 12, 2, storage="fp32", skipped=[0, 7, 8])
    data = ActivationData(tmp_path, batch_size=16, images_per_batch=5)
    data.setup("fit")
    assert sorted(data.split.train + data.split.held_out) == [i for i in range(24) if i not in (0, 7, 8)]
    assert sum((Counter(keys(batch)) for batch in data.train_dataloader()), Counter()) == all_keys(
        shards, data.split.train
    )
    predicted = [image for batch in data.predict_dataloader() for image in batch.images.tolist()]
    assert predicted == sorted(data.split.train + data.split.held_out)


@pytest.mark.parametrize(
    ("options", "n_streams"),
    [
        ({"max_epochs": 4}, 1),
        ({"max_epochs": 4, "val_check_interval": 0.5}, 1),
        ({"max_epochs": -1, "max_steps": 30}, 1),
        ({"max_epochs": 4, "limit_train_batches": 5}, 4),  # epochs that are given up
    ],
)
def test_a_trainers_epochs_are_one_stream(
    shards: ShardSet, tmp_path: Path, options: dict[str, Any], n_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, batches, n_threads = [], HostMixing.batches, threading.active_count()
    monkeypatch.setattr(HostMixing, "batches", lambda *arguments: streams.append(1) or batches(*arguments))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)
    data = ActivationData(shards.folder, batch_size=32, buffer_images=6)
    trainer.fit(SAETraining(TopK(16, 24, 4), tmp_path / "sae"), data)
    assert len(streams) == n_streams and threading.active_count() == n_threads


def test_a_set_of_skipped_images_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokens of all images .* so all were skipped"):
        token_shards(tmp_path, 2, 1, skipped=[0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_no_prompt_falls_on_both_sides(prompts: list[str], fraction: float) -> None:
    samples = [SampleRecord(i, i, 0, i, prompt) for i, prompt in enumerate(prompts)]
    if len(set(prompts)) < 2:
        with pytest.raises(ValueError, match="at least 2"):
            split_by_prompt(samples, fraction)
        return
    split = split_by_prompt(samples, fraction)
    assert sorted(split.train + split.held_out) == list(range(len(prompts)))
    sides = [{prompts[i] for i in side} for side in split]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_side_of_a_prompt_depends_on_its_text_alone() -> None:
    samples = records(200, 1)
    held_out = {samples[i].prompt for i in split_by_prompt(samples, 0.2).held_out}
    assert 20 <= len(held_out) <= 60
    some = [record for record in reversed(samples) if record.prompt_id % 2]
    again = {some[i].prompt for i in split_by_prompt(some, 0.2).held_out}
    assert again == held_out & {record.prompt for record in some}


@settings(max_examples=25, deadline=None)
@given(
    n_images=st.integers(1, 24),
    batch_size=st.integers(1, 100),
    buffer_images=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_each_token_comes_once_an_epoch(
    shards: ShardSet, n_images: int, batch_size: int, buffer_images: int, seed: int
) -> None:
    images = list(range(n_images))
    data = MixedTokens(shards, images, batch_size=batch_size, buffer_images=buffer_images, seed=seed)
    batches = list(data)
    assert len(batches) == len(data)
    sizes = [len(batch.tokens) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= batch_size
    assert Counter(key for batch in batches for key in keys(batch)) == all_keys(shards, images)


def test_the_order_follows_from_seed_and_epoch(shards: ShardSet) -> None:
    def order(seed: int, epoch: int) -> list[float]:
        data = MixedTokens(shards, range(24), batch_size=50, buffer_images=6, seed=seed)
        data.epoch = epoch
        return [key for batch in data for key in keys(batch)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_tokens_of_an_image_are_spread_over_batches(shards: ShardSet) -> None:
    data = MixedTokens(shards, range(24), batch_size=96, buffer_images=24)
    first = set(keys(next(iter(data))))
    touched = sum(bool(first & set(keys(shards.tokens(image)))) for image in range(24))
    assert touched > 18


def test_processes_share_the_images_and_end_together(shards: ShardSet) -> None:
    images = list(range(23))
    parts = [MixedTokens(shards, images, batch_size=40, part=Part(rank, 3)) for rank in range(3)]
    batches = [list(part) for part in parts]
    assert len({len(part) for part in batches}) == 1 == len({len(part) for part in parts})
    seen = Counter(key for part in batches for batch in part for key in keys(batch))
    assert max(seen.values()) == 1 and seen <= all_keys(shards, images)


def test_training_and_validation_part_the_tokens(shards: ShardSet) -> None:
    data = ActivationData(shards.folder, batch_size=64, val_fraction=0.3)
    data.setup("fit")
    train = Counter(key for batch in data.train_dataloader() for key in keys(batch))
    held_out = Counter(key for batch in data.val_dataloader() for key in keys(batch))
    assert not train & held_out and train + held_out == all_keys(shards, list(range(24)))
    assert data.d_in == 16 and data.spec == shards.spec and data.statistics.n_tokens == 24 * 16


class Keep(Callback):
    """Keeps the batches that a training is given."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.batches.append(batch.clone())


@pytest.mark.parametrize("storage", ["bf16", "fp32", "fp8"])
def test_a_training_is_given_what_was_captured(tmp_path: Path, storage: Storage) -> None:
    shards, keep = token_shards(tmp_path / "tokens", 12, 2, storage=storage), Keep()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
    )
    data = ActivationData(shards.folder, batch_size=50)
    trainer.fit(SAETraining(TopK(16, 24, 4), tmp_path / "sae"), data)
    assert Counter(key for batch in keep.batches for key in keys(batch)) == all_keys(shards, data.split.train)


def test_prediction_gives_every_image_in_order(shards: ShardSet) -> None:
    data = ActivationData(shards.folder, images_per_batch=5)
    batches = list(data.predict_dataloader())
    assert len(batches) == len(data.predict_dataloader()) == 5
    assert torch.cat([batch.images for batch in batches]).tolist() == list(range(24))
    assert torch.equal(batches[1].tokens()[2], shards.tokens(7))


def test_prediction_of_a_selection(shards: ShardSet, tmp_path: Path) -> None:
    table = tmp_path / "features.csv"
    update_features(table, {"alive": [True, True], "coherence": [0.5, 0.4], "top_images": ["3 9 1", "9 20"]})
    data = ActivationData(shards.folder, only=Selection(table, n_images=2))
    assert [batch.images.tolist() for batch in data.predict_dataloader()] == [[3, 9, 20]]


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"val_fraction": 1.0}, {"buffer_images": 0}, {"readers": 0}])
def test_impossible_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ActivationData(Path("anywhere"), **arguments)  # type: ignore[arg-type]


def test_a_missing_folder_ends_the_run_at_setup(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ActivationData(tmp_path / "nowhere").setup("fit")


def test_more_processes_than_held_out_images_are_refused(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ActivationData(shards.folder, val_fraction=0.1)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    n_held_out = len(data.split.held_out)
    for n in (n_held_out, n_held_out + 1):
        share = {"rank": 0, "num_replicas": n}
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda _, share=share: share))
        data.setup("predict")
        if n == n_held_out:
            data.setup("fit")
    with pytest.raises(ValueError, match=f"{n_held_out + 1} processes cannot share the {n_held_out} images"):
        data.setup("fit")
    share = {"rank": 0, "num_replicas": len(shards) + 1}
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda _: share))
    with pytest.raises(ValueError, match=f"processes cannot share the {len(shards)} images to predict"):
        data.setup("predict")
