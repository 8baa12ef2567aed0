"""`fluxsae figures`: which figures a config file and the command line ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from fluxsae.cli.config_arguments import read_arguments
from fluxsae.cli.config_errors import explain, is_report
from fluxsae.figures import Figures
from fluxsae.records import Selection

USAGE = """fluxsae figures -c CONFIG [--root DIR] [--KEY VALUE ...]

--root is the study's folder, ${root} in a config, if not the one that the study.yaml beside it says.
Any key of the config file can be given here too, as in --select.n_features 8."""


def read_figures(arguments: Sequence[str], root: Path | None = None) -> Figures:
    """The figures that `-c FILE` and further arguments ask for; `root` is the study's folder, if known.

    Raises FileNotFoundError, ValueError and argparse.ArgumentError, in a sentence.
    """
    given = read_arguments(arguments, root)
    parser = ArgumentParser(prog="fluxsae figures", usage=USAGE, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="which figures to draw, as YAML")
    parser.add_class_arguments(Figures)
    try:
        found = parser.instantiate(parser.parse_args(given.words()))
    except (argparse.ArgumentError, ValueError) as error:
        if isinstance(error, ValueError) and not is_report(str(error)):
            raise
        known = {"": list(Figures.__dataclass_fields__), "select": list(Selection.__dataclass_fields__)}
        raise argparse.ArgumentError(None, explain(str(error), known, given.files)) from error
    return Figures(**{name: found[name] for name in Figures.__dataclass_fields__})
