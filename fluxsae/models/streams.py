"""Image tokens and text tokens in what the modules of a FLUX transformer return, told apart and put back.

Dual-stream blocks (`transformer_blocks.N`) return the pair (text, image), their `attn` the pair (image, text), their
other modules one stream. Single-stream blocks (`single_transformer_blocks.N`) and everything inside them hold text and
image tokens joined, text first; the block itself returns the pair (text, image) in newer versions of diffusers.

Legend: B batch, T tokens an image, D width.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxsae.records import Site, Stream

StreamOrder = Literal["image", "text", "joint", "text, image", "image, text"]


def stream_order(path: str) -> StreamOrder:
    """How the output of the module at `path` holds the two streams."""
    if path.startswith("single_transformer_blocks."):
        return "joint"
    if re.fullmatch(r"transformer_blocks\.\d+", path):
        return "text, image"
    if re.fullmatch(r"transformer_blocks\.\d+\.attn", path):
        return "image, text"
    return "text" if path == "context_embedder" else Site(path, "image").default_stream


def find_module(transformer: nn.Module, site: Site) -> nn.Module:
    """The module that `site` names. ValueError, with near matches, when there is none or it has no such stream."""
    modules = dict(transformer.named_modules())
    module = modules.get(site.path)
    if module is None or isinstance(module, nn.ModuleList):
        names = [name for name, other in modules.items() if name and not isinstance(other, nn.ModuleList)]
        near = difflib.get_close_matches(site.path, names, n=3, cutoff=0.5) or names[:3]
        raise ValueError(
            f"site {site.path!r} is no module of this transformer; it has for example "
            f"{', '.join(map(repr, near))} ({_block_counts(transformer)})."
        )
    held = stream_order(site.path)
    if held in ("image", "text") and held != site.stream:
        raise ValueError(
            f"site '{site.path}:{site.stream}' asks for {site.stream} tokens but that module holds {held} tokens only; "
            f"write '{site.path}', or name a module of the other branch."
        )
    return module


def read_stream(output: Any, site: Site, n_text: int) -> Float[Tensor, "B T D"]:
    """The tokens of `site` in its module's `output`, a view; `n_text` is the number of text tokens of the forward pass.

    Raises ValueError when the output holds no tokens, as that of a normalisation's linear layer.
    """
    part = _part(output, site)
    tokens = output if part is None else output[part]
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ValueError(
            f"site {str(site)!r} returns {_describe(tokens)}, not tokens of shape [batch, tokens, width]; "
            "choose a block, or its attn, ff or ff_context."
        )
    return tokens[:, _span(site.stream, n_text)] if _is_joint(output, site) else tokens


def replace_stream(output: Any, site: Site, n_text: int, new: Float[Tensor, "B T D"]) -> Any:
    """`output` with the tokens of `site` replaced by `new`, of the same structure; nothing is changed in place."""
    part = _part(output, site)
    tokens = output if part is None else output[part]
    if _is_joint(output, site):
        text, image = tokens[:, :n_text], tokens[:, n_text:]
        new = torch.cat([text, new] if site.stream == "image" else [new, image], dim=1)
    if part is None:
        return new
    return type(output)(new if index == part else value for index, value in enumerate(output))


def _part(output: Any, site: Site) -> int | None:
    """Which element of the output tuple holds the stream; None when the output is a tensor."""
    if not isinstance(output, (tuple, list)):
        return None
    held = stream_order(site.path)
    if held == "joint":
        held = "joint" if _is_joint(output, site) else "text, image"
    pair = {"text, image": ("text", "image"), "image, text": ("image", "text")}.get(held)
    # The tokens lead where a module returns more than tokens: normalisations return their gates as well.
    return 0 if pair is None else pair.index(site.stream)


def _is_joint(output: Any, site: Site) -> bool:
    if stream_order(site.path) != "joint":
        return False
    pair = isinstance(output, (tuple, list)) and len(output) == 2
    return not (pair and all(isinstance(part, Tensor) and part.ndim == 3 for part in output))


def _span(stream: Stream, n_text: int) -> slice:
    return slice(n_text, None) if stream == "image" else slice(None, n_text)


def _describe(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _block_counts(transformer: nn.Module) -> str:
    counts = []
    for name in ("transformer_blocks", "single_transformer_blocks"):
        blocks = transformer.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        counts.append(f"{name}.0 to .{len(blocks) - 1}" if len(blocks) else f"no {name}")
    return ", ".join(counts)
