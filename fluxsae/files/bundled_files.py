"""Where the files are that come with the package: configs, and the weights of a small FLUX and a small CLIP.

An installed package has them in `fluxsae/bundled/`, a clone at its top.
"""

from __future__ import annotations

from pathlib import Path

from fluxsae.files.suggestions import unknown_key

PREFIX = "bundled:"
"""What a name begins with, such as `bundled:tiny-flux`, that means weights which come with the package."""

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """The folder `name` of what comes with the package, such as `configs/tiny` or `checkpoints/tiny-flux`.

    Raises FileNotFoundError when there is none.
    """
    installed = _PACKAGE / "bundled"
    top = installed if installed.is_dir() else _PACKAGE.parent
    folder = top / name
    if not folder.is_dir():
        parent = folder.parent
        known = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        raise FileNotFoundError(unknown_key(folder.name, known, str(parent), what="folder"))
    return folder


def weights_folder(name: str | Path) -> Path:
    """The folder that a name of weights means: of `bundled:NAME` where they are, of everything else the same path.

    Raises FileNotFoundError when nothing of that name comes with the package.
    """
    text = str(name)
    return bundled(f"checkpoints/{text.removeprefix(PREFIX)}") if text.startswith(PREFIX) else Path(name)


def config_file(name: str) -> Path:
    """The config file that a name means: `bundled:tiny/topk.yaml` comes with the package, all else is a path."""
    return bundled("configs") / name.removeprefix(PREFIX) if name.startswith(PREFIX) else Path(name)
