"""The decoder of an SAE: how long its rows are, and how alike the directions of some features.

Legend: F features, R selected, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fluxsae.figures.matrix import draw_matrix, order_by_likeness, short_name
from fluxsae.figures.style import BLUE, MUTED, drawing
from fluxsae.files import write_csv
from fluxsae.records import Feature


def decoder(weights: Float[np.ndarray, "F D"], selected: Sequence[Feature], path: Path) -> None:
    """Draw a histogram of the rows' norms and the cosines between the directions of the selected features.

    Like directions stand side by side. The cosines go to a CSV of the same name, the norms to one ending in `_norms`.
    """
    path = Path(path)
    norms = np.linalg.norm(weights, axis=1)
    rows = weights[[feature.feature for feature in selected]]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosine = unit @ unit.T
    order = order_by_likeness(cosine)
    cosine = cosine[np.ix_(order, order)]
    features = [selected[i] for i in order]
    names = [short_name(feature) for feature in features]
    side = min(9.0, max(4.2, 0.21 * len(names) + 1.9))
    with drawing(path, side + 0.6, side + 1.5) as figure:
        above, below = figure.subplots(2, 1, height_ratios=(1.15, side))
        # Norms that training keeps at 1 differ by rounding only; a range this narrow would show nothing else.
        middle, half = float(norms.mean()), max(float(np.ptp(norms)) / 2, 0.01)
        above.hist(norms, bins=40, range=(middle - 1.1 * half, middle + 1.1 * half), color=BLUE)
        above.set_title(f"Norms of {len(norms):,} decoder rows")
        above.set_ylabel("features")
        above.grid(axis="x", visible=False)
        above.locator_params(axis="x", nbins=4)
        below.set_title("Cosine between feature directions")
        image = draw_matrix(below, cosine, names, names)
        bar = figure.colorbar(image, ax=below, shrink=0.4, aspect=18, ticks=(-1, 0, 1))
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors=MUTED)
    columns = [str(feature.feature) for feature in features]
    table = [
        {"feature": name, **dict(zip(columns, map(float, row), strict=True))}
        for name, row in zip(columns, cosine, strict=True)
    ]
    write_csv(path.with_suffix(".csv"), table, ("feature", *columns))
    norm_rows = [{"feature": i, "norm": float(norm)} for i, norm in enumerate(norms)]
    write_csv(path.with_name(f"{path.stem}_norms.csv"), norm_rows, ("feature", "norm"))
