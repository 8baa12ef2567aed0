"""All figures of a study: which to draw, and drawing them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fluxsae.figures.compare_sites import both_sites, compare_sites
from fluxsae.figures.contact_sheet import SheetLayout, contact_sheet, sheet_rows
from fluxsae.figures.decoder import decoder
from fluxsae.figures.density import density, frequencies
from fluxsae.figures.training_curves import read_run, training_curves
from fluxsae.records import Selection, read_features
from fluxsae.sae import load_sae
from fluxsae.scoring import Scores


@dataclass(frozen=True)
class ComparedSite:
    """A site to compare: its scores, and which of its features."""

    scores: Path
    select: Selection


@dataclass(frozen=True)
class Figures:
    """What to draw. A figure whose files are not named is left out; each is a PNG with its numbers in a CSV beside it.

    Args:
        folder: where the figures go.
        select: the features of the contact sheet and of the decoder's cosines.
        images: folder of the captured images, for the contact sheet.
        overlays: folder of the overlays, for the contact sheet.
        layout: of the contact sheet: pairs of original and overlay, or overlays alone.
        title: of the contact sheet.
        sae: the SAE whose decoder is shown.
        runs: name → folder of trainings whose curves are shown in one figure.
        sites: two sites of the same images whose features are compared.
    """

    folder: Path
    select: Selection
    images: Path | None = None
    overlays: Path | None = None
    layout: SheetLayout = "pairs"
    title: str = ""
    sae: Path | None = None
    runs: dict[str, Path] = field(default_factory=dict)
    sites: list[ComparedSite] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.sites) not in (0, 2):
            raise ValueError(f"{len(self.sites)} sites are named to be compared; name two, or none.")


def draw_figures(figures: Figures) -> list[Path]:
    """Draw the figures whose inputs are named, and return the paths of the pictures."""
    drawn: list[Path] = []

    def place(name: str) -> Path:
        drawn.append(figures.folder / f"{name}.png")
        return drawn[-1]

    if figures.images is not None and figures.overlays is not None:
        rows = sheet_rows(figures.select, figures.images, figures.overlays)
        contact_sheet(rows, place("contact_sheet"), layout=figures.layout, title=figures.title)
    if figures.runs:
        training_curves({name: read_run(folder) for name, folder in figures.runs.items()}, place("training_curves"))
    density(frequencies(read_features(figures.select.table)), place("density"))
    if figures.sae is not None:
        weights = load_sae(figures.sae).W_dec.detach().numpy()
        decoder(weights, figures.select.rows(), place("decoder"))
    if figures.sites:
        left, right = (Scores.open(site.scores) for site in figures.sites)
        chosen = [site.select.rows() for site in figures.sites]
        compare_sites(*both_sites(left, right, chosen[0], chosen[1]), place("compare_sites"))
    return drawn
