"""Loads a FLUX pipeline from a folder or the hub, and says which weights it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from fluxsae.files import hash_of_ends, weights_folder

_ALIGNMENT = 64
"""Bytes of which PyTorch's own memory begins at a multiple."""


def load_pipeline(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> FluxPipeline:
    """The `FluxPipeline` in a diffusers folder, or of a hub id such as `black-forest-labs/FLUX.1-dev`.

    `bundled:tiny-flux` is the small FLUX that comes with the package.

    By default `dtype` is float32 on a CPU and bfloat16 elsewhere. The pipeline's default image size is the one that its
    autoencoder was made for. Raises FileNotFoundError when `model` is neither a pipeline folder nor a hub id.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    pipe = _from_pretrained(model, dtype=dtype)
    pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
        if device.type == "cpu" and dtype == torch.float32:
            _align(part)
    return pipe.to(device)


def _align(part: nn.Module) -> None:
    """Have each weight begin where PyTorch would put it, not where it lies in a mapped file.

    On some processors a product of a single row is rounded otherwise when its weights begin elsewhere, and images are
    to be the same to the bit wherever weights have been copied to.
    """
    for weight in part.parameters():
        if weight.data_ptr() % _ALIGNMENT:
            weight.data = weight.data.clone()


def load_frame(model: str | Path) -> FluxPipeline:
    """The pipeline without weights: its scheduler and tokenizers."""
    return _from_pretrained(model, transformer=None, vae=None, text_encoder=None, text_encoder_2=None)


def transformer_skeleton(model: str | Path) -> FluxTransformer2DModel:
    """The transformer's modules without weights, on the meta device."""
    config = FluxTransformer2DModel.load_config(str(model_folder(model)), subfolder="transformer")
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def model_folder(model: str | Path) -> Path:
    """The folder of a pipeline: `model` itself, or where the files of that hub id are kept, fetched when absent.

    `bundled:NAME` means weights that come with the package.
    Raises FileNotFoundError when there is neither. What looks like a path is never asked of the hub.
    """
    if is_on_hub(model):
        return _from_hub(str(model))
    folder = weights_folder(model).expanduser()
    if not (folder / "model_index.json").is_file():
        what = f"{folder} has no model_index.json" if folder.is_dir() else f"there is no folder {folder}"
        raise FileNotFoundError(
            f"{what}, so no FLUX can be loaded from it; name a diffusers pipeline folder, "
            "or a hub id such as black-forest-labs/FLUX.1-dev."
        )
    return folder


def is_on_hub(model: str | Path) -> bool:
    """Whether `model` means files of the hub; a name that is no folder, but looks like a path, is a mistake instead."""
    folder = weights_folder(model).expanduser()
    return not (folder.is_dir() or _looks_like_path(str(folder)))


def weights_identity(model: str | Path) -> str:
    """A hash of the weights in `model`: of each weight file its name, size, and first and last MiB; of each config all.

    The safetensors header lies in the first MiB.
    A folder copied from the hub is the same model as the hub's.
    """
    folder = model_folder(model)
    named = sorted((path.relative_to(folder).as_posix(), path) for path in _identity_files(folder))
    return hash_of_ends(named)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") != 1 or os.path.exists(model.split("/")[0])


def _from_hub(hub_id: str) -> Path:
    told = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # what it warns of when it fails, the error below says
    try:
        return Path(FluxPipeline.download(hub_id))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{hub_id!r} is no folder here, and the hub gave no such model ({type(error).__name__}); check the name "
            "and the connection, and for a gated model accept its licence and log in with `hf auth login`."
        ) from error
    finally:
        diffusers_logging.set_verbosity(told)


def _identity_files(folder: Path) -> list[Path]:
    """Weights and configs of the parts that an image depends on, and what decides their input: tokenizers, schedule."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    weights = [path for part in parts for path in (folder / part).glob("*.safetensors")]
    configs = [path for part in parts for path in (folder / part).glob("config.json")]
    texts = [path for part in ("tokenizer", "tokenizer_2", "scheduler") for path in (folder / part).glob("*")]
    return [*weights, *configs, *(path for path in texts if path.is_file())]


def _from_pretrained(model: str | Path, **options: Any) -> FluxPipeline:
    folder = model_folder(model)
    with _no_progress_bars():
        return FluxPipeline.from_pretrained(
            str(folder),
            local_files_only=True,
            # Asked for outright, because diffusers would advise to install accelerate at every load without it.
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            **options,
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar a file of every part, from two libraries, says nothing that a user waits for."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()
