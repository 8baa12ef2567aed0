"""Draw how trainings went: loss, variance explained on held-out prompts, L0 and dead features, one line a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxsae.figures.training_curves import read_run, training_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="folders of fits, such as TopK=runs/tiny/sae L1=runs/tiny/sae-l1",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/tiny/figures/training_curves.png"),
        help="the PNG to write (default: %(default)s)",
    )
    given = parser.parse_args()
    named = (run.partition("=") for run in given.runs)
    folders = {name if equals else Path(name).name: folder if equals else name for name, equals, folder in named}
    training_curves({name: read_run(folder) for name, folder in folders.items()}, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
