"""S and maps at full size: `python -m benchmarks.full_size.scores`. On a CPU, `--width 64 --features 256` and the like.

Tokens that lie on the device are encoded, pooled and counted, beside the encoder's matrix product alone, in turns; then
the scores stage reads shards, beside reading the same files alone; then the overlays stage makes the maps of all alive
features. `--curve 1000 10000 100000` scores captures of so many images instead, and prints the host's memory for each.
Legend: B images a batch, T tokens an image, D width, F features.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from fluxsae.data.activations import ActivationData
from fluxsae.files.whole import whole_file
from fluxsae.records.features import Selection
from fluxsae.records.spec import CaptureSpec, GenerationSpec
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK, save_sae
from fluxsae.sae.pooling import Pooled, pooling_of
from fluxsae.scoring.analyses.alive import Activity, AliveStatistics
from fluxsae.scoring.analyses.overlays import Overlays
from fluxsae.scoring.analyses.scores_writer import ScoresWriter
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.map_files import MapFile
from fluxsae.scoring.maps import FeatureMapping
from fluxsae.scoring.module import SAEScoring
from fluxsae.scoring.top_lists import TopList
from fluxsae.shards import SampleRecord, ShardSet, ShardWriter
from fluxsae.shards.format import Kind

KINDS: dict[str, type[SAE]] = {kind.__name__: kind for kind in (L1, TopK, BatchTopK, JumpReLU)}


class Resident(NamedTuple):
    """Images a second from tokens on the device, and shares of the matrix product's rate in the same turns.

    `with_statistics` is pooling with alive statistics and lists of the 16 top images, of which a batch improves one in
    ten, as 64 images do after about ten thousand.
    """

    kind: str
    product: float
    pooled: float
    with_statistics: float
    share: float
    share_with_statistics: float


class Streamed(NamedTuple):
    """Images a second of the scores stage and of reading its shards alone, and maps a second of the overlays stage.

    `share_of_disk` is the same share when both come from the disk, None where that is not asked for.
    """

    kind: str
    read: float
    scored: float
    share: float
    share_of_disk: float | None
    n_maps: int
    maps: float


class Memory(NamedTuple):
    """What the scores stage took for so many images: private host memory at its most, seconds an image."""

    n_images: int
    megabytes: float
    seconds_an_image: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    lines = [_line(result) for result in run(options)]
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "results": lines}))


def run(options: argparse.Namespace) -> list[Any]:
    """All that the options ask for; a line is printed for each."""
    found: list[Any] = []

    def told(result: Any) -> None:
        print(json.dumps(_line(result)), flush=True)
        found.append(result)

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        for n in options.curve or ():
            told(memory(n, folder / str(n), options))
        if options.curve:
            return found
        for kind in options.kinds:
            told(resident(kind, options))
        make_shards(folder, "tokens", options.images, options)
        make_shards(folder, "images", options.images, options)
        for kind in options.kinds:
            told(streamed(kind, folder, options))
    return found


def _line(result: Any) -> dict[str, Any]:
    return {"of": type(result).__name__, **result._asdict()}


def resident(kind: str, options: argparse.Namespace) -> Resident:
    """The matrix product, pooling, and pooling with all statistics, in turns."""
    sae = make_sae(kind, options).to(options.device)
    tokens = draw(options.batch, options).to(options.device)
    rows, weight = tokens.flatten(0, 1), sae.W_enc.detach()
    if options.precision != "32-true":
        weight = weight.to(tokens.dtype)
    rows = rows.to(weight.dtype)
    pooling = pooling_of(sae, options.precision)
    activity, top = Activity.none(sae.n_features, options.device), TopList(sae.n_features, 16, True, options.device)
    ids = torch.arange(options.batch, device=options.device)
    n_fired = torch.zeros(sae.n_features, dtype=torch.int64, device=options.device)

    def pool() -> Pooled:
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=options.precision != "32-true"):
            return pooling.pool(tokens)

    def pool_and_count() -> None:
        nonlocal activity, ids, n_fired
        scores, fired = pool()
        activity, n_fired = activity.merge(Activity.of(scores, 1e-3)), n_fired + fired.sum(dim=0)
        top.add(ids, ids, scores)
        ids = ids + options.batch

    improvable = torch.arange(sae.n_features, device=options.device) % 10 == 0
    top.add(ids, ids, pool().scores * torch.where(improvable, 1.0, 2.0))

    works: list[Callable[[], Any]] = [lambda: rows @ weight.T, pool, pool_and_count]
    for work in works:
        seconds(work, options)
    turns = [[seconds(work, options) for work in works] for _ in range(options.turns)]
    rates = [options.batch / median(column) for column in zip(*turns, strict=True)]
    shares = [median(turn[0] / turn[i] for turn in turns) for i in (1, 2)]
    return Resident(kind, *rates, *shares)


def seconds(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Seconds a call, over as many calls as the options say; the device has nothing left to do at either end."""
    begin = _now(options)
    for _ in range(options.calls):
        work()
    return (_now(options) - begin) / options.calls


def _now(options: argparse.Namespace) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def streamed(kind: str, folder: Path, options: argparse.Namespace) -> Streamed:
    """The scores and overlays stages on shards in the page cache, and reading these files alone."""
    shards = ShardSet.open(folder / "tokens", "tokens")
    sae = make_sae(kind, options)
    sae.set_statistics(shards.statistics, shards.spec)
    save_sae(folder / kind, sae)
    table = folder / kind / "features.csv"

    def turn(cold: bool = False) -> tuple[float, float]:
        if cold:
            forget(shards)
        reading = read_all(shards)
        if cold:
            forget(shards)
        stage = [ScoresWriter(folder / kind / "scores"), AliveStatistics(table), TopImages(table, 16)]
        return reading, predict(folder, kind, stage, None, options)

    turns = [turn() for _ in range(1 + options.turns)]  # the first, when files and kernels are new, does not count
    on_disk = [turn(cold=True) for _ in range(options.turns)] if options.cold else []
    every = Selection(table, n_features=None, rank_by="feature", n_images=16)
    drawn = Selection(table, n_features=1, rank_by="feature", n_images=1)
    overlays = Overlays(folder / kind / "overlays", folder / "images", drawn, keep=every)
    mapping = predict(folder, kind, [overlays], every, options)
    n_maps = len(MapFile.open(folder / kind / "overlays").index)
    reading, scoring = (len(shards) / median(column) for column in zip(*turns[1:], strict=True))
    share = median(a / b for a, b in turns[1:])
    share_of_disk = median(a / b for a, b in on_disk) if on_disk else None
    return Streamed(kind, reading, scoring, share, share_of_disk, n_maps, n_maps / mapping)


def forget(shards: ShardSet) -> None:
    """Have the page cache let go of a set, where that is possible: not of a folder in memory."""
    for path in shards.paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(shards: ShardSet) -> float:
    """Seconds to read every tar of a set, as `cat` would."""
    begin, buffer = time.perf_counter(), bytearray(2**20)
    for shard in shards.metadata.shards:
        with (shards.folder / shard.name).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


class Clock(Callback):
    """Notes when a run's first batch is asked for, after everything has been set up."""

    def on_predict_epoch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()


def predict(
    folder: Path, name: str, callbacks: list[Callback], only: Selection | None, options: argparse.Namespace
) -> float:
    """Seconds of a run over the shards, from its first batch to what it leaves on disk."""
    clock = Clock()
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu", devices=1, precision=options.precision,
        callbacks=[clock, *callbacks], logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data = ActivationData(folder / "tokens", images_per_batch=options.batch, num_workers=options.workers, only=only)
    module = SAEScoring if only is None else FeatureMapping
    trainer.predict(module(folder / name), data)
    return time.perf_counter() - clock.began


class PeakMemory(Callback):
    """The most private memory of this process after any batch, in MB: what is mapped from files does not count."""

    peak = 0.0

    def on_predict_batch_end(self, *_: Any) -> None:
        self.peak = max(self.peak, private_megabytes())


def private_megabytes() -> float:
    """Of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def memory(n_images: int, folder: Path, options: argparse.Namespace) -> Memory:
    """Score a capture of `n_images` images with statistics and top lists."""
    shards = make_shards(folder, "tokens", n_images, options)
    sae = make_sae(options.kinds[0], options)
    sae.set_statistics(shards.statistics, shards.spec)
    save_sae(folder / "sae", sae)
    table, peak = folder / "features.csv", PeakMemory()
    stage = [ScoresWriter(folder / "scores"), AliveStatistics(table), TopImages(table, 16), peak]
    took = predict(folder, "sae", stage, None, options)
    return Memory(n_images, peak.peak, took / n_images)


def make_sae(kind: str, options: argparse.Namespace) -> SAE:
    """Random weights, by whose biases a few features in a hundred have a code on a token."""
    more = {"k": options.k} if kind in ("TopK", "BatchTopK") else {}
    sae = KINDS[kind](options.width, options.features, **more, seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        sae.b_enc.fill_(-2.0 * float(sae.W_enc[0].norm()) if kind in ("L1", "BatchTopK") else 0.0)
    return sae


def draw(n_images: int, options: argparse.Namespace) -> Float[Tensor, "B T D"]:
    generator = torch.Generator().manual_seed(0)
    n_tokens = round(options.tokens**0.5) ** 2
    return torch.randn(n_images, n_tokens, options.width, generator=generator).to(torch.bfloat16)


def make_shards(folder: Path, kind: Kind, n_images: int, options: argparse.Namespace) -> ShardSet:
    """Random tokens, or plain pictures, of images that all have prompts of their own."""
    side = 16 * round(options.tokens**0.5)
    generation = GenerationSpec("random", "0" * 64, side, side, 1, 1.0, 1.0, 1, "bfloat16", "0" * 64, 1, 0)
    spec = CaptureSpec(generation, "transformer_blocks.0.ff", 0) if kind == "tokens" else generation
    writer = ShardWriter(folder / kind, spec, kind, "bf16", options.images_per_shard)
    drawn, plain = draw(16, options), Image.new("RGB", (side, side), "grey")
    for image in range(n_images):
        record = SampleRecord(image, image, 0, image, f"random tokens {image}")
        payload = drawn[image % 16].roll(image, 0) if kind == "tokens" else plain
        writer.add(image // options.images_per_shard, record, payload)
        if (image + 1) % options.images_per_shard == 0 or image + 1 == n_images:
            writer.close_shard(image // options.images_per_shard)
    writer.finalise(-(-n_images // options.images_per_shard))
    return ShardSet.open(folder / kind, kind)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--precision", default="bf16-mixed" if on_gpu else "32-true")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--features", type=int, default=12288)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="an image; rounded to a square number")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--images", type=int, default=4096, help="images in the shards: 1.6 MB each at full size")
    parser.add_argument("--images-per-shard", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that read")
    parser.add_argument("--calls", type=int, default=20, help="calls in a turn of the resident measurements")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="also read and score from the disk, past the page cache")
    parser.add_argument("--curve", type=int, nargs="+", help="numbers of images to score for the host's memory")
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
