"""What a study found, read from the files in its folder, as the lines that `fluxsae study` ends with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from fluxsae.files import read_csv, read_json
from fluxsae.records import CaptureSpec, Feature, read_features, shown

N_TOP = 10
"""Features listed."""

PLACES = (
    ("figures/contact_sheet.png", "features and where they are active"),
    ("figures", "all figures, with the numbers behind them"),
    ("overlays", "each feature's heat maps"),
    ("steering", "grids of steered images, effects.csv and summary.csv"),
    ("features.csv", "one row a feature"),
    ("scores", "S, images × features, as a memory-mapped array"),
    ("sae", "the TopK autoencoder; `tensorboard --logdir` shows its training"),
    ("capture", "images and tokens, as WebDataset shards"),
)


def report(folder: Path) -> Iterator[str]:
    """Lines about the results that exist in a study's folder."""
    yield f"\nWhat {folder} holds"
    yield from _captured(folder)
    yield from _autoencoders(folder)
    if (folder / "features.csv").exists():
        yield from _features(read_features(folder / "features.csv"))
    yield from _attributes(folder / "attributes.json")
    yield from _steering(folder / "steering" / "summary.csv")
    yield "\nWhere to look"
    there = [(str(folder / place), meaning) for place, meaning in PLACES if (folder / place).exists()]
    width = max((len(place) for place, _ in there), default=0)
    for place, meaning in there:
        yield f"  {place:<{width}}  {meaning}"


def _captured(folder: Path) -> Iterator[str]:
    path = folder / "capture" / "generation.json"
    if path.exists():
        values = read_json(path)
        spec = values["spec"]
        yield _line(
            "images",
            f"{values['n_images']} of {spec['height']}×{spec['width']} pixels from {values['n_prompts']} prompts, "
            f"{spec['n_steps']} steps of {spec['model']}",
        )


def _autoencoders(folder: Path) -> Iterator[str]:
    told = False
    for path in sorted(folder.glob("*/config.json")):
        config = read_json(path)
        found = config.get("training", {}).get("held_out")
        if found is None:
            continue
        if config["spec"] is not None and not told:
            spec = CaptureSpec.from_dict(config["spec"])
            yield _line(
                "tokens", f"{spec.n_tokens} an image at {spec.site}, step {spec.step}, of width {config['d_in']}"
            )
            told = True
        yield _line(
            config["kind"],
            f"FVE {found['fve']:.3f} at L0 {found['l0']:.1f}, {found['dead_fraction']:.1%} of {config['n_features']} "
            f"features dead, on {found['n_tokens']} tokens of held-out prompts ({path.parent.name}/)",
        )


def _features(table: list[Feature]) -> Iterator[str]:
    alive = [row for row in table if row.alive]
    yield _line("features", f"{len(alive)} of {len(table)} alive")
    ranked = sorted(
        (row for row in alive if row.coherence is not None), key=lambda row: (-(row.coherence or 0.0), row.feature)
    )
    if not ranked:
        return
    yield ""
    heads = f"{'coherence':>10}{'random sets':>13}{'active on':>11}"
    yield f"  {'most coherent':<15}{'shared by its top images':<34}{heads}"
    for row in ranked[:N_TOP]:
        name = shown(row.label.replace("=", " ", 1), at_most=26)
        label = f"{name} ({row.label_share:.0%})" if row.label and row.label_share else "–"
        null = "–" if row.coherence_null is None else f"{row.coherence_null:.3f}"
        active = "–" if row.frequency is None else f"{row.frequency:.1%}"
        yield f"  {'#' + str(row.feature):<15}{label:<34}{row.coherence:>10.3f}{null:>13}{active:>11}"


def _attributes(path: Path) -> Iterator[str]:
    if path.exists():
        found = read_json(path)
        yield ""
        yield _line(
            "named",
            f"one attribute is shared by ≥ {found['min_share']:.0%} of the top images for "
            f"{found['coherent_sharing']} of the {len(found['coherent'])} most coherent features, "
            f"and for {found['random_sharing']} of {len(found['random'])} random alive ones",
        )


def _steering(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    rows = read_csv(path)
    strengths = sorted({float(row["strength"]) for row in rows})
    if not strengths:
        return
    shown = [strengths[0], strengths[-1]] if strengths[0] < 0 else [strengths[-1]]
    n_features = len({row["feature"] for row in rows})
    heads = "".join(f"{f'{strength:+g}':>10} {'random':>10}" for strength in shown)
    yield _line("steering", f"{f'{n_features} features, steered, beside random directions as long':<57}{heads}")
    for name, meaning, digits in (
        ("clip_change", "rise in CLIP similarity with the feature's top images", 3),
        ("activation_change", "rise of the feature's own code", 2),
        ("ssim_distance", "change of the picture, 1 - SSIM", 2),
    ):
        cells = ""
        for strength in shown:
            at = [row for row in rows if float(row["strength"]) == strength]
            for kind in ("feature", "random"):
                values = [float(row[f"{kind}_{name}"]) for row in at if row.get(f"{kind}_{name}")]
                cells += f" {f'{fmean(values):+.{digits}f}' if values else '–':>10}"
        yield f"  {'':<13}{meaning:<56}{cells}"


def _line(head: str, text: str) -> str:
    return f"  {head:<13}{text}"
