"""Puts a pipeline where it is to run: on a device as a whole, or all but some of its blocks."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from fluxsae.models.compiled import compile_blocks
from fluxsae.models.offload import Offloaded, spread


def to_device(
    pipe: FluxPipeline, device: torch.device, *, n_offloaded: int = 0, compiled: bool = False
) -> FluxPipeline:
    """Move `pipe` to `device` and return it.

    Args:
        pipe: a pipeline on the CPU or on `device`.
        device: where it will run.
        n_offloaded: number of single-stream blocks that stay in host memory. They are evenly spread, and each is copied
            to the device while blocks before it are computed. ValueError if the transformer has fewer.
        compiled: compile the transformer's other blocks.
    """
    blocks = _to_offload(pipe.transformer, n_offloaded)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "transformer":
            part.to(device)
    _move_without(pipe.transformer, blocks, device)
    if compiled:
        compile_blocks(pipe.transformer)
    if blocks:
        Offloaded(blocks, device)
        for block in blocks:
            block._compiled_call_impl = None  # their weights come and go
    return pipe


def _to_offload(transformer: FluxTransformer2DModel, n_offloaded: int) -> list[nn.Module]:
    candidates = list(transformer.single_transformer_blocks)
    if not 0 <= n_offloaded <= len(candidates):
        raise ValueError(
            f"offload_blocks is {n_offloaded}; this transformer has {len(candidates)} single-stream blocks; "
            "name a number from 0 to that."
        )
    return [candidates[i] for i in spread(len(candidates), n_offloaded)]


def _move_without(transformer: FluxTransformer2DModel, stay: list[nn.Module], device: torch.device) -> None:
    for child in transformer.children():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if part not in stay:
                part.to(device)
