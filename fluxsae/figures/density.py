"""How often features are active: a histogram of log10 frequency. Legend: F features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fluxsae.figures.style import BLUE, INK, MUTED, ORANGE, drawing
from fluxsae.files import write_csv
from fluxsae.records import Feature


def frequencies(table: Sequence[Feature]) -> Float[np.ndarray, "F"]:
    """The frequency of every feature. ValueError when the table does not have them."""
    if any(row.frequency is None for row in table):
        raise ValueError("the features table has no column 'frequency'; run the scores stage with AliveStatistics.")
    return np.array([row.frequency for row in table], dtype=np.float64)


def density(frequency: Float[np.ndarray, "F"], path: Path, *, bins: int = 40) -> None:
    """Draw how many features are active on which share of the images; features that never are stand apart, by number.

    The numbers go to a CSV of the same name, one row a bin: from, to (log10 of frequency), features. The first row,
    without limits, counts the features that are never active.
    """
    path = Path(path)
    active = frequency[frequency > 0]
    never = len(frequency) - len(active)
    logs = np.log10(active) if len(active) else np.array([0.0])
    counts, edges = np.histogram(logs, bins=bins, range=(min(float(logs.min()), -1.0), 0.0))
    counts = counts if len(active) else np.zeros_like(counts)
    with drawing(path, 6.4, 3.4) as figure:
        axis = figure.subplots()
        axis.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=BLUE)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"How often {len(frequency):,} features are active")
        axis.set_xlabel("share of images on which a feature is active")
        axis.set_ylabel("features")
        between = (0.2, 0.5) if edges[0] > -2.5 else ()
        ticks = [t for t in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, *between, 1.0) if np.log10(t) >= edges[0] - 1e-9]
        axis.set_xticks([float(np.log10(t)) for t in ticks], [f"{t * 100:g} %" for t in ticks])
        if len(active):
            median = float(np.median(logs))
            axis.axvline(median, color=ORANGE, linewidth=1.6)
            note = f" median {10**median:.1%}"
            axis.text(median, 1.0, note, color=ORANGE, weight="bold", va="top", transform=axis.get_xaxis_transform())
        axis.text(
            1.0, 1.035, f"{never:,} never active", color=INK if never else MUTED, ha="right", transform=axis.transAxes
        )
    rows: list[dict[str, float | None]] = [{"from": None, "to": None, "features": never}]
    rows += [
        {"from": float(a), "to": float(b), "features": int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), rows, ("from", "to", "features"))
