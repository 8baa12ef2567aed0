"""All stages at FLUX.1-dev's size, on random weights, in nine minutes on one H100: `python -m benchmarks.full_size`.

First captures beside the plain loop, as `benchmarks.full_size.capture` has them, where the capture with images is that
of a study, of 200,000 tokens; then the study's training, scores and overlays, by `fluxsae` and `configs/flux-dev/`;
then S from tokens on the device and from shards, as `benchmarks.full_size.scores` has it. A line is printed for each
as it is there. `--tiny` runs all of it on a CPU in two minutes, where the times mean little.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.full_size import scores
from benchmarks.full_size.capture import CONFIG, Bench, Result, cases, compare
from benchmarks.full_size.model import FULL, TINY
from fluxsae.cli.command import main as fluxsae_main
from fluxsae.files.json_files import read_json, write_json
from fluxsae.scoring.map_files import MapFile
from fluxsae.shards.read import ShardSet
from fluxsae.study import read_config

CLIP = "local-dir:checkpoints/tiny-clip"
SMALL = {
    "num_workers": 0,
    "d_in": 16,
    "n_features": 64,
    "k": 4,
    "batch_size": 64,
    "max_epochs": 2,
    "images_per_batch": 4,
}
"""Sizes of `--tiny`, wherever a config has one of them."""


class Stage(NamedTuple):
    """A command of a study: what it took, from its start to its end, and the most memory of device and host, in GB."""

    name: str
    seconds: float
    n: int
    unit: str
    device_gigabytes: float
    host_gigabytes: float


def main(arguments: Sequence[str] | None = None) -> None:
    options, begin = parse(arguments), time.perf_counter()
    device = torch.device("cpu" if options.tiny else "cuda")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        bench = Bench(TINY if options.tiny else FULL, device, folder, pixels=64 if options.tiny else 256)
        tokens, with_images, several = cases(bench.how)  # of which the one with images stays, for the study
        work = [(tokens, options.prompts), (several, options.prompts), (with_images, options.study)]
        captures = compare(bench, options.plain, work, options.batch_size)
        print(f"\n{'':<20}{'seconds':>9}{'a second':>18}{'device GB':>11}{'host GB':>9}", flush=True)
        stages = study(bench, folder / "study", captures, options)
        megabytes = sum(path.stat().st_size for path in (folder / captures[-1].name).rglob("*") if path.is_file()) / 1e6
    rates = score_rates(options)
    estimate(captures[-1], megabytes / captures[-1].n_images, stages)
    print(f"All of this took {time.perf_counter() - begin:.0f} s.")
    if options.json is not None:
        where = "CPU" if options.tiny else torch.cuda.get_device_name(device)
        lists: dict[str, Sequence[Any]] = {"captures": captures, "stages": stages, "scores": rates}
        found = {name: [one._asdict() for one in results] for name, results in lists.items()}
        write_json(options.json, {"device": where, "torch": torch.__version__, **found})


def study(bench: Bench, folder: Path, captures: Sequence[Result], options: argparse.Namespace) -> list[Stage]:
    """The commands behind the capture that stands in `bench.folder`, without the FLUX."""
    folder.mkdir()
    capture = bench.folder / captures[-1].name
    (folder / "capture").symlink_to(capture)
    [tokens] = capture.glob("*/step-*")
    shards = ShardSet.open(tokens)
    del bench.pipe
    gc.collect()
    if not options.tiny:
        torch.cuda.empty_cache()
    found = []

    def stage(verb: str, name: str, count: Callable[[], int], unit: str) -> None:
        config = rewritten(name, folder, tokens, options.tiny)
        if not options.tiny:
            torch.cuda.reset_peak_memory_stats()
        host, begin = PeakMemory(), time.perf_counter()
        host.start()
        code = fluxsae_main([verb, "-c", str(config)])
        seconds = time.perf_counter() - begin
        host.stop()
        if code != 0:
            raise RuntimeError(f"fluxsae {verb} of {name} ended with code {code}, expected 0; its message is above.")
        device_gigabytes = 0.0 if options.tiny else torch.cuda.max_memory_allocated() / 1e9
        one = Stage(name, seconds, count(), unit, device_gigabytes, host.gigabytes)
        rate = f"{one.n / one.seconds:,.1f} {unit}"
        print(
            f"{name:<20}{one.seconds:>9.1f}{rate:>18}{one.device_gigabytes:>11.1f}{one.host_gigabytes:>9.1f}",
            flush=True,
        )
        found.append(one)

    print(f"{len(shards):,} images, {shards.statistics.n_tokens:,} tokens", flush=True)
    stage("fit", "topk", lambda: int(read_json(folder / "sae" / "config.json")["training"]["tokens_seen"]), "tokens")
    stage("predict", "scores", lambda: len(shards), "images")
    stage("predict", "overlays", lambda: len(MapFile.open(folder / "overlays").index), "maps")
    return found


def rewritten(name: str, folder: Path, tokens: Path, tiny: bool) -> Path:
    """A stage's config as it stands, but for its folders, a CLIP that is at hand, and `--tiny`'s sizes."""
    values = read_config(CONFIG.parent / f"{name}.yaml", folder)

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(one) for one in value]
        if not isinstance(value, dict):
            return value
        changed: dict[str, Any] = {
            key: SMALL[key] if tiny and key in SMALL else change(one) for key, one in value.items()
        }
        if str(value.get("class_path")).endswith("Coherence"):
            changed["init_args"]["clip"] = CLIP
        return changed

    values = change(values)
    values["data"]["init_args"]["shards"] = str(tokens)
    values["trainer"] |= {"accelerator": "cpu" if tiny else "gpu", "devices": 1, "enable_progress_bar": False}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class PeakMemory(threading.Thread):
    """The most private memory of this process until `stop`, in GB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gigabytes = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.gigabytes = max(self.gigabytes, scores.private_megabytes() / 1e3)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def score_rates(options: argparse.Namespace) -> list[Any]:
    """S of an L1 and a TopK SAE, from the device and from shards."""
    sizes = "--width 16 --features 64 --k 4 --tokens 16 --batch 8 --images 24 --calls 1 --turns 1".split()
    arguments = ["--kinds", "L1", "TopK", *(sizes if options.tiny else ["--images", "1024", "--turns", "2"])]
    arguments += ["--folder", str(options.folder)] if options.folder else []
    return scores.run(scores.parse(arguments))


def estimate(capture: Result, megabytes: float, stages: Sequence[Stage]) -> None:
    """What 10,000 images would take, by the rates above and the megabytes of one."""
    n, maps = 10_000, next(stage for stage in stages if stage.name == "overlays")
    hours, gigabytes = n / capture.images_per_second / 3600, n * megabytes / 1e3
    print(
        f"\n10,000 images with tokens of one site and step: {hours:.1f} hours and {gigabytes:.1f} GB, by that capture."
    )
    print(f"A map takes {maps.seconds / maps.n * 1e3:.2f} ms; the plain loop would make an image again for each.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="width 16, on a CPU")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--plain", type=int, default=8, help="images of the plain loop")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the captures of tokens, four images each")
    parser.add_argument("--study", type=int, default=196, help="prompts of the capture with images, four images each")
    parser.add_argument("--folder", type=Path, help="where temporary files go: 3 GB")
    parser.add_argument("--json", type=Path, help="where the results go as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
