"""Draw which features of two sites (or steps, or SAEs) respond to the same images, from their scores on one capture."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxsae.figures.compare_sites import both_sites, compare_sites
from fluxsae.records.features import Selection
from fluxsae.scoring.scores import Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for side in ("left", "right"):
        parser.add_argument(f"{side}_scores", type=Path, help=f"scores folder of the {side} site")
        parser.add_argument(f"{side}_features", type=Path, help=f"features table of the {side} site")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tiny/figures/compare_sites.png"),
        help="the PNG to write (default: %(default)s)",
    )
    parser.add_argument("--n-features", type=int, default=24, help="features of each site (default: %(default)s)")
    parser.add_argument("--rank-by", default="coherence", help="a column of the table (default: %(default)s)")
    given = parser.parse_args()
    left, right = Scores.open(given.left_scores), Scores.open(given.right_scores)
    features = [
        Selection(table, given.n_features, given.rank_by).rows()
        for table in (given.left_features, given.right_features)
    ]
    compare_sites(*both_sites(left, right, features[0], features[1]), given.out)
    print(given.out)


if __name__ == "__main__":
    main()
