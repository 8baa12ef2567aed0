"""Compiled transformer blocks, and hooks in them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import FluxTransformer2DModel
from torch import nn


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compile each block by itself: blocks of a kind share their code, so it takes a minute, not ten."""
    transformer.compile_repeated_blocks()


def is_compiled(transformer: nn.Module) -> bool:
    """Whether any part of it is compiled."""
    return any(module._compiled_call_impl is not None for module in transformer.modules())


class Uncompiled:
    """Inside this context, every block that contains one of `modules` runs uncompiled.

    A compiled block would not see hooks that are added later, or would be compiled again when they change. The context
    can be entered again after it was left, and a block can be in several contexts.
    """

    def __init__(self, transformer: nn.Module, modules: Iterable[nn.Module]) -> None:
        wanted = set(modules)
        self._held = [module for module in transformer.modules() if wanted & set(module.modules())]

    def __enter__(self) -> None:
        for module in self._held:
            n_contexts, compiled = _HELD.get(module, (0, module._compiled_call_impl))
            _HELD[module] = n_contexts + 1, compiled
            module._compiled_call_impl = None

    def __exit__(self, *_: object) -> None:
        for module in self._held:
            n_contexts, compiled = _HELD.pop(module)
            if n_contexts > 1:
                _HELD[module] = n_contexts - 1, compiled
            else:
                module._compiled_call_impl = compiled


_HELD: MutableMapping[nn.Module, tuple[int, Any]] = WeakKeyDictionary()
"""Modules that run as they are written: in how many contexts they are, and their compiled call."""
