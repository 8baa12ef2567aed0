"""`fluxsae figures`: which figures a config file asks for."""

from __future__ import annotations

import argparse
from pathlib import Path

from jsonargparse import ArgumentParser

from fluxsae.cli.config_errors import explain
from fluxsae.figures import Figures
from fluxsae.records import Selection


def read_figures(config: Path) -> Figures:
    """The figures that a YAML file asks for. FileNotFoundError and argparse.ArgumentError, in a sentence."""
    if not config.is_file():
        raise FileNotFoundError(f"there is no config file {config}: name one, such as configs/tiny/figures.yaml.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Figures, "figures")
    # One key above all others, because a dataclass is made from a group of arguments and not from a whole parser.
    try:
        text = "figures:\n" + "".join(f"  {line}\n" for line in config.read_text(encoding="utf-8").splitlines())
        return parser.instantiate(parser.parse_string(text)).figures
    except argparse.ArgumentError as error:
        known = {"": list(Figures.__dataclass_fields__), "select": list(Selection.__dataclass_fields__)}
        raise argparse.ArgumentError(None, explain(str(error).replace("figures.", ""), known)) from error
