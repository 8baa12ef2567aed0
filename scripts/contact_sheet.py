"""Draw the contact sheet: a feature a row, its top images with overlays, and in the margin its numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxsae.figures.contact_sheet import contact_sheet, sheet_rows
from fluxsae.records.features import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--features", type=Path, default=Path("runs/tiny/features.csv"), help="the features table")
    parser.add_argument("--images", type=Path, default=Path("runs/tiny/capture/images"), help="the captured images")
    parser.add_argument(
        "--overlays", type=Path, default=Path("runs/tiny/overlays"), help="what the overlays stage left"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tiny/figures/contact_sheet.png"), help="the PNG to write"
    )
    parser.add_argument("--n-features", type=int, default=20, help="how many of the best-ranked features")
    parser.add_argument("--n-images", type=int, default=5, help="examples a feature")
    parser.add_argument("--rank-by", default="coherence", help="a column of the table")
    parser.add_argument(
        "--layout", choices=("pairs", "overlays"), default="pairs", help="original | overlay, or overlay"
    )
    parser.add_argument("--title", default="What features respond to", help="a line above the sheet")
    given = parser.parse_args()
    select = Selection(given.features, given.n_features, given.rank_by, given.n_images)
    rows = sheet_rows(select, given.images, given.overlays)
    contact_sheet(rows, given.out, layout=given.layout, title=given.title)
    print(given.out)


if __name__ == "__main__":
    main()
