"""What fp8 costs an SAE: `python -m benchmarks.fp8 runs/tiny/capture/transformer_blocks.1.ff/step-03`.

Encodes a set of tokens again in fp8, fits the same SAE from both with the same seeds, and measures both on the held-out
tokens of the first set, as they were. With --encoder the tokens are the same, and one of the two SAEs is trained by
steps that multiply by W_enc as fp8 numbers: on a GPU by `fp8_encoder`, on a CPU by rounding the same numbers alike on
the way to the same product. Ends with status 1 when the FVE differs by more than --within.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor

from fluxsae.data.activations import ActivationData
from fluxsae.files.whole import whole_file
from fluxsae.kernels.fp8 import Scaled, straight_through
from fluxsae.sae import L1, SAE, TopK, load_sae
from fluxsae.sae.evaluation import Evaluation
from fluxsae.shards import ShardSet, ShardWriter
from fluxsae.training.module import SAETraining


@dataclass(frozen=True)
class Pair:
    """FVE on the held-out tokens of the first set, of the SAE from it and of that from, or with, fp8."""

    seed: int
    fve: float
    fve_fp8: float

    @property
    def lost(self) -> float:
        return self.fve - self.fve_fp8


def main() -> None:
    options = parse()
    shards = ShardSet.open(options.shards, "tokens")
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        coarse = shards if options.encoder else encode_again(shards, folder / "fp8")
        for seed in options.seeds:
            plain = fit(shards, shards, seed, folder / f"{seed}-plain", options)
            other = fit(coarse, shards, seed, folder / f"{seed}-fp8", options, options.encoder)
            pairs.append(Pair(seed, plain, other))
            how = "with an fp8 encoder" if options.encoder else f"from fp8 instead of {shards.metadata.storage}"
            print(f"seed {seed}: FVE {plain:.4f}, {other:.4f} {how}", flush=True)
    lost = fmean(pair.lost for pair in pairs)
    print(f"lost with fp8: {lost:+.4f} on average, at most {max(pair.lost for pair in pairs):+.4f}")
    if options.json:
        write_json(options.json, pairs, options)
    sys.exit(0 if all(abs(pair.lost) <= options.within for pair in pairs) else 1)


def encode_again(shards: ShardSet, folder: Path) -> ShardSet:
    """The same tokens in fp8."""
    per_shard = shards.metadata.shards[0].samples
    writer = ShardWriter(folder, shards.spec, "tokens", "fp8", per_shard)
    for image in range(len(shards)):
        writer.add(image // per_shard, shards.record(image), shards.tokens(image))
    for shard in range(len(shards.metadata.shards)):
        writer.close_shard(shard)
    writer.finalise(len(shards.metadata.shards))
    return ShardSet.open(folder)


def fit(
    shards: ShardSet, judge: ShardSet, seed: int, folder: Path, options: argparse.Namespace, fp8_encoder: bool = False
) -> float:
    """Fit an SAE from `shards`; its FVE on the held-out tokens of `judge`."""
    torch.manual_seed(seed)
    sizes = shards.statistics.mean.numel(), options.features
    sae = TopK(*sizes, options.k) if options.l1 is None else L1(*sizes, options.l1)
    on_cpu = options.device == "cpu"
    if fp8_encoder and on_cpu:
        sae.project = partial(project_rounded, sae)  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator=options.device,
        devices=1,
        precision="32-true" if on_cpu else "bf16-mixed",
        max_epochs=options.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    how = {"lr": options.lr, "dead_after": options.dead_after, "fp8_encoder": fp8_encoder and not on_cpu}
    module = SAETraining(sae, folder, **how)
    trainer.fit(module, datamodule=ActivationData(shards.folder, options.batch_size, seed=seed))
    return held_out_fve(load_sae(folder), judge, options.batch_size)


def project_rounded(sae: SAE, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
    """Pre-activations as a fused step with `fp8_encoder` has them, and its gradients."""
    centred = x - sae.b_dec
    rounded = (Scaled.of(matrix.detach()).decoded() for matrix in (centred, sae.W_enc))
    return straight_through(centred, sae.W_enc, *rounded) + sae.b_enc


def held_out_fve(sae: SAE, shards: ShardSet, batch_size: int) -> float:
    evaluation = Evaluation(sae.d_in, sae.n_features, torch.device("cpu"))
    for batch in ActivationData(shards.folder, batch_size).val_dataloader():
        evaluation.update(sae, batch)
    return float(evaluation.result().fve)


def write_json(path: Path, pairs: Sequence[Pair], options: argparse.Namespace) -> None:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = {"options": values, "pairs": [asdict(pair) for pair in pairs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="a set of tokens in bf16 or fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l1", type=float, help="fit L1 SAEs instead, with this weight of their codes")
    parser.add_argument("--encoder", action="store_true", help="compare encoders instead of tokens")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--dead-after", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--device", default="cpu", help="Lightning's accelerator")
    parser.add_argument("--within", type=float, default=0.002, help="difference in FVE that is accepted")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
