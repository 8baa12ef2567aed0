"""CLIP image embeddings through open_clip, from a local folder, a built-in name or a hub model.

Legend: B images, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from fluxsae.files import weights_folder


class Clip(NamedTuple):
    """A CLIP model in evaluation mode and what turns a picture into its input."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    device: torch.device


def load_clip(name: str, device: torch.device | str = "cpu") -> Clip:
    """The model that `name` means: `local-dir:FOLDER`, `bundled:tiny-clip`, `MODEL/PRETRAINED`, or `hf-hub:…`.

    An example of the third is `ViT-B-32/openai`. Only the latter two fetch weights, once.
    Raises FileNotFoundError for a folder that is none, ValueError for another name.
    """
    if name.startswith(("local-dir:", "bundled:")):
        folder = weights_folder(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").exists():
            raise FileNotFoundError(f"there is no CLIP model in {folder} (no open_clip_config.json); name its folder.")
        arguments: dict[str, Any] = {"model_name": f"local-dir:{folder}"}
    elif name.startswith("hf-hub:"):
        arguments = {"model_name": name}
    else:
        arguments = _built_in(name)
    import open_clip  # takes seconds, which other analyses need not wait for

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            **arguments, device=device, pretrained_image=False, pretrained_text=False
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"CLIP {name!r} does not load ({reason}); name another, or a folder by local-dir:.") from error
    return Clip(model.eval().requires_grad_(False), preprocess, torch.device(device))


def _built_in(name: str) -> dict[str, Any]:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    model, _, weights = name.partition("/")
    if (model, weights) not in open_clip.list_pretrained():
        raise ValueError(
            f"CLIP {name!r} is no model and weights that open_clip knows; "
            "write for example 'ViT-B-32/openai', 'local-dir:FOLDER' or 'bundled:tiny-clip'."
        )
    # Some weights want QuickGELU and open_clip only warns when the model is built without it.
    quick = bool(get_pretrained_cfg(model, weights).get("quick_gelu", False))
    return {"model_name": model, "pretrained": weights, "force_quick_gelu": quick}


def embed(clip: Clip, images: Iterable[Image.Image], batch_size: int = 64) -> Float[Tensor, "B E"]:
    """Embeddings of unit length, on the CPU, of images that are taken one batch at a time."""
    return torch.cat([batch.cpu() for batch in _embed(clip, images, batch_size)])


@torch.no_grad()
def _embed(clip: Clip, images: Iterable[Image.Image], batch_size: int) -> Iterator[Tensor]:
    waiting = iter(images)
    while pictures := list(islice(waiting, batch_size)):
        pixels = torch.stack([clip.preprocess(picture.convert("RGB")) for picture in pictures])
        yield normalize(clip.model.encode_image(pixels.to(clip.device)).float(), dim=1)  # type: ignore[operator]
