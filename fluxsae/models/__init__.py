"""Models that make images: diffusers' pipelines and what their modules return. Only this room imports diffusers."""

from fluxsae.models.compiled import Uncompiled
from fluxsae.models.embeddings import EmbeddingCache, EmbeddingsAhead, PromptEmbeddings
from fluxsae.models.generation import generate, pictures, time_shift
from fluxsae.models.load import (
    FluxPipeline,
    is_on_hub,
    load_frame,
    load_pipeline,
    transformer_skeleton,
    weights_identity,
)
from fluxsae.models.placement import to_device
from fluxsae.models.recording import Tape, TapeIsFull, record
from fluxsae.models.shapes import token_shapes
from fluxsae.models.steps import StepCounter, count_steps
from fluxsae.models.streams import find_module, read_stream, replace_stream

__all__ = [
    "EmbeddingCache",
    "EmbeddingsAhead",
    "FluxPipeline",
    "PromptEmbeddings",
    "StepCounter",
    "Tape",
    "TapeIsFull",
    "Uncompiled",
    "count_steps",
    "find_module",
    "generate",
    "is_on_hub",
    "load_frame",
    "load_pipeline",
    "pictures",
    "read_stream",
    "record",
    "replace_stream",
    "time_shift",
    "to_device",
    "token_shapes",
    "transformer_skeleton",
    "weights_identity",
]
