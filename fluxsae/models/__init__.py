"""Models that make images: diffusers' pipelines and what their modules return. Only this room imports diffusers."""

from fluxsae.models.embeddings import EmbeddingCache, EmbeddingsAhead, PromptEmbeddings
from fluxsae.models.generation import generate, pictures, time_shift
from fluxsae.models.load import FluxPipeline, load_frame, load_pipeline, transformer_skeleton, weights_identity
from fluxsae.models.placement import to_device
from fluxsae.models.recording import Tape, TapeIsFull, record
from fluxsae.models.shapes import token_shapes
from fluxsae.models.streams import find_module

__all__ = [
    "EmbeddingCache",
    "EmbeddingsAhead",
    "FluxPipeline",
    "PromptEmbeddings",
    "Tape",
    "TapeIsFull",
    "find_module",
    "generate",
    "load_frame",
    "load_pipeline",
    "pictures",
    "record",
    "time_shift",
    "to_device",
    "token_shapes",
    "transformer_skeleton",
    "weights_identity",
]
