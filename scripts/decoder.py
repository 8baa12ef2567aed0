"""Draw an SAE's decoder: the norms of its rows, and how alike the directions of the best features are."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxsae.figures.decoder import decoder
from fluxsae.records.features import Selection
from fluxsae.sae import load_sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--sae",
        type=Path,
        default=Path("runs/tiny/sae"),
        help="the SAE's folder, or a .pt checkpoint with model_state_dict and config",
    )
    parser.add_argument("--features", type=Path, default=Path("runs/tiny/features.csv"), help="the features table")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/figures/decoder.png"), help="the PNG to write")
    parser.add_argument("--n-features", type=int, default=24, help="how many of the best-ranked features to compare")
    parser.add_argument("--rank-by", default="coherence", help="a column of the table")
    given = parser.parse_args()
    weights = load_sae(given.sae).W_dec.detach().numpy()
    decoder(weights, Selection(given.features, given.n_features, given.rank_by).rows(), given.out)
    print(given.out)


if __name__ == "__main__":
    main()
