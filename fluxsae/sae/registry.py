"""Kinds of SAEs by class path: the path that a file stores, and the class that a path names."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from typing import Any

from fluxsae.sae.base import SAE


def class_path(kind: type[SAE]) -> str:
    """The class path by which a file names a kind: `fluxsae.TopK` for this package's kinds, else module and name.

    ValueError for a class that another process could not import.
    """
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        raise ValueError(
            f"the SAE is a {kind.__qualname__} of {kind.__module__}, which another process cannot import; "
            "move the class to the top level of a module."
        )
    module = "fluxsae" if kind.__module__.startswith("fluxsae.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def find_kind(path: str) -> type[SAE]:
    """The kind that a class path names. Its module is imported. So a file can name installed code, but brings none.

    ValueError for a malformed path, for a module that is missing or belongs to Python's own library, and for a class
    that is no subclass of `SAE`.
    """
    module, _, name = path.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path) or not module:
        raise ValueError(f"{path!r} is no class path; expected one such as 'fluxsae.TopK' or 'my_package.MyKind'.")
    if module.split(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{path!r} is in Python's own library and no kind of SAE; expected a path such as 'fluxsae.TopK'."
        )
    try:
        kind: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"this SAE is a {path!r}, which is not there ({error}); install the package that has it, or put its folder "
            "on PYTHONPATH."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, SAE)):
        raise ValueError(f"{path!r} is no kind of SAE, which are subclasses of fluxsae.SAE.")
    return kind
