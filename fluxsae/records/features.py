"""The features table, `features.csv`: one row a feature, filled in column by column by the analyses.

`features.json` beside it says of which kind each column is, and what it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fluxsae.files import read_columns, remove_parts, unknown_key, write_columns
from fluxsae.records.columns import (
    KNOWN,
    RANKING,
    Column,
    Value,
    as_stored,
    column_of,
    decode,
    encode,
    read_declared,
    write_declared,
)


@dataclass(frozen=True)
class Feature:
    """One row of the features table. `row["name"]` is its value in any column.

    The columns of this package's own analyses are attributes as well. An attribute is None or empty where the value is
    unknown or the table has no such column.
    """

    columns: Mapping[str, Value]

    def __getitem__(self, name: str) -> Any:
        """The value in a column. KeyError, with the names of all columns, for an unknown one."""
        if name not in self.columns:
            raise KeyError(unknown_key(name, self.columns, "this features table", what="column"))
        return self.columns[name]

    @property
    def feature(self) -> int:
        """Its index in the SAE."""
        return self["feature"]

    @property
    def alive(self) -> bool:
        return bool(self.columns.get("alive"))

    @property
    def frequency(self) -> float | None:
        """The share of images on which it is active."""
        return self._number("frequency")

    @property
    def token_frequency(self) -> float | None:
        """The share of tokens on which it has a code."""
        return self._number("token_frequency")

    @property
    def max(self) -> float | None:
        """Its largest score."""
        return self._number("max")

    @property
    def mean_active(self) -> float | None:
        """The mean of its scores over the images on which it is active."""
        return self._number("mean_active")

    @property
    def std_active(self) -> float | None:
        """The standard deviation of these scores."""
        return self._number("std_active")

    @property
    def n_images(self) -> int | None:
        """On how many images it is active."""
        return self._number("n_images")

    @property
    def coherence(self) -> float | None:
        """How alike its top images look to CLIP: the mean cosine over pairs."""
        return self._number("coherence")

    @property
    def coherence_null(self) -> float | None:
        """The same for random images."""
        return self._number("coherence_null")

    @property
    def label(self) -> str:
        """What most of its top images share, such as `object=fox`."""
        return str(self.columns.get("label") or "")

    @property
    def label_share(self) -> float | None:
        """The share of its top images that have the label."""
        return self._number("label_share")

    @property
    def top_images(self) -> tuple[int, ...]:
        """The images on which it is strongest, best first."""
        images = self.columns.get("top_images") or ()
        assert isinstance(images, tuple)
        return images

    def _number(self, name: str) -> Any:
        return self.columns.get(name)


class FeatureTable(NamedTuple):
    """A table as it was read: its columns in the file's order, and its rows in that of the features."""

    columns: dict[str, Column]
    rows: list[Feature]

    @property
    def ranking(self) -> list[str]:
        """The columns that features can be ranked by."""
        return [column.name for column in self.columns.values() if column.kind in RANKING]


def update_features(path: str | Path, columns: Mapping[str, Sequence[Any]], declared: Sequence[Column] = ()) -> None:
    """Add or replace columns of the table, each a sequence over all features. A missing file is created.

    Values of a column in `declared` must have its kind, and `features.json` records the column. Values of other columns
    are stored as they are, as text or numbers.

    Raises ValueError when a column's length differs from the table's, or when a value is not of the declared kind.
    """
    path = Path(path)
    texts = read_columns(path) if path.exists() else {}
    said = read_declared(path) if texts.get("feature") else {}  # what lies beside no table is of an earlier one
    table: dict[str, Sequence[Any]] = {
        name: as_stored(column_of(name, texts[name], said), texts[name]) for name in texts
    }
    if not table.get("feature"):
        table = {"feature": range(len(next(iter(columns.values()))))}
    n_features = len(table["feature"])
    kinds = {column.name: column for column in declared}
    for name, values in columns.items():
        if name == "feature":
            raise ValueError("column 'feature' is the number of a row, which no analysis fills in; name another.")
        if len(values) != n_features:
            raise ValueError(
                f"column {name!r} has {len(values)} values but {path} has {n_features} features; "
                "the table is another SAE's: remove it or name another file."
            )
        table[name] = encode(kinds[name], values) if name in kinds else values
    names = [name for name in KNOWN if name in table] + sorted(table.keys() - set(KNOWN))
    if declared:
        said |= {name: column for name, column in kinds.items() if name in columns}
        # Before the table, so that no column of it is ever without its kind.
        write_declared(path, [said[name] for name in names if name in said])
    remove_parts(path)
    write_columns(path, {name: table[name] for name in names})


def read_table(path: str | Path) -> FeatureTable:
    """The table with all its columns. FileNotFoundError where there is none, ValueError when a field does not parse."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no features table at {path}; run the scores stage first.")
    texts, declared = read_columns(path), read_declared(path)
    columns = {name: column_of(name, values, declared) for name, values in texts.items()}
    try:
        values = {name: decode(column, texts[name]) for name, column in columns.items()}
        if None in values.get("feature", [None]):
            raise ValueError("column 'feature' is missing or has gaps")
    except ValueError as error:
        raise ValueError(f"{path} has rows that are no features ({error}); make the table again.") from error
    rows = zip(*values.values(), strict=True)
    return FeatureTable(columns, [Feature(dict(zip(columns, row, strict=True))) for row in rows])


def read_features(path: str | Path) -> list[Feature]:
    """The rows of a features table, in order of features.

    Raises FileNotFoundError when there is no table, and ValueError when a field does not parse.
    """
    return read_table(path).rows


@dataclass(frozen=True)
class Selection:
    """Which features to show, and how many of their top images.

    Args:
        table: the features table.
        n_features: how many of the best alive features to take; None takes all that have a value in `rank_by`.
        rank_by: the column that ranks features, largest first. It must hold numbers, or true and false. `feature`
            keeps the order of the table.
        n_images: number of top images of each feature.
        features: take exactly these features instead of ranking.
        ascending: rank the smallest first.
    """

    table: Path
    n_features: int | None = 20
    rank_by: str = "coherence"
    n_images: int = 9
    features: tuple[int, ...] | None = None
    ascending: bool = False

    def rows(self) -> list[Feature]:
        """The selected rows, best first. ValueError for an unknown feature or a column that cannot rank."""
        table = read_table(self.table)
        if self.features is not None:
            for feature in self.features:
                if not 0 <= feature < len(table.rows):
                    raise ValueError(
                        f"feature {feature} is not in {self.table}, which has features 0 to {len(table.rows) - 1}."
                    )
            return [table.rows[feature] for feature in self.features]
        if self.rank_by in table.columns and self.rank_by not in table.ranking:
            raise ValueError(
                f"features cannot be ranked by {self.rank_by!r}, a column of kind "
                f"{table.columns[self.rank_by].kind}; {self.table} has {', '.join(table.ranking)} to rank by."
            )
        ranked = [row for row in table.rows if row.alive and row.columns.get(self.rank_by) is not None]
        if not ranked:
            raise ValueError(
                f"{self.table} has no alive feature with a value in column {self.rank_by!r}; run the scores stage "
                f"with the callback that fills it in, or rank by another column: {', '.join(table.ranking)}."
            )
        sign = 1 if self.ascending or self.rank_by == "feature" else -1
        return sorted(ranked, key=lambda row: (sign * row[self.rank_by], row.feature))[: self.n_features]

    def images(self) -> list[int]:
        """All images that the selection shows, each once, ascending."""
        return sorted({image for row in self.rows() for image in row.top_images[: self.n_images]})
