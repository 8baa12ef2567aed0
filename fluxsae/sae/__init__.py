"""Sparse autoencoders as plain modules: what they share, the kinds, their files, how good they are."""

from fluxsae.sae.base import SAE, FusedForm, ThresholdForm, TrainOutput, kinds_with
from fluxsae.sae.checkpoint import load_sae, save_sae
from fluxsae.sae.dead import aux_error, draw_directions, resample
from fluxsae.sae.evaluation import Evaluation, Metrics, batch_variance_explained
from fluxsae.sae.feature_rows import add_rows, whole
from fluxsae.sae.kinds.batch_topk import BatchTopK
from fluxsae.sae.kinds.gated import Gated
from fluxsae.sae.kinds.jumprelu import JumpReLU
from fluxsae.sae.kinds.l1 import L1
from fluxsae.sae.kinds.topk import TopK
from fluxsae.sae.objective import squared_errors, token_weights
from fluxsae.sae.pooling import PlainPooling, Pooled, Pooling, pooling_of
from fluxsae.sae.registry import class_path
from fluxsae.sae.sharding import average_gradients, gather, shard

__all__ = [
    "L1",
    "SAE",
    "BatchTopK",
    "Evaluation",
    "FusedForm",
    "Gated",
    "JumpReLU",
    "Metrics",
    "PlainPooling",
    "Pooled",
    "Pooling",
    "ThresholdForm",
    "TopK",
    "TrainOutput",
    "add_rows",
    "aux_error",
    "average_gradients",
    "batch_variance_explained",
    "class_path",
    "draw_directions",
    "gather",
    "kinds_with",
    "load_sae",
    "pooling_of",
    "resample",
    "save_sae",
    "shard",
    "squared_errors",
    "token_weights",
    "whole",
]
