"""How much faster do two GPUs train an SAE than one? `python -m benchmarks.several_gpus --json FILE`.

Tokens lie in each GPU's memory, so that no disk counts. Two GPUs either see tokens of their own, or share the features
of a wider SAE and see the same ones. Steps are timed fifty at a time, with what a training logs and checks every fifty
steps; the median counts. Without GPUs, gloo and tiny sizes show that all of it runs; then the times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fluxsae.runtime.distributed import OneAllReduce
from fluxsae.runtime.interrupts import StopsWhereItCanGoOn, interruptible
from fluxsae.sae import TopK
from fluxsae.training.module import SAETraining

WINDOW = 50


class Case(NamedTuple):
    """A training to time: on how many GPUs, which share `tokens`, `features`, or nothing."""

    name: str
    n_gpus: int
    share: str
    n_features: int
    fused: bool = False


class Result(NamedTuple):
    """Tokens a second over all GPUs, and how many times those of one GPU by the same steps that is."""

    case: Case
    tokens_per_second: float
    speed_up: float


class Resident(IterableDataset[Tensor]):
    """The same random tokens, again and again, in the memory of one device."""

    def __init__(self, batch: int, d_in: int, rank: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(rank)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.tokens = torch.randn(batch, d_in, generator=generator, device=device).to(dtype)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.tokens


class Clock(Callback):
    """Times windows of steps, after a first one that does not count, when kernels are new."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % WINDOW == WINDOW // 2:  # far from what is done every fifty steps
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step."""
        return statistics.median(b - a for a, b in pairwise(self.times[1:])) / WINDOW


class Training(SAETraining):
    """Without folders: what is timed are steps."""

    def __init__(self, batch: int, sae: TopK, fused: bool) -> None:
        super().__init__(sae, Path(tempfile.gettempdir()), aux_k=0, fused=fused)
        self.batch = batch

    def configure_callbacks(self) -> list[Callback]:
        return []

    def train_dataloader(self) -> DataLoader[Tensor]:
        tokens = Resident(self.batch, self.sae.d_in, self._processes.rank, self.trainer.strategy.root_device)
        return DataLoader(tokens, batch_size=None)

    def on_train_end(self) -> None:
        pass

    on_fit_end = on_train_end


def measure(case: Case, options: argparse.Namespace) -> None:
    """Train in `case.n_gpus` processes, this one the first or started by it; leave the speed in `options.leave`."""
    strategies: dict[str, Callable[[], Strategy | str]] = {
        "nothing": lambda: "auto",
        "tokens": OneAllReduce,
        "features": lambda: ModelParallelStrategy(1, case.n_gpus, save_distributed_checkpoint=False),
    }
    torch.manual_seed(0)
    clock = Clock()
    on_gpu = options.device == "cuda"
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        precision="bf16-mixed" if on_gpu else "32-true",
        devices=case.n_gpus,
        strategy=strategies[case.share](),
        max_steps=WINDOW * (options.windows + 2),
        callbacks=[StopsWhereItCanGoOn(), clock],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with interruptible():
        trainer.fit(Training(options.batch, TopK(options.d_in, case.n_features, options.k), case.fused))
    if trainer.is_global_zero:
        shares = case.n_gpus if case.share == "tokens" else 1
        options.leave.write_text(json.dumps(options.batch * shares / clock.seconds))


def compare(options: argparse.Namespace) -> Iterator[Result]:
    """Time every case in processes of its own."""
    has_gpu = torch.cuda.is_available()
    cases = {
        "tokens": [
            Case(f"{name}{', fused step' if fused else ''}", n, share, options.n_features, fused)
            for fused in (False, True)[: 1 + has_gpu]
            for name, n, share in (("one GPU", 1, "nothing"), ("two GPUs, own tokens", 2, "tokens"))
        ],
        "features": [
            Case("one GPU, wide", 1, "nothing", options.wide),
            Case("two GPUs share wide", 2, "features", options.wide),
        ],
    }
    first: dict[tuple[int, bool], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for share in options.share for case in cases[share]):
            leave = Path(folder) / "speed.json"
            command = [sys.executable, "-m", "benchmarks.several_gpus", *sys.argv[1:]]
            subprocess.run([*command, "--case", json.dumps(case), "--leave", str(leave)], check=True)
            speed = json.loads(leave.read_text())
            yield Result(case, speed, speed / first.setdefault((case.n_features, case.fused), speed))


def main() -> None:
    options = parse()
    if options.case is not None:
        measure(Case(*json.loads(options.case)), options)
        return
    results = []
    print(f"{'':34}{'features':>10}{'tokens/s':>14}{'speed-up':>10}")
    for result in compare(options):
        results.append({**result.case._asdict(), **result._asdict(), "case": result.case.name})
        case = result.case
        print(f"{case.name:34}{case.n_features:>10,}{result.tokens_per_second:>14,.0f}{result.speed_up:>10.2f}")
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": settings, "results": results}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--d-in", type=int, default=3072 if on_gpu else 32)
    parser.add_argument("--n-features", type=int, default=12288 if on_gpu else 256)
    parser.add_argument("--wide", type=int, default=131072 if on_gpu else 1024, help="features that two GPUs share")
    share = ["tokens", "features"]
    parser.add_argument("--share", choices=share, nargs="+", default=share, help="what two GPUs share out")
    parser.add_argument("--k", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--batch", type=int, default=8192 if on_gpu else 64, help="tokens a GPU and step")
    parser.add_argument("--windows", type=int, default=6 if on_gpu else 1, help="of fifty steps, that are timed")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--leave", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
