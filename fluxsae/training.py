"""Trains an SAE on captured tokens: for TopK as Gao et al. (2024), for L1 as Bricken et al. (2023) do.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from fluxsae.activations import ActivationData
from fluxsae.one_run import OneRunOnly
from fluxsae.sae.checkpoint import save_sae
from fluxsae.sae.coder import SAE, Pass
from fluxsae.sae.dead import aux_error, draw_directions, resample
from fluxsae.sae.evaluation import Evaluation, Metrics, batch_variance_explained
from fluxsae.spec import CaptureSpec, differences

_log = logging.getLogger(__name__)


class SAETraining(LightningModule):
    """Minimises the squared error of normalised tokens, plus the SAE's own penalty, plus AuxK for dead features.

    Tokens are centred and scaled by the shards' statistics, which become part of the SAE; so b_dec, which starts at 0,
    starts at the data's mean. Decoder rows keep unit length. On the device, no step waits for the host.

    Args:
        sae: the autoencoder, such as `TopK` or `L1`.
        folder: where the trained SAE goes.
        lr: peak learning rate; by default 2e-4 / sqrt(F / 2^14), Gao et al.'s scaling law.
        betas: Adam's.
        warmup_steps: steps over which the learning rate rises from 0.
        decay_fraction: share of all steps, at the end, over which it falls to 0.
        sparsity_warmup_steps: steps over which the SAE's penalty (L1) rises from 0.
        aux_k: dead features that explain the residual together; by default half of d_in, and 0 switches AuxK off.
        aux_coef: weight of the auxiliary error.
        dead_after: tokens without firing after which a feature counts as dead.
        resample_every: steps between restarts of dead features; never by default.
        grad_clip: largest gradient norm.
        check_every: steps between counts of the dead features (each waits for the device once).
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
        resample_every: int | None = None,
        grad_clip: float = 1.0,
        check_every: int = 50,
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
        self.resample_every = resample_every
        self.grad_clip = grad_clip
        self.check_every = check_every
        self.register_buffer("since_fired", torch.zeros(sae.n_features, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)
        self.n_steps = float("inf")
        self._dead: Tensor | None = None
        self._evaluation: Evaluation | None = None
        self._metrics: tuple[int, Metrics | None] | None = None
        self._written = False

    def configure_callbacks(self) -> list[Callback]:
        return [OneRunOnly(self.folder)] if self.trainer.training else []

    def setup(self, stage: str) -> None:
        data = self._data
        if data is not None:
            self.sae.set_statistics(data.statistics, data.spec)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The reconstruction of raw tokens."""
        return self.sae(x)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._raise_if_not_finite()
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

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        step = self.global_step
        if self.resample_every is not None and step > 0 and step % self.resample_every == 0:
            self._resample(batch)
        if self._dead is None or step % self.check_every == 0:
            self._raise_if_not_finite()
            self._dead = (self.since_fired > self.dead_after).nonzero().flatten()
        self._dead = self._dead.to(self.device)

    def training_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> Tensor:
        """The loss, a channel: (‖x - recon‖² + penalty + aux_coef · aux error) / D, averaged over tokens."""
        x = self.sae.normalise(batch)
        run = self.sae.run(x)
        error = x - run.recon
        mse = error.square().sum(dim=1).mean()
        loss = mse + self._ramp(self.sparsity_warmup_steps) * run.penalty
        assert self._dead is not None
        if self.aux_k > 0 and len(self._dead):
            loss = loss + self.aux_coef * aux_error(self.sae, x, error, self._dead, self.aux_k)
        self._count(run.fired, len(x))
        # Lightning writes at these steps only, so others need not be measured.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_step(loss.detach() / self.sae.d_in, mse.detach() / self.sae.d_in, x, run)
        return loss / self.sae.d_in

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient. Where it is not finite, Adam leaves weights and moments as they are; no host is asked."""
        self.sae.remove_parallel_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.grad_clip)
        bad = ~norm.isfinite()
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
        is_first = bad & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(is_first, self.global_step, self.first_bad_step))

    def _raise_if_not_finite(self) -> None:
        """FloatingPointError naming the first step whose gradient was NaN or infinite, and where that came from."""
        step = int(self.first_bad_step)
        if step < 0:
            return
        shards = self._data.shard_set if self._data is not None else None
        where = shards.first_not_finite(range(len(shards))) if shards is not None else None
        why = where or f"all captured tokens are finite, so the training diverged: lower lr (now {self.lr:g})"
        raise FloatingPointError(
            f"the gradient of step {step} was NaN or infinite; weights were left as they were, nothing was saved "
            f"since. {why[0].upper()}{why[1:]}; then go on from the last checkpoint."
        )

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self.sae.normalise_rows()  # here rather than at the end of the batch, when a checkpoint may already be written

    def on_validation_epoch_start(self) -> None:
        self._evaluation = Evaluation(self.sae.d_in, self.sae.n_features, self.device)

    def validation_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        assert self._evaluation is not None
        self._evaluation.update(self.sae, batch)

    def on_validation_epoch_end(self) -> None:
        assert self._evaluation is not None
        metrics = self._evaluation.result(self._total)
        # Not in the progress bar, whose line they would break. They are sums over processes already, the same in each.
        for name in ("fve", "mse", "l0", "dead_fraction"):
            self.log(f"val/{name}", getattr(metrics, name), sync_dist=True)
        if not self.trainer.sanity_checking:
            self._metrics = (self.global_step, metrics)
            self._log_histograms(metrics)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def on_train_end(self) -> None:
        self._write()

    def on_fit_end(self) -> None:
        """A run resumed from its last checkpoint has nothing left to train, and then Lightning ends no training."""
        if not self._written:
            self._write()

    def _write(self) -> None:
        """Write the SAE, with metrics of the weights as they are now."""
        self._raise_if_not_finite()
        self._written = True
        if self._metrics is None or self._metrics[0] != self.global_step:
            self._metrics = (self.global_step, self._evaluate())
        if self.trainer.is_global_zero:
            save_sae(self.folder, self.sae, self._summary(self._metrics[1]))
            _log.info("wrote the SAE to %s%s", self.folder, _told(self._metrics[1]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, betas=self.betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.n_steps
        fall = min(1.0, (self.n_steps - step) / decay_steps) if 0 < decay_steps < float("inf") else 1.0
        return min(rise, max(0.0, fall))

    def _ramp(self, steps: int) -> float:
        return min(1.0, self.global_step / steps) if steps > 0 else 1.0

    def _count(self, fired: Tensor, n_tokens: int) -> None:
        world = self.trainer.world_size
        if world > 1:
            fired = self._total(fired.float()) > 0
        self.since_fired.add_(n_tokens * world).masked_fill_(fired, 0)
        self.tokens_seen.add_(n_tokens * world)

    @torch.no_grad()
    def _resample(self, batch: Tensor) -> None:
        dead = (self.since_fired > self.dead_after).nonzero().flatten()
        if len(dead) == 0:
            return
        x = self.sae.normalise(batch)
        directions = draw_directions(self.sae, x, x - self.sae.run(x).recon, len(dead))
        directions = self.trainer.strategy.broadcast(directions)  # every process must restart them alike
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        resample(self.sae, optimizer, dead, directions.to(self.device))
        self.since_fired[dead] = 0
        self._dead = None
        _log.info("step %d: restarted %d dead features", self.global_step, len(dead))

    def _log_step(self, loss: Tensor, mse: Tensor, x: Tensor, run: Pass) -> None:
        self.log("train/loss", loss)
        self.log("train/mse", mse)
        self.log("train/fve", batch_variance_explained(x, run).float())
        self.log("train/l0", run.l0)
        self.log("train/dead_fraction", self._dead_fraction())
        self.log("train/lr", self.lr * self._lr_factor(self.global_step))

    def _log_histograms(self, metrics: Metrics) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                board, step = logger.experiment, self.global_step
                board.add_histogram("val/log10_density", metrics.density.clamp_min(1e-6).log10(), step)
                board.add_histogram("val/decoder_norm", self.sae.W_dec.norm(dim=1), step)
                board.add_histogram("val/encoder_norm", self.sae.W_enc.norm(dim=1), step)

    def _evaluate(self) -> Metrics | None:
        if self._data is None:
            return None
        evaluation = Evaluation(self.sae.d_in, self.sae.n_features, self.device)
        for batch in self._data.val_dataloader():
            evaluation.update(self.sae, batch.to(self.device))
        return evaluation.result(self._total)

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

    def _dead_fraction(self) -> Tensor:
        return (self.since_fired > self.dead_after).float().mean()

    def _total(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")

    @property
    def _data(self) -> ActivationData | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, ActivationData) else None


def _told(metrics: Metrics | None) -> str:
    if metrics is None:
        return ""
    return f": FVE {metrics.fve:.3f} at L0 {metrics.l0:.1f}, {metrics.dead_fraction:.1%} dead, on held-out prompts"
