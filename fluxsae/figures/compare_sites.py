"""Features of two sites on the same images: which respond alike.

Legend: I images, R and C selected features of the two sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxsae.figures.matrix import draw_matrix, order_by_likeness, short_name
from fluxsae.figures.style import BLUE, MUTED, drawing
from fluxsae.files import write_csv
from fluxsae.records import Feature, differences
from fluxsae.scoring import Scores


class Pair(NamedTuple):
    """Positions of a feature of each site, and the correlation of their scores over images."""

    left: int
    right: int
    correlation: float


class SiteFeatures(NamedTuple):
    """Some features of one site with their scores."""

    name: str
    features: Sequence[Feature]
    scores: Float[np.ndarray, "I R"]


def both_sites(
    left: Scores, right: Scores, left_features: Sequence[Feature], right_features: Sequence[Feature]
) -> tuple[SiteFeatures, SiteFeatures]:
    """The columns of S of these features, and names for the figure: of two SAEs of one site their folders', too.

    Reads only those columns. ValueError unless both are scores of one generation's images.
    """
    different = differences(left.spec.generation, right.spec.generation)
    if different:
        raise ValueError(
            f"{left.folder} and {right.folder} score different images ({'; '.join(different)}); "
            "compare two sites or steps of one capture."
        )
    names = [f"{scores.spec.site}, step {scores.spec.step}" for scores in (left, right)]
    if names[0] == names[1]:
        names = [f"{name}\n{scores.folder}" for name, scores in zip(names, (left, right), strict=True)]
    columns = [[feature.feature for feature in features] for features in (left_features, right_features)]
    return (
        SiteFeatures(names[0], left_features, np.array(left.matrix[:, columns[0]])),
        SiteFeatures(names[1], right_features, np.array(right.matrix[:, columns[1]])),
    )


def correlation(left: Float[np.ndarray, "I R"], right: Float[np.ndarray, "I C"]) -> Float[np.ndarray, "R C"]:
    """Pearson's correlation between columns; 0 for one that never changes."""
    units = []
    for columns in (left, right):
        centred = columns.astype(np.float64) - columns.mean(axis=0, dtype=np.float64)
        norms = np.linalg.norm(centred, axis=0)
        units.append(np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0))
    return units[0].T @ units[1]


def match(values: Float[np.ndarray, "R C"]) -> list[Pair]:
    """Pairs, each row and column at most once: always the largest correlation that is left, best pair first."""
    left, pairs = values.astype(np.float64).copy(), []
    for _ in range(min(values.shape)):
        row, column = np.unravel_index(int(left.argmax()), left.shape)
        pairs.append(Pair(int(row), int(column), float(values[row, column])))
        left[row, :] = -np.inf
        left[:, column] = -np.inf
    return pairs


def compare_sites(left: SiteFeatures, right: SiteFeatures, path: Path, *, n_pairs: int = 20) -> None:
    """Draw the correlations between the features of two sites, and the best pairs with theirs.

    Matched features stand on the diagonal. The correlations go to a CSV of the same name, the pairs to one
    ending in `_pairs`.
    """
    path = Path(path)
    values = correlation(left.scores, right.scores)
    pairs = match(values)
    by_row = {pair.left: pair.right for pair in pairs}
    start = order_by_likeness(correlation(left.scores, left.scores))
    rows = [row for row in start if row in by_row] + [row for row in start if row not in by_row]
    columns = [by_row[row] for row in rows if row in by_row]
    columns += [column for column in range(values.shape[1]) if column not in columns]
    names = [[short_name(feature) for feature in site.features] for site in (left, right)]
    side = min(9.0, max(4.2, 0.21 * max(values.shape) + 1.9))
    with drawing(path, 1.62 * side + 0.8, side) as figure:
        matrix, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
        matrix.set_title("Correlation of scores over images")
        row_names, column_names = [names[0][i] for i in rows], [names[1][i] for i in columns]
        image = draw_matrix(matrix, values[np.ix_(rows, columns)], row_names, column_names)
        matrix.set_ylabel(left.name)
        matrix.set_xlabel(right.name)
        bar = figure.colorbar(image, ax=matrix, shrink=0.5, aspect=18, ticks=(-1, 0, 1))
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=MUTED)
        shown = pairs[:n_pairs]
        where = range(len(shown))
        bars.set_title("Best pairs")
        bars.barh(where, [pair.correlation for pair in shown], color=BLUE, height=0.72)
        bars.set_yticks(where, [f"{names[0][p.left]}  ·  {names[1][p.right]}" for p in shown], fontsize=8.5)
        for y, pair in zip(where, shown, strict=True):
            at = max(pair.correlation, 0.0) + 0.015
            bars.text(at, y, f"{pair.correlation:.2f}", va="center", fontsize=8.5, color=BLUE, weight="bold")
        bars.set_ylim(len(shown) - 0.4, -0.6)
        bars.set_xlim(min(0.0, *(pair.correlation for pair in shown), 0.0), 1.1)
        bars.set_xticks(())
        bars.grid(visible=False)
        bars.spines["bottom"].set_visible(False)
    _write_numbers(left, right, values, pairs, path)


def _write_numbers(
    left: SiteFeatures, right: SiteFeatures, values: Float[np.ndarray, "R C"], pairs: list[Pair], path: Path
) -> None:
    columns = [str(feature.feature) for feature in right.features]
    table = [
        {"feature": feature.feature, **dict(zip(columns, map(float, row), strict=True))}
        for feature, row in zip(left.features, values, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), table, ("feature", *columns))
    matched = [
        {
            "left": left.features[pair.left].feature,
            "left_label": left.features[pair.left].label,
            "right": right.features[pair.right].feature,
            "right_label": right.features[pair.right].label,
            "correlation": pair.correlation,
        }
        for pair in pairs
    ]
    names = ("left", "left_label", "right", "right_label", "correlation")
    write_csv(path.with_name(f"{path.stem}_pairs.csv"), matched, names)
