"""How fast training tokens come, beside the fastest that a page cache can be read: `python -m benchmarks.loader`.

Makes synthetic shards, or takes those in --folder, reads them until they are cached, and then takes turns: `cat` of the
tars, and an epoch of the training stream from them, fp8 as it is stored. What counts is the ratio within a turn; CPU
seconds a GB tell what a machine that does other things at the same time would hide. With --device cuda the stream goes
on from epoch to epoch, as in a training, beside the training step alone on a tensor that stays on the device, and both
together, through a Lightning Trainer. --without copier has threads of the training's own process read for the device.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fluxsae.data.activations import ActivationData
from fluxsae.data.mixing import copier, device
from fluxsae.data.mixing.tokens import Feed, MixedTokens
from fluxsae.files.whole import whole_file
from fluxsae.records.spec import CaptureSpec, GenerationSpec
from fluxsae.sae import TopK
from fluxsae.shards import SampleRecord, ShardSet, ShardWriter
from fluxsae.shards.format import Storage
from fluxsae.training.module import SAETraining

WARMUP = 20
"""Steps before a training is timed, at the least: an epoch is over by then, as its last, smaller batch has kernels of
its own that are made when they are first needed."""


class Spent(NamedTuple):
    """What reading some bytes took, in wall seconds and in seconds of processors."""

    n_bytes: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Measure:
    """A reader's median speed over all turns, and the median of its ratios to `cat` in the same turn."""

    name: str
    gigabytes_a_second: float
    tokens_a_second: float | None
    share_of_cat: float
    cpu_seconds_a_gigabyte: float


@dataclass(frozen=True)
class Training:
    """Tokens a second of a loader, a step or both, and the share of the time in which both waited for the loader."""

    name: str
    tokens_a_second: float
    waited: float = 0.0


class ThreadsInstead:
    """In place of `Copier`: threads of this process read, and wait for its interpreter after each call."""

    def __init__(self, paths: Sequence[Path], n_bytes: int, n_threads: int) -> None:
        self.memory = mmap.mmap(-1, n_bytes)
        self._view = memoryview(self.memory)
        self._files = copier._Files([str(path) for path in paths])
        self._threads = ThreadPoolExecutor(n_threads)
        self._answers: SimpleQueue[tuple[int, bool]] = SimpleQueue()

    def read(self, number: int, spans: bytes) -> None:
        self._threads.submit(self._read, number, [copier.Span(*span) for span in copier.SPAN.iter_unpack(spans)])

    def _read(self, number: int, spans: Sequence[copier.Span]) -> None:
        self._answers.put((number, all(copier._read(span, self._files, self._view) for span in spans)))

    def done(self, wait: bool) -> list[tuple[int, bool]]:
        found = [self._answers.get()] if wait else []
        while not self._answers.empty():
            found.append(self._answers.get())
        return found

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def main() -> None:
    options = parse()
    if options.without == "copier":
        device.Copier = ThreadsInstead  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        print(_row("read", "GB/s", "tokens/s", "of cat", "CPU s/GB"), flush=True)
        measures: list[Measure] = []
        trainings: list[Training] = []
        for storage in options.storage:
            threads = torch.get_num_threads()
            shards = make_shards(folder / storage, storage, options)
            torch.set_num_threads(options.threads)
            if options.device == "cpu":
                measures += compare(shards, options)
            if options.train:
                trainings += train(shards, options, Path(temporary) / "sae")
            torch.set_num_threads(threads)
        if options.json:
            write_json(options.json, measures, trainings, options)


def make_shards(folder: Path, storage: Storage, options: argparse.Namespace) -> ShardSet:
    """The set in `folder`, made of random tokens where there is none."""
    if (folder / "metadata.json").exists():
        return ShardSet.open(folder, "tokens")
    side = 16 * round(options.tokens**0.5)
    generation = GenerationSpec("random", "0" * 64, side, side, 1, 1.0, 1.0, 1, "bfloat16", "0" * 64, 1, 0)
    spec = CaptureSpec(generation, "random", 0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(16, spec.n_tokens, options.width, generator=generator).to(torch.bfloat16)
    bytes_an_image = spec.n_tokens * options.width * {"bf16": 2, "fp32": 4, "fp8": 1}[storage]
    n_images = max(2, round(options.gigabytes * 1e9 / bytes_an_image))
    writer = ShardWriter(folder, spec, "tokens", storage, options.images_per_shard)
    for image in range(n_images):
        record = SampleRecord(image, image, 0, image, f"random tokens {image}")
        writer.add(image // options.images_per_shard, record, drawn[image % 16].roll(image, 0))
        if (image + 1) % options.images_per_shard == 0 or image + 1 == n_images:
            writer.close_shard(image // options.images_per_shard)
            print(f"\rwrote {image + 1} of {n_images} images in {storage}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    writer.finalise(-(-n_images // options.images_per_shard))
    return ShardSet.open(folder, "tokens")


def compare(shards: ShardSet, options: argparse.Namespace) -> list[Measure]:
    """`cat` and every reader in turns, the first of which, when files and memory are not warm yet, does not count."""
    name = shards.metadata.storage
    readers = {f"{name}, {n} reader{'s' if n > 1 else ''}": stream(shards, n, options) for n in options.readers}
    turns: dict[str, list[tuple[Spent, Spent]]] = {name: [] for name in readers}
    for _ in range(1 + options.turns):
        for name, tokens in readers.items():
            turns[name].append((cat(shards), read(tokens)))
    n_tokens = {name: len(tokens.images) * shards.spec.n_tokens for name, tokens in readers.items()}
    cats = [pair[0] for pairs in turns.values() for pair in pairs[1:]]
    measures = [_measure(f"{shards.metadata.storage}, cat", [(spent, spent) for spent in cats], None)]
    measures += [_measure(name, pairs[1:], n_tokens[name]) for name, pairs in turns.items()]
    for m in measures:
        rate = "" if m.tokens_a_second is None else f"{m.tokens_a_second:,.0f}"
        numbers = f"{m.gigabytes_a_second:.2f}", rate, f"{m.share_of_cat:.0%}", f"{m.cpu_seconds_a_gigabyte:.3f}"
        print(_row(m.name, *numbers), flush=True)
    return measures


def stream(shards: ShardSet, n_readers: int, options: argparse.Namespace, last_epoch: int | None = 0) -> MixedTokens:
    return MixedTokens(
        shards,
        range(len(shards)),
        batch_size=options.batch_size,
        buffer_images=options.buffer_images,
        readers=n_readers,
        device=None if options.device == "cpu" else torch.device(options.device),
        last_epoch=last_epoch,
    )


def cat(shards: ShardSet) -> Spent:
    paths = [str(shards.folder / shard.name) for shard in shards.metadata.shards]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(["cat", *paths], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(sum(shard.bytes for shard in shards.metadata.shards), seconds, cpu)


def read(tokens: MixedTokens) -> Spent:
    """An epoch of the stream, and the next one to come."""
    tokens.epoch += 1
    before, cpu, started = tokens.feed.n_bytes, time.process_time(), time.perf_counter()
    for _ in tokens:
        pass
    if tokens.device is not None and tokens.device.type == "cuda":
        torch.cuda.synchronize(tokens.device)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Spent(tokens.feed.n_bytes - before, seconds, cpu)


def _measure(name: str, pairs: Sequence[tuple[Spent, Spent]], n_tokens: int | None) -> Measure:
    """Medians over pairs of what `cat` and a reader spent."""
    speeds = [spent.n_bytes / spent.seconds for _, spent in pairs]
    shares = [speed * beside.seconds / beside.n_bytes for speed, (beside, _) in zip(speeds, pairs, strict=True)]
    return Measure(
        name,
        median(speeds) / 1e9,
        None if n_tokens is None else n_tokens / median(spent.seconds for _, spent in pairs),
        median(shares),
        median(spent.cpu_seconds / spent.n_bytes for _, spent in pairs) * 1e9,
    )


def train(shards: ShardSet, options: argparse.Namespace, folder: Path) -> list[Training]:
    """The loader alone, the step alone and both together, in tokens a second."""
    name, n_readers = shards.metadata.storage, max(options.readers)
    reading = cat(shards)
    found = [told(Training(f"{name}, cat", reading.n_bytes / row_bytes(shards) / reading.seconds))]
    found.append(told(Training(f"{name}, loader alone", alone(shards, n_readers, options))))
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    resident = torch.randn(options.batch_size, shards.statistics.mean.numel()).to(dtype).to(options.device)
    data = ActivationData(
        shards.folder, options.batch_size, buffer_images=options.buffer_images, readers=n_readers, val_fraction=1e-6
    )
    warmup = max(WARMUP, 2 + len(shards) * shards.spec.n_tokens // options.batch_size)
    same = DataLoader(Same(resident, options.steps + warmup), batch_size=None)
    for case, how in (
        ("step alone", {"train_dataloaders": same, "val_dataloaders": same}),
        ("both together", {"datamodule": data}),
    ):
        clock = Clock(data.feed, warmup)
        fit(shards, options, folder, clock, **how)
        rate = options.steps * options.batch_size / clock.seconds
        found.append(told(Training(f"{name}, {case}", rate, clock.waited / clock.seconds)))
    return found


def alone(shards: ShardSet, n_readers: int, options: argparse.Namespace) -> float:
    """Tokens a second of a stream that has begun and goes on, over as many epochs as there are turns."""
    tokens = stream(shards, n_readers, options, last_epoch=None)
    read(tokens)
    seconds = sum(read(tokens).seconds for _ in range(options.turns))
    tokens.close()
    return options.turns * len(tokens.images) * shards.spec.n_tokens / seconds


def row_bytes(shards: ShardSet) -> float:
    """Bytes of the shards for each of their tokens."""
    return sum(shard.bytes for shard in shards.metadata.shards) / (len(shards) * shards.spec.n_tokens)


def told(training: Training) -> Training:
    """The training itself, after its line of the table."""
    waited = f"{training.waited:.0%} waited" if training.waited else ""
    print(_row(training.name, "", f"{training.tokens_a_second:,.0f}", waited, ""), flush=True)
    return training


class Same(Dataset[Tensor]):
    """One batch, which stays on the device, again and again."""

    def __init__(self, batch: Tensor, n: int) -> None:
        self.batch = batch
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return self.batch


class Clock(Callback):
    """The seconds from step `warmup` to the end, the device's work included, and those spent in the loader."""

    def __init__(self, feed: Feed, warmup: int) -> None:
        self.feed = feed
        self.warmup = warmup
        self.seconds = self.waited = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step in (self.warmup, trainer.max_steps):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            sign = -1 if trainer.global_step == self.warmup else 1
            self.seconds += sign * time.perf_counter()
            self.waited += sign * self.feed.waited


def fit(shards: ShardSet, options: argparse.Namespace, folder: Path, clock: Clock, **data: Any) -> None:
    sae = TopK(shards.statistics.mean.numel(), options.features, options.k)
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=clock.warmup + options.steps,
        limit_val_batches=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SAETraining(sae, folder), **data)


def _row(name: str, *numbers: str) -> str:
    return f"{name:<20}" + "".join(f"{number:>12}" for number in numbers)


def write_json(
    path: Path, measures: Sequence[Measure], trainings: Sequence[Training], options: argparse.Namespace
) -> None:
    record = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
        "reading": [asdict(measure) for measure in measures],
        "training": [asdict(training) for training in trainings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the sets are or are put, a folder a storage; else temporary")
    parser.add_argument("--storage", nargs="+", choices=get_args(Storage), default=["bf16", "fp8"])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of each set to make")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=256, help="tokens an image, a square number")
    parser.add_argument("--images-per-shard", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--buffer-images", type=int, default=1280)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's own; readers are threads already")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to mix on the device")
    parser.add_argument("--without", choices=["copier"], help="do without this part, to tell what it gains")
    parser.add_argument("--train", action="store_true", help="also time the training step; the default on cuda")
    parser.add_argument("--features", type=int, default=12288)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="training steps to time")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    options.train |= options.device != "cpu"
    return options


if __name__ == "__main__":
    main()
