"""The `fluxsae` command."""

from fluxsae.cli.command import main

__all__ = ["main"]
