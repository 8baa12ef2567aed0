"""FVE on validation tokens against seconds of training, a line a library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.quality import Sweep
from fluxsae.figures.style import BLUE, GREEN, MUTED, ORANGE, PINK, drawing

COLOURS = (BLUE, ORANGE, GREEN, PINK, MUTED)


def draw_curves(path: Path, sweeps: Sequence[Sweep]) -> None:
    """Draw the curve of each library's run of seed 0 at its best rate, named at its end."""
    with drawing(path, 6.4, 3.6) as figure:
        axis = figure.subplots()
        axis.set_title("Variance explained, held-out prompts")
        axis.set_xlabel("seconds of training")
        for one, colour in zip(sweeps, COLOURS, strict=False):
            curve = one.runs[0].curve
            seconds, fve = [point.seconds for point in curve], [point.fve for point in curve]
            axis.plot(seconds, fve, color=colour, linewidth=1.8, label=one.library)
        lowest = min(one.runs[0].curve[-1].fve for one in sweeps)
        axis.set_ylim(bottom=max(0.0, lowest - 0.1))  # the first steps are alike and would flatten the rest
        axis.legend(loc="lower right")
