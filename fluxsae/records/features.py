"""The features table, `features.csv`: one row a feature, filled in column by column by the analysis callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fluxsae.files import read_columns, read_csv, remove_parts, write_columns

COLUMNS = (
    "feature",
    "alive",
    "frequency",
    "token_frequency",
    "max",
    "mean_active",
    "std_active",
    "n_images",
    "class",
    "coherence",
    "coherence_null",
    "coherence_rank",
    "label",
    "label_share",
    "top_images",
)
"""The known columns in the order in which the file holds them; others follow alphabetically."""

RankBy = Literal["coherence", "max", "frequency", "feature"]


class Feature(NamedTuple):
    """One row of the table; None where no stage has filled the column in.

    `frequency` is the share of images on which the feature is active, `token_frequency` that of tokens; `max`,
    `mean_active` and `std_active` are of S over those images; `top_images` are image indices, best first; `label` is
    what most top images share.
    """

    feature: int
    alive: bool
    frequency: float | None
    max: float | None
    mean_active: float | None
    std_active: float | None
    n_images: int | None
    coherence: float | None
    coherence_null: float | None
    label: str
    label_share: float | None
    top_images: tuple[int, ...]
    token_frequency: float | None = None


def update_features(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Add or replace columns of the table, each a sequence over all features; the file is made when there is none.

    Raises ValueError when a column's length differs from the table's.
    """
    path = Path(path)
    table: dict[str, Sequence[Any]] = dict(read_columns(path)) if path.exists() else {}
    if not table.get("feature"):
        table = {"feature": range(len(next(iter(columns.values()))))}
    n_features = len(table["feature"])
    for name, values in columns.items():
        if len(values) != n_features:
            raise ValueError(
                f"column {name!r} has {len(values)} values but {path} has {n_features} features; "
                "the table is another SAE's: remove it or name another file."
            )
        table[name] = values
    names = [name for name in COLUMNS if name in table] + sorted(table.keys() - set(COLUMNS))
    remove_parts(path)
    write_columns(path, {name: table[name] for name in names})


def read_features(path: str | Path) -> list[Feature]:
    """The rows in feature order. FileNotFoundError without a table, ValueError when a field does not parse."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no features table at {path}; run the scores stage first.")
    return [_parse(row, path) for row in read_csv(path)]


@dataclass(frozen=True)
class Selection:
    """Which features to show, and how many of their top images.

    Args:
        table: the features table.
        n_features: how many of the best-ranked alive features to take; null for all that have a rank.
        rank_by: the column that ranks them, largest first (`feature`: in index order).
        n_images: top images a feature.
        features: take exactly these instead of ranking.
    """

    table: Path
    n_features: int | None = 20
    rank_by: RankBy = "coherence"
    n_images: int = 9
    features: tuple[int, ...] | None = None

    def rows(self) -> list[Feature]:
        """The selected rows, best first. ValueError for an unknown feature, or a ranking not yet made."""
        table = read_features(self.table)
        if self.features is not None:
            for feature in self.features:
                if not 0 <= feature < len(table):
                    raise ValueError(
                        f"feature {feature} is not in {self.table}, which has features 0 to {len(table) - 1}."
                    )
            return [table[feature] for feature in self.features]
        ranked = [row for row in table if row.alive and getattr(row, self.rank_by) is not None]
        if not ranked:
            raise ValueError(
                f"{self.table} has no alive feature with a value in column {self.rank_by!r}; "
                "run the scores stage with the callback that fills it in, or rank by another column."
            )
        sign = 1 if self.rank_by == "feature" else -1
        return sorted(ranked, key=lambda row: (sign * getattr(row, self.rank_by), row.feature))[: self.n_features]

    def images(self) -> list[int]:
        """All images that the selection shows, ascending, each once."""
        return sorted({image for row in self.rows() for image in row.top_images[: self.n_images]})


def _parse(row: Mapping[str, str], path: Path) -> Feature:
    try:
        return Feature(
            feature=int(row["feature"]),
            alive=row.get("alive", "") == "True",
            frequency=_number(row.get("frequency")),
            token_frequency=_number(row.get("token_frequency")),
            max=_number(row.get("max")),
            mean_active=_number(row.get("mean_active")),
            std_active=_number(row.get("std_active")),
            n_images=int(row["n_images"]) if row.get("n_images") else None,
            coherence=_number(row.get("coherence")),
            coherence_null=_number(row.get("coherence_null")),
            label=row.get("label") or "",
            label_share=_number(row.get("label_share")),
            top_images=tuple(int(image) for image in (row.get("top_images") or "").split()),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} has a row that is no feature ({error}): {dict(row)}; make the table again."
        ) from error


def _number(text: str | None) -> float | None:
    return float(text) if text else None
