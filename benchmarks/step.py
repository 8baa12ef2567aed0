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
from torch.autograd import DeviceType
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from fluxsae.figures.style import BLUE, GREEN, INK, ORANGE, PINK, drawing
from fluxsae.files.whole import whole_file
from fluxsae.sae import L1, SAE, TopK
from fluxsae.training.module import SAETraining

PARTS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas"),
    "select": ("_select", "_keep", "topk", "sort"),
    "decode": ("_explain",),
    "lists": ("_mark", "_count", "_place", "_own", "_feature_sums", "scan"),
    "gradients and Adam": ("_update", "_sum_pieces", "adam", "Adam"),
    "masks": ("_mask", "_positive_columns", "_centre", "_squared", "_weigh", "_weighted"),
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
    fp8: bool = False

    @property
    def name(self) -> str:
        kind = f"TopK k={self.k}" if self.k else "L1"
        how = (", fp8 encoder" if self.fp8 else "") + ("" if self.fused else ", autograd")
        return kind + (f", {self.dead:.0%} dead" if self.dead else "") + how

    def sae(self) -> SAE:
        with torch.device("cuda"):  # where drawing weights takes no time
            return TopK(self.d_in, self.n_features, self.k) if self.k else L1(self.d_in, self.n_features, 1.0)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a step, of each of its kernels, the most memory beside the batches, in GB, and of the last batch the
    codes above 0 and the variance explained."""

    case: Case
    milliseconds: float
    spread: float
    gigabytes: float
    l0: float
    fve: float
    kernels: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        parts: dict[str, float] = defaultdict(float)
        for kernel, milliseconds in self.kernels.items():
            name = next((part for part, words in PARTS.items() if any(word in kernel for word in words)), "other")
            parts[name] += milliseconds
        return parts

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
    """Times `runs` of `every` steps after `warmup` steps, each from one idle device to the next; then profiles one.

    In 50 steps a training logs once and counts its dead features once, for which alone it waits for the device.
    """

    def __init__(self, warmup: int, runs: int, every: int = 50) -> None:
        self.warmup = warmup
        self.runs = runs
        self.every = every
        self.milliseconds: list[float] = []
        self.kernels: dict[str, float] = {}
        self._begin = 0.0
        self._profile = profile(activities=[ProfilerActivity.CUDA])

    @property
    def n_steps(self) -> int:
        return self.warmup + (self.runs + 1) * self.every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = trainer.global_step - self.warmup
        if done < 0 or done % self.every:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if 0 < done <= self.runs * self.every:
            self.milliseconds.append(1e3 * (now - self._begin) / self.every)
        if done == self.runs * self.every:
            self._profile.start()
        elif done > self.runs * self.every:
            self._profile.stop()
            self._read()
        self._begin = time.perf_counter()

    def _read(self) -> None:
        for event in self._profile.events() or ():
            if event.device_type == DeviceType.CUDA:
                self.kernels[event.name] = (
                    self.kernels.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3 / self.every
                )


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
    """As a user's, but for which features are dead: exactly so many, from the first step to the last."""
    never = 10**12
    module = SAETraining(
        case.sae(),
        folder,
        lr=1e-4,
        warmup_steps=10,
        sparsity_warmup_steps=10,
        dead_after=never,
        fused=case.fused,
        fp8_encoder=case.fp8,
    )
    n_dead = round(case.dead * case.n_features)
    with torch.no_grad():
        module.sae.b_enc[:n_dead] = -1e4  # they never fire, whatever AuxK does for them
    module.dead_features.since_fired[:n_dead] = 2 * never
    return module


def measure(case: Case, runs: int, warmup: int) -> Timing:
    """The median over runs of 50 steps, their spread, the memory, and the kernels of a step."""
    torch.cuda.empty_cache()
    tokens = synthetic_tokens(case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clock = Clock(warmup, runs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=clock.n_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(training(case, Path(folder)), Resident(tokens, clock.n_steps))
    gigabytes = (torch.cuda.max_memory_allocated() - before) / 1e9
    times = clock.milliseconds
    l0, fve = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("l0", "fve"))
    return Timing(case, median(times), max(times) - min(times), gigabytes, l0, fve, clock.kernels)


def head() -> str:
    """The first lines of a Markdown table of steps and their parts."""
    columns = ["SAE", "ms a step", "M tokens/s", "GB", "L0", "FVE", *PARTS, "other"]
    return _line(columns) + "\n" + _line(["---"] * len(columns))


def row(one: Timing) -> str:
    time = f"{one.milliseconds:.2f} ± {one.spread / 2:.2f}"
    numbers = [time, f"{one.tokens:.2f}", f"{one.gigabytes:.2f}", f"{one.l0:.0f}", f"{one.fve:.4f}"]
    return _line([one.case.name, *numbers, *(f"{one.parts.get(part, 0):.2f}" for part in (*PARTS, "other"))])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


GROWTH: dict[str, tuple[int, ...]] = {
    "n_features": (6144, 12288, 24576, 49152, 131072),
    "d_in": (768, 1536, 3072, 6144),
    "k": (16, 32, 64, 96, 128, 512),
    "batch": (1024, 4096, 8192, 32768),
}


SHOWN = ("matrix products", "select", "decode", "gradients and Adam")


def grow(runs: int) -> dict[str, list[Timing]]:
    """TopK at k = 32 with one size changed at a time; a table's line is printed for each as it is there."""
    print(_line(["size", "value", "ms a step", "M tokens/s", "GB", *SHOWN]), flush=True)
    print(_line(["---"] * (5 + len(SHOWN))), flush=True)
    timings: dict[str, list[Timing]] = defaultdict(list)
    measured: dict[Case, Timing] = {}
    for size, values in GROWTH.items():
        for value in values:
            sizes: dict[str, Any] = {"k": 32, size: value}
            case = Case(**sizes)
            one = measured.get(case) or measure(case, runs, warmup=50)
            measured[case] = one
            timings[size].append(one)
            numbers = (f"{one.milliseconds:.2f}", f"{one.tokens:.2f}", f"{one.gigabytes:.1f}")
            print(_line([size, value, *numbers, *(f"{one.parts.get(part, 0):.2f}" for part in SHOWN)]), flush=True)
    return timings


def draw_growth(path: Path, growth: dict[str, list[Timing]]) -> None:
    """The step and its parts against each size, both on logarithmic axes."""
    shown = dict(zip(SHOWN, (BLUE, ORANGE, GREEN, PINK), strict=True))
    labels = {"n_features": "features F", "d_in": "width D", "k": "kept k", "batch": "tokens a batch"}
    ticks = (0.1, 0.3, 1, 3, 10)
    with drawing(path, 11, 7.5) as figure:
        for axes, (size, timings) in zip(figure.subplots(2, 2, sharey=True).ravel(), growth.items(), strict=True):
            values = [getattr(one.case, size) for one in timings]
            axes.loglog(values, [one.milliseconds for one in timings], color=INK, lw=2.5, marker="o", label="step")
            for part, colour in shown.items():
                there = [
                    (value, one.parts[part]) for value, one in zip(values, timings, strict=True) if part in one.parts
                ]
                axes.loglog(*zip(*there, strict=True), color=colour, marker=".", label=part)
            axes.set_xlabel(labels[size])
            axes.set_ylabel("ms")
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30, ha="right")
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))


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
    if options.fp8:
        cases = [replace(case, fp8=fp8) for case in cases for fp8 in (False, True)]
    if options.plain:
        cases += [replace(case, fused=False) for case in cases if not (case.dead or case.fp8)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {sizes}\n\n{head()}", flush=True)
    timings = []
    for case in cases:
        timings.append(measure(case, options.runs, options.warmup))
        print(row(timings[-1]), flush=True)
    growth = grow(max(1, options.runs // 4)) if options.grow else {}
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
    parser.add_argument("--warmup", type=int, default=500, help="steps before the clock runs")
    parser.add_argument("--runs", type=int, default=10, help="runs of 50 steps to time")
    parser.add_argument("--plain", action="store_true", help="time autograd's step too")
    parser.add_argument("--fp8", action="store_true", help="time steps whose encoder multiplies fp8 numbers, too")
    parser.add_argument("--grow", action="store_true", help="time TopK k=32 as each size grows, too")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--figure", type=Path, help="draw how the cost grows to this PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
