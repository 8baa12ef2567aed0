"""Sparse autoencoders that read, see and steer what a FLUX.1 text-to-image transformer represents.

Names are imported when first asked for, so that `import fluxsae` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxsae.capture import FluxCapture, PromptData
    from fluxsae.data import ActivationData, TokenBatch
    from fluxsae.models import Tape, generate, load_pipeline, record
    from fluxsae.records import (
        CaptureSpec,
        Column,
        Feature,
        GenerationSpec,
        Prompt,
        Selection,
        Site,
        parse_site,
        read_features,
        read_prompts,
        token_grid,
        update_features,
    )
    from fluxsae.runtime import LastCheckpoint, OneAllReduce
    from fluxsae.sae import L1, SAE, BatchTopK, Gated, JumpReLU, TopK, load_sae, save_sae
    from fluxsae.scoring import (
        AliveStatistics,
        Attributes,
        Coherence,
        FeatureAnalysis,
        FeatureMapping,
        ImageScores,
        Overlays,
        SAEScoring,
        Scores,
        ScoresWriter,
        TopImages,
    )
    from fluxsae.shards import ShardSet, describe_channels, verify
    from fluxsae.steering import FluxSteering, SteeringEffects, SteeringGrids, intervene
    from fluxsae.training import SAETraining, SweepTraining

__version__ = "0.2.0"

_ROOMS = {
    "capture": ("FluxCapture", "PromptData"),
    "data": ("ActivationData", "TokenBatch"),
    "models": ("Tape", "generate", "load_pipeline", "record"),
    "records": (
        "CaptureSpec",
        "Column",
        "Feature",
        "GenerationSpec",
        "Prompt",
        "Selection",
        "Site",
        "parse_site",
        "read_features",
        "read_prompts",
        "token_grid",
        "update_features",
    ),
    "runtime": ("LastCheckpoint", "OneAllReduce"),
    "sae": ("L1", "SAE", "BatchTopK", "Gated", "JumpReLU", "TopK", "load_sae", "save_sae"),
    "scoring": (
        "AliveStatistics",
        "Attributes",
        "Coherence",
        "FeatureAnalysis",
        "FeatureMapping",
        "ImageScores",
        "Overlays",
        "SAEScoring",
        "Scores",
        "ScoresWriter",
        "TopImages",
    ),
    "shards": ("ShardSet", "describe_channels", "verify"),
    "steering": ("FluxSteering", "SteeringEffects", "SteeringGrids", "intervene"),
    "training": ("SAETraining", "SweepTraining"),
}
_ROOM = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "L1",
    "SAE",
    "ActivationData",
    "AliveStatistics",
    "Attributes",
    "BatchTopK",
    "CaptureSpec",
    "Coherence",
    "Column",
    "Feature",
    "FeatureAnalysis",
    "FeatureMapping",
    "FluxCapture",
    "FluxSteering",
    "Gated",
    "GenerationSpec",
    "ImageScores",
    "JumpReLU",
    "LastCheckpoint",
    "OneAllReduce",
    "Overlays",
    "Prompt",
    "PromptData",
    "SAEScoring",
    "SAETraining",
    "Scores",
    "ScoresWriter",
    "Selection",
    "ShardSet",
    "Site",
    "SteeringEffects",
    "SteeringGrids",
    "SweepTraining",
    "Tape",
    "TokenBatch",
    "TopImages",
    "TopK",
    "describe_channels",
    "generate",
    "intervene",
    "load_pipeline",
    "load_sae",
    "parse_site",
    "read_features",
    "read_prompts",
    "record",
    "save_sae",
    "token_grid",
    "update_features",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM})
