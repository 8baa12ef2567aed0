"""How many tokens of which width a site holds, found without weights.

Legend: T tokens an image, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from fluxsae.models.streams import find_module, read_stream
from fluxsae.records import Grid, Site


class TokenShape(NamedTuple):
    """T and D of an image at a site."""

    n_tokens: int
    width: int


@torch.no_grad()
def token_shapes(
    skeleton: FluxTransformer2DModel, sites: Sequence[Site], grid: Grid, text_length: int
) -> list[TokenShape]:
    """The shape at each of `sites`, from one pass of a transformer on the meta device, which computes nothing.

    The pass ends behind the last of them, as even nothing takes a second in FLUX.1.
    Raises ValueError for a site that is no module, lacks the stream, or holds no tokens.
    """
    shapes: dict[Site, TokenShape] = {}
    wanted = list(dict.fromkeys(sites))
    if not wanted:
        return []
    handles = [
        find_module(skeleton, site).register_forward_hook(_reader(shapes, site, text_length, len(wanted)))
        for site in wanted
    ]
    try:
        with suppress(_AllSeen):
            _pass(skeleton, grid.n_tokens, text_length)
    finally:
        for handle in handles:
            handle.remove()
    return [shapes[site] for site in sites]


def _pass(skeleton: FluxTransformer2DModel, n_tokens: int, text_length: int) -> None:
    config = skeleton.config
    with torch.device("meta"):
        skeleton(
            hidden_states=torch.empty(1, n_tokens, config.in_channels),
            encoder_hidden_states=torch.empty(1, text_length, config.joint_attention_dim),
            pooled_projections=torch.empty(1, config.pooled_projection_dim),
            timestep=torch.empty(1),
            guidance=torch.empty(1) if config.guidance_embeds else None,
            img_ids=torch.empty(n_tokens, 3),
            txt_ids=torch.empty(text_length, 3),
        )


class _AllSeen(Exception):
    """Every shape is known."""


def _reader(
    shapes: dict[Site, TokenShape], site: Site, n_text: int, n_sites: int
) -> Callable[[nn.Module, Any, Any], None]:
    def after(module: nn.Module, args: Any, output: Any) -> None:
        shapes[site] = TokenShape(*read_stream(output, site, n_text).shape[1:])
        if len(shapes) == n_sites:
            raise _AllSeen

    return after
