"""Fits through the Trainer, on tokens of a known sparse dictionary."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fluxsae.data.activations import ActivationData
from fluxsae.files.tables import read_csv
from fluxsae.runtime.interrupts import LastCheckpoint
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK, load_sae
from fluxsae.sae.checkpoint import read_config
from fluxsae.shards.read import ShardSet
from fluxsae.training.module import SAETraining
from tests.synthetic import dictionary, token_shards

D_IN, N_TRUE = 16, 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    token_shards(folder, 40, 3, size=128, d_in=D_IN, images_per_shard=32, source=dictionary(D_IN, N_TRUE, active=2.0))
    return folder


def data(shards: Path) -> ActivationData:
    return ActivationData(shards, batch_size=256, val_fraction=0.2)


def trainer(folder: Path, epochs: int, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": epochs,
        "default_root_dir": folder,
    }
    return Trainer(**{**settings, **changes})


def topk(folder: Path, **changes: Any) -> SAETraining:
    torch.manual_seed(1)  # not the seed of `dictionary`, which would start at the answer
    settings: dict[str, Any] = {"lr": 5e-3, "warmup_steps": 10, "dead_after": 5000}
    return SAETraining(TopK(D_IN, 48, 4), folder / "sae", **{**settings, **changes})


def test_topk_learns_the_dictionary(shards: Path, tmp_path: Path) -> None:
    trainer(tmp_path, 24).fit(topk(tmp_path, lr=1e-2), datamodule=data(shards))
    sae, held_out = load_sae(tmp_path / "sae"), read_config(tmp_path / "sae")["training"]["held_out"]
    assert held_out["fve"] > 0.95 and held_out["l0"] <= 4 and held_out["dead_fraction"] <= 0.1
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)
    true = dictionary(D_IN, N_TRUE, active=2.0).directions
    found = (true @ sae.directions.T).amax(dim=1)
    assert float(found[:8].min()) > 0.85


def test_what_it_was_trained_on_travels_with_the_sae(shards: Path, tmp_path: Path) -> None:
    stream = data(shards)
    trainer(tmp_path, 1).fit(topk(tmp_path), datamodule=stream)
    sae = load_sae(tmp_path / "sae")
    assert sae.spec == stream.spec and sae.mean_norm == stream.statistics.mean_norm
    assert torch.allclose(sae.mean.double(), stream.statistics.mean, atol=1e-6)
    assert float(sae.scale) == pytest.approx(stream.statistics.scale)


def test_the_summary_is_of_the_final_weights_over_all_held_out_tokens(shards: Path, tmp_path: Path) -> None:
    stream = data(shards)
    trainer(tmp_path, 3, max_steps=50, check_val_every_n_epoch=1).fit(topk(tmp_path), datamodule=stream)
    sae, summary = load_sae(tmp_path / "sae"), read_config(tmp_path / "sae")["training"]
    x = torch.cat(list(stream.val_dataloader())).double()
    recon = sae(x.float()).detach().double()
    expected = 1 - float((x - recon).square().sum() / (x - x.mean(dim=0)).square().sum())
    assert summary["steps"] == 50 and summary["held_out"]["n_tokens"] == len(x)
    assert summary["held_out"]["fve"] == pytest.approx(expected, abs=1e-5)


def test_l1_trains_and_a_larger_penalty_is_sparser(shards: Path, tmp_path: Path) -> None:
    held_out = []
    for penalty in (0.3, 3.0):
        torch.manual_seed(1)  # not the seed of `dictionary`, which would start at the answer
        module = SAETraining(L1(D_IN, 48, penalty), tmp_path / str(penalty), lr=5e-3, warmup_steps=10, aux_k=0)
        trainer(tmp_path, 8).fit(module, datamodule=data(shards))
        held_out.append(read_config(tmp_path / str(penalty))["training"]["held_out"])
    assert held_out[0]["fve"] > 0.9
    assert held_out[1]["l0"] < 0.7 * held_out[0]["l0"]


def learn(sae: SAE, shards: Path, folder: Path, epochs: int = 12, **changes: Any) -> dict[str, Any]:
    """The held-out metrics after a training."""
    settings: dict[str, Any] = {"lr": 5e-3, "warmup_steps": 10, "dead_after": 5000, "sparsity_warmup_steps": 50}
    trainer(folder, epochs).fit(SAETraining(sae, folder, **{**settings, **changes}), datamodule=data(shards))
    held_out: dict[str, Any] = read_config(folder)["training"]["held_out"]
    return held_out


def test_batch_topk_learns_and_keeps_about_k_a_token_in_inference(shards: Path, tmp_path: Path) -> None:
    held_out = learn(BatchTopK(D_IN, 48, 4, seed=1), shards, tmp_path)
    assert held_out["fve"] > 0.9 and held_out["dead_fraction"] <= 0.05
    assert held_out["l0"] == pytest.approx(4, rel=0.15)
    assert float(load_sae(tmp_path).threshold) > 0


def test_jumprelu_learns_and_a_larger_penalty_is_sparser(shards: Path, tmp_path: Path) -> None:
    few, many = (learn(JumpReLU(D_IN, 48, l0, seed=1), shards, tmp_path / str(l0), aux_k=0) for l0 in (1.0, 0.1))
    assert many["fve"] > 0.9 and few["fve"] > 0.75
    assert few["l0"] < 0.7 * many["l0"]


def test_jumprelu_comes_near_its_target(shards: Path, tmp_path: Path) -> None:
    sae = JumpReLU(D_IN, 48, 10.0, target_l0=4.0, seed=1)
    held_out = learn(sae, shards, tmp_path, epochs=24, aux_k=0)
    assert held_out["l0"] == pytest.approx(4, rel=0.15) and held_out["fve"] > 0.9


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_a_prefix_of_a_matryoshka_sae_explains_more_than_one_of_a_plain_sae(
    shards: Path, tmp_path: Path, kind: type[TopK] | type[BatchTopK]
) -> None:
    explained = []
    x = torch.cat(list(data(shards).val_dataloader()))
    for groups in (None, [8, 16, 48]):
        folder = tmp_path / str(groups)
        assert learn(kind(D_IN, 48, 4, groups=groups, seed=1), shards, folder)["fve"] > 0.85
        sae = load_sae(folder)
        codes = sae.encode(x)
        codes[:, 8:] = 0
        explained.append(1 - float((x - sae.decode(codes)).square().sum() / (x - x.mean(dim=0)).square().sum()))
    assert explained[1] > explained[0] + 0.1


class WatchRows(Callback):
    """Asserts what must hold at every step: unit rows, and no gradient along them."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        sae = pl_module.sae
        assert isinstance(sae, SAE) and sae.W_dec.grad is not None
        assert torch.allclose(sae.W_dec.detach().norm(dim=1), torch.ones(sae.n_features), atol=1e-5)
        # Callbacks come before the module's own hook, so the gradient is still as it was; the module does the same.
        sae.remove_parallel_gradient()
        assert float((sae.W_dec.grad * sae.W_dec.detach()).sum(dim=1).abs().max()) < 1e-5


def test_rows_have_unit_length_at_every_step(shards: Path, tmp_path: Path) -> None:
    trainer(tmp_path, 1, callbacks=[WatchRows()]).fit(topk(tmp_path), datamodule=data(shards))


@pytest.mark.parametrize(("increment", "alive"), [(0.05, 20), (0.0, 0)])
def test_dead_features_are_lifted_until_they_fire(shards: Path, tmp_path: Path, increment: float, alive: int) -> None:
    module = topk(tmp_path, dead_bias_increment=increment, dead_after=1000, aux_k=0)
    with torch.no_grad():
        module.sae.b_enc[:20] = -2.0  # these do not fire by themselves
    stream = data(shards)
    trainer(tmp_path, 6).fit(module, datamodule=stream)
    codes = load_sae(tmp_path / "sae").encode(torch.cat([batch.decoded() for batch in stream.train_dataloader()]))
    fired = int((codes[:, :20] > 0).any(dim=0).sum())
    assert fired >= 0.8 * alive if alive else fired == 0


def test_dead_features_are_counted_and_restarted(shards: Path, tmp_path: Path) -> None:
    module = topk(tmp_path, resample_every=30, dead_after=2000, aux_k=0)
    with torch.no_grad():
        module.sae.b_enc[:20] = -100.0  # these cannot fire
    stream = data(shards)
    trainer(tmp_path, 6).fit(module, datamodule=stream)
    assert float(module.sae.b_enc.detach()[:20].min()) > -10
    codes = load_sae(tmp_path / "sae").encode(torch.cat([batch.decoded() for batch in stream.train_dataloader()]))
    assert float((codes[:, :20] > 0).any(dim=0).float().mean()) > 0.8


class StopAt(Callback):
    """Ends the run after so many steps, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


N_STEPS = 21  # an epoch: the 84 images of training prompts, of 64 tokens, in batches of 256


def fit_kept(
    shards: Path, folder: Path, *callbacks: Callback, every: int = 50, resume: bool = False, **changes: Any
) -> SAETraining:
    """A training that looks for a checkpoint at the end of every epoch and of `every` steps, and writes it."""
    sae = changes.pop("sae", TopK(D_IN, 48, 4, seed=1))
    restarts: dict[str, Any] = {"dead_after": 2000, "resample_every": 15}
    module = SAETraining(copy.deepcopy(sae), folder / "sae", lr=5e-3, warmup_steps=10, **restarts)
    last = LastCheckpoint(folder / "checkpoints", minutes=0.0, every_n_steps=every)
    settings = {"enable_checkpointing": True, "check_val_every_n_epoch": 1, "callbacks": [last, *callbacks]}
    session = trainer(folder, 4, **{**settings, **changes})
    session.fit(module, datamodule=data(shards), ckpt_path="last" if resume else None)
    return module


def assert_same(one: LightningModule, other: LightningModule) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("step", "every", "sae"),
    [
        (N_STEPS, 50, TopK(D_IN, 48, 4, seed=1)),
        (2 * N_STEPS, 50, TopK(D_IN, 48, 4, seed=1)),
        (36, 12, TopK(D_IN, 48, 4, seed=1)),
        (40, 50, TopK(D_IN, 48, 4, seed=1)),
        (36, 12, BatchTopK(D_IN, 48, 4, seed=1)),
        (36, 12, JumpReLU(D_IN, 48, seed=1)),
        (36, 12, L1(D_IN, 48, seed=1, groups=[12, 48])),
    ],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    shards: Path, tmp_path: Path, step: int, every: int, sae: SAE
) -> None:
    whole = fit_kept(shards, tmp_path / "whole", every=every, sae=sae)
    broken = fit_kept(shards, tmp_path / "broken", StopAt(step), every=every, sae=sae)
    resumed = fit_kept(shards, tmp_path / "broken", every=every, sae=sae, resume=True)
    assert (broken.global_step, resumed.global_step, whole.global_step) == (step, 4 * N_STEPS, 4 * N_STEPS)
    assert_same(whole, resumed)


class KillAt(Callback):
    """Ends the run at the start of a step, as a kill does: nothing is saved. Knows where the run began."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.began = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    "validation",
    [{}, {"check_val_every_n_epoch": 5}, {"val_check_interval": 7}, {"limit_val_batches": 0}, {"max_steps": 70}],
)
def test_a_killed_run_goes_on_from_the_epoch_or_the_steps_before(
    shards: Path, tmp_path: Path, validation: dict[str, Any]
) -> None:
    whole, again = fit_kept(shards, tmp_path / "whole", **validation), KillAt()
    for step in (N_STEPS + 1, 2 * N_STEPS + 8, 55):
        with pytest.raises(RuntimeError, match="killed"):
            fit_kept(shards, tmp_path / "broken", KillAt(step), resume=step > N_STEPS + 1, **validation)
    resumed = fit_kept(shards, tmp_path / "broken", again, resume=True, **validation)
    assert again.began == 50
    assert_same(whole, resumed)


def test_a_finished_training_can_be_made_longer(shards: Path, tmp_path: Path) -> None:
    again = KillAt()
    fit_kept(shards, tmp_path, max_epochs=2)
    longer = fit_kept(shards, tmp_path, again, resume=True)
    assert (again.began, longer.global_step) == (2 * N_STEPS, 4 * N_STEPS)


def test_a_checkpoint_of_another_capture_is_refused(shards: Path, tmp_path: Path) -> None:
    module = topk(tmp_path)
    module.sae.set_statistics(data(shards).statistics, data(shards).spec)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    checkpoint["capture_spec"]["step"] = 1
    with pytest.raises(ValueError, match="step: 1 != 2"):
        module.on_load_checkpoint(checkpoint)


def test_what_is_logged(shards: Path, tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="csv", version=0), TensorBoardLogger(tmp_path, name="board", version=0)]
    trainer(tmp_path, 2, logger=loggers).fit(topk(tmp_path), datamodule=data(shards))
    rows = read_csv(tmp_path / "csv" / "version_0" / "metrics.csv")
    train = [row for row in rows if row["train/fve"]]
    assert len(train) >= 2 and float(train[-1]["train/fve"]) > float(train[0]["train/fve"])
    assert set(rows[0]) >= {
        *("train/loss", "train/mse", "train/fve", "train/l0", "train/dead_fraction", "train/lr"),
        *("val/fve", "val/mse", "val/l0", "val/dead_fraction"),
    }
    assert list((tmp_path / "board" / "version_0").glob("events*"))


def test_nothing_makes_the_progress_bar_break_its_line(shards: Path, tmp_path: Path) -> None:
    session = trainer(tmp_path, 1)
    session.fit(topk(tmp_path), datamodule=data(shards))
    assert session.progress_bar_metrics == {} and "val/fve" in session.callback_metrics


def test_a_wrong_width_ends_in_a_sentence(shards: Path, tmp_path: Path) -> None:
    module = SAETraining(TopK(D_IN + 1, 48, 4), tmp_path)
    with pytest.raises(ValueError, match=f"set d_in to {D_IN}"):
        trainer(tmp_path, 1).fit(module, datamodule=data(shards))


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    module = topk(tmp_path, warmup_steps=10, decay_fraction=0.2)
    assert module._lr_factor(10**6) == 1.0  # a run without end
    module.n_steps = 100.0
    factors = [module._lr_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.5) and factors[100] == 0.0


def test_a_run_stopped_after_its_last_checkpoint_still_leaves_its_sae(shards: Path, tmp_path: Path) -> None:
    def fit(name: str, resume: str | None = None) -> SAETraining:
        module = topk(tmp_path / name)
        kept = LastCheckpoint(tmp_path / "kept")
        changes = {"enable_checkpointing": True, "callbacks": [kept]}
        trainer(tmp_path, 2, **changes).fit(module, datamodule=data(shards), ckpt_path=resume)
        return module

    whole = fit("whole")
    fit("resumed", resume="last")  # nothing is left to train
    assert torch.equal(load_sae(tmp_path / "resumed/sae").W_dec, whole.sae.W_dec)
    assert read_config(tmp_path / "resumed/sae")["training"] == read_config(tmp_path / "whole/sae")["training"]


def rotten(shards: Path, copy: Path, value: float) -> tuple[Path, int]:
    """A copy of the shards in which one number of an image has rotted, and which image."""
    image = data(shards).split.train[20]
    tokens = ShardSet.open(shards).tokens(image).bfloat16()
    before = tokens.view(torch.uint8).numpy().tobytes()
    tokens[1, 2] = value
    shutil.copytree(shards, copy)
    for tar in copy.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(before, tokens.view(torch.uint8).numpy().tobytes()))
    return copy, image


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["TopK", "L1", "BatchTopK", "JumpReLU"])
def test_every_kind_learns_in_every_precision(shards: Path, tmp_path: Path, kind: str, precision: str) -> None:
    sae = {
        "TopK": TopK(D_IN, 48, 4, seed=0), "L1": L1(D_IN, 48, 0.1, seed=0),
        "BatchTopK": BatchTopK(D_IN, 48, 4, seed=0), "JumpReLU": JumpReLU(D_IN, 48, 0.1, seed=0),
    }[kind]  # fmt: skip
    one = trainer(tmp_path, 4, precision=precision)
    one.fit(SAETraining(sae, tmp_path / "sae", lr=5e-3, warmup_steps=10, dead_after=5000), datamodule=data(shards))
    assert one.callback_metrics["val/fve"] > 0.4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_run_and_harms_nothing(shards: Path, tmp_path: Path, value: float) -> None:
    folder, image = rotten(shards, tmp_path / "shards", value)
    module = topk(tmp_path, check_every=7)
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, every_n_train_steps=1, save_top_k=0)
    with pytest.raises(FloatingPointError, match=rf"Image {image} in .*shard-\d+.tar .*delete that file") as told:
        trainer(tmp_path, 3, callbacks=[keep], enable_checkpointing=True).fit(module, datamodule=data(folder))
    step = int(str(told.value).split("gradient of step ")[1].split()[0])
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert step > 0 and last["global_step"] == step  # the steps before it, and no more
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert not (tmp_path / "sae").exists()


def test_a_bad_step_is_noticed_without_a_checkpoint_too(shards: Path, tmp_path: Path) -> None:
    module = topk(tmp_path, check_every=4)

    class Spoil(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 5:
                module.sae.W_dec.grad[3, 1] = float("inf")  # type: ignore[index]

    with pytest.raises(
        FloatingPointError, match=r"step 5 was .*All captured tokens are finite.* lower lr \(now 0.005\)"
    ):
        trainer(tmp_path, 3, callbacks=[Spoil()]).fit(module, datamodule=data(shards))
    assert module.global_step == 8
