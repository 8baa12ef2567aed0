"""`python -m benchmarks.peers quality --tokens FOLDER` and `python -m benchmarks.peers step`: see `--help` of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.dictionary_learning import DictionaryLearning
from benchmarks.peers.figure import draw_curves
from benchmarks.peers.library import Library, Task
from benchmarks.peers.ours import Ours
from benchmarks.peers.overcomplete import Overcomplete
from benchmarks.peers.quality import sweep_rates, table
from benchmarks.peers.sae_lens import SAELens
from benchmarks.peers.sparsify import Sparsify
from benchmarks.peers.steps import step_table, time_steps
from benchmarks.peers.tokens import load_tokens
from fluxsae.files.json_files import write_json

LIBRARIES: tuple[type[Library], ...] = (Ours, SAELens, Sparsify, DictionaryLearning, Overcomplete)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    asked = [kind for kind in LIBRARIES if not options.peers or kind.distribution in options.peers]
    kinds = importable(asked, options.device)
    result = (compare_quality if options.mode == "quality" else compare_steps)(kinds, options)
    if options.out:
        versions = {kind.distribution: version(kind.distribution) for kind in kinds}
        about = {"device": device_name(options.device), "versions": versions | {"torch": torch.__version__}}
        write_json(options.out, about | result)


def compare_quality(kinds: Sequence[type[Library]], options: argparse.Namespace) -> dict[str, Any]:
    tokens = load_tokens(options.tokens, options.n_tokens, options.held_out, options.device)
    n_steps = options.epochs * (len(tokens.train) // options.batch)
    print(
        f"{len(tokens.train)} training, {len(tokens.validation)} validation and {len(tokens.test)} test tokens; "
        f"{n_steps} steps of {options.batch} on {device_name(options.device)}, k = {options.k[0]}"
    )
    task = first_task(options, tokens.train.shape[1], n_steps)
    sweeps = [
        sweep_rates(kind, task, tokens, options.rates or kind.factors, options.seeds, options.every) for kind in kinds
    ]
    print(table(sweeps, Ours.name))
    if options.figure:
        draw_curves(options.figure, sweeps)
    return {"n_steps": n_steps, "batch": options.batch, "sweeps": plain(sweeps)}


def compare_steps(kinds: Sequence[type[Library]], options: argparse.Namespace) -> dict[str, Any]:
    task = first_task(options, options.d_in, options.warmup + options.steps)
    recipes = [replace(task, k=k, plain=plain) for plain in (True, False) for k in options.k]
    times = [one for recipe in recipes for one in time_steps(kinds, recipe, options.warmup)]
    where = device_name(options.device)
    print(f"{options.batch} tokens a step, d_in {options.d_in}, {options.n_features} features, {where}")
    print(step_table(times, Ours.name, absolute=options.device.type == "cuda"))
    return {"steps": plain(times)}


def first_task(options: argparse.Namespace, d_in: int, n_steps: int) -> Task:
    return Task(
        d_in=d_in,
        n_features=options.n_features,
        k=options.k[0],
        batch_size=options.batch,
        n_steps=n_steps,
        rate=0.0,  # each library has its own
        seed=0,
        device=options.device,
        dead_after=options.dead_after,
    )


def importable(kinds: Sequence[type[Library]], device: torch.device) -> list[type[Library]]:
    """Those that are, after a sentence on each that is not."""
    found = []
    for kind in kinds:
        try:
            kind(Task(d_in=4, n_features=8, k=2, batch_size=4, n_steps=2, rate=1e-3, seed=0, device=device))
            found.append(kind)
        except ImportError as error:
            print(f"{kind.name} is left out ({error}); pip install {kind.distribution}", file=sys.stderr)
    return found


def plain(value: Any) -> Any:
    """Named tuples as dicts, at every depth, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: plain(one) for name, one in value._asdict().items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def version(distribution: str) -> str:
    """What is installed; a checkout that is only on the path has no version."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    quality = modes.add_parser("quality", help="held-out FVE, dead features and seconds, on captured tokens")
    quality.add_argument("--tokens", type=Path, required=True, help="a shard set of tokens")
    quality.add_argument("--n-tokens", type=int, help="training tokens; by default all")
    quality.add_argument("--held-out", type=float, default=0.1, help="share of prompts for validation and test")
    quality.add_argument("--epochs", type=int, default=1)
    quality.add_argument("--seeds", type=int, default=3)
    quality.add_argument(
        "--rates", type=float, nargs="+", help="in each library's default rate; by default five, 2 apart"
    )
    quality.add_argument(
        "--every", type=int, default=0, help="steps between points of a curve; by default only the end"
    )
    quality.add_argument("--figure", type=Path, help="where to draw FVE over seconds")
    quality.set_defaults(n_features=1024, batch=2048, k=[32])
    step = modes.add_parser("step", help="the time of a training step, on synthetic tokens")
    step.add_argument("--d-in", type=int, default=3072)
    step.add_argument("--warmup", type=int, default=10, help="steps that do not count")
    step.add_argument("--steps", type=int, default=30, help="steps that count")
    step.set_defaults(n_features=12288, batch=8192, k=[32, 64])
    for mode in (quality, step):
        mode.add_argument("--n-features", type=int)
        mode.add_argument("--batch", type=int, help="tokens a step")
        mode.add_argument("--k", type=int, nargs="+")
        mode.add_argument("--peers", nargs="+", choices=[kind.distribution for kind in LIBRARIES], help="only these")
        mode.add_argument(
            "--dead-after", type=int, help="the same window, in tokens, for every library's dead features"
        )
        mode.add_argument("--device", type=torch.device, default=device)
        mode.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
