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
    from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK, load_sae, save_sae
    from fluxsae.scoring import (
        AliveStatistics,
        Attributes,
        Coherence,
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

__version__ = "0.1.0"

_HOMES = {
    "fluxsae.data.activations": ("ActivationData", "TokenBatch"),
    "fluxsae.scoring.analyses.alive": ("AliveStatistics",),
    "fluxsae.scoring.analyses.attributes": ("Attributes",),
    "fluxsae.scoring.analyses.coherence": ("Coherence",),
    "fluxsae.scoring.analyses.overlays": ("Overlays",),
    "fluxsae.scoring.analyses.scores_writer": ("ScoresWriter",),
    "fluxsae.steering.effects": ("SteeringEffects",),
    "fluxsae.steering.grids": ("SteeringGrids",),
    "fluxsae.scoring.analyses.top_images": ("TopImages",),
    "fluxsae.capture": ("FluxCapture", "PromptData"),
    "fluxsae.records.features": ("Feature", "Selection", "read_features", "update_features"),
    "fluxsae.models.generation": ("generate",),
    "fluxsae.steering.intervention": ("intervene",),
    "fluxsae.models.load": ("load_pipeline",),
    "fluxsae.models.recording": ("Tape", "record"),
    "fluxsae.records.prompts": ("Prompt", "read_prompts"),
    "fluxsae.runtime": ("LastCheckpoint", "OneAllReduce"),
    "fluxsae.sae": ("L1", "SAE", "BatchTopK", "JumpReLU", "TopK", "load_sae", "save_sae"),
    "fluxsae.scoring": ("ImageScores", "SAEScoring", "Scores"),
    "fluxsae.shards.channels": ("describe_channels",),
    "fluxsae.shards.read": ("ShardSet",),
    "fluxsae.shards.verification": ("verify",),
    "fluxsae.records.spec": ("CaptureSpec", "GenerationSpec", "Site", "parse_site", "token_grid"),
    "fluxsae.steering": ("FluxSteering",),
    "fluxsae.training.sweep": ("SweepTraining",),
    "fluxsae.training": ("SAETraining",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "L1",
    "SAE",
    "ActivationData",
    "AliveStatistics",
    "Attributes",
    "BatchTopK",
    "CaptureSpec",
    "Coherence",
    "Feature",
    "FluxCapture",
    "FluxSteering",
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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
