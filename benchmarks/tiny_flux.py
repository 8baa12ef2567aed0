"""Judge the bundled model: does it draw what captions say that no training saw? `python -m benchmarks.tiny_flux`.

The judge (benchmarks/judge.py) is first checked on rendered scenes, whose truth is known. Prints a table of measures
and ends with status 1 if one falls short of what is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FluxPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from benchmarks.judge import Verdict, ZeroShot, judge, load_zero_shot, truth
from fluxsae.figures.style import GREEN, INK, MUTED, ORANGE, drawing
from fluxsae.files.whole import whole_file
from fluxsae.models.generation import generate
from fluxsae.models.load import load_pipeline
from scripts.tiny.scenes import SIDE, Caption, random_caption, render, to_tensors
from scripts.tiny.text import TEXT_LENGTH

N_AUTOENCODED = 1000


@dataclass(frozen=True)
class Measure:
    """A figure, taken over `n` cases, and the bound wanted of it, if any."""

    name: str
    value: float
    unit: str
    n: int
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        bounds = (("≥", self.at_least), ("≤", self.at_most))
        return " ".join(f"{sign} {bound:g} {self.unit}" for sign, bound in bounds if bound is not None)

    @property
    def reached(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


class Scenes(NamedTuple):
    """Held-out captions, and the scenes they describe as 8-bit pictures with everything true of them."""

    captions: list[Caption]
    truths: list[dict[str, str]]
    pictures: Float[Tensor, "B 3 S S"]


class Generated(NamedTuple):
    """A generated image, the caption it was asked for, and the verdict on it."""

    image: Image.Image
    caption: Caption
    verdict: Verdict


def main() -> None:
    options = parse()
    zero_shot = load_zero_shot(options.clip, options.device)
    measures = check_judge("rendered", draw_scenes(options.n, options.seed + 1), zero_shot, at_least=98.0)
    generated: list[Generated] = []
    if not options.check_judge_only:
        pipe = load_pipeline(options.model, device=options.device)
        measures += measure_autoencoder(pipe.vae, draw_scenes(N_AUTOENCODED, options.seed + 2), options.n, zero_shot)
        captions = draw_scenes(options.n, options.seed).captions
        generated = judge_generated(captions, generate_all(pipe, captions, options), zero_shot)
        measures += measure_generated([g.verdict for g in generated])
        what = f"time an image, batch 8, 12 steps, CPU threads: {torch.get_num_threads()}"
        measures.append(Measure(what, time_an_image(options.model), "s", 3, at_most=0.5))
        measures.append(Measure("bundled weights", megabytes(options.model, options.clip), "MB", 1, at_most=40))
    print(table(measures))
    if options.out:
        write_json(options.out, measures, generated, options)
    if options.grid and generated:
        draw_grid(options.grid, generated[:40])
    sys.exit(0 if all(measure.reached for measure in measures) else 1)


def draw_scenes(n: int, seed: int) -> Scenes:
    """`n` scenes whose captions no training saw."""
    rng = random.Random(seed)
    scenes, captions = zip(*(random_caption(rng, held_out=True) for _ in range(n)), strict=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = [render(to_tensors(list(scenes[i : i + 100])), generator).images for i in range(0, n, 100)]
    return Scenes(list(captions), [truth(scene) for scene in scenes], to_8bit(torch.cat(pictures)))


def to_8bit(pictures: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    """The same pictures in 0 to 1 as an 8-bit file would keep them."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def check_judge(what: str, scenes: Scenes, zero_shot: ZeroShot, at_least: float | None = None) -> list[Measure]:
    """What share of scenes whose truth is known the judge reads right, attribute by attribute."""
    verdicts = judge(scenes.pictures, scenes.truths, zero_shot)
    one, two = by_count(verdicts)
    return [
        share(f"judge on {what} scenes: background", verdicts, "background", at_least),
        share(f"judge on {what} scenes: object, one", one, "object", at_least),
        share(f"judge on {what} scenes: both objects, two", two, "object", at_least),
        share(f"judge on {what} scenes: place, one", one, "place", at_least),
        share(f"judge on {what} scenes: both places, two", two, "place", at_least),
        share(f"judge on {what} scenes: size", verdicts, "size"),
    ]


@torch.inference_mode()
def measure_autoencoder(vae: AutoencoderKL, scenes: Scenes, n_judged: int, zero_shot: ZeroShot) -> list[Measure]:
    """The autoencoder's PSNR over all pixels of all scenes, and what the judge still reads in `n_judged` of them."""
    recon = []
    for batch in scenes.pictures.split(50):
        latents = vae.encode(batch.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode()
        recon.append(to_8bit((vae.decode(latents).sample.float().cpu() + 1) / 2))
    decoded = torch.cat(recon)
    judged = Scenes(scenes.captions[:n_judged], scenes.truths[:n_judged], decoded[:n_judged])
    return [
        *check_judge("autoencoded", judged, zero_shot),
        Measure("autoencoder PSNR", psnr(scenes.pictures, decoded), "dB", len(decoded), at_least=30),
    ]


def psnr(pictures: Float[Tensor, "B 3 S S"], others: Float[Tensor, "B 3 S S"]) -> float:
    """Peak signal-to-noise ratio in dB, by the mean squared error over all pixels."""
    return -10 * (pictures - others).square().mean().log10().item()


def generate_all(pipe: FluxPipeline, captions: Sequence[Caption], options: argparse.Namespace) -> list[Image.Image]:
    images: list[Image.Image] = []
    for start in range(0, len(captions), options.batch):
        texts = [caption.text for caption in captions[start : start + options.batch]]
        images += draw_images(pipe, texts, options.seed * 1_000_000 + start, options.steps, options.guidance)
        print(f"\rgenerated {len(images)} of {len(captions)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return images


def draw_images(
    pipe: FluxPipeline, texts: Sequence[str], seed: int, n_steps: int, guidance: float
) -> list[Image.Image]:
    """An image a text, from seeds that count up from `seed`."""
    images = generate(
        pipe,
        texts,
        range(seed, seed + len(texts)),
        height=SIDE,
        width=SIDE,
        n_steps=n_steps,
        guidance=guidance,
        text_length=TEXT_LENGTH,
    ).images
    assert images is not None
    return images


def judge_generated(captions: Sequence[Caption], images: Sequence[Image.Image], zero_shot: ZeroShot) -> list[Generated]:
    pictures = torch.stack([to_tensor(image) for image in images])
    verdicts = judge(pictures, [caption.attributes for caption in captions], zero_shot)
    return [Generated(*row) for row in zip(images, captions, verdicts, strict=True)]


def measure_generated(verdicts: Sequence[Verdict]) -> list[Measure]:
    """What share of generated images shows each attribute as their captions say it."""
    one, two = by_count(verdicts)
    return [
        share("generated: background", verdicts, "background", 98.0),
        share("generated: object, one", one, "object", 90.0),
        share("generated: both objects, two", two, "object", 80.0),
        share("generated: place", verdicts, "place", 95.0),
        share("generated: place, one", one, "place"),
        share("generated: both places, two", two, "place"),
        share("generated: size", verdicts, "size"),
    ]


def by_count(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """The verdicts on captions of one object, and those on captions of two."""
    one = [verdict for verdict in verdicts if "|" not in verdict.found["object"]]
    return one, [verdict for verdict in verdicts if "|" in verdict.found["object"]]


def share(name: str, verdicts: Sequence[Verdict], attribute: str, at_least: float | None = None) -> Measure:
    """In what percentage of the verdicts on an attribute it is right; NaN where no caption says it."""
    right = [verdict.right[attribute] for verdict in verdicts if attribute in verdict.right]
    return Measure(name, 100 * sum(right) / len(right) if right else float("nan"), "%", len(right), at_least)


def time_an_image(model: Path, batch: int = 8, n_steps: int = 12, n_times: int = 3) -> float:
    """Seconds an image takes on this CPU: the median of a few batches, after one to warm up."""
    pipe = load_pipeline(model)
    texts = [caption.text for caption in draw_scenes(batch, 0).captions]
    seconds = []
    for _ in range(1 + n_times):
        started = time.perf_counter()
        draw_images(pipe, texts, 0, n_steps, 3.5)
        seconds.append((time.perf_counter() - started) / batch)
    return median(seconds[1:])


def megabytes(*folders: Path) -> float:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors")) / 1e6


def table(measures: Sequence[Measure]) -> str:
    rows = [("measure", "value", "of", "wanted", "")]
    for m in measures:
        verdict = ("ok" if m.reached else "SHORT") if m.wanted else ""
        rows.append((m.name, f"{m.value:.2f} {m.unit}", str(m.n), m.wanted, verdict))
    a, b, c, d = (max(len(row[i]) for row in rows) for i in range(4))
    lines = [f"{row[0]:<{a}}  {row[1]:>{b}}  {row[2]:>{c}}  {row[3]:<{d}}  {row[4]}".rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def missed_objects(generated: Sequence[Generated]) -> Counter[tuple[str, str]]:
    """How often an object was said and another (or the same, elsewhere) found: the most missed first."""
    pairs: Counter[tuple[str, str]] = Counter()
    for _, caption, verdict in generated:
        names = zip(caption.attributes["object"].split("|"), verdict.found["object"].split("|"), strict=True)
        pairs.update(pair for pair in names if pair[0] != pair[1])
    return pairs


def write_json(
    path: Path, measures: Sequence[Measure], generated: Sequence[Generated], options: argparse.Namespace
) -> None:
    record = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "measures": [asdict(m) | {"reached": m.reached} for m in measures],
        "missed_objects": [[*pair, n] for pair, n in missed_objects(generated).most_common()],
        "images": [{"caption": g.caption.text, "said": g.caption.attributes, **g.verdict._asdict()} for g in generated],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def draw_grid(path: Path, generated: Sequence[Generated], columns: int = 8) -> None:
    """The images with their captions, and below each what was said, marked as right or as what was found instead."""
    rows = -(-len(generated) // columns)
    with drawing(path, 1.75 * columns, 2.75 * rows) as figure:
        figure.set_layout_engine(None)  # it leaves too little room for what hangs below the last row
        figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.21 / rows, bottom=0.21 / rows, wspace=0.08, hspace=0.6)
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in cells:
            axes.set_axis_off()
        for axes, (image, caption, verdict) in zip(cells, generated, strict=False):
            axes.imshow(image)
            title = textwrap.fill(caption.text, 28, max_lines=4)
            axes.set_title(title, fontsize=6.5, fontweight="normal", color=INK, loc="left", va="bottom", pad=4)
            for line, (attribute, right) in enumerate(verdict.right.items()):
                found = verdict.found[attribute].replace("|", " | ") or "nothing"
                text, colour = (f"✓ {attribute}", GREEN) if right else (f"✗ {attribute}: {found}", ORANGE)
                colour = MUTED if attribute == "size" and not right else colour
                axes.text(0, -0.05 - 0.085 * line, text, fontsize=6, color=colour, va="top", transform=axes.transAxes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-flux"))
    parser.add_argument("--clip", type=Path, default=Path("checkpoints/tiny-clip"))
    parser.add_argument("--n", type=int, default=512, help="images to generate, and scenes to check the judge on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="where images are generated; the timing is always on the CPU")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write all measures and verdicts to this JSON file")
    parser.add_argument("--grid", type=Path, help="draw the first 40 images with their verdicts to this PNG")
    parser.add_argument("--check-judge-only", action="store_true", help="stop after the check on rendered scenes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
