"""Images a second of a capture at FLUX.1-dev's size. `python -m benchmarks.full_size.capture --json FILE`.

Random weights, made on the GPU, go through what `fluxsae predict -c configs/flux-dev/capture.yaml` runs. Beside it, in
the same process, runs the loop that one would write: diffusers' pipeline at batch 1 with a forward hook. `--schnell`
takes FLUX.1-schnell's setting instead, `--pixels` another size. `--card 24` caps the memory at so many GB, takes the
settings for such a card, and weights from host memory. `--gpus 1 2` captures as many images a GPU by one process and by
two, a GPU each. `--tiny` runs all of it on a CPU in less than a minute, on 64×64 pixels and blocks of width 16, where
the times mean little.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from diffusers import FluxPipeline
from torch import nn

import fluxsae.capture.module
from benchmarks.full_size.model import FULL, TINY, Size, random_pipeline, write_frame
from benchmarks.full_size.processes import run_together
from fluxsae.cli.command import main as fluxsae_main
from fluxsae.files.json_files import read_json, write_json
from fluxsae.records.prompts import read_prompts
from fluxsae.shards.read import ShardSet
from fluxsae.study import read_config

CONFIG = Path("configs/flux-dev/capture.yaml")
MEMORY = Path("configs/flux-dev/memory")
SCHNELL = {"n_steps": 4, "steps": [2], "text_length": 256}
"""What FLUX.1-schnell's setting changes, beside its transformer, which has no guidance embedding."""

IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the first of several processes that capture together, or alone."""

ONLY = ["tokens", "images", "several"]
"""Short names of `cases`."""


class Case(NamedTuple):
    """A capture to time, as keys of `FluxCapture`."""

    name: str
    options: dict[str, Any]


class Result(NamedTuple):
    """What a case took; `ratio` is its images a second over the plain loop's, None where that was not run."""

    name: str
    n_images: int
    seconds: float
    images_per_second: float
    ratio: float | None
    gigabytes: float


def cases(how: dict[str, Any]) -> list[Case]:
    """Tokens of one site and step, with the pictures too, and three sites × three steps."""
    site, step = how["sites"][0], how["steps"][0]
    stem, number, rest = site.split(".", 2)
    apart = max(1, step // 3)
    sites = [f"{stem}.{int(number) - back}.{rest}" for back in (8, 4, 0)]
    return [
        Case("tokens", {"images": False}),
        Case("tokens and images", {"images": True}),
        Case("3 sites × 3 steps", {"images": False, "sites": sites, "steps": [step - 2 * apart, step - apart, step]}),
    ]


def plain_loop(pipe: FluxPipeline, prompts: Sequence[str], how: dict[str, Any], folder: Path) -> None:
    """What one would write: an image a call, a hook that keeps what it sees, files as they come."""
    seen: list[torch.Tensor] = []
    module = pipe.transformer.get_submodule(how["sites"][0])
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output.detach().cpu()))
    for i, prompt in enumerate(prompts):
        seen.clear()
        image = pipe(
            prompt,
            height=how["height"],
            width=how["width"],
            num_inference_steps=how.get("n_steps", 20),
            guidance_scale=how.get("guidance", 3.5),
            max_sequence_length=how["text_length"],
            generator=torch.Generator().manual_seed(i),
        ).images[0]
        image.save(folder / f"{i}.png")
        torch.save(seen[how["steps"][0]], folder / f"{i}.pt")
    handle.remove()


class Bench:
    """Times captures of one random FLUX, each after a batch that warms up and compiles.

    Args:
        size: of the FLUX.
        device: where it runs.
        folder: for all that is written.
        on_host: keep the weights in host memory, whence each capture takes them.
        pixels: on a side of an image.
        schnell: take FLUX.1-schnell's setting.
        n_processes: how many capture together; this is one of them.
    """

    def __init__(
        self,
        size: Size,
        device: torch.device,
        folder: Path,
        on_host: bool = False,
        pixels: int = 256,
        schnell: bool = False,
        n_processes: int = 1,
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.n_processes = n_processes
        self.folder = folder
        self.configs = [CONFIG]
        self.values = read_config(CONFIG)
        self.setting: dict[str, Any] = {"height": pixels, "width": pixels, **(SCHNELL if schnell else {})}
        self.how: dict[str, Any] = self.values["model"]["init_args"] | self.setting
        self.frame = folder / "model"
        if not self.frame.exists():
            write_frame(self.frame, size)
        self.pipe = random_pipeline(size, dtype, device)
        self.on_host = on_host
        if on_host:
            self.pipe.to("cpu")

    def imitate(self, card: int) -> None:
        """Take the settings for a card of so many gigabytes, and no more memory than that."""
        self.configs = [CONFIG, MEMORY / f"{card}GB.yaml"]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            number = torch.cuda.current_device()
            share = card * 1e9 / torch.cuda.get_device_properties(number).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), number)

    def plain(self, n_images: int) -> Result:
        prompts = [prompt.text for prompt in read_prompts(Path(self.values["data"]["init_args"]["prompts"]))]
        (self.folder / "plain").mkdir()
        self.pipe.to(self.device)
        plain_loop(self.pipe, prompts[:1], self.how, self.folder / "plain")
        return self._timed(
            "plain loop", n_images, lambda: plain_loop(self.pipe, prompts[:n_images], self.how, self.folder / "plain")
        )

    def capture(self, case: Case, n_prompts: int, batch_size: int | None) -> Result:
        """A case, with as many images a batch, or as the card's settings have it."""
        repetitions = self.values["data"]["init_args"]["repetitions"]
        n_images = n_prompts * repetitions
        if batch_size is None:
            batch_size = next(
                found["batch_size"]
                for path in reversed(self.configs)
                if "batch_size" in (found := yaml.safe_load(path.read_text())["data"].get("init_args", {}))
            )
        n_warm_up = -(-batch_size // repetitions) * self.n_processes
        self._predict(case, n_warm_up, batch_size, self.folder / f"warm-up {case.name}")
        result = self._timed(
            case.name, n_images, lambda: self._predict(case, n_prompts, batch_size, self.folder / case.name)
        )
        made = ShardSet.open(next((self.folder / case.name).glob("*/step-*")))
        assert len(made) == n_images
        return result

    def _predict(self, case: Case, n_prompts: int, batch_size: int, folder: Path) -> None:
        """The command itself, whose weights are at hand already, in memory that the one before has left."""
        gc.collect()
        options = {"model": self.frame, "folder": folder, **self.setting, **case.options}
        arguments = [word for config in self.configs for word in ("-c", str(config))]
        arguments += [f"--model.init_args.{key}={value}" for key, value in options.items()]
        each = n_prompts * self.values["data"]["init_args"]["repetitions"] // self.n_processes  # a process
        sizes = {"limit": n_prompts, "batch_size": batch_size, "images_per_shard": min(64, each)}
        arguments += [f"--data.init_args.{key}={value}" for key, value in sizes.items()]
        arguments += [f"--trainer.accelerator={'gpu' if self.device.type == 'cuda' else 'cpu'}"]
        arguments += ["--trainer.enable_progress_bar=false", f"--trainer.devices={self.n_processes}"]
        parts = FluxPipeline(**self._components())
        parts.set_progress_bar_config(disable=True)
        with mock.patch.object(fluxsae.capture.module, "load_pipeline", lambda *_, **__: parts):
            code = fluxsae_main(["predict", *arguments])
        if code != 0:
            raise RuntimeError(f"fluxsae predict ended with code {code}, expected 0; its message is above.")

    def _components(self) -> dict[str, Any]:
        """The pipeline's; from host memory as if they came from the disk: what a capture moves to the device, or lets
        go of, is nobody else's."""
        found = self.pipe.components
        if not self.on_host:
            return found
        return {name: _shell(part) if isinstance(part, nn.Module) else part for name, part in found.items()}

    def _timed(self, name: str, n_images: int, work: Callable[[], None]) -> Result:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        gigabytes = torch.cuda.max_memory_allocated(self.device) / 1e9 if cuda else 0.0
        return Result(name, n_images, seconds, n_images / seconds, None, gigabytes)


def _shell(module: nn.Module) -> nn.Module:
    """The same module on the same memory, until it is moved to another."""
    tensors = [*module.parameters(), *module.buffers()]
    shared = {id(one): nn.Parameter(one.data, False) if isinstance(one, nn.Parameter) else one.data for one in tensors}
    return copy.deepcopy(module, shared)


def compare(bench: Bench, n_plain: int, work: Sequence[tuple[Case, int]], batch_size: int | None) -> list[Result]:
    """The plain loop, where `n_plain` is not 0, and all of `cases` beside it, each with so many prompts.

    A table's line is printed for each.
    """
    say(head("× plain"))
    found = [told(bench.plain(n_plain)._replace(ratio=1.0))] if n_plain else []
    for case, n_prompts in work:
        result = bench.capture(case, n_prompts, batch_size)
        ratio = result.images_per_second / found[0].images_per_second if n_plain else None
        found.append(told(result._replace(ratio=ratio)))
    rates = {result.name: result.images_per_second for result in found}
    if {"tokens", "3 sites × 3 steps"} <= rates.keys():
        more = rates["tokens"] / rates["3 sites × 3 steps"] - 1
        say(f"An image of 3 sites × 3 steps takes {more:+.1%} more time than of one.")
    return found


def head(ratio: str) -> str:
    """The table's first line."""
    return f"{'':<26}{'images':>8}{'images/s':>10}{ratio:>9}{'GB':>8}"


def told(result: Result) -> Result:
    """The result itself, after its line of the table."""
    ratio = "–" if result.ratio is None else f"{result.ratio:.2f}"
    numbers = f"{result.n_images:>8}{result.images_per_second:>10.3f}{ratio:>9}{result.gigabytes:>8.1f}"
    say(f"{result.name:<26}{numbers}")
    return result


def say(line: str) -> None:
    """Print a line, of several processes by the first."""
    if IS_FIRST:
        print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    size = TINY if options.tiny else FULL
    if options.schnell:
        size = size._replace(transformer={**size.transformer, "guidance_embeds": False})
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = on_gpus(size, folder, words, options) if options.gpus else captures(size, folder, options)
    if options.json is not None and IS_FIRST:
        where = "CPU" if options.tiny else torch.cuda.get_device_name()
        write_json(
            options.json, {"device": where, "torch": torch.__version__, "results": [r._asdict() for r in results]}
        )


def captures(size: Size, folder: Path, options: argparse.Namespace) -> list[Result]:
    """What the options ask for, in this process, which may be one of several that capture together."""
    device = torch.device("cpu" if options.tiny else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if not options.tiny:
        torch.cuda.set_device(device)
    n = options.process_of
    pixels = options.pixels or (64 if options.tiny else 256)
    bench = Bench(size, device, folder, options.card is not None, pixels, options.schnell, n)
    chosen = [case for name, case in zip(ONLY, cases(bench.how), strict=True) if name in options.only]
    if options.card is None:
        work = [(case, options.prompts * n) for case in chosen]
        return compare(bench, options.plain, work, options.batch_size or 8)
    results = []
    for card in options.card:
        bench.imitate(card)
        work = [(case._replace(name=f"{case.name}, {card} GB"), options.prompts) for case in chosen]
        results += compare(bench, 0, work, options.batch_size)
    return results


def on_gpus(size: Size, folder: Path, words: Sequence[str], options: argparse.Namespace) -> list[Result]:
    """The captures by each number of processes; ratios are to the first of these numbers."""
    found: list[Result] = []
    first: dict[str, float] = {}
    for n in options.gpus:
        own = folder / f"{n} GPUs"
        write_frame(own / "model", size)
        one_of = f"--gpus --plain 0 --process-of {n} --folder".split()  # the last word said of an option counts
        command = [sys.executable, "-m", "benchmarks.full_size.capture", *words, *one_of, str(own)]
        run_together([*command, "--json", str(own / "found.json")], n)
        for values in read_json(own / "found.json")["results"]:
            one = Result(**values)
            ratio = one.images_per_second / first.setdefault(one.name, one.images_per_second)
            found.append(one._replace(name=f"{one.name}, {n} GPU{'s' if n > 1 else ''}", ratio=ratio))
    say(head("× first"))
    return [told(one) for one in found]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="width 16, on a CPU")
    parser.add_argument(
        "--card",
        type=int,
        nargs="+",
        help="imitate cards of so many GB, by their files in configs/; without plain loop",
    )
    parser.add_argument("--schnell", action="store_true", help="4 steps, 256 text tokens, no guidance embedding")
    parser.add_argument("--pixels", type=int, help="on a side of an image; by default 256, with --tiny 64")
    parser.add_argument("--batch-size", type=int, help="by default 8, or what the card's settings say")
    parser.add_argument("--only", choices=ONLY, nargs="+", default=ONLY, help="these captures alone")
    parser.add_argument("--plain", type=int, default=12, help="images of the plain loop")
    parser.add_argument("--prompts", type=int, default=48, help="prompts of each capture, four images each")
    parser.add_argument("--gpus", type=int, nargs="*", help="capture on so many GPUs, in turn; without plain loop")
    parser.add_argument("--json", type=Path, help="where the results go as well")
    parser.add_argument("--process-of", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
