"""The time of an SAE training step on an NVIDIA GPU, and where it goes. `python -m benchmarks.step`.

Each SAE is trained through a Lightning Trainer in bf16-mixed precision on tokens that lie on the device, with all that
a real run needs: centring, AuxK, unit-norm decoder rows with the parallel gradient removed, token clipping, counts of
what fired, logged metrics. The clock runs over whole steps, host and device. `--grow` shows how the step's cost rises
with each size, `--plain` times autograd's step too.
Legend: N tokens, D width, F features, K kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from fluxsae.figures.style import BLUE, GREEN, MUTED, ORANGE, drawing
from fluxsae.sae import L1, SAE, TopK
from fluxsae.storage import whole_file
from fluxsae.training import SAETraining

PARTS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas"),
    "select": ("_collect", "_choose", "_keep", "topk", "sort"),
    "decode": ("_explain",),
    "lists": ("_mark", "_count", "_place", "_own", "_feature_sums", "scan"),
    "gradients and Adam": ("_update", "_sum_pieces", "adam", "Adam"),
    "masks": ("_mask_slopes", "_positive_columns", "_centre", "_squared", "_weigh", "_weighted"),
}
"""The kernels that make up each part of a step, by what their names hold; what no part claims is "other"."""


@dataclass(frozen=True)
class Case:
    """One step to time: `k` is 0 for L1; `dead` is the share of features that AuxK must help."""

    k: int
    d_in: int = 3072
    n_features: int = 12288
    batch: int = 8192
    dead: float = 0.0
    fused: bool = True

    @property
    def name(self) -> str:
        kind = f"TopK k={self.k}" if self.k else "L1"
        return kind + (f", {self.dead:.0%} dead" if self.dead else "") + ("" if self.fused else ", autograd")

    def sae(self) -> SAE:
        if self.k:
            return TopK(self.d_in, self.n_features, self.k, seed=0)
        return L1(self.d_in, self.n_features, 1.0, seed=0)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a step, of each of its parts, and the most memory beside the batches, in GB."""

    case: Case
    milliseconds: float
    spread: float
    gigabytes: float
    parts: dict[str, float]

    @property
    def tokens(self) -> float:
        """Millions a second."""
        return self.case.batch / self.milliseconds / 1e3


class Resident:
    """Batches that lie on the device, in turn."""

    def __init__(self, tokens: Float[Tensor, "B N D"], n_steps: int) -> None:
        self.tokens = tokens
        self.n_steps = n_steps

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.n_steps):
            yield self.tokens[step % len(self.tokens)]


class Clock(Callback):
    """Times runs of `every` steps after `warmup` of them, each from one idle device to the next."""

    def __init__(self, warmup: int, every: int) -> None:
        self.warmup = warmup
        self.every = every
        self.milliseconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = trainer.global_step - self.warmup
        if done < 0 or done % self.every:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if done:
            self.milliseconds.append(1e3 * (now - self._begin) / self.every)
        self._begin = now


def synthetic_tokens(case: Case, n_batches: int = 4) -> Float[Tensor, "B N D"]:
    """Sums of a few of 4·D directions, some of them a hundred times as frequent as others, and noise; in bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    n_true = 4 * case.d_in
    directions = normalize(torch.randn(n_true, case.d_in, generator=generator, device="cuda"), dim=1)
    often = torch.arange(1, n_true + 1, device="cuda") ** -0.7
    share = (20 * often / often.sum()).clamp(max=0.5)
    batches = []
    for _ in range(n_batches):
        active = torch.rand(case.batch, n_true, generator=generator, device="cuda") < share
        codes = active * torch.rand(case.batch, n_true, generator=generator, device="cuda").add_(0.5)
        noise = torch.randn(case.batch, case.d_in, generator=generator, device="cuda")
        batches.append((codes @ directions + 0.01 * noise).bfloat16())
    tokens = torch.stack(batches)
    return tokens * (case.d_in / tokens.float().square().sum(2).mean()).sqrt().to(tokens.dtype)


def training(case: Case, folder: Path) -> SAETraining:
    module = SAETraining(case.sae(), folder, lr=1e-4, warmup_steps=10, sparsity_warmup_steps=10, fused=case.fused)
    n_dead = round(case.dead * case.n_features)
    with torch.no_grad():
        module.sae.b_enc[:n_dead] = -1e4  # they never fire, whatever AuxK does for them
    module.since_fired[:n_dead] = 10**12
    return module


def run(module: SAETraining, tokens: Tensor, n_steps: int, *callbacks: Callback) -> None:
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=n_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, Resident(tokens, n_steps))


def measure(case: Case, n_steps: int = 200) -> Timing:
    """The median over runs of 20 steps, their spread, the memory, and the parts of a step of the same training."""
    tokens = synthetic_tokens(case)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(60, 20)
        run(training(case, Path(folder)), tokens, 60 + n_steps, clock)
        gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
        parts = profiled(case, tokens, Path(folder))
    times = clock.milliseconds
    torch.cuda.empty_cache()
    return Timing(case, median(times), max(times) - min(times), gigabytes, parts)


def profiled(case: Case, tokens: Tensor, folder: Path, n_steps: int = 10) -> dict[str, float]:
    """Milliseconds of kernel time a step, a part."""

    class Profile(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 5:
                torch.cuda.synchronize()
                recording.start()

    recording = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
    run(training(case, folder), tokens, 5 + n_steps, Profile())
    torch.cuda.synchronize()
    recording.stop()
    parts: dict[str, float] = defaultdict(float)
    for event in recording.key_averages():
        name = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "other")
        parts[name] += event.device_time_total / 1e3 / n_steps
    return dict(parts)


def table(timings: Sequence[Timing]) -> str:
    """A Markdown table of steps and their parts."""
    parts = [*PARTS, "other"]
    head = ["SAE", "ms a step", "M tokens/s", "GB", *parts]
    rows = [head, ["---"] * len(head)]
    for one in timings:
        numbers = [f"{one.milliseconds:.2f} ± {one.spread / 2:.2f}", f"{one.tokens:.2f}", f"{one.gigabytes:.2f}"]
        rows.append([one.case.name, *numbers, *(f"{one.parts.get(part, 0):.2f}" for part in parts)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


GROWTH: dict[str, tuple[int, ...]] = {
    "n_features": (6144, 12288, 24576, 49152, 131072),
    "d_in": (768, 1536, 3072, 6144),
    "k": (16, 32, 64, 96, 128, 256, 1024),
    "batch": (1024, 2048, 4096, 8192, 16384, 32768),
}


def grow(n_steps: int) -> dict[str, list[Timing]]:
    return {size: [measure(resized(size, value), n_steps) for value in values] for size, values in GROWTH.items()}


def resized(size: str, value: int) -> Case:
    sizes: dict[str, Any] = {"k": 32, size: value}
    return Case(**sizes)


def growth_table(growth: dict[str, list[Timing]]) -> str:
    lines = ["| size | value | ms a step | M tokens/s | GB | products | select | decode | gradients and Adam |"]
    lines.append("| --- " * 9 + "|")
    for size, timings in growth.items():
        for one in timings:
            parts = (one.parts.get(part, 0) for part in ("matrix products", "select", "decode", "gradients and Adam"))
            cells = (size, getattr(one.case, size), f"{one.milliseconds:.2f}", f"{one.tokens:.2f}")
            lines.append(
                "| " + " | ".join(map(str, (*cells, f"{one.gigabytes:.1f}", *(f"{p:.2f}" for p in parts)))) + " |"
            )
    return "\n".join(lines)


def draw_growth(path: Path, growth: dict[str, list[Timing]]) -> None:
    """The step and its parts against each size, both on logarithmic axes."""
    shown = {"matrix products": BLUE, "select": ORANGE, "decode": GREEN, "gradients and Adam": "#cc79a7"}
    labels = {"n_features": "features F", "d_in": "width D", "k": "kept k", "batch": "tokens a batch"}
    with drawing(path, 11, 7) as figure:
        for axes, (size, timings) in zip(figure.subplots(2, 2).ravel(), growth.items(), strict=True):
            values = [getattr(one.case, size) for one in timings]
            axes.loglog(values, [one.milliseconds for one in timings], color=MUTED, lw=2.5, marker="o", label="step")
            for part, colour in shown.items():
                axes.loglog(values, [max(one.parts.get(part, 0), 1e-3) for one in timings], color=colour, label=part)
            axes.set_xlabel(labels[size])
            axes.set_ylabel("ms")
            axes.set_ylim(bottom=0.02)
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30, ha="right")
            axes.minorticks_off()
        axes.legend(fontsize=8)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU here, and times of a CPU say nothing of one.")
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "fluxsae"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sizes = {"d_in": options.d_in, "n_features": options.n_features, "batch": options.batch}
    cases = [Case(k, **sizes) for k in options.k]
    cases += [Case(k, **sizes, dead=dead) for dead in options.dead for k in options.k[:1]]
    if options.plain:
        cases += [replace(case, fused=False) for case in cases if not case.dead]
    timings = [measure(case, options.steps) for case in cases]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {sizes}\n")
    print(table(timings))
    growth = grow(options.steps) if options.grow else {}
    if growth:
        print("\n" + growth_table(growth))
    if options.json:
        record = {"steps": timings, "growth": growth, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        with whole_file(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=asdict) + "\n")
    if options.figure and growth:
        draw_growth(options.figure, growth)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=3072)
    parser.add_argument("--n-features", type=int, default=12288)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--k", type=int, nargs="*", default=[32, 64, 1200, 0], help="0 stands for L1")
    parser.add_argument("--dead", type=float, nargs="*", default=[0.05], help="also with this share of features dead")
    parser.add_argument("--steps", type=int, default=200, help="steps to time, after 60 that are not")
    parser.add_argument("--plain", action="store_true", help="time autograd's step too")
    parser.add_argument("--grow", action="store_true", help="time TopK k=32 as each size grows, too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--figure", type=Path, help="draw how the cost grows to this PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
