"""Compiled transformer blocks, and hooks in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from diffusers import FluxTransformer2DModel
from torch import nn


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compile each block by itself: blocks of a kind share their code, so it takes a minute, not ten."""
    transformer.compile_repeated_blocks()


def is_compiled(transformer: nn.Module) -> bool:
    """Whether any part of it is compiled."""
    return any(module._compiled_call_impl is not None for module in transformer.modules())


@contextmanager
def uncompiled(transformer: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside this context whatever contains one of `modules` runs as it is written.

    A compiled block would not see hooks that were put into it later, or would be compiled anew as they change.
    """
    wanted = set(modules)
    held = [module for module in transformer.modules() if wanted & set(module.modules())]
    before = [module._compiled_call_impl for module in held]
    try:
        for module in held:
            module._compiled_call_impl = None
        yield
    finally:
        for module, compiled in zip(held, before, strict=True):
            module._compiled_call_impl = compiled
