"""Trains an SAE of any kind on captured tokens: for TopK as Gao et al. (2024), for L1 as Bricken et al. (2023) do.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fluxsae.data import ActivationData
from fluxsae.records import CaptureSpec, differences
from fluxsae.runtime import OneRunOnly, Processes
from fluxsae.sae import (
    L1,
    SAE,
    BatchTopK,
    Evaluation,
    Metrics,
    TopK,
    TrainOutput,
    add_rows,
    aux_error,
    average_gradients,
    batch_variance_explained,
    draw_directions,
    gather,
    resample,
    save_sae,
    shard,
    squared_errors,
    token_weights,
    whole,
)
from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import CHECKED, FusedStep, StepAdam, disagreement, why_not_fused

_logger = logging.getLogger(__name__)


class TrainedOnTokens(LightningModule):
    """A training that tests as it validates: on the held-out tokens."""

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


class SAETraining(TrainedOnTokens):
    """Minimises the squared error of normalised tokens, plus the SAE's own penalty, plus AuxK for dead features.

    Tokens are centred and scaled by the shards' statistics, which become part of the SAE; so b_dec, which starts at 0,
    starts at the data's mean. Decoder rows keep unit length. On the device, no step waits for the host.

    Args:
        sae: the autoencoder: `TopK`, `BatchTopK`, `L1` or `JumpReLU`.
        folder: where the trained SAE goes.
        lr: peak learning rate; by default 2e-4 / sqrt(F / 2^14), Gao et al.'s scaling law.
        betas: Adam's.
        warmup_steps: steps over which the learning rate rises from 0.
        decay_fraction: share of all steps, at the end, over which it falls to 0.
        sparsity_warmup_steps: steps over which the SAE's penalty (L1, JumpReLU) rises from 0.
        aux_k: dead features that explain the residual together; by default half of d_in, and 0 switches AuxK off.
        aux_coef: weight of the auxiliary error.
        dead_after: tokens without firing after which a feature counts as dead.
        revive: what each step adds to a dead feature's encoder bias, until it fires: so much of √(D / k), the size of a
            code where k rebuild a token. For kinds with a k; 0 switches it off.
        resample_every: steps between restarts of dead features; never by default.
        clip_tokens: a token's error pulls as one of this many mean lengths at most; 0 switches that off.
        check_every: steps between counts of the dead features (each waits for the device once).
        fused: whether steps are made by hand-made GPU kernels, by the same formulas: L1 and TopK in bf16-mixed
            precision on one NVIDIA GPU. By default they are where they can be, and agree with autograd's on the first
            batch; true refuses a run where they cannot or do not.
        fp8_encoder: multiply by W_enc as fp8 numbers (e4m3) in hand-made steps, on a GPU that has them, such as an
            H100; refused elsewhere. Weights, gradients and all other products stay as they are, and so does what the
            trained SAE does.
    """

    since_fired: Tensor
    tokens_seen: Tensor
    first_bad_step: Tensor

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
        revive: float = 0.02,
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
        self.aux_k = sae.d_in // 2 if aux_k is None else aux_k
        self.aux_coef = aux_coef
        self.dead_after = dead_after
        self.lift = revive * (sae.d_in / sae.k) ** 0.5 if isinstance(sae, TopK | BatchTopK) else 0.0
        self.resample_every = resample_every
        self.clip_tokens = clip_tokens
        self.check_every = check_every
        self.fused = fused
        self.fp8_encoder = fp8_encoder
        self.register_buffer("since_fired", torch.zeros(sae.n_features, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)
        self.n_steps = float("inf")
        self._dead: Tensor | None = None
        self._optimizer: StepAdam | None = None
        self._step: FusedStep | None = None
        self._unproven = False
        self._schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        self._name = ""
        self._log: Callable[..., None] = self.log
        self._evaluation: Evaluation | None = None
        self._metrics: tuple[int, Metrics] | None = None
        self._written = False

    def join(self, name: str, log: Callable[..., None]) -> None:
        """Become the member `name` of a sweep, which logs for it: Lightning lets only the module that it runs log."""
        self._name = name
        self._log = log

    def configure_callbacks(self) -> list[Callback]:
        return [OneRunOnly(self.folder)] if self.trainer.training else []

    def setup(self, stage: str) -> None:
        data = self._data
        if data is not None:
            self.sae.set_statistics(data.statistics, data.spec)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, spread the features over the processes."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.sae, self.trainer.strategy.device_mesh)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The reconstruction of raw tokens."""
        return self.sae(x)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._raise_if_not_finite()
        self.settle()
        checkpoint["capture_spec"] = self.sae.spec.to_dict() if self.sae.spec is not None else None
        checkpoint["dead"] = self._dead  # as counted at the last check: a resumed run must not count sooner

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError when the run to resume was training on another capture."""
        self._dead = checkpoint["dead"]
        values = checkpoint.get("capture_spec")
        if values is not None and self.sae.spec is not None:
            other = differences(CaptureSpec.from_dict(values), self.sae.spec)
            if other:
                raise ValueError(
                    f"the checkpoint was trained on another capture ({'; '.join(other)}); "
                    "name the shards that it was trained on, or start anew."
                )

    def on_train_start(self) -> None:
        # Not while the optimizer is configured: asking makes Lightning open the data, before a resumed run's place in
        # them is restored.
        self.n_steps = float(self.trainer.estimated_stepping_batches)
        self._step = self._fused_step()
        assert self._optimizer is not None
        self._optimizer.fused_step = self._step
        self._unproven = self._step is not None and not self._optimizer.state
        self._let_ddp_reduce(self._step is None)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        step = self.global_step
        if self.resample_every is not None and step > 0 and step % self.resample_every == 0:
            self._resample(batch)
        if self._dead is None or step % self.check_every == 0:
            self._raise_if_not_finite()
            self._dead = self._silent.nonzero().flatten()
        self._dead = self._dead.to(self.device)

    def training_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> Tensor:
        if self._unproven:
            self._prove(batch[:CHECKED])
        if self._step is not None:
            return self._train_fused(self._step, batch)
        x = self.sae.normalise(batch)
        run = self.sae.training_forward(x)
        loss = self._loss(x, run)
        self._count(run.fired, len(x))
        self.sae.remember(run, average=lambda value: self._processes.total(value) / self._processes.n)
        if self._logs_now:
            mse = (x - run.recon.detach()).square().mean()
            self._log_step(loss.detach(), mse, batch_variance_explained(x, run), run.l0)
        return loss

    def _train_fused(self, step: FusedStep, batch: Tensor) -> Tensor:
        assert self._dead is not None
        outcome = step.forward(batch, self._dead, self._penalty)
        if self._logs_now:
            self._log_step(outcome.loss, outcome.mse, step.variance_explained(), outcome.l0)
        return outcome.loss

    @property
    def _penalty(self) -> float:
        return self.sae.l1 * self._ramp(self.sparsity_warmup_steps) if isinstance(self.sae, L1) else 0.0

    def _prove(self, tokens: Tensor) -> None:
        """Go on by autograd where a fused step disagrees with it. RuntimeError where only a fused one will do."""
        assert self._step is not None and self._optimizer is not None
        held, self._dead = self._dead, torch.arange(0, self.sae.n_features, 16, device=self.device)  # as if they were
        x = self.sae.normalise(tokens)
        loss = self._loss(x, self.sae.training_forward(x))
        if not bool(self._total(loss.detach()).isfinite()):
            self._dead = held
            return
        why = disagreement(self._step, self._optimizer, tokens, self._dead, self._penalty, loss)
        self._dead, self._unproven = held, False
        if not bool(self._processes.anywhere(torch.tensor([why is not None], device=self.device))):
            return
        why = why or "another process found that it disagrees with autograd's"
        if self.fused:
            raise RuntimeError(f"fused is true, but {why}; leave fused out to train by autograd, and report this.")
        _logger.warning(f"training goes on by autograd, since {why}; please report this.")
        self._step.settle()
        self._step = self._optimizer.fused_step = None
        self._let_ddp_reduce(True)

    def _let_ddp_reduce(self, wanted: bool) -> None:
        """Whether DistributedDataParallel expects gradients of autograd's, and adds them up."""
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = wanted

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        if self._step is None:
            super().backward(loss, *arguments, **named)

    def _loss(self, x: Tensor, run: TrainOutput) -> Tensor:
        """(‖x - recon‖² + penalty + aux_coef · aux error) / D, a mean over tokens; errors with `token_weights`."""
        squared = squared_errors(x, run)
        weights = token_weights(squared, self.clip_tokens, self._total)
        loss = (weights * squared).mean() + self._ramp(self.sparsity_warmup_steps) * run.penalty
        assert self._dead is not None
        if self.aux_k > 0 and len(self._dead):
            error = (x - run.recon).detach()
            loss = loss + self.aux_coef * aux_error(self.sae, x, error, self._dead, self.aux_k, weights)
        return loss / self.sae.d_in

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Where the gradient is not finite, Adam leaves weights and moments as they are; no host is asked."""
        if self._step is not None:  # which sees to it itself
            return
        average_gradients(self.sae)
        self.sae.remove_parallel_gradient()
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        bad = ~whole(torch.nn.utils.get_total_norm(gradients)).isfinite()
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
        is_first = bad & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(is_first, self.global_step, self.first_bad_step))

    def _raise_if_not_finite(self) -> None:
        """FloatingPointError naming the first step whose gradient was NaN or infinite, and where that came from."""
        step = int(self.first_bad_step)
        if self._step is not None and (ago := self._step.steps_since_bad()) is not None:
            step = self.global_step - ago
        if step < 0:
            return
        shards = self._data.shard_set if self._data is not None else None
        where = shards.first_not_finite(range(len(shards))) if shards is not None else None
        why = where or f"all captured tokens are finite, so the training diverged: lower lr (now {self.lr:g})"
        whose = f"{self._name}: " if self._name else ""
        raise FloatingPointError(
            f"{whose}the gradient of step {step} was NaN or infinite; weights were left as they were, nothing was "
            f"saved since. {why[0].upper()}{why[1:]}; then go on from the last checkpoint."
        )

    def update(self) -> None:
        """One step of the optimizer and its schedule, as a Trainer makes it; for a sweep, which must make it itself."""
        assert self._optimizer is not None and self._schedule is not None
        self.on_before_optimizer_step(self._optimizer)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._after_step()
        self._schedule.step()

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self._after_step()  # here rather than at the end of the batch, when a checkpoint may already be written

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._step is None:
            self.sae.normalise_rows()
        else:
            self._note_fired(*self._step.seen)
        if self.lift:
            add_rows(self.sae.b_enc, self.lift * self._silent)

    def settle(self) -> None:
        """Between steps: bring weights up to date for whoever reads them, and take what others wrote."""
        if self._step is not None:
            self._step.settle()

    def _fused_step(self) -> FusedStep | None:
        """None where steps are autograd's. ValueError where a fused step is asked for and cannot be."""
        if self.fused is False:
            if self.fp8_encoder:
                raise ValueError("fp8_encoder is true, but fused is false; leave one of them out.")
            return None
        obstacle = why_not_fused(self.sae, self.trainer)
        if self._name and self._processes.n > 1:  # DistributedDataParallel either adds up all gradients or none
            obstacle = "it is one of a sweep's, in several processes"
        if obstacle is not None:
            asked = [name for name in ("fused", "fp8_encoder") if getattr(self, name)]
            if asked:
                raise ValueError(f"{asked[0]} is true, but {obstacle}; leave {asked[0]} out, or change that.")
            return None
        settings = Settings(
            self.betas,
            clip_tokens=self.clip_tokens,
            aux_k=self.aux_k,
            aux_coef=self.aux_coef,
            fp8_encoder=self.fp8_encoder,
        )
        return FusedStep(self.sae, settings, self._processes)

    def on_validation_epoch_start(self) -> None:
        self.settle()
        self._evaluation = Evaluation(self.sae.d_in, self.sae.n_features, self.device)

    def validation_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        assert self._evaluation is not None
        self._evaluation.update(self.sae, batch)

    def on_validation_epoch_end(self) -> None:
        metrics = self.conclude()
        # Not in the progress bar, whose line they would break. They are sums over processes already, the same in each.
        for name in ("fve", "mse", "l0", "dead_fraction"):
            self._log(self._key("val", name), getattr(metrics, name), sync_dist=True)
        if self.measured:
            self._log_histograms(metrics)

    def conclude(self) -> Metrics:
        """The metrics of the held-out tokens seen since `on_validation_epoch_start`, kept for the summary."""
        assert self._evaluation is not None
        metrics = self._evaluation.result(self._total)
        if not self.trainer.sanity_checking:
            self._metrics = (self.global_step, metrics)
        return metrics

    @property
    def measured(self) -> bool:
        """Whether the metrics are of the weights as they are now."""
        return self._metrics is not None and self._metrics[0] == self.global_step

    def on_train_end(self) -> None:
        self._write()

    def on_fit_end(self) -> None:
        """A run resumed from its last checkpoint has nothing left to train, and then Lightning ends no training."""
        if not self._written:
            self._write()

    def _write(self) -> None:
        """Write the SAE, with metrics of the weights as they are now."""
        self._raise_if_not_finite()
        self.settle()
        self._written = True
        if not self.measured and self._data is not None:
            measure([self], self._data)
        metrics = self._metrics[1] if self._metrics is not None else None
        sae = gather(self.sae)
        if self.trainer.is_global_zero:
            save_sae(self.folder, sae, self._summary(metrics))
            _logger.info("wrote the SAE to %s%s", self.folder, _told(metrics))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        self._optimizer = StepAdam(self.sae.parameters(), lr=self.lr, betas=self.betas, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: self._lr_factor(step))
        return {"optimizer": self._optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.n_steps
        fall = min(1.0, (self.n_steps - step) / decay_steps) if 0 < decay_steps < float("inf") else 1.0
        return min(rise, max(0.0, fall))

    def _ramp(self, steps: int) -> float:
        return min(1.0, self.global_step / steps) if steps > 0 else 1.0

    def _count(self, fired: Tensor, n_tokens: int) -> None:
        """Count over all processes, as replicas with other numbers would take others for dead."""
        if self._processes.n == 1:
            self._note_fired(fired, n_tokens)
        else:
            total = self._total(torch.cat([fired.int(), torch.full_like(fired[:1], n_tokens, dtype=torch.int32)]))
            self._note_fired(total[:-1], total[-1])

    def _note_fired(self, fired: Tensor, n_tokens: Tensor | int) -> None:
        self.since_fired.add_(n_tokens).masked_fill_(fired > 0, 0)
        self.tokens_seen.add_(n_tokens)

    @torch.no_grad()
    def _resample(self, batch: Tensor) -> None:
        dead = self._silent.nonzero().flatten()
        if len(dead) == 0:
            return
        self.settle()
        x = self.sae.normalise(batch)
        x, error = (self._processes.gather(rows) for rows in (x, x - self.sae.training_forward(x).recon))
        # A generator of the step's own: a resumed run, and every process, restarts features at the same tokens.
        generator = torch.Generator(self.device).manual_seed(self.global_step)
        assert self._optimizer is not None
        resample(self.sae, self._optimizer, dead, draw_directions(self.sae, x, error, len(dead), generator))
        self.settle()
        self.since_fired[dead] = 0
        self._dead = None
        _logger.info("step %d: restarted %d dead features", self.global_step, len(dead))

    @property
    def _logs_now(self) -> bool:
        """Whether Lightning writes at this step; others need not be measured."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined,no-any-return]

    def _log_step(self, loss: Tensor, mse: Tensor, fve: Tensor, l0: Tensor) -> None:
        for name, value in (("loss", loss), ("mse", mse), ("fve", fve.float()), ("l0", l0)):
            self._log(self._key("train", name), value.clone())  # a fused step writes to the same place again
        self._log(self._key("train", "dead_fraction"), self._dead_fraction())
        lr = self.lr * self._lr_factor(self.global_step)
        self._log(self._key("train", "lr"), torch.full((), lr, device=self.device))  # a float would wait for the device

    def _log_histograms(self, metrics: Metrics) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                board, step = logger.experiment, self.global_step
                board.add_histogram(self._key("val", "log10_density"), metrics.density.clamp_min(1e-6).log10(), step)
                board.add_histogram(self._key("val", "decoder_norm"), whole(self.sae.W_dec.norm(dim=1)), step)
                board.add_histogram(self._key("val", "encoder_norm"), whole(self.sae.W_enc.norm(dim=1)), step)

    def _summary(self, metrics: Metrics | None) -> dict[str, Any]:
        """What `config.json` tells of the training; the metrics are of the held-out prompts."""
        summary: dict[str, Any] = {
            "steps": self.global_step,
            "tokens_seen": int(self.tokens_seen),
            "train_dead_fraction": float(self._dead_fraction()),
            "dead_after": self.dead_after,
            "lr": self.lr,
        }
        if metrics is not None:
            summary["held_out"] = {name: value for name, value in metrics._asdict().items() if name != "density"}
        return summary

    def _key(self, part: str, name: str) -> str:
        return "/".join(filter(None, (part, self._name, name)))

    @property
    def _silent(self) -> Tensor:
        """Which features have not fired for `dead_after` tokens."""
        return self.since_fired > self.dead_after

    def _dead_fraction(self) -> Tensor:
        return self._silent.float().mean()

    def _total(self, sums: Tensor) -> Tensor:
        return self._processes.total(sums)

    @property
    def _processes(self) -> Processes:
        return Processes.of(self.trainer)

    @property
    def _data(self) -> ActivationData | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, ActivationData) else None


def measure(trainings: Sequence[SAETraining], data: ActivationData) -> None:
    """Measure the weights of some trainings as they are now, in one pass over the held-out tokens."""
    for training in trainings:
        training.on_validation_epoch_start()
    for batch in data.val_dataloader():
        for training in trainings:
            training.validation_step(batch.to(training.device), 0)
    for training in trainings:
        training.conclude()


def _told(metrics: Metrics | None) -> str:
    if metrics is None:
        return ""
    return f": FVE {metrics.fve:.3f} at L0 {metrics.l0:.1f}, {metrics.dead_fraction:.1%} dead, on held-out prompts"
