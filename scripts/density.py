"""Draw how often features are active: a histogram over features of the share of images on which each is."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxsae.figures.density import density, frequencies
from fluxsae.records.features import read_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--features", type=Path, default=Path("runs/tiny/features.csv"), help="the features table")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/figures/density.png"), help="the PNG to write")
    parser.add_argument("--bins", type=int, default=40, help="bars of the histogram")
    given = parser.parse_args()
    density(frequencies(read_features(given.features)), given.out, bins=given.bins)
    print(given.out)


if __name__ == "__main__":
    main()
