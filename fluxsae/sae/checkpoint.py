"""SAEs on disk: a folder with `sae.safetensors` and `config.json`.

For reading only, `.pt` checkpoints with `model_state_dict` and `config`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fluxsae.files import read_json, remove_parts, whole_file, write_json
from fluxsae.records import CaptureSpec
from fluxsae.sae.base import SAE
from fluxsae.sae.kinds.l1 import L1
from fluxsae.sae.kinds.topk import TopK
from fluxsae.sae.registry import class_path, find_kind

VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"


def save_sae(folder: str | Path, sae: SAE, training: dict[str, Any] | None = None) -> None:
    """Write an SAE, what it was trained on, and a summary of its training.

    `config.json` is written last, so a folder that has it is whole. ValueError for a class that another process could
    not import.
    """
    folder, kind = Path(folder), class_path(type(sae))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CONFIG):
        remove_parts(folder / name)
    (folder / CONFIG).unlink(missing_ok=True)  # between new weights and a new config, the old one would tell lies
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    config = {
        "version": VERSION,
        "kind": type(sae).__name__,
        "class_path": kind,
        "d_in": sae.d_in,
        "n_features": sae.n_features,
        "options": sae.options(),
        "mean_norm": sae.mean_norm,
        "spec": sae.spec.to_dict() if sae.spec is not None else None,
        "training": training or {},
    }
    write_json(folder / CONFIG, config)


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE in a folder that a training left, or in a `.pt` checkpoint with `model_state_dict` and `config`.

    It is in evaluation mode and has no gradients. The module that the folder's `class_path` names is imported. Files
    bring no code of their own: weights are safetensors, and a `.pt` file is read as plain tensors.

    Raises FileNotFoundError when there is no SAE. Raises ValueError when it is damaged, is of another version, or is of
    a kind that is not installed.
    """
    path = Path(path)
    if path.is_file():
        return _load_state_dict(path).to(device).requires_grad_(False).eval()
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"there is no SAE at {path} (no {CONFIG}); run `fluxsae fit`, or name its folder.")
    config = read_config(path)
    sae = _build(path / CONFIG, config)
    try:
        sae.load_state_dict(load_file(path / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / WEIGHTS} does not hold this SAE's weights ({reason}); fit it again.") from error
    return sae.to(device).requires_grad_(False).eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of an SAE folder: kind, sizes, spec, and under `training` the summary of its training."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"there is no SAE at {folder} (no {CONFIG}); run `fluxsae fit`, or name its folder.")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("version") != VERSION:
        found = config.get("version") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} has format version {found!r}, this package reads {VERSION}; fit the SAE again.")
    return config


def _build(path: Path, config: dict[str, Any]) -> SAE:
    try:
        kind = find_kind(config.get("class_path", f"fluxsae.{config['kind']}"))  # the first edition wrote names alone
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe an SAE that can be had here: {error}") from error
    try:
        sae = kind(config["d_in"], config["n_features"], **config["options"])
        sae.spec = CaptureSpec.from_dict(config["spec"]) if config["spec"] is not None else None
        sae.mean_norm = config["mean_norm"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe an SAE ({type(error).__name__}: {error}); fit it again.") from error
    return sae


def _load_state_dict(path: Path) -> SAE:
    """A checkpoint of `model_state_dict` and `config`. It names no site and step, and needs no normalisation."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} does not load as plain tensors, so it is damaged or holds code, which is never run; "
            "save it again with tensors and plain values only."
        ) from error
    try:
        weights, config = content["model_state_dict"], content["config"]
        d_in, n_features = int(config["input_dim"]), int(config["hidden_dim"])
        sae: SAE = TopK(d_in, n_features, int(config["topk_k"])) if config["use_topk"] else L1(d_in, n_features)
        state = {
            "W_enc": weights["encoder.weight"],
            "b_enc": weights["encoder.bias"],
            "W_dec": weights["decoder.weight"].T,
            "b_dec": weights["pre_bias"].reshape(-1),
        }
        sae.load_state_dict({**sae.state_dict(), **state})
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no checkpoint of an SAE ({type(error).__name__}: {reason}); expected model_state_dict with "
            "pre_bias, encoder.weight, encoder.bias, decoder.weight and config with "
            "input_dim, hidden_dim, use_topk, topk_k."
        ) from error
    return sae
