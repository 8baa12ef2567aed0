"""What figures of similarity matrices share: an order that puts like beside like, and the drawing.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from fluxsae.records import Feature, shown


def order_by_likeness(similarity: Float[np.ndarray, "R R"]) -> list[int]:
    """An order of rows in which each follows the one it is most like, starting from the one most like any other."""
    values = similarity.copy()
    np.fill_diagonal(values, -np.inf)
    order = [int(values.max(axis=1).argmax())] if len(values) else []
    while len(order) < len(values):
        following = values[order[-1]].copy()
        following[order] = -np.inf
        left = [i for i in range(len(values)) if i not in order]
        order.append(max(left, key=lambda i: following[i]))
    return order


def short_name(feature: Feature) -> str:
    """`fox 17` for a labelled feature, `17` for another."""
    value = feature.label.partition("=")[2] or feature.label
    return f"{shown(value, at_most=24)} {feature.feature}".strip()


def draw_matrix(
    axis: Axes, values: Float[np.ndarray, "R C"], rows: Sequence[str], columns: Sequence[str], limit: float = 1.0
) -> AxesImage:
    """Draw values from -limit to limit, red above 0 and blue below, with a name a row and column."""
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="equal", interpolation="nearest")
    size = 8.5 if max(len(rows), len(columns)) <= 24 else 6.5
    axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axis.set_yticks(range(len(rows)), rows, fontsize=size)
    axis.grid(visible=False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", size=0)
    return image
