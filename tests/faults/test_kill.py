"""A stage that is killed and started again ends with the files of one that was not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fluxsae.data.activations import ActivationData
from fluxsae.sae import TopK
from fluxsae.training.module import SAETraining
from tests.faults.kill import STEPS_A_CHECKPOINT, Host, Stage, host, make_stages, read_diary, result, rounds, unbroken
from tests.synthetic import token_shards


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return make_stages(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host")) as process:
        yield process


@pytest.mark.parametrize("name", ["capture", "fit", "scores", "study"])
def test_two_kills(stages: dict[str, Stage], one: Host, tmp_path: Path, name: str) -> None:
    kill(stages[name], one, tmp_path, 2)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["capture", "fit", "scores", "study"])
def test_many_kills(stages: dict[str, Stage], one: Host, tmp_path: Path, name: str) -> None:
    kill(stages[name], one, tmp_path, 50)


def kill(stage: Stage, one: Host, folder: Path, kills: int) -> None:
    done = list(rounds(one, stage, unbroken(one, stage, folder / "unbroken"), folder, kills))
    assert [each.failure for each in done if each.failure] == []
    assert sum(each.n_kills for each in done) == kills


def test_a_training_killed_in_its_middle_goes_on_from_there(
    stages: dict[str, Stage], one: Host, tmp_path: Path
) -> None:
    stage, folder = stages["fit"], tmp_path / "killed"
    reference = unbroken(one, stage, tmp_path / "unbroken")
    n_steps = read_diary(tmp_path / "unbroken" / "diary.txt")[0].reached
    folder.mkdir()
    config, diary = folder.with_suffix(".yaml"), folder / "diary.txt"
    config.write_text(yaml.safe_dump(stage.config(folder)))

    def in_the_middle(_: float) -> float | None:
        return 0.0 if diary.exists() and f"ended {n_steps // 2}\n" in diary.read_text() else None

    assert one.run(["fit", "-c", str(config)], in_the_middle).code is None
    assert one.run(["fit", "-c", str(config), "--ckpt_path", "last"]).code == 0, one.log.read_text()[-3000:]
    killed, resumed = read_diary(diary)
    assert n_steps // 2 <= killed.reached < n_steps == resumed.reached
    assert resumed.began >= killed.reached - STEPS_A_CHECKPOINT
    assert result(stage, folder) == reference.files


class DieAt(Callback):
    """Ends the run at the start of a step, as a kill does: nothing is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_a_checkpoint_of_an_epochs_last_batch_goes_on_with_the_next(tmp_path: Path) -> None:
    """Killed several times, so that what a resumed run keeps is right as well."""
    shards = token_shards(tmp_path / "tokens", 10, 2, size=32).folder

    def fit(name: str, *callbacks: Callback, resume: str | None = None) -> SAETraining:
        torch.manual_seed(0)
        data = ActivationData(shards, batch_size=12)
        n_batches = len(data.train_dataloader())
        last = ModelCheckpoint(
            tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=n_batches, enable_version_counter=False
        )
        module = SAETraining(TopK(16, 24, 4), tmp_path / name / "sae", lr=5e-3, warmup_steps=4)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=6,
            callbacks=[last, *callbacks],
            check_val_every_n_epoch=2,
            **quiet,
        )
        trainer.fit(module, data, ckpt_path=resume)
        assert trainer.global_step == 6 * n_batches
        return module

    n_batches = len(ActivationData(shards, batch_size=12).train_dataloader())
    whole = fit("whole")
    for epochs in (1, 2, 4):
        with pytest.raises(RuntimeError, match="killed"):
            fit("broken", DieAt(epochs * n_batches + 1), resume="last" if epochs > 1 else None)
    resumed = fit("broken", resume="last")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
