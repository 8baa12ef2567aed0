"""Trains an SAE of any kind on captured tokens: for TopK as Gao et al. (2024), for L1 as Bricken et al. (2023) do.

A training holds four parts: the step that finds and applies gradients (`steps/`), the dead features, the log, and the
metrics of held-out tokens.
Legend: N tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fluxsae.data import ActivationData
from fluxsae.records import CaptureSpec, differences
from fluxsae.runtime import OneAllReduce, OneRunOnly, Processes
from fluxsae.sae import SAE, Metrics, class_path, gather, save_sae, shard
from fluxsae.training.dead_features import DeadFeatures, take_older_counts
from fluxsae.training.held_out import HeldOut
from fluxsae.training.protocols import SweepMember, TrainedOnTokens
from fluxsae.training.schedule import lr_factor
from fluxsae.training.steps import Objective, Outcome, RunFacts, StepAdam, TrainingStep, choose_step
from fluxsae.training.training_log import TrainingLog, at

_logger = logging.getLogger(__name__)


class SAETraining(SweepMember, TrainedOnTokens):
    """Minimises the squared error of normalised tokens, plus the SAE's own penalty, plus AuxK for dead features.

    Tokens are centred and scaled by the shards' statistics, which become part of the SAE. So a b_dec of 0 means the
    mean of the data. Decoder rows keep length 1. Run it with `fit`; `validate` measures the SAE in `folder`.

    Args:
        sae: the autoencoder, of any kind.
        folder: where the trained SAE goes, with its logs and checkpoints.
        lr: peak learning rate; by default 2e-4 / sqrt(F / 2^14), the scaling law of Gao et al. (2024).
        betas: Adam's betas.
        warmup_steps: number of steps over which the learning rate rises from 0.
        decay_fraction: share of all steps, at the end, over which the learning rate falls to 0.
        sparsity_warmup_steps: number of steps over which the SAE's penalty (L1, JumpReLU, Gated) rises from 0.
        aux_k: number of dead features that explain the residual of a token together (AuxK). By default half of d_in; 0
            switches AuxK off.
        aux_coef: weight of the auxiliary error.
        dead_after: a feature is dead when it has not fired for more than this many tokens.
        dead_bias_increment: what each step adds to the encoder bias of a dead feature until it fires, in units of
            √(D / k). That is the size of a code when k codes rebuild a token. Kinds without `expected_l0` ignore it,
            and 0 switches it off.
        resample_every: number of steps between restarts of dead features; never by default.
        clip_tokens: each token's error norm is clipped to this many times the batch mean; 0 switches that off.
        check_every: number of steps between counts of dead features. Each count waits for the device once.
        fused: whether to train by fused steps, which are Triton kernels with the same formulas. They serve L1 and TopK
            in bf16-mixed precision on NVIDIA GPUs. By default they are used where they can be, and if they agree with
            autograd on the first tokens. True refuses a run without them, and false never uses them.
        fp8_encoder: multiply by W_enc in fp8 (e4m3) in fused steps. It needs a GPU with fp8, such as an H100, and is
            refused elsewhere. Weights, gradients and all other products keep their precision. The trained SAE does not
            use fp8.
    """

    def __init__(
        self,
        sae: SAE,
        folder: Path,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 100,
        decay_fraction: float = 0.3,
        sparsity_warmup_steps: int = 500,
        aux_k: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 200_000,
        dead_bias_increment: float = 0.02,
        resample_every: int | None = None,
        clip_tokens: float = 10.0,
        check_every: int = 50,
        fused: bool | None = None,
        fp8_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.folder = Path(folder)
        self.lr = lr if lr is not None else 2e-4 / (sae.n_features / 2**14) ** 0.5
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.decay_fraction = decay_fraction
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self.objective = Objective(clip_tokens, sae.d_in // 2 if aux_k is None else aux_k, aux_coef)
        code_size = (sae.d_in / sae.expected_l0) ** 0.5 if sae.expected_l0 is not None else 0.0
        self.dead_features = DeadFeatures(sae.n_features, dead_after, dead_bias_increment * code_size)
        self.resample_every = resample_every
        self.check_every = check_every
        self.fused = fused
        self.fp8_encoder = fp8_encoder
        self.n_steps = float("inf")
        self.held_out = HeldOut()
        self.records = TrainingLog(self.log)
        self._step: TrainingStep | None = None
        self.optimizer: StepAdam
        self.schedule: torch.optim.lr_scheduler.LRScheduler
        self._written = False

    def configure_callbacks(self) -> list[Callback]:
        return [OneRunOnly(self.folder)] if self.trainer.training else []

    def setup(self, stage: str) -> None:
        class_path(type(self.sae))  # a kind that no one could load should not be trained first
        if self._data is not None:
            self.sae.set_statistics(self._data.statistics, self._data.spec)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, spread the features over the processes."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.sae, self.trainer.strategy.device_mesh)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The reconstruction of raw tokens."""
        return self.sae(x)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._raise_if_not_finite()
        self.synchronize_weights()
        checkpoint["capture_spec"] = self.sae.spec.to_dict() if self.sae.spec is not None else None
        checkpoint["dead"] = self.dead_features.features  # as last counted: a resumed run must not count sooner

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError when the run to resume was training on another capture."""
        self.dead_features.features = checkpoint["dead"]
        refuse_another_capture(checkpoint.get("capture_spec"), self.sae.spec)

    def on_train_start(self) -> None:
        # Not while the optimizer is configured: asking makes Lightning open the data, before a resumed run's place in
        # them is restored.
        self.n_steps = float(self.trainer.estimated_stepping_batches)
        run = run_facts(self.trainer, in_sweep=bool(self.records.member))
        self._step = choose_step(
            self.sae, self.objective, self.optimizer, self._processes, run, self.fused, self.fp8_encoder
        )
        self._let_ddp_average()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        step, dead = self.global_step, self.dead_features
        if self.resample_every is not None and step > 0 and step % self.resample_every == 0:
            self.synchronize_weights()
            dead.restart(self.sae, self.optimizer, batch, self._processes, seed=step)
            self.synchronize_weights()
        if dead.features is None or step % self.check_every == 0:
            self._raise_if_not_finite()
            dead.check()
        assert dead.features is not None
        dead.features = dead.features.to(self.device)

    def training_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> Tensor:
        assert self.dead_features.features is not None
        outcome = self._making.forward(batch, self.dead_features.features, self._penalty_ramp)
        self._let_ddp_average()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_step(outcome)
        return outcome.loss

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        self._making.backward(loss, *arguments, **named)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._making.finish_gradients(self.optimizer)

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self.after_optimizer_step()  # rather than at the end of the batch, when a checkpoint may already be written

    def after_optimizer_step(self) -> None:
        self.dead_features.after_step(self.sae, *self._making.fired())

    def synchronize_weights(self) -> None:
        """Between steps: bring weights up to date before others read them, and take over what others wrote."""
        if self._step is not None:
            self._step.synchronize_weights()

    def on_validation_epoch_start(self) -> None:
        self.synchronize_weights()
        self.held_out.begin(self.sae)

    def validation_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        self.held_out.update(self.sae, batch)

    def on_validation_epoch_end(self) -> None:
        metrics = self.end_measuring()
        self.records.validation(metrics)
        if self.measured:
            self.records.histograms(self.loggers, self.sae, metrics, self.global_step)

    def end_measuring(self) -> Metrics:
        """The metrics of the held-out tokens seen since `on_validation_epoch_start`, kept for the summary."""
        step = None if self.trainer.sanity_checking else self.global_step
        return self.held_out.end(self._processes.all_reduce, step)

    @property
    def measured(self) -> bool:
        """Whether the metrics are of the weights as they are now."""
        return self.held_out.is_of(self.global_step)

    def on_train_end(self) -> None:
        self._write()

    def on_fit_end(self) -> None:
        """A run resumed from its last checkpoint has nothing left to train, and then Lightning ends no training."""
        if not self._written:
            self._write()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        self.optimizer = StepAdam(self.sae.parameters(), lr=self.lr, betas=self.betas, fused=True)
        # A function by itself: torch would save a method's own attributes in every checkpoint.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self._lr_factor(step))
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.n_steps, self.warmup_steps, self.decay_fraction)

    @property
    def _making(self) -> TrainingStep:
        assert self._step is not None
        return self._step

    @property
    def _penalty_ramp(self) -> float:
        return min(1.0, self.global_step / self.sparsity_warmup_steps) if self.sparsity_warmup_steps > 0 else 1.0

    def _let_ddp_average(self) -> None:
        """DistributedDataParallel expects gradients to average only from a step that leaves them to it."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = self._making.gradients_by_autograd

    def _log_step(self, outcome: Outcome) -> None:
        lr = at(self.lr * self._lr_factor(self.global_step), self.device)
        measured = outcome.measure()._asdict()
        more = {"dead_fraction": self.dead_features.fraction, "lr": lr}
        self.records.step({"loss": outcome.loss.detach(), **measured, **more})

    def _raise_if_not_finite(self) -> None:
        """FloatingPointError naming the first step whose gradient was NaN or infinite, and where that came from."""
        ago = None if self._step is None else self._step.updates_since_bad()
        if ago is not None:
            raise not_finite(self.global_step - ago, self._data, self.lr, self.records.member)

    def _write(self) -> None:
        """Write the SAE, with metrics of the weights as they are now."""
        self._raise_if_not_finite()
        self.synchronize_weights()
        self._written = True
        if not self.measured and self._data is not None:
            measure([self], self._data)
        sae = gather(self.sae)
        if self.trainer.is_global_zero:
            save_sae(self.folder, sae, summary(self))
            _logger.info("wrote the SAE to %s: %s", self.folder, self.held_out)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        take_older_counts(state_dict, prefix, f"{prefix}dead_features.")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def _processes(self) -> Processes:
        return Processes.of(self.trainer)

    @property
    def _data(self) -> ActivationData | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, ActivationData) else None


def run_facts(trainer: Trainer, in_sweep: bool = False) -> RunFacts:
    """What a training step needs to know of a Trainer's run."""
    strategy = trainer.strategy
    return RunFacts(
        precision=str(trainer.precision),
        n_processes=trainer.world_size,
        bf16_gradients=isinstance(strategy, OneAllReduce) and strategy.compress,
        n_accumulated=trainer.accumulate_grad_batches,
        clips_gradients=bool(trainer.gradient_clip_val),
        in_sweep=in_sweep,
    )


def refuse_another_capture(values: dict[str, Any] | None, spec: CaptureSpec | None) -> None:
    """ValueError when a checkpoint that recorded one spec is to go on with another."""
    other = differences(CaptureSpec.from_dict(values), spec) if values is not None and spec is not None else []
    if other:
        raise ValueError(
            f"the checkpoint was trained on another capture ({'; '.join(other)}); "
            "name the shards that it was trained on, or start anew."
        )


def not_finite(step: int, data: ActivationData | None, lr: float, member: str) -> FloatingPointError:
    """What to raise about a step whose gradient was NaN or infinite: it says where that came from."""
    where = data.shard_set.first_not_finite(range(len(data.shard_set))) if data is not None else None
    why = where or f"all captured tokens are finite, so the training diverged: lower lr (now {lr:g})"
    whose = f"{member}: " if member else ""
    return FloatingPointError(
        f"{whose}the gradient of step {step} was NaN or infinite; weights were left as they were, nothing was "
        f"saved since. {why[0].upper()}{why[1:]}; then go on from the last checkpoint."
    )


def summary(training: SAETraining) -> dict[str, Any]:
    """What `config.json` tells of a training; the metrics are of the held-out prompts."""
    dead, held_out = training.dead_features, training.held_out.summary()
    return {
        "steps": training.global_step,
        "tokens_seen": int(dead.tokens_seen),
        "train_dead_fraction": float(dead.fraction),
        "dead_after": dead.dead_after,
        "lr": training.lr,
    } | ({"held_out": held_out} if held_out else {})


def measure(trainings: Sequence[SAETraining], data: ActivationData) -> None:
    """Measure the weights of some trainings as they are now, in one pass over the held-out tokens."""
    for training in trainings:
        training.on_validation_epoch_start()
    for batch in data.val_dataloader():
        for training in trainings:
            training.validation_step(batch.to(training.device), 0)
    for training in trainings:
        training.end_measuring()
